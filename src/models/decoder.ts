import { FewbitError } from "../core/errors.js";
import { type Format, formatKey } from "../formats/format.js";
import { dense, type Graph, GraphBuilder, stored, type ValueId } from "../ir/graph.js";
import type { UnaryFn } from "../ir/ops.js";
import { PERMUTATION, permutationName } from "./column-order.js";
import { type DecoderConfig, type LayerConfig, type TensorRole, type TensorSpec, tensorSpecs } from "./config.js";
import { ropeTableName } from "./decoder-rope.js";
import { ringCapacity } from "./kvcache.js";

export { ROPE_TABLE, ropeTable, ropeTables } from "./decoder-rope.js";

/** How a decoder's graph is laid out. */
export interface DecoderOptions {
  /** The format of each matrix. */
  readonly weightFormat: (spec: TensorSpec) => Format;
  /** The format that the input of a linear is quantized to, or null to leave it in float32. */
  readonly activationFormat: (spec: TensorSpec) => Format | null;
  /** Whether the linear of a weight declares `fastAccum` (default: none does). */
  readonly fastAccum?: (spec: TensorSpec) => boolean;
  /** As `WeightPlan.inputOrder` (default: every weight takes its input as it is). */
  readonly inputOrder?: (spec: TensorSpec) => Uint32Array | null;
  readonly kvFormat: Format;
  /** Tokens of one run at most (symbol T). */
  readonly maxTokens: number;
  /** Tokens that the KV cache holds (symbol past + T). */
  readonly capacity: number;
  /** Logits of the last token only, with a draw from them, or of every token. */
  readonly logits: "last" | "all";
}

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
  const w = new Weights(g, config, options);
  const ids = g.state("ids", dense("i32", [TOKENS]));
  const table = w.matrix("embedding", null);
  const positions = w.vector("positions", null);
  const scale = config.embeddingScale === 1 ? {} : { scale: config.embeddingScale };
  let x =
    positions === undefined
      ? g.one("embedding", [ids, table], scale, "embedding")
      : g.one("embedding", [ids, table, positions], { ...scale, position: PAST }, "embedding");
  const angles = config.ropes.map(({ rotary }, i) =>
    g.weight(ropeTableName(i), dense("f32", [options.capacity, rotary])),
  );
  for (const [layer, kind] of config.layerConfigs.entries()) {
    const name = (what: string) => `layer${layer}.${what}`;
    const before = w.norm("attentionNorm", layer, x, name("norm"));
    const attended = attention(g, w, { config, options, angles }, layer, kind, before);
    const output = w.linear("o", layer, attended);
    x = g.one(
      "binary",
      [x, w.norm("attentionPostNorm", layer, output, name("post_norm"))],
      { fn: "add" },
      name("attention"),
    );
    const middle = w.norm("mlpNorm", layer, x, name("mlp_norm"));
    const inner = kind.sparse
      ? experts(g, w, config, layer, middle)
      : mlp(g, w, DENSE_MLP, config.activation, layer, middle);
    x = g.one("binary", [x, w.norm("mlpPostNorm", layer, inner, name("mlp_post_norm"))], { fn: "add" }, name("mlp"));
  }
  const last = options.logits === "last" ? g.one("last_row", [x], {}, "last") : x;
  const normed = w.norm("finalNorm", null, last, "final_norm");
  const head = config.tieEmbeddings ? table : w.matrix("head", null);
  const cap = config.logitSoftcap;
  const raw = g.one("linear", [normed, head], {}, cap === null ? "logits" : "logits.raw");
  const logits = cap === null ? raw : g.one("unary", [raw], { fn: "softcap", cap }, "logits");
  g.output("logits", logits);
  if (options.logits === "last") {
    const settings = g.input("settings", dense("u32", [5]));
    const [sampled, next] = g.op("sample", [logits, settings, ids], {}, "sampled") as [ValueId, ValueId];
    g.output("sampled", sampled);
    g.output("next_ids", next);
  }
  return g.build();
}

/** A model's weights as values of its graph, and the ops that take them. */
class Weights {
  readonly #g: GraphBuilder;
  readonly #config: DecoderConfig;
  readonly #options: DecoderOptions;
  readonly #specs = new Map<string, TensorSpec>();
  readonly #quantized = new Map<string, ValueId>();
  readonly #ordered: { readonly x: ValueId; readonly order: Uint32Array; readonly made: ValueId }[] = [];

  constructor(g: GraphBuilder, config: DecoderConfig, options: DecoderOptions) {
    this.#g = g;
    this.#config = config;
    this.#options = options;
    for (const spec of tensorSpecs(config)) this.#specs.set(key(spec.role, spec.layer, spec.expert), spec);
  }

