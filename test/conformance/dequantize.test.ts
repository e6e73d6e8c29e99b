import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { f32Bits } from "../../src/core/dtype.js";
import { decode } from "../../src/formats/codec.js";
import {
  blockGrid,
  codecBits,
  codecName,
  codecVector,
  type Format,
  formatKey,
  withScale,
} from "../../src/formats/format.js";
import { packFlat, packRows } from "../../src/formats/pack.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor } from "../../src/formats/tensor.js";
import { randomWords, sameNumber } from "../support/codecs.js";
import { openTestGpu, type TestGpu } from "../support/gpu.js";
import { dequantizeOnGpu } from "../support/quantized.js";

let gpu: TestGpu;
beforeAll(async () => {
  gpu = await openTestGpu();
});
afterAll(() => gpu?.destroy());

const table = Object.values(FORMATS);
const others = [
  withScale(FORMATS.float8_e4m3, { block: ["all", "all"] }),
  withScale(FORMATS.float8_e5m2, { block: [128, 128] }),
  withScale(FORMATS.int4_plain, { codec: CODECS.f32, zero: CODECS.f32 }),
  withScale(FORMATS.uint3, { block: [1, 32] }),
];
const formats = [...table, ...others].map((format) => [formatKey(format), format] as const);

describe.each(formats)("dequantize %s", (_, format) => {
  test("every code and any scale", async () => {
    const tensor = randomTensor(format, [256, 512], 7);
    const values = await dequantizeOnGpu(gpu, tensor);
    const expected = dequantize(tensor);
    const wrong = [...expected.keys()].filter((i) => !close(format, values[i] as number, expected[i] as number));
    expect(wrong.slice(0, 5).map((i) => [i, values[i], expected[i]])).toEqual([]);
  });
});

/** One rounding wherever the value is a product, or a sum whose product is exact; else half a unit of the product more. */
function close(format: Format, got: number, exact: number): boolean {
  if (sameNumber(f32Bits(got), f32Bits(Math.fround(exact)))) return true;
  const second =
    format.zero.domain !== "none" &&
    (format.zero.domain === "int" || codecName((format.scales[0] as { codec: typeof CODECS.f32 }).codec) === "f32");
  return (
    second &&
    Math.abs(got - exact) <=
      2 ** -23 * Math.max(Math.abs(exact), 2 ** -126, format.zero.domain === "float" ? LARGEST_ZERO : 0)
  );
}
const LARGEST_ZERO = 8;

/** All codes in every row, scales of all sizes (a few of them special), zero points up to LARGEST_ZERO. */
function randomTensor(format: Format, shape: readonly [number, number], seed: number): QuantizedTensor {
  const next = randomWords(seed);
  const [rows, k] = shape;
  const [patchRows, patchK] = codecVector(format.element);
  const bits = codecBits(format.element);
  const [codeRows, codeColumns] = [rows / patchRows, k / patchK];
  const codes = Array.from({ length: codeRows * codeColumns }, (_, i) =>
    bits === 32 ? next() : (i + (next() & 1)) % 2 ** bits,
  );
  const blocks = (level: number) => {
    const block = format.scales[level]?.block;
    return block === undefined ? 0 : blockGrid(block, shape).reduce((a, b) => a * b, 1);
  };
  const scales = format.scales.map((level, i) => {
    const width = codecBits(level.codec);
    return packFlat(
      Array.from({ length: blocks(i) }, () => next() >>> (32 - width)),
      width,
    );
  });
  const { zero, element } = format;
  if (zero.domain === "none")
    return { format, shape, qdata: packRows(codes, codeRows, codeColumns, bits), scales, ...tableOf(element, next) };
  const width = codecBits(zero.codec);
  const zeros = Array.from({ length: blocks(0) }, () => {
    const code = next() >>> (32 - width);
    return Math.abs(decode(zero.codec, code)) <= LARGEST_ZERO ? code : 0;
  });
  return { format, shape, qdata: packRows(codes, codeRows, codeColumns, bits), scales, zero: packFlat(zeros, width) };
}

function tableOf(element: Format["element"], next: () => number): { table?: Float32Array } {
  if (element.kind !== "lut" || element.entries !== "learned") return {};
  const length = 2 ** element.bits * element.vector[0] * element.vector[1];
  return { table: Float32Array.from({ length }, () => (next() / 2 ** 31 - 1) * 3) };
}
