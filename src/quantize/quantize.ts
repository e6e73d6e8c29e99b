import type { FloatType } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { roundUp } from "../core/shape.js";
import { blockGrid, codecBits, codecVector, extentOf, type Format, type Rule } from "../formats/format.js";
import { packRow, rowWords } from "../formats/pack.js";
import { type QuantizedTensor, tensorWords } from "../formats/tensor.js";
import { codebook } from "./codebook.js";
import { hqq, hqqScale, sinq } from "./hqq.js";
import { BLOCK_RULES, type BlockRule, type Procedure, type QuantizeOptions, type RuleContext } from "./rules.js";

export type { QuantizeOptions } from "./rules.js";

/**
 * Quantizes `data` [n, k] row-major, values of `dtype`, as `format.rule` says. Throws `format/block` when a block of
 * the format does not divide k and `shape/mismatch` when `data` is not n * k long.
 */
export function quantizeTensor(
  data: Float32Array,
  shape: readonly [n: number, k: number],
  dtype: FloatType,
  format: Format,
  options: QuantizeOptions = {},
): QuantizedTensor {
  if (data.length !== shape[0] * shape[1]) {
    throw new FewbitError("shape/mismatch", {
      what: "data",
      got: [data.length],
      expected: `[${shape[0]} * ${shape[1]}]`,
    });
  }
  const tensor = emptyTensor(format, shape);
  const procedure = start(tensor, dtype, options);
  const tile = { data, begin: 0, end: shape[0] };
  do procedure.pass(tile);
  while (procedure.finish());
  return tensor;
}

/** A matrix read a few rows at a time. */
export interface RowSource {
  readonly shape: readonly [n: number, k: number];
  readonly dtype: FloatType;
  /** Rows [begin, end) as float32; called once per tile and pass, in order. */
  read(begin: number, end: number): Float32Array | Promise<Float32Array>;
}

export interface QuantizeRowsOptions extends QuantizeOptions {
  /** Bytes of one float32 tile (default 16 MiB, at least one row of blocks). The peak is this plus the output. */
  readonly tileBytes?: number;
  readonly signal?: AbortSignal;
  /** Called after every tile with the rows done, over all passes of `passes` so far. */
  readonly onProgress?: (rows: number, total: number, pass: number) => void;
}

/**
 * `quantizeTensor` piece by piece, with the same result bit for bit. Throws `operation/aborted` once `signal` fires.
 */
export async function quantizeRows(
  source: RowSource,
  format: Format,
  options: QuantizeRowsOptions = {},
): Promise<QuantizedTensor> {
  const [n, k] = source.shape;
  const tensor = emptyTensor(format, source.shape);
  const procedure = start(tensor, source.dtype, options);
  const step = Math.max(1, Math.floor((options.tileBytes ?? 16 * 2 ** 20) / (4 * Math.max(k, 1))));
  const aligned = Math.min(roundUp(Math.max(1, step), tileRows(format)), Math.max(n, 1));
  let passes = 0;
  do {
    for (let begin = 0; begin < n; begin += aligned) {
      throwIfAborted(options.signal, `quantizing to ${format.name}`);
      const end = Math.min(begin + aligned, n);
      procedure.pass({ data: await source.read(begin, end), begin, end });
      options.onProgress?.(end, n, passes);
    }
    passes++;
  } while (procedure.finish());
  return tensor;
}

/** Rows that every tile is a multiple of: the tallest block that is not a whole column. */
function tileRows(format: Format): number {
  const heights = format.scales.map((level) => level.block[0]).filter((rows) => rows !== "all");
  return Math.max(codecVector(format.element)[0], ...heights);
}

function emptyTensor(format: Format, shape: readonly [number, number]): QuantizedTensor {
  requireBlocks(format, shape);
  const words = tensorWords(format, shape);
  const { element } = format;
  const table =
    element.kind === "lut" && element.entries === "learned"
      ? { table: new Float32Array(2 ** element.bits * element.vector[0] * element.vector[1]) }
      : {};
  return {
    format,
    shape: [shape[0], shape[1]],
    qdata: new Uint32Array(words.qdata),
    scales: words.scales.map((count) => new Uint32Array(count)),
    ...(words.zero > 0 ? { zero: new Uint32Array(words.zero) } : {}),
    ...table,
  };
}

/** Throws `format/block` unless every block of the format divides k (and a vector table's patch divides n too). */
export function requireBlocks(format: Format, shape: readonly [n: number, k: number]): void {
  const [patchRows, patchK] = codecVector(format.element);
  const check = (size: number, block: number, axis: string) => {
    if (size % block === 0) return;
    const nearest = Math.max(1, Math.round(size / block)) * block;
    throw new FewbitError("format/block", { format: format.name, size, block, axis, nearest });
  };
  check(shape[0], patchRows, "N");
  for (const block of [patchK, ...format.scales.map((level) => extentOf(level.block[1], shape[1]))]) {
    check(shape[1], Math.max(block, 1), "K");
  }
}

