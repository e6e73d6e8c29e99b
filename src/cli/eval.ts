import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { Command, Option } from "commander";
import { FewbitError } from "../core/errors.js";
import type { AttentionMode } from "../models/attention.js";
import { evaluatePerplexity, type WindowLoss } from "../models/evaluate.js";
import { ACCURACY_NAMES } from "../quantize/names.js";
import type { Device } from "../runtime/device.js";
import { type AccuracyRow, accuracyCsv, accuracySvg, accuracyText } from "./accuracy.js";
import { quantizeSelection } from "./autoquant.js";
import { attentionOption, backendOption, examples, integer, kvOption, openDevice, quantizeName } from "./options.js";
import { bundledModel, bundledText, shortPath } from "./package.js";
import { describeDevice } from "./report.js";
import { modelSource } from "./source.js";
import { type Cli, printJson, progressLine } from "./terminal.js";

interface EvalOptions {
  readonly text?: string;
  readonly quantize: readonly string[];
  readonly backend: string;
  readonly context: number;
  readonly stride?: number;
  readonly windows?: number;
  readonly kv: string;
  readonly attention: AttentionMode;
  readonly work?: string;
  readonly csv?: string;
  readonly svg?: string;
}

export function evalCommand(cli: Cli): Command {
  return new Command("eval")
    .summary("measure the perplexity of a model and what quantization costs")
    .description(
      "Runs a text through a model window by window and prints its perplexity, the size of its weights and tokens per second: one row for each name of --quantize. docs/accuracy.md has the protocol.",
    )
    .argument("[MODEL_DIR]", "a model folder (default: the bundled fewbit-tiny)")
    .option("--text <file>", "the text, UTF-8 (default: the held-out text of the bundled model)")
    .addOption(
      new Option("-q, --quantize <names>", "one name, several with commas, or all: the accuracy table")
        .default(["int4wo-64"], "int4wo-64")
        .argParser(quantizeNames),
    )
    .addOption(backendOption())
    .option("--context <n>", "tokens of a window", integer("--context", 2), 512)
    .option("--stride <n>", "tokens from window to window (default: they do not overlap)", integer("--stride", 1))
    .option("--windows <n>", "evaluate only the first n windows", integer("--windows", 1))
    .addOption(kvOption())
    .addOption(attentionOption())
    .option("--work <dir>", "keep each window's result in this folder, and go on from what is there")
    .option("--csv <file>", "write the table as CSV")
    .option("--svg <file>", "write a plot of size against perplexity")
    .option("--json", "one JSON object on stdout")
    .addHelpText(
      "after",
      examples(
        ["fewbit eval --quantize none,int8wo,int4wo-64", "the bundled model on its held-out text"],
        ["fewbit eval path/to/model --text book.txt --context 2048", "your model, your text"],
        ["fewbit eval --quantize all --work results --svg plot.svg", "the whole table; start it again to go on"],
      ),
    )
    .action((folder: string | undefined, options: EvalOptions) => evaluate(cli, folder ?? bundledModel(), options));
}

function quantizeNames(text: string): readonly string[] {
  if (text === "all") return ACCURACY_NAMES;
  return [...new Set(text.split(",").map((part) => planOrName(part.trim())))];
}

const planOrName = (name: string) => (name.endsWith(".json") ? name : quantizeName(name));

async function evaluate(cli: Cli, path: string, options: EvalOptions): Promise<void> {
  const textPath = options.text ?? bundledText();
  const text = await readText(textPath);
  await using device = await openDevice(options.backend, cli.signal);
  const rows: AccuracyRow[] = [];
  const line = progressLine(cli);
  try {
    for (const quantize of options.quantize) {
      rows.push(withDelta(await evaluateOne(cli, device, path, text, quantize, options, line.show), rows));
    }
  } finally {
    line.clear();
  }
  if (options.csv !== undefined) await writeFile(options.csv, accuracyCsv(rows));
  if (options.svg !== undefined) {
    await writeFile(options.svg, await accuracySvg(rows, `${shortPath(path)}: size and perplexity`));
  }
  if (!cli.json) return cli.out.write(accuracyText(rows));
  const { context, stride, windows, kv, attention } = options;
  printJson(cli.out, {
    command: "eval",
    device: describeDevice(device),
    model: shortPath(path),
    text: { path: shortPath(textPath), sha256: sha256(text) },
    settings: { context, stride: stride ?? null, windows: windows ?? null, kv, attention },
    rows,
  });
}

