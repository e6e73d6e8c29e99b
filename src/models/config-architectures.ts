import type { Activation } from "./config.js";
import { type Fields, invalid } from "./config-fields.js";
import type { RopeRules } from "./config-rope.js";
import type { TENSORS } from "./config-tensors.js";

/** A constant of the architecture, or the boolean field of config.json that says it. */
type Flag = boolean | { readonly field: string; readonly absent: boolean };

/** One supported architecture. Adding one means adding a row, and the names of its tensors where they are new. */
export interface Architecture {
  readonly tensors: keyof typeof TENSORS;
  /** Names of config.json's fields where they are not Llama's. */
  readonly names?: Readonly<Record<string, string>>;
  /** `offset`: what is added to stored weights. */
  readonly norm: { readonly kind: "rmsnorm" | "layernorm"; readonly offset: 0 | 1 };
  readonly qkvBias: Flag;
  readonly oBias: Flag;
  readonly mlpBias: Flag;
  /** What the architecture's Hugging Face config class assumes when config.json leaves a field out. */
  readonly absent: {
    /** null: as many as num_attention_heads. */
    readonly num_key_value_heads: number | null;
    /** null: hidden_size / num_attention_heads. */
    readonly head_dim: number | null;
    readonly hidden_act?: string;
    readonly tie_word_embeddings: boolean;
    readonly sliding_window: number | null;
  };
  /** null where positions are learned. */
  readonly rope: RopeRules | null;
  /** Which layers rotate queries and keys; all of them, when left out. */
  readonly rotates?: (fields: Fields, layer: number) => boolean;
  readonly windows: WindowRules | null;
  /** 1 / sqrt(`query_pre_attn_scalar`) in the place of 1 / sqrt(head_dim); this number when it is left out. */
  readonly queryScalar?: number;
  /** Whether `attn_logit_softcapping` and `final_logit_softcapping` count. */
  readonly softcaps?: { readonly attention: boolean; readonly logits: boolean };
  /** Embeddings are multiplied by sqrt(hidden_size). */
  readonly scaledEmbedding?: boolean;
  readonly experts?: ExpertRules;
  /** Fields with the only value that is supported, beside those of `NEUTRAL`. */
  readonly only?: Readonly<Record<string, unknown>>;
}

interface WindowRules {
  /** The field that must be true for windows to count. */
  readonly switch: string | null;
  /** Which layers have one when there are no `layer_types`. */
  readonly slides: (fields: Fields, layer: number) => boolean;
  /** Whether `layer_types` says it. */
  readonly typed: boolean;
}

interface ExpertRules {
  /** Fields of the number of experts: the first that the file has counts. */
  readonly count: readonly string[];
  readonly intermediate: string;
  readonly shared: string | null;
  readonly normalize: Flag;
  readonly sparse: (fields: Fields, layer: number) => boolean;
}

const every = () => true;
const field = (name: string, absent = false): Flag => ({ field: name, absent });
const number = (fields: Fields, name: string, absent: number) => fields.optionalInteger(name, absent) ?? absent;

const LLAMA: Architecture = {
  tensors: "llama",
  norm: { kind: "rmsnorm", offset: 0 },
  qkvBias: field("attention_bias"),
  oBias: field("attention_bias"),
  mlpBias: field("mlp_bias"),
  absent: { num_key_value_heads: null, head_dim: null, tie_word_embeddings: false, sliding_window: null },
  rope: { theta: 10000 },
  windows: null,
};
const UNBIASED = { qkvBias: false, oBias: false, mlpBias: false } as const;

/** Layers from max_window_layers on have a window. */
const QWEN_WINDOWS: WindowRules = {
  switch: "use_sliding_window",
  slides: (fields, layer) => layer >= number(fields, "max_window_layers", 28),
  typed: true,
};

const QWEN_EXPERTS: ExpertRules = {
  count: ["num_experts", "num_local_experts"],
  intermediate: "moe_intermediate_size",
  shared: null,
  normalize: field("norm_topk_prob"),
  sparse: (fields, layer) => {
    const only = fields.list("mlp_only_layers") ?? [];
    return !only.includes(layer) && (layer + 1) % number(fields, "decoder_sparse_step", 1) === 0;
  },
};

const GEMMA: Architecture = {
  ...LLAMA,
  tensors: "gemma2",
  names: { hidden_act: "hidden_activation" },
  norm: { kind: "rmsnorm", offset: 1 },
  mlpBias: false,
  absent: {
    ...{ num_key_value_heads: 4, head_dim: 256, tie_word_embeddings: true, sliding_window: 4096 },
    hidden_act: "gelu_pytorch_tanh",
  },
  windows: { switch: null, slides: (_, layer) => layer % 2 === 0, typed: true },
  queryScalar: 256,
  softcaps: { attention: true, logits: true },
  scaledEmbedding: true,
  only: { use_bidirectional_attention: false },
};

/** Layers that SmolLM3 leaves without rotation: a 0 in `no_rope_layers`, or every fourth. */
const rotated = (fields: Fields, layer: number): boolean => {
  const listed = fields.list("no_rope_layers");
  if (listed === null) return (layer + 1) % number(fields, "no_rope_layer_interval", 4) !== 0;
  const value = listed[layer];
  if (value !== 0 && value !== 1) throw invalid("no_rope_layers", listed, "a 0 or 1 for each layer");
  return value === 1;
};

