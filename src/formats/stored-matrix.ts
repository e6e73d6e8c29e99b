import { viewAs } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { blockGrid, type Codec, codecBits, codecVector, type Format } from "./format.js";
import { packRow, rowWords, writeCode } from "./pack.js";
import { CODECS } from "./table.js";
import { checkTensor, type QuantizedTensor, tensorWords } from "./tensor.js";

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
  /** Codes of rows (columns) [begin, end). Scales and zero points come with the rows, or all at once from `blocks`. */
  read(begin: number, end: number, signal?: AbortSignal): Promise<Slab>;
  blocks?(signal?: AbortSignal): Promise<BlockCodes>;
}

export interface LoadStoredOptions {
  readonly signal?: AbortSignal;
  /** Bytes of the file that are read at once (default 4 MiB; at least one step). */
  readonly tileBytes?: number;
  readonly onRows?: (rows: number, total: number) => void;
}

/** Reads a stored matrix whole, a slab at a time: the peak is the tensor and a few slabs. */
export async function loadStored(matrix: StoredMatrix, options: LoadStoredOptions = {}): Promise<QuantizedTensor> {
  const { format, shape, cut, step } = matrix;
  const { signal, tileBytes = 4 * 2 ** 20 } = options;
  const words = tensorWords(format, shape);
  let tensor: QuantizedTensor = {
    format,
    shape: [shape[0], shape[1]],
    qdata: new Uint32Array(words.qdata),
    scales: words.scales.map((count) => new Uint32Array(count)),
    ...(words.zero > 0 ? { zero: new Uint32Array(words.zero) } : {}),
  };
  const filled = { scales: words.scales.map(() => 0), zero: 0 };
  const put = ({ scales, zero, table }: Partial<BlockCodes>) => {
    if (table !== undefined) tensor = { ...tensor, table };
    for (const [i, codes] of (scales ?? []).entries()) {
      const bits = codecBits((format.scales[i] as (typeof format.scales)[number]).codec);
      filled.scales[i] = writeFlat(tensor.scales[i] as Uint32Array, filled.scales[i] as number, codes, bits);
    }
    if (zero !== undefined && tensor.zero !== undefined && format.zero.domain !== "none")
      filled.zero = writeFlat(tensor.zero, filled.zero, zero, codecBits(format.zero.codec));
  };
  const places = { rows: inverse(matrix.rows), columns: inverse(matrix.columns) };
  const total = cut === "rows" ? shape[0] : shape[1];
  const lines = Math.max(step, Math.floor(tileBytes / Math.max(1, matrix.bytesPerLine * step)) * step);
  for (let begin = 0; begin < total; begin += lines) {
    throwIfAborted(signal, `loading ${matrix.kind}`);
    const end = Math.min(begin + lines, total);
    const slab = await matrix.read(begin, end, signal);
    if (cut === "rows") putElements(tensor, slab, [begin, end], [0, shape[1]], places);
    else putElements(tensor, slab, [0, shape[0]], [begin, end], places);
    put(slab);
    options.onRows?.(Math.floor((end / total) * shape[0]), shape[0]);
  }
  if (matrix.blocks !== undefined) put(inRowOrder(await matrix.blocks(signal), matrix.rows));
  checkTensor(tensor, matrix.kind);
  const counts = format.scales.map((level) => blockGrid(level.block, shape)).map(([rows, columns]) => rows * columns);
  const zeros = words.zero > 0 ? (counts[0] as number) : 0;
  if (filled.zero !== zeros || counts.some((count, i) => count !== filled.scales[i]))
    throw new FewbitError("shape/mismatch", {
      what: `${matrix.kind} (codes of scales and zero points)`,
      got: [...filled.scales, filled.zero],
      expected: `[${[...counts, zeros].join(", ")}]`,
    });
  return tensor;
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
function inRowOrder({ scales, zero, ...rest }: BlockCodes, rows: Uint32Array | undefined): BlockCodes {
  if (rows === undefined) return { scales, ...rest, ...(zero === undefined ? {} : { zero }) };
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
  { format, shape, qdata }: QuantizedTensor,
  { elements, packed }: Slab,
  [rowBegin, rowEnd]: readonly [number, number],
  [kBegin, kEnd]: readonly [number, number],
  places: Places,
): void {
  const bits = codecBits(format.element);
  const [patchRows, patchK] = codecVector(format.element);
  const stride = rowWords(shape[1] / patchK, bits);
  const columns = (kEnd - kBegin) / patchK;
  const first = (kBegin / patchK) * bits;
  const bytes = new Uint8Array(qdata.buffer, qdata.byteOffset, qdata.byteLength);
  const rowBytes = Math.ceil((columns * bits) / 8);
  const bitPlaces = places.columns?.subarray(kBegin, kEnd).map((place) => place * bits) ?? null;
  for (let row = rowBegin / patchRows; row < rowEnd / patchRows; row++) {
    const at = row - rowBegin / patchRows;
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
  /** All bytes, or those of some rows. */
  read(rows?: readonly [begin: number, end: number], signal?: AbortSignal): Promise<Uint8Array>;
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
