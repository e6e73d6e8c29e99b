import { f32Bits, f32FromBits } from "../../../core/dtype.js";
import { FewbitError } from "../../../core/errors.js";
import { encoder, floatFields, maxValue } from "../../../formats/codec.js";
import { type Codec, codecName } from "../../../formats/format.js";

/**
 * WGSL functions that read and write one stored number, generated from its codec and equal bit for bit with
 * `formats/codec.ts` for every code and every float32, on every device: they use integers, and floats only where all
 * operands and the result are normal numbers and the result is exact. (A device may flush float32 subnormals, round
 * either way, assume that no NaN exists, and contract; none of that changes these functions.)
 *
 * Bodies keep to what C++ also reads (`let`, operators, `select`, `min`, `max`, `bitcast`), so that `codegen/cxx.ts`
 * makes its functions from the same text. A decode function takes a code without bits above it.
 */

type FloatCodec = Extract<Codec, { kind: "float" }>;
type LutCodec = Extract<Codec, { kind: "lut" }>;

/** WGSL `fn name(code: u32) -> f32`. Throws `argument/invalid` for a codec whose values float32 cannot hold. */
export function decodeFunction(codec: Codec, name: string): string {
  return functionText(`${name}(code: u32) -> f32`, decodeBody(codec));
}

/**
 * WGSL `fn name(value: f32) -> u32`, and `fn name_bits(bits: u32) -> u32` that takes the float32's bits, which no device
 * can flush on the way. Throws `argument/invalid` as `decodeFunction`.
 */
export function encodeFunction(codec: Codec, name: string): string {
  const onBits = functionText(`${name}_bits(bits: u32) -> u32`, encodeBody(codec));
  return `${onBits}${functionText(`${name}(value: f32) -> u32`, [`return ${name}_bits(bitcast<u32>(value));`])}`;
}

function functionText(signature: string, body: readonly string[]): string {
  return `fn ${signature} {\n${body.map((line) => `  ${line}\n`).join("")}}\n`;
}

const INFINITY = 0x7f800000;
const NAN = 0x7fc00000;
/** An unsigned literal of WGSL and of C++. */
export const u = (value: number): string => (value < 0x100 ? `${value >>> 0}u` : `0x${(value >>> 0).toString(16)}u`);

/** Integers this narrow are exact in float32 and fit the arithmetic below. */
const WIDEST_INT = 16;

function decodeBody(codec: Codec): string[] {
  switch (codec.kind) {
    case "float":
      return decodeFloat(codec);
    case "exponent": {
      checkRange(codec, 2 ** -codec.bias, 2 ** -127);
      // Only the code of 2^-127 has an exponent field of 0, which float32 writes as a subnormal.
      return [
        `let field = code + ${u(127 - codec.bias)};`,
        `let power = select(field << 23u, ${u(0x400000)}, field == 0u);`,
        `return bitcast<f32>(select(power, ${u(NAN)}, code == ${u(2 ** codec.bits - 1)}));`,
      ];
    }
    case "int": {
      // Wider codes are zero points of other tools' files; a conversion rounds those that float32 cannot hold.
      if (codec.bits > 16) {
        return [
          `return f32(${codec.signed ? `(bitcast<i32>(code << ${u(32 - codec.bits)}) >> ${u(32 - codec.bits)})` : "code"});`,
        ];
      }
      // 2^23 + n has n in its low mantissa bits: no integer conversion, which GPUs do at a quarter of the rate.
      const half = codec.signed ? 2 ** (codec.bits - 1) : 0;
      const base = f32Bits(2 ** 23);
      const shifted = codec.signed ? `(code ^ ${u(half)})` : "code";
      return [`return bitcast<f32>(${shifted} | ${u(base)}) - bitcast<f32>(${u(base + half)});`];
    }
    case "lut": {
      const bits = tableOf(codec).map((entry) => u(f32Bits(entry)));
      // A tree of selections stays in registers; a table indexed by data may go to memory.
      if (bits.length <= 16) return [`return bitcast<f32>(${selectTree(bits, codec.bits - 1)});`];
      return [`let table = array<u32, ${bits.length}>(${bits.join(", ")});`, "return bitcast<f32>(table[code]);"];
    }
  }
}

