import { shapeRows } from "../ir/ops.js";
import { ACCURACY, halfUlp, type Near, result, U } from "./bounds-near.js";

/** A sum of squares, a mean, a root, a reciprocal, two products: every part's relative error adds up. */
export function rmsnormBound(source: Near, gain: Near, eps: number, groups: number): Near[] {
  const [rows, all] = shapeRows(source.shape);
  const width = all / groups;
  const factors = Array.from({ length: rows * groups }, (_, group) => {
    let [sum, slack] = [0, 0];
    for (let i = group * width; i < (group + 1) * width; i++) {
      const [value, error] = [source.values[i] as number, source.error[i] as number];
      sum += value ** 2;
      slack += 2 * Math.abs(value) * error + error ** 2;
    }
    const mean = sum / width + eps;
    const relative = (2 * Math.sqrt(width) + 1) * U + ACCURACY.divide + 2 * U + slack / width / mean;
    return [1 / Math.sqrt(mean), relative / 2 + ACCURACY.sqrt + ACCURACY.divide] as const;
  });
  return result(source.shape, (i) => {
    const [factor, relative] = factors[Math.floor(i / width)] as readonly [number, number];
    const scale = factor * (gain.values[i % width] as number);
    const value = (source.values[i] as number) * scale;
    return [value, Math.abs(value) * (relative + U) + Math.abs(scale) * (source.error[i] as number) + halfUlp(value)];
  });
}

/**
 * A mean, differences from it, their mean square, and what rmsnorm does then. What the mean itself is off by moves all differences
 * alike, and their squares only in the second order, because the differences add up to zero.
 */
export function layernormBound(source: Near, gain: Near, shift: Near | null, eps: number): Near[] {
  const [rows, width] = shapeRows(source.shape);
  const root = 2 * Math.sqrt(width);
  const stats = Array.from({ length: rows }, (_, row) => {
    const [values, errors] = [source.values, source.error].map((list) => list.subarray(row * width, (row + 1) * width));
    const average = (of: (value: number, error: number) => number) =>
      (values as Float64Array).reduce((sum, value, i) => sum + of(value, errors?.[i] as number), 0) / width;
    const mean = average((value) => value);
    const common = (root * U + ACCURACY.divide) * average(Math.abs) + average((_value, error) => error);
    const own = (value: number, error: number) => error + U * (Math.abs(value - mean) + common);
    const variance = average((value) => (value - mean) ** 2);
    const slack = average((value, error) => {
      const off = own(value, error);
      return 2 * Math.abs(value - mean) * off + (off + common) ** 2;
    });
    const relative = ((root + 1) * U * variance + ACCURACY.divide * variance + slack) / (variance + eps) + 2 * U;
    return { mean, common, own, factor: 1 / Math.sqrt(variance + eps), relative };
  });
  return result(source.shape, (i) => {
    const { mean, common, own, factor, relative } = stats[Math.floor(i / width)] as (typeof stats)[number];
    const [value, error] = [source.values[i] as number, source.error[i] as number];
    const scale = factor * (gain.values[i % width] as number);
    const scaled = (value - mean) * scale;
    const root = relative / 2 + ACCURACY.sqrt + ACCURACY.divide;
    const off = Math.abs(scaled) * (root + 2 * U) + Math.abs(scale) * (own(value, error) + common) + halfUlp(scaled);
    if (shift === null) return [scaled, off];
    const sum = scaled + (shift.values[i % width] as number);
    return [sum, off + (shift.error[i % width] as number) + halfUlp(sum, off)];
  });
}
