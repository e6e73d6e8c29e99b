import { type Format, formatKey } from "../formats/format.js";
import { dense, type Graph, GraphBuilder, stored, type ValueId } from "../ir/graph.js";
import { type DecoderConfig, type TensorRole, type TensorSpec, tensorSpecs } from "./config.js";
import { ringCapacity } from "./kvcache.js";

/** How a decoder's graph is laid out. */
export interface DecoderOptions {
  /** The format of each matrix, by its checkpoint name. */
  readonly weightFormat: (spec: TensorSpec) => Format;
  /** The format that the input of a linear is quantized to, or null to leave it in float32. */
  readonly activationFormat: (spec: TensorSpec) => Format | null;
  readonly kvFormat: Format;
  /** Tokens of one run at most (symbol T). */
  readonly maxTokens: number;
  /** Tokens that the KV cache holds (symbol past + T). */
  readonly capacity: number;
  /** Logits of the last token only, with a draw from them, or of every token. */
  readonly logits: "last" | "all";
}

/** Names of the values that are not in a checkpoint. */
export const ROPE_TABLE = "rope.table";

/** The symbols of a decoder graph: tokens of this run, and tokens already in the cache. */
export const TOKENS = "T";
export const PAST = "past";

/** Tokens up to which a single token's attention is planned on its own: kernels that pay for long contexts only leave it alone. */
const SHORT_CONTEXT = 1022;

/** The symbols to specialise a decoder's kernels for: single tokens after a short and after any context. */
export function decoderBuckets(capacity: number): Record<string, number>[] {
  const single = { [TOKENS]: 1 };
  return capacity > SHORT_CONTEXT + 1 ? [{ ...single, [PAST]: SHORT_CONTEXT }, single] : [single];
}

/**
 * The graph of a decoder: state `ids` i32 [T], input `settings` u32 [5] (see `ir/sample.ts`), a KV cache per layer;
 * outputs `logits` f32 [1 or T, V] and, for the last token only, `sampled` u32 [2] = id and log-probability bits.
 */
