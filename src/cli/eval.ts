import { createHash } from "node:crypto";
import { renameSync, writeFileSync } from "node:fs";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { Command, Option } from "commander";
import { FewbitError } from "../core/errors.js";
import type { AttentionMode } from "../models/attention.js";
import { evaluatePerplexity, type WindowLoss } from "../models/evaluate.js";
import { ACCURACY_NAMES } from "../quantize/names.js";
import type { Device } from "../runtime/device.js";
import { type AccuracyRow, accuracyCsv, accuracyLines, accuracySvg } from "./accuracy.js";
import { quantizeSelection } from "./autoquant.js";
import { attentionOption, backendOption, examples, integer, kvOption, openDevice, quantizeName } from "./options.js";
import { bundledModel, bundledText, shortPath } from "./package.js";
import { describeDevice } from "./report.js";
import { modelSource } from "./source.js";
import { type Cli, count, printJson, progressLine, showDuration } from "./terminal.js";

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
  const { context, stride, windows, kv, attention } = options;
  const textPath = options.text ?? bundledText();
  const text = await readText(textPath);
  await using device = await openDevice(options.backend, cli.signal);
  const settings = { context, stride: stride ?? null, kv, attention };
  const of = { model: path, text: sha256(text), device: device.info.name };
  // Opened before anything is computed: a folder of another evaluation is refused at once.
  const works: Work[] = [];
  for (const quantize of options.quantize) {
    works.push(await openWork(options.work, quantize, { ...of, quantize, ...settings }));
  }
  const known = works.reduce((sum, { losses }) => sum + losses.length, 0);
  if (known > 0 && !cli.json) cli.err.write(`going on after ${count(known, "window")} in ${options.work}\n`);
  const lines = accuracyLines(options.quantize);
  const say = (text: string) => cli.json || cli.out.write(text);
  const line = progressLine(cli);
  const rows: AccuracyRow[] = [];
  try {
    say(lines.head);
    for await (const row of evaluateAll(cli, device, path, text, works, options, line.show)) {
      rows.push(withDelta(row, rows));
      line.clear();
      say(lines.line(rows.at(-1) as AccuracyRow));
    }
  } catch (error) {
    if (options.work === undefined || !(error instanceof FewbitError) || error.code !== "operation/aborted")
      throw error;
    const hint = `every window so far is in ${options.work}: the same command goes on after them`;
    throw new FewbitError(error.code, error.context, { cause: error, hint });
  } finally {
    line.clear();
  }
  if (options.csv !== undefined) await writeFile(options.csv, accuracyCsv(rows));
  if (options.svg !== undefined) {
    await writeFile(options.svg, await accuracySvg(rows, `${shortPath(path)}: size and perplexity`));
  }
  if (!cli.json) return;
  printJson(cli.out, {
    command: "eval",
    device: describeDevice(device),
    model: shortPath(path),
    text: { path: shortPath(textPath), sha256: of.text },
    settings: { ...settings, windows: windows ?? null },
    rows,
  });
}

/** Rows in the order of the names, each as soon as it is known. */
async function* evaluateAll(
  cli: Cli,
  device: Device,
  path: string,
  text: string,
  works: readonly Work[],
  options: EvalOptions,
  show: (text: string, must?: boolean) => void,
): AsyncGenerator<AccuracyRow> {
  const { context, stride, windows: limit, kv, attention } = options;
  const begun = performance.now();
  let ran = 0;
  for (const [i, { quantize, losses, add }] of works.entries()) {
    const which = works.length === 1 ? quantize : `${quantize} (${i + 1} of ${works.length})`;
    show(`${which}: loading`, true);
    try {
      const { perplexity, nll, weightBytes, tokensPerSecond, windows } = await evaluatePerplexity(path, text, {
        device,
        quantize: await quantizeSelection(quantize),
        context,
        kv,
        attention,
        source: modelSource(cli, {}),
        done: losses,
        signal: cli.signal,
        ...(stride !== undefined && { stride }),
        ...(limit !== undefined && { limit }),
        onWindow: (loss, index, count) => {
          add(loss);
          ran++;
          const later = works.slice(i + 1).reduce((sum, work) => sum + Math.max(0, count - work.losses.length), 0);
          const seconds = ((performance.now() - begun) / 1000 / ran) * (count - index - 1 + later);
          show(`${which}: window ${index + 1} of ${count}, ${showDuration(seconds)} left`);
        },
      });
      yield { quantize, result: { perplexity, nll, delta: null, weightBytes, tokensPerSecond, windows } };
    } catch (error) {
      const refused = error instanceof FewbitError && error.code === "quantize/layer" && works.length > 1;
      if (!refused) throw error;
      yield { quantize, refused: error.message };
    }
  }
}

function withDelta(row: AccuracyRow, earlier: readonly AccuracyRow[]): AccuracyRow {
  const plain = [...earlier, row].find(({ quantize }) => quantize === "none")?.result;
  if (plain === undefined || row.result === undefined) return row;
  return { ...row, result: { ...row.result, delta: row.result.perplexity - plain.perplexity } };
}

/** One row of an evaluation that can go on where it was stopped. */
interface Work {
  readonly quantize: string;
  /** What an earlier run left. */
  readonly losses: readonly WindowLoss[];
  /** Keeps the loss of the next window, on disk when it returns. */
  readonly add: (loss: WindowLoss) => void;
}

/** The losses that an earlier run of the same evaluation left in the folder. Throws `io/malformed` for those of another one. */
async function openWork(
  folder: string | undefined,
  quantize: string,
  settings: Readonly<Record<string, unknown>>,
): Promise<Work> {
  if (folder === undefined) return { quantize, losses: [], add: () => {} };
  const path = join(folder, `${basename(quantize, ".json")}.json`);
  await mkdir(folder, { recursive: true });
  const losses = await readWork(path, settings);
  const all = losses.slice();
  const add = (loss: WindowLoss) => {
    all.push(loss);
    // A process that is killed leaves the old file or the new one.
    writeFileSync(`${path}.part`, JSON.stringify({ settings, losses: all }));
    renameSync(`${path}.part`, path);
  };
  return { quantize, losses, add };
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
