import { roundUp } from "../core/shape.js";

/**
 * fewbit's one storage of codes, on the host and on every device ("plain" layout): codes of one row lie side by side,
 * least significant bit first, with no padding bits between codes; 32 codes of b bits are exactly b words.
 * - element codes start every row on a 16-byte boundary (`rowWords`), so that devices can load four words at once;
 * - scales and zero points are one dense run, row after row (`flatWords`), because they are 8, 16 or 32 bits wide.
 */
export function rowWords(columns: number, bits: number): number {
  return roundUp(Math.ceil((columns * bits) / 32), 4);
}

/** Words of a dense run of `count` codes, rounded up to whole 16 bytes. */
export function flatWords(count: number, bits: number): number {
  return roundUp(Math.ceil((count * bits) / 32), 4);
}

/** Reads the code of `bits` bits that starts at bit `index * bits` after word `base`. */
export function readCode(words: Uint32Array, base: number, index: number, bits: number): number {
  const bit = index * bits;
  const word = base + Math.floor(bit / 32);
  const offset = bit % 32;
  let code = (words[word] as number) >>> offset;
  if (offset + bits > 32) code |= (words[word + 1] as number) << (32 - offset);
  return bits === 32 ? code >>> 0 : code & (2 ** bits - 1);
}

/** ORs a code in; the bits it lands on must be zero. */
export function writeCode(words: Uint32Array, base: number, index: number, bits: number, code: number): void {
  const bit = index * bits;
  const word = base + Math.floor(bit / 32);
  const offset = bit % 32;
  words[word] = (words[word] as number) | (code << offset);
  if (offset + bits > 32) words[word + 1] = (words[word + 1] as number) | (code >>> (32 - offset));
}

/**
 * Packs one row of codes (only their low `bits` bits count) from word `base` on; the words it lands on are overwritten.
 */
export function packRow(words: Uint32Array, base: number, codes: ArrayLike<number>, count: number, bits: number): void {
  const mask = bits === 32 ? -1 : 2 ** bits - 1;
  let word = base;
  let pending = 0;
  let filled = 0;
  for (let i = 0; i < count; i++) {
    const code = (codes[i] as number) & mask;
    pending |= code << filled;
    filled += bits;
    if (filled < 32) continue;
    words[word++] = pending;
    filled -= 32;
    // A shift by 32 is a shift by nothing in JavaScript.
    pending = filled === 0 ? 0 : code >>> (bits - filled);
  }
  if (filled > 0) words[word] = pending;
}

/** Reads one row of `count` codes from word `base` on into `out`. */
export function unpackRow(
  words: Uint32Array,
  base: number,
  out: Uint32Array | Int32Array,
  count: number,
  bits: number,
): void {
  const mask = bits === 32 ? -1 : 2 ** bits - 1;
  let word = base;
  let offset = 0;
  for (let i = 0; i < count; i++) {
    let code = (words[word] as number) >>> offset;
    offset += bits;
    if (offset >= 32) {
      word++;
      offset -= 32;
      if (offset > 0) code |= (words[word] as number) << (bits - offset);
    }
    out[i] = code & mask;
  }
}

/** Packs `codes` [rows, columns] (only their low `bits` bits count) into row-aligned words. */
export function packRows(codes: ArrayLike<number>, rows: number, columns: number, bits: number): Uint32Array {
  const stride = rowWords(columns, bits);
  const words = new Uint32Array(rows * stride);
  const row = new Int32Array(columns);
  for (let r = 0; r < rows; r++) {
    for (let k = 0; k < columns; k++) row[k] = codes[r * columns + k] as number;
    packRow(words, r * stride, row, columns, bits);
  }
  return words;
}

/** The inverse of `packRows`: unsigned codes [rows, columns]. */
export function unpackRows(words: Uint32Array, rows: number, columns: number, bits: number): Uint32Array {
  const stride = rowWords(columns, bits);
  const codes = new Uint32Array(rows * columns);
  for (let r = 0; r < rows; r++) unpackRow(words, r * stride, codes.subarray(r * columns), columns, bits);
  return codes;
}

/** Packs codes into one dense run. */
export function packFlat(codes: ArrayLike<number>, bits: number): Uint32Array {
  const words = new Uint32Array(flatWords(codes.length, bits));
  packRow(words, 0, codes, codes.length, bits);
  return words;
}

/** The first `count` codes of a dense run. */
export function unpackFlat(words: Uint32Array, count: number, bits: number): Uint32Array {
  const codes = new Uint32Array(count);
  unpackRow(words, 0, codes, count, bits);
  return codes;
}
