import { FewbitError } from "../core/errors.js";
import { type ModelFolderOptions, openModelFolder } from "../io/model-folder.js";
import { readJson, readText, type SourceDirectory } from "../io/source.js";
import {
  CHAT_TEMPLATES,
  type ChatMessage,
  type ChatTemplate,
  modelTemplate,
  namedTemplate,
  parseTemplate,
} from "../text/chat.js";
import type { ModelFolder } from "./load.js";
import type { GeneratedToken, GenerateOptions, Model } from "./model.js";

export interface ChatTemplateOptions {
  /** One of `CHAT_TEMPLATES` instead of the model's own. */
  readonly name?: string;
  /** A Jinja template instead of the model's own; `path` is for messages. */
  readonly file?: { readonly path: string; readonly text: string };
  /** As for `loadModel`. */
  readonly source?: ModelFolderOptions;
  readonly signal?: AbortSignal;
}

/**
 * The chat template for a model folder. Throws `argument/invalid` when the model has none and none was given,
 * `argument/unknown-name`, `io/malformed`.
 */
export async function openChatTemplate(
  folder: ModelFolder,
  { name, file, source, signal }: ChatTemplateOptions = {},
): Promise<ChatTemplate> {
  const open = signal === undefined ? {} : { signal };
  const directory = await openModelFolder(folder, { ...open, ...source });
  const config = await readJson(directory, "tokenizer_config.json", open);
  if (file !== undefined) return parseTemplate(file.text, [], config, file.path);
  const names = Object.keys(CHAT_TEMPLATES);
  if (name !== undefined) {
    const template = namedTemplate(name, config);
    if (template !== null) return template;
    throw new FewbitError("argument/unknown-name", { kind: "chat template", name, nearest: names });
  }
  const template = modelTemplate(config, await textOrNull(directory, "chat_template.jinja", signal));
  if (template !== null) return template;
  throw new FewbitError("argument/invalid", {
    name: "the chat template",
    value: null,
    expected: `a file, or the name of one (${names.join(", ")}), since the model brings none`,
  });
}

async function textOrNull(directory: SourceDirectory, name: string, signal?: AbortSignal): Promise<string | null> {
  try {
    await using source = await directory.open(name, signal);
    return await readText(source, signal === undefined ? {} : { signal });
  } catch (error) {
    if (error instanceof FewbitError && error.code === "io/not-found") return null;
    throw error;
  }
}

/** A conversation with a model. What the KV cache holds of it is not computed again. */
export class Chat {
  readonly #model: Model;
  readonly #template: ChatTemplate;
  readonly #system: readonly ChatMessage[];
  #messages: ChatMessage[] = [];

  constructor(model: Model, template: ChatTemplate, system?: string) {
    this.#model = model;
    this.#template = template;
    this.#system = system === undefined ? [] : [{ role: "system", content: system }];
  }

  get messages(): readonly ChatMessage[] {
    return [...this.#system, ...this.#messages];
  }

  /** Forgets the conversation; the system message stays. */
  reset(): void {
    this.#messages = [];
  }

  /**
   * Sends a message and gives the answer token by token. Both become part of the conversation, also an answer that was stopped; a
   * message that failed does not. Throws as `Model.generate`.
   */
  async *send(content: string, options: GenerateOptions = {}): AsyncGenerator<GeneratedToken> {
    const messages: ChatMessage[] = [...this.#messages, { role: "user", content }];
    const text = this.#template.render([...this.#system, ...messages]);
    // A template spells out every special token, BOS among them.
    const ids = this.#model.tokenizer.encode(text, { addSpecialTokens: false });
    const stop = [...this.#template.stop, ...(options.stop ?? [])];
    let answer = "";
    let answered = false;
    try {
      for await (const token of this.#model.generate(ids, { ...options, stop, reuseCache: true })) {
        answered = true;
        answer += token.text;
        yield token;
      }
    } finally {
      if (answered) this.#messages = [...messages, { role: "assistant", content: answer.trim() }];
    }
  }
}
