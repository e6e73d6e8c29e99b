import { f32Bits } from "../../src/core/dtype.js";
import { decode } from "../../src/formats/codec.js";
import { type Codec, codecBits, codecName, codecVector } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";

/** Every codec with fixed values that a row of the table uses, once, with a name that tells apart codecs of one size. */
export function fixedCodecs(): [name: string, codec: Codec][] {
  const codecs = new Map<string, [name: string, codec: Codec]>();
  for (const format of Object.values(FORMATS)) {
    const zero = format.zero.domain === "none" ? [] : [format.zero.codec];
    for (const codec of [format.element, ...format.scales.map((level) => level.codec), ...zero]) {
      const [rows, k] = codecVector(codec);
      if (codec.kind === "lut" && (codec.entries === "learned" || rows * k > 1)) continue;
      if (!codecs.has(JSON.stringify(codec))) {
        codecs.set(JSON.stringify(codec), [codec.kind === "lut" ? format.name : codecName(codec), codec]);
      }
    }
  }
  return [...codecs.values()];
}

/** All codes; of a wider codec every exponent with telling mantissas, and random ones. */
export function allCodes(codec: Codec): Uint32Array {
  const bits = codecBits(codec);
  if (bits <= 16) return Uint32Array.from({ length: 2 ** bits }, (_, code) => code);
  return float32Samples();
}

/** float32 bits: every exponent and sign with telling mantissas, then random ones (always the same). */
export function float32Samples(random = 4096): Uint32Array {
  const samples: number[] = [];
  const mantissas = [0, 1, 2, 0x3fffff, 0x400000, 0x400001, 0x7ffffe, 0x7fffff];
  for (let exponent = 0; exponent < 512; exponent++) {
    for (const mantissa of mantissas) samples.push(((exponent << 23) | mantissa) >>> 0);
  }
  const next = randomWords(1);
  for (let i = 0; i < random; i++) samples.push(next());
  return Uint32Array.from(samples);
}

/** float32 bits that try an encoder: every value of the codec, every midpoint, both with their neighbours, and the rest. */
export function encodeSamples(codec: Codec): Uint32Array {
  const samples: number[] = [];
  const around = (value: number) => {
    for (const near of [value, -value]) {
      const bits = f32Bits(near);
      for (let step = -2; step <= 2; step++) samples.push((bits + step) >>> 0);
    }
  };
  if (codecBits(codec) <= 16) {
    const values = [...allCodes(codec)].map((code) => Math.fround(decode(codec, code))).filter(Number.isFinite);
    values.sort((a, b) => a - b);
    for (const [i, value] of values.entries()) {
      around(value);
      around(Math.fround((value + (values[i + 1] ?? 2 * value)) / 2));
    }
  }
  const telling = float32Samples();
  const next = randomWords(2);
  // Random numbers of the codec's own range: most float32 numbers overflow a small codec.
  for (let i = 0; i < 4096; i++) samples.push(((next() & 0x80000000) | (0x37000000 + (next() % 0x10000000))) >>> 0);
  return Uint32Array.from([...samples, ...telling]);
}

/** A stream of 32-bit words (mulberry32) that is the same in every run. */
export function randomWords(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return (t ^ (t >>> 14)) >>> 0;
  };
}

const isNan = (bits: number) => (bits & 0x7fffffff) > 0x7f800000;

/** Whether float32 bits are equal, one NaN being as good as another. */
export function sameNumber(a: number, b: number): boolean {
  return a === b || (isNan(a) && isNan(b));
}

/** Beyond a table's ends the nearest entry is the end; distances in float64 tell that only up to 2^52. */
export function withinTable(codec: Codec, value: number): number {
  if (codec.kind !== "lut" || codec.entries === "learned") return value;
  return Math.min(Math.max(value, Math.min(...codec.entries)), Math.max(...codec.entries));
}

/** Whether two codes mean the same: JavaScript may change the payload of a NaN that passes through a number. */
export function sameCode(codec: Codec, a: number, b: number): boolean {
  return a === b || (codec.kind !== "lut" && Number.isNaN(decode(codec, a)) && Number.isNaN(decode(codec, b)));
}
