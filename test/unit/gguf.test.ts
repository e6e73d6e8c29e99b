import { describe, expect, test } from "vitest";
import { readGguf } from "../../src/io/gguf.js";
import { ggufDirectory } from "../../src/io/gguf-model.js";
import { memorySource, readJson } from "../../src/io/source.js";
import { parseConfig } from "../../src/models/config.js";
import { failure } from "../setup/safetensors.js";
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
  ggufDirectory(async () => memorySource(writeGguf(entries, tensors), "m.gguf"));

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

describe("what a GGUF file may hold and fewbit cannot read is refused by name", () => {
  const cases: readonly (readonly [
    what: string,
    entries: Record<string, GgufEntry>,
    value: string,
    tensors?: (typeof embedding)[],
  ])[] = [
    ["GGUF architecture", { "general.architecture": [8, "bert"] }, "bert"],
    ["llama.expert_count", metadata("llama", { "llama.expert_count": u32(8) }), "8"],
    ["llama.rope.dimension_count", metadata("llama", { "llama.rope.dimension_count": u32(32) }), "32"],
    ["GGUF split.count", metadata("llama", { "split.count": u32(3) }), "3"],
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
