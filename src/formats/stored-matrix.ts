import { viewAs } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { Staging } from "../core/staging.js";
import { type Codec, codecBits, codecVector, type Format } from "./format.js";
import { packRow, writeCode } from "./pack.js";
import { CODECS } from "./table.js";
import { type QuantizedTensor, sliceRows } from "./tensor.js";
import { blockCount, blockRows, RowWindow } from "./window.js";

export type Codes = Uint8Array | Int8Array | Uint16Array | Uint32Array | Int32Array;

/** Scale codes by level and zero points, one per block, row-major; only the low bits of each number count. */
export interface BlockCodes {
  readonly scales: readonly Codes[];
  readonly zero?: Codes;
  /** A learned table [entries, patch]. */
  readonly table?: Float32Array;
}

/** Some rows or columns of a stored matrix. Its element codes come in one of two ways. */
export interface Slab extends Partial<BlockCodes> {
  /** One code a number, row-major. */
  readonly elements?: Codes;
  /** Codes side by side, least significant bit first, every row starting on a byte: fewbit's own order. */
  readonly packed?: Uint8Array;
}

/**
 * A matrix [n, k] that a checkpoint holds in a format already: what it means, and how to get at its codes piece by piece. No
 * piece is requantized on its way into a `QuantizedTensor`.
 */
export interface StoredMatrix {
  readonly format: Format;
  readonly shape: readonly [n: number, k: number];
  /** The format that the activation is quantized to on every call; null for weight-only matrices. */
  readonly activation: Format | null;
  /** Whether its linears declare `fastAccum` (default: no). */
  readonly fastAccum?: boolean;
  /** What the file calls it, for people: "GPTQ int4", "Q6_K". */
  readonly kind: string;
  /** The axis along which the file can be cut, in multiples of `step`; `columns` steps hold whole words of codes. */
  readonly cut: "rows" | "columns";
  readonly step: number;
  /** Bytes that one row (or column) takes while it is read, for choosing the size of slabs. */
  readonly bytesPerLine: number;
  /** Row i of the tensor is row rows[i] of the file; blocks of scales are rows then, or parts of one, and come from `blocks`. */
  readonly rows?: Uint32Array;
  /** Column i of the tensor is column columns[i] of the file, so that its input has to be reordered likewise. Slabs have `elements`. */
  readonly columns?: Uint32Array;
  /**
   * Codes of rows (columns) [begin, end). Scales and zero points come with the rows, or all at once from `blocks`. Both may lie in
   * `memory`, and then only until that is released.
   */
  read(begin: number, end: number, signal?: AbortSignal, memory?: Staging): Promise<Slab>;
  blocks?(signal?: AbortSignal, memory?: Staging): Promise<BlockCodes>;
}

export interface LoadStoredOptions {
  readonly signal?: AbortSignal;
  /** Bytes of the file that are read at once (default 4 MiB; at least one step). */
  readonly tileBytes?: number;
  /** Memory for the pieces; without it each load has its own. */
  readonly memory?: Staging;
}

/** Reads a stored matrix whole, a slab at a time: the peak is the tensor and a slab. */
export async function loadStored(matrix: StoredMatrix, options: LoadStoredOptions = {}): Promise<QuantizedTensor> {
  const { memory = new Staging() } = options;
  const window = new RowWindow(matrix.format, matrix.shape);
  const mark = memory.mark;
  try {
    const blocks = await blocksOf(matrix, options.signal, memory);
    await fill(window, matrix, blocks, { ...options, memory });
    return window.buffers;
  } finally {
    memory.release(mark);
  }
}

/**
 * Whether rows of a stored matrix can be had without the others: not where the file holds its transpose, nor where they come in
 * another order.
 */
export const readsByRows = ({ cut, rows }: StoredMatrix): boolean => cut === "rows" && rows === undefined;

/**
 * Rows [begin, end) of a stored matrix a tile at a time, each good until the next is asked for. One that does not read by rows, or
 * has a block or step across `begin`, is a single tile.
 */
export async function* storedRows(
  matrix: StoredMatrix,
  [begin, end]: readonly [begin: number, end: number] = [0, matrix.shape[0]],
  options: LoadStoredOptions = {},
): AsyncGenerator<QuantizedTensor, void> {
  const { format, shape } = matrix;
  const step = lineStep(matrix);
  if (!readsByRows(matrix) || begin % step !== 0) return yield sliceRows(await loadStored(matrix, options), begin, end);
  const { memory = new Staging(), tileBytes = TILE } = options;
  const mark = memory.mark;
  try {
    const blocks = await blocksOf(matrix, options.signal, memory);
    const height = Math.min(linesOf(matrix, tileBytes), end - begin);
    const window = new RowWindow(format, shape, height, memory);
    for (let row = begin; row < end; row += height) {
      window.move(row, Math.min(row + height, end));
      await fill(window, matrix, blocks, { ...options, memory });
      yield window.rows();
    }
  } finally {
    memory.release(mark);
  }
}

const TILE = 4 * 2 ** 20;

