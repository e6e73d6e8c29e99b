import { type FloatType, roundTo } from "../core/dtype.js";
import { ROUND } from "./affine.js";

/**
 * A function that writes nf4 codes of x[begin .. end) under one absmax (specification 15): the first table entry
 * nearest to x / absmax, every operation rounded to `dtype`.
 */
export function nf4Coder(table: ArrayLike<number>, dtype: FloatType) {
  const last = table.length - 1;
  return (absmax: number, x: Float32Array, begin: number, end: number, out: Int32Array, at: number): void => {
    for (let i = begin; i < end; i++) {
      const ratio = roundTo(dtype, (x[i] as number) / absmax);
      // The table is sorted, so only the two entries around the ratio can be nearest, also after rounding.
      let low = 0;
      let high = last;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (ratio >= (table[middle] as number)) low = middle;
        else high = middle;
      }
      const below = Math.abs(roundTo(dtype, ratio - (table[low] as number)));
      const above = Math.abs(roundTo(dtype, ratio - (table[high] as number)));
      out[at + i - begin] = above < below ? high : Number.isNaN(ratio) ? 0 : low;
    }
  };
}

/** Double quantization of block scales (specification 15). */
export interface QuantizedScalers {
  /** int8 codes, one per block. */
  readonly quantized: Int8Array;
  /** One per `scalers` blocks. */
  readonly factor: Float32Array;
  readonly mean: number;
  /** What the stored parts mean: the scale of each block. */
  readonly scales: Float32Array;
}

/** Quantizes the absmax values of all blocks, `scalers` at a time (the last group may be short), in `dtype`. */
export function quantizeScalers(absmax: Float32Array, dtype: FloatType, scalers: number): QuantizedScalers {
  const count = absmax.length;
  let sum = 0;
  for (let i = 0; i < count; i++) sum += absmax[i] as number;
  const mean = roundTo(dtype, sum / Math.max(count, 1));
  const quantized = new Int8Array(count);
  const factor = new Float32Array(Math.ceil(count / scalers));
  for (let group = 0; group < factor.length; group++) {
    const [begin, end] = [group * scalers, Math.min((group + 1) * scalers, count)];
    let largest = 0;
    for (let i = begin; i < end; i++)
      largest = Math.max(largest, Math.abs(roundTo(dtype, (absmax[i] as number) - mean)));
    const scale = roundTo(dtype, roundTo(dtype, 1 / (2 * largest)) * 256);
    factor[group] = scale;
    for (let i = begin; i < end; i++) {
      const code = roundTo(dtype, roundTo(dtype, (absmax[i] as number) - mean) * scale) + ROUND - ROUND;
      // Equal scalers all: 0 * infinity is NaN, which an Int8Array holds as 0, as it should be.
      quantized[i] = code < -128 ? -128 : code > 127 ? 127 : code;
    }
  }
  return { quantized, factor, mean, scales: scalersOf({ quantized, factor, mean }, dtype, scalers) };
}

/** The block scales that quantized scalers mean. */
export function scalersOf(parts: Omit<QuantizedScalers, "scales">, dtype: FloatType, scalers: number): Float32Array {
  return Float32Array.from(parts.quantized, (code, i) => {
    const factor = parts.factor[Math.floor(i / scalers)] as number;
    return roundTo(dtype, roundTo(dtype, code / factor) + parts.mean);
  });
}
