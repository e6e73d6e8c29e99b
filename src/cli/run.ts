import { Command } from "commander";
import { FewbitError } from "../core/errors.js";
import type { LoadProgress } from "../models/load.js";
import { type FinishReason, type GeneratedToken, loadModel, type Model } from "../models/model.js";
import type { Device } from "../runtime/device.js";
import { quantizeSelection } from "./autoquant.js";
import { examples, type ModelOptions, openDevice, type SamplingOptions, withModel, withSampling } from "./options.js";
import { bundledModel, shortPath } from "./package.js";
import { describeDevice, describeModel, describeSpeed, deviceRows, modelRows, speedRows } from "./report.js";
import { modelSource } from "./source.js";
import { type Cli, printJson, progressLine, table } from "./terminal.js";

const PROMPT = "The captain looked at the sea";

interface RunOptions extends ModelOptions, SamplingOptions {
  readonly prompt: string;
}

/** Why a generation ended: `FinishReason`, or `interrupted` by Ctrl-C. */
type Finish = FinishReason | "interrupted";

export function runCommand(cli: Cli): Command {
  return withSampling(withModel(new Command("run")), { maxTokens: 64, temperature: 0 })
    .summary("generate text with a quantized model")
    .description(
      "Loads a model, quantizes its linear layers and generates text. The text goes to stdout as it comes, everything else to stderr.",
    )
    .option("-p, --prompt <text>", "the text to continue", PROMPT)
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
  const { prompt, maxTokens, temperature, topK, topP, minP, repetitionPenalty, stop, seed } = options;
  const settings = { maxTokens, temperature, topK, topP, minP, repetitionPenalty, stop, seed };
  const tokens: GeneratedToken[] = [];
  let finish: Finish = "length";
  const { dim } = cli.out.color;
  if (!cli.json && cli.out.tty) cli.out.write(dim(prompt));
  try {
    for await (const token of model.generate(prompt, { ...settings, signal: cli.signal })) {
      tokens.push(token);
      if (!cli.json) cli.out.write(token.text);
    }
    finish = model.statistics?.finish ?? "length";
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
      quantize: await quantizeSelection(options.quantize),
      keepQuantized: options.quantizeChosen !== true,
      kv: options.kv,
      attention: options.attention,
      signal: cli.signal,
      source: modelSource(cli, options),
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
    if (stage === "read") show(`downloading  ${Math.floor((100 * done) / Math.max(total, 1))} %  ${what}`);
    else if (stage !== "upload") weight = what;
    else if (done >= total) show("building kernels", true);
    else show(`reading, quantizing and uploading  ${Math.floor((100 * done) / total)} %  ${weight}`);
  };
}