  has(role: TensorRole, layer: number | null): boolean {
    return this.#specs.has(key(role, layer, null));
  }

  matrix(role: TensorRole, layer: number | null, expert: number | null = null): ValueId {
    const spec = this.#specs.get(key(role, layer, expert)) as TensorSpec;
    return this.#g.weight(spec.name, stored(this.#options.weightFormat(spec), spec.shape));
  }

  /** A dense weight, if the model has it. */
  vector(role: TensorRole, layer: number | null): ValueId | undefined {
    const spec = this.#specs.get(key(role, layer, null));
    return spec && this.#g.weight(spec.name, dense("f32", spec.shape));
  }

  /** x [T, width] itself where the model has no such norm. Weights narrower than x serve its heads one by one. */
  norm(role: TensorRole, layer: number | null, x: ValueId, name: string, width = this.#config.hiddenSize): ValueId {
    const spec = this.#specs.get(key(role, layer, null));
    if (spec === undefined) return x;
    const weight = this.vector(role, layer) as ValueId;
    const { kind, eps } = this.#config.norm;
    const groups = width / (spec.shape[0] as number);
    if (kind === "rmsnorm")
      return this.#g.one("rmsnorm", [x, weight], { eps, ...(groups > 1 ? { groups } : {}) }, name);
    const bias = this.vector(`${role}Bias` as TensorRole, layer);
    return this.#g.one("layernorm", [x, weight, ...(bias === undefined ? [] : [bias])], { eps }, name);
  }

  linear(role: TensorRole, layer: number, x: ValueId): ValueId {
    const spec = this.#specs.get(key(role, layer, null)) as TensorSpec;
    const bias = this.vector(`${role}Bias` as TensorRole, layer);
    const input = this.#quantize(spec, this.#order(spec, x));
    const operands = [input, this.matrix(role, layer), ...(bias === undefined ? [] : [bias])];
    const attrs = this.#options.fastAccum?.(spec) ? { fastAccum: true } : {};
    return this.#g.one("linear", operands, attrs, spec.name.replace(".weight", ""));
  }

