import { FewbitError } from "../core/errors.js";

/**
 * Zeroes the two smallest magnitudes of every four consecutive elements; of equal ones the first goes (specification
 * 18).
 */
export function prune24(data: Float32Array): Float32Array {
  requireQuads(data.length);
  const out = data.slice();
  for (let quad = 0; quad < data.length; quad += 4) {
    const order = [0, 1, 2, 3].sort(
      (a, b) => Math.abs(data[quad + a] as number) - Math.abs(data[quad + b] as number) || a - b,
    );
    for (const i of order.slice(0, 2)) out[quad + i] = 0;
  }
  return out;
}

/** A 2:4 sparse matrix: half of the elements, and 4 bits of metadata per quad, `idx0 | idx1 << 2`. */
export interface Compressed24<T> {
  readonly values: T;
  readonly quads: Uint8Array;
}

/**
 * Keeps two of every four consecutive elements (specification 18): the nonzero ones, in order. `isZero` tells which
 * count as zero (codes have two zeros in float formats). Of more than two nonzero elements the excess is dropped.
 */
export function compress24<T extends Float32Array | Int32Array | Uint8Array | Uint32Array>(
  data: T,
  isZero: (value: number) => boolean = (value) => value === 0,
): Compressed24<T> {
  requireQuads(data.length);
  const values = new (data.constructor as new (length: number) => T)(data.length / 2);
  const quads = new Uint8Array(data.length / 4);
  for (let quad = 0; quad < quads.length; quad++) {
    const at = quad * 4;
    const [m0, m1, , m3] = [0, 1, 2, 3].map((i) => !isZero(data[at + i] as number));
    const first = m0 ? 0 : m1 ? 1 : 2;
    const low = (m0 && m1) || (!m0 && !m1) || m3 ? 1 : 0;
    const high = (!m0 && m1) || !m1 ? 1 : 0;
    const second = low | (high << 1);
    values[quad * 2] = data[at + first] as number;
    values[quad * 2 + 1] = data[at + second] as number;
    quads[quad] = first | (second << 2);
  }
  return { values, quads };
}

/** The inverse of `compress24`. */
export function expand24<T extends Float32Array | Int32Array | Uint8Array | Uint32Array>({
  values,
  quads,
}: Compressed24<T>): T {
  const out = new (values.constructor as new (length: number) => T)(values.length * 2);
  for (let quad = 0; quad < quads.length; quad++) {
    const meta = quads[quad] as number;
    out[quad * 4 + (meta & 3)] = values[quad * 2] as number;
    out[quad * 4 + (meta >> 2)] = values[quad * 2 + 1] as number;
  }
  return out;
}

/**
 * Quad metadata [rows, k / 4] as little-endian words [rows, k / 4 / (bits / 4)] of 16 (2-byte elements) or 32 bits
 * (int8).
 */
export function metadataWords(quads: Uint8Array, bits: 16 | 32): Int32Array {
  const each = bits / 4;
  const words = new Int32Array(quads.length / each);
  for (let i = 0; i < quads.length; i++) {
    const at = Math.floor(i / each);
    words[at] = (words[at] as number) | ((quads[i] as number) << (4 * (i % each)));
  }
  return bits === 16 ? words.map((word) => (word << 16) >> 16) : words;
}

/** CUTLASS's order of metadata words [rows, columns] (18), flat. */
export function reorderCutlass(words: Int32Array, rows: number, columns: number, bits: 16 | 32): Int32Array {
  const group = bits === 16 ? 32 : 16;
  const out = new Int32Array(words.length);
  for (let r = 0; r < rows; r++) {
    const moved = Math.floor(r / group) * group + (r % 8) * (group / 8) + Math.floor((r % group) / 8);
    for (let c = 0; c < columns; c++) out[cellOffset(moved, c, rows)] = words[r * columns + c] as number;
  }
  return out;
}