export function buildDecoder(config: DecoderConfig, options: DecoderOptions): Graph {
  const g = new GraphBuilder({ [TOKENS]: options.maxTokens, [PAST]: options.capacity });
  const specs = new Map(tensorSpecs(config).map((spec) => [`${spec.layer ?? ""}${spec.role}`, spec]));
  const find = (role: TensorRole, layer: number | null) => specs.get(`${layer ?? ""}${role}`);
  const vector = (role: TensorRole, layer: number | null): ValueId | undefined => {
    const spec = find(role, layer);
    return spec && g.weight(spec.name, dense("f32", spec.shape));
  };
  const matrix = (role: TensorRole, layer: number | null): ValueId => {
    const spec = find(role, layer) as TensorSpec;
    return g.weight(spec.name, stored(options.weightFormat(spec), spec.shape));
  };
  const quantized = new Map<string, ValueId>();
  /** One quantize node an input and format: q, k and v share theirs. */
  const linear = (role: TensorRole, layer: number, x: ValueId): ValueId => {
    const spec = find(role, layer) as TensorSpec;
    const format = options.activationFormat(spec);
    let input = x;
    if (format !== null) {
      const key = `${x} ${formatKey(format)}`;
      input = quantized.get(key) ?? g.one("quantize", [x], { format }, `quantize.${spec.name}`);
      quantized.set(key, input);
    }
    const bias = vector(`${role}Bias` as TensorRole, layer);
    const operands = [input, matrix(role, layer), ...(bias === undefined ? [] : [bias])];
    return g.one("linear", operands, {}, spec.name.replace(/\.weight$/, ""));
  };

  const ids = g.state("ids", dense("i32", [TOKENS]));
  const table = matrix("embedding", null);
  const angles = g.weight(ROPE_TABLE, dense("f32", [options.capacity, config.headDim]));
  const { eps } = config.norm;
  const { slidingWindow: window } = config;
  const slots = window === undefined ? options.capacity : ringCapacity(window, options.maxTokens, options.capacity);
  const ring = slots < options.capacity;
  const cacheShape = [config.kvHeads, slots, config.headDim];
  let x = g.one("embedding", [ids, table], {}, "embedding");
  for (let layer = 0; layer < config.layers; layer++) {
    const name = (what: string) => `layer${layer}.${what}`;
    const before = g.one("rmsnorm", [x, vector("attentionNorm", layer) as ValueId], { eps }, name("norm"));
    const [q, k, v] = (["q", "k", "v"] as const).map((role) => linear(role, layer, before)) as [
      ValueId,
      ValueId,
      ValueId,
    ];
    const turnedQ = g.one("rope", [q, angles], { heads: config.heads, position: PAST }, name("rope.q"));
    const turnedK = g.one("rope", [k, angles], { heads: config.kvHeads, position: PAST }, name("rope.k"));
    const keys = g.state(name("k_cache"), stored(options.kvFormat, cacheShape));
    const values = g.state(name("v_cache"), stored(options.kvFormat, cacheShape));
    const allKeys = g.one("kv_write", [keys, turnedK], { position: PAST, ring }, name("k_write"));
    const allValues = g.one("kv_write", [values, v], { position: PAST, ring }, name("v_write"));
    const attended = g.one(
      "sdpa",
      [turnedQ, allKeys, allValues],
      {
        heads: config.heads,
        kvHeads: config.kvHeads,
        scale: 1 / Math.sqrt(config.headDim),
        causal: true,
        position: PAST,
        ...(window === undefined ? {} : { window, ring }),
      },
      name("sdpa"),
    );
    x = g.one("binary", [x, linear("o", layer, attended)], { fn: "add" }, name("attention"));
    const middle = g.one("rmsnorm", [x, vector("mlpNorm", layer) as ValueId], { eps }, name("mlp_norm"));
    const gate = linear("gate", layer, middle);
    const up = linear("up", layer, middle);
    const active = g.one("unary", [gate], { fn: config.activation }, name("activation"));
    const inner = g.one("binary", [active, up], { fn: "mul" }, name("gated"));
    x = g.one("binary", [x, linear("down", layer, inner)], { fn: "add" }, name("mlp"));
  }
  const last = options.logits === "last" ? g.one("last_row", [x], {}, "last") : x;
  const normed = g.one("rmsnorm", [last, vector("finalNorm", null) as ValueId], { eps }, "final_norm");
  const head = config.tieEmbeddings ? table : matrix("head", null);
  const logits = g.one("linear", [normed, head], {}, "logits");
  g.output("logits", logits);
  if (options.logits === "last") {
    const settings = g.input("settings", dense("u32", [5]));
    const [sampled, next] = g.op("sample", [logits, settings, ids], {}, "sampled") as [ValueId, ValueId];
    g.output("sampled", sampled);
    g.output("next_ids", next);
  }
  return g.build();
}

/**
 * Cosines and sines of every position, [capacity, headDim]: cosines in the first half of a row, sines in the second.
 * Angles are computed in float64, so that far positions lose nothing (Su et al., RoFormer 2021).
 */
export function ropeTable(config: DecoderConfig, capacity: number): Float32Array {
  const half = config.headDim / 2;
  const table = new Float32Array(capacity * config.headDim);
  for (let i = 0; i < half; i++) {
    const frequency = ropeFrequency(config, i);
    for (let position = 0; position < capacity; position++) {
      table[position * config.headDim + i] = Math.cos(position * frequency);
      table[position * config.headDim + half + i] = Math.sin(position * frequency);
    }
  }
  return table;
}

/** Radians a position of pair i, by `config.rope`. */
function ropeFrequency({ rope: { theta, scaling }, headDim }: DecoderConfig, i: number): number {
  const frequency = theta ** ((-2 * i) / headDim);
  if (scaling === null) return frequency;
  const { factor, lowFrequency, highFrequency, originalContext } = scaling;
  const turns = (originalContext * frequency) / (2 * Math.PI);
  const kept = Math.min(Math.max((turns - lowFrequency) / (highFrequency - lowFrequency), 0), 1);
  return frequency * (kept + (1 - kept) / factor);
}