function decodeFloat(codec: FloatCodec): string[] {
  const { signShift, maxFinite, quantum, infinity, shift } = floatFields(codec);
  const sign = codec.signed ? ` | ((code & ${u(2 ** signShift)}) << ${u(31 - signShift)})` : "";
  if (codec.exponent === 8 && codec.bias === 127 && codec.specials === "ieee") {
    // The fields of float32 with a shorter mantissa: infinity, NaN and subnormals keep their places.
    return [`return bitcast<f32>(code << ${u(shift)});`];
  }
  checkRange(codec, quantum, 2 ** -126);
  const rebias = (127 - codec.bias) * 2 ** 23;
  const lowest = f32Bits(quantum * 2 ** 23);
  const body = [
    `let magnitude = code & ${u(2 ** signShift - 1)};`,
    `let normal = bitcast<f32>((magnitude << ${u(shift)}) + ${u(rebias)});`,
    `let subnormal = bitcast<f32>(magnitude | ${u(lowest)}) - bitcast<f32>(${u(lowest)});`,
    `let finite = bitcast<u32>(select(normal, subnormal, magnitude < ${u(2 ** codec.mantissa)}));`,
  ];
  if (codec.specials === "none") return [...body, `return bitcast<f32>(finite${sign});`];
  const special = infinity === undefined ? u(NAN) : `(magnitude << ${u(shift)}) | ${u(INFINITY)}`;
  return [
    ...body,
    `let value = select(finite, ${special}, magnitude > ${u(maxFinite)});`,
    `return bitcast<f32>(value${sign});`,
  ];
}

function selectTree(entries: readonly string[], bit: number): string {
  if (bit < 0) return entries[0] as string;
  const half = entries.length / 2;
  const [low, high] = [entries.slice(0, half), entries.slice(half)].map((part) => selectTree(part, bit - 1));
  return `select(${low}, ${high}, (code & ${u(2 ** bit)}) != 0u)`;
}

function encodeBody(codec: Codec): string[] {
  switch (codec.kind) {
    case "float":
      return encodeFloat(codec);
    case "exponent": {
      checkRange(codec, 2 ** -codec.bias, 2 ** -127);
      const top = 2 ** codec.bits - 1;
      const offset = 127 - codec.bias;
      // Half a binade rounds up. Below 2^-126 the leading bit is explicit: 1.5 * 2^-127 is 0x600000.
      return [
        `let rounded = select((bits + ${u(0x400000)}) >> 23u, select(0u, 1u, bits >= ${u(0x600000)}), bits < ${u(0x800000)});`,
        `let code = min(max(rounded, ${u(offset)}) - ${u(offset)}, ${u(top - 1)});`,
        `let positive = select(code, 0u, bits >= ${u(0x80000000)});`,
        `return select(positive, ${u(top)}, bits == ${u(INFINITY)} || ${isNan("bits")});`,
      ];
    }
    case "int":
      return encodeInt(codec);
    case "lut":
      return encodeLut(codec);
  }
}

const isNan = (bits: string): string => `(${bits} & ${u(0x7fffffff)}) > ${u(INFINITY)}`;

function encodeFloat(codec: FloatCodec): string[] {
  if (codec.exponent === 8 && codec.mantissa === 23 && codec.signed) return ["return bits;"];
  const { signShift, maxFinite, overflow, nan, quantum, minNormalBits, shift } = floatFields(codec);
  checkRange(codec, quantum, 2 ** -149);
  const lowest = minNormalBits / 2 ** 23;
  const sign = codec.signed ? `((bits >> 31u) << ${u(signShift)})` : "0u";
  // One rounding serves normal and subnormal codes: below the lowest exponent the significand only moves further right,
  // and a carry out of the mantissa moves into the exponent by itself.
  return [
    `let magnitude = bits & ${u(0x7fffffff)};`,
    "let exponent = max(magnitude >> 23u, 1u);",
    "let significand = magnitude - ((exponent - 1u) << 23u);",
    `let kept = max(exponent, ${u(lowest)});`,
    `let shift = min(kept - exponent + ${u(shift)}, 25u);`,
    "let odd = (significand >> shift) & 1u;",
    "let rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;",
    `let code = rounded + ((kept - ${u(lowest)}) << ${u(codec.mantissa)});`,
    `let saturated = select(code, ${u(overflow)}, code > ${u(maxFinite)});`,
    `return select(saturated | ${sign}, ${u(nan)}, magnitude > ${u(INFINITY)});`,
  ];
}