/** Marlin's order (18): rows move differently, the cells as in CUTLASS; [columns / 2, 2 * rows]. */
export function reorderMarlin(words: Int32Array, rows: number, columns: number): Int32Array {
  const out = new Int32Array(words.length);
  for (let r = 0; r < rows; r++) {
    const moved =
      Math.floor(r / 64) * 64 +
      (r % 2) * 2 +
      Math.floor((r % 8) / 4) +
      Math.floor((r % 4) / 2) * 32 +
      Math.floor((r % 64) / 8) * 4;
    for (let c = 0; c < columns; c++) out[cellOffset(moved, c, rows)] = words[r * columns + c] as number;
  }
  return out;
}

/** 2 x 2 cells swap their off-diagonal words; pairs of columns are stored one after another. */
function cellOffset(row: number, column: number, rows: number): number {
  let [r, c] = [row, column];
  if (r % 2 === 0 && c % 2 === 1) [r, c] = [r + 1, c - 1];
  else if (r % 2 === 1 && c % 2 === 0) [r, c] = [r - 1, c + 1];
  return Math.floor(c / 2) * 2 * rows + 2 * r + (c % 2);
}

/** A 2:4 sparse uint4 weight in Marlin's order (18). */
export interface Marlin24 {
  /** [k / 32, 2 n] words of eight nibbles. */
  readonly packed: Int32Array;
  /** [k / group, n], permuted. */
  readonly scales: Float32Array;
  /** int16 values, [k / 32, 2 n]. */
  readonly meta: Int32Array;
}

/** Packs codes [k, n] (8 means zero; 2:4 along k; k and n multiples of 64) and scales [k / group, n] for Marlin. */
export function packMarlin24(codes: Uint8Array, scales: Float32Array, k: number, n: number): Marlin24 {
  const signed = new Int32Array(n * k);
  for (let row = 0; row < k; row++)
    for (let c = 0; c < n; c++) signed[c * k + row] = (codes[row * n + c] as number) - 8;
  const { values, quads } = compress24(signed);
  const half = k / 2;
  const meta = reorderMarlin(metadataWords(quads, 16), n, k / 16);
  const tiles = new Uint8Array(n * half);
  for (let row = 0; row < half; row++) {
    for (let c = 0; c < n; c++) {
      const at = Math.floor(row / 16) * 16 * n + Math.floor(c / 16) * 256 + (row % 16) * 16 + (c % 16);
      tiles[at] = (values[c * half + row] as number) + 8;
    }
  }
  const permutation = marlinPermutation();
  const packed = new Int32Array((n * half) / 8);
  for (let i = 0; i < tiles.length; i++) {
    const source = Math.floor(i / 1024) * 1024 + (permutation[i % 1024] as number);
    packed[i >> 3] = (packed[i >> 3] as number) | ((tiles[source] as number) << (4 * (i & 7)));
  }
  const grouped = scales.length > n;
  const order = [0, 4, 1, 5, 2, 6, 3, 7];
  const permuted = scales.map((_, i) => {
    if (!grouped) return scales[i] as number;
    return scales[i - (i % 8) + (order[i % 8] as number)] as number;
  });
  return { packed, scales: permuted, meta };
}

function marlinPermutation(): number[] {
  const entries: number[] = [];
  for (let i = 0; i < 32; i++) {
    for (let j = 0; j < 4; j++) {
      for (let block = 0; block < 2; block++) {
        for (const row of [2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4) + 8, 2 * (i % 4) + 9]) {
          entries.push(16 * row + 256 * Math.floor(i / 8) + 8 * (Math.floor(i / 4) % 2) + 4 * block + j);
        }
      }
    }
  }
  const order = [0, 2, 4, 6, 1, 3, 5, 7];
  return entries.map((_, i) => entries[i - (i % 8) + (order[i % 8] as number)] as number);
}

function requireQuads(length: number): void {
  if (length % 4 === 0) return;
  throw new FewbitError("format/block", {
    format: "2:4 sparsity",
    size: length,
    block: 4,
    axis: "K",
    nearest: Math.max(4, Math.round(length / 4) * 4),
  });
}
