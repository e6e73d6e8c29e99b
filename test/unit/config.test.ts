import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { FewbitError } from "../../src/core/errors.js";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { openDirectory } from "../../src/io/source.js";
import { parseConfig, tensorSpecs } from "../../src/models/config.js";

type Json = Record<string, unknown>;
const tiny = JSON.parse(readFileSync("models/fewbit-tiny/config.json", "utf8")) as Json;
const llama = { ...tiny, tie_word_embeddings: false };
const mistral = { ...llama, architectures: ["MistralForCausalLM"], sliding_window: null };
const qwen2 = { ...llama, architectures: ["Qwen2ForCausalLM"], sliding_window: 64, use_sliding_window: false };

function failure(json: Json): FewbitError {
  try {
    parseConfig(json);
  } catch (error) {
    expect(error).toBeInstanceOf(FewbitError);
    return error as FewbitError;
  }
  throw new Error("the config was accepted");
}

const without = (field: string, json: Json = llama) =>
  Object.fromEntries(Object.entries(json).filter(([name]) => name !== field));
const names = (json: Json) => tensorSpecs(parseConfig(json)).map((spec) => spec.name);

describe("the decoder description", () => {
  test("of the bundled model is exactly its config.json", () => {
    expect(parseConfig(tiny)).toEqual({
      architecture: "LlamaForCausalLM",
      vocabSize: 2048,
      hiddenSize: 256,
      intermediateSize: 768,
      layers: 8,
      heads: 4,
      kvHeads: 2,
      headDim: 64,
      contextLength: 1024,
      norm: { kind: "rmsnorm", eps: 1e-5 },
      rope: { theta: 10000, scaling: null },
      activation: "silu",
      tieEmbeddings: true,
      qkvBias: false,
      oBias: false,
      mlpBias: false,
      bosId: 0,
      eosIds: [1],
    });
  });

  test("takes absent fields as the architecture's config class does", () => {
    const bare = (json: Json) =>
      ["num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias", "bos_token_id"]
        .concat(["eos_token_id", "tie_word_embeddings"])
        .reduce<Json>((rest, field) => without(field, rest), { ...json, num_attention_heads: 32 });
    const expected = {
      headDim: 8,
      rope: { theta: 10000, scaling: null },
      tieEmbeddings: false,
      bosId: null,
      eosIds: [],
    };
    expect(parseConfig(bare(llama))).toMatchObject({ ...expected, kvHeads: 32, qkvBias: false, mlpBias: false });
    expect(parseConfig(bare(mistral))).toMatchObject({ ...expected, kvHeads: 8 });
    expect(parseConfig(bare(qwen2))).toMatchObject({ ...expected, kvHeads: 32, qkvBias: true });
    expect(parseConfig({ ...bare(mistral), num_key_value_heads: null })).toMatchObject({ kvHeads: 32 });
  });

  test("takes biases from the architecture or from its fields", () => {
    const biases = (json: Json) => {
      const { qkvBias, oBias, mlpBias } = parseConfig(json);
      return [qkvBias, oBias, mlpBias];
    };
    expect(biases({ ...llama, attention_bias: true })).toEqual([true, true, false]);
    expect(biases({ ...llama, mlp_bias: true })).toEqual([false, false, true]);
    expect(biases({ ...mistral, attention_bias: true, mlp_bias: true })).toEqual([false, false, false]);
    expect(biases(qwen2)).toEqual([true, false, false]);
  });

  test("maps every activation name it knows", () => {
    const of = (name: string) => parseConfig({ ...llama, hidden_act: name }).activation;
    expect(["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"].map(of)).toEqual([
      "silu",
      "silu",
      "gelu",
      "gelu_tanh",
      "gelu_tanh",
      "relu",
    ]);
  });

  test("reads rope fields of transformers 4 and 5, and several end tokens", () => {
    const modern = { ...without("rope_theta"), rope_parameters: { rope_type: "default", rope_theta: 5e5 } };
    expect(parseConfig(modern).rope).toEqual({ theta: 5e5, scaling: null });
    expect(parseConfig({ ...llama, eos_token_id: [5, 7] }).eosIds).toEqual([5, 7]);
  });

  test("accepts a sliding window that is off, or covers the whole context", () => {
    for (const window of [null, 1024, 4096])
      expect(() => parseConfig({ ...mistral, sliding_window: window })).not.toThrow();
    expect(parseConfig(without("sliding_window", mistral)).slidingWindow).toBeUndefined();
    expect(() => parseConfig(qwen2)).not.toThrow();
  });

  test("takes a sliding window of every layer", () => {
    expect(parseConfig({ ...mistral, sliding_window: 64 }).slidingWindow).toBe(64);
    const long = { ...without("sliding_window", mistral), max_position_embeddings: 32768 };
    expect(parseConfig(long).slidingWindow).toBe(4096);
  });

  test("takes Llama 3.1's rope scaling", () => {
    const rope_scaling = {
      rope_type: "llama3",
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 8192,
    };
    const scaling = { kind: "llama3", factor: 8, lowFrequency: 1, highFrequency: 4, originalContext: 8192 };
    expect(parseConfig({ ...llama, rope_scaling }).rope.scaling).toEqual(scaling);
    expect(failure({ ...llama, rope_scaling: { rope_type: "llama3", factor: 8 } }).code).toBe("model/config");
  });
});

