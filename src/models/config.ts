import { FewbitError } from "../core/errors.js";

/** The function between the two MLP projections. `gelu` is exact (erf), `gelu_tanh` its tanh approximation. */
export type Activation = "silu" | "gelu" | "gelu_tanh" | "relu";

/**
 * Llama 3.1's: frequencies with wavelengths above originalContext / lowFrequency are divided by `factor`, those below
 * originalContext / highFrequency stay, and what lies between is a mean of the two.
 */
export interface RopeScaling {
  readonly kind: "llama3";
  readonly factor: number;
  readonly lowFrequency: number;
  readonly highFrequency: number;
  readonly originalContext: number;
}

/** Everything the decoder's graph builder needs to know about a model: data, independent of any weight. */
export interface DecoderConfig {
  /** The architecture's name in Hugging Face `config.json`. */
  readonly architecture: ArchitectureName;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly layers: number;
  /** Query heads; `kvHeads` divides it. */
  readonly heads: number;
  readonly kvHeads: number;
  /** Elements of one head, even. */
  readonly headDim: number;
  /** The most positions the model was made for. */
  readonly contextLength: number;
  readonly norm: { readonly kind: "rmsnorm"; readonly eps: number };
  /** Rotary embedding; `scaling` is null for plain frequencies `theta^(-2i/headDim)`. */
  readonly rope: { readonly theta: number; readonly scaling: RopeScaling | null };
  /** A token sees this many tokens, itself among them; left out when it sees all. */
  readonly slidingWindow?: number;
  readonly activation: Activation;
  /** The head is the embedding table, and the checkpoint need not hold `lm_head`. */
  readonly tieEmbeddings: boolean;
  readonly qkvBias: boolean;
  readonly oBias: boolean;
  readonly mlpBias: boolean;
  /** As config.json states it; the tokenizer's files may say more. */
  readonly bosId: number | null;
  /** Any of these ends a text; as config.json states them. */
  readonly eosIds: readonly number[];
}

/** A constant of the architecture, or the boolean field of config.json that says it (absent: false). */
type Flag = boolean | { readonly field: string };

/** One supported architecture. Adding one means adding a row. */
interface Architecture {
  readonly qkvBias: Flag;
  readonly oBias: Flag;
  readonly mlpBias: Flag;
  /** What the architecture's Hugging Face config class assumes when config.json leaves a field out. */
  readonly absent: {
    /** null: as many as num_attention_heads. */
    readonly num_key_value_heads: number | null;
    readonly rope_theta: number;
    readonly tie_word_embeddings: boolean;
    readonly sliding_window: number | null;
  };
  /** The field that must be true for `sliding_window` to count; null when the window always counts. */
  readonly slidingSwitch: string | null;
  readonly tensors: TensorTable;
}

/** What a weight does in the decoder. */
export type TensorRole =
  | "embedding"
  | "attentionNorm"
  | "q"
  | "qBias"
  | "k"
  | "kBias"
  | "v"
  | "vBias"
  | "o"
  | "oBias"
  | "mlpNorm"
  | "gate"
  | "gateBias"
  | "up"
  | "upBias"
  | "down"
  | "downBias"
  | "finalNorm"
  | "head";

/** A tensor that a checkpoint must hold. `layer` is null outside the layers; matrices are [out features, in features]. */
export interface TensorSpec {
  readonly role: TensorRole;
  readonly layer: number | null;
  readonly name: string;
  readonly shape: readonly number[];
}

interface TensorRow {
  readonly role: TensorRole;
  /** In a layer's rows, `{layer}` stands for its number. */
  readonly name: string;
  readonly shape: (config: DecoderConfig) => readonly number[];
  /** Whether the model has this tensor; always, when left out. */
  readonly when?: (config: DecoderConfig) => boolean;
}

/** The tensors of a family in the order of the forward pass. */
interface TensorTable {
  readonly before: readonly TensorRow[];
  readonly layer: readonly TensorRow[];
  readonly after: readonly TensorRow[];
}

const hidden = (c: DecoderConfig) => [c.hiddenSize];
const inner = (c: DecoderConfig) => [c.intermediateSize];
const queries = (c: DecoderConfig) => [c.heads * c.headDim];
const keys = (c: DecoderConfig) => [c.kvHeads * c.headDim];
const vocabulary = (c: DecoderConfig) => [c.vocabSize];
const matrix = (out: (c: DecoderConfig) => number[], input: (c: DecoderConfig) => number[]) => (c: DecoderConfig) => [
  ...out(c),
  ...input(c),
];

