import { Template } from "@huggingface/jinja";
import { FewbitError } from "../core/errors.js";

export interface ChatMessage {
  readonly role: "system" | "user" | "assistant";
  readonly content: string;
}

/** How a conversation becomes the text that a model was trained to continue. */
export interface ChatTemplate {
  /**
   * The conversation as text, special tokens spelled out, up to where the assistant's answer begins. Throws `argument/invalid` with the
   * template's own words when it refuses a conversation.
   */
  render(messages: readonly ChatMessage[]): string;
  /** Strings that end an answer where the model has no token that does. */
  readonly stop: readonly string[];
}

/** Templates for models that bring none. */
export const CHAT_TEMPLATES: Readonly<Record<string, { readonly source: string; readonly stop: readonly string[] }>> = {
  chatml: {
    source:
      "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}",
    stop: ["<|im_end|>", "<|im_start|>"],
  },
  /** For models that only continue text. */
  transcript: {
    source:
      "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}{% endfor %}Assistant:",
    stop: ["\nUser:", "\nAssistant:"],
  },
};

/**
 * The chat template of a model: `file` is its `chat_template.jinja`, otherwise `chat_template` of `tokenizer_config.json` (a text, or a
 * list of named ones of which `default` is taken). Null when it has none. Throws `io/malformed` for one that does not parse.
 */
export function modelTemplate(
  tokenizerConfig: Readonly<Record<string, unknown>>,
  file: string | null,
): ChatTemplate | null {
  const { chat_template: field } = tokenizerConfig;
  const named = Array.isArray(field)
    ? (field as { name?: unknown; template?: unknown }[]).find(({ name }) => name === "default")?.template
    : field;
  const source = file ?? named;
  if (source === undefined || source === null) return null;
  if (typeof source !== "string")
    throw new FewbitError("io/malformed", {
      path: "tokenizer_config.json",
      reason: "chat_template is neither a text nor a list with a default",
    });
  return parseTemplate(source, [], tokenizerConfig, file === null ? "tokenizer_config.json" : "chat_template.jinja");
}

/** A template by its name in `CHAT_TEMPLATES`. */
export function namedTemplate(name: string, tokenizerConfig: Readonly<Record<string, unknown>>): ChatTemplate | null {
  if (!Object.hasOwn(CHAT_TEMPLATES, name)) return null;
  const { source, stop } = CHAT_TEMPLATES[name] as (typeof CHAT_TEMPLATES)[string];
  return parseTemplate(source, stop, tokenizerConfig, name);
}

/** A Jinja template as chat templates use the language. `name` is for messages. Throws `io/malformed`. */
export function parseTemplate(
  source: string,
  stop: readonly string[],
  tokenizerConfig: Readonly<Record<string, unknown>>,
  name: string,
): ChatTemplate {
  let template: Template;
  try {
    template = new Template(source);
  } catch (cause) {
    const reason = `the chat template does not parse: ${(cause as Error).message}`;
    throw new FewbitError("io/malformed", { path: name, reason }, { cause });
  }
  const special = Object.fromEntries(
    ["bos_token", "eos_token", "unk_token", "pad_token"].map((field) => [field, tokenText(tokenizerConfig[field])]),
  );
  return {
    stop,
    render(messages) {
      try {
        return template.render({ ...special, messages, add_generation_prompt: true });
      } catch (cause) {
        const expected = `a conversation that the chat template takes: ${(cause as Error).message}`;
        const roles = messages.map(({ role }) => role).join(", ");
        throw new FewbitError("argument/invalid", { name: "messages", value: roles, expected }, { cause });
      }
    },
  };
}

/** A special token is a text, or an object with one. */
function tokenText(token: unknown): string {
  const text = typeof token === "string" ? token : (token as { content?: unknown } | null | undefined)?.content;
  return typeof text === "string" ? text : "";
}
