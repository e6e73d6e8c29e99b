import { type FloatType, roundTo } from "../core/dtype.js";
import { products } from "../core/matmul.js";
import type { Format } from "../formats/format.js";
import { dequantize, type QuantizedTensor } from "../formats/tensor.js";
import { type QuantizeOptions, quantizeTensor } from "./quantize.js";
import { type InputStatistics, outputError } from "./statistics.js";

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
  const wanted = products(Float64Array.from(x), Float64Array.from(weight), [tokens, shape[0], k]);
  let best: Awq | undefined;
  let least = Number.POSITIVE_INFINITY;
  for (const { ratio, scale } of candidateScales(mean, dtype, options.searchSpace)) {
    const tensor = quantizeTensor(scaleColumns(weight, scale, dtype), shape, dtype, format, options);
    const inputs = Float64Array.from(x, (value, j) => roundTo(dtype, value / (scale[j % k] as number)));
    const got = products(inputs, dequantize(tensor), [tokens, shape[0], k]);
    let loss = 0;
    for (let j = 0; j < got.length; j++) loss += ((got[j] as number) - (wanted[j] as number)) ** 2;
    if (loss < least) {
      least = loss;
      best = { tensor, scale, ratio, preScale: scale.map((value) => roundTo(dtype, 1 / value)) };
    }
  }
  return best as Awq;
}

/**
 * The column scales [k] of `awqQuantize`'s search, chosen by statistics of the inputs instead of the inputs themselves, for the weights
 * of all linears that read the same input. `tie` maps columns to the scale they share (default: each its own).
 */
export function awqScale(
  weights: readonly {
    readonly data: Float32Array;
    readonly shape: readonly [n: number, k: number];
    readonly format: Format;
  }[],
  dtype: FloatType,
  statistics: InputStatistics,
  options: QuantizeOptions & { searchSpace?: number; tie?: (column: number) => number } = {},
): Float32Array {
  const { k, tokens } = statistics;
  const { tie = (column) => column } = options;
  const [shared, count] = [new Float64Array(k), new Float64Array(k)];
  for (let i = 0; i < k; i++) {
    shared[tie(i)] = (shared[tie(i)] as number) + (statistics.magnitudes[i] as number) / tokens;
    count[tie(i)] = (count[tie(i)] as number) + 1;
  }
  const mean = Float64Array.from({ length: k }, (_, i) => (shared[tie(i)] as number) / (count[tie(i)] as number));
  let best: Float32Array | undefined;
  let least = Number.POSITIVE_INFINITY;
  for (const { scale } of candidateScales(mean, dtype, options.searchSpace)) {
    let loss = 0;
    for (const { data, shape, format } of weights) {
      const tensor = quantizeTensor(scaleColumns(data, scale, dtype), shape, dtype, format, options);
      const error = dequantize(tensor);
      for (let j = 0; j < error.length; j++)
        error[j] = (error[j] as number) / (scale[j % k] as number) - (data[j] as number);
      loss += outputError(error, statistics);
    }
    if (loss < least) {
      least = loss;
      best = scale;
    }
  }
  return best as Float32Array;
}

/** W diag(scale), rounded to `dtype`. */
export function scaleColumns(weight: Float32Array, scale: Float32Array, dtype: FloatType): Float32Array {
  const k = scale.length;
  return weight.map((value, j) => roundTo(dtype, value * (scale[j % k] as number)));
}

function* candidateScales(mean: Float64Array, dtype: FloatType, steps = 20) {
  for (let i = 0; i < steps; i++) {
    const ratio = i / steps;
    const raised = Float32Array.from(mean, (m) => Math.max(roundTo(dtype, Math.fround(m) ** ratio), 1e-4));
    const spread = Math.sqrt(
      raised.reduce((a, v) => Math.max(a, v), 0) * raised.reduce((a, v) => Math.min(a, v), Number.POSITIVE_INFINITY),
    );
    yield { ratio, scale: raised.map((value) => roundTo(dtype, value / roundTo(dtype, spread))) };
  }
}