const LAYER = "model.layers.{layer}";

/** The names that Llama introduced and most of its descendants kept. */
const LLAMA_TENSORS: TensorTable = {
  before: [{ role: "embedding", name: "model.embed_tokens.weight", shape: matrix(vocabulary, hidden) }],
  layer: [
    { role: "attentionNorm", name: `${LAYER}.input_layernorm.weight`, shape: hidden },
    { role: "q", name: `${LAYER}.self_attn.q_proj.weight`, shape: matrix(queries, hidden) },
    { role: "qBias", name: `${LAYER}.self_attn.q_proj.bias`, shape: queries, when: (c) => c.qkvBias },
    { role: "k", name: `${LAYER}.self_attn.k_proj.weight`, shape: matrix(keys, hidden) },
    { role: "kBias", name: `${LAYER}.self_attn.k_proj.bias`, shape: keys, when: (c) => c.qkvBias },
    { role: "v", name: `${LAYER}.self_attn.v_proj.weight`, shape: matrix(keys, hidden) },
    { role: "vBias", name: `${LAYER}.self_attn.v_proj.bias`, shape: keys, when: (c) => c.qkvBias },
    { role: "o", name: `${LAYER}.self_attn.o_proj.weight`, shape: matrix(hidden, queries) },
    { role: "oBias", name: `${LAYER}.self_attn.o_proj.bias`, shape: hidden, when: (c) => c.oBias },
    { role: "mlpNorm", name: `${LAYER}.post_attention_layernorm.weight`, shape: hidden },
    { role: "gate", name: `${LAYER}.mlp.gate_proj.weight`, shape: matrix(inner, hidden) },
    { role: "gateBias", name: `${LAYER}.mlp.gate_proj.bias`, shape: inner, when: (c) => c.mlpBias },
    { role: "up", name: `${LAYER}.mlp.up_proj.weight`, shape: matrix(inner, hidden) },
    { role: "upBias", name: `${LAYER}.mlp.up_proj.bias`, shape: inner, when: (c) => c.mlpBias },
    { role: "down", name: `${LAYER}.mlp.down_proj.weight`, shape: matrix(hidden, inner) },
    { role: "downBias", name: `${LAYER}.mlp.down_proj.bias`, shape: hidden, when: (c) => c.mlpBias },
  ],
  after: [
    { role: "finalNorm", name: "model.norm.weight", shape: hidden },
    { role: "head", name: "lm_head.weight", shape: matrix(vocabulary, hidden), when: (c) => !c.tieEmbeddings },
  ],
};

/** Source of `absent`: the config classes of transformers (`models/<family>/configuration_<family>.py`, 4.57 and 5). */
const ARCHITECTURES = {
  LlamaForCausalLM: {
    qkvBias: { field: "attention_bias" },
    oBias: { field: "attention_bias" },
    mlpBias: { field: "mlp_bias" },
    absent: { num_key_value_heads: null, rope_theta: 10000, tie_word_embeddings: false, sliding_window: null },
    slidingSwitch: null,
    tensors: LLAMA_TENSORS,
  },
  MistralForCausalLM: {
    qkvBias: false,
    oBias: false,
    mlpBias: false,
    absent: { num_key_value_heads: 8, rope_theta: 10000, tie_word_embeddings: false, sliding_window: 4096 },
    slidingSwitch: null,
    tensors: LLAMA_TENSORS,
  },
  Qwen2ForCausalLM: {
    qkvBias: true,
    oBias: false,
    mlpBias: false,
    absent: { num_key_value_heads: 32, rope_theta: 10000, tie_word_embeddings: false, sliding_window: 4096 },
    slidingSwitch: "use_sliding_window",
    tensors: LLAMA_TENSORS,
  },
} as const satisfies Record<string, Architecture>;

export type ArchitectureName = keyof typeof ARCHITECTURES;

/** Hugging Face names of activations. */
const ACTIVATIONS: Readonly<Record<string, Activation>> = {
  silu: "silu",
  swish: "silu",
  gelu: "gelu",
  gelu_new: "gelu_tanh",
  gelu_pytorch_tanh: "gelu_tanh",
  relu: "relu",
};

/** Above any model there is, and small enough that no product of two leaves the safe integers. */
const MAX_SIZE = 2 ** 26 - 1;
const MAX_LAYERS = 4096;

