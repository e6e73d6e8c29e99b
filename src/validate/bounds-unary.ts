import type { UnaryFn } from "../ir/ops.js";
import { ACCURACY, TINY, U } from "./bounds-near.js";

export interface UnaryBound {
  /** The largest slope of the function (its Lipschitz constant). */
  readonly slope: number;
  /** The error of computing it, beside the final rounding. */
  own(x: number, y: number, cap: number): number;
}

export const UNARY_BOUNDS: Readonly<Record<UnaryFn, UnaryBound>> = {
  relu: { slope: 1, own: () => 0 },
  silu: {
    slope: 1.1,
    // x / (1 + e): e is off by exp's accuracy, the sum by a rounding, the quotient by a division's accuracy. Beyond 2^126 a
    // divisor has no stated accuracy; the result is then below 88 * 2^-126.
    own: (x, y) => {
      const e = Math.exp(-x);
      return Math.abs(y) * ((e / (1 + e)) * ACCURACY.exp(x) + U + ACCURACY.divide) + (x < -87 ? 128 * TINY : 0);
    },
  },
  sigmoid: {
    slope: 0.25,
    // As silu, with 1 in the place of x.
    own: (x, y) => {
      const e = Math.exp(-x);
      return y * ((e / (1 + e)) * ACCURACY.exp(x) + U + ACCURACY.divide) + (x < -87 ? 2 * TINY : 0);
    },
  },
  softcap: {
    slope: 1,
    // tanh as 1 - 2 / (exp(2|z|) + 1) is within 16u of itself whatever z is, as in attention; then a product.
    own: (_, y, cap) => 16 * U * cap + U * Math.abs(y),
  },
  gelu_tanh: {
    slope: 1.13,
    // tanh(g) within 1e-5, moved by g's own six roundings (its slope is 1 - tanh^2); then a sum and two products.
    own: (x, y) => {
      const g = Math.sqrt(2 / Math.PI) * (Math.abs(x) + 0.044715 * Math.abs(x) ** 3);
      const moved = (1 - Math.tanh(g) ** 2) * 6 * U * g;
      return 0.5 * Math.abs(x) * (ACCURACY.tanh + moved + U) + 2 * U * Math.abs(y);
    },
  },
  gelu: {
    slope: 1.13,
    // x/2 * erfc(-x / sqrt 2) = t exp(-z^2 + p(t)), or 2 minus it: the approximation's 1.2e-7, the exponent's error (5 roundings
    // of z^2; Horner's 18 over coefficients that sum to 7.3, and t's own 6 through p' <= 4), exp's accuracy, t's and a product.
    own: (x, y) => {
      const z = Math.abs(x) / Math.SQRT2;
      const exponent = 5 * z * z * U + (18 * 7.3 + 4 * 6) * U;
      const tail = 1.2e-7 + exponent + ACCURACY.exp(z * z + 1.3) + 7 * U;
      const erfc = x >= 0 ? 2 - (2 * y) / (x || 1) : (2 * y) / x;
      return 0.5 * Math.abs(x) * (Math.abs(erfc) * tail + U) + 2 * U * Math.abs(y);
    },
  },
};
