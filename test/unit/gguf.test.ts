import { describe, expect, test } from "vitest";
import { viewAs } from "../../src/core/dtype.js";
import { readGguf } from "../../src/io/gguf.js";
import { ggufDirectory } from "../../src/io/gguf-model.js";
import { openModelFolder } from "../../src/io/model-folder.js";
import { openWeights } from "../../src/io/quantized.js";
import { memorySource, readJson } from "../../src/io/source.js";
import { parseConfig } from "../../src/models/config.js";
import { failure } from "../support/failure.js";
import { type GgufEntry, writeGguf } from "../support/gguf.js";

const WORDS = ["<s>", "</s>", "a", "b", "ab"];
const u32 = (value: number): GgufEntry => [4, value];

/** The metadata of a small model of an architecture. */
const metadata = (name: string, more: Record<string, GgufEntry> = {}): Record<string, GgufEntry> => ({
  "general.architecture": [8, name],
  [`${name}.block_count`]: u32(2),
  [`${name}.context_length`]: u32(131_072),
  [`${name}.embedding_length`]: u32(256),
  [`${name}.feed_forward_length`]: u32(512),
  [`${name}.attention.head_count`]: u32(4),
  [`${name}.attention.head_count_kv`]: u32(2),
  [`${name}.attention.layer_norm_rms_epsilon`]: [6, 1e-6],
  [`${name}.rope.freq_base`]: [6, 500_000],
  "tokenizer.ggml.model": [8, "gpt2"],
  "tokenizer.ggml.pre": [8, "qwen2"],
  "tokenizer.ggml.tokens": [9, [8, ...WORDS]],
  "tokenizer.ggml.token_type": [9, [5, 3, 3, 1, 1, 1]],
  "tokenizer.ggml.merges": [9, [8, "a b"]],
  "tokenizer.ggml.bos_token_id": u32(0),
  "tokenizer.ggml.eos_token_id": u32(1),
  ...more,
});
const f32 = (name: string, values: readonly number[]) => ({
  name,
  type: 0,
  shape: [values.length],
  data: new Uint8Array(Float32Array.from(values).buffer),
});
const embedding = { name: "token_embd.weight", type: 0, shape: [5, 256], data: new Uint8Array(5 * 1024) };
const file = (entries: Record<string, GgufEntry>, tensors = [embedding]) =>
  ggufDirectory("m.gguf", async () => memorySource(writeGguf(entries, tensors), "m.gguf"));

describe("config.json of a GGUF file", () => {
  test("has the fields of the architecture", async () => {
    const config = await readJson(await file(metadata("qwen2")), "config.json");
    expect(config).toMatchObject({
      architectures: ["Qwen2ForCausalLM"],
      num_hidden_layers: 2,
      hidden_size: 256,
      intermediate_size: 512,
      num_key_value_heads: 2,
      head_dim: 64,
      rope_theta: 500_000,
      tie_word_embeddings: true,
      vocab_size: 5,
    });
    expect(parseConfig(config)).toMatchObject({ contextLength: 131_072, qkvBias: true, eosIds: [1] });
  });

  test("scales Gemma's queries by the width of its heads, in the largest models by their share of the hidden size", async () => {
    for (const [name, largest] of [
      ["gemma2", 46],
      ["gemma3", 62],
    ] as const)
      for (const layers of [2, largest]) {
        const keys = { [`${name}.block_count`]: u32(layers), [`${name}.attention.key_length`]: u32(32) };
        const entries = metadata(name, { ...keys, [`${name}.attention.value_length`]: u32(32) });
        const config = await readJson(await file(entries), "config.json");
        expect(parseConfig(config).attention.scale).toBe(1 / Math.sqrt(layers === largest ? 256 / 4 : 32));
      }
  });

  test("has no windows, and one rotation, where a Gemma 3 file has no window", async () => {
    const window = { "gemma3.block_count": u32(7), "gemma3.attention.sliding_window": u32(512) };
    const layers = async (more: Record<string, GgufEntry>) =>
      parseConfig(await readJson(await file(metadata("gemma3", more)), "config.json")).layerConfigs.map(
        ({ window, rope }) => [window, rope],
      );
    const local = [512, 1];
    expect(await layers(window)).toEqual([local, local, local, local, local, [null, 0], local]);
    expect(await layers({ "gemma3.block_count": u32(2) })).toEqual([
      [null, 0],
      [null, 0],
    ]);
  });

  test("has an untied head where the file has one", async () => {
    const head = { ...embedding, name: "output.weight" };
    expect(await readJson(await file(metadata("llama"), [embedding, head]), "config.json")).toMatchObject({
      tie_word_embeddings: false,
    });
  });

  /** Llama 3.1's divisors, by the formula of its configuration. */
  const divisors = (factor: number, low = 1) =>
    Array.from({ length: 32 }, (_, i) => {
      const wavelength = 2 * Math.PI * 500_000 ** ((2 * i) / 64);
      if (wavelength < 8192 / 4) return 1;
      if (wavelength > 8192 / low) return factor;
      const smooth = (8192 / wavelength - low) / (4 - low);
      return 1 / ((1 - smooth) / factor + smooth);
    });

  test("has Llama 3.1's scaling when the file has its divisors, and no others pass for it", async () => {
    for (const factor of [8, 32]) {
      const config = await readJson(
        await file(metadata("llama"), [embedding, f32("rope_freqs.weight", divisors(factor))] as (typeof embedding)[]),
        "config.json",
      );
      expect(config.rope_scaling).toMatchObject({
        rope_type: "llama3",
        factor,
        low_freq_factor: 1,
        high_freq_factor: 4,
      });
    }
    const other = failure(
      file(metadata("llama"), [embedding, f32("rope_freqs.weight", divisors(8, 2))] as (typeof embedding)[]),
    );
    expect(await other).toMatchObject({ code: "model/unsupported", context: { what: "rope_freqs.weight" } });
  });
});

