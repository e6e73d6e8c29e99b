import { FewbitError } from "../core/errors.js";
import { roundUp } from "../core/shape.js";

/*
 * Byte layouts of other libraries' files and kernels. fewbit stores codes in one way (pack.ts); these functions translate
 * at the border. Codes come and go as unsigned numbers, one per array element. Every pack function has its inverse beside it.
 */

/**
 * Which element of a pair lies in the low nibble: `first` for plain int4, MX fp4, NVFP4; `second` for tinygemm input,
 * NF4, optimizers (26).
 */
export type NibbleOrder = "first" | "second";

/** Two 4-bit codes per byte; `codes` has an even length. */
export function packNibbles(codes: ArrayLike<number>, low: NibbleOrder): Uint8Array {
  const bytes = new Uint8Array(codes.length / 2);
  for (let i = 0; i < bytes.length; i++) {
    const [a, b] = [(codes[2 * i] as number) & 15, (codes[2 * i + 1] as number) & 15];
    bytes[i] = low === "first" ? a | (b << 4) : (a << 4) | b;
  }
  return bytes;
}

/** The inverse of `packNibbles`; `codes` may be given. */
export function unpackNibbles(
  bytes: ArrayLike<number>,
  low: NibbleOrder,
  codes = new Uint8Array(bytes.length * 2),
): Uint8Array {
  for (let i = 0; i < bytes.length; i++) {
    const byte = (bytes[i] as number) & 255;
    codes[2 * i] = low === "first" ? byte & 15 : byte >>> 4;
    codes[2 * i + 1] = low === "first" ? byte >>> 4 : byte & 15;
  }
  return codes;
}

/** Codes [rows, k] of `bits` bits as two's complement numbers. */
export function signExtend(codes: ArrayLike<number>, bits: number): Int32Array {
  return Int32Array.from(codes as ArrayLike<number>, (code) => (code << (32 - bits)) >> (32 - bits));
}

/** The [columns, rows] transpose of a row-major matrix, in `out` where that is given. */
export function transpose<T extends Float32Array | Int32Array | Uint32Array | Uint16Array | Uint8Array | Int8Array>(
  data: T,
  rows: number,
  columns: number,
  out = new (data.constructor as new (length: number) => T)(data.length),
): T {
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out[c * rows + r] = data[r * columns + c] as number;
  return out;
}

const TILE_OFFSETS = [0, 8, 16, 24, 1, 9, 17, 25];

/** Position of nibble `p` of word [a][b][t][j] of the tile-packed tensor (7.2): row and column in the matrix. */
function tilePosition(word: number, p: number, k: number): number {
  const columnBlocks = k / 128;
  const j = word % 4;
  const t = Math.floor(word / 4) % 32;
  const block = Math.floor(word / 128);
  const row = 8 * Math.floor(block / columnBlocks) + Math.floor(t / 4);
  const column = 128 * (block % columnBlocks) + 32 * j + 2 * (t % 4) + (TILE_OFFSETS[p] as number);
  return row * k + column;
}

/**
 * tinygemm's tile_packed_to_4d order (7.2): uint4 codes [n, k] to int32 words [n / 8, k / 128, 32, 4]. n must be a
 * multiple of 8 and k of 128; torchao pads k to 1024 first (`padCodes`).
 */
export function packTiles4d(codes: ArrayLike<number>, n: number, k: number): Int32Array {
  requireMultiple("tile_packed_to_4d", "N", n, 8);
  requireMultiple("tile_packed_to_4d", "K", k, 128);
  const words = new Int32Array((n * k) / 8);
  for (let word = 0; word < words.length; word++) {
    let packed = 0;
    for (let p = 0; p < 8; p++) packed |= ((codes[tilePosition(word, p, k)] as number) & 15) << (4 * p);
    words[word] = packed;
  }
  return words;
}

/** The inverse of `packTiles4d`; `codes` may be given. */
export function unpackTiles4d(
  words: ArrayLike<number>,
  n: number,
  k: number,
  codes = new Uint8Array(n * k),
): Uint8Array {
  requireMultiple("tile_packed_to_4d", "N", n, 8);
  requireMultiple("tile_packed_to_4d", "K", k, 128);
  for (let word = 0; word < words.length; word++) {
    for (let p = 0; p < 8; p++) codes[tilePosition(word, p, k)] = ((words[word] as number) >>> (4 * p)) & 15;
  }
  return codes;
}

/** Copies a matrix [n, k] into the corner of a larger one, filled with `fill`. */
export function padMatrix(
  data: ArrayLike<number>,
  [n, k]: readonly [number, number],
  [toN, toK]: readonly [number, number],
  fill = 0,
): Float32Array {
  const out = new Float32Array(toN * toK).fill(fill);
  for (let row = 0; row < n; row++) for (let c = 0; c < k; c++) out[row * toK + c] = data[row * k + c] as number;
  return out;
}

