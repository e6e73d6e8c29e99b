import { FewbitError } from "../core/errors.js";
import { products } from "../core/matmul.js";
import { decode, encode } from "../formats/codec.js";
import { dequantize, type QuantizedTensor } from "../formats/tensor.js";
import { type AttentionShape, attentionShape, type KeyRows, outputShape } from "./attention-shape.js";
import { concreteShape, type TensorType } from "./graph.js";
import type { SdpaAttrs } from "./ops.js";
import { type DenseTensor, type HostTensor, isDense } from "./tensor.js";

/** Mask entries at or below this (and minus infinity) take their key out; a query that sees no key gives zeros. */
export const MASKED = -(2 ** 100);

/** A function to the stored row of the key at a position. `pages` names the blocks of a paged cache. */
export function keyRowOf(
  rows: KeyRows,
  pages: ArrayLike<number> | undefined,
): (batch: number, kvHead: number, position: number) => number {
  const { page, kvHeads, ring } = rows;
  const keys = rows.keys as number;
  const slot = (position: number) => (ring ? position % keys : position);
  if (page === null) return (batch, kvHead, position) => (batch * kvHeads + kvHead) * keys + slot(position);
  return (_, kvHead, position) => {
    const at = slot(position);
    return ((pages?.[Math.floor(at / page)] as number) * kvHeads + kvHead) * page + (at % page);
  };
}

/**
 * Throws `cache/overflow` unless a cache of `keys` slots can take `tokens` at `position`, `window` of whose tokens before
 * must still be there (a ring).
 */
export function checkCapacity(rows: KeyRows, position: number, tokens: number, window = 0): void {
  const capacity = rows.keys as number;
  // The first of the new tokens still sees window - 1 older ones when the last has been written.
  const needed = rows.ring ? Math.min(position + tokens, Math.max(window - 1, 0) + tokens) : position + tokens;
  if (needed > capacity) throw new FewbitError("cache/overflow", { needed, capacity });
}

/** The positions [from, to) that the query at position p sees, of `seen` keys. */
export function visibleKeys(attrs: SdpaAttrs, p: number, seen: number): [from: number, to: number] {
  const { window, causal } = attrs;
  const from = window === undefined ? 0 : Math.max(0, p - window + 1);
  const to = causal ? p + 1 : window === undefined ? seen : p + window;
  return [from, Math.max(from, Math.min(to, seen))];
}

/** One query row at work: scores of the keys it sees, in float64 (minus infinity where a mask takes one out). */
interface Row {
  /** Where its output starts. */
  readonly at: number;
  readonly scores: Float64Array;
  /** scale * sum |q k| of each score. */
  readonly magnitudes: () => Float64Array;
  /** The values of the keys: [keys, size]. */
  readonly values: Float64Array;
  readonly sink: number;
}

/** Calls `visit` for every query row of every head. Throws `cache/overflow` for a step that the cache does not hold. */
function forEachRow(
  operands: readonly HostTensor[],
  types: readonly TensorType[],
  attrs: SdpaAttrs,
  symbols: Readonly<Record<string, number>>,
  visit: (row: Row) => void,
): void {
  const shape = attentionShape(types, attrs, "sdpa");
  const { batch, size, tokenMajor, extra } = shape;
  const [q, k, v] = operands as readonly [HostTensor, HostTensor, HostTensor];
  const number = (dim: AttentionShape["tokens"]) => concreteShape([dim], symbols)[0] as number;
  const tokens = number(shape.tokens);
  const keys = number(shape.keys);
  const rows: KeyRows = { ...shape, keys };
  const operand = (index: number) => (index < 0 ? undefined : ((operands[index] as DenseTensor).data as Float32Array));
  const [mask, sinks, pages] = [operand(extra.mask), operand(extra.sinks), operand(extra.pages)];
  const first = attrs.position === undefined ? 0 : number(attrs.position);
  const seen = attrs.position === undefined ? keys : first + tokens;
  if (attrs.position !== undefined) checkCapacity(rows, first, tokens, attrs.window);
  const rowOf = keyRowOf(rows, pages);
  const { heads, kvHeads } = attrs;
  const group = heads / kvHeads;
  const query = valuesOfRows(q, size, null);
  const low = visibleKeys(attrs, first, seen)[0];
  for (let b = 0; b < batch; b++) {
    for (let kvHead = 0; kvHead < kvHeads; kvHead++) {
      const stored = Array.from({ length: Math.max(seen - low, 0) }, (_, j) => rowOf(b, kvHead, low + j));
      const [keyValues, values] = [valuesOfRows(k, size, stored), valuesOfRows(v, size, stored)];
      for (let head = kvHead * group; head < (kvHead + 1) * group; head++) {
        const sink = sinks === undefined ? Number.NEGATIVE_INFINITY : (sinks[head] as number);
        const at = (t: number) => (tokenMajor ? t * heads + head : (b * heads + head) * tokens + t) * size;
        for (let start = 0; start < tokens; start += ROWS) {
          const end = Math.min(start + ROWS, tokens);
          const rowsOf = new Float64Array((end - start) * size);
          for (let t = start; t < end; t++) rowsOf.set(query.subarray(at(t), at(t) + size), (t - start) * size);
          const [base] = visibleKeys(attrs, first + start, seen);
          const reach = Math.max(visibleKeys(attrs, first + end - 1, seen)[1], base);
          const near = keyValues.subarray((base - low) * size, (reach - low) * size);
          const dots = products(rowsOf, near, [end - start, reach - base, size]);
          for (let t = start; t < end; t++) {
            const [from, to] = visibleKeys(attrs, first + t, seen);
            const scores = dots.slice(
              (t - start) * (reach - base) + from - base,
              (t - start) * (reach - base) + to - base,
            );
            const maskAt =
              ((shape.mask.batch ? b : 0) * (shape.mask.heads ? heads : 1) + (shape.mask.heads ? head : 0)) * tokens +
              t;
            finishScores(scores, attrs, mask?.subarray(maskAt * keys + from, maskAt * keys + to));
            const magnitudes = () =>
              products(
                rowsOf.subarray((t - start) * size, (t - start + 1) * size).map(Math.abs),
                keyValues.subarray((from - low) * size, (to - low) * size).map(Math.abs),
                [1, to - from, size],
              ).map((sum) => sum * Math.abs(attrs.scale));
            visit({
              at: at(t),
              scores,
              magnitudes,
              values: values.subarray((from - low) * size, (to - low) * size),
              sink,
            });
          }
        }
      }
    }
  }
}

