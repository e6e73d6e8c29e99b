import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { quantizeObstacle } from "../../src/backends/webgpu/kernels/quantize.js";
import { type FloatType, f32FromBits, roundTo } from "../../src/core/dtype.js";
import { decode } from "../../src/formats/codec.js";
import { codecBits, extentOf, type Format, formatKey } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { openTestGpu, type TestGpu } from "../support/gpu.js";
import { differences, quantizeOnGpu } from "../support/quantized.js";
import { SEED } from "../support/seed.js";

let gpu: TestGpu;
beforeAll(async () => {
  gpu = await openTestGpu();
});
afterAll(() => gpu?.destroy());

const CAPACITY = 4;
const formats = Object.values(FORMATS).filter((format) => quantizeObstacle(format) === null);

describe(`quantize in WGSL = in TypeScript, seed ${SEED}`, () => {
  test.each(formats.map((format, i) => [formatKey(format), format, i] as const))("%s", async (_, format, index) => {
    // One dtype and mode per format keeps the number of shaders small; the seed decides which.
    const dtype = (["f32", "bf16", "f16"] as const)[(SEED + index) % 3] as FloatType;
    const numerics = (SEED + index) % 2 === 0 ? "guarded" : "torchao";
    const k = Math.max(64, ...format.scales.map((level) => extentOf(level.block[1], 64)));
    await fc.assert(
      fc.asyncProperty(matrix(format, k), async (values) => {
        const data = Float32Array.from(values, (value) => roundTo(dtype, value));
        const shape = [data.length / k, k] as const;
        const expected = quantizeTensor(data, shape, dtype, format, { numerics });
        const got = await quantizeOnGpu(gpu, format, data, shape, { dtype, numerics }, CAPACITY);
        expect(differences(got, expected), `${dtype}, ${numerics}`).toEqual([]);
      }),
      { numRuns: 25, seed: SEED },
    );
  });
});

/** Up to CAPACITY rows of k float32 numbers, each row of one kind: any bits, one binade, steps and half steps, codec values. */
function matrix(format: Format, k: number): fc.Arbitrary<number[]> {
  const bits = codecBits(format.element);
  const fixed = bits <= 8 && !(format.element.kind === "lut" && format.element.entries === "learned");
  const code = fc.nat(2 ** Math.min(bits, 8) - 1).map((value) => (fixed ? decode(format.element, value) : value));
  const finiteCode = code.map((value) => (Number.isFinite(value) ? value : 1));
  const exponent = fc.integer({ min: -126, max: 100 });
  const kinds = [
    fc.nat(0xffffffff).map(f32FromBits),
    fc.float({ noDefaultInfinity: true, noNaN: true }),
    fc.float(),
    fc.float({ min: 1, max: 2, noNaN: true }),
    fc.integer({ min: -40, max: 40 }).map((n) => n / 2),
    finiteCode,
    fc.tuple(finiteCode, finiteCode).map(([a, b]) => (a + b) / 2),
  ];
  const row = fc
    .tuple(fc.oneof(...kinds.map((kind) => fc.array(kind, { minLength: k, maxLength: k }))), fc.option(exponent))
    .map(([values, power]) => (power === null ? values : values.map((value) => value * 2 ** power)));
  return fc.array(row, { minLength: 1, maxLength: CAPACITY }).map((rows) => rows.flat().map(Math.fround));
}
