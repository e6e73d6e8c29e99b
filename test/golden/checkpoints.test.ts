import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { toFloat32, viewAs } from "../../src/core/dtype.js";
import { GGML_TYPES, ggmlType } from "../../src/formats/ggml.js";
import { memoryPart } from "../../src/formats/stored-matrix.js";
import { dequantize, elementCodes, scaleValues, zeroValues } from "../../src/formats/tensor.js";
import { describeTorchao, torchaoPartName } from "../../src/formats/torchao.js";
import { torchaoClass } from "../../src/formats/torchao-write.js";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { readGguf } from "../../src/io/gguf.js";
import { ggmlMatrix } from "../../src/io/gguf-model.js";
import { ggufTokenizer } from "../../src/io/gguf-tokenizer.js";
import { openModelFolder } from "../../src/io/model-folder.js";
import { openWeights, parseScheme, withStored } from "../../src/io/quantized.js";
import { openSafetensors, type TensorEntry, type TensorInfo, type TensorStore } from "../../src/io/safetensors.js";
import { memorySource, openDirectory, readJson } from "../../src/io/source.js";
import { loadModel } from "../../src/models/model.js";
import { open } from "../../src/runtime/device.js";
import { loadTokenizer } from "../../src/text/tokenizer.js";
import { loadEveryWay } from "../support/stored.js";
import { tinyModel } from "../support/tiny-model.js";

/* The files of test/golden/checkpoints, whose generate.py says by whom every number was made. */

const FOLDER = "test/golden/checkpoints";
const bytes = (name: string) => new Uint8Array(readFileSync(`${FOLDER}/${name}`));
const golden = (name: string) => openSafetensors(memorySource(bytes(name), name));
const floats = async (store: TensorStore, name: string) => viewAs("f32", (await store.read(name)).slice());

/** Bit for bit, except that NaN is NaN. */
function expectSame(got: Float32Array, want: Float32Array): void {
  expect(got.length).toBe(want.length);
  const differ = want.findIndex((value, i) => !Object.is(got[i], value) && !(got[i] === value));
  expect(differ === -1 ? "same" : `element ${differ}: ${got[differ]} instead of ${want[differ]}`).toBe("same");
}

const once = (values: Float64Array) => Float32Array.from(values);

describe("blocks of GGML types mean what the gguf package says", async () => {
  const file = await golden("ggml_blocks.safetensors");
  const named = GGML_TYPES.map((id) => ({ id, name: (ggmlType(id) as { name: string }).name }));

  test("every readable type has vectors", () => {
    for (const { name } of named) expect(file.tensors.has(`${name}.blocks`)).toBe(true);
  });

  for (const { id, name } of named)
    test(name, async () => {
      const type = ggmlType(id) as NonNullable<ReturnType<typeof ggmlType>>;
      const blocks = await file.read(`${name}.blocks`);
      const tensor = { name, shape: [3, 512], type: id, byteOffset: 0, byteLength: blocks.byteLength };
      const made = await loadEveryWay(ggmlMatrix(memorySource(blocks), tensor, type, null));
      expectSame(once(dequantize(made)), await floats(file, `${name}.values`));
    });
});

describe("a GGUF file that the gguf package wrote", async () => {
  const directory = await openModelFolder(new Map([["tiny.gguf", bytes("tiny.gguf")]]));
  const expected = await golden("tiny_gguf.safetensors");

  test("is a model folder with Hugging Face's names, q and k in Hugging Face's order", async () => {
    const config = await readJson(directory, "config.json");
    expect(config).toMatchObject({
      architectures: ["LlamaForCausalLM"],
      hidden_size: 64,
      num_attention_heads: 4,
      num_key_value_heads: 2,
      head_dim: 16,
      vocab_size: 260,
      tie_word_embeddings: true,
      bos_token_id: 0,
      eos_token_id: 1,
    });
    await using weights = await openWeights(directory, undefined);
    for (const { name, shape } of expected.tensors.values()) {
      const matrix = weights.stored?.get(name);
      if (matrix !== undefined) {
        expect(matrix.shape).toEqual(shape);
        expectSame(once(dequantize(await loadEveryWay(matrix))), await floats(expected, name));
        continue;
      }
      const dtype = ({ F32: "f32", F16: "f16", BF16: "bf16" } as const)[weights.tensors.get(name)?.dtype as "F32"];
      expectSame(toFloat32(dtype, viewAs(dtype, (await weights.read(name)).slice())), await floats(expected, name));
      const rows = await weights.read(name, { rows: [3, 7] });
      const all = await weights.read(name);
      expect(rows).toEqual(
        all.subarray((3 * all.length) / (shape[0] as number), (7 * all.length) / (shape[0] as number)),
      );
    }
  });

  test("has a tokenizer that merges as its list says", async () => {
    const json = await readJson(directory, "tokenizer.json");
    const tokenizer = loadTokenizer(json, await readJson(directory, "tokenizer_config.json"));
    const ids = tokenizer.encode("the");
    expect(ids).toEqual([0, 259]);
    expect(tokenizer.decode(tokenizer.encode("thé the\n"))).toBe("thé the\n");
  });
});