/** Makes scores of the dot products of one query: scale, soft-cap, mask. */
function finishScores(scores: Float64Array, { scale, softcap }: SdpaAttrs, mask: Float32Array | undefined): void {
  for (let j = 0; j < scores.length; j++) scores[j] = (scores[j] as number) * scale;
  if (softcap !== undefined)
    for (let j = 0; j < scores.length; j++) scores[j] = softcap * Math.tanh((scores[j] as number) / softcap);
  if (mask === undefined) return;
  for (let j = 0; j < scores.length; j++) {
    const added = mask[j] as number;
    scores[j] = added <= MASKED ? Number.NEGATIVE_INFINITY : (scores[j] as number) + added;
  }
}

/** Queries whose scores are computed at once. */
const ROWS = 32;

/** Exact values of rows of a dense or stored tensor, one after another; all of them for null. */
function valuesOfRows(tensor: HostTensor, size: number, rows: readonly number[] | null): Float64Array {
  if (rows === null) return isDense(tensor) ? Float64Array.from(tensor.data) : dequantize(tensor);
  const out = new Float64Array(rows.length * size);
  for (let begin = 0, end = 0; begin < rows.length; begin = end) {
    for (end = begin + 1; end < rows.length && rows[end] === (rows[end - 1] as number) + 1; ) end++;
    const first = rows[begin] as number;
    const last = first + end - begin;
    const part = isDense(tensor)
      ? tensor.data.subarray(first * size, last * size)
      : dequantize(tensor as QuantizedTensor, [first, last]);
    out.set(part, begin * size);
  }
  return out;
}

/** softmax of one row against its values, in float64: weights, their sum with the sink's, and the largest score. */
function softmax({ scores, sink }: Row): { weights: Float64Array; total: number; top: number } {
  let top = sink;
  for (let j = 0; j < scores.length; j++) top = Math.max(top, scores[j] as number);
  if (top === Number.NEGATIVE_INFINITY) return { weights: new Float64Array(scores.length), total: 0, top };
  const weights = new Float64Array(scores.length);
  let total = Math.exp(sink - top);
  for (let j = 0; j < scores.length; j++) {
    weights[j] = Math.exp((scores[j] as number) - top);
    total += weights[j] as number;
  }
  return { weights, total, top };
}

/** softmax(scores) v of every row, in float64, rounded once to float32: the definition of `sdpa`. */
export function evaluateSdpa(
  operands: readonly HostTensor[],
  types: readonly TensorType[],
  attrs: SdpaAttrs,
  symbols: Readonly<Record<string, number>>,
): DenseTensor {
  const shape = concreteShape(outputShape(attentionShape(types, attrs, "sdpa"), attrs), symbols);
  const out = new Float32Array(shape.reduce((a, b) => a * b, 1));
  const { probabilities } = attrs;
  const rounded = (weight: number): number => {
    const { codec, scale } = probabilities as NonNullable<typeof probabilities>;
    return decode(codec, encode(codec, Math.fround(weight * scale))) / scale;
  };
  forEachRow(operands, types, attrs, symbols, (row) => {
    const { weights, total } = softmax(row);
    if (total === 0) return;
    const size = row.values.length / Math.max(weights.length, 1);
    const sums = new Float64Array(size);
    if (probabilities !== undefined)
      for (let j = 0; j < weights.length; j++) weights[j] = rounded(weights[j] as number);
    addWeighted(sums, weights, row.values);
    for (let i = 0; i < size; i++) out[row.at + i] = (sums[i] as number) / total;
  });
  return { dtype: "f32", shape, data: out };
}

