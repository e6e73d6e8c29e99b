import { FewbitError } from "../../../core/errors.js";
import {
  type Codec,
  codecBits,
  codecVector,
  extentOf,
  type Format,
  formatKey,
  midCode,
  type ScaleLevel,
} from "../../../formats/format.js";
import { scaleGranularity } from "../../../formats/tensor.js";
import type { StoredLayout } from "../../stored-layout.js";
import { decodeFunction } from "./codec.js";

/** Elements that kernels decode at once: 32 codes of b bits are exactly b words. */
export const CHUNK = 32;

/** Generated WGSL that reads one stored tensor, made from its format's row alone. */
export interface StoredReader {
  /** Module-scope functions and constants, all names starting with the prefix. */
  readonly functions: string;
  /** Whether chunk values are exact integers (i32) rather than f32. */
  readonly integer: boolean;
  /** Elements of a chunk that share every scale and zero point: a divisor of 32. */
  readonly segment: number;
  /** Whether scales and zero points do not change along k. */
  readonly constantAlongK: boolean;
  /**
   * Statements that declare `OUT0 .. OUT7`, the 32 code values of a chunk as vec4 (integer zero points subtracted, the
   * middle code of a float zero point too, scales not applied).
   */
  chunk(out: string, row: string, chunk: string): string;
  /** Whether a chunk's eight words are signed bytes that `dot4I8Packed` multiplies exactly. */
  readonly packedBytes: boolean;
  /** Statements that declare `OUTw0 .. OUTw7`, the eight words of such a chunk. */
  chunkWords(out: string, row: string, chunk: string): string;
  /** The product of the scale levels at an element. */
  scale(row: string, k: string): string;
  /** The additive part of a float zero point at an element; null without one. */
  zero(row: string, k: string): string | null;
  /** One element's code value, an integer zero point subtracted, scales not applied: for kernels that do not work in chunks. */
  code(row: string, k: string): string;
  /** One element's real value, scales and zero point applied: for kernels that do not work in chunks. */
  element(row: string, k: string): string;
}

/** Why a format cannot be read in chunks of 32, or null. */
export function chunkObstacle(format: Format, k: number): string | null {
  const [vectorRows, vectorK] = codecVector(format.element);
  if (vectorRows !== 1 || CHUNK % vectorK !== 0)
    return `a table entry of ${formatKey(format)} spans ${vectorRows}x${vectorK} elements`;
  const granularity = scaleGranularity(format, k);
  if (granularity < k && granularity % CHUNK !== 0 && (CHUNK % granularity !== 0 || granularity % 4 !== 0)) {
    return `its block of ${granularity} along K neither divides ${CHUNK} nor is a multiple of it`;
  }
  return null;
}

/** Whether code values minus zero points are integers, so that products can be summed exactly in i32. */
export function isIntegerFormat(format: Format): boolean {
  if (format.element.kind !== "int" || format.element.bits > 8) return false;
  return format.zero.domain === "none" || (format.zero.domain === "int" && format.zero.codec.kind === "int");
}

/**
 * @param buffer the binding of the tensor as `array<u32>`; `buffer4` the same storage as `array<vec4<u32>>`, if bound
 * @param integer ask for i32 values; the format must be an integer one
 */
