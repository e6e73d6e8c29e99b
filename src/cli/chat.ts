import { createInterface, type Interface } from "node:readline";
import { Command } from "commander";
import { FewbitError } from "../core/errors.js";
import { Chat, type ChatTemplateOptions, openChatTemplate } from "../models/chat.js";
import type { GenerateOptions } from "../models/model.js";
import { CHAT_TEMPLATES } from "../text/chat.js";
import { readText } from "./eval.js";
import { examples, type ModelOptions, openDevice, type SamplingOptions, withModel, withSampling } from "./options.js";
import { bundledModel, shortPath } from "./package.js";
import { load } from "./run.js";
import { modelSource } from "./source.js";
import { type Cli, count, printError } from "./terminal.js";

interface ChatOptions extends ModelOptions, SamplingOptions {
  readonly template?: string;
  readonly system?: string;
}

const HELP = `/reset  forget the conversation
/help   show this
/exit   leave (or Ctrl-D)
Ctrl-C  stop the answer
`;

export function chatCommand(cli: Cli): Command {
  const names = Object.keys(CHAT_TEMPLATES).join(", ");
  return withSampling(withModel(new Command("chat")), { maxTokens: 256, temperature: 0.7 })
    .summary("talk with a model")
    .description(
      "Loads a model and answers line by line, with its chat template. Answers go to stdout, everything else to stderr. Lines may come from a pipe.",
    )
    .option("--template <name>", `a Jinja file, or one of ${names} (default: the model's own)`)
    .option("--system <text>", "a system message in front of the conversation")
    .addHelpText(
      "after",
      examples(
        ["fewbit chat path/to/model", "talk; /help lists the commands"],
        ["fewbit chat --template transcript", "the bundled model, which only continues text"],
        ["echo 'Who are you?' | fewbit chat path/to/model", "one question from a pipe"],
      ),
    )
    .action((folder: string | undefined, options: ChatOptions) => run(cli, folder ?? bundledModel(), options));
}

async function run(cli: Cli, path: string, options: ChatOptions): Promise<void> {
  // What can be wrong with the template is said before a model is loaded.
  const source = modelSource(cli, options);
  const template = await openChatTemplate(path, {
    ...(await templateOption(options.template)),
    source,
    signal: cli.signal,
  });
  await using device = await openDevice(options.backend, cli.signal);
  using model = await load(cli, device, path, options);
  const chat = new Chat(model, template, options.system);
  const tty = process.stdin.isTTY === true && cli.err.tty;
  if (tty)
    cli.err.write(`${cli.err.color.dim(`${shortPath(path)} on ${device.info.name}; /help lists the commands`)}\n`);
  const lines = createInterface({ input: process.stdin, ...(tty && { output: process.stderr }), prompt: "> " });
  let answering: AbortController | null = null;
  const interrupt = () => {
    if (answering !== null) answering.abort();
    else if (tty) {
      cli.err.write(`\n${cli.err.color.dim("/exit or Ctrl-D leaves")}\n`);
      lines.prompt();
    } else lines.close();
  };
  cli.onInterrupt(interrupt);
  lines.on("SIGINT", interrupt);
  const { maxTokens, temperature, topK, topP, minP, repetitionPenalty, stop } = options;
  const settings = { maxTokens, temperature, topK, topP, minP, repetitionPenalty, stop };
  let turn = 0;
  try {
    for await (const line of prompted(lines, tty)) {
      const text = line.trim();
      if (text === "/exit") break;
      if (text === "/reset") chat.reset();
      else if (text === "/help") cli.err.write(HELP);
      else if (text.startsWith("/")) cli.err.write(`unknown command ${text}\n${HELP}`);
      else if (text !== "") {
        answering = new AbortController();
        await answer(cli, chat, text, { ...settings, seed: (options.seed + turn++) >>> 0, signal: answering.signal });
        answering = null;
        const { statistics } = model;
        if (tty && statistics !== null)
          cli.err.write(
            `${cli.err.color.dim(`${count(statistics.tokens, "token")}, ${statistics.promptTokens} of ${count(model.capacity, "token")} before`)}\n`,
          );
      }
    }
  } finally {
    cli.onInterrupt(null);
    lines.close();
  }
}

/** Lines as they come, each after a prompt on a terminal. */
async function* prompted(lines: Interface, tty: boolean): AsyncGenerator<string> {
  if (tty) lines.prompt();
  for await (const line of lines) {
    yield line;
    if (tty) lines.prompt();
  }
}

/** One answer. What is wrong with one message does not end the conversation. */
async function answer(cli: Cli, chat: Chat, text: string, options: GenerateOptions): Promise<void> {
  try {
    for await (const token of chat.send(text, options)) cli.out.write(token.text);
  } catch (error) {
    if (!(error instanceof FewbitError)) throw error;
    if (error.code === "model/context-length") {
      printError(cli, new FewbitError(error.code, error.context as never, { hint: "/reset forgets the conversation" }));
    } else if (error.code !== "operation/aborted") throw error;
  } finally {
    cli.out.write("\n");
  }
}

/** `--template`: a name, or else a file. */
async function templateOption(template: string | undefined): Promise<Pick<ChatTemplateOptions, "name" | "file">> {
  if (template === undefined) return {};
  // A mistyped name is told from a missing file: files have a dot or a slash.
  if (Object.hasOwn(CHAT_TEMPLATES, template) || !/[./\\]/.test(template)) return { name: template };
  return { file: { path: template, text: await readText(template) } };
}
