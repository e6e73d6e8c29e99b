import { describe, expect, test } from "vitest";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { openDirectory } from "../../src/io/source.js";
import { parseConfig, tensorSpecs } from "../../src/models/config.js";
import {
  failure,
  gemma2,
  gemma3,
  gpt2,
  type Json,
  llama,
  mistral,
  qwen2,
  qwenMoe,
  tiny,
  without,
} from "../support/configs.js";

const windows = (json: Json) => parseConfig(json).layerConfigs.map(({ window }) => window);
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
      layerConfigs: Array.from({ length: 8 }, () => ({ window: null, rope: 0, sparse: false })),
      norm: { kind: "rmsnorm", eps: 1e-5, offset: 0 },
      ropes: [{ theta: 10000, rotary: 64, scaling: null }],
      attention: { scale: 1 / 8, softcap: null },
      embeddingScale: 1,
      logitSoftcap: null,
      activation: "silu",
      experts: null,
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
      ropes: [{ theta: 10000, rotary: 8, scaling: null }],
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
    expect(parseConfig(modern).ropes).toEqual([{ theta: 5e5, rotary: 64, scaling: null }]);
    expect(parseConfig({ ...llama, eos_token_id: [5, 7] }).eosIds).toEqual([5, 7]);
  });

  test("accepts a sliding window that is off, or covers the whole context", () => {
    for (const window of [null, 1024, 4096])
      expect(() => parseConfig({ ...mistral, sliding_window: window })).not.toThrow();
    expect(windows(without("sliding_window", mistral))).toEqual(Array(8).fill(null));
    expect(windows(qwen2)).toEqual(Array(8).fill(null));
    // Llama has no windows, whatever its file says.
    expect(windows({ ...llama, sliding_window: 64 })).toEqual(Array(8).fill(null));
  });

  test("takes a sliding window of every layer", () => {
    expect(windows({ ...mistral, sliding_window: 64 })).toEqual(Array(8).fill(64));
    const long = { ...without("sliding_window", mistral), max_position_embeddings: 32768 };
    expect(windows(long)).toEqual(Array(8).fill(4096));
  });

  test("takes a sliding window of some layers, by their types or by the architecture's rule", () => {
    const on = { ...qwen2, use_sliding_window: true };
    expect(windows({ ...on, max_window_layers: 6 })).toEqual([...Array(6).fill(null), 64, 64]);
    expect(windows(on)).toEqual(Array(8).fill(null));
    const types = [1, 0, 1, 1, 0, 0, 0, 1].map((sliding) => (sliding ? "sliding_attention" : "full_attention"));
    expect(windows({ ...on, layer_types: types })).toEqual([64, null, 64, 64, null, null, null, 64]);
    expect(windows(gemma2)).toEqual([64, null, 64, null, 64, null, 64, null]);
    expect(windows(gemma3)).toEqual([64, 64, 64, 64, 64, null, 64, 64]);
    const shared = { architectures: ["Qwen2MoeForCausalLM"], shared_expert_intermediate_size: 48 };
    const moe = { ...qwenMoe, use_sliding_window: true, sliding_window: 64, max_window_layers: 4 };
    expect(windows({ ...moe, ...shared })).toEqual([64, null, 64, null, null, null, null, null]);
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
    expect(parseConfig({ ...llama, rope_scaling }).ropes[0]?.scaling).toEqual(scaling);
    expect(failure({ ...llama, rope_scaling: { rope_type: "llama3", factor: 8 } }).code).toBe("model/config");
  });
});

