import { FewbitError } from "../core/errors.js";
import type { TensorStore } from "../io/safetensors.js";
import { typeBytes } from "../ir/tensor.js";
import type { Plan } from "../plan/plan.js";
import { parseQuantizeName } from "../quantize/names.js";
import type { Device } from "../runtime/device.js";
import { type AttentionMode, withAttention } from "./attention.js";
import { type DecoderConfig, parseConfig, type TensorSpec, tensorSpecs } from "./config.js";
import { buildDecoder, decoderBuckets } from "./decoder.js";
import { kvFormat } from "./kvcache.js";
import { planWeights } from "./weights.js";

export interface OutlineOptions {
  /** The device to plan for; `load` is never called. */
  readonly device: Device;
  /** As `loadModel`. */
  readonly quantize?: string;
  readonly kv?: string;
  readonly attention?: AttentionMode;
  readonly context?: number;
  readonly prefillChunk?: number;
}

/** A model as it would lie on a device, told from its config alone. Sizes in bytes. */
export interface Outline {
  readonly config: DecoderConfig;
  readonly plan: Plan;
  readonly context: number;
  readonly bytes: {
    readonly weights: number;
    readonly cache: number;
    readonly cachePerToken: number;
    readonly activations: number;
    readonly scratch: number;
    readonly total: number;
  };
}

/** The dtypes of config.json's `dtype` (`torch_dtype` before transformers 5), as safetensors names them. */
const DTYPES = { float32: "F32", float16: "F16", bfloat16: "BF16" } as const;

/**
 * Plans a model from its parsed `config.json`, without its weights. Throws as `parseConfig` and `Device.plan`: `plan/memory` for
 * what the device cannot hold, and `argument/invalid` for a context past the model's.
 */
export function outlineModel(json: Readonly<Record<string, unknown>>, options: OutlineOptions): Outline {
  const config = parseConfig(json);
  const context = checkContext(config, options.context);
  const specs = tensorSpecs(config);
  const name = savedName(json.quantization_config) ?? options.quantize;
  const quantize = name === undefined ? null : parseQuantizeName(name);
  const weights = planWeights(imaginedStore(specs, json.dtype ?? json.torch_dtype), specs, quantize);
  const graph = withAttention(
    buildDecoder(config, {
      weightFormat: weights.weightFormat,
      activationFormat: weights.activationFormat,
      fastAccum: weights.fastAccum,
      kvFormat: kvFormat(options.kv ?? "none"),
      maxTokens: Math.min(options.prefillChunk ?? 128, context),
      capacity: context,
      logits: "last",
    }),
    options.attention ?? "auto",
  );
  const plan = options.device.plan(graph, { buckets: decoderBuckets(context) });
  const caches = new Set(graph.nodes.flatMap((node) => (node.op === "kv_write" ? [node.inputs[0]] : [])));
  const cache = graph.values.reduce(
    (sum, value) => sum + (caches.has(value.id) ? typeBytes(value.type, graph.symbols) : 0),
    0,
  );
  const { weights: stored, state, activations, scratch } = plan.bytes;
  const total = stored + state + activations + scratch;
  const bytes = {
    weights: stored,
    cache,
    cachePerToken: cache / context,
    activations: activations + state - cache,
    scratch,
    total,
  };
  return { config, plan, context, bytes };
}

/** The tokens that prompt and answer may have together. Throws `argument/invalid`. */
export function checkContext(config: DecoderConfig, context = config.contextLength): number {
  if (Number.isInteger(context) && context >= 1 && context <= config.contextLength) return context;
  const expected = `an integer from 1 to ${config.contextLength}`;
  throw new FewbitError("argument/invalid", { name: "context", value: context, expected });
}

/**
 * The name that a checkpoint of `fewbit quantize` was quantized with. Throws `model/unsupported` for other quantized ones: which of
 * their layers are quantized is said by the weights' files.
 */
function savedName(config: unknown): string | undefined {
  if (config === undefined || config === null) return undefined;
  const { quant_method, quantize } = config as Readonly<Record<string, unknown>>;
  if (quant_method === "fewbit" && typeof quantize === "string") return quantize;
  throw new FewbitError("model/unsupported", {
    what: "outline of a checkpoint quantized by",
    value: String(quant_method),
    supported: ["fewbit", "an unquantized one"],
  });
}

/** A checkpoint that has every tensor and no data. */
function imaginedStore(specs: readonly TensorSpec[], name: unknown): TensorStore {
  const dtype = Object.hasOwn(DTYPES, String(name)) ? DTYPES[name as keyof typeof DTYPES] : "BF16";
  const nothing = () =>
    Promise.reject(new FewbitError("io/not-found", { path: "config.json", reason: "it holds no tensors" }));
  const tensors = new Map(specs.map(({ source: { name, shape } }) => [name, { name, dtype, shape, bytes: 0 }]));
  return {
    name: "config.json",
    tensors: tensors as unknown as TensorStore["tensors"],
    read: nothing,
    close: async () => {},
    [Symbol.asyncDispose]: async () => {},
  };
}
