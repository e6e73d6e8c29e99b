import { FewbitError } from "../core/errors.js";
import type { GgufHeader } from "./gguf.js";

/*
 * The architectures of GGUF files as Hugging Face's. Source: the tensor names and keys of the gguf package, and what llama.cpp's
 * converter and loader do with them.
 */

export type Metadata = GgufHeader["metadata"];

/** A tensor's name in GGUF and in Hugging Face's checkpoints; `{expert}` numbers the matrices of a stack. */
export type NameRule = readonly [gguf: RegExp, huggingFace: string];

/** The keys of an architecture, and shapes of tensors by Hugging Face's names. */
export interface GgufFields {
  /** Throws `io/malformed` when it is missing. */
  number(key: string): number;
  optional(key: string): number | undefined;
  boolean(key: string): boolean | undefined;
  rowsOf(tensor: string): number | undefined;
}

/** An architecture of GGUF that is one of Hugging Face's. */
export interface GgufArchitecture {
  readonly huggingFace: string;
  /** Whether rows of q and k are stored in pairs of neighbours, for rotary embeddings that turn those. */
  readonly pairedRope: boolean;
  /** What the converter adds to the weights of norms. */
  readonly normOffset: 0 | 1;
  /** Names that are not those of `NAMES`. */
  readonly names: readonly NameRule[];
  /** Fields of config.json that are not those of every architecture. */
  readonly fields: (read: GgufFields) => Readonly<Record<string, unknown>>;
}

/** Tensors outside the layers, and those of a layer. */
const NAMES: readonly NameRule[] = [
  [/^token_embd\.weight$/, "model.embed_tokens.weight"],
  [/^output_norm\.weight$/, "model.norm.weight"],
  [/^output\.weight$/, "lm_head.weight"],
  [/^blk\.(\d+)\.attn_norm\.weight$/, "model.layers.$1.input_layernorm.weight"],
  [/^blk\.(\d+)\.attn_([qkv])\.(weight|bias)$/, "model.layers.$1.self_attn.$2_proj.$3"],
  [/^blk\.(\d+)\.attn_output\.(weight|bias)$/, "model.layers.$1.self_attn.o_proj.$2"],
  [/^blk\.(\d+)\.attn_([qk])_norm\.weight$/, "model.layers.$1.self_attn.$2_norm.weight"],
  [/^blk\.(\d+)\.ffn_norm\.weight$/, "model.layers.$1.post_attention_layernorm.weight"],
  [/^blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)$/, "model.layers.$1.mlp.$2_proj.$3"],
];
const GEMMA_NAMES: readonly NameRule[] = [
  [/^blk\.(\d+)\.post_attention_norm\.weight$/, "model.layers.$1.post_attention_layernorm.weight"],
  [/^blk\.(\d+)\.ffn_norm\.weight$/, "model.layers.$1.pre_feedforward_layernorm.weight"],
  [/^blk\.(\d+)\.post_ffw_norm\.weight$/, "model.layers.$1.post_feedforward_layernorm.weight"],
];
/** Old files have a tensor for every expert. */
const MIXTRAL_NAMES: readonly NameRule[] = [
  [/^blk\.(\d+)\.ffn_gate_inp\.weight$/, "model.layers.$1.block_sparse_moe.gate.weight"],
  ...(["gate w1", "up w3", "down w2"] as const).flatMap((pair): NameRule[] => {
    const [gguf, huggingFace] = pair.split(" ");
    const base = "model.layers.$1.block_sparse_moe.experts";
    return [
      [new RegExp(`^blk\\.(\\d+)\\.ffn_${gguf}_exps\\.weight$`), `${base}.{expert}.${huggingFace}.weight`],
      [new RegExp(`^blk\\.(\\d+)\\.ffn_${gguf}\\.(\\d+)\\.weight$`), `${base}.$2.${huggingFace}.weight`],
    ];
  }),
];
const QWEN_MOE_NAMES: readonly NameRule[] = [
  [/^blk\.(\d+)\.ffn_gate_inp\.weight$/, "model.layers.$1.mlp.gate.weight"],
  [/^blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight$/, "model.layers.$1.mlp.experts.{expert}.$2_proj.weight"],
  [/^blk\.(\d+)\.ffn_gate_inp_shexp\.weight$/, "model.layers.$1.mlp.shared_expert_gate.weight"],
  [/^blk\.(\d+)\.ffn_(gate|up|down)_shexp\.weight$/, "model.layers.$1.mlp.shared_expert.$2_proj.weight"],
];