/** The corner [n, k] of a matrix with rows of `fromK`. */
export function cropMatrix<T extends Float32Array | Int32Array | Uint32Array | Uint16Array | Uint8Array | Int8Array>(
  data: T,
  [n, k]: readonly [number, number],
  fromK: number,
): T {
  // Nothing is copied where there is no column to cut off.
  if (k === fromK) return data.subarray(0, n * k) as T;
  const out = new (data.constructor as new (length: number) => T)(n * k);
  for (let row = 0; row < n; row++) out.set(data.subarray(row * fromK, row * fromK + k), row * k);
  return out;
}

/** Byte offset of scale (r, c) in the swizzled layout of 128 x 4 tiles (14); `columns` is the unpadded count. */
export function blockedOffset(r: number, c: number, columns: number): number {
  const tile = Math.floor(r / 128) * Math.ceil(columns / 4) + Math.floor(c / 4);
  return tile * 512 + (r % 32) * 16 + Math.floor((r % 128) / 32) * 4 + (c % 4);
}

/**
 * Scale bytes [rows, columns] in the layout of cuBLAS and tcgen05 (14), zero padded to [roundUp(rows, 128),
 * roundUp(columns, 4)].
 */
export function toBlocked(scales: ArrayLike<number>, rows: number, columns: number): Uint8Array {
  const out = new Uint8Array(roundUp(rows, 128) * roundUp(columns, 4));
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) out[blockedOffset(r, c, columns)] = scales[r * columns + c] as number;
  }
  return out;
}

/** The inverse of `toBlocked`, in `out` where that is given. */
export function fromBlocked(
  blocked: ArrayLike<number>,
  rows: number,
  columns: number,
  out = new Uint8Array(rows * columns),
): Uint8Array {
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) out[r * columns + c] = blocked[blockedOffset(r, c, columns)] as number;
  }
  return out;
}

/** The shards of b-bit codes (10.2), as [width, shift] pairs. */
function shardsOf(bits: number): [width: number, shift: number][] {
  const shards: [number, number][] = [];
  for (let shift = 0; shift < bits; ) {
    const width = bits - shift >= 4 ? 4 : bits - shift >= 2 ? 2 : 1;
    shards.push([width, shift]);
    shift += width;
  }
  return shards;
}

/**
 * UintxTensor's shards (10.2): codes [rows, k] of 1 to 7 bits, k a multiple of 8, cut into fields of 4, 2 and 1 bits. A
 * shard of width w is [rows, k * w / 8]: byte i of a row holds the fields of codes i, i + L, i + 2 L, ... with L = k *
 * w / 8.
 */
export function packShards(codes: ArrayLike<number>, rows: number, k: number, bits: number): Uint8Array[] {
  requireMultiple(`uint${bits} shards`, "K", k, 8);
  return shardsOf(bits).map(([width, shift]) => {
    const length = (k * width) / 8;
    const shard = new Uint8Array(rows * length);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < k; column++) {
        const field = ((codes[row * k + column] as number) >>> shift) & (2 ** width - 1);
        const at = row * length + (column % length);
        shard[at] = (shard[at] as number) | (field << (width * Math.floor(column / length)));
      }
    }
    return shard;
  });
}

export function unpackShards(shards: readonly ArrayLike<number>[], rows: number, k: number, bits: number): Uint8Array {
  const codes = new Uint8Array(rows * k);
  for (const [s, [width, shift]] of shardsOf(bits).entries()) {
    const shard = shards[s] as ArrayLike<number>;
    const length = (k * width) / 8;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < k; column++) {
        const byte = shard[row * length + (column % length)] as number;
        const field = (byte >>> (width * Math.floor(column / length))) & (2 ** width - 1);
        codes[row * k + column] = (codes[row * k + column] as number) | (field << shift);
      }
    }
  }
  return codes;
}

/**
 * gemlite's packing (10.1): uint4 codes [n, k] to words of `width` bits, [k / (width / 4), n], least significant nibble
 * first along k.
 */
export function packGemlite(codes: ArrayLike<number>, n: number, k: number, width: 8 | 16 | 32): Uint32Array {
  const each = width / 4;
  requireMultiple("gemlite packing", "K", k, each);
  const words = new Uint32Array((n * k) / each);
  for (let column = 0; column < k; column++) {
    for (let row = 0; row < n; row++) {
      const at = Math.floor(column / each) * n + row;
      words[at] = (words[at] as number) | (((codes[row * k + column] as number) & 15) << (4 * (column % each)));
    }
  }
  return words;
}

