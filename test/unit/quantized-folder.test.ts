import { describe, expect, test } from "vitest";
import { type FloatType, toFloat32, viewAs } from "../../src/core/dtype.js";
import { type Format, withScale } from "../../src/formats/format.js";
import type { StoredMatrix } from "../../src/formats/stored-matrix.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import { dequantize, elementCodes, type QuantizedTensor, scaleValues, zeroValues } from "../../src/formats/tensor.js";
import { parseScheme } from "../../src/io/quantized.js";
import type { TensorEntry, TensorStore } from "../../src/io/safetensors.js";
import { parseConfig, type TensorRole, type TensorSpec } from "../../src/models/config.js";
import { loadModel } from "../../src/models/model.js";
import { outlineModel } from "../../src/models/outline.js";
import { planWeights } from "../../src/models/weights.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { type Device, open } from "../../src/runtime/device.js";
import { failure } from "../support/failure.js";
import { randomUniform, TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

const LINEAR = /\.(q|k|v|o|gate|up|down)_proj\.weight$/;
const IDS = [0, 72, 101, 108, 108, 111];
const bytes = (array: { buffer: ArrayBufferLike }) => new Uint8Array(array.buffer as ArrayBuffer);

/** The column of the file that each column of a tensor is. */
type OrderOf = (layer: string, k: number) => Uint32Array;
const inOrder: OrderOf = (_, k) => Uint32Array.from({ length: k }, (_, i) => i);

/** How a library stores a quantized linear: its tensors, under the layer's name. */
type Store = (layer: string, tensor: QuantizedTensor) => TensorEntry[];

/** A model of two folders: one stored quantized, one with the quantized values as float32, whose column order[i] is the tensor's i. */
function pair(
  format: Format,
  store: Store,
  quantization_config: object,
  { orderOf = inOrder, config: shape = {} }: { orderOf?: OrderOf; config?: Record<string, unknown> } = {},
) {
  const make = (
    replace: (layer: string, tensor: QuantizedTensor, shape: number[]) => TensorEntry[],
    config: Record<string, unknown>,
  ) =>
    tinyModel({
      config: { ...shape, ...config },
      tensors: (entries) =>
        entries.flatMap((entry) => {
          if (!LINEAR.test(entry.name)) return [entry];
          const dtype: FloatType = "bf16";
          const shape = [...entry.shape] as [number, number];
          const tensor = quantizeTensor(toFloat32(dtype, viewAs(dtype, entry.data)), shape, dtype, format);
          return replace(entry.name.replace(/\.weight$/, ""), tensor, shape);
        }),
    });
  const floats = (layer: string, tensor: QuantizedTensor, shape: number[]): TensorEntry[] => {
    const exact = dequantize(tensor);
    const values = new Float32Array(exact.length);
    const k = tensor.shape[1];
    const order = orderOf(layer, k);
    exact.forEach((value, at) => {
      values[at - (at % k) + (order[at % k] as number)] = value;
    });
    return [{ name: `${layer}.weight`, dtype: "F32", shape, data: bytes(values) }];
  };
  return { stored: make(store, { quantization_config }), dense: make(floats, {}) };
}

async function sameLogits(device: Device, { stored, dense }: ReturnType<typeof pair>) {
  using a = await loadModel(stored, { device });
  using b = await loadModel(dense, { device });
  expect(a.weightBytes).toBeLessThan(b.weightBytes / 2);
  expect(await a.logits(IDS)).toEqual(await b.logits(IDS));
}

/** Codes of `bits` bits along a list, least significant first in words of 32. */
function words(codes: ArrayLike<number>, bits: number): Int32Array {
  const out = new Int32Array((codes.length * bits) / 32);
  for (let i = 0; i < codes.length * bits; i++)
    if (((codes[Math.floor(i / bits)] as number) >> (i % bits)) & 1)
      out[i >> 5] = (out[i >> 5] as number) | (1 << (i & 31));
  return out;
}
function columns<T>(rows: number, width: number, value: (row: number, column: number) => T): T[] {
  return Array.from({ length: rows * width }, (_, i) => value(i % rows, Math.floor(i / rows)));
}

/**
 * AutoGPTQ's layout, written from its description: words along K, zero points less one along N, all of the transpose, and the group
 * of every column.
 */
const gptqIn =
  (orderOf: OrderOf): Store =>
  (layer, tensor) => {
    const [n, k] = tensor.shape;
    const order = orderOf(layer, k);
    const codes = new Uint32Array(n * k);
    elementCodes(tensor).forEach((code, at) => {
      codes[at - (at % k) + (order[at % k] as number)] = code;
    });
    const [scales, zeros] = [tensor.scales[0] as Uint32Array, zeroValues(tensor)];
    const halves = new Uint16Array(scales.buffer, 0, n * (k / 32));
    const qweight = new Int32Array((k / 8) * n);
    for (let row = 0; row < n; row++)
      words(codes.subarray(row * k, (row + 1) * k), 4).forEach((word, i) => {
        qweight[i * n + row] = word;
      });
    const groups = k / 32;
    const transposedZeros = columns(n, groups, (row, group) => (zeros[row * groups + group] as number) - 1);
    const transposedScales = Uint16Array.from(
      columns(n, groups, (row, group) => halves[row * groups + group] as number),
    );
    const index = new Int32Array(k);
    order.forEach((column, i) => {
      index[column] = Math.floor(i / 32);
    });
    return [
      { name: `${layer}.qweight`, dtype: "I32", shape: [k / 8, n], data: bytes(qweight) },
      {
        name: `${layer}.qzeros`,
        dtype: "I32",
        shape: [groups, n / 8],
        data: bytes(
          words(
            transposedZeros.map((z) => z & 15),
            4,
          ),
        ),
      },
      { name: `${layer}.scales`, dtype: "F16", shape: [groups, n], data: bytes(transposedScales) },
      { name: `${layer}.g_idx`, dtype: "I32", shape: [k], data: bytes(index) },
    ];
  };
const gptq = gptqIn(inOrder);

const fp8: Store = (layer, tensor) => [
  { name: `${layer}.weight`, dtype: "F8_E4M3", shape: tensor.shape, data: Uint8Array.from(elementCodes(tensor)) },
  {
    name: `${layer}.weight_scale_inv`,
    dtype: "F32",
    shape: [tensor.shape[0] / 16, tensor.shape[1] / 16],
    data: bytes(scaleValues(tensor, 0)),
  },
];

describe("a folder whose config.json declares it quantized", () => {
  test("GPTQ answers as the float model of the same values", async () => {
    await using device = await open({ prefer: ["reference"] });
    const format = withScale(FORMATS.uint4, { block: [1, 32], codec: CODECS.f16 });
    const folders = pair(format, gptq, { quant_method: "gptq", bits: 4, group_size: 32, sym: false, desc_act: false });
    await sameLogits(device, folders);
  });

  /** Columns shuffled within their model, alike for the layers of which `alike` gives the same name. */
  const shuffled =
    (alike: (layer: string) => string): OrderOf =>
    (layer, k) => {
      const uniform = randomUniform([...alike(layer)].reduce((sum, c) => (sum * 31 + c.charCodeAt(0)) >>> 0, 7));
      const keys = Float64Array.from({ length: k }, uniform);
      return inOrder(layer, k).sort((a, b) => (keys[a] as number) - (keys[b] as number));
    };
  const ACT_ORDER = { quant_method: "gptq", bits: 4, group_size: 32, sym: false, desc_act: true };
  const wide = { hidden_size: 64, intermediate_size: 96 };
  const uint4 = withScale(FORMATS.uint4, { block: [1, 32], codec: CODECS.f16 });

  test.each([
    // q, k and v are quantized over the same input, and gate and up: one permutation each, and one before o; none before down.
    ["inputs", (layer: string) => layer.replace(/[qkv]_proj/, "qkv").replace(/gate|up/, "gate_up"), 3],
    ["layers", (layer: string) => layer, 6],
  ] as const)(
    "GPTQ in order of activation, of %s, answers as the float model of the same values",
    async (_, alike, permutations) => {
      await using device = await open({ prefer: ["reference"] });
      const orderOf = shuffled(alike);
      const { stored, dense } = pair(uint4, gptqIn(orderOf), ACT_ORDER, { orderOf, config: wide });
      using a = await loadModel(stored, { device });
      using b = await loadModel(dense, { device });
      expect(await a.logits(IDS)).toEqual(await b.logits(IDS));
      const names = a.program.plan.graph.values.flatMap(({ name, role }) => (role === "weight" ? [name] : []));
      expect(names.filter((name) => name.endsWith("[order]")).length).toBe(permutations * 2);
      expect(names.some((name) => name.includes("down_proj") && name.endsWith("[order]"))).toBe(false);
    },
  );

  test("GPTQ in order of activation whose groups are not of one size is refused", async () => {
    await using device = await open({ prefer: ["reference"] });
    const { stored } = pair(
      uint4,
      (layer, tensor) =>
        gptq(layer, tensor).map((entry) =>
          entry.name.endsWith("g_idx")
            ? { ...entry, data: bytes(Int32Array.from({ length: tensor.shape[1] }, () => 0)) }
            : entry,
        ),
      ACT_ORDER,
      { config: wide },
    );
    expect(await failure(loadModel(stored, { device }))).toMatchObject({ code: "io/malformed" });
  });

  test("columns in order of activation are refused in experts and the head, whose inputs others read too", () => {
    const columns = Uint32Array.of(1, 0);
    const matrix = {
      format: uint4,
      shape: [2, 32],
      activation: null,
      kind: "GPTQ",
      columns,
    } as unknown as StoredMatrix;
    const store = { name: "x", tensors: new Map(), stored: new Map([["w", matrix]]) } as unknown as TensorStore;
    const source = { name: "w", alternatives: [], shape: [2, 32], transposed: false, first: 0 };
    const plan = (role: TensorRole) =>
      planWeights(store, [{ role, layer: 0, expert: 0, name: "w", shape: [2, 32], source, offset: 0 }], null);
    for (const role of ["expertUp", "expertDown", "head"] as const)
      expect(() => plan(role)).toThrow(
        expect.objectContaining({
          code: "model/unsupported",
          context: expect.objectContaining({ what: "columns of w" }),
        }),
      );
    expect(plan("o").inputOrder({ name: "w" } as TensorSpec)).toBe(columns);
  });

  test("fp8 in blocks quantizes activations as it declares", async () => {
    await using device = await open({ prefer: ["reference"] });
    const format = withScale(FORMATS.float8_e4m3, { block: [16, 16] });
    const { stored, dense } = pair(format, fp8, {
      quant_method: "fp8",
      weight_block_size: [16, 16],
      activation_scheme: "dynamic",
    });
    using a = await loadModel(stored, { device });
    using b = await loadModel(dense, { device });
    const [got, exact] = [await a.logits(IDS), await b.logits(IDS)];
    // e4m3 activations are off by up to 2^-4 of themselves: the answers are near and not the same.
    const worst = got.reduce((most, value, i) => Math.max(most, Math.abs(value - (exact[i] as number))), 0);
    const spread = exact.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    expect(worst).toBeGreaterThan(0);
    expect(worst).toBeLessThan(spread / 4);
    expect(a.explain()).toContain("float8_e4m3[16x16:f32]");
  });

  const refused: readonly (readonly [what: string, config: Record<string, unknown>, value: string])[] = [
    ["quantization_config", { quant_method: "modelopt", quant_algo: "NVFP4" }, "modelopt"],
    ["bitsandbytes", { quant_method: "bitsandbytes", load_in_8bit: true }, "8 bits (LLM.int8)"],
    ["quantization_config", { quant_method: "mxfp4" }, "mxfp4"],
    ["quantization_config.bits", { quant_method: "gptq", bits: 5 }, "5"],
    ["GPTQ checkpoint_format", { quant_method: "gptq", bits: 4, checkpoint_format: "marlin" }, "marlin"],
    ["AWQ version", { quant_method: "awq", bits: 4, version: "gemv" }, "gemv"],
    ["fp8 activation_scheme", { quant_method: "fp8", activation_scheme: "static" }, "static"],
    [
      "compressed-tensors format",
      {
        quant_method: "compressed-tensors",
        config_groups: { a: { format: "marlin-24", targets: ["Linear"], weights: {} } },
      },
      "marlin-24",
    ],
    [
      "input_activations.dynamic",
      {
        quant_method: "compressed-tensors",
        format: "int-quantized",
        config_groups: {
          a: { targets: ["Linear"], weights: { num_bits: 8 }, input_activations: { dynamic: false, num_bits: 8 } },
        },
      },
      "false",
    ],
  ];
  for (const [what, quantization_config, value] of refused)
    test(`${what} ${value} is refused by name before any weight is read`, () => {
      expect(() => parseScheme(quantization_config)).toThrow(
        expect.objectContaining({ code: "model/unsupported", context: expect.objectContaining({ what, value }) }),
      );
      expect(() => parseConfig({ ...TINY_CONFIG, quantization_config })).toThrow(
        expect.objectContaining({ code: "model/unsupported" }),
      );
    });

  test("by fewbit is outlined as it was saved; others are refused an outline", async () => {
    await using device = await open({ prefer: ["reference"] });
    const of = (quantization_config: object | null, quantize: string) =>
      outlineModel({ ...TINY_CONFIG, quantization_config }, { device, quantize }).bytes.weights;
    expect(of({ quant_method: "fewbit", version: 1, quantize: "int8wo" }, "none")).toBe(of(null, "int8wo"));
    expect(of(null, "int8wo")).toBeLessThan(of(null, "none"));
    expect(() => of({ quant_method: "gptq", bits: 4 }, "none")).toThrow(
      expect.objectContaining({ code: "model/unsupported" }),
    );
  });

  test("whose zero points are not those of a symmetric weight is refused when it says it is one", async () => {
    await using device = await open({ prefer: ["reference"] });
    const format = withScale(FORMATS.uint4, { block: [1, 32], codec: CODECS.f16 });
    const { stored } = pair(format, gptq, { quant_method: "gptq", bits: 4, group_size: 32, sym: true });
    const error = await failure(loadModel(stored, { device }));
    expect(error).toMatchObject({ code: "io/malformed" });
    expect(error.message).toContain("declared symmetric");
  });
});