type Maker<T> = (context: RuleContext, rule: Rule) => T;

/** The rules that look at a tensor as a whole. */
const PROCEDURES = { hqq, hqq_scale: hqqScale, sinq, codebook } as const;

function start(tensor: QuantizedTensor, dtype: FloatType, options: QuantizeOptions): Procedure {
  const { format, shape } = tensor;
  const guarded = options.numerics !== "torchao";
  const first = format.scales[0];
  const columns = first === undefined ? 1 : blockGrid(first.block, shape)[1];
  const context: RuleContext = { format, dtype, guarded, options, tensor, columns };
  const { rule } = format;
  if (rule.kind in PROCEDURES) {
    return (PROCEDURES[rule.kind as keyof typeof PROCEDURES] as Maker<Procedure>)(context, rule);
  }
  return blockwise(context, (BLOCK_RULES[rule.kind as keyof typeof BLOCK_RULES] as Maker<BlockRule>)(context, rule));
}

/** Runs a rule with independent blocks: one pass, or two when a block or an outer scale spans all rows. */
function blockwise(context: RuleContext, rule: BlockRule): Procedure {
  const { format, tensor, columns } = context;
  const [n, k] = tensor.shape;
  const block = format.scales[0]?.block ?? ([1, "all"] as const);
  const tall = block[0] === "all";
  const height = extentOf(block[0], n);
  const width = extentOf(block[1], k);
  const bits = codecBits(format.element);
  const stride = rowWords(k, bits);
  const codes = new Int32Array(k);
  const lo = new Float64Array(columns).fill(Number.POSITIVE_INFINITY);
  const hi = new Float64Array(columns).fill(Number.NEGATIVE_INFINITY);
  let observing = tall || rule.begin !== undefined;

  const observe = (data: Float32Array, begin: number, end: number) => {
    for (let at = begin; at < end; at += k) {
      for (let column = 0; column < columns; column++)
        scan(data, at + column * width, at + (column + 1) * width, lo, hi, column);
    }
  };
  const encodeRows = (data: Float32Array, from: number, to: number, offset: number) => {
    for (let row = from; row < to; row++) {
      const at = (row - offset) * k;
      for (let column = 0; column < columns; column++) {
        rule.encode(column, data, at + column * width, at + (column + 1) * width, codes, column * width);
      }
      packRow(tensor.qdata, row * stride, codes, k, bits);
    }
  };

  return {
    pass: (tile) => {
      if (observing) return observe(tile.data, 0, tile.data.length);
      if (tall) return encodeRows(tile.data, tile.begin, tile.end, tile.begin);
      let data = tile.data;
      if (rule.prepare !== undefined) {
        data = tile.data.slice();
        for (let row = tile.begin; row < tile.end; row++) {
          rule.prepare(data, (row - tile.begin) * k, (row - tile.begin + 1) * k, row);
        }
      }
      for (let row = tile.begin; row < tile.end; row += height) {
        const end = Math.min(row + height, tile.end);
        lo.fill(Number.POSITIVE_INFINITY);
        hi.fill(Number.NEGATIVE_INFINITY);
        if (format.scales.length > 0) observe(data, (row - tile.begin) * k, (end - tile.begin) * k);
        const base = Math.floor(row / height) * columns;
        for (let column = 0; column < columns; column++) {
          rule.choose(base + column, column, lo[column] as number, hi[column] as number);
        }
        encodeRows(data, row, end, tile.begin);
      }
    },
    finish: () => {
      if (!observing) {
        rule.end?.();
        return false;
      }
      observing = false;
      let largest = 0;
      for (let column = 0; column < columns; column++) {
        largest = Math.max(largest, -(lo[column] as number), hi[column] as number);
      }
      rule.begin?.(largest);
      if (tall && n > 0) {
        for (let column = 0; column < columns; column++) {
          rule.choose(column, column, lo[column] as number, hi[column] as number);
        }
      }
      return true;
    },
  };
}

/** Widens lo[at], hi[at] by x[begin .. end); one NaN makes both NaN for good. */
function scan(x: Float32Array, begin: number, end: number, lo: Float64Array, hi: Float64Array, at: number): void {
  let least = lo[at] as number;
  let greatest = hi[at] as number;
  let ordered = true;
  for (let i = begin; i < end; i++) {
    const value = x[i] as number;
    if (value < least) least = value;
    if (value > greatest) greatest = value;
    if (Number.isNaN(value)) ordered = false;
  }
  lo[at] = ordered ? least : Number.NaN;
  hi[at] = ordered ? greatest : Number.NaN;
}