/** Rows (columns) that everything read at once is a multiple of. */
const lineStep = ({ cut, step, format }: StoredMatrix): number =>
  cut === "rows" ? leastCommonMultiple(step, blockRows(format)) : step;

/** Rows (columns) that are read at once: about so many bytes. */
function linesOf(matrix: StoredMatrix, bytes: number): number {
  const step = lineStep(matrix);
  return Math.max(step, Math.floor(bytes / Math.max(1, matrix.bytesPerLine * step)) * step);
}

const greatestCommonDivisor = (a: number, b: number): number => (b === 0 ? a : greatestCommonDivisor(b, a % b));
const leastCommonMultiple = (a: number, b: number): number => (a / greatestCommonDivisor(a, b)) * b;

/** The block codes that are had all at once, counted. */
async function blocksOf(
  matrix: StoredMatrix,
  signal: AbortSignal | undefined,
  memory: Staging,
): Promise<BlockCodes | undefined> {
  const blocks = inRowOrder(await matrix.blocks?.(signal, memory), matrix.rows);
  if (blocks !== undefined) checkCounts(matrix, matrix.shape[0], blocks);
  return blocks;
}

/** Throws `shape/mismatch` unless there is a code for every block of so many rows. */
function checkCounts({ format, shape, kind }: StoredMatrix, rows: number, { scales, zero }: Partial<BlockCodes>): void {
  const needed = format.scales.map((_, level) => blockCount(format, level, shape, rows));
  if (format.zero.domain !== "none") needed.push(needed[0] ?? 0);
  const got = (scales ?? []).map((codes) => codes.length);
  if (format.zero.domain !== "none") got.push(zero?.length ?? 0);
  if (got.length === needed.length && needed.every((count, i) => count === got[i])) return;
  const what = `${kind} (codes of scales and zero points)`;
  throw new FewbitError("shape/mismatch", { what, got, expected: `[${needed.join(", ")}]` });
}

/** Reads the rows of a window. */
async function fill(
  window: RowWindow,
  matrix: StoredMatrix,
  blocks: BlockCodes | undefined,
  { signal, tileBytes = TILE, memory }: LoadStoredOptions & { readonly memory: Staging },
): Promise<void> {
  const { cut, shape } = matrix;
  const places = { rows: inverse(matrix.rows), columns: inverse(matrix.columns) };
  const [first, last] = cut === "rows" ? [window.begin, window.end] : [0, shape[1]];
  const lines = linesOf(matrix, tileBytes);
  for (let begin = first; begin < last; begin += lines) {
    throwIfAborted(signal, `loading ${matrix.kind}`);
    const end = Math.min(begin + lines, last);
    const mark = memory.mark;
    const slab = await matrix.read(begin, end, signal, memory);
    if (cut === "rows") putElements(window, slab, [begin, end], [0, shape[1]], places);
    else putElements(window, slab, [0, shape[0]], [begin, end], places);
    if (blocks === undefined) {
      checkCounts(matrix, end - begin, slab);
      putBlocks(window, slab, [begin, end], begin);
    }
    memory.release(mark);
  }
  if (blocks !== undefined) putBlocks(window, blocks, [window.begin, window.end], 0);
}

/** Writes the block codes of rows [begin, end); those of `codes` begin with row `from`. Rows begin blocks. */
function putBlocks(
  window: RowWindow,
  codes: Partial<BlockCodes>,
  [begin, end]: readonly [number, number],
  from: number,
): void {
  const { format, shape, buffers } = window;
  const put = (words: Uint32Array | undefined, part: Codes | undefined, level: number, bits: number) => {
    if (words === undefined || part === undefined) return;
    const before = (row: number) =>
      format.scales[level]?.block[0] === "all" ? 0 : blockCount(format, level, shape, row);
    const skipped = before(begin) - before(from);
    const count = blockCount(format, level, shape, end - begin);
    writeFlat(words, before(begin) - window.firstBlock(level), part.subarray(skipped, skipped + count), bits);
  };
  for (const [level, { codec }] of format.scales.entries())
    put(buffers.scales[level], codes.scales?.[level], level, codecBits(codec));
  if (format.zero.domain !== "none") put(buffers.zero, codes.zero, 0, codecBits(format.zero.codec));
  if (codes.table !== undefined) buffers.table?.set(codes.table);
}

/** Where each row and column of the file goes; null for an order that is kept. */
interface Places {
  readonly rows: Uint32Array | null;
  readonly columns: Uint32Array | null;
}

function inverse(order: Uint32Array | undefined): Uint32Array | null {
  if (order === undefined) return null;
  const places = new Uint32Array(order.length);
  for (const [i, from] of order.entries()) places[from] = i;
  return places;
}

/** Block codes with their rows in another order. */
function inRowOrder(blocks: BlockCodes | undefined, rows: Uint32Array | undefined): BlockCodes | undefined {
  if (blocks === undefined || rows === undefined) return blocks;
  const { scales, zero, ...rest } = blocks;
  const moved = (codes: Codes): Codes => {
    const width = codes.length / rows.length;
    const out = codes.slice();
    for (const [i, from] of rows.entries()) out.set(codes.subarray(from * width, (from + 1) * width), i * width);
    return out;
  };
  return { scales: scales.map(moved), ...rest, ...(zero === undefined ? {} : { zero: moved(zero) }) };
}

