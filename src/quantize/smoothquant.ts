import { type FloatType, roundTo } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";

/** What SmoothQuant makes of a layer (specification 17.1). */
export interface Smoothed {
  /** [k]: the weight's columns were multiplied by it. */
  readonly factor: Float32Array;
  /** [n, k], to be quantized. */
  readonly weight: Float32Array;
  /** [k]: multiplies the activation before it is quantized. */
  readonly preScale: Float32Array;
}

/** The largest magnitude of every column of [rows, k], merged into `into`: what calibration keeps of a batch. */
export function columnMaxima(data: Float32Array, k: number, into: Float32Array = new Float32Array(k)): Float32Array {
  for (let i = 0; i < data.length; i++) into[i % k] = Math.max(into[i % k] as number, Math.abs(data[i] as number));
  return into;
}

/**
 * Moves activation outliers into the weight [n, k] (17.1): factor = ax^alpha / aw^(1 - alpha), both maxima raised by
 * 2^-23; alpha null leaves the layer as it is. `activationMax` [k] is `columnMaxima` of all calibration inputs.
 */
export function smoothWeight(
  weight: Float32Array,
  activationMax: Float32Array,
  dtype: FloatType,
  alpha: number | null = 0.5,
): Smoothed {
  if (alpha !== null && !(alpha >= 0 && alpha <= 1)) {
    throw new FewbitError("argument/invalid", { name: "alpha", value: alpha, expected: "0 to 1, or null" });
  }
  const k = activationMax.length;
  const weightMax = columnMaxima(weight, k);
  const raised = (value: number, power: number) => roundTo(dtype, roundTo(dtype, value + 2 ** -23) ** power);
  const factor = Float32Array.from(activationMax, (ax, i) =>
    alpha === null ? 1 : roundTo(dtype, raised(ax, alpha) / raised(weightMax[i] as number, 1 - alpha)),
  );
  return {
    factor,
    weight: Float32Array.from(weight, (value, i) => roundTo(dtype, value * (factor[i % k] as number))),
    preScale: factor.map((value) => roundTo(dtype, 1 / value)),
  };
}