test("a SentencePiece vocabulary gives the ids that sentencepiece gives", async () => {
  const { metadata } = await readGguf(memorySource(bytes("spm.gguf"), "spm.gguf"));
  const made = ggufTokenizer(metadata, "spm.gguf");
  const tokenizer = loadTokenizer(made.tokenizer, made.config);
  const texts = JSON.parse(String(metadata.get("test.texts"))) as string[];
  const ids = JSON.parse(String(metadata.get("test.ids"))) as number[][];
  for (const [i, text] of texts.entries()) {
    expect([text, tokenizer.encode(text, { addSpecialTokens: false })]).toEqual([text, ids[i]]);
    expect(tokenizer.decode(ids[i] as number[])).toBe(text);
  }
});

test("a checkpoint that torchao wrote gives its codes and scales back, byte for byte", async () => {
  const path = "test/golden/data/checkpoint_torchao.safetensors";
  const files = new Map([["model.safetensors", new Uint8Array(readFileSync(path))]]);
  await using checkpoint = await openCheckpoint(await openDirectory(files));
  await using store = await withStored(checkpoint, { quant_method: "torchao" });
  const classes = new Set<string>();
  for (const [name, { format, shape, activation, ...matrix }] of store.stored ?? []) {
    const tensor = await loadEveryWay({ format, shape, activation, ...matrix });
    const made = torchaoClass({ format, shape, dtype: "bf16", activation });
    if (made === null) throw new Error(`${name}: torchao has no class for what it wrote`);
    classes.add(made.type);
    for (const part of made.parts) {
      const stored = torchaoPartName(name, part.name);
      const expected = await checkpoint.read(stored);
      // A symmetric weight's zero points are zeros in the file and nothing in memory; fewbit writes the same zeros.
      expect([stored, Buffer.compare(made.encode(tensor, part.name), expected)]).toEqual([stored, 0]);
    }
  }
  expect([...classes].sort()).toEqual([
    "Float8Tensor",
    "Int4Tensor",
    "Int8Tensor",
    "IntxUnpackedToInt8Tensor",
    "MXTensor",
    "NVFP4Tensor",
  ]);
});

test("torchao's Int4PlainInt32Tensor of an XPU gives its codes, scales and zero points", async () => {
  const path = "test/golden/data/int4_plain_int32_xpu.safetensors";
  const file = await openSafetensors(memorySource(new Uint8Array(readFileSync(path)), path));
  const part = async (name: string, dtype: string, shape: number[]) => memoryPart(dtype, shape, await file.read(name));
  const parts = new Map([
    ["qdata", await part("packed_pairs", "I32", [18, 8])],
    ["scale", await part("scale.bits", "BF16", [2, 18])],
    ["zero_point", await part("zero_point", "I8", [2, 18])],
  ]);
  const attributes = { block_size: [1, 32], shape: [18, 64] };
  const matrix = await describeTorchao("a.w", "Int4PlainInt32Tensor", attributes, parts);
  const tensor = await loadEveryWay(matrix);
  expect([...elementCodes(tensor)]).toEqual([...(await file.read("codes"))]);
  const scales = viewAs("f32", (await file.read("scale")).slice());
  const zeros = viewAs("i8", (await file.read("zero_point")).slice());
  for (let row = 0; row < 18; row++)
    for (let group = 0; group < 2; group++) {
      expect(scaleValues(tensor, 0)[row * 2 + group]).toBe(scales[group * 18 + row]);
      expect(zeroValues(tensor)[row * 2 + group]).toBe(zeros[group * 18 + row]);
    }
});

