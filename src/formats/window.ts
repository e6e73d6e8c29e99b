import type { Staging } from "../core/staging.js";
import { blockGrid, type Codec, codecBits, codecVector, type Format } from "./format.js";
import { rowWords } from "./pack.js";
import { type QuantizedTensor, tensorWords } from "./tensor.js";

/** Rows that a cut of a tensor is a multiple of: the tallest block that is not a whole column. */
export function blockRows(format: Format): number {
  const heights = format.scales.map(({ block }) => block[0]).filter((rows) => rows !== "all");
  return Math.max(codecVector(format.element)[0], ...heights);
}

/** How many codes of a scale level (of zero points: the first) belong to `rows` rows of `shape`. */
export function blockCount(format: Format, level: number, [, k]: readonly [number, number], rows: number): number {
  const { block } = format.scales[level] as Format["scales"][number];
  const grid = blockGrid(block, [rows, k]);
  return grid[0] * grid[1];
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Uint32Array): Uint8Array =>
  new Uint8Array(buffer, byteOffset, byteLength);

/**
 * The rows of a tensor that are being made: all of them, or a few in memory that the next ones take over. What spans every row (a
 * scale of the tensor or of columns, a learned table) stays, and is in every window.
 */
export class RowWindow {
  readonly format: Format;
  /** The shape of the tensor, not of the window. */
  readonly shape: readonly [rows: number, k: number];
  /** Buffers for the tallest window. */
  readonly buffers: QuantizedTensor;
  #begin = 0;
  #end: number;

  /** A window of `height` rows over a tensor of `shape`; without `memory` in memory of its own. */
  constructor(format: Format, shape: readonly [number, number], height = shape[0], memory?: Staging) {
    this.format = format;
    this.shape = [shape[0], shape[1]];
    this.#end = height;
    const words = tensorWords(format, [height, shape[1]]);
    const make = (count: number): Uint32Array => {
      if (memory === undefined) return new Uint32Array(count);
      return memory.words(count).fill(0);
    };
    const { element } = format;
    const learned = element.kind === "lut" && element.entries === "learned";
    this.buffers = {
      format,
      shape: [height, shape[1]],
      qdata: make(words.qdata),
      scales: words.scales.map(make),
      ...(words.zero > 0 ? { zero: make(words.zero) } : {}),
      ...(learned ? { table: new Float32Array(2 ** element.bits * element.vector[0] * element.vector[1]) } : {}),
    };
  }

  /** The first row of the window. */
  get begin(): number {
    return this.#begin;
  }

  get end(): number {
    return this.#end;
  }

  /** Moves to rows [begin, end), all zeros but for what spans every row. */
  move(begin: number, end: number): void {
    this.#begin = begin;
    this.#end = end;
    this.buffers.qdata.fill(0);
    for (const [i, { block }] of this.format.scales.entries()) if (block[0] !== "all") this.buffers.scales[i]?.fill(0);
    if (this.format.scales[0]?.block[0] !== "all") this.buffers.zero?.fill(0);
  }

  /** Words of one row of codes. */
  get stride(): number {
    const { element } = this.format;
    return rowWords(this.shape[1] / codecVector(element)[1], codecBits(element));
  }

  /** The block of a level, counted over the tensor, that is the first of the window. */
  firstBlock(level: number): number {
    const { block } = this.format.scales[level] as Format["scales"][number];
    if (block[0] === "all") return 0;
    return Math.floor(this.#begin / block[0]) * blockGrid(block, this.shape)[1];
  }

  /** Takes over a tensor's rows as those from `row` on, which begins a block. */
  put(row: number, { format, shape: [count], qdata, scales, zero, table }: QuantizedTensor): void {
    const { buffers, shape } = this;
    buffers.qdata.set(qdata, ((row - this.#begin) / codecVector(format.element)[0]) * this.stride);
    const copy = (to: Uint32Array | undefined, from: Uint32Array | undefined, level: number, codec: Codec) => {
      if (to === undefined || from === undefined) return;
      const size = codecBits(codec) / 8;
      const tall = format.scales[level]?.block[0] === "all";
      const at = tall ? 0 : blockCount(format, level, shape, row) - this.firstBlock(level);
      bytesOf(to).set(bytesOf(from).subarray(0, blockCount(format, level, shape, count) * size), at * size);
    };
    for (const [level, { codec }] of format.scales.entries()) copy(buffers.scales[level], scales[level], level, codec);
    if (format.zero.domain !== "none") copy(buffers.zero, zero, 0, format.zero.codec);
    if (table !== undefined) buffers.table?.set(table);
  }

  /** The rows as a tensor of their own, in the memory of the window. */
  rows(): QuantizedTensor {
    const { format, buffers, shape } = this;
    const rows = this.#end - this.#begin;
    if (rows === buffers.shape[0]) return buffers;
    const { scales, zero } = buffers;
    const words = tensorWords(format, [rows, shape[1]]);
    return {
      ...buffers,
      shape: [rows, shape[1]],
      qdata: buffers.qdata.subarray(0, words.qdata),
      scales: scales.map((codes, i) => codes.subarray(0, words.scales[i])),
      ...(zero === undefined ? {} : { zero: zero.subarray(0, words.zero) }),
    };
  }
}
