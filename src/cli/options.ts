import { type Command, Option } from "commander";
import { FewbitError, nearestNames } from "../core/errors.js";
import { type AttentionMode, attentionMode } from "../models/attention.js";
import { KV_FORMATS, kvFormat } from "../models/kvcache.js";
import { listQuantizeNames, parseQuantizeName } from "../quantize/names.js";
import { type BackendName, type Device, open } from "../runtime/device.js";

/** The backends of `--backend`; `auto` never means the reference. */
const BACKENDS: Readonly<Record<string, readonly BackendName[]>> = {
  auto: ["webgpu"],
  webgpu: ["webgpu"],
  reference: ["reference"],
};

/** Options of every command that loads a model. */
export interface ModelOptions {
  readonly quantize: string;
  readonly backend: string;
  readonly context?: number;
  readonly kv: string;
  readonly attention: AttentionMode;
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
    "auto or webgpu: a GPU, else SwiftShader, and which one is said; reference: the slow definition",
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
    .argument("[MODEL_DIR]", "a Hugging Face model folder (default: the bundled fewbit-tiny)")
    .addOption(
      new Option("-q, --quantize <name>", "how to quantize the linear layers, or none; fewbit info lists the names")
        .default("int4wo-64")
        .argParser(quantizeName),
    )
    .addOption(backendOption())
    .option(
      "--context <n>",
      "tokens that prompt and answer may have together (default: the model's)",
      integer("--context", 1),
    )
    .addOption(
      new Option(
        "--kv <format>",
        `how cached keys and values are stored: ${Object.keys(KV_FORMATS).join(", ")} (none: f32)`,
      )
        .default("none")
        .argParser((name) => {
          kvFormat(name);
          return name;
        }),
    )
    .addOption(
      new Option("--attention <mode>", "auto: as the cache is stored; float8: e4m3 queries, cache and probabilities")
        .default("auto")
        .argParser(attentionMode),
    );
}

function quantizeName(name: string): string {
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
