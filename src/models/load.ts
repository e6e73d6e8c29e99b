import { FewbitError } from "../core/errors.js";
import { Staging } from "../core/staging.js";
import type { Format } from "../formats/format.js";
import { type ModelFolder, type ModelFolderOptions, openModelFolder } from "../io/model-folder.js";
import { openWeights } from "../io/quantized.js";
import type { TensorStore } from "../io/safetensors.js";
import { readJson } from "../io/source.js";
import type { Graph } from "../ir/graph.js";
import { asRows, type HostTensor, joinRows, type TensorRows } from "../ir/tensor.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import { parseQuantizeName } from "../quantize/names.js";
import type { Device, Program } from "../runtime/device.js";
import { loadTokenizer, type Tokenizer } from "../text/tokenizer.js";
import { type AttentionMode, withAttention } from "./attention.js";
import { permutation, permutedWeight } from "./column-order.js";
import { type DecoderConfig, parseConfig, type TensorSpec, tensorSpecs } from "./config.js";
import { buildDecoder, decoderBuckets, ropeTables } from "./decoder.js";
import { kvFormat } from "./kvcache.js";
import { checkContext } from "./outline.js";
import { planWeights, type Replacement, replaceWeights } from "./weights.js";

export interface LoadModelOptions {
  readonly device: Device;
  /** A short name such as `int4wo-64`, a config, a map of layer patterns to configs, or `none` (default). */
  readonly quantize?: string | QuantizeConfig | ReadonlyMap<string, QuantizeConfig | null> | null;
  /**
   * Leave a checkpoint that holds quantized linears entirely as it is stored (default false: `quantize` applies to the linears
   * that it holds as floats; those that are quantized are never quantized again).
   */
  readonly keepQuantized?: boolean;
  /** Tensors in place of the checkpoint's, from `calibrate` with the same `quantize`. */
  readonly replace?: Replacement;
  /** Tokens that the KV cache holds; default: the model's context length. */
  readonly context?: number;
  /** Prompt tokens of one run at most (default 128): longer prompts run in several. */
  readonly prefillChunk?: number;
  /** How cached keys and values are stored: a format, or a name of `KV_FORMATS` (default none: f32). */
  readonly kv?: Format | string;
  /** `float8` computes attention in e4m3, with a cache of its own format (default auto: as the cache is stored). */
  readonly attention?: AttentionMode;
  /** How a model that is not on this machine is downloaded and kept. */
  readonly source?: ModelFolderOptions;
  readonly signal?: AbortSignal;
  readonly onProgress?: (progress: LoadProgress) => void;
}

export interface LoadProgress {
  readonly stage: "read" | "quantize" | "upload";
  readonly done: number;
  readonly total: number;
  readonly what: string;
}

export type { ModelFolder } from "../io/model-folder.js";

/** A decoder's program on a device, with what is needed to feed it. */
export interface LoadedDecoder {
  readonly config: DecoderConfig;
  readonly tokenizer: Tokenizer;
  readonly program: Program;
  /** Tokens that the KV cache holds. */
  readonly capacity: number;
  /** Tokens of one run at most. */
  readonly maxTokens: number;
}

/**
 * `loadModel` without the `Model`: with logits of the last token (and a draw from them), or of all tokens of a run.
 */
export async function loadDecoder(
  folder: ModelFolder,
  options: LoadModelOptions,
  logits: "last" | "all",
): Promise<LoadedDecoder> {
  const { signal, device, onProgress } = options;
  await using opened = await openDecoder(folder, options, logits);
  const { config, tokenizer, graph, capacity, maxTokens, specs } = opened;
  const names = new Set(specs.map(({ name }) => name));
  let loaded = 0;
  const program = await device.compile(graph, {
    buckets: decoderBuckets(capacity),
    ...(signal && { signal }),
    weights: (name) => {
      if (names.has(name)) onProgress?.({ stage: "quantize", done: loaded++, total: names.size, what: name });
      return opened.rows(name);
    },
    onProgress: (done, total) => onProgress?.({ stage: "upload", done, total, what: "weights" }),
  });
  return { config, tokenizer, program, capacity, maxTokens };
}

