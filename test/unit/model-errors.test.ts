import { describe, expect, test } from "vitest";
import type { TensorEntry } from "../../src/io/safetensors.js";
import type { LoadModelOptions } from "../../src/models/load.js";
import type { GenerateOptions } from "../../src/models/model.js";
import { int4WeightOnly } from "../../src/quantize/configs.js";
import { failure } from "../support/failure.js";
import { collect, load, PROMPT, reference } from "../support/generate.js";
import { TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

describe("arguments of generate that are refused, before anything runs", () => {
  const cases: [what: string, prompt: string | number[], options: GenerateOptions, code: string, name?: string][] = [
    ["negative maxTokens", PROMPT, { maxTokens: -1 }, "argument/invalid", "maxTokens"],
    ["fractional maxTokens", PROMPT, { maxTokens: 1.5 }, "argument/invalid", "maxTokens"],
    ["a negative temperature", PROMPT, { temperature: -1 }, "argument/invalid", "temperature"],
    ["topP of 0", PROMPT, { topP: 0 }, "argument/invalid", "topP"],
    ["a negative seed", PROMPT, { seed: -1 }, "argument/invalid", "seed"],
    ["no tokens", [], {}, "argument/invalid", "prompt"],
    ["a token outside the vocabulary", [0, 258], {}, "argument/invalid", "token id"],
    ["a fractional token", [0.5], {}, "argument/invalid", "token id"],
    ["a prompt longer than the context", "x".repeat(64), {}, "model/context-length"],
  ];
  test.each(cases)("%s", async (_, prompt, options, code, name) => {
    await using device = await reference();
    using model = await load(device);
    const error = await failure(collect(model, prompt, options));
    expect(error.code).toBe(code);
    if (name !== undefined) expect(error.context).toMatchObject({ name });
    expect(model.program.executable.statistics.submits).toBe(0);
  });

  test("a disposed model is object/disposed", async () => {
    await using device = await reference();
    const model = await load(device);
    model[Symbol.dispose]();
    expect((await failure(collect(model, PROMPT))).code).toBe("object/disposed");
    expect((await failure(model.logits([0]))).code).toBe("object/disposed");
  });
});

describe("a model folder that is wrong is refused by name and leaves nothing on the device", () => {
  const entry = (name: string, change: Partial<TensorEntry>) => (entries: TensorEntry[]) =>
    entries.map((tensor) => (tensor.name === name ? { ...tensor, ...change } : tensor));
  const file = (name: string, bytes: Uint8Array) => new Map([...tinyModel(), [name, bytes]]);
  const without = (name: string) => new Map([...tinyModel()].filter(([file]) => file !== name));
  const weights = () => tinyModel().get("model.safetensors") as Uint8Array;
  const text = (value: string) => new TextEncoder().encode(value);
  const config = (fields: Record<string, unknown>) =>
    file("config.json", text(JSON.stringify({ ...TINY_CONFIG, ...fields })));
  /** The safetensors file with another header text, its length as it should be. */
  const header = (edit: (json: Record<string, { data_offsets: number[]; shape: number[] }>) => void) => {
    const bytes = weights();
    const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
    const json = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
    edit(json);
    const changed = text(JSON.stringify(json));
    const out = new Uint8Array(8 + changed.length + bytes.length - 8 - length);
    new DataView(out.buffer).setBigUint64(0, BigInt(changed.length), true);
    out.set(changed, 8);
    out.set(bytes.subarray(8 + length), 8 + changed.length);
    return file("model.safetensors", out);
  };
  const huge = () => {
    const bytes = weights().slice();
    new DataView(bytes.buffer).setBigUint64(0, 2n ** 62n, true);
    return file("model.safetensors", bytes);
  };
  const Q = "model.layers.1.self_attn.q_proj.weight";
  type Case = [
    what: string,
    folder: () => Map<string, Uint8Array>,
    code: string,
    text: RegExp,
    options?: Partial<LoadModelOptions>,
  ];
  const cases: Case[] = [
    ["no config.json", () => without("config.json"), "io/not-found", /config\.json/],
    ["no tokenizer.json", () => without("tokenizer.json"), "io/not-found", /tokenizer\.json/],
    ["no weights", () => without("model.safetensors"), "io/not-found", /model\.safetensors/],
    ["config.json that is no JSON", () => file("config.json", text("{")), "io/malformed", /config\.json/],
    [
      "an unknown architecture",
      () => config({ architectures: ["FalconForCausalLM"] }),
      "model/unsupported",
      /FalconForCausalLM.*LlamaForCausalLM/,
    ],
    [
      "a config that contradicts itself",
      () => config({ num_key_value_heads: 3 }),
      "model/config",
      /num_key_value_heads/,
    ],
    [
      "a missing tensor",
      () => tinyModel({ tensors: (all) => all.filter(({ name }) => name !== Q) }),
      "model/missing-tensor",
      /layers\.1\.self_attn\.q_proj/,
    ],
    [
      "a tensor of the wrong shape",
      () => tinyModel({ tensors: entry(Q, { shape: [64, 16] }) }),
      "shape/mismatch",
      /q_proj.*\[64, 16\].*\[32, 32\]/,
    ],
    ["a tensor of integers", () => tinyModel({ tensors: entry(Q, { dtype: "I16" }) }), "dtype/mismatch", /q_proj.*I16/],
    ["a config for a larger model", () => config({ num_hidden_layers: 3 }), "model/missing-tensor", /layers\.2/],
    [
      "a truncated file",
      () => file("model.safetensors", weights().subarray(0, weights().length - 10)),
      "io/malformed",
      /model\.safetensors/,
    ],
    [
      "a file cut inside its header",
      () => file("model.safetensors", weights().subarray(0, 100)),
      "io/malformed",
      /model\.safetensors/,
    ],
    ["an empty file", () => file("model.safetensors", new Uint8Array(0)), "io/malformed", /model\.safetensors/],
    ["a header of 2^62 bytes", huge, "io/malformed", /model\.safetensors/],
    [
      "tensors that overlap",
      () =>
        header((json) => Object.assign(json[Q] as object, { data_offsets: json[Q.replace("1", "0")]?.data_offsets })),
      "io/malformed",
      /model\.safetensors/,
    ],
    [
      "a tensor beyond the end",
      () => header((json) => Object.assign(json[Q] as object, { data_offsets: [1e9, 1e9 + 2048] })),
      "io/malformed",
      /model\.safetensors/,
    ],
    [
      "a shape that lies about its bytes",
      () => header((json) => Object.assign(json[Q] as object, { shape: [32, 64] })),
      "io/malformed",
      /q_proj/,
    ],
    [
      "an unknown quantization",
      () => tinyModel(),
      "argument/unknown-name",
      /int4w-32.*did you mean.*int4wo-32/,
      { quantize: "int4w-32" },
    ],
    [
      "a quantization that no layer of this size can take",
      () => tinyModel(),
      "quantize/layer",
      /q_proj.*64.*nearest/,
      { quantize: "int4wo-64" },
    ],
    [
      "a config that wants another weight dtype",
      () => tinyModel({ dtype: "f32" }),
      "quantize/layer",
      /f32/,
      { quantize: int4WeightOnly({ groupSize: 32, int4PackingFormat: "tile_packed_to_4d" }) },
    ],
    [
      "a context larger than the model's",
      () => tinyModel(),
      "argument/invalid",
      /context is 65: expected an integer from 1 to 64/,
      { context: 65 },
    ],
    ["a context of nothing", () => tinyModel(), "argument/invalid", /context/, { context: 0 }],
    ["prompts in chunks of nothing", () => tinyModel(), "argument/invalid", /prefillChunk/, { prefillChunk: 0 }],
  ];
  test.each(cases)("%s", async (_, folder, code, message, options = {}) => {
    await using device = await reference();
    const error = await failure(load(device, options, folder()));
    expect(error.message).toMatch(message);
    expect(error.code).toBe(code);
    expect(device.bytes).toBe(0);
    using model = await load(device);
    expect(await collect(model, PROMPT, { maxTokens: 1 })).toHaveLength(1);
  });
});