describe("rope scaling", () => {
  const scaled = (rope_scaling: Json, more: Json = {}) => {
    const { ropes, contextLength } = parseConfig({ ...llama, ...more, rope_scaling });
    return { ...ropes[0]?.scaling, contextLength };
  };

  test("linear divides positions and leaves the context as it is stated", () => {
    expect(scaled({ type: "linear", factor: 4 })).toEqual({ kind: "linear", factor: 4, contextLength: 1024 });
  });

  test("dynamic and yarn reach beyond the context before scaling", () => {
    const dynamic = { kind: "dynamic", factor: 4, originalContext: 1024, contextLength: 4096 };
    expect(scaled({ type: "dynamic", factor: 4 })).toEqual(dynamic);
    const yarn = {
      ...{ kind: "yarn", factor: 4, originalContext: 1024, betaFast: 32, betaSlow: 1, truncate: true },
      ...{ magnitude: 0.1 * Math.log(4) + 1, contextLength: 4096 },
    };
    expect(scaled({ type: "yarn", factor: 4 })).toEqual(yarn);
    const stated = { rope_type: "yarn", factor: 4, original_max_position_embeddings: 256 };
    expect(scaled(stated)).toMatchObject({ originalContext: 256, contextLength: 1024 });
    expect(scaled({ ...stated, attention_factor: 2, truncate: false })).toMatchObject({
      magnitude: 2,
      truncate: false,
    });
    expect(scaled({ ...stated, mscale: 0.5, mscale_all_dim: 0.5 })).toMatchObject({ magnitude: 1 });
  });

  test("longrope has a divisor a pair, by the names that Phi-3 used before", () => {
    const [short_factor, long_factor] = [1, 2].map((factor) => Array.from({ length: 32 }, (_, i) => factor + i));
    const rope_scaling = { type: "su", short_factor, long_factor };
    const phi = { architectures: ["Phi3ForCausalLM"], original_max_position_embeddings: 256 };
    const magnitude = Math.sqrt(1 + Math.log(4) / Math.log(256));
    const expected = { kind: "longrope", short: short_factor, long: long_factor, originalContext: 256, magnitude };
    expect(scaled(rope_scaling, phi)).toEqual({ ...expected, contextLength: 1024 });
    expect(failure({ ...llama, ...phi, rope_scaling: { ...rope_scaling, long_factor: [1] } })).toMatchObject({
      code: "model/config",
      context: { field: "rope_scaling.long_factor" },
    });
  });

  test("rotates a part of each head", () => {
    expect(parseConfig({ ...llama, partial_rotary_factor: 0.75 }).ropes[0]?.rotary).toBe(48);
    const modern = { ...llama, rope_parameters: { rope_type: "default", rope_theta: 1e4, partial_rotary_factor: 0.5 } };
    expect(parseConfig(modern).ropes[0]?.rotary).toBe(32);
  });

  test("of layers with a window is apart in Gemma 3, in either way of writing it", () => {
    const rope_scaling = { rope_type: "linear", factor: 8 };
    const thetas = { rope_theta: 1e6, rope_local_base_freq: 500 };
    const expected = [
      { theta: 1e6, rotary: 64, scaling: { kind: "linear", factor: 8 } },
      { theta: 500, rotary: 64, scaling: null },
    ];
    const old = parseConfig({ ...gemma3, ...thetas, rope_scaling });
    expect(old.ropes).toEqual(expected);
    expect(old.layerConfigs.map(({ rope }) => rope)).toEqual([1, 1, 1, 1, 1, 0, 1, 1]);
    const rope_parameters = {
      full_attention: { ...rope_scaling, rope_theta: 1e6 },
      sliding_attention: { rope_type: "default", rope_theta: 500 },
    };
    expect(parseConfig({ ...gemma3, rope_parameters }).ropes).toEqual(expected);
    expect(parseConfig(gemma3).ropes.map(({ theta }) => theta)).toEqual([1e6, 10000]);
  });

  test("leaves layers of SmolLM3 without rotation", () => {
    const smol = { ...tiny, architectures: ["SmolLM3ForCausalLM"] };
    const ropes = (json: Json) => parseConfig(json).layerConfigs.map(({ rope }) => rope);
    expect(ropes(without("rope_theta", smol))).toEqual([0, 0, 0, null, 0, 0, 0, null]);
    expect(ropes({ ...smol, no_rope_layers: [0, 1, 1, 1, 1, 1, 1, 0] })).toEqual([null, 0, 0, 0, 0, 0, 0, null]);
    expect(failure({ ...smol, no_rope_layers: [1, 1] }).context).toMatchObject({ field: "no_rope_layers" });
  });
});

