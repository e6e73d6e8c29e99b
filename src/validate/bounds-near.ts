import { sizeOf } from "../core/shape.js";
import type { HostTensor } from "../ir/tensor.js";
import type { Drawn } from "./bounds-sample.js";
import type { Stored } from "./bounds-stored.js";

/** The unit roundoff of float32: one correctly rounded operation is off by at most U times its result. */
export const U = 2 ** -24;
/** One ulp is at most this part of a number; WGSL states accuracies in ulp. */
export const ULP = 2 * U;
/** WGSL may flush a result below this to zero. */
export const TINY = 2 ** -126;

/** float32 results: exact values in float64 and how far from each a correct backend may be. */
export interface Near {
  readonly kind: "near";
  readonly shape: readonly number[];
  readonly values: Float64Array;
  readonly error: Float64Array;
}
/** Results that have one right answer. */
export interface Equal {
  readonly kind: "equal";
  readonly tensor: HostTensor;
}
/** What a correct backend may answer. docs/numerics.md derives every bound. */
export type Allowed = Near | Equal | Stored | Drawn;

/** Half an ulp of a float32 result that is `value`, or anything within `slack` of it. */
export function halfUlp(value: number, slack = 0): number {
  const magnitude = Math.abs(value) + slack;
  if (!(magnitude >= TINY)) return TINY;
  return 2 ** (Math.floor(Math.log2(magnitude)) - 24) || TINY;
}

/** Accuracies that WGSL states ("Accuracy of Concrete Floating Point Expressions"), as relative errors. */
export const ACCURACY = {
  /** 2.5 ulp. */
  divide: 2.5 * ULP,
  /** Inherited from 1 / inverseSqrt(x): 2 ulp and a division. */
  sqrt: 2 * ULP + 2.5 * ULP,
  /** 3 + 2 |x| ulp. */
  exp: (x: number) => (3 + 2 * Math.abs(x)) * ULP,
  /** An absolute error. */
  tanh: 1e-5,
} as const;

export const near = (allowed: Allowed | undefined): Near => {
  if (allowed?.kind === "near") return allowed;
  throw new Error("a float32 operand is expected");
};
export const tensorOf = (allowed: Allowed | undefined): HostTensor => {
  if (allowed?.kind === "equal") return allowed.tensor;
  if (allowed?.kind === "near") return { dtype: "f32", shape: allowed.shape, data: Float32Array.from(allowed.values) };
  throw new Error("an exact operand is expected");
};
export const floats = (allowed: Allowed | undefined): Float64Array => near(allowed).values;
export const result = (
  shape: readonly number[],
  value: (i: number) => readonly [value: number, error: number],
): Near[] => {
  const count = sizeOf(shape);
  const [values, error] = [new Float64Array(count), new Float64Array(count)];
  for (let i = 0; i < count; i++) [values[i], error[i]] = value(i) as [number, number];
  return [{ kind: "near", shape, values, error }];
};