test("experts may lie in tensors of their own, and the gate of a shared one in a vector", async () => {
  const tensor = (name: string, shape: number[], fill: number) => {
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(fill);
    return { name, type: 0, shape, data: new Uint8Array(data.buffer) };
  };
  const mixtral = await file(metadata("llama", { "llama.expert_count": u32(2), "llama.expert_used_count": u32(1) }), [
    embedding,
    tensor("blk.0.ffn_down.0.weight", [256, 512], 1),
    tensor("blk.0.ffn_down.1.weight", [256, 512], 2),
  ]);
  await using experts = await openWeights(mixtral, undefined);
  for (const expert of [0, 1]) {
    const name = `model.layers.0.block_sparse_moe.experts.${expert}.w2.weight`;
    expect(viewAs("f32", (await experts.read(name)).slice())[5]).toBe(expert + 1);
  }
  const counts = { "qwen2moe.expert_count": u32(2), "qwen2moe.expert_used_count": u32(1) };
  const qwen = await file(metadata("qwen2moe", counts), [
    embedding,
    tensor("blk.0.ffn_gate_inp_shexp.weight", [256], 3),
  ]);
  await using gate = await openWeights(qwen, undefined);
  expect(gate.tensors.get("model.layers.0.mlp.shared_expert_gate.weight")?.shape).toEqual([1, 256]);
});

describe("a model in several GGUF files", () => {
  const part = (no: number, count: number, tensors: (typeof embedding)[], entries: Record<string, GgufEntry> = {}) =>
    writeGguf({ ...entries, "split.no": u32(no), "split.count": u32(count) }, tensors);
  const name = (no: number) => `m-0000${no}-of-00003.gguf`;
  const norm = (layer: number) =>
    ({ ...f32(`blk.${layer}.attn_norm.weight`, Array(256).fill(layer + 1)) }) as typeof embedding;
  const files = () =>
    new Map([
      [name(2), part(1, 3, [norm(0)])],
      [name(1), part(0, 3, [embedding], metadata("llama"))],
      [name(3), part(2, 3, [norm(1), { ...embedding, name: "output.weight" }])],
    ]);

  test("is one model, opened by the first", async () => {
    const directory = await openModelFolder(files());
    expect(await readJson(directory, "config.json")).toMatchObject({ tie_word_embeddings: false, hidden_size: 256 });
    await using weights = await openWeights(directory, undefined);
    expect(weights.tensors.size).toBe(4);
    for (const layer of [0, 1]) {
      const bytes = await weights.read(`model.layers.${layer}.input_layernorm.weight`);
      expect([...viewAs("f32", bytes.slice())]).toEqual(Array(256).fill(layer + 1));
    }
  });

  const wrong: [what: string, change: (all: Map<string, Uint8Array>) => void, code: string, reason: RegExp][] = [
    ["a part that is not there", (all) => all.delete(name(2)), "io/not-found", /m-00002/],
    [
      "a part in the place of another",
      (all) => all.set(name(2), part(2, 3, [norm(0)])),
      "io/malformed",
      /part 2, not 1/,
    ],
    ["a tensor twice", (all) => all.set(name(2), part(1, 3, [embedding])), "io/malformed", /once more/],
    [
      "another name",
      (all) => all.set("a.gguf", part(0, 3, [embedding], metadata("llama"))),
      "io/malformed",
      /NAME-00001/,
    ],
  ];
  for (const [what, change, code, reason] of wrong)
    test(`with ${what} is refused`, async () => {
      const all = files();
      change(all);
      const error = await failure(openModelFolder(all));
      expect(error.code).toBe(code);
      expect(error.message).toMatch(reason);
    });
});

