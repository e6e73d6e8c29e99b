import { readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openModelFolder } from "../../src/io/model-folder.js";
import { openWeights } from "../../src/io/quantized.js";
import { type TensorEntry, writeSafetensors } from "../../src/io/safetensors.js";
import { readJson } from "../../src/io/source.js";
import { parseConfig, tensorSpecs } from "../../src/models/config.js";
import { loadModel } from "../../src/models/model.js";
import { type Device, open } from "../../src/runtime/device.js";
import { TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

/*
 * GGUF files that the gguf package wrote (test/golden/checkpoints/generate.py), against the same models as safetensors, whose
 * architectures test/golden/models.test.ts holds to transformers.
 */

/** The rule of `weights` in generate.py: an integer of -127 to 127 over 512 for every place of a tensor. */
function weights(name: string, size: number): Float32Array<ArrayBuffer> {
  let seed = 2166136261;
  for (const byte of new TextEncoder().encode(name)) seed = Math.imul(seed ^ byte, 16777619);
  return Float32Array.from({ length: size }, (_, i) => {
    let x = (Math.imul(i, 2654435761) + seed) | 0;
    x = Math.imul(x ^ (x >>> 15), 2246822519);
    x ^= x >>> 13;
    return (i % 32 === 0 ? 127 : ((x >>> 8) % 255) - 127) / 512;
  });
}

const CONFIG = {
  ...{ vocab_size: 40, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4 },
  ...{ num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 64, rms_norm_eps: 1e-6 },
  ...{ tie_word_embeddings: false, rope_theta: 10000, hidden_act: "silu" },
};
const GEMMA = {
  ...{ num_hidden_layers: 2, hidden_activation: "gelu_pytorch_tanh", query_pre_attn_scalar: 16, sliding_window: 9 },
  ...{ tie_word_embeddings: true, rms_norm_eps: 1e-6 },
};
const MOE = { num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 32 };

/** What Hugging Face's config.json of each file's model says. */
const MODELS: Readonly<Record<string, Record<string, unknown>>> = {
  gemma2: {
    ...GEMMA,
    architectures: ["Gemma2ForCausalLM"],
    attn_logit_softcapping: 5,
    final_logit_softcapping: 4,
    layer_types: ["sliding_attention", "full_attention"],
  },
  gemma3: {
    ...GEMMA,
    architectures: ["Gemma3ForCausalLM"],
    layer_types: ["sliding_attention", "full_attention"],
    rope_parameters: {
      full_attention: { rope_type: "linear", factor: 8, rope_theta: 1e6 },
      sliding_attention: { rope_type: "default", rope_theta: 10000 },
    },
  },
  llama: { architectures: ["MixtralForCausalLM"], num_local_experts: 4, num_experts_per_tok: 2, sliding_window: null },
  qwen2moe: {
    ...MOE,
    architectures: ["Qwen2MoeForCausalLM"],
    shared_expert_intermediate_size: 32,
    norm_topk_prob: false,
  },
  qwen3moe: { ...MOE, architectures: ["Qwen3MoeForCausalLM"], norm_topk_prob: true },
};

/** The model as safetensors. */
function reference(name: string): Map<string, Uint8Array> {
  const config = { ...CONFIG, ...MODELS[name], bos_token_id: 0, eos_token_id: 1 };
  const parsed = parseConfig(config);
  const entries = tensorSpecs(parsed).map((spec): TensorEntry => {
    const size = spec.shape.reduce((a, b) => a * b, 1);
    const norm = spec.role.endsWith("Norm") && parsed.norm.offset === 0;
    const data = weights(spec.name, size).map((value) => (norm ? value + 1 : value));
    return { name: spec.name, dtype: "F32", shape: [...spec.shape], data: new Uint8Array(data.buffer) };
  });
  const files = new Map<string, Uint8Array>(tinyModel({ config: { ...TINY_CONFIG } }));
  files.set("config.json", new TextEncoder().encode(JSON.stringify(config)));
  files.set("model.safetensors", writeSafetensors(entries));
  return files;
}

const gguf = (name: string) =>
  new Map([[`${name}.gguf`, new Uint8Array(readFileSync(`test/golden/checkpoints/arch_${name}.gguf`))]]);

let device: Device;
beforeAll(async () => {
  device = await open({ prefer: ["reference"] });
});
afterAll(async () => device[Symbol.asyncDispose]());

const IDS = Array.from({ length: 20 }, (_, i) => (i * 7 + 3) % 40);

describe.each(Object.keys(MODELS))("a GGUF file of %s", (name) => {
  test("describes the model that config.json describes", async () => {
    const directory = await openModelFolder(gguf(name));
    const config = parseConfig(await readJson(directory, "config.json"));
    const expected = parseConfig(JSON.parse(new TextDecoder().decode(reference(name).get("config.json"))));
    expect(config).toEqual(expected);
  });

  test("gives the logits of the safetensors bit for bit, from its blocks of Q8_0", async () => {
    const directory = await openModelFolder(gguf(name));
    await using store = await openWeights(directory, undefined);
    expect([...(store.stored?.values() ?? [])].every(({ kind }) => kind === "GGUF Q8_0")).toBe(true);
    expect(store.stored?.size).toBeGreaterThan(4);
    using a = await loadModel(gguf(name), { device });
    using b = await loadModel(reference(name), { device });
    const logits = await a.logits(IDS);
    expect(logits).toEqual(await b.logits(IDS));
    expect(Math.max(...logits) - Math.min(...logits)).toBeGreaterThan(0.1);
  });
});