export function storedReader(
  prefix: string,
  layout: StoredLayout,
  names: { readonly buffer: string; readonly buffer4?: string },
  integer = false,
): StoredReader {
  const { format } = layout;
  const k = layout.shape[1];
  if (integer && !isIntegerFormat(format)) {
    throw new FewbitError("graph/invalid", { where: formatKey(format), reason: "its values are not integers" });
  }
  const { buffer } = names;
  const functions: string[] = [];
  const levels = format.scales.map((level, i) => {
    functions.push(blockFunction(`${prefix}_s${i}`, level, level.codec, layout.scales[i] as number, layout, buffer));
    return `${prefix}_s${i}`;
  });
  const scale = (row: string, at: string) =>
    levels.length === 0 ? "1.0" : levels.map((name) => `${name}(${row}, ${at})`).join(" * ");
  const first = format.scales[0];
  if (format.zero.domain !== "none" && first !== undefined) {
    functions.push(blockFunction(`${prefix}_z`, first, format.zero.codec, layout.zero, layout, buffer));
  }
  const zero = (row: string, at: string) => (format.zero.domain === "float" ? `${prefix}_z(${row}, ${at})` : null);
  const granularity = scaleGranularity(format, k);
  const elements = elementCode(prefix, layout, buffer);
  functions.push(elements.functions);

  const segment = granularity >= k || granularity % CHUNK === 0 ? CHUNK : granularity;
  const subtract = (row: string, chunk: string, vector: number): string => {
    if (format.zero.domain === "float" && midCode(format.element) !== 0) return ` - ${midCode(format.element)}.0`;
    if (format.zero.domain !== "int") return "";
    const at = `${chunk} * ${CHUNK}u + ${Math.floor((vector * 4) / segment) * segment}u`;
    return integer ? ` - i32(${prefix}_z(${row}, ${at}))` : ` - ${prefix}_z(${row}, ${at})`;
  };

  return {
    functions: functions.join("\n"),
    integer,
    segment,
    constantAlongK: granularity >= k,
    packedBytes: integer && format.element.kind === "int" && format.element.bits === 8 && format.zero.domain === "none",
    chunkWords: (out, row, chunk) => {
      const lines = [`let ${out}_at = ${row} * ${layout.rowStride}u + ${chunk} * 8u;`];
      if (names.buffer4 === undefined) {
        for (let i = 0; i < 8; i++) lines.push(`let ${out}w${i} = ${buffer}[${out}_at + ${i}u];`);
        return lines.join("\n");
      }
      for (let i = 0; i < 2; i++) lines.push(`let ${out}_q${i} = ${names.buffer4}[${out}_at / 4u + ${i}u];`);
      for (let i = 0; i < 8; i++) lines.push(`let ${out}w${i} = ${out}_q${Math.floor(i / 4)}.${"xyzw"[i % 4]};`);
      return lines.join("\n");
    },
    chunk: (out, row, chunk) => {
      const codes = CHUNK / codecVector(format.element)[1];
      const words = (codes * codecBits(format.element)) / 32;
      const lines: string[] = [];
      if (words % 4 === 0 && names.buffer4 !== undefined) {
        lines.push(`let ${out}_at = ${row} * ${layout.rowStride / 4}u + ${chunk} * ${words / 4}u;`);
        for (let i = 0; i < words / 4; i++) {
          lines.push(`let ${out}_q${i} = ${names.buffer4}[${out}_at + ${i}u];`);
        }
      } else {
        lines.push(`let ${out}_at = ${row} * ${layout.rowStride}u + ${chunk} * ${words}u;`);
        for (let i = 0; i < words; i++) lines.push(`let ${out}_w${i} = ${buffer}[${out}_at + ${i}u];`);
      }
      const packed = words % 4 === 0 && names.buffer4 !== undefined;
      const word = (i: number) => (packed ? `${out}_q${Math.floor(i / 4)}.${"xyzw"[i % 4]}` : `${out}_w${i}`);
      const vectors = decodeChunk(prefix, format.element, word, integer);
      for (const [i, vector] of vectors.entries()) lines.push(`let ${out}${i} = ${vector}${subtract(row, chunk, i)};`);
      return lines.join("\n");
    },
    scale,
    zero,
    code: (row, at) => {
      const code = elements.value(row, at);
      return format.zero.domain === "int" ? `(${code} - ${prefix}_z(${row}, ${at}))` : code;
    },
    element: (row, at) => {
      const code = elements.value(row, at);
      if (format.zero.domain === "float")
        return `((${code} - ${midCode(format.element)}.0) * (${scale(row, at)}) + ${prefix}_z(${row}, ${at}))`;
      if (format.zero.domain === "int") return `((${code} - ${prefix}_z(${row}, ${at})) * (${scale(row, at)}))`;
      return `(${code} * (${scale(row, at)}))`;
    },
  };
}