describe("packed weights of other libraries are read as they are stored", async () => {
  const file = await golden("packed.safetensors");
  const group = (weights: object, activations: object | null = null, format = "pack-quantized") => ({
    quant_method: "compressed-tensors",
    format,
    config_groups: { group_0: { targets: ["Linear"], weights, input_activations: activations } },
  });
  const ct = (bits: number, symmetric: boolean) =>
    group({ num_bits: bits, type: "int", strategy: "group", group_size: 32, symmetric });
  const gptq = (bits: number, sym: boolean) => ({ quant_method: "gptq", bits, group_size: 32, sym, desc_act: false });
  const cases: readonly (readonly [layer: string, config: object, format: string])[] = [
    ...([2, 3, 4, 8] as const).flatMap((bits) => [
      [`gptq${bits}`, gptq(bits, false), `uint${bits}`] as const,
      [`gptq${bits}sym`, gptq(bits, true), `int${bits}`] as const,
    ]),
    ["awq", { quant_method: "awq", bits: 4, group_size: 32, zero_point: true, version: "gemm" }, "uint4"],
    ["ct4", ct(4, false), "uint4"],
    ["ct4sym", ct(4, true), "int4"],
    ["ct8sym", ct(8, true), "int8"],
    [
      "ctnv",
      group({ num_bits: 4, type: "float", strategy: "tensor_group", group_size: 16 }, null, "nvfp4-pack-quantized"),
      "nvfp4",
    ],
    ["fp8tensor", { quant_method: "fp8", activation_scheme: "dynamic" }, "float8_e4m3"],
    ["fp8row", { quant_method: "fp8", activation_scheme: "dynamic" }, "float8_e4m3"],
    ["fp8block", { quant_method: "fp8", weight_block_size: [128, 128] }, "float8_e4m3"],
  ];
  for (const [layer, config, format] of cases) test(layer, () => expectValues(file, layer, config, format));
});

