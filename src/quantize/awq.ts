import { type FloatType, roundTo } from "../core/dtype.js";
import type { Format } from "../formats/format.js";
import { dequantize, type QuantizedTensor } from "../formats/tensor.js";
import { type QuantizeOptions, quantizeTensor } from "./quantize.js";

/** What AWQ makes of a layer (specification 17.2). */
export interface Awq {
  readonly tensor: QuantizedTensor;
  /** [k]: the weight's columns were multiplied by it. */
  readonly scale: Float32Array;
  /** [k]: multiplies the activation. */
  readonly preScale: Float32Array;
  /** The exponent that won, in [0, 1). */
  readonly ratio: number;
}

/**
 * Activation-aware scales (17.2): of `searchSpace` exponents r, the one whose column scales mean|x|^r leave the
 * smallest output error over the calibration activations `x` [tokens, k], the first of equal ones.
 */
export function awqQuantize(
  weight: Float32Array,
  shape: readonly [n: number, k: number],
  dtype: FloatType,
  x: Float32Array,
  format: Format,
  options: QuantizeOptions & { searchSpace?: number } = {},
): Awq {
  const [, k] = shape;
  const tokens = x.length / k;
  const mean = new Float64Array(k);
  for (let i = 0; i < x.length; i++) mean[i % k] = (mean[i % k] as number) + Math.abs(x[i] as number) / tokens;
  const wanted = matmul(x, weight, tokens, shape);
  const steps = options.searchSpace ?? 20;
  let best: Awq | undefined;
  let least = Number.POSITIVE_INFINITY;
  for (let i = 0; i < steps; i++) {
    const ratio = i / steps;
    const raised = Float32Array.from(mean, (m) => Math.max(roundTo(dtype, Math.fround(m) ** ratio), 1e-4));
    const spread = Math.sqrt(
      raised.reduce((a, v) => Math.max(a, v), 0) * raised.reduce((a, v) => Math.min(a, v), Number.POSITIVE_INFINITY),
    );
    const scale = raised.map((value) => roundTo(dtype, value / roundTo(dtype, spread)));
    const scaled = Float32Array.from(weight, (value, j) => roundTo(dtype, value * (scale[j % k] as number)));
    const tensor = quantizeTensor(scaled, shape, dtype, format, options);
    const inputs = Float32Array.from(x, (value, j) => roundTo(dtype, value / (scale[j % k] as number)));
    const got = matmul(inputs, dequantize(tensor), tokens, shape);
    let loss = 0;
    for (let j = 0; j < got.length; j++) loss += ((got[j] as number) - (wanted[j] as number)) ** 2;
    if (loss < least) {
      least = loss;
      best = { tensor, scale, ratio, preScale: scale.map((value) => roundTo(dtype, 1 / value)) };
    }
  }
  return best as Awq;
}

function matmul(
  x: Float32Array,
  w: Float32Array | Float64Array,
  rows: number,
  [n, k]: readonly [number, number],
): Float64Array {
  const out = new Float64Array(rows * n);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < n; column++) {
      let sum = 0;
      for (let i = 0; i < k; i++) sum += (x[row * k + i] as number) * (w[column * k + i] as number);
      out[row * n + column] = sum;
    }
  }
  return out;
}