/** A function from (row, k) to the value of the block's code. */
function blockFunction(
  name: string,
  level: ScaleLevel,
  codec: Codec,
  offset: number,
  layout: StoredLayout,
  buffer: string,
): string {
  const [blockRows, blockK] = [extentOf(level.block[0], layout.shape[0]), extentOf(level.block[1], layout.shape[1])];
  const columns = Math.ceil(layout.shape[1] / Math.max(1, blockK));
  const parts: string[] = [];
  if (level.block[0] !== "all")
    parts.push(blockRows === 1 ? `row * ${columns}u` : `(row / ${blockRows}u) * ${columns}u`);
  if (columns > 1) parts.push(blockK === 1 ? "k" : `k / ${blockK}u`);
  const index = parts.length === 0 ? "0u" : parts.join(" + ");
  const bits = codecBits(codec);
  const per = 32 / bits;
  const code =
    bits === 32
      ? `${buffer}[${offset}u + index]`
      : `(${buffer}[${offset}u + index / ${per}u] >> ((index % ${per}u) * ${bits}u)) & ${2 ** bits - 1}u`;
  return `${decodeFunction(codec, `${name}_dec`)}
fn ${name}(row: u32, k: u32) -> f32 {
  let index = ${index};
  return ${name}_dec(${code});
}`;
}

/** Reading one code at a time, for any bit width and any table. */
function elementCode(prefix: string, layout: StoredLayout, buffer: string) {
  const codec = layout.format.element;
  const bits = codecBits(codec);
  const [vectorRows, vectorK] = codecVector(codec);
  const mask = bits === 32 ? "0xffffffffu" : `${2 ** bits - 1}u`;
  const size = vectorRows * vectorK;
  const table = codec.kind === "lut" && (codec.entries === "learned" || size > 1);
  const lane = `(row % ${vectorRows}u) * ${vectorK}u + k % ${vectorK}u`;
  const straddles = 32 % bits !== 0;
  const load = straddles
    ? `let low = ${buffer}[at] >> (bit % 32u);
  let high = select(0u, ${buffer}[at + 1u] << ((32u - bit % 32u) % 32u), bit % 32u + ${bits}u > 32u);
  let code = (low | high) & ${mask};`
    : `let code = (${buffer}[at] >> (bit % 32u)) & ${mask};`;
  let decoded: string;
  let declarations = "";
  if (table && codec.kind === "lut" && codec.entries !== "learned") {
    declarations = `const ${prefix}_table = array<f32, ${codec.entries.length}>(${codec.entries.map(wgslFloat).join(", ")});\n`;
    decoded = `${prefix}_table[code * ${size}u + ${lane}]`;
  } else if (table) {
    decoded = `bitcast<f32>(${buffer}[${layout.table}u + code * ${size}u + ${lane}])`;
    declarations = `fn ${prefix}_entry(code: u32, lane: u32) -> f32 { return bitcast<f32>(${buffer}[${layout.table}u + code * ${size}u + lane]); }\n`;
  } else {
    declarations = `${decodeFunction(codec, `${prefix}_dec`)}\n`;
    decoded = `${prefix}_dec(code)`;
  }
  const functions = `${declarations}fn ${prefix}_value(row: u32, k: u32) -> f32 {
  let bit = (k / ${vectorK}u) * ${bits}u;
  let at = (row / ${vectorRows}u) * ${layout.rowStride}u + bit / 32u;
  ${load}
  return ${decoded};
}`;
  return { functions, value: (row: string, at: string) => `${prefix}_value(${row}, ${at})` };
}

function wgslFloat(value: number): string {
  const text = String(Math.fround(value));
  return /[.e]/.test(text) ? `${text}f` : `${text}.0f`;
}

const hex = (value: number): string => `0x${value.toString(16)}u`;

