import { mkdir, writeFile } from "node:fs/promises";
import { dirname } from "node:path";
import { Command, Option } from "commander";
import { FewbitError } from "../core/errors.js";
import { dequantize } from "../formats/tensor.js";
import { writeSafetensors } from "../io/safetensors.js";
import { type HostTensor, isDense } from "../ir/tensor.js";
import type { BackendName } from "../runtime/device.js";
import type { Range, TracedStep } from "../validate/trace.js";
import { decoderRuns, greedyTokens, loadTapped, traceBoth } from "../validate/trace-model.js";
import { backendOption, examples, integer, type ModelOptions, withModel } from "./options.js";
import { bundledModel, shortPath } from "./package.js";
import { type Cli, printJson, progressLine } from "./terminal.js";

interface TraceOptions extends ModelOptions {
  readonly prompt: string;
  readonly against: string;
  readonly tokens: number;
  readonly save?: string;
  readonly all?: boolean;
}

export function traceCommand(cli: Cli): Command {
  const against = new Option("--against <name>", "the other backend")
    .default("reference")
    .argParser(backendOption().parseArg as (name: string) => string);
  return withModel(new Command("trace"))
    .summary("find the first step of a model that is wrong on a backend")
    .description(
      "Runs a prompt and a few tokens on two backends with a tap on every step, judges each step against the definition on its own inputs, and prints the first step beyond its bound: op, kernel, ranges, worst element. Exits 1 when there is one.",
    )
    .addOption(against)
    .option("-p, --prompt <text>", "the text to run", "The captain looked at the sea")
    .option("-n, --tokens <n>", "tokens to run after the prompt", integer("--tokens", 0), 2)
    .option("--save <file>", "save the tensors of the first wrong step as .safetensors")
    .option("--all", "print every step with its error and ranges")
    .option("--json", "one JSON object on stdout")
    .addHelpText(
      "after",
      examples(
        ["fewbit trace", "the bundled model on WebGPU against the reference"],
        ["fewbit trace path/to/model --quantize int8dq --save step.safetensors", "keep the wrong step's tensors"],
      ),
    )
    .action((folder: string | undefined, options: TraceOptions) => trace(cli, folder, options));
}

const backendOf = (name: string): BackendName => (name === "auto" ? "webgpu" : (name as BackendName));

async function trace(cli: Cli, folder: string | undefined, options: TraceOptions): Promise<void> {
  const path = folder ?? bundledModel();
  const line = progressLine(cli);
  const { signal } = cli;
  const context = options.context ?? 128;
  const load = (backend: string) =>
    loadTapped(backendOf(backend), path, { quantize: options.quantize, context, prefillChunk: context, signal });
  await using a = await load(options.backend);
  await using b = await load(options.against);
  const prompt = b.model.tokenizer.encode(options.prompt);
  line.show("generating the tokens to trace");
  const tokens = await greedyTokens(b.model, prompt, options.tokens, signal);
  const { steps, first } = await traceBoth([a.tap, b.tap], decoderRuns(prompt, tokens), signal).finally(() =>
    line.clear(),
  );
  if (first?.tensors !== undefined && options.save !== undefined) await save(options.save, first.tensors);
  const plain = ({ tensors: _, ...step }: TracedStep) => step;
  if (cli.json) {
    printJson(cli.out, {
      command: "trace",
      model: shortPath(path),
      prompt,
      tokens,
      first: first && plain(first),
      steps: steps.map(plain),
    });
  } else {
    if (options.all) for (const step of steps) cli.out.write(describe(step));
    const runs = `${steps.length} steps of ${tokens.length + 1} runs on ${a.tap.backend} and ${b.tap.backend}`;
    if (first === null) {
      const worst = steps.reduce((most, step) => Math.max(most, step.worst), 0);
      cli.out.write(`no divergence in ${runs}; the worst error is ${worst.toFixed(3)} of its bound\n`);
    } else
      cli.out.write(
        `first divergence:\n${describe(first)}${options.save === undefined ? "" : `tensors saved in ${options.save}\n`}`,
      );
  }
  if (first !== null)
    throw new FewbitError("validate/failed", {
      failed: steps.filter((step) => step.worst > 1).length,
      total: steps.length,
    });
}

function describe({ backend, run, what, kernel, worst, element, inputs, outputs }: TracedStep): string {
  const where = `${backend} run ${run}  ${what}\n  kernel ${kernel}  worst error ${Number.isFinite(worst) ? worst.toFixed(3) : "beyond any bound"} of its bound\n`;
  const bad =
    element === null || worst <= 1
      ? ""
      : `  ${element.output}[${element.index}] is ${element.got}, expected ${element.expected} within ${element.bound}\n`;
  return (
    where +
    bad +
    [...inputs.map((range) => rangeLine("in ", range)), ...outputs.map((range) => rangeLine("out", range))].join("")
  );
}

function rangeLine(side: string, { name, largest, nonFinite, subnormal, saturated }: Range): string {
  return `  ${side} ${name}: largest ${largest.toPrecision(4)}, ${nonFinite} not finite, ${subnormal} subnormal, ${saturated} saturated\n`;
}

const DTYPES = { f32: "F32", f16: "F16", bf16: "BF16", i32: "I32", u32: "U32", i8: "I8", u8: "U8" } as const;

async function save(path: string, tensors: ReadonlyMap<string, HostTensor>): Promise<void> {
  const entries = [...tensors].map(([name, tensor]) => {
    const dense = isDense(tensor)
      ? tensor
      : { dtype: "f32" as const, shape: tensor.shape, data: Float32Array.from(dequantize(tensor)) };
    const { buffer, byteOffset, byteLength } = dense.data;
    return {
      name,
      dtype: DTYPES[dense.dtype],
      shape: dense.shape,
      data: new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength),
    };
  });
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, writeSafetensors(entries, { made_by: "fewbit trace" }));
}
