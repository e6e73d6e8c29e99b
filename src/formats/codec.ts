import { f32Bits, f32FromBits, roundEven } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { type Codec, codecBits } from "./format.js";

type FloatCodec = Extract<Codec, { kind: "float" }>;

/** The field arithmetic of a float codec, shared by the codec here and by the code generators. */
export function floatFields(codec: FloatCodec) {
  const { exponent, mantissa, bias, specials } = codec;
  const topExponent = 2 ** exponent - 1;
  const allOnes = 2 ** (exponent + mantissa) - 1;
  const infinity = topExponent * 2 ** mantissa;
  return {
    signShift: exponent + mantissa,
    /** Codes without their sign. */
    maxFinite: specials === "ieee" ? infinity - 1 : specials === "nan" ? allOnes - 1 : allOnes,
    overflow: specials === "ieee" ? infinity : specials === "nan" ? allOnes - 1 : allOnes,
    nan: allOnes,
    infinity: specials === "ieee" ? infinity : undefined,
    /** The unit of the subnormal range. */
    quantum: 2 ** (1 - bias - mantissa),
    /** The float32 bits of the smallest normal number, and the shift from a float32 mantissa to this one. */
    minNormalBits: (1 - bias + 127) * 2 ** 23,
    shift: 23 - mantissa,
  };
}

/** The value of `code`, by formula: this function defines what a code means (numerics specification, section 2). */
export function decode(codec: Codec, code: number): number {
  switch (codec.kind) {
    case "float":
      return decodeFloat(codec, code);
    case "exponent":
      return code === 2 ** codec.bits - 1 ? Number.NaN : 2 ** (code - codec.bias);
    case "int":
      return codec.signed && code >= 2 ** (codec.bits - 1) ? code - 2 ** codec.bits : code;
    case "lut": {
      if (codec.entries === "learned") throw learnedTable();
      return Math.fround(codec.entries[code] as number);
    }
  }
}

/**
 * The code nearest to the float32 `value`, ties to the even code, the sign of zero kept. Overflow and NaN as the
 * codec's `specials` say: `ieee` overflows to infinity, the others saturate; a codec without NaN turns NaN into its
 * largest code. Integers clamp, and NaN becomes 0. Lookup tables take the nearest entry, the first one on ties.
 */
export function encode(codec: Codec, value: number): number {
  return encoder(codec)(value);
}

const encoders = new WeakMap<Codec, (value: number) => number>();

/** `encode` of one codec, prepared: what loops call. */
export function encoder(codec: Codec): (value: number) => number {
  let prepared = encoders.get(codec);
  if (prepared === undefined) {
    prepared = makeEncoder(codec);
    encoders.set(codec, prepared);
  }
  return prepared;
}

function makeEncoder(codec: Codec): (value: number) => number {
  switch (codec.kind) {
    case "float":
      return floatEncoder(codec);
    case "exponent":
      return (value) => encodeExponent(codec.bits, codec.bias, value);
    case "int": {
      const min = codec.signed ? -(2 ** (codec.bits - 1)) : 0;
      const span = 2 ** codec.bits;
      return (value) => {
        const clamped = Math.min(Math.max(roundEven(value), min), min + span - 1);
        return Number.isNaN(clamped) ? 0 : clamped < 0 ? clamped + span : clamped;
      };
    }
    case "lut": {
      const entries = codec.entries;
      if (entries === "learned") throw learnedTable();
      const [low, high] = [Math.min(...entries), Math.max(...entries)];
      return (given) => {
        // Far outside the table float64 cannot tell the distances apart, and infinities have none.
        const value = Math.min(Math.max(given, low), high);
        let best = 0;
        for (let i = 1; i < entries.length; i++) {
          if (Math.abs(value - (entries[i] as number)) < Math.abs(value - (entries[best] as number))) best = i;
        }
        return best;
      };
    }
  }
}

/** The largest finite value of a codec with fixed values. */
export function maxValue(codec: Codec): number {
  if (codec.kind === "float") return decodeFloat(codec, floatFields(codec).maxFinite);
  if (codec.kind === "exponent") return 2 ** (2 ** codec.bits - 2 - codec.bias);
  if (codec.kind === "int") return 2 ** (codec.bits - (codec.signed ? 1 : 0)) - 1;
  if (codec.entries === "learned") throw learnedTable();
  return Math.max(...codec.entries);
}

const tables = new WeakMap<Codec, Float32Array>();

/** All values of a codec of at most 16 bits, by code; cached. Fast decoding indexes this. */
export function decodeTable(codec: Codec): Float32Array {
  let table = tables.get(codec);
  if (table === undefined) {
    table = Float32Array.from({ length: 2 ** codecBits(codec) }, (_, code) => decode(codec, code));
    tables.set(codec, table);
  }
  return table;
}

function decodeFloat(codec: FloatCodec, code: number): number {
  if (codec.exponent === 8 && codec.mantissa === 23) return f32FromBits(code);
  const fields = floatFields(codec);
  const magnitude = code % 2 ** fields.signShift;
  const sign = magnitude === code ? 1 : -1;
  if (magnitude > fields.maxFinite) return magnitude === fields.infinity ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  const unit = 2 ** codec.mantissa;
  const exponent = Math.floor(magnitude / unit);
  if (exponent === 0) return sign * magnitude * fields.quantum;
  return sign * (1 + (magnitude % unit) / unit) * 2 ** (exponent - codec.bias);
}

const words = new Uint32Array(1);
const singles = new Float32Array(words.buffer);

/** Adding and subtracting this rounds a float64 below 2^51 to an integer, ties to even. */
const ROUND = 1.5 * 2 ** 52;

function floatEncoder(codec: FloatCodec): (value: number) => number {
  if (codec.exponent === 8 && codec.mantissa === 23) return f32Bits;
  const fields = floatFields(codec);
  const { maxFinite, overflow, nan, shift, minNormalBits } = fields;
  const signBit = codec.signed ? 2 ** fields.signShift : 0;
  const perQuantum = 1 / fields.quantum;
  const half = 2 ** (shift - 1) - 1;
  // Exponent bits that float32 has above this codec's lowest binade: subtracting them rebiases.
  const rebias = minNormalBits - 2 ** 23;
  return (value) => {
    singles[0] = value;
    const bits = words[0] as number;
    const magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return nan;
    const sign = bits > 0x7fffffff ? signBit : 0;
    if (magnitude < minNormalBits) return sign + (Math.abs(value) * perQuantum + ROUND - ROUND);
    const code = (magnitude + half + ((magnitude >>> shift) & 1) - rebias) >>> shift;
    return sign + (code > maxFinite ? overflow : code);
  };
}

/** e8m0 stores no sign and no zero: what is not positive becomes the smallest power; ties go up (PyTorch's cast). */
function encodeExponent(bits: number, bias: number, value: number): number {
  const top = 2 ** bits - 1;
  if (Number.isNaN(value) || value === Number.POSITIVE_INFINITY) return top;
  if (value <= 0) return 0;
  singles[0] = value < 2 ** -126 ? value * 2 ** 64 : value;
  const field = ((words[0] as number) >>> 23) - (value < 2 ** -126 ? 64 : 0);
  const nearest = ((words[0] as number) & 0x7fffff) >= 0x400000 ? field + 1 : field;
  return Math.min(Math.max(nearest - 127 + bias, 0), top - 1);
}

function learnedTable(): FewbitError {
  return new FewbitError("graph/invalid", { where: "codec", reason: "a learned table has no fixed values" });
}