function encodeInt(codec: Extract<Codec, { kind: "int" }>): string[] {
  requireNarrow(codec);
  const half = 2 ** (codec.bits - 1);
  const limit = codec.signed
    ? `select(${u(half - 1)}, ${u(half)}, negative)`
    : `select(${u(2 * half - 1)}, 0u, negative)`;
  const code = codec.signed ? `select(clipped, (0u - clipped) & ${u(2 * half - 1)}, negative)` : "clipped";
  // From 2^23 on every float32 is an integer beyond any limit; below 2^-2 everything shifts out.
  return [
    `let magnitude = bits & ${u(0x7fffffff)};`,
    `let negative = bits >= ${u(0x80000000)};`,
    `let significand = (magnitude & ${u(0x7fffff)}) | ${u(0x800000)};`,
    "let shift = 150u - min(max(magnitude >> 23u, 125u), 149u);",
    "let odd = (significand >> shift) & 1u;",
    "let rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;",
    `let limit = ${limit};`,
    `let clipped = select(min(rounded, limit), limit, magnitude >= ${u(f32Bits(2 ** 23))});`,
    `return select(${code}, 0u, magnitude > ${u(INFINITY)});`,
  ];
}

function encodeLut(codec: LutCodec): string[] {
  const entries = tableOf(codec);
  const order = entries.map((_, code) => code).sort((a, b) => (entries[a] as number) - (entries[b] as number));
  const encode = encoder(codec);
  const body = [
    `let key = select(bits | ${u(0x80000000)}, ~bits, bits >= ${u(0x80000000)});`,
    ...order
      .slice(1)
      .map((high, i) => `let above_${i} = key >= ${u(boundary(encode, entries, order[i] as number, high))};`),
  ];
  // The largest entry whose lower boundary the value has passed; NaN takes the code that the definition gives it.
  let choice = u(order[0] as number);
  for (const [i, high] of order.slice(1).entries()) choice = `select(${choice}, ${u(high)}, above_${i})`;
  return [...body, `return select(${choice}, ${u(encode(Number.NaN))}, ${isNan("bits")});`];
}

/** A u32 that orders float32 numbers; -0 comes just before 0. As `exact_key` of `exact.ts`. */
export function orderKey(value: number): number {
  return (value < 0 || Object.is(value, -0) ? ~f32Bits(value) : f32Bits(value) | 0x80000000) >>> 0;
}

/** The order-preserving key of the least float32 between two neighbouring entries that is not coded as the lower one. */
function boundary(encode: (value: number) => number, entries: readonly number[], low: number, high: number): number {
  const value = (key: number) => f32FromBits(key >= 0x80000000 ? key - 0x80000000 : ~key >>> 0);
  const lower = new Set(entries.flatMap((entry, code) => (entry <= (entries[low] as number) ? [code] : [])));
  let [begin, end] = [orderKey(entries[low] as number), orderKey(entries[high] as number)];
  while (begin < end) {
    const middle = begin + Math.floor((end - begin) / 2);
    if (lower.has(encode(value(middle)))) begin = middle + 1;
    else end = middle;
  }
  return end;
}

function tableOf(codec: LutCodec): readonly number[] {
  if (codec.entries === "learned" || codec.vector[0] * codec.vector[1] !== 1) {
    throw invalid(
      codec,
      "a table of single fixed numbers: learned and vector tables are read from the tensor's buffer",
    );
  }
  return codec.entries.map(Math.fround);
}

function requireNarrow(codec: Extract<Codec, { kind: "int" }>): void {
  if (codec.bits > WIDEST_INT) throw invalid(codec, `at most ${WIDEST_INT} bits`);
}

/** float32 must hold the smallest and the largest value. */
function checkRange(codec: Codec, smallest: number, least: number): void {
  if (smallest < least || maxValue(codec) >= 2 ** 128) throw invalid(codec, "a codec whose values are float32 numbers");
}

function invalid(codec: Codec, expected: string): FewbitError {
  return new FewbitError("argument/invalid", { name: "codec", value: codecName(codec), expected });
}