export function unpackGemlite(words: ArrayLike<number>, n: number, k: number, width: 8 | 16 | 32): Uint8Array {
  const each = width / 4;
  const codes = new Uint8Array(n * k);
  for (let row = 0; row < n; row++) {
    for (let column = 0; column < k; column++) {
      codes[row * k + column] = ((words[Math.floor(column / each) * n + row] as number) >>> (4 * (column % each))) & 15;
    }
  }
  return codes;
}

/** Where each field of a 32-bit word goes in FP6-LLM's interleaving, by field width. */
const INTERLEAVE: Readonly<Record<number, readonly number[]>> = {
  1: [
    1, 5, 9, 13, 17, 21, 25, 29, 3, 7, 11, 15, 19, 23, 27, 31, 0, 4, 8, 12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26,
    30,
  ],
  2: [1, 5, 9, 13, 3, 7, 11, 15, 0, 4, 8, 12, 2, 6, 10, 14],
  4: [1, 5, 3, 7, 0, 4, 2, 6],
};

/** The element whose `width`-bit fragment is the i-th field of the packed bytes (most significant field first) (11). */
function fragmentOrder(n: number, k: number, width: number): Int32Array {
  const total = n * k;
  // The order of FP6-LLM's first pass: [32 lanes][tiles][2].
  const first = new Int32Array(total);
  const tiles = total / 64;
  let tile = 0;
  for (let a = 0; a < n / 64; a++) {
    for (let f = 0; f < k / 16; f++) {
      for (let i = 0; i < 4; i++) {
        for (let half = 0; half < 2; half++) {
          for (let upper = 0; upper < 2; upper++, tile++) {
            for (let row = 0; row < 8; row++) {
              for (let column = 0; column < 8; column++) {
                const lane = row * 4 + (column >> 1);
                const element = (a * 64 + i * 16 + upper * 8 + row) * k + f * 16 + half * 8 + column;
                first[(lane * tiles + tile) * 2 + (column & 1)] = element;
              }
            }
          }
        }
      }
    }
  }
  // The second pass moves words of four bytes from lane-major to word-major order, then interleaves the fields of each
  // word.
  const perWord = 32 / width;
  const words = total / perWord;
  const order = new Int32Array(total);
  const interleave = INTERLEAVE[width] as readonly number[];
  for (let word = 0; word < words; word++) {
    const source = ((word % 32) * (words / 32) + Math.floor(word / 32)) * perWord;
    for (let q = 0; q < perWord; q++) {
      // Bytes of a word are stored least significant first; fields count from its most significant end.
      const field = (3 - Math.floor(q / (perWord / 4))) * (perWord / 4) + (q % (perWord / 4));
      order[word * perWord + field] = first[source + (interleave[q] as number)] as number;
    }
  }
  return order;
}

/**
 * FP6-LLM's tensor-core order (11): codes [n, k] of 1 to 7 bits, n and k multiples of 64, split from the top into
 * fragments of 1, 2 and 4 bits; the bytes of the whole matrix's narrowest fragment come first. Returns n * k * bits / 8
 * bytes.
 */
export function packFpx(codes: ArrayLike<number>, n: number, k: number, bits: number): Uint8Array {
  const bytes = new Uint8Array((n * k * bits) / 8);
  forEachFragment(n, k, bits, (element, byte, place, shift, mask) => {
    bytes[byte] = (bytes[byte] as number) | ((((codes[element] as number) >>> shift) & mask) << place);
  });
  return bytes;
}

export function unpackFpx(bytes: ArrayLike<number>, n: number, k: number, bits: number): Uint8Array {
  const codes = new Uint8Array(n * k);
  forEachFragment(n, k, bits, (element, byte, place, shift, mask) => {
    codes[element] = (codes[element] as number) | ((((bytes[byte] as number) >>> place) & mask) << shift);
  });
  return codes;
}

function forEachFragment(
  n: number,
  k: number,
  bits: number,
  visit: (element: number, byte: number, place: number, shift: number, mask: number) => void,
): void {
  requireMultiple("fpx packing", "N", n, 64);
  requireMultiple("fpx packing", "K", k, 64);
  let used = 0;
  let base = 0;
  for (const width of [1, 2, 4].filter((w) => (bits & w) !== 0)) {
    const order = fragmentOrder(n, k, width);
    const shift = bits - used - width;
    const perByte = 8 / width;
    for (let i = 0; i < order.length; i++) {
      const place = 8 - width * ((i % perByte) + 1);
      visit(order[i] as number, base + Math.floor(i / perByte), place, shift, 2 ** width - 1);
    }
    used += width;
    base += (n * k * width) / 8;
  }
}

function requireMultiple(format: string, axis: string, size: number, block: number): void {
  if (size % block === 0 && size > 0) return;
  throw new FewbitError("format/block", { format, size, block, axis, nearest: roundUp(Math.max(size, 1), block) });
}