/** THE ARCHITECTURES. Source of `absent` and of rules: the config classes of transformers (4.57 and 5.18). */
export const ARCHITECTURES = {
  LlamaForCausalLM: LLAMA,
  MistralForCausalLM: {
    ...LLAMA,
    ...UNBIASED,
    absent: { ...LLAMA.absent, num_key_value_heads: 8, sliding_window: 4096 },
    windows: { switch: null, slides: every, typed: false },
  },
  Qwen2ForCausalLM: {
    ...LLAMA,
    ...UNBIASED,
    qkvBias: true,
    absent: { ...LLAMA.absent, num_key_value_heads: 32, sliding_window: 4096 },
    windows: QWEN_WINDOWS,
  },
  Qwen3ForCausalLM: {
    ...LLAMA,
    tensors: "qwen3",
    mlpBias: false,
    absent: { ...LLAMA.absent, num_key_value_heads: 32, head_dim: 128, sliding_window: 4096 },
    windows: QWEN_WINDOWS,
  },
  Gemma2ForCausalLM: GEMMA,
  Gemma3ForCausalLM: {
    ...GEMMA,
    tensors: "gemma3",
    rope: { theta: 1e6, localTheta: 10000 },
    windows: {
      switch: null,
      slides: (fields, layer) => (layer + 1) % number(fields, "sliding_window_pattern", 6) !== 0,
      typed: true,
    },
    softcaps: { attention: false, logits: true },
    only: { use_bidirectional_attention: false, attn_logit_softcapping: null },
  },
  Phi3ForCausalLM: {
    ...LLAMA,
    ...UNBIASED,
    tensors: "phi3",
    // Early files call LongRoPE by these names.
    rope: { theta: 10000, renamed: { su: "longrope", yarn: "longrope" }, originalContext: 4096 },
    windows: { switch: null, slides: every, typed: false },
  },
  SmolLM3ForCausalLM: {
    ...LLAMA,
    absent: { ...LLAMA.absent, num_key_value_heads: 4, tie_word_embeddings: true },
    rope: { theta: 2e6 },
    rotates: rotated,
    windows: { switch: "use_sliding_window", slides: (fields, layer) => !rotated(fields, layer), typed: true },
  },
  Olmo2ForCausalLM: { ...LLAMA, tensors: "olmo2", mlpBias: false },
  GPT2LMHeadModel: {
    ...LLAMA,
    tensors: "gpt2",
    names: {
      hidden_size: "n_embd",
      num_hidden_layers: "n_layer",
      num_attention_heads: "n_head",
      max_position_embeddings: "n_positions",
      intermediate_size: "n_inner",
      rms_norm_eps: "layer_norm_epsilon",
      hidden_act: "activation_function",
    },
    norm: { kind: "layernorm", offset: 0 },
    qkvBias: true,
    oBias: true,
    mlpBias: true,
    absent: { ...LLAMA.absent, tie_word_embeddings: true },
    rope: null,
    only: { scale_attn_weights: true, scale_attn_by_inverse_layer_idx: false, add_cross_attention: false },
  },
  MixtralForCausalLM: {
    ...LLAMA,
    ...UNBIASED,
    tensors: "mixtral",
    absent: { ...LLAMA.absent, num_key_value_heads: 8 },
    rope: { theta: 1e6 },
    windows: { switch: null, slides: every, typed: false },
    experts: {
      count: ["num_local_experts", "num_experts"],
      intermediate: "intermediate_size",
      shared: null,
      normalize: true,
      sparse: every,
    },
  },
  Qwen2MoeForCausalLM: {
    ...LLAMA,
    ...UNBIASED,
    tensors: "qwen2Moe",
    qkvBias: field("qkv_bias", true),
    absent: { ...LLAMA.absent, num_key_value_heads: 16, sliding_window: 4096 },
    windows: {
      switch: "use_sliding_window",
      slides: (fields, layer) => layer % 2 === 0 && layer < number(fields, "max_window_layers", 28),
      typed: true,
    },
    experts: { ...QWEN_EXPERTS, shared: "shared_expert_intermediate_size" },
  },
  Qwen3MoeForCausalLM: {
    ...LLAMA,
    tensors: "qwen3Moe",
    mlpBias: false,
    absent: { ...LLAMA.absent, num_key_value_heads: 4, sliding_window: 4096 },
    windows: { switch: "use_sliding_window", slides: every, typed: false },
    experts: QWEN_EXPERTS,
  },
} as const satisfies Record<string, Architecture>;

export type ArchitectureName = keyof typeof ARCHITECTURES;

/**
 * Fields of other models' config.json that change the numbers, with the value that changes nothing. Any other value is refused
 * by name, so that a model that merely calls itself by a known architecture is not run as something that it is not.
 */
export const NEUTRAL: Readonly<Record<string, unknown>> = {
  attention_multiplier: undefined,
  attn_logit_softcapping: null,
  clip_qkv: null,
  embedding_multiplier: 1,
  final_logit_softcapping: null,
  is_encoder_decoder: false,
  logit_scale: 1,
  logits_scaling: 1,
  mlp_multiplier: 1,
  parallel_attn: false,
  residual_multiplier: 1,
  scale_depth: undefined,
  scale_emb: 1,
  use_parallel_residual: false,
  use_qk_norm: false,
};

/** Hugging Face names of activations. */
export const ACTIVATIONS: Readonly<Record<string, Activation>> = {
  silu: "silu",
  swish: "silu",
  gelu: "gelu",
  gelu_new: "gelu_tanh",
  gelu_pytorch_tanh: "gelu_tanh",
  relu: "relu",
};
