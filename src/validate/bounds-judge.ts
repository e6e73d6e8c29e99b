import { f32FromBits } from "../core/dtype.js";
import { blockGrid, codecBits, formatKey } from "../formats/format.js";
import { unpackFlat } from "../formats/pack.js";
import { dequantize, type QuantizedTensor } from "../formats/tensor.js";
import { type DenseTensor, type HostTensor, isDense } from "../ir/tensor.js";
import { type Allowed, halfUlp } from "./bounds.js";

/** The element that is worst off. */
export interface Deviation {
  readonly index: number;
  readonly got: number;
  readonly expected: number;
  readonly bound: number;
}

/** How one output compares with what is allowed. */
export interface Verdict {
  /** The largest error as a fraction of its bound: at most 1 passes. Exact comparisons give 0 or infinity. */
  readonly worst: number;
  readonly element: Deviation | null;
  /** Elements beyond their bound. */
  readonly failed: number;
  readonly total: number;
}

/** Compares a result with what is allowed. Only the elements that `allowed` has are looked at. */
export function judge(allowed: Allowed, got: HostTensor): Verdict {
  switch (allowed.kind) {
    case "near":
      return compare((got as DenseTensor).data, allowed.values, (i) => allowed.error[i] as number);
    case "equal":
      return isDense(allowed.tensor)
        ? compare((got as DenseTensor).data, allowed.tensor.data, () => 0)
        : compareStored(got as QuantizedTensor, allowed.tensor);
    case "stored": {
      const { error, tensor } = allowed;
      if (error.every((e) => e === 0)) return compareStored(got as QuantizedTensor, tensor);
      return compare(dequantize(got as QuantizedTensor), dequantize(tensor), (i) => error[i] as number);
    }
    case "drawn": {
      const data = (got as DenseTensor).data;
      const id = data[0] as number;
      const legal = compare([id], [allowed.admissible.has(id) ? id : Math.min(...allowed.admissible)], () => 0);
      if (allowed.ids !== undefined)
        return merge(
          legal,
          compare(data.subarray(1), allowed.ids.data.subarray(1), () => 0),
        );
      const logprob = allowed.logprobs[id] ?? Number.NaN;
      return merge(
        legal,
        compare([f32FromBits(data[1] as number)], [logprob], () => allowed.error),
      );
    }
  }
}

/** Every element's error, for pictures; both arrays are empty for a drawn token, which has no error. */
export interface Deviations {
  /** As a fraction of the bound; infinite where an exact result is another. */
  readonly fractions: Float32Array;
  /** Signed, in units in the last place of the expected value as float32. Stored tensors are compared decoded. */
  readonly ulps: Float32Array;
}

/** Compares as `judge` does, element by element. */
export function deviations(allowed: Allowed, got: HostTensor): Deviations {
  const [data, expected, error] = valuesOf(allowed, got);
  const each = (value: (got: number, expected: number, bound: number) => number) =>
    Float32Array.from(expected, (e, i) => value(data[i] ?? Number.NaN, e, error?.[i] ?? 0));
  return {
    fractions: each(fraction),
    ulps: each((value, e) => (fraction(value, e, 1) === 0 ? 0 : (value - e) / (2 * halfUlp(e)))),
  };
}

type Values = ArrayLike<number>;

function valuesOf(allowed: Allowed, got: HostTensor): readonly [got: Values, expected: Values, error: Values | null] {
  if (allowed.kind === "drawn") return [[], [], null];
  if (allowed.kind === "near") return [(got as DenseTensor).data, allowed.values, allowed.error];
  const { tensor } = allowed;
  if (isDense(tensor)) return [(got as DenseTensor).data, tensor.data, null];
  return [dequantize(got as QuantizedTensor), dequantize(tensor), allowed.kind === "stored" ? allowed.error : null];
}

/**
 * The bits of a result that has one right answer, in the parts that every backend stores alike: an array's elements; codes, scales
 * and zero points. Null where more than one answer is right.
 */
export function exactBits(allowed: Allowed, got: HostTensor): Uint8Array[] | null {
  if (allowed.kind !== "equal" && !(allowed.kind === "stored" && allowed.error.every((e) => e === 0))) return null;
  const parts = isDense(got) ? [got.data] : storedCodes(got);
  return parts.map(({ buffer, byteOffset, byteLength }) => new Uint8Array(buffer, byteOffset, byteLength));
}

/** NaN only for NaN, an infinity only for that infinity. */
function fraction(got: number, expected: number, bound: number): number {
  if (Object.is(got, expected) || got === expected) return 0;
  if (Number.isNaN(got) || Number.isNaN(expected))
    return Number.isNaN(got) && Number.isNaN(expected) ? 0 : Number.POSITIVE_INFINITY;
  if (!Number.isFinite(got) || !Number.isFinite(expected)) return Number.POSITIVE_INFINITY;
  return Math.abs(got - expected) / bound;
}

function compare(got: ArrayLike<number>, expected: ArrayLike<number>, bound: (index: number) => number): Verdict {
  let [worst, at, failed] = [-1, -1, 0];
  for (let i = 0; i < expected.length; i++) {
    const part = fraction(got[i] ?? Number.NaN, expected[i] as number, bound(i));
    if (part > 1) failed++;
    if (part > worst) [worst, at] = [part, i];
  }
  const element =
    at < 0 ? null : { index: at, got: got[at] ?? Number.NaN, expected: expected[at] as number, bound: bound(at) };
  return { worst: Math.max(worst, 0), element, failed, total: expected.length };
}

function merge(a: Verdict, b: Verdict): Verdict {
  const worse = b.worst > a.worst ? b : a;
  return { ...worse, failed: a.failed + b.failed, total: a.total + b.total };
}

/** Codes (with the padding of their rows), scales and zero points bit for bit. */
function compareStored(got: QuantizedTensor, expected: QuantizedTensor): Verdict {
  if (formatKey(got.format) !== formatKey(expected.format)) return compare([Number.NaN], [0], () => 0);
  const [a, b] = [storedCodes(got), storedCodes(expected)];
  return b.map((part, i) => compare(a[i] as Uint32Array, part, () => 0)).reduce(merge);
}

/** The words of the codes; the codes of scales and zero points, whose last words may hold anything after them. */
function storedCodes({ format, shape, qdata, scales, zero }: QuantizedTensor): Uint32Array[] {
  const parts = format.scales.map((level, i) => ({ level, codec: level.codec, words: scales[i] }));
  const [first] = format.scales;
  if (format.zero.domain !== "none" && first !== undefined)
    parts.push({ level: first, codec: format.zero.codec, words: zero });
  return [
    qdata,
    ...parts.map(({ level, codec, words }) => {
      const [rows, columns] = blockGrid(level.block, shape);
      return unpackFlat(words as Uint32Array, rows * columns, codecBits(codec));
    }),
  ];
}