describe("what an architecture adds", () => {
  test("Gemma 2: scales, soft-caps, weights around 1", () => {
    expect(parseConfig(gemma2)).toMatchObject({
      headDim: 64,
      norm: { kind: "rmsnorm", offset: 1 },
      attention: { scale: 1 / 12, softcap: 50 },
      embeddingScale: 16,
      logitSoftcap: 30,
      activation: "gelu_tanh",
      tieEmbeddings: true,
    });
    expect(parseConfig(without("head_dim", gemma2)).headDim).toBe(256);
    expect(parseConfig(without("hidden_activation", gemma2)).activation).toBe("gelu_tanh");
    const specs = tensorSpecs(parseConfig(gemma2));
    expect(new Set(specs.filter(({ offset }) => offset === 1).map(({ role }) => role))).toEqual(
      new Set(["attentionNorm", "attentionPostNorm", "mlpNorm", "mlpPostNorm", "finalNorm"]),
    );
  });

  test("GPT-2: its own field names, four times the width inside, learned positions", () => {
    const config = parseConfig(gpt2);
    expect(config).toMatchObject({ hiddenSize: 64, intermediateSize: 256, heads: 4, contextLength: 32, ropes: [] });
    expect(config).toMatchObject({ norm: { kind: "layernorm" }, activation: "gelu_tanh", tieEmbeddings: true });
    expect(failure({ ...gpt2, n_embd: "64" }).context).toMatchObject({ field: "n_embd" });
    const specs = tensorSpecs(config);
    const of = (role: string) => specs.find((spec) => spec.role === role);
    expect(of("positions")).toMatchObject({ name: "transformer.wpe.weight", shape: [32, 64] });
    const source = { name: "transformer.h.0.attn.c_attn.weight", shape: [64, 192], transposed: true, first: 64 };
    expect(of("k")).toMatchObject({ name: `${source.name}[k]`, shape: [64, 64], source });
    expect(of("k")?.source.alternatives).toEqual(["h.0.attn.c_attn.weight"]);
    expect(of("vBias")).toMatchObject({ shape: [64], source: { shape: [192], first: 128 } });
  });

  test("Phi-3: matrices that hold several weights", () => {
    const specs = tensorSpecs(parseConfig({ ...llama, architectures: ["Phi3ForCausalLM"] }));
    const of = (role: string) => specs.find((spec) => spec.role === role && spec.layer === 2);
    const qkv = { name: "model.layers.2.self_attn.qkv_proj.weight", shape: [512, 256], transposed: false };
    expect(of("v")).toMatchObject({ name: `${qkv.name}[v]`, shape: [128, 256], source: { ...qkv, first: 384 } });
    expect(of("up")).toMatchObject({ shape: [768, 256], source: { shape: [1536, 256], first: 768 } });
    expect(new Set(specs.map(({ name }) => name)).size).toBe(specs.length);
  });

  test("q and k norms: over heads in Qwen3, over the whole width in OLMo 2", () => {
    const shapes = (architecture: string) =>
      tensorSpecs(parseConfig({ ...llama, architectures: [architecture] }))
        .filter(({ role, layer }) => layer === 0 && /^[qk]Norm$/.test(role))
        .map(({ shape }) => shape);
    expect(shapes("Qwen3ForCausalLM")).toEqual([[64], [64]]);
    expect(shapes("Olmo2ForCausalLM")).toEqual([[256], [128]]);
  });

  test("experts: which layers have them, their sizes and names", () => {
    const { experts, layerConfigs } = parseConfig(qwenMoe);
    const sizes = { count: 5, active: 2, intermediateSize: 32, sharedIntermediateSize: null, normalize: true };
    expect(experts).toEqual(sizes);
    expect(layerConfigs.map(({ sparse }) => sparse)).toEqual([false, true, false, false, false, true, false, true]);
    const specs = tensorSpecs(parseConfig(qwenMoe)).filter(({ layer }) => layer === 1);
    const up = specs.filter(({ role }) => role === "expertUp");
    expect(up.map(({ expert, name, shape }) => [expert, name, shape])).toEqual(
      [0, 1, 2, 3, 4].map((e) => [e, `model.layers.1.mlp.experts.${e}.up_proj.weight`, [32, 256]]),
    );
    expect(specs.some(({ role }) => role === "up")).toBe(false);
    const shared = { ...qwenMoe, architectures: ["Qwen2MoeForCausalLM"], shared_expert_intermediate_size: 48 };
    const roles = tensorSpecs(parseConfig(shared)).filter(({ layer }) => layer === 1);
    expect(roles.find(({ role }) => role === "sharedDown")?.shape).toEqual([256, 48]);
    expect(roles.find(({ role }) => role === "sharedRouter")?.shape).toEqual([1, 256]);
    expect(failure({ ...qwenMoe, num_experts_per_tok: 6 }).context).toMatchObject({ field: "num_experts_per_tok" });
    expect(failure(without("num_experts", qwenMoe)).context).toMatchObject({ field: "num_experts" });
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
