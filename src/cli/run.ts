import { Command } from "commander";
import { FewbitError } from "../core/errors.js";
import { type GeneratedToken, type LoadProgress, loadModel, type Model } from "../models/model.js";
import type { Device } from "../runtime/device.js";
import { decimal, examples, integer, type ModelOptions, openDevice, withModel } from "./options.js";
import { bundledModel, shortPath } from "./package.js";
import { describeDevice, describeModel, describeSpeed, deviceRows, modelRows, speedRows } from "./report.js";
import { type Cli, printJson, progressLine, table } from "./terminal.js";

const PROMPT = "The captain looked at the sea";
const U32 = 2 ** 32 - 1;

interface RunOptions extends ModelOptions {
  readonly prompt: string;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly seed: number;
}

/** Why a generation ended: `length` (--max-tokens or the context is full), `eos` (the model ended the text), `interrupted`. */
type Finish = "length" | "eos" | "interrupted";

export function runCommand(cli: Cli): Command {
  return withModel(new Command("run"))
    .summary("generate text with a quantized model")
    .description(
      "Loads a model, quantizes its linear layers and generates text. The text goes to stdout as it comes, everything else to stderr.",
    )
    .option("-p, --prompt <text>", "the text to continue", PROMPT)
    .option("-n, --max-tokens <n>", "tokens to generate at most", integer("--max-tokens", 0), 64)
    .option(
      "-t, --temperature <t>",
      "0 takes the most likely token",
      decimal("--temperature", (t) => t >= 0, "a number of at least 0"),
      0,
    )
    .option("--top-k <k>", "draw from the k most likely tokens, 0: all", integer("--top-k", 0, U32), 0)
    .option(
      "--top-p <p>",
      "draw from the likeliest tokens that hold this share",
      decimal("--top-p", (p) => p > 0 && p <= 1, "a number above 0 and at most 1"),
      1,
    )
    .option("--seed <s>", "equal seeds draw equal texts", integer("--seed", 0, U32), 0)
    .option("--json", "one JSON object on stdout, when all is done")
    .addHelpText(
      "after",
      examples(
        ["fewbit run", "the bundled model, 4 bits a weight"],
        ['fewbit run --prompt "Once more" --temperature 0.8 --seed 7', "draw instead of taking the likeliest"],
        ["fewbit run path/to/model --quantize int8wo --max-tokens 200", "a Llama, Mistral or Qwen2 folder"],
        ["fewbit run --backend reference --json", "the definition's answer, as JSON"],
      ),
    )
    .action((folder: string | undefined, options: RunOptions) => run(cli, folder, options));
}

async function run(cli: Cli, folder: string | undefined, options: RunOptions): Promise<void> {
  await using device = await openDevice(options.backend, cli.signal);
  const path = folder ?? bundledModel();
  using model = await load(cli, device, path, options);
  const { prompt, maxTokens, temperature, topK, topP, seed } = options;
  const tokens: GeneratedToken[] = [];
  let finish: Finish = "length";
  const { dim } = cli.out.color;
  if (!cli.json && cli.out.tty) cli.out.write(dim(prompt));
  try {
    const settings = { maxTokens, temperature, topK, topP, seed, signal: cli.signal };
    for await (const token of model.generate(prompt, settings)) {
      tokens.push(token);
      if (!cli.json) cli.out.write(token.text);
    }
    if (endsText(model, tokens.at(-1))) finish = "eos";
  } catch (error) {
    const interrupted =
      error instanceof FewbitError && error.code === "operation/aborted" && cli.stopped() === "interrupted";
    if (!interrupted) throw error;
    finish = "interrupted";
  }
  const about = { device: describeDevice(device), model: describeModel(shortPath(path), model, options.quantize) };
  const speed = model.statistics && describeSpeed(model.statistics);
  if (cli.json) {
    const text = tokens.map((token) => token.text).join("");
    const settings = { maxTokens, temperature, topK, topP, seed };
    return printJson(cli.out, { command: "run", ...about, prompt, settings, text, finish, tokens, speed });
  }
  if (tokens.length > 0) cli.out.write("\n");
  const { color } = cli.err;
  const rows = [
    ...deviceRows(about.device),
    ...modelRows(about.model),
    ...(speed ? speedRows(speed, model.config.layers, device.info.backend) : []),
  ];
  if (finish === "interrupted") rows.unshift(["stopped", `by Ctrl-C after ${tokens.length} of ${maxTokens} tokens`]);
  cli.err.write(`\n${table([...rows, ["go on", NEXT.join("\n")]], color)}`);
}

const NEXT = [
  'npx fewbit run --prompt "It was a dark night" --temperature 0.8 --seed 1',
  "npx fewbit run --quantize nvfp4wo",
  "npx fewbit explain",
];

/** Loads the model of a command with its progress on a terminal. */
export async function load(
  cli: Cli,
  device: Device,
  path: string,
  options: ModelOptions & { readonly prefillChunk?: number },
): Promise<Model> {
  const line = progressLine(cli);
  try {
    return await loadModel(path, {
      device,
      quantize: options.quantize,
      kv: options.kv,
      attention: options.attention,
      signal: cli.signal,
      ...(options.context === undefined ? {} : { context: options.context }),
      ...(options.prefillChunk === undefined ? {} : { prefillChunk: options.prefillChunk }),
      onProgress: loadProgress(line.show),
    });
  } finally {
    line.clear();
  }
}

/** One line for the two counts of a load: the weight at work, and the bytes that are on the device. */
function loadProgress(show: (text: string, must?: boolean) => void): (progress: LoadProgress) => void {
  let weight = "";
  return ({ stage, done, total, what }) => {
    if (stage !== "upload") weight = what;
    else if (done >= total) show("building kernels", true);
    else show(`reading, quantizing and uploading  ${Math.floor((100 * done) / total)} %  ${weight}`);
  };
}

function endsText(model: Model, last: GeneratedToken | undefined): boolean {
  return last !== undefined && [...model.config.eosIds, ...model.tokenizer.eosIds].includes(last.id);
}
