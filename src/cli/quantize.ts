import { Command, Option } from "commander";
import { saveQuantized } from "../models/save.js";
import { examples, integer, quantizeName } from "./options.js";
import { bundledModel } from "./package.js";
import { modelSource, revisionOption } from "./source.js";
import { type Cli, printJson, progressLine, showBytes, table } from "./terminal.js";

interface QuantizeOptions {
  readonly quantize: string;
  readonly out: string;
  readonly shardSize: number;
  readonly revision?: string;
}

export function quantizeCommand(cli: Cli): Command {
  return new Command("quantize")
    .summary("quantize a model and save it")
    .description(
      "Quantizes the linear layers of a model and writes safetensors in torchao's layout, with config.json and the tokenizer. An interrupted run leaves no half files; run again, it goes on after the files that are done.",
    )
    .argument("[MODEL]", "a model folder, URL or hub name (default: the bundled fewbit-tiny)")
    .addOption(
      new Option("-q, --quantize <name>", "how to quantize the linear layers; fewbit info lists the names")
        .argParser(quantizeName)
        .makeOptionMandatory(),
    )
    .requiredOption("-o, --out <dir>", "the folder to write")
    .option("--shard-size <bytes>", "bytes of tensors a file holds at most", integer("--shard-size", 1), 5e9)
    .addOption(revisionOption())
    .option("--json", "one JSON object on stdout, when all is done")
    .addHelpText(
      "after",
      examples(
        ["fewbit quantize --quantize int8wo --out tiny-int8", "the bundled model, 8 bits a weight"],
        ["fewbit quantize path/to/model -q int4wo-64 -o path/to/int4", "then: fewbit run path/to/int4"],
      ),
    )
    .action((folder: string | undefined, options: QuantizeOptions) => run(cli, folder, options));
}

async function run(cli: Cli, folder: string | undefined, options: QuantizeOptions): Promise<void> {
  const { quantize, out, shardSize } = options;
  const line = progressLine(cli);
  const begun = performance.now();
  const report = await saveQuantized(folder ?? bundledModel(), out, {
    quantize,
    shardBytes: shardSize,
    source: modelSource(cli, options),
    signal: cli.signal,
    onProgress: ({ done, total, what }) => {
      const rate = (done / (performance.now() - begun)) * 1000;
      line.show(
        `${Math.floor((100 * done) / total)} %  ${showBytes(done)} of ${showBytes(total)}  ${showBytes(rate)}/s  ${what}`,
      );
    },
  }).finally(line.clear);
  const seconds = (performance.now() - begun) / 1000;
  if (cli.json) return printJson(cli.out, { command: "quantize", quantize, out, seconds, ...report });
  const files = report.files.length === 1 ? report.files[0] : `${report.files.length} files`;
  cli.err.write(
    table(
      [
        ["saved", `${out}  ${files}, ${showBytes(report.bytes)} of tensors in ${seconds.toFixed(1)} s`],
        ["before", `${showBytes(report.sourceBytes)}, ${report.quantized} linears quantized with ${quantize}`],
        ...(report.kept.length > 0 ? ([["kept", `${report.kept.length} files of an earlier run`]] as const) : []),
        [
          "read by",
          report.foreign === null
            ? "fewbit, and torchao (torchao.prototype.safetensors)"
            : `fewbit alone: torchao's checkpoints have no class for ${report.foreign}`,
        ],
      ],
      cli.err.color,
    ),
  );
}