/** sums [size] += weights [n] times values [n, size], key by key; four keys a pass, so that a sum is stored once for four. */
function addWeighted(sums: Float64Array, weights: Float64Array, values: Float64Array): void {
  const size = sums.length;
  const whole = weights.length - (weights.length % 4);
  for (let j = 0; j < whole; j += 4) {
    const [p, q, r, s] = [weights[j], weights[j + 1], weights[j + 2], weights[j + 3]] as [
      number,
      number,
      number,
      number,
    ];
    const at = j * size;
    for (let i = 0; i < size; i++) {
      let sum = sums[i] as number;
      sum += p * (values[at + i] as number);
      sum += q * (values[at + size + i] as number);
      sum += r * (values[at + 2 * size + i] as number);
      sum += s * (values[at + 3 * size + i] as number);
      sums[i] = sum;
    }
  }
  for (let j = whole; j < weights.length; j++) {
    const p = weights[j] as number;
    for (let i = 0; i < size; i++) sums[i] = (sums[i] as number) + p * (values[j * size + i] as number);
  }
}

/** What an implementation in float32 may give: `value` in float64, and the bound of |result - value|, per element. */
export interface SdpaBound {
  readonly value: Float64Array;
  readonly bound: Float64Array;
}

/** Half a unit in the last place of 1 in float32. */
const U = 2 ** -24;

/**
 * The error bound of `sdpa` with float32 scores, softmax and sums, for any order of summation and any split of the keys; the
 * derivation is in docs/numerics.md ("The error bound of attention"). `probabilities` widen it by their codec's rounding.
 */
export function sdpaBound(
  operands: readonly HostTensor[],
  types: readonly TensorType[],
  attrs: SdpaAttrs,
  symbols: Readonly<Record<string, number>>,
): SdpaBound {
  const length = concreteShape((types[0] as TensorType).shape, symbols).reduce((a, b) => a * b, 1);
  const [value, bound] = [new Float64Array(length), new Float64Array(length)];
  const [relative, absolute] = probabilityError(attrs);
  const size = (types[1] as TensorType).shape.at(-1) as number;
  forEachRow(operands, types, attrs, symbols, (row) => {
    const { scores, values } = row;
    const { weights, total, top } = softmax(row);
    if (total === 0) return;
    const magnitudes = row.magnitudes();
    const n = scores.length;
    const root = Math.sqrt(n + 1);
    /** Relative error of each weight, and the weights' share of the sum that it moves. */
    const drift = weights.map((weight, j) => {
      if (weight === 0) return 0;
      const score = (2 * Math.sqrt(size) + 6) * U * (magnitudes[j] as number) + 2 * U * Math.abs(scores[j] as number);
      const capped = attrs.softcap === undefined ? 0 : 16 * U * attrs.softcap;
      return Math.expm1(score + capped + (5 * (top - (scores[j] as number)) + 6 + 8 * root) * U);
    });
    const sinkDrift = Math.expm1((5 * Math.max(top - row.sink, 0) + 6 + 8 * root) * U);
    const sinkShare = row.sink === Number.NEGATIVE_INFINITY ? 0 : (Math.exp(row.sink - top) / total) * sinkDrift;
    let moved = sinkShare;
    for (let j = 0; j < n; j++) moved += ((weights[j] as number) / total) * (drift[j] as number);
    for (let i = 0; i < size; i++) {
      let [sum, least, greatest, shift, mass, coarse] = [0, 0, 0, 0, 0, 0];
      for (let j = 0; j < n; j++) {
        const weight = (weights[j] as number) / total;
        const x = values[j * size + i] as number;
        const a = Math.abs(x);
        sum += weight * x;
        least = Math.min(least, x);
        greatest = Math.max(greatest, x);
        shift += weight * (drift[j] as number) * a;
        mass += weight * a;
        if (weight > 0) coarse += Math.max(weight * relative, absolute / total) * a;
      }
      const at = row.at + i;
      value[at] = sum;
      const accumulated = (2 * root + 6) * U * (mass + Math.abs(sum)) + 8 * U * Math.abs(sum);
      // Past the first order nothing is known but that the result is a mean of the values (and zero, with a sink).
      const softened = moved < 0.5 ? (shift + moved * Math.abs(sum)) / (1 - moved) : greatest - least;
      bound[at] = Math.min(softened, greatest - least) + accumulated + coarse + n * 2 ** -126 * (greatest - least);
    }
  });
  return { value, bound };
}

/** The relative rounding error of probabilities, and the absolute one of those that are subnormal in their codec. */
function probabilityError({ probabilities }: SdpaAttrs): [relative: number, absolute: number] {
  if (probabilities === undefined) return [0, 0];
  const { codec, scale } = probabilities;
  if (codec.kind === "float") return [2 ** -(codec.mantissa + 1), 2 ** -(codec.bias + codec.mantissa) / scale];
  return [0, (decode(codec, 1) - decode(codec, 0)) / 2 / scale];
}
