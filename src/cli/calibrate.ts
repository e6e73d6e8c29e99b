import { createHash } from "node:crypto";
import { mkdir, readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Command, Option } from "commander";
import { CALIBRATION_ALGORITHMS, type CalibrationAlgorithm, calibrate } from "../models/calibrate.js";
import type { CalibrationStore } from "../models/calibration-store.js";
import { saveQuantized } from "../models/save.js";
import { readText } from "./eval.js";
import { backendOption, decimal, examples, integer, openDevice, quantizeName } from "./options.js";
import { bundledCalibrationText, bundledModel } from "./package.js";
import { type Cli, printJson, progressLine, showBytes, table } from "./terminal.js";

interface CalibrateOptions {
  readonly algorithm: CalibrationAlgorithm;
  readonly quantize: string;
  readonly out: string;
  readonly text?: string;
  readonly context: number;
  readonly windows?: number;
  readonly alpha: number;
  readonly backend: string;
  readonly work?: string;
}

export function calibrateCommand(cli: Cli): Command {
  const algorithms = CALIBRATION_ALGORITHMS.join(", ");
  return new Command("calibrate")
    .summary("quantize a model with the help of a text, and save it")
    .description(
      `Quantizes the linear layers by an algorithm that looks at what they compute on a text (${algorithms}) and writes a model folder as fewbit quantize does. HQQ and learned codebooks need no text: they are names of fewbit quantize.`,
    )
    .argument("[MODEL]", "a model folder (default: the bundled fewbit-tiny)")
    .addOption(
      new Option("-a, --algorithm <name>", algorithms).choices([...CALIBRATION_ALGORITHMS]).makeOptionMandatory(),
    )
    .addOption(new Option("-q, --quantize <name>", "the formats").argParser(quantizeName).makeOptionMandatory())
    .requiredOption("-o, --out <dir>", "the folder to write")
    .option("--text <file>", "the text, UTF-8 (default: one that the bundled model wrote)")
    .option("--context <n>", "tokens of a window", integer("--context", 2), 512)
    .option("--windows <n>", "use only the first n windows of the text", integer("--windows", 1))
    .option(
      "--alpha <a>",
      "smoothquant: the share of the outliers that moves into the weights",
      decimal("--alpha", (a) => a >= 0 && a <= 1, "a number from 0 to 1"),
      0.5,
    )
    .addOption(backendOption())
    .option("--work <dir>", "keep finished layers in this folder, and go on from what is there")
    .option("--json", "one JSON object on stdout")
    .addHelpText(
      "after",
      examples(
        ["fewbit calibrate -a gptq -q int4wo-64 -o tiny-gptq", "then: fewbit eval tiny-gptq -q none"],
        ["fewbit calibrate path/to/model -a awq -q int4wo-128 -o out --text book.txt --work work", "a long run"],
      ),
    )
    .action((folder: string | undefined, options: CalibrateOptions) => run(cli, folder ?? bundledModel(), options));
}

async function run(cli: Cli, path: string, options: CalibrateOptions): Promise<void> {
  const { algorithm, quantize, out, context, windows, alpha } = options;
  const text = await readText(options.text ?? bundledCalibrationText());
  await using device = await openDevice(options.backend, cli.signal);
  const line = progressLine(cli);
  const begun = performance.now();
  const key = JSON.stringify({ path, text, algorithm, quantize, context, windows, alpha });
  const store = options.work === undefined ? undefined : folderStore(options.work, key);
  try {
    const replace = await calibrate(path, text, {
      device,
      algorithm,
      quantize,
      context,
      alpha,
      signal: cli.signal,
      ...(windows !== undefined && { windows }),
      ...(store && { store }),
      onProgress: ({ done, total, what }) => line.show(`${done} of ${total} groups of linears  ${what}`, true),
    });
    const report = await saveQuantized(path, out, { quantize, replace, signal: cli.signal });
    line.clear();
    const seconds = (performance.now() - begun) / 1000;
    if (cli.json) return printJson(cli.out, { command: "calibrate", algorithm, quantize, out, seconds, ...report });
    const rows = [
      ["saved", `${out}  ${showBytes(report.bytes)} of tensors in ${seconds.toFixed(1)} s`],
      ["linears", `${report.quantized} quantized to ${quantize} by ${algorithm}`],
    ] as const;
    cli.err.write(table(rows, cli.err.color));
  } finally {
    line.clear();
  }
}

/** A folder of files, one a tensor, under a name that only the same calibration has. Files appear when they are complete. */
function folderStore(folder: string, key: string): CalibrationStore {
  const base = join(folder, createHash("sha256").update(key).digest("hex").slice(0, 16));
  const file = (name: string) => join(base, `${name}.safetensors`);
  return {
    get: async (name) => {
      try {
        return new Uint8Array(await readFile(file(name)));
      } catch {
        return undefined;
      }
    },
    set: async (name, bytes) => {
      await mkdir(base, { recursive: true });
      await writeFile(`${file(name)}.part`, bytes);
      await rename(`${file(name)}.part`, file(name));
    },
  };
}
