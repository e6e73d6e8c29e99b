import { describe, expect, test } from "vitest";
import { matmul, products } from "../../src/core/matmul.js";
import { randomUniform } from "../support/tiny-model.js";

const matrix = (size: number, seed: number) => Float64Array.from({ length: size }, randomUniform(seed));

/** The definition: one sum after the other, in order of k, from the bias on. */
function plainly(
  x: Float64Array,
  w: Float64Array,
  [rows, n, k]: readonly [number, number, number],
  bias?: Float32Array,
) {
  return Float64Array.from({ length: rows * n }, (_, at) => {
    const [row, column] = [Math.floor(at / n), at % n];
    let sum = bias?.[column] ?? 0;
    for (let i = 0; i < k; i++) sum += (x[row * k + i] as number) * (w[column * k + i] as number);
    return sum;
  });
}

describe("matmul", () => {
  // Tiles are 4 x 4 and panels have 64 columns: whole ones, parts of one, and fewer rows than a tile.
  test.each([
    [8, 128, 32],
    [5, 70, 37],
    [4, 1, 1],
    [3, 9, 16],
    [9, 4, 0],
    [130, 65, 3],
  ] as const)("of %d rows, %d columns and k = %d gives the bits of the plain loop", (rows, n, k) => {
    const [x, w] = [matrix(rows * k, 1), matrix(n * k, 2)];
    const bias = Float32Array.from(matrix(n, 3));
    expect(products(x, w, [rows, n, k])).toEqual(plainly(x, w, [rows, n, k]));
    expect(matmul(x, w, [rows, n, k], bias)).toEqual(Float32Array.from(plainly(x, w, [rows, n, k], bias)));
  });

  test("keeps what is not finite to its own row and column", () => {
    const [rows, n, k] = [8, 8, 8] as const;
    const [x, w] = [matrix(rows * k, 4), matrix(n * k, 5)];
    x[3 * k] = Number.NaN;
    w[6 * k + 1] = Number.POSITIVE_INFINITY;
    const got = products(x, w, [rows, n, k]);
    for (const [at, value] of got.entries()) {
      expect(Number.isFinite(value)).toBe(Math.floor(at / n) !== 3 && at % n !== 6);
    }
  });

  test("memory grows with the operands, and smaller ones after larger ones are right", () => {
    const large = [64, 64, 3000] as const;
    const small = [4, 4, 2] as const;
    for (const extents of [small, large, small]) {
      const [x, w] = [matrix(extents[0] * extents[2], 6), matrix(extents[1] * extents[2], 7)];
      expect(products(x, w, extents)).toEqual(plainly(x, w, extents));
    }
  });
});
