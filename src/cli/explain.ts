import { Command } from "commander";
import { explainConfig } from "./explain-config.js";
import { decimal, examples, integer, type ModelOptions, openDevice, withModel } from "./options.js";
import { bundledModel, shortPath } from "./package.js";
import { describeDevice, describeModel, deviceRows, modelRows } from "./report.js";
import { load } from "./run.js";
import { type Cli, printJson, table } from "./terminal.js";

interface ExplainOptions extends ModelOptions {
  readonly tokens: number;
  readonly modelConfig?: string;
  readonly memory?: number;
  readonly maxBinding?: number;
}

export function explainCommand(cli: Cli): Command {
  return withModel(new Command("explain"))
    .summary("print why every step of a model runs as it does")
    .description(
      "Plans a model for the device and prints every step: its kernel, the estimate behind the choice, and the reason against each other kernel. Once for single tokens, once for prompts.",
    )
    .option("--tokens <n>", "prompt tokens of one run that the plan is made for", integer("--tokens", 1), 128)
    .option("--model-config <file>", "plan from a config.json alone, without weights and without a GPU")
    .option(
      "--memory <GB>",
      "with --model-config: what the device holds in all",
      decimal("--memory", (gb) => gb > 0, "a positive number"),
    )
    .option(
      "--max-binding <MB>",
      "with --model-config: its largest buffer (default 2147)",
      decimal("--max-binding", (mb) => mb > 0, "a positive number"),
    )
    .option("--json", "one JSON object on stdout")
    .addHelpText(
      "after",
      examples(
        ["fewbit explain", "the bundled model, 4 bits a weight"],
        ["fewbit explain --quantize int8dq --tokens 512", "another format, longer prompts"],
        ["fewbit explain --model-config config.json --context 131072 --kv int8", "bytes by kind, without a GPU"],
        ["fewbit explain --json | jq '.plan.buckets[0].steps[].kernel'", "the kernels of one token"],
      ),
    )
    .action((folder: string | undefined, options: ExplainOptions) =>
      options.modelConfig === undefined
        ? explain(cli, folder, options)
        : explainConfig(cli, options.modelConfig, options),
    );
}

async function explain(cli: Cli, folder: string | undefined, options: ExplainOptions): Promise<void> {
  await using device = await openDevice(options.backend, cli.signal);
  const path = folder ?? bundledModel();
  using model = await load(cli, device, path, { ...options, prefillChunk: options.tokens });
  const about = { device: describeDevice(device), model: describeModel(shortPath(path), model, options.quantize) };
  if (cli.json) {
    const { buckets, bytes, memory } = model.program.plan;
    const plan = {
      buckets: buckets.map(({ symbols, choices }) => ({
        symbols,
        steps: choices.map(({ explanation }) => explanation),
      })),
      bytes,
      slots: memory.slots,
    };
    return printJson(cli.out, { command: "explain", ...about, plan });
  }
  cli.err.write(`${table([...deviceRows(about.device), ...modelRows(about.model)], cli.err.color)}\n`);
  cli.out.write(`${model.explain()}\n`);
}
