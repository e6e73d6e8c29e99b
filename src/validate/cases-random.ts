import { decode, encoder, maxValue } from "../formats/codec.js";
import { blockGrid, type Codec, codecBits, codecVector, type Format } from "../formats/format.js";
import { packFlat, packRows } from "../formats/pack.js";
import type { QuantizedTensor } from "../formats/tensor.js";
import { quantizeTensor } from "../quantize/quantize.js";

/** Seeded random numbers: equal seeds give equal sequences on every machine. */
export interface Random {
  /** In [0, 1), 32 random bits. */
  uniform(): number;
  /** An integer in [0, count). */
  below(count: number): number;
  normal(): number;
}

/** mulberry32 (Tommy Ettinger, public domain), normals by Box and Muller. */
export function random(seed: number): Random {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return {
    uniform,
    below: (count) => Math.floor(uniform() * count),
    normal: () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()),
  };
}

/** A seed of its own for every name under one base seed (FNV-1a). */
export function seedOf(base: number, name: string): number {
  let hash = (2166136261 ^ base) >>> 0;
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 16777619) >>> 0;
  return hash;
}

/** Normal float32 numbers, one in a hundred of them eight times as large. */
export function normals(source: Random, count: number, spread = 1): Float32Array {
  return Float32Array.from({ length: count }, () => source.normal() * spread * (source.uniform() < 0.01 ? 8 : 1));
}

/**
 * A tensor [rows, k] of a format: normal numbers, or NaN at the elements `nan`, put through the format's own rule. The rules that search a
 * whole tensor are far too slow for a case table, so their tensors are random codes instead, without NaN.
 */
export function randomTensor(
  format: Format,
  shape: readonly [rows: number, k: number],
  seed: number,
  nan: readonly number[] = [],
): QuantizedTensor {
  const source = random(seed);
  const searches = format.rule.kind === "codebook" || format.rule.kind === "hqq" || format.rule.kind === "sinq";
  if (searches) return randomCodes(format, shape, source);
  const values = normals(source, shape[0] * shape[1], 0.5);
  for (const index of nan) values[index] = Number.NaN;
  return quantizeTensor(values, shape, "f32", format);
}

/** Uniform element codes with scales near 2^-6, zero points in the middle of the codes' range, and a normal table. */
function randomCodes(format: Format, shape: readonly [number, number], source: Random): QuantizedTensor {
  const { element, scales, zero } = format;
  const [patchRows, patchK] = codecVector(element);
  const bits = codecBits(element);
  const [rows, columns] = [shape[0] / patchRows, shape[1] / patchK];
  const finite = (code: number) => element.kind === "lut" || Number.isFinite(decode(element, code));
  const code = (): number => {
    const drawn = Math.floor(source.uniform() * 2 ** bits);
    return finite(drawn) ? drawn : 0;
  };
  const blocks = (codec: Codec, level: number, value: () => number) => {
    const [bands, count] = blockGrid((scales[level] as (typeof scales)[number]).block, shape);
    const encode = encoder(codec);
    return packFlat(
      Uint32Array.from({ length: bands * count }, () => encode(Math.fround(value()))),
      codecBits(codec),
    );
  };
  const learned = element.kind === "lut" && element.entries === "learned";
  const middle =
    element.kind === "int" && zero.domain === "int" ? 2 ** (bits - 1) - (element.signed ? 2 ** (bits - 1) : 0) : 0;
  return {
    format,
    shape,
    qdata: packRows(Uint32Array.from({ length: rows * columns }, code), rows, columns, bits),
    scales: scales.map(({ codec }, level) =>
      blocks(codec, level, () => Math.min(2 ** (level === 0 ? -6 : 0) * (0.5 + source.uniform()), maxValue(codec))),
    ),
    ...(zero.domain === "none" ? {} : { zero: blocks(zero.codec, 0, () => middle + source.normal()) }),
    ...(learned ? { table: normals(source, 2 ** bits * patchRows * patchK) } : {}),
  };
}