describe("weights that the libraries packed themselves mean what they say", async () => {
  const file = await golden("libraries.safetensors");
  const ct = (weights: object, format = "pack-quantized") => ({
    quant_method: "compressed-tensors",
    format,
    config_groups: { group_0: { targets: ["Linear"], weights } },
  });
  const integers = (bits: number, symmetric: boolean) =>
    ct({ num_bits: bits, type: "int", strategy: "group", group_size: 32, symmetric });
  const bitsandbytes = { quant_method: "bitsandbytes", load_in_4bit: true };
  const cases: readonly (readonly [layer: string, config: object, format: string])[] = [
    ...([2, 3, 4, 8] as const).flatMap((bits) =>
      ["", "act"].map((order) => {
        const config = { quant_method: "gptq", bits, group_size: 32, sym: false, desc_act: order === "act" };
        return [`gptq${bits}${order}`, config, `uint${bits}`] as const;
      }),
    ),
    ["awq", { quant_method: "awq", bits: 4, group_size: 32, zero_point: true, version: "gemm" }, "uint4"],
    ["ct4", integers(4, false), "uint4"],
    ["ct4act", integers(4, false), "uint4"],
    ["ct4sym", integers(4, true), "int4"],
    ["ct8sym", integers(8, true), "int8"],
    [
      "ctnv",
      ct({ num_bits: 4, type: "float", strategy: "tensor_group", group_size: 16 }, "nvfp4-pack-quantized"),
      "nvfp4",
    ],
    ["nf4", bitsandbytes, "bitsandbytes_nf4"],
    ["nf4nested", bitsandbytes, "bitsandbytes_nf4"],
    ["nf4wide", bitsandbytes, "bitsandbytes_nf4"],
    ["fp4", bitsandbytes, "bitsandbytes_fp4"],
  ];
  // The reciprocal of NVFP4's divisor and the product with it are rounded, compressed-tensors rounds a quotient: three roundings.
  for (const [layer, config, format] of cases)
    test(layer, () => expectValues(file, layer, config, format, layer === "ctnv" ? 3.01 * 2 ** -24 : 0));

  test("columns in order of activation are in another order", async () => {
    const config = { quant_method: "gptq", bits: 4, group_size: 32, sym: false };
    const matrix = (await parseScheme(config)?.describe(only(file, "gptq4act")))?.get("gptq4act.weight");
    expect(matrix?.columns?.some((from, i) => from !== i)).toBe(true);
  });

  test("GPTQ's second layout has zero points as they are: one more in every nibble", async () => {
    const store: TensorStore = {
      ...file,
      read: async (name, options) => {
        const read = await file.read(name, options);
        if (!name.endsWith("qzeros")) return read;
        return new Uint8Array(Int32Array.from(viewAs("i32", read.slice()), (word) => word + 0x11111111).buffer);
      },
    };
    const config = { quant_method: "gptq", bits: 4, group_size: 32, sym: false, checkpoint_format: "gptq_v2" };
    await expectValues(store, "gptq4", config, "uint4");
  });

  test("a model with layers of bitsandbytes answers as with their values", async () => {
    const layers = { "model.layers.0.self_attn.o_proj": "nf4", "model.layers.1.self_attn.o_proj": "nf4wide" };
    const config = { head_dim: 32 };
    const entry = async (name: string, from: string): Promise<TensorEntry> => {
      const { dtype, shape } = file.tensors.get(from) as TensorInfo;
      return { name, dtype, shape, data: (await file.read(from)).slice() };
    };
    const packed: TensorEntry[] = [];
    const values: TensorEntry[] = [];
    for (const [layer, golden] of Object.entries(layers)) {
      for (const name of only(file, golden).tensors.keys()) packed.push(await entry(name.replace(golden, layer), name));
      values.push(await entry(`${layer}.weight`, `${golden}.values`));
    }
    const model = (replaced: TensorEntry[], more: object) =>
      tinyModel({
        config: { ...config, ...more },
        tensors: (entries) => [...entries.filter(({ name }) => !name.includes("o_proj")), ...replaced],
      });
    await using device = await open({ prefer: ["reference"] });
    using a = await loadModel(model(packed, { quantization_config: bitsandbytes }), { device });
    using b = await loadModel(model(values, {}), { device });
    expect(a.explain()).toContain("bitsandbytes_nf4[1x128:f32]");
    const ids = [0, 72, 101, 108];
    const [got, exact] = [await a.logits(ids), await b.logits(ids)];
    // The values are products rounded to float32: off by 2^-24 of themselves, the sums over them by a few times that.
    const spread = exact.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    for (const [i, value] of got.entries())
      expect(Math.abs(value - (exact[i] as number))).toBeLessThan(spread * 2 ** -19);
  });

  test("a table of its own is refused by name", async () => {
    const store = only(file, "nf4");
    const other: TensorStore = {
      ...store,
      read: async (name, options) => {
        const read = await file.read(name, options);
        return name.endsWith("quant_map") ? read.slice().reverse() : read;
      },
    };
    const describing = parseScheme(bitsandbytes)?.describe(other);
    await expect(describing).rejects.toMatchObject({
      code: "model/unsupported",
      context: { what: "quant_map of nf4.weight" },
    });
  });
});

/** A golden's tensors of one layer alone, as a store. */
function only(file: TensorStore, layer: string): TensorStore {
  const mine = (name: string) => name.startsWith(`${layer}.`) && !name.endsWith(".values");
  return { ...file, tensors: new Map([...file.tensors].filter(([name]) => mine(name))) };
}

/** The layer is loaded in a format of this name, with the values of the golden: exactly, or off by `relative` of themselves. */
async function expectValues(
  file: TensorStore,
  layer: string,
  config: object,
  format: string,
  relative = 0,
): Promise<void> {
  const matrix = (await parseScheme(config)?.describe(only(file, layer)))?.get(`${layer}.weight`);
  expect(matrix?.format.name).toBe(format);
  const made = await loadEveryWay(matrix as NonNullable<typeof matrix>);
  const values = await floats(file, `${layer}.values`);
  const k = made.shape[1];
  const wanted = values.map((_, at) => values[at - (at % k) + (matrix?.columns?.[at % k] ?? at % k)] as number);
  const got = once(dequantize(made));
  const near = got.map((value, i) => {
    const exact = wanted[i] as number;
    return Math.abs(value - exact) <= relative * Math.abs(exact) ? exact : value;
  });
  expectSame(near, wanted);
}