/** The eight vec4 expressions of a chunk whose words are `word(0) ...`. */
function decodeChunk(prefix: string, codec: Codec, word: (i: number) => string, integer: boolean): string[] {
  const bits = codecBits(codec);
  const type = integer ? "vec4<i32>" : "vec4<f32>";
  const vectorK = codecVector(codec)[1];
  // Integer to float conversions run at a quarter of the rate of other arithmetic: put the code into the low bits of 2^23
  // (exact) and subtract 2^23 instead. A signed code becomes unsigned by flipping its sign bit.
  if (codec.kind === "int" && !integer) {
    const flip = codec.signed ? 2 ** (bits - 1) : 0;
    const code = (e: number): string => {
      const [w, shift] = [Math.floor((e * bits) / 32), (e * bits) % 32];
      const low = shift === 0 ? word(w) : `(${word(w)} >> ${shift}u)`;
      return shift + bits > 32 ? `(${low} | (${word(w + 1)} << ${32 - shift}u))` : low;
    };
    const magic = `vec4<u32>(${hex(0x4b000000 + flip)})`;
    return Array.from({ length: 8 }, (_, i) => {
      const codes = `(vec4<u32>(${[0, 1, 2, 3].map((lane) => code(i * 4 + lane)).join(", ")}) & vec4<u32>(${2 ** bits - 1}u))`;
      return `(bitcast<vec4<f32>>(${codes} ${flip === 0 ? "|" : "^"} ${magic}) - ${8388608 + flip}.0)`;
    });
  }
  if (codec.kind === "int" && bits === 8) {
    return Array.from({ length: 8 }, (_, i) => `${type}(${codec.signed ? "unpack4xI8" : "unpack4xU8"}(${word(i)}))`);
  }
  if (codec.kind === "int" && bits === 4) {
    // Even codes lie in the low nibbles of a word's bytes, odd codes in the high ones.
    const flip = codec.signed ? " ^ 0x08080808u" : "";
    return Array.from({ length: 8 }, (_, i) => {
      const source = word(Math.floor(i / 2));
      const low = `unpack4xU8((${source} & 0x0f0f0f0fu)${flip})`;
      const high = `unpack4xU8(((${source} >> 4u) & 0x0f0f0f0fu)${flip})`;
      const [a, b] = i % 2 === 0 ? ["x", "y"] : ["z", "w"];
      return `vec4<i32>(vec4<u32>(${low}.${a}, ${high}.${a}, ${low}.${b}, ${high}.${b}))${codec.signed ? " - 8" : ""}`;
    });
  }
  const element = (e: number): string => {
    const bit = Math.floor(e / vectorK) * bits;
    const [w, shift] = [Math.floor(bit / 32), bit % 32];
    const straddles = shift + bits > 32;
    const code = straddles
      ? `((${word(w)} >> ${shift}u) | (${word(w + 1)} << ${32 - shift}u)) & ${2 ** bits - 1}u`
      : bits === 32
        ? word(w)
        : `extractBits(${word(w)}, ${shift}u, ${bits}u)`;
    if (codec.kind === "int" && codec.signed) {
      const extended = straddles
        ? `extractBits(bitcast<i32>(${code}), 0u, ${bits}u)`
        : `extractBits(bitcast<i32>(${word(w)}), ${shift}u, ${bits}u)`;
      return integer ? extended : `f32(${extended})`;
    }
    if (codec.kind === "int") return integer ? `i32(${code})` : `f32(${code})`;
    if (codec.kind === "lut" && (codec.entries === "learned" || vectorK > 1)) {
      const lane = e % vectorK;
      return codec.entries === "learned"
        ? `${prefix}_entry(${code}, ${lane}u)`
        : `${prefix}_table[(${code}) * ${vectorK}u + ${lane}u]`;
    }
    return `${prefix}_dec(${code})`;
  };
  return Array.from(
    { length: 8 },
    (_, i) => `${type}(${[0, 1, 2, 3].map((lane) => element(i * 4 + lane)).join(", ")})`,
  );
}