describe("what a GGUF file may hold and fewbit cannot read is refused by name", () => {
  const cases: readonly (readonly [
    what: string,
    entries: Record<string, GgufEntry>,
    value: string,
    tensors?: (typeof embedding)[],
  ])[] = [
    ["GGUF architecture", { "general.architecture": [8, "bert"] }, "bert"],
    ["GGUF architecture", metadata("qwen3", { "qwen3.expert_count": u32(8) }), "qwen3 with experts"],
    [
      "llama.expert_gating_func",
      metadata("llama", { "llama.expert_count": u32(8), "llama.expert_gating_func": u32(2) }),
      "2",
    ],
    ["llama.rope.dimension_count", metadata("llama", { "llama.rope.dimension_count": u32(32) }), "32"],
    ["GGUF tensor", metadata("llama"), "blk.0.attn_sinks.weight", [{ ...embedding, name: "blk.0.attn_sinks.weight" }]],
    ['type of tensor "token_embd.weight"', metadata("llama"), "IQ2_XXS", [{ ...embedding, type: 16 }]],
  ];
  for (const [what, entries, value, tensors] of cases)
    test(`${what} ${value}`, async () => {
      expect(await failure(file(entries, tensors))).toMatchObject({
        code: "model/unsupported",
        context: { what, value },
      });
    });

  for (const [key, value, what] of [
    ["tokenizer.ggml.pre", "default", "tokenizer.ggml.pre"],
    ["tokenizer.ggml.model", "bert", "GGUF tokenizer"],
  ] as const)
    test(`${key} ${value}`, async () => {
      const directory = await file(metadata("llama", { [key]: [8, value] }));
      expect(await failure(readJson(directory, "tokenizer.json"))).toMatchObject({
        code: "model/unsupported",
        context: { what, value },
      });
    });

  test("big-endian files, and versions before 2", async () => {
    const bytes = writeGguf(metadata("llama"), [embedding]);
    for (const [version, value] of [
      [[0, 0, 0, 3], "big-endian"],
      [[1, 0, 0, 0], "1"],
    ] as const) {
      const other = bytes.slice();
      other.set(version, 4);
      expect(await failure(readGguf(memorySource(other)))).toMatchObject({
        code: "model/unsupported",
        context: { what: "GGUF version", value },
      });
    }
  });
});

describe("a damaged GGUF file is refused with the reason", () => {
  const bad = async (change: (bytes: Uint8Array) => Uint8Array | undefined, reason: RegExp) => {
    const bytes = writeGguf(metadata("llama"), [embedding]);
    const error = await failure(readGguf(memorySource(change(bytes) ?? bytes)));
    expect(error.code).toBe("io/malformed");
    expect(error.message).toMatch(reason);
  };
  test("another magic", () => bad((bytes) => void bytes.set([0x47, 0x47], 2), /does not start with "GGUF"/));
  test("cut in its data", () => bad((bytes) => bytes.slice(0, -1), /ends at byte/));
  test("cut in its header", () => bad((bytes) => bytes.slice(0, 100), /needs \d+ bytes at byte|too few/));
  test("a count of 2^60 tensors", () =>
    bad((bytes) => void new DataView(bytes.buffer).setBigUint64(8, 2n ** 60n, true), /above 2\^53/));
  test("a count that the file cannot hold", () =>
    bad((bytes) => void new DataView(bytes.buffer).setBigUint64(8, 2n ** 40n, true), /too few/));
  test("a key twice", async () => {
    const entries = metadata("llama");
    const bytes = writeGguf({ ...entries, "general.architecturf": [8, "llama"] }, [embedding]);
    const text = new TextDecoder("latin1").decode(bytes);
    bytes[text.indexOf("architecturf") + 11] = "e".charCodeAt(0);
    const error = await failure(readGguf(memorySource(bytes)));
    expect(error.message).toContain('the key "general.architecture" twice');
  });
});
