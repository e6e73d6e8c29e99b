import { f16BitsToF32, f32Bits } from "../core/dtype.js";
import { type Block, type Codec, defineFormat, type Format, withScale } from "./format.js";
import { CODECS, FORMATS } from "./table.js";

/*
 * The block types of GGML files, as formats. Every type below is exactly a format: codes, scales and zero points are copied, and
 * the value that fewbit computes is the value that GGML defines. Source: the block structures of ggml-common.h and the
 * dequantize_row functions of ggml-quants.c.
 */

/** Where one block's numbers go. */
export interface BlockOutput {
  /** Element codes; the block's begin at `element`. */
  readonly elements: Uint8Array;
  element: number;
  /** Codes of the first scale level and the zero points; the block's begin at `group`. */
  readonly scales: Uint8Array | Uint16Array;
  readonly zeros: Uint16Array | Uint32Array | null;
  group: number;
  /** Codes of the second scale level, one a block, or null. */
  readonly supers: Uint16Array | null;
  block: number;
}

export interface GgmlType {
  readonly name: string;
  /** Elements and bytes of a block. */
  readonly elements: number;
  readonly bytes: number;
  readonly format: Format;
  unpack(source: Uint8Array, at: number, out: BlockOutput): void;
}

/** Element codes 0, 1, 2, ... as they are: a float zero point then belongs to code 0, where GGML has its minimum. */
const counting = (bits: number): Codec => ({
  kind: "lut",
  bits,
  entries: Array.from({ length: 2 ** bits }, (_, i) => i),
  vector: [1, 1],
});
const IQ4: Codec = {
  kind: "lut",
  bits: 4,
  entries: [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
  vector: [1, 1],
};
const ROW32: Block = [1, 32];
const scaled = (name: "int4" | "int5" | "int8") => withScale(FORMATS[name], { block: ROW32, codec: CODECS.f16 });
const SOURCE = "ggml, ggml-common.h";

const format = (name: string, row: Pick<Format, "element" | "scales"> & Partial<Pick<Format, "zero">>): Format =>
  defineFormat(name, { ...row, rule: { kind: "cast" }, source: SOURCE });
/** A scale and a minimum in float16 for 32 elements. */
const withMinimum = (name: string, bits: number): Format =>
  format(name, {
    element: counting(bits),
    scales: [{ codec: CODECS.f16, block: ROW32 }],
    zero: { domain: "float", codec: CODECS.f16 },
  });
/** Integer scales of `group` elements, and a float16 scale of 256. */
const twoLevels = (codec: Codec, group: number): Format["scales"] => [
  { codec, block: [1, group] },
  { codec: CODECS.f16, block: [1, 256] },
];
/** As `twoLevels`, with minima; the product of the two levels of minima is exact in float32. */
const twoLevelsWithMinimum = (name: string, bits: number, group: number): Format =>
  format(name, {
    element: counting(bits),
    scales: twoLevels(CODECS.uint8, group),
    zero: { domain: "float", codec: CODECS.f32 },
  });

const u16 = (source: Uint8Array, at: number): number => (source[at] as number) | ((source[at + 1] as number) << 8);

/** 16 bytes: low nibbles are elements 0 to 15, high ones 16 to 31. */
function nibbles(source: Uint8Array, at: number, out: BlockOutput, flip: number, first = out.element): void {
  for (let i = 0; i < 16; i++) {
    const byte = source[at + i] as number;
    out.elements[first + i] = (byte & 15) ^ flip;
    out.elements[first + 16 + i] = (byte >>> 4) ^ flip;
  }
}

/** As `nibbles`, the fifth bit of element i being bit i of the 32-bit word before them. */
function fiveBits(source: Uint8Array, at: number, out: BlockOutput, flip: number): void {
  nibbles(source, at + 4, out, 0);
  for (let i = 0; i < 32; i++) {
    const high = ((source[at + (i >>> 3)] as number) >>> (i & 7)) & 1;
    const where = out.element + i;
    out.elements[where] = ((out.elements[where] as number) | (high << 4)) ^ flip;
  }
}

/** Scale and minimum j of the eight pairs of six bits that Q4_K and Q5_K pack into twelve bytes. */
function sixBitPair(source: Uint8Array, at: number, j: number): readonly [scale: number, minimum: number] {
  const byte = (i: number) => source[at + i] as number;
  if (j < 4) return [byte(j) & 63, byte(j + 4) & 63];
  return [(byte(j + 4) & 15) | ((byte(j - 4) >>> 6) << 4), (byte(j + 4) >>> 4) | ((byte(j) >>> 6) << 4)];
}

/** Writes -(minimum * dmin), which float32 holds exactly: 11 bits times 6. */
function putMinimum(out: BlockOutput, group: number, dmin: number, minimum: number): void {
  (out.zeros as Uint32Array)[out.group + group] = f32Bits(-(dmin * minimum));
}

const TYPES: Readonly<Record<number, GgmlType>> = {
  2: {
    name: "Q4_0",
    elements: 32,
    bytes: 18,
    format: scaled("int4"),
    unpack(source, at, out) {
      out.scales[out.group] = u16(source, at);
      nibbles(source, at + 2, out, 8);
    },
  },
  3: {
    name: "Q4_1",
    elements: 32,
    bytes: 20,
    format: withMinimum("ggml_q4_1", 4),
    unpack(source, at, out) {
      out.scales[out.group] = u16(source, at);
      (out.zeros as Uint16Array)[out.group] = u16(source, at + 2);
      nibbles(source, at + 4, out, 0);
    },
  },
  6: {
    name: "Q5_0",
    elements: 32,
    bytes: 22,
    format: scaled("int5"),
    unpack(source, at, out) {
      out.scales[out.group] = u16(source, at);
      fiveBits(source, at + 2, out, 16);
    },
  },
  7: {
    name: "Q5_1",
    elements: 32,
    bytes: 24,
    format: withMinimum("ggml_q5_1", 5),
    unpack(source, at, out) {
      out.scales[out.group] = u16(source, at);
      (out.zeros as Uint16Array)[out.group] = u16(source, at + 2);
      fiveBits(source, at + 4, out, 0);
    },
  },
  8: {
    name: "Q8_0",
    elements: 32,
    bytes: 34,
    format: scaled("int8"),
    unpack(source, at, out) {
      out.scales[out.group] = u16(source, at);
      out.elements.set(source.subarray(at + 2, at + 34), out.element);
    },
  },
  10: {
    name: "Q2_K",
    elements: 256,
    bytes: 84,
    format: twoLevelsWithMinimum("ggml_q2_k", 2, 16),
    unpack(source, at, out) {
      (out.supers as Uint16Array)[out.block] = u16(source, at + 80);
      const dmin = f16BitsToF32(u16(source, at + 82));
      for (let j = 0; j < 16; j++) {
        const pair = source[at + j] as number;
        out.scales[out.group + j] = pair & 15;
        putMinimum(out, j, dmin, pair >>> 4);
      }
      for (let e = 0; e < 256; e++) {
        const byte = source[at + 16 + (e >>> 7) * 32 + (e & 31)] as number;
        out.elements[out.element + e] = (byte >>> (2 * ((e >>> 5) & 3))) & 3;
      }
    },
  },
  11: {
    name: "Q3_K",
    elements: 256,
    bytes: 110,
    format: format("ggml_q3_k", { element: FORMATS.int3.element, scales: twoLevels(CODECS.int8, 16) }),
    unpack(source, at, out) {
      (out.supers as Uint16Array)[out.block] = u16(source, at + 108);
      for (let j = 0; j < 16; j++) {
        const low = ((source[at + 96 + (j & 7)] as number) >>> (j < 8 ? 0 : 4)) & 15;
        const high = ((source[at + 104 + (j & 3)] as number) >>> (2 * (j >>> 2))) & 3;
        out.scales[out.group + j] = (low | (high << 4)) - 32;
      }
      for (let e = 0; e < 256; e++) {
        const low = ((source[at + 32 + (e >>> 7) * 32 + (e & 31)] as number) >>> (2 * ((e >>> 5) & 3))) & 3;
        const high = ((source[at + (e & 31)] as number) >>> (e >>> 5)) & 1;
        out.elements[out.element + e] = (low | (high << 2)) ^ 4;
      }
    },
  },
  12: {
    name: "Q4_K",
    elements: 256,
    bytes: 144,
    format: twoLevelsWithMinimum("ggml_q4_k", 4, 32),
    unpack: (source, at, out) => unpackPairs(source, at, out, false),
  },
  13: {
    name: "Q5_K",
    elements: 256,
    bytes: 176,
    format: twoLevelsWithMinimum("ggml_q5_k", 5, 32),
    unpack: (source, at, out) => unpackPairs(source, at, out, true),
  },
  14: {
    name: "Q6_K",
    elements: 256,
    bytes: 210,
    format: format("ggml_q6_k", { element: FORMATS.int6.element, scales: twoLevels(CODECS.int8, 16) }),
    unpack(source, at, out) {
      (out.supers as Uint16Array)[out.block] = u16(source, at + 208);
      for (let j = 0; j < 16; j++) out.scales[out.group + j] = source[at + 192 + j] as number;
      for (let e = 0; e < 256; e++) {
        const byte = source[at + (e >>> 7) * 64 + (e & 63)] as number;
        const low = e & 64 ? byte >>> 4 : byte & 15;
        const high = ((source[at + 128 + (e >>> 7) * 32 + (e & 31)] as number) >>> (2 * ((e >>> 5) & 3))) & 3;
        out.elements[out.element + e] = (low | (high << 4)) ^ 32;
      }
    },
  },
  20: {
    name: "IQ4_NL",
    elements: 32,
    bytes: 18,
    format: format("ggml_iq4_nl", { element: IQ4, scales: [{ codec: CODECS.f16, block: ROW32 }] }),
    unpack(source, at, out) {
      out.scales[out.group] = u16(source, at);
      nibbles(source, at + 2, out, 0);
    },
  },
  23: {
    name: "IQ4_XS",
    elements: 256,
    bytes: 136,
    format: format("ggml_iq4_xs", { element: IQ4, scales: twoLevels(CODECS.int8, 32) }),
    unpack(source, at, out) {
      (out.supers as Uint16Array)[out.block] = u16(source, at);
      const highs = u16(source, at + 2);
      for (let j = 0; j < 8; j++) {
        const low = ((source[at + 4 + (j >>> 1)] as number) >>> (4 * (j & 1))) & 15;
        out.scales[out.group + j] = (low | (((highs >>> (2 * j)) & 3) << 4)) - 32;
        nibbles(source, at + 8 + 16 * j, out, 0, out.element + 32 * j);
      }
    },
  },
  39: {
    name: "MXFP4",
    elements: 32,
    bytes: 17,
    format: FORMATS.mxfp4,
    unpack(source, at, out) {
      out.scales[out.group] = source[at] as number;
      nibbles(source, at + 1, out, 0);
    },
  },
};

/** Q4_K and Q5_K: two float16 scales and eight pairs, then nibbles; between them Q5_K has the fifth bits (`five`). */
function unpackPairs(source: Uint8Array, at: number, out: BlockOutput, five: boolean): void {
  (out.supers as Uint16Array)[out.block] = u16(source, at);
  const dmin = f16BitsToF32(u16(source, at + 2));
  for (let j = 0; j < 8; j++) {
    const [scale, minimum] = sixBitPair(source, at + 4, j);
    out.scales[out.group + j] = scale;
    putMinimum(out, j, dmin, minimum);
  }
  const low = at + (five ? 48 : 16);
  for (let e = 0; e < 256; e++) {
    const byte = source[low + (e >>> 6) * 32 + (e & 31)] as number;
    const fifth = five ? ((source[at + 16 + (e & 31)] as number) >>> (e >>> 5)) & 1 : 0;
    out.elements[out.element + e] = (e & 32 ? byte >>> 4 : byte & 15) | (fifth << 4);
  }
}

/** A block type by its number in files; undefined for the others. */
export function ggmlType(id: number): GgmlType | undefined {
  return TYPES[id];
}

/** Numbers of the block types that can be read. */
export const GGML_TYPES: readonly number[] = Object.keys(TYPES).map(Number);