const PLAIN = { pairedRope: false, normOffset: 0, names: NAMES } as const;
const SILU = { hidden_act: "silu" };

/** A soft-cap of 0 is none. */
const softcaps = ({ optional }: GgufFields) => ({
  attn_logit_softcapping: optional("attn_logit_softcapping") || null,
  final_logit_softcapping: optional("final_logit_softcapping") || null,
});
/** Files do not say how queries are scaled; the largest model of a family (told by its layers) has no heads of hidden / heads. */
const gemma = (read: GgufFields, largest: number) => {
  const ofWidth = read.number("block_count") === largest;
  const width = Math.floor(read.number("embedding_length") / read.number("attention.head_count"));
  return {
    hidden_activation: "gelu_pytorch_tanh",
    query_pre_attn_scalar: ofWidth ? width : (read.optional("attention.key_length") ?? width),
    ...softcaps(read),
  };
};
const qwenMoe = (read: GgufFields, normalize: boolean) => {
  const size = (tensor: string) => read.rowsOf(`model.layers.0.mlp.${tensor}.gate_proj.weight`);
  const shared = size("shared_expert");
  return {
    ...SILU,
    num_experts: read.number("expert_count"),
    num_experts_per_tok: read.number("expert_used_count"),
    moe_intermediate_size: size("experts.0"),
    ...(shared === undefined ? {} : { shared_expert_intermediate_size: shared }),
    norm_topk_prob: read.boolean("expert_weights_norm") ?? normalize,
  };
};

const ARCHITECTURES: Readonly<Record<string, GgufArchitecture>> = {
  // Mistral's files say llama too, and differ in nothing that is stored.
  llama: {
    ...PLAIN,
    huggingFace: "LlamaForCausalLM",
    pairedRope: true,
    fields: () => ({ ...SILU, attention_bias: false, mlp_bias: false }),
  },
  "llama with experts": {
    ...PLAIN,
    huggingFace: "MixtralForCausalLM",
    pairedRope: true,
    names: [...MIXTRAL_NAMES, ...NAMES],
    fields: ({ number }) => ({
      ...SILU,
      num_local_experts: number("expert_count"),
      num_experts_per_tok: number("expert_used_count"),
    }),
  },
  qwen2: { ...PLAIN, huggingFace: "Qwen2ForCausalLM", fields: () => SILU },
  qwen3: { ...PLAIN, huggingFace: "Qwen3ForCausalLM", fields: () => ({ ...SILU, attention_bias: false }) },
  "qwen2moe with experts": {
    ...PLAIN,
    huggingFace: "Qwen2MoeForCausalLM",
    names: [...QWEN_MOE_NAMES, ...NAMES],
    fields: (read) => qwenMoe(read, false),
  },
  "qwen3moe with experts": {
    ...PLAIN,
    huggingFace: "Qwen3MoeForCausalLM",
    names: [...QWEN_MOE_NAMES, ...NAMES],
    fields: (read) => ({ ...qwenMoe(read, true), attention_bias: false }),
  },
  gemma2: {
    ...PLAIN,
    huggingFace: "Gemma2ForCausalLM",
    normOffset: 1,
    names: [...GEMMA_NAMES, ...NAMES],
    fields: (read) => gemma(read, 46),
  },
  gemma3: {
    ...PLAIN,
    huggingFace: "Gemma3ForCausalLM",
    normOffset: 1,
    names: [...GEMMA_NAMES, ...NAMES],
    fields: (read) => ({
      ...gemma(read, 62),
      sliding_window_pattern: read.optional("attention.sliding_window_pattern") ?? 6,
      rope_local_base_freq: read.optional("rope.freq_base_swa") ?? 10000,
      // Without a window all layers are alike, in their rotation too.
      ...(read.optional("attention.sliding_window") === undefined
        ? { layer_types: Array.from({ length: read.number("block_count") }, () => "full_attention") }
        : {}),
    }),
  },
};

/** The architecture of a file. Throws `model/unsupported` for one without a row. */
export function ggufArchitecture(metadata: Metadata): GgufArchitecture & { readonly name: string } {
  const name = String(metadata.get("general.architecture"));
  const experts = Number(metadata.get(`${name}.expert_count`) ?? 0);
  const key = experts > 0 ? `${name} with experts` : name;
  const found = Object.hasOwn(ARCHITECTURES, key) ? ARCHITECTURES[key] : undefined;
  if (found !== undefined) return { name, ...found };
  throw new FewbitError("model/unsupported", {
    what: "GGUF architecture",
    value: key,
    supported: Object.keys(ARCHITECTURES),
  });
}
