import { readFile, writeFile } from "node:fs/promises";
import { Command, Option } from "commander";
import { FewbitError } from "../core/errors.js";
import {
  AUTOQUANT_CANDIDATES,
  type AutoquantPlan,
  autoquant,
  type Objective,
  parseAutoquantPlan,
} from "../models/autoquant.js";
import type { LoadModelOptions } from "../models/load.js";
import { ACCURACY_NAMES } from "../quantize/names.js";
import { readText } from "./eval.js";
import { backendOption, decimal, examples, integer, openDevice, quantizeName } from "./options.js";
import { bundledCalibrationText, bundledModel } from "./package.js";
import { type Cli, printJson, progressLine, showBytes, showSeconds, table } from "./terminal.js";

interface AutoquantOptions {
  readonly out: string;
  readonly candidates: readonly string[];
  readonly objective: Objective;
  readonly limit: number;
  readonly text?: string;
  readonly context: number;
  readonly windows: number;
  readonly backend: string;
}

export function autoquantCommand(cli: Cli): Command {
  return new Command("autoquant")
    .summary("choose a format for every linear layer, and save the plan")
    .description(
      "Times every shape of the model's linear layers on the device with each candidate, measures what each does to the outputs of each layer, and writes the fastest (or smallest) mixture whose loss on a text stays within the limit and that no candidate alone of that size or below beats. The plan is a name for --quantize.",
    )
    .argument("[MODEL]", "a model folder (default: the bundled fewbit-tiny)")
    .requiredOption("-o, --out <file>", "the plan to write, .json")
    .addOption(
      new Option(
        "--candidates <names>",
        "names to choose from, with commas, or all: the accuracy table; none is always one",
      )
        .default(AUTOQUANT_CANDIDATES, AUTOQUANT_CANDIDATES.join(","))
        .argParser(candidateNames),
    )
    .addOption(new Option("--objective <what>", "what is made small").choices(["speed", "size"]).default("speed"))
    .option(
      "--limit <nats>",
      "how much the loss may rise, in nats a token",
      decimal("--limit", (limit) => limit >= 0, "a number of at least 0"),
      0.01,
    )
    .option("--text <file>", "the text, UTF-8 (default: one that the bundled model wrote)")
    .option("--context <n>", "tokens of a window", integer("--context", 2), 512)
    .option("--windows <n>", "windows of the text that losses are measured on", integer("--windows", 1), 8)
    .addOption(backendOption())
    .option("--json", "the plan on stdout as well")
    .addHelpText(
      "after",
      examples(
        ["fewbit autoquant --out plan.json", "then: fewbit run --quantize plan.json"],
        ["fewbit autoquant --objective size --limit 0.03 --out small.json", "the smallest within 3 %"],
      ),
    )
    .action((folder: string | undefined, options: AutoquantOptions) => run(cli, folder ?? bundledModel(), options));
}

function candidateNames(text: string): readonly string[] {
  return text === "all" ? ACCURACY_NAMES : text.split(",").map((name) => quantizeName(name.trim()));
}

async function run(cli: Cli, path: string, options: AutoquantOptions): Promise<void> {
  const { out, candidates, objective, limit, context, windows } = options;
  const text = await readText(options.text ?? bundledCalibrationText());
  await using device = await openDevice(options.backend, cli.signal);
  const line = progressLine(cli);
  const plan = await autoquant(path, text, {
    device,
    candidates,
    objective,
    limit,
    context,
    windows,
    signal: cli.signal,
    onProgress: (what) => line.show(what, true),
  }).finally(line.clear);
  await writeFile(out, `${JSON.stringify(plan, null, 1)}\n`);
  if (cli.json) return printJson(cli.out, { command: "autoquant", out, plan });
  cli.err.write(table(describe(plan, out), cli.err.color));
}

function describe({ loss, cost, singles, layers }: AutoquantPlan, out: string): [string, string][] {
  const uses = new Map<string, number>();
  for (const name of Object.values(layers)) uses.set(name, (uses.get(name) ?? 0) + 1);
  const say = (nats: number, { seconds, bytes }: { seconds: number; bytes: number }) =>
    `loss ${nats < loss.unquantized ? "" : "+"}${(nats - loss.unquantized).toFixed(4)} nats  ${showBytes(bytes)}  ${showSeconds(seconds)} a token in linears`;
  return [
    ["plan", `${out}  ${[...uses].map(([name, count]) => `${count} ${name}`).join(", ")}`],
    ["", say(loss.plan, cost)],
    ...Object.entries(singles).map(([name, single]): [string, string] => [name, say(single.loss, single)]),
  ];
}

/** What `--quantize` means to a loader: a short name, or the plan in a file that ends in `.json`. */
export async function quantizeSelection(quantize: string): Promise<NonNullable<LoadModelOptions["quantize"]>> {
  if (!quantize.endsWith(".json")) return quantize;
  let json: unknown;
  try {
    json = JSON.parse(await readFile(quantize, "utf8"));
  } catch (cause) {
    const code = cause instanceof SyntaxError ? "io/malformed" : "io/not-found";
    throw new FewbitError(code, { path: quantize, reason: (cause as Error).message }, { cause });
  }
  return parseAutoquantPlan(json, quantize);
}