async function evaluateOne(
  cli: Cli,
  device: Device,
  path: string,
  text: string,
  quantize: string,
  options: EvalOptions,
  show: (text: string, must?: boolean) => void,
): Promise<AccuracyRow> {
  const { context, stride, windows: limit, kv, attention } = options;
  const work = await openWork(options.work, quantize, {
    model: path,
    text: sha256(text),
    device: device.info.name,
    quantize,
    context,
    stride: stride ?? null,
    kv,
    attention,
  });
  show(`${quantize}: loading`, true);
  try {
    const { perplexity, nll, weightBytes, tokensPerSecond, windows } = await evaluatePerplexity(path, text, {
      device,
      quantize: await quantizeSelection(quantize),
      context,
      kv,
      attention,
      source: modelSource(cli, {}),
      done: work.losses,
      signal: cli.signal,
      ...(stride !== undefined && { stride }),
      ...(limit !== undefined && { limit }),
      onWindow: (loss, index, count) => {
        work.add(loss);
        show(`${quantize}: window ${index + 1} of ${count}`);
      },
    });
    return { quantize, result: { perplexity, nll, delta: null, weightBytes, tokensPerSecond, windows } };
  } catch (error) {
    const refused = error instanceof FewbitError && error.code === "quantize/layer" && options.quantize.length > 1;
    if (!refused) throw error;
    return { quantize, refused: error.message };
  } finally {
    await work.save();
  }
}

function withDelta(row: AccuracyRow, earlier: readonly AccuracyRow[]): AccuracyRow {
  const plain = [...earlier, row].find(({ quantize }) => quantize === "none")?.result;
  if (plain === undefined || row.result === undefined) return row;
  return { ...row, result: { ...row.result, delta: row.result.perplexity - plain.perplexity } };
}

/** The losses that an earlier run of the same evaluation left in the folder. Throws `io/malformed` for those of another one. */
async function openWork(folder: string | undefined, name: string, settings: Readonly<Record<string, unknown>>) {
  const path = folder === undefined ? undefined : join(folder, `${basename(name, ".json")}.json`);
  const known = path === undefined ? undefined : await readWork(path, settings);
  const losses: WindowLoss[] = known ?? [];
  const added = losses.slice();
  return {
    losses: losses as readonly WindowLoss[],
    add: (loss: WindowLoss) => void added.push(loss),
    save: async () => {
      if (folder === undefined || path === undefined || added.length === losses.length) return;
      await mkdir(folder, { recursive: true });
      await writeFile(path, JSON.stringify({ settings, losses: added }));
    },
  };
}

async function readWork(path: string, settings: Readonly<Record<string, unknown>>): Promise<WindowLoss[]> {
  let content: string;
  try {
    content = await readFile(path, "utf8");
  } catch {
    return [];
  }
  let value: { settings?: unknown; losses?: WindowLoss[] };
  try {
    value = JSON.parse(content) as typeof value;
  } catch (cause) {
    throw new FewbitError("io/malformed", { path, reason: (cause as Error).message }, { cause });
  }
  if (JSON.stringify(value.settings) !== JSON.stringify(settings) || !Array.isArray(value.losses)) {
    const hint = "give another folder to --work, or remove the file";
    throw new FewbitError("io/malformed", { path, reason: "it is of an evaluation with other settings" }, { hint });
  }
  return value.losses;
}

export async function readText(path: string): Promise<string> {
  try {
    return await readFile(path, "utf8");
  } catch (cause) {
    throw new FewbitError("io/not-found", { path, reason: (cause as Error).message }, { cause });
  }
}

const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");
