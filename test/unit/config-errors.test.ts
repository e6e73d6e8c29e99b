import { describe, expect, test } from "vitest";
import { failure, gemma2, gemma3, gpt2, type Json, llama, mistral, qwen2, without } from "../support/configs.js";

describe("what would change the numbers and is not supported is refused by name", () => {
  const cases: [what: string, json: Json, value: string][] = [
    ["architecture", { ...llama, architectures: ["FalconForCausalLM"] }, "FalconForCausalLM"],
    ["architecture", { ...llama, architectures: ["Gemma3ForConditionalGeneration"] }, "Gemma3ForConditionalGeneration"],
    ["architecture", { ...llama, architectures: ["toString"] }, "toString"],
    ["hidden_act", { ...llama, hidden_act: "quick_gelu" }, "quick_gelu"],
    ["hidden_act", { ...llama, hidden_act: "constructor" }, "constructor"],
    ["rope_scaling type", { ...llama, rope_scaling: { rope_type: "axial", factor: 8 } }, "axial"],
    ["rope_scaling type", { ...llama, rope_scaling: { factor: 2 } }, "unnamed"],
    ["rope_parameters type", { ...llama, rope_parameters: { rope_type: "proportional" } }, "proportional"],
    ["layer_types entry", { ...qwen2, layer_types: ["full_attention", "chunked_attention"] }, "chunked_attention"],
    ["layer_types entry", { ...llama, layer_types: ["sliding_attention"] }, "sliding_attention"],
    ["hidden_activation", { ...gemma2, hidden_activation: "quick_gelu" }, "quick_gelu"],
    ["attn_logit_softcapping", { ...llama, attn_logit_softcapping: 50 }, "50"],
    ["attn_logit_softcapping", { ...gemma3, attn_logit_softcapping: 50 }, "50"],
    ["use_bidirectional_attention", { ...gemma3, use_bidirectional_attention: true }, "true"],
    ["residual_multiplier", { ...llama, residual_multiplier: 0.22 }, "0.22"],
    ["logits_scaling", { ...llama, logits_scaling: 8 }, "8"],
    ["clip_qkv", { ...llama, clip_qkv: 8 }, "8"],
    ["scale_attn_by_inverse_layer_idx", { ...gpt2, scale_attn_by_inverse_layer_idx: true }, "true"],
    ["is_encoder_decoder", { ...llama, is_encoder_decoder: true }, "true"],
    ["quantization_config", { ...llama, quantization_config: { quant_method: "modelopt" } }, "modelopt"],
  ];
  for (const [what, json, value] of cases)
    test(`${what} ${value}`, () => {
      expect(failure(json)).toMatchObject({ code: "model/unsupported", context: { what, value } });
    });
});

describe("a field that is wrong is named", () => {
  const cases: [field: string, json: Json][] = [
    ...["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
      .concat(["max_position_embeddings"])
      .flatMap((field) =>
        [undefined, null, 0, -1, 1.5, "8", 1e12, Number.NaN].map((value): [string, Json] => [
          field,
          { ...llama, [field]: value },
        ]),
      ),
    ...["rms_norm_eps", "rope_theta"].flatMap((field) =>
      [0, -1, "1", Number.POSITIVE_INFINITY].map((value): [string, Json] => [field, { ...llama, [field]: value }]),
    ),
    ["rms_norm_eps", without("rms_norm_eps")],
    ["architectures", without("architectures")],
    ["architectures", { ...llama, architectures: [] }],
    ["architectures", { ...llama, architectures: ["LlamaForCausalLM", "MistralForCausalLM"] }],
    ["num_hidden_layers", { ...llama, num_hidden_layers: 5000 }],
    ["num_key_value_heads", { ...llama, num_key_value_heads: 3 }],
    ["num_key_value_heads", { ...llama, num_key_value_heads: 0 }],
    ["head_dim", { ...llama, head_dim: 63 }],
    ["head_dim", { ...llama, head_dim: "64" }],
    ["hidden_size", { ...without("head_dim"), hidden_size: 254 }],
    ["hidden_act", without("hidden_act")],
    ["tie_word_embeddings", { ...llama, tie_word_embeddings: 1 }],
    ["attention_bias", { ...llama, attention_bias: "no" }],
    ["bos_token_id", { ...llama, bos_token_id: 2048 }],
    ["eos_token_id", { ...llama, eos_token_id: [1, -1] }],
    ["eos_token_id", { ...llama, eos_token_id: "</s>" }],
    ["rope_scaling", { ...llama, rope_scaling: "linear" }],
    ["sliding_window", { ...mistral, sliding_window: "no" }],
    ["layer_types", { ...llama, layer_types: "full_attention" }],
  ];
  for (const [field, json] of cases)
    test(`${field} = ${JSON.stringify(json[field])}`, () => {
      const error = failure(json);
      expect(error).toMatchObject({ code: "model/config", context: { field } });
      expect(error.message).toContain(`config.json: ${field} is `);
    });
});