/**
 * Reads a parsed Hugging Face `config.json`. Whatever would change the numbers and is not supported is refused by name,
 * before any weight is read.
 * @throws FewbitError `model/unsupported` (architecture, activation, rope scaling, sliding window, quantized checkpoint),
 *   `model/config` (a field that is missing, of the wrong type, or contradicts another)
 */
export function parseConfig(json: Readonly<Record<string, unknown>>): DecoderConfig {
  const architecture = architectureOf(json);
  const row: Architecture = ARCHITECTURES[architecture];
  const vocabSize = integer(json, "vocab_size");
  const hiddenSize = integer(json, "hidden_size");
  const heads = integer(json, "num_attention_heads");
  const kvHeads = optionalInteger(json, "num_key_value_heads", row.absent.num_key_value_heads) ?? heads;
  if (heads % kvHeads !== 0)
    throw invalid("num_key_value_heads", kvHeads, `a divisor of num_attention_heads = ${heads}`);
  const headDim = optionalInteger(json, "head_dim", null) ?? hiddenSize / heads;
  if (!Number.isInteger(headDim))
    throw invalid("hidden_size", hiddenSize, `a multiple of num_attention_heads = ${heads} when head_dim is absent`);
  if (headDim % 2 !== 0) throw invalid("head_dim", headDim, "an even number, for rotary pairs");
  const contextLength = integer(json, "max_position_embeddings");
  const slidingWindow = slidingWindowOf(json, row, contextLength);
  if (present(json.quantization_config))
    throw unsupported("quantization_config", quantMethod(json.quantization_config), ["an unquantized checkpoint"]);
  return {
    architecture,
    vocabSize,
    hiddenSize,
    intermediateSize: integer(json, "intermediate_size"),
    layers: integer(json, "num_hidden_layers", MAX_LAYERS),
    heads,
    kvHeads,
    headDim,
    contextLength,
    norm: { kind: "rmsnorm", eps: positive("rms_norm_eps", json.rms_norm_eps) },
    rope: ropeOf(json, row),
    ...(slidingWindow === null ? {} : { slidingWindow }),
    activation: activationOf(json),
    tieEmbeddings: boolean(json, "tie_word_embeddings", row.absent.tie_word_embeddings),
    qkvBias: flag(json, row.qkvBias),
    oBias: flag(json, row.oBias),
    mlpBias: flag(json, row.mlpBias),
    bosId: tokenIds(json, "bos_token_id", vocabSize)[0] ?? null,
    eosIds: tokenIds(json, "eos_token_id", vocabSize),
  };
}

/** Every tensor that a checkpoint of this model must hold, in the order of the forward pass. */
export function tensorSpecs(config: DecoderConfig): TensorSpec[] {
  const { before, layer, after }: TensorTable = ARCHITECTURES[config.architecture].tensors;
  const specs = (rows: readonly TensorRow[], number: number | null) =>
    rows
      .filter((row) => row.when?.(config) ?? true)
      .map(({ role, name, shape }) => ({
        role,
        layer: number,
        name: name.replace("{layer}", String(number)),
        shape: shape(config),
      }));
  const layers = Array.from({ length: config.layers }, (_, number) => specs(layer, number));
  return [...specs(before, null), ...layers.flat(), ...specs(after, null)];
}

function architectureOf(json: Readonly<Record<string, unknown>>): ArchitectureName {
  const names = json.architectures;
  const name = Array.isArray(names) && names.length === 1 ? names[0] : undefined;
  if (typeof name !== "string") throw invalid("architectures", names, "a list of one architecture name");
  if (!Object.hasOwn(ARCHITECTURES, name)) throw unsupported("architecture", name, Object.keys(ARCHITECTURES));
  return name as ArchitectureName;
}

/** transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`. */
function ropeOf(json: Readonly<Record<string, unknown>>, row: Architecture): DecoderConfig["rope"] {
  const field = present(json.rope_parameters) ? "rope_parameters" : "rope_scaling";
  const parameters = json[field] ?? {};
  if (typeof parameters !== "object" || Array.isArray(parameters))
    throw invalid(field, parameters, "an object or null");
  const { rope_theta, rope_type, type, partial_rotary_factor } = parameters as Readonly<Record<string, unknown>>;
  // A legacy rope_scaling object always scales; a rope_parameters object says "default" when it does not.
  const kind = rope_type ?? type ?? (present(json[field]) && field === "rope_scaling" ? "unnamed" : "default");
  if (kind !== "default" && kind !== "llama3") throw unsupported(`${field} type`, String(kind), ["default", "llama3"]);
  const rotated = partial_rotary_factor ?? json.partial_rotary_factor ?? 1;
  if (rotated !== 1) throw unsupported("partial_rotary_factor", String(rotated), ["1"]);
  const theta = rope_theta ?? json.rope_theta ?? row.absent.rope_theta;
  return { theta: positive("rope_theta", theta), scaling: kind === "llama3" ? llama3Scaling(field, parameters) : null };
}

