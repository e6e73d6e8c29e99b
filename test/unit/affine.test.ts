import { describe, expect, test } from "vitest";
import {
  blocksOf,
  chooseQParams,
  chooseQParamsWithMinMax,
  dequantizeAffine,
  fakeQuantizeAffine,
  quantizeAffine,
} from "../../src/quantize/affine.js";

const data = Float32Array.from({ length: 96 }, (_, i) => Math.fround(Math.sin(i * 12.9898) * 3));
const range = { min: -8, max: 7 } as const;

describe("chooseQParams", () => {
  const base = { mapping: "symmetric", dtype: "f32", ...range } as const;

  test("blocks of any rank, and the shape with and without kept dimensions", () => {
    const shapes: [number[], number[], number[], number[]][] = [
      [[96], [96], [], [1]],
      [[4, 24], [1, 24], [4], [4, 1]],
      [[4, 24], [4, 24], [], [1, 1]],
      [
        [4, 24],
        [2, 8],
        [2, 3],
        [2, 3],
      ],
      [
        [2, 2, 24],
        [1, 1, 24],
        [2, 2],
        [2, 2, 1],
      ],
      [[1, 96], [1, 96], [1], [1, 1]],
      [
        [2, 12, 2, 2],
        [1, 4, 1, 1],
        [2, 3, 2, 2],
        [2, 3, 2, 2],
      ],
    ];
    for (const [shape, blockSize, dropped, kept] of shapes) {
      expect(chooseQParams(data, shape, { ...base, blockSize }).shape).toEqual(dropped);
      const chosen = chooseQParams(data, shape, { ...base, blockSize, keepdim: true });
      expect(chosen.shape).toEqual(kept);
      expect(chosen.scale).toHaveLength(kept.reduce((a, b) => a * b, 1));
    }
  });

  test("symmetric divides by half the range, asymmetric by the range, and no-clipping by each side", () => {
    const values = Float32Array.of(-3, 6);
    const of = (mapping: "symmetric" | "asymmetric" | "symmetric_no_clipping_err") =>
      chooseQParams(values, [2], { ...base, mapping, blockSize: [2] });
    expect(of("symmetric").scale[0]).toBe(Math.fround(6 / 7.5));
    expect(of("asymmetric").scale[0]).toBe(Math.fround(9 / 15));
    expect(of("asymmetric").zero[0]).toBe(-3);
    expect(of("symmetric_no_clipping_err").scale[0]).toBe(Math.fround(6 / 7));
  });

  test("bfloat16 rounds after every operation", () => {
    const values = Float32Array.of(-1, 2.015625);
    const { scale } = chooseQParams(values, [2], { ...base, mapping: "asymmetric", dtype: "bf16", blockSize: [2] });
    expect(scale[0]).toBe(0.201171875);
  });

  test("a block of zeros has the dtype's smallest normal number as its scale", () => {
    for (const [dtype, eps] of [
      ["f32", 2 ** -126],
      ["bf16", 2 ** -126],
      ["f16", 2 ** -14],
    ] as const) {
      expect(chooseQParams(new Float32Array(4), [4], { ...base, dtype, blockSize: [4] }).scale[0]).toBe(eps);
    }
  });

  test("the float domain holds the value of the middle code", () => {
    const options = { mapping: "asymmetric", domain: "float", min: 0, max: 15, dtype: "f32" } as const;
    const { scale, zero } = chooseQParams(Float32Array.of(2, 17), [2], { ...options, blockSize: [2] });
    expect([scale[0], zero[0]]).toEqual([1, 10]);
  });

  test("one bit: the literal symmetric rule has no codes, the guarded one has", () => {
    const values = Float32Array.of(-4, -1, 0, -3);
    const options = { ...base, min: -1, max: 0, blockSize: [4] };
    const codesOf = (numerics: "guarded" | "torchao") => {
      const chosen = chooseQParams(values, [4], { ...options, numerics });
      return [...quantizeAffine(values, [4], "f32", chosen, options)];
    };
    expect(codesOf("torchao")).toEqual([0, 0, 0, 0]);
    expect(codesOf("guarded")).toEqual([-1, 0, 0, -1]);
  });

  test("NaN reaches the scale of its block only", () => {
    const values = Float32Array.of(1, Number.NaN, 1, 2);
    const { scale } = chooseQParams(values, [4], { ...base, blockSize: [2] });
    expect(scale[0]).toBeNaN();
    expect(scale[1]).toBe(Math.fround(2 / 7.5));
  });
});

