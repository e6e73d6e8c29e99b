import { type Command, Option } from "commander";
import { FewbitError, nearestNames } from "../core/errors.js";
import { type AttentionMode, attentionMode } from "../models/attention.js";
import { KV_FORMATS, kvFormat } from "../models/kvcache.js";
import { listQuantizeNames, parseQuantizeName } from "../quantize/names.js";
import { type BackendName, type Device, open } from "../runtime/device.js";
import { revisionOption } from "./source.js";

/** The backends of `--backend`; `auto` never means the reference. */
const BACKENDS: Readonly<Record<string, readonly BackendName[]>> = {
  auto: ["cuda", "webgpu"],
  webgpu: ["webgpu"],
  cuda: ["cuda"],
  reference: ["reference"],
};

/** Options of every command that loads a model. */
export interface ModelOptions {
  readonly quantize: string;
  /** Whether `--quantize` was given: its default leaves a quantized checkpoint alone. */
  readonly quantizeChosen?: boolean;
  readonly backend: string;
  readonly context?: number;
  readonly kv: string;
  readonly attention: AttentionMode;
  readonly revision?: string;
}

/** A parser for an integer option. Throws `argument/invalid`. */
export function integer(option: string, min: number, max = Number.MAX_SAFE_INTEGER): (text: string) => number {
  const range = max === Number.MAX_SAFE_INTEGER ? `of at least ${min}` : `from ${min} to ${max}`;
  return (text) => {
    const value = /^[+-]?\d+$/.test(text) ? Number(text) : Number.NaN;
    return legal(
      option,
      text,
      value,
      Number.isSafeInteger(value) && value >= min && value <= max,
      `an integer ${range}`,
    );
  };
}

/** A parser for a decimal option. Throws `argument/invalid`. */
export function decimal(option: string, ok: (value: number) => boolean, expected: string): (text: string) => number {
  return (text) => {
    const value = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text) ? Number(text) : Number.NaN;
    return legal(option, text, value, Number.isFinite(value) && ok(value), expected);
  };
}

function legal(name: string, text: string, value: number, ok: boolean, expected: string): number {
  if (!ok) throw new FewbitError("argument/invalid", { name, value: text, expected });
  return value;
}

/** `--backend`. */
export function backendOption(): Option {
  return new Option(
    "--backend <name>",
    "auto: cuda where it is, else webgpu; cuda: native kernels; webgpu: a GPU, else SwiftShader, and which one is said; reference: the slow definition",
  )
    .default("auto")
    .argParser((name) => {
      if (Object.hasOwn(BACKENDS, name)) return name;
      const nearest = nearestNames(name, Object.keys(BACKENDS));
      throw new FewbitError("argument/unknown-name", { kind: "backend", name, nearest });
    });
}

/** Adds the model folder, `--quantize`, `--backend`, `--context`, `--kv` and `--attention`. */
export function withModel(command: Command): Command {
  return command
    .argument(
      "[MODEL_DIR]",
      "a model folder, .gguf or .safetensors file, URL or owner/name (default: the bundled fewbit-tiny)",
    )
    .addOption(
      new Option(
        "-q, --quantize <name>",
        "how to quantize the linear layers, or none (fewbit info lists the names), or a plan of fewbit autoquant",
      )
        .default("int4wo-64")
        .argParser((name) => (name.endsWith(".json") ? name : quantizeName(name))),
    )
    .addOption(backendOption())
    .option(
      "--context <n>",
      "tokens that prompt and answer may have together (default: the model's)",
      integer("--context", 1),
    )
    .addOption(kvOption())
    .addOption(attentionOption())
    .addOption(revisionOption())
    .hook("preAction", (_, action) => {
      action.setOptionValue("quantizeChosen", action.getOptionValueSource("quantize") === "cli");
    });
}

/** `--kv`. */
export function kvOption(): Option {
  const formats = Object.keys(KV_FORMATS).join(", ");
  return new Option("--kv <format>", `how cached keys and values are stored: ${formats} (none: f32)`)
    .default("none")
    .argParser((name) => {
      kvFormat(name);
      return name;
    });
}

/** `--attention`. */
export function attentionOption(): Option {
  return new Option("--attention <mode>", "auto: as the cache is stored; float8: e4m3 queries, cache and probabilities")
    .default("auto")
    .argParser(attentionMode);
}

/** Options of every command that draws tokens. */
export interface SamplingOptions {
  readonly maxTokens: number;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly repetitionPenalty: number;
  readonly stop: readonly string[];
  readonly seed: number;
}

const U32 = 2 ** 32 - 1;

/** Adds how tokens are drawn, and when to stop. */
export function withSampling(
  command: Command,
  defaults: { readonly maxTokens: number; readonly temperature: number },
): Command {
  return command
    .option("-n, --max-tokens <n>", "tokens to generate at most", integer("--max-tokens", 0), defaults.maxTokens)
    .option(
      "-t, --temperature <t>",
      "0 takes the most likely token",
      decimal("--temperature", (t) => t >= 0, "a number of at least 0"),
      defaults.temperature,
    )
    .option("--top-k <k>", "draw from the k most likely tokens, 0: all", integer("--top-k", 0, U32), 0)
    .option(
      "--top-p <p>",
      "draw from the likeliest tokens that hold this share",
      decimal("--top-p", (p) => p > 0 && p <= 1, "a number above 0 and at most 1"),
      1,
    )
    .option(
      "--min-p <p>",
      "leave out tokens less likely than this share of the likeliest",
      decimal("--min-p", (p) => p >= 0 && p <= 1, "a number from 0 to 1"),
      0,
    )
    .option(
      "--repetition-penalty <r>",
      "above 1: tokens that the text holds already become less likely",
      decimal("--repetition-penalty", (r) => r > 0, "a number above 0"),
      1,
    )
    .option(
      "--stop <text>",
      "end before this text; may be given several times",
      (text: string, texts: readonly string[]) => [...texts, text],
      [],
    )
    .option("--seed <s>", "equal seeds draw equal texts", integer("--seed", 0, U32), 0);
}

/** A parser for a short name. Throws `argument/unknown-name`. */
export function quantizeName(name: string): string {
  try {
    parseQuantizeName(name);
  } catch (error) {
    if (!(error instanceof FewbitError) || error.code !== "argument/unknown-name") throw error;
    const { context, code } = error as FewbitError<"argument/unknown-name">;
    throw new FewbitError(code, context, { hint: `fewbit info lists all ${listQuantizeNames().length} names` });
  }
  return name;
}

export function openDevice(backend: string, signal: AbortSignal): Promise<Device> {
  return open({ prefer: BACKENDS[backend] as readonly BackendName[], signal });
}

/** The examples at the end of a command's help. */
export function examples(...lines: readonly (readonly [command: string, what: string])[]): string {
  const width = Math.max(...lines.map(([command]) => command.length)) + 2;
  return `\nExamples:\n${lines.map(([command, what]) => `  ${command.padEnd(width)}${what}`).join("\n")}\n`;
}