function llama3Scaling(field: string, parameters: object): RopeScaling {
  const number = (name: string) =>
    positive(`${field}.${name}`, (parameters as Readonly<Record<string, unknown>>)[name]);
  return {
    kind: "llama3",
    factor: number("factor"),
    lowFrequency: number("low_freq_factor"),
    highFrequency: number("high_freq_factor"),
    originalContext: number("original_max_position_embeddings"),
  };
}

/** The window of every layer. One that reaches over the whole context changes nothing: null. */
function slidingWindowOf(
  json: Readonly<Record<string, unknown>>,
  row: Architecture,
  contextLength: number,
): number | null {
  const layerTypes = json.layer_types ?? [];
  if (!Array.isArray(layerTypes)) throw invalid("layer_types", layerTypes, "a list or null");
  const other = layerTypes.find((type) => type !== "full_attention");
  if (other !== undefined) throw unsupported("layer_types entry", String(other), ["full_attention"]);
  if (row.slidingSwitch !== null && !boolean(json, row.slidingSwitch, false)) return null;
  const window = json.sliding_window === undefined ? row.absent.sliding_window : json.sliding_window;
  if (window === null) return null;
  if (typeof window !== "number" || !Number.isInteger(window) || window < 1)
    throw invalid("sliding_window", window, "a positive integer or null");
  if (window >= contextLength) return null;
  // Where a switch turns windows on, only some layers have them.
  if (row.slidingSwitch !== null)
    throw unsupported("sliding_window", String(window), ["null", "a window of the whole context"]);
  return window;
}

function activationOf(json: Readonly<Record<string, unknown>>): Activation {
  const name = json.hidden_act;
  if (typeof name !== "string") throw invalid("hidden_act", name, "the name of an activation");
  const activation = Object.hasOwn(ACTIVATIONS, name) ? ACTIVATIONS[name] : undefined;
  if (!activation) throw unsupported("hidden_act", name, Object.keys(ACTIVATIONS));
  return activation;
}

function tokenIds(json: Readonly<Record<string, unknown>>, field: string, vocabSize: number): number[] {
  const value = json[field] ?? [];
  const ids: unknown[] = Array.isArray(value) ? value : [value];
  const legal = (id: unknown): id is number => Number.isInteger(id) && Number(id) >= 0 && Number(id) < vocabSize;
  if (!ids.every(legal)) throw invalid(field, value, `token ids below vocab_size = ${vocabSize}`);
  return ids;
}

function flag(json: Readonly<Record<string, unknown>>, from: Flag): boolean {
  return typeof from === "boolean" ? from : boolean(json, from.field, false);
}

function boolean(json: Readonly<Record<string, unknown>>, field: string, absent: boolean): boolean {
  const value = json[field] ?? absent;
  if (typeof value !== "boolean") throw invalid(field, value, "true or false");
  return value;
}

function integer(json: Readonly<Record<string, unknown>>, field: string, max = MAX_SIZE): number {
  const value = json[field];
  if (!Number.isInteger(value) || Number(value) < 1 || Number(value) > max)
    throw invalid(field, value, `an integer from 1 to ${max}`);
  return value as number;
}

/** null is what the file says, `absent` what it means when it says nothing. */
function optionalInteger(json: Readonly<Record<string, unknown>>, field: string, absent: number | null): number | null {
  if (json[field] === undefined) return absent;
  return json[field] === null ? null : integer(json, field);
}

function positive(field: string, value: unknown): number {
  if (typeof value !== "number" || !Number.isFinite(value) || value <= 0)
    throw invalid(field, value, "a positive number");
  return value;
}

function present(value: unknown): boolean {
  return value !== undefined && value !== null;
}

function quantMethod(config: unknown): string {
  const method = (config as { quant_method?: unknown }).quant_method;
  return typeof method === "string" ? method : "unnamed";
}

function invalid(field: string, value: unknown, expected: string): FewbitError {
  return new FewbitError("model/config", { field, value, expected });
}

function unsupported(what: string, value: string, supported: readonly string[]): FewbitError {
  return new FewbitError("model/unsupported", { what, value, supported });
}