describe("quantize and dequantize", () => {
  test("a value comes back within half a step, or one where the range clips", () => {
    for (const mapping of ["symmetric", "symmetric_no_clipping_err", "asymmetric"] as const) {
      const options = { ...range, blockSize: [1, 12] };
      const chosen = chooseQParams(data, [8, 12], { ...options, mapping, dtype: "f32" });
      const codes = quantizeAffine(data, [8, 12], "f32", chosen, options);
      const back = dequantizeAffine(codes, [8, 12], "f32", chosen, options);
      for (let i = 0; i < data.length; i++) {
        const step = chosen.scale[Math.floor(i / 12)] as number;
        const clipped = codes[i] === range.max || codes[i] === range.min;
        expect(Math.abs((back[i] as number) - (data[i] as number))).toBeLessThanOrEqual(
          (clipped ? 1 : 0.5) * step * 1.0001,
        );
      }
    }
  });

  test("fake quantization is quantize, then dequantize", () => {
    const options = { ...range, blockSize: [12] };
    const chosen = chooseQParams(data, [96], { ...options, mapping: "asymmetric", dtype: "f32" });
    const codes = quantizeAffine(data, [96], "f32", chosen, options);
    expect(fakeQuantizeAffine(data, [96], "f32", chosen, options)).toEqual(
      dequantizeAffine(codes, [96], "f32", chosen, options),
    );
  });

  test("multiplies by a reciprocal: not the same as a division", () => {
    // 1/49 rounds down, so 49 * (1/49) is just below 1: halfway cases go the other way.
    const scale = Float32Array.of(49);
    const qparams = { scale, zero: Float32Array.of(0), scaleDtype: "f32" } as const;
    const x = Float32Array.of(24.5);
    expect(Math.fround(24.5 * Math.fround(1 / 49))).toBeLessThanOrEqual(0.5);
    expect([...quantizeAffine(x, [1], "f32", qparams, { min: -8, max: 7, blockSize: [1] })]).toEqual([0]);
  });
});

describe("bad input", () => {
  test("a block that does not divide names the dimension and the nearest size", () => {
    expect(() => blocksOf([4, 100], [1, 32])).toThrow(
      /dimension 1 = 100 is not a multiple of its block 32; nearest legal dimension 1 is 96/,
    );
    expect(() => blocksOf([4], [1, 1])).toThrow(expect.objectContaining({ code: "shape/mismatch" }));
  });

  test("impossible domains and ranges", () => {
    const one = Float32Array.of(1);
    const options = { dtype: "f32", min: 0, max: 15 } as const;
    expect(() => chooseQParamsWithMinMax(one, one, { ...options, mapping: "symmetric", domain: "float" })).toThrow(
      /expected asymmetric/,
    );
    expect(() => chooseQParamsWithMinMax(one, one, { ...options, mapping: "symmetric", min: 15 })).toThrow(
      /less than max = 15/,
    );
    const bare = { scale: one, zero: new Float32Array(0), scaleDtype: "f32" } as const;
    expect(() => quantizeAffine(one, [1], "f32", bare, { min: 0, max: 15, blockSize: [1] })).toThrow(
      /symmetric callers pass zeros/,
    );
    expect([...quantizeAffine(one, [1], "f32", bare, { min: 0, max: 15, blockSize: [1], domain: "none" })]).toEqual([
      1,
    ]);
  });
});