  /** The chosen experts of each token: x [T, K] or [T, S, K], ids [T, S]. */
  expertLinear(role: TensorRole, layer: number, x: ValueId, ids: ValueId): ValueId {
    const specs = Array.from(
      { length: this.#config.experts?.count ?? 0 },
      (_, expert) => this.#specs.get(key(role, layer, expert)) as TensorSpec,
    );
    const first = specs[0] as TensorSpec;
    const formats = new Set(specs.map((spec) => formatOrNone(this.#options.activationFormat(spec))));
    if (formats.size > 1) {
      const reason = "its experts share the input of a layer, so that they take one format";
      throw new FewbitError("quantize/layer", { layer: first.name, config: [...formats].join(", "), reason });
    }
    const weights = specs.map(({ expert }) => this.matrix(role, layer, expert));
    return this.#g.one("moe_linear", [this.#quantize(first, x), ids, ...weights], {}, `layer${layer}.${role}`);
  }

  /** x with its elements in the order of the weight's columns; weights of the same order share it. */
  #order(spec: TensorSpec, x: ValueId): ValueId {
    const order = this.#options.inputOrder?.(spec) ?? null;
    if (order === null) return x;
    const known = this.#ordered.find((one) => one.x === x && one.order.every((from, i) => from === order[i]));
    if (known !== undefined) return known.made;
    const name = permutationName(spec.name);
    const matrix = this.#g.weight(name, stored(PERMUTATION, [order.length, order.length]));
    const made = this.#g.one("linear", [x, matrix], {}, `ordered.${spec.name.replace(".weight", "")}`);
    this.#ordered.push({ x, order, made });
    return made;
  }

  /** One quantize node an input and format: q, k and v share theirs. */
  #quantize(spec: TensorSpec, x: ValueId): ValueId {
    const format = this.#options.activationFormat(spec);
    if (format === null) return x;
    const known = `${x} ${formatKey(format)}`;
    const input = this.#quantized.get(known) ?? this.#g.one("quantize", [x], { format }, `quantize.${spec.name}`);
    this.#quantized.set(known, input);
    return input;
  }
}

const key = (role: TensorRole, layer: number | null, expert: number | null) => `${role} ${layer ?? ""} ${expert ?? ""}`;
const formatOrNone = (format: Format | null) => (format === null ? "none" : formatKey(format));

interface Attention {
  readonly config: DecoderConfig;
  readonly options: DecoderOptions;
  readonly angles: readonly ValueId[];
}

/** Attention over a layer's cache, without the output projection: x [T, H] -> [T, heads * D]. */
function attention(
  g: GraphBuilder,
  w: Weights,
  { config, options, angles }: Attention,
  layer: number,
  { window, rope }: LayerConfig,
  x: ValueId,
): ValueId {
  const name = (what: string) => `layer${layer}.${what}`;
  const { heads, kvHeads, headDim } = config;
  const [q, k, v] = (["q", "k", "v"] as const).map((role) => w.linear(role, layer, x)) as [ValueId, ValueId, ValueId];
  const normedQ = w.norm("qNorm", layer, q, name("q_norm"), heads * headDim);
  const normedK = w.norm("kNorm", layer, k, name("k_norm"), kvHeads * headDim);
  const turn = (value: ValueId, count: number, what: string): ValueId => {
    const table = rope === null ? undefined : angles[rope];
    if (rope === null || table === undefined) return value;
    const { rotary } = config.ropes[rope] as DecoderConfig["ropes"][number];
    const attrs = { heads: count, position: PAST, ...(rotary === headDim ? {} : { rotary }) };
    return g.one("rope", [value, table], attrs, name(what));
  };
  const turnedQ = turn(normedQ, heads, "rope.q");
  const turnedK = turn(normedK, kvHeads, "rope.k");
  const slots = window === null ? options.capacity : ringCapacity(window, options.maxTokens, options.capacity);
  const ring = slots < options.capacity;
  const cache = (what: string) => g.state(name(what), stored(options.kvFormat, [kvHeads, slots, headDim]));
  const [keys, values] = [cache("k_cache"), cache("v_cache")];
  const allKeys = g.one("kv_write", [keys, turnedK], { position: PAST, ring }, name("k_write"));
  const allValues = g.one("kv_write", [values, v], { position: PAST, ring }, name("v_write"));
  const { scale, softcap } = config.attention;
  const attrs = {
    ...{ heads, kvHeads, scale, causal: true, position: PAST },
    ...(softcap === null ? {} : { softcap }),
    ...(window === null ? {} : { window, ring }),
  };
  return g.one("sdpa", [turnedQ, allKeys, allValues], attrs, name("sdpa"));
}

const DENSE_MLP = ["gate", "up", "down"] as const;
const SHARED_MLP = ["sharedGate", "sharedUp", "sharedDown"] as const;

/** down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate. */
function mlp(
  g: GraphBuilder,
  w: Weights,
  [gate, up, down]: readonly [TensorRole, TensorRole, TensorRole],
  fn: UnaryFn,
  layer: number,
  x: ValueId,
): ValueId {
  const name = (what: string) => `layer${layer}.${gate === "gate" ? what : `shared.${what}`}`;
  if (!w.has(gate, layer))
    return w.linear(down, layer, g.one("unary", [w.linear(up, layer, x)], { fn }, name("activation")));
  const [left, right] = [w.linear(gate, layer, x), w.linear(up, layer, x)];
  const active = g.one("unary", [left], { fn }, name("activation"));
  return w.linear(down, layer, g.one("binary", [active, right], { fn: "mul" }, name("gated")));
}

/** A mixture of experts, with a shared one where the model has it. */
function experts(g: GraphBuilder, w: Weights, config: DecoderConfig, layer: number, x: ValueId): ValueId {
  const name = (what: string) => `layer${layer}.${what}`;
  const { active: top, normalize } = config.experts as NonNullable<DecoderConfig["experts"]>;
  const [ids, gates] = g.op("moe_route", [w.linear("router", layer, x)], { top, normalize }, name("route")) as [
    ValueId,
    ValueId,
  ];
  const [left, right] = [w.expertLinear("expertGate", layer, x, ids), w.expertLinear("expertUp", layer, x, ids)];
  const active = g.one("unary", [left], { fn: config.activation }, name("activation"));
  const gated = g.one("binary", [active, right], { fn: "mul" }, name("gated"));
  const down = w.expertLinear("expertDown", layer, gated, ids);
  const sum = g.one("moe_combine", [down, gates], {}, name("experts"));
  if (!w.has("sharedRouter", layer)) return sum;
  const weight = g.one("unary", [w.linear("sharedRouter", layer, x)], { fn: "sigmoid" }, name("shared.gate"));
  const shared = mlp(g, w, SHARED_MLP, config.activation, layer, x);
  const share = g.one("moe_combine", [shared, weight], {}, name("shared"));
  return g.one("binary", [sum, share], { fn: "add" }, name("experts_and_shared"));
}
