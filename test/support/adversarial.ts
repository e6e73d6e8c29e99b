import { type FloatType, f32Bits, f32FromBits, roundTo } from "../../src/core/dtype.js";
import { decode, maxValue } from "../../src/formats/codec.js";
import { type Codec, codecBits } from "../../src/formats/format.js";
import { randomWords } from "./codecs.js";

const LARGEST: Readonly<Record<FloatType, number>> = {
  f32: f32FromBits(0x7f7fffff),
  bf16: f32FromBits(0x7f7f0000),
  f16: 65504,
};
const SMALLEST: Readonly<Record<FloatType, number>> = { f32: 2 ** -149, bf16: 2 ** -133, f16: 2 ** -24 };

/** Rows of k values of `dtype` that a quantizer may get wrong, by name. */
export function adversarialRows(
  element: Codec,
  k: number,
  dtype: FloatType,
  seed: number,
): Readonly<Record<string, Float32Array>> {
  const next = randomWords(seed);
  const uniform = () => next() / 2 ** 32;
  const normal = () => Math.sqrt(-2 * Math.log(uniform() + 2 ** -33)) * Math.cos(2 * Math.PI * uniform());
  const row = (value: (i: number) => number) =>
    Float32Array.from({ length: k }, (_, i) => roundTo(dtype, Math.fround(value(i))));
  const largest = LARGEST[dtype];
  const smallest = SMALLEST[dtype];
  const normalLeast = dtype === "f16" ? 2 ** -14 : 2 ** -126;
  const ties = tiesOf(element);
  const top = codecBits(element) > 16 || element.kind === "lut" ? 1.5 : maxValue(element);
  const powers = dtype === "f16" ? [-20, -14, -8, -1, 0, 1, 4, 9] : [-133, -127, -126, -125, 0, 1, 60, 100];
  const carry = (i: number, steps: number) => {
    const bits = f32Bits(Math.fround(top * 2 ** (powers[Math.floor(i / 32) % powers.length] as number))) + steps;
    return i % 4 === 0 ? f32FromBits(bits) : f32FromBits(bits) * normal() * 0.2;
  };
  const at = (i: number, place: number, value: number, other: number) =>
    i % Math.min(k, 97) === place ? value : other;
  return {
    zeros: row(() => 0),
    "negative zeros": row((i) => (i % 2 === 0 ? -0 : 0)),
    "one value": row(() => 0.3),
    "one negative value": row(() => -7),
    ones: row((i) => (i % 3) - 1),
    normal: row(() => normal()),
    positive: row(() => Math.abs(normal()) + 3),
    "an outlier": row((i) => at(i, 5, 30_000, normal() * 1e-3)),
    "a huge outlier": row((i) => at(i, 3, -largest, normal())),
    "largest finite": row((i) => (i % 2 === 0 ? largest : -largest)),
    "largest finite, positive": row((i) => (i % 5 === 0 ? largest : largest / 3)),
    subnormal: row((i) => (normal() * normalLeast) / (i % 7 === 0 ? 1 : 64)),
    "smallest subnormal": row((i) => (i % 4 === 0 ? smallest : 0)),
    "smallest normal": row((i) => (i % 3 === 0 ? normalLeast : -normalLeast / 2)),
    ties: row((i) => ties[i % ties.length] as number),
    "ties with a scale": row((i) => (ties[i % ties.length] as number) * 0.0123),
    "half steps": row((i) => ((i % 41) - 20) / 2),
    "just beside half steps": row((i) => (((i % 41) - 20) / 2) * (1 + ((i % 3) - 1) * 2 ** -20)),
    "powers of two": row((i) => (i % 2 === 0 ? 1 : -1) * 2 ** ((i % 28) - 14)),
    "all magnitudes": row(() => {
      const value = f32FromBits(next());
      return Number.isFinite(value) ? value / (dtype === "f16" ? 2 ** 100 : 1) : 1;
    }),
    // The largest value of each 32 is the codec's largest times a power of two, or a neighbour: where block scales carry.
    "carry points": row((i) => carry(i, 0)),
    "just above carry points": row((i) => carry(i, 1)),
    "just below carry points": row((i) => carry(i, -1)),
    infinity: row((i) => at(i, 9, Number.POSITIVE_INFINITY, normal())),
    "negative infinity": row((i) => at(i, 0, Number.NEGATIVE_INFINITY, normal())),
    "both infinities": row((i) => (i % 2 === 0 ? Number.NEGATIVE_INFINITY : Number.POSITIVE_INFINITY)),
    NaN: row((i) => at(i, 11, Number.NaN, normal())),
  };
}

/** All values of a codec of numbers and the midpoints between them, its largest value among every 16. */
function tiesOf(codec: Codec): number[] {
  if (codecBits(codec) > 8 || (codec.kind === "lut" && codec.entries === "learned")) return [1, 1.5, -2.5, 0.25, 3.5];
  const values = Array.from({ length: 2 ** codecBits(codec) }, (_, code) => decode(codec, code)).filter(
    Number.isFinite,
  );
  values.sort((a, b) => a - b);
  const points = values.flatMap((value, i) => [value, (value + (values[i + 1] ?? value)) / 2]);
  return points.map((value, i) => (i % 16 === 0 ? maxValue(codec) : value));
}

/** The rows of a set one under another. */
export function stack(rows: readonly Float32Array[]): Float32Array {
  const k = rows[0]?.length ?? 0;
  const matrix = new Float32Array(rows.length * k);
  for (const [i, row] of rows.entries()) matrix.set(row, i * k);
  return matrix;
}