/** A decoder whose checkpoint is open and checked, before anything is on a device. */
export interface OpenedDecoder extends Omit<LoadedDecoder, "program">, AsyncDisposable {
  readonly graph: Graph;
  readonly specs: readonly TensorSpec[];
  readonly checkpoint: TensorStore;
  /** A weight of the graph by name, quantized a few rows at a time. All are in the same memory: one is read at a time. */
  rows(name: string): TensorRows;
  /** The same, whole. */
  load(name: string): Promise<HostTensor>;
}

export async function openDecoder(
  folder: ModelFolder,
  options: Omit<LoadModelOptions, "device">,
  logits: "last" | "all",
): Promise<OpenedDecoder> {
  const { signal } = options;
  const open = signal === undefined ? {} : { signal };
  const directory = await openModelFolder(folder, { ...downloadReport(options), ...open, ...options.source });
  const json = await readJson(directory, "config.json", open);
  const config = parseConfig(json);
  const tokenizer = loadTokenizer(
    await readJson(directory, "tokenizer.json", open),
    await readJson(directory, "tokenizer_config.json", open),
  );
  const capacity = checkContext(config, options.context);
  const chunk = options.prefillChunk ?? 128;
  checkCount("prefillChunk", chunk);
  const selection =
    typeof options.quantize === "string" ? parseQuantizeName(options.quantize) : (options.quantize ?? null);
  const checkpoint = await openWeights(directory, json.quantization_config, open);
  try {
    const specs = tensorSpecs(config);
    const kept = options.keepQuantized === true && (checkpoint.stored?.size ?? 0) > 0;
    if (kept && selection !== null)
      options.source?.onNotice?.("the checkpoint is quantized already and stays as it is stored");
    const plan = planWeights(checkpoint, specs, kept ? null : selection);
    const weights = replaceWeights(plan, options.replace ?? new Map());
    const maxTokens = Math.min(chunk, capacity);
    const { kv = "none", attention = "auto" } = options;
    const decoder = buildDecoder(config, {
      weightFormat: weights.weightFormat,
      activationFormat: weights.activationFormat,
      fastAccum: weights.fastAccum,
      inputOrder: weights.inputOrder,
      kvFormat: typeof kv === "string" ? kvFormat(kv) : kv,
      maxTokens,
      capacity,
      logits,
    });
    const byName = new Map(specs.map((spec) => [spec.name, spec]));
    const tables = ropeTables(config, capacity);
    const memory = new Staging();
    const rows = (name: string, options: { memory?: Staging } = {}): TensorRows => {
      const table = tables.get(name);
      if (table !== undefined) return table;
      const permuted = permutedWeight(name);
      const spec = byName.get(permuted ?? name);
      if (spec === undefined) throw new FewbitError("model/missing-tensor", { name, path: checkpoint.name });
      if (permuted !== null) return asRows(permutation(weights.inputOrder(spec) as Uint32Array));
      return weights.rows(spec, { ...open, ...options });
    };
    return {
      config,
      tokenizer,
      checkpoint,
      specs,
      graph: withAttention(decoder, attention),
      capacity,
      maxTokens,
      rows: (name) => rows(name, { memory }),
      load: async (name) => joinRows(rows(name)),
      [Symbol.asyncDispose]: () => checkpoint[Symbol.asyncDispose](),
    };
  } catch (error) {
    await checkpoint[Symbol.asyncDispose]();
    throw error;
  }
}

/** Downloads as progress: bytes that are here, and the speed in words. */
function downloadReport({ onProgress }: Omit<LoadModelOptions, "device">): ModelFolderOptions {
  if (onProgress === undefined) return {};
  return {
    onDownload: ({ name, done, total, rate }) =>
      onProgress({ stage: "read", done, total, what: `${name} ${(rate / 1e6).toFixed(1)} MB/s` }),
  };
}

function checkCount(name: string, value: number): void {
  if (Number.isInteger(value) && value >= 1) return;
  throw new FewbitError("argument/invalid", { name, value, expected: "a positive integer" });
}