/** Packs a slab's element codes where they belong; column ranges start on a word. */
function putElements(
  { format, shape, stride, begin, buffers: { qdata } }: RowWindow,
  { elements, packed }: Slab,
  [rowBegin, rowEnd]: readonly [number, number],
  [kBegin, kEnd]: readonly [number, number],
  places: Places,
): void {
  const bits = codecBits(format.element);
  const [patchRows, patchK] = codecVector(format.element);
  const columns = (kEnd - kBegin) / patchK;
  const first = (kBegin / patchK) * bits;
  const bytes = new Uint8Array(qdata.buffer, qdata.byteOffset, qdata.byteLength);
  const rowBytes = Math.ceil((columns * bits) / 8);
  const bitPlaces = places.columns?.subarray(kBegin, kEnd).map((place) => place * bits) ?? null;
  const [firstRow, lastRow] = [(rowBegin - begin) / patchRows, (rowEnd - begin) / patchRows];
  const whole = packed?.length === (lastRow - firstRow) * stride * 4 && columns * patchK === shape[1];
  if (whole && places.rows === null) {
    bytes.set(packed, firstRow * stride * 4);
    return;
  }
  for (let row = firstRow; row < lastRow; row++) {
    const at = row - firstRow;
    const base = (places.rows?.[row] ?? row) * stride;
    if (bitPlaces !== null)
      scatter(qdata, base, (elements as Codes).subarray(at * columns, (at + 1) * columns), bitPlaces, bits);
    else if (packed !== undefined) bytes.set(packed.subarray(at * rowBytes, (at + 1) * rowBytes), base * 4 + first / 8);
    else if (elements !== undefined)
      packRow(qdata, base + first / 32, elements.subarray(at * columns, (at + 1) * columns), columns, bits);
  }
}

/** Writes each code of a part of a row at a bit of its own; there are only zeros before. */
function scatter(words: Uint32Array, base: number, codes: Codes, bitPlaces: Uint32Array, bits: number): void {
  const mask = 2 ** bits - 1;
  for (let i = 0; i < bitPlaces.length; i++) {
    const bit = bitPlaces[i] as number;
    const code = (codes[i] as number) & mask;
    const word = base + (bit >>> 5);
    const offset = bit & 31;
    words[word] = (words[word] as number) | (code << offset);
    if (offset + bits > 32) words[word + 1] = (words[word + 1] as number) | (code >>> (32 - offset));
  }
}

/** Writes codes into a dense run from code `at` on, and returns where the next one goes. */
function writeFlat(words: Uint32Array, at: number, codes: Codes, bits: number): number {
  const { buffer, byteOffset } = words;
  const room = Math.floor((words.length * 32) / bits);
  // A damaged count shows as a size that does not fit; typed arrays would throw an error without a code.
  const fitting = codes.length <= room - at ? codes : codes.subarray(0, Math.max(0, room - at));
  if (bits === 8) new Uint8Array(buffer, byteOffset).set(fitting, at);
  else if (bits === 16) new Uint16Array(buffer, byteOffset).set(fitting, at);
  else if (bits === 32) words.set(fitting, at);
  else for (let i = 0; i < fitting.length; i++) writeCode(words, 0, at + i, bits, fitting[i] as number);
  return at + codes.length;
}

/** One tensor of a file that holds part of a stored matrix, little-endian and row-major. */
export interface StoredPart {
  readonly dtype: string;
  readonly shape: readonly number[];
  /** All bytes, or those of some rows; in `memory`, where that is given and the source can put them there. */
  read(rows?: readonly [begin: number, end: number], signal?: AbortSignal, memory?: Staging): Promise<Uint8Array>;
}

/** A part whose bytes are at hand. */
export function memoryPart(dtype: string, shape: readonly number[], bytes: Uint8Array): StoredPart {
  const rowBytes = bytes.byteLength / Math.max(1, shape[0] ?? 1);
  return {
    dtype,
    shape,
    read: async (rows) => (rows === undefined ? bytes : bytes.subarray(rows[0] * rowBytes, rows[1] * rowBytes)),
  };
}

/** The raw codes of a part's bytes: one unsigned number an element. */
export function codesOf(dtype: string, bytes: Uint8Array): Codes {
  if (dtype === "F32" || dtype === "I32" || dtype === "U32") return viewAs("u32", bytes);
  if (dtype === "F16" || dtype === "BF16" || dtype === "I16") return viewAs("bf16", bytes);
  return bytes;
}

const SCALE_CODECS: Readonly<Record<string, Codec>> = {
  F32: CODECS.f32,
  F16: CODECS.f16,
  BF16: CODECS.bf16,
  F8_E4M3: CODECS.e4m3,
  F8_E8M0: CODECS.e8m0,
};

/** The codec of scales that are stored in a safetensors dtype; undefined for one that is no scale. */
export function scaleCodec(dtype: string): Codec | undefined {
  return Object.hasOwn(SCALE_CODECS, dtype) ? SCALE_CODECS[dtype] : undefined;
}