describe("what would change the numbers and is not supported is refused by name", () => {
  const cases: [what: string, json: Json, value: string][] = [
    ["architecture", { ...llama, architectures: ["GPT2LMHeadModel"] }, "GPT2LMHeadModel"],
    ["architecture", { ...llama, architectures: ["toString"] }, "toString"],
    ["hidden_act", { ...llama, hidden_act: "quick_gelu" }, "quick_gelu"],
    ["hidden_act", { ...llama, hidden_act: "constructor" }, "constructor"],
    ["rope_scaling type", { ...llama, rope_scaling: { rope_type: "longrope", factor: 8 } }, "longrope"],
    ["rope_scaling type", { ...llama, rope_scaling: { type: "linear", factor: 2 } }, "linear"],
    ["rope_scaling type", { ...llama, rope_scaling: { factor: 2 } }, "unnamed"],
    ["rope_parameters type", { ...llama, rope_parameters: { rope_type: "yarn", rope_theta: 1e4 } }, "yarn"],
    ["partial_rotary_factor", { ...llama, partial_rotary_factor: 0.5 }, "0.5"],
    ["sliding_window", { ...qwen2, use_sliding_window: true }, "64"],
    ["layer_types entry", { ...qwen2, layer_types: ["full_attention", "sliding_attention"] }, "sliding_attention"],
    ["quantization_config", { ...llama, quantization_config: { quant_method: "awq" } }, "awq"],
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

describe("the tensor table", () => {
  test("names exactly the tensors of the bundled checkpoint, with their shapes", async () => {
    await using checkpoint = await openCheckpoint(await openDirectory("models/fewbit-tiny"));
    const expected = tensorSpecs(parseConfig(tiny)).map(({ name, shape }) => [name, shape] as const);
    const found = [...checkpoint.tensors.values()].map(({ name, shape }) => [name, shape] as const);
    expect(new Map(expected)).toEqual(new Map(found));
    expect(expected.length).toBe(found.length);
  });

  test("has each role once for each layer, in the order of the forward pass", () => {
    const specs = tensorSpecs(parseConfig(llama));
    expect(specs[0]).toMatchObject({ role: "embedding", layer: null, shape: [2048, 256] });
    expect(specs.slice(-2)).toMatchObject([{ role: "finalNorm" }, { role: "head", shape: [2048, 256] }]);
    expect(specs.filter((spec) => spec.layer === 7).map((spec) => spec.role)).toEqual([
      "attentionNorm",
      "q",
      "k",
      "v",
      "o",
      "mlpNorm",
      "gate",
      "up",
      "down",
    ]);
    expect(new Set(specs.map((spec) => spec.name)).size).toBe(specs.length);
    expect(specs.length).toBe(1 + 8 * 9 + 2);
  });

  test("has biases where the architecture has them, and a head unless it is tied", () => {
    const biases = (json: Json) => names(json).filter((name) => name.endsWith(".bias") && name.includes("layers.3."));
    const suffixes = (json: Json) => biases(json).map((name) => name.split(".").at(-2));
    expect(suffixes(qwen2)).toEqual(["q_proj", "k_proj", "v_proj"]);
    expect(suffixes({ ...llama, attention_bias: true, mlp_bias: true })).toEqual([
      "q_proj",
      "k_proj",
      "v_proj",
      "o_proj",
      "gate_proj",
      "up_proj",
      "down_proj",
    ]);
    expect(suffixes(mistral)).toEqual([]);
    expect(names(llama)).toContain("lm_head.weight");
    expect(names(tiny)).not.toContain("lm_head.weight");
  });

  test("separates query from key and value widths", () => {
    const specs = tensorSpecs(parseConfig({ ...qwen2, head_dim: 32 }));
    const shape = (role: string) => specs.find((spec) => spec.role === role)?.shape;
    expect([shape("q"), shape("k"), shape("v"), shape("o")]).toEqual([
      [128, 256],
      [64, 256],
      [64, 256],
      [256, 128],
    ]);
    expect([shape("qBias"), shape("kBias"), shape("down")]).toEqual([[128], [64], [256, 768]]);
  });
});
