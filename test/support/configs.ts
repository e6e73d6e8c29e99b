import { readFileSync } from "node:fs";
import type { FewbitError } from "../../src/core/errors.js";
import { parseConfig } from "../../src/models/config.js";
import { thrown } from "./failure.js";

/** An object of config.json; those below are of every architecture, with the sizes of the bundled model. */
export type Json = Record<string, unknown>;
export const tiny = JSON.parse(readFileSync("models/fewbit-tiny/config.json", "utf8")) as Json;
export const llama = { ...tiny, tie_word_embeddings: false };
export const mistral = { ...llama, architectures: ["MistralForCausalLM"], sliding_window: null };
export const gemma2 = {
  ...tiny,
  ...{ architectures: ["Gemma2ForCausalLM"], hidden_activation: "gelu_pytorch_tanh", sliding_window: 64 },
  ...{ query_pre_attn_scalar: 144, attn_logit_softcapping: 50, final_logit_softcapping: 30 },
};
export const gemma3 = {
  ...gemma2,
  architectures: ["Gemma3ForCausalLM"],
  attn_logit_softcapping: null,
  rope_theta: undefined,
};
export const gpt2 = {
  ...{ architectures: ["GPT2LMHeadModel"], vocab_size: 64, n_embd: 64, n_layer: 2, n_head: 4, n_positions: 32 },
  ...{ layer_norm_epsilon: 1e-5, activation_function: "gelu_new" },
};
export const qwenMoe = {
  ...tiny,
  ...{ architectures: ["Qwen3MoeForCausalLM"], num_experts: 5, num_experts_per_tok: 2, moe_intermediate_size: 32 },
  ...{ norm_topk_prob: true, decoder_sparse_step: 2, mlp_only_layers: [3] },
};
export const qwen2 = { ...llama, architectures: ["Qwen2ForCausalLM"], sliding_window: 64, use_sliding_window: false };

/** What a config is refused with. */
export const failure = (json: Json): FewbitError => thrown(() => parseConfig(json));

export const without = (field: string, json: Json = llama) =>
  Object.fromEntries(Object.entries(json).filter(([name]) => name !== field));
