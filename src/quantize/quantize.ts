import type { FloatType } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { roundUp } from "../core/shape.js";
import { Staging } from "../core/staging.js";
import { blockGrid, codecBits, codecVector, extentOf, type Format, type Rule } from "../formats/format.js";
import { packRow } from "../formats/pack.js";
import type { QuantizedTensor } from "../formats/tensor.js";
import { blockRows, RowWindow } from "../formats/window.js";
import { codebook } from "./codebook.js";
import { hqq, hqqScale, sinq } from "./hqq.js";
import {
  BLOCK_RULES,
  type BlockRule,
  type Procedure,
  type QuantizeOptions,
  type RuleContext,
  type Tile,
} from "./rules.js";

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
  const out = openWindow(format, shape);
  const procedure = start(out, dtype, options);
  const tile = { data, begin: 0, end: shape[0] };
  while (!procedure.writes) {
    procedure.pass(tile);
    procedure.finish();
  }
  procedure.pass(tile);
  return out.buffers;
}

/** A matrix read a few rows at a time. */
export interface RowSource {
  readonly shape: readonly [n: number, k: number];
  readonly dtype: FloatType;
  /** Rows [begin, end) as float32; called once per tile and pass, in order. */
  read(begin: number, end: number): Float32Array | Promise<Float32Array>;
}

export interface QuantizeRowsOptions extends QuantizeOptions {
  /** Bytes of one float32 tile (default 16 MiB, at least one row of blocks). */
  readonly tileBytes?: number;
  /** Memory for the tiles; without it each load has its own. */
  readonly memory?: Staging;
  readonly signal?: AbortSignal;
  /** Called after every tile with the rows done, over all passes of `passes` so far. */
  readonly onProgress?: (rows: number, total: number, pass: number) => void;
}

/**
 * `quantizeTensor` a tile of rows at a time: together they are its result bit for bit, as `sliceRows` cuts it. A tile is good until
 * the next is asked for. The rows are read once more for every pass of a rule that looks at the whole tensor before it writes; what it
 * then keeps are numbers of blocks, but for learned tables (`Codec`). Throws `operation/aborted` once `signal` fires.
 */
export async function* quantizeRows(
  source: RowSource,
  format: Format,
  options: QuantizeRowsOptions = {},
): AsyncGenerator<QuantizedTensor, void> {
  const [n, k] = source.shape;
  const { memory = new Staging(), tileBytes = 16 * 2 ** 20, signal, onProgress } = options;
  const step = Math.max(1, Math.floor(tileBytes / (4 * Math.max(k, 1))));
  const height = Math.min(roundUp(step, blockRows(format)), n);
  const mark = memory.mark;
  try {
    const out = openWindow(format, source.shape, height, memory);
    const procedure = start(out, source.dtype, options);
    for (let pass = 0; ; pass++) {
      const { writes } = procedure;
      for (let begin = 0; begin < n; begin += height) {
        throwIfAborted(signal, `quantizing to ${format.name}`);
        const end = Math.min(begin + height, n);
        if (writes) out.move(begin, end);
        procedure.pass({ data: await source.read(begin, end), begin, end });
        if (writes) yield out.rows();
        onProgress?.(end, n, pass);
      }
      if (writes) return;
      procedure.finish();
    }
  } finally {
    memory.release(mark);
  }
}

function openWindow(format: Format, shape: readonly [number, number], height = shape[0], memory?: Staging): RowWindow {
  requireBlocks(format, shape);
  return new RowWindow(format, shape, height, memory);
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

function start(out: RowWindow, dtype: FloatType, options: QuantizeOptions): Procedure {
  const { format, shape } = out;
  const guarded = options.numerics !== "torchao";
  const first = format.scales[0];
  const columns = first === undefined ? 1 : blockGrid(first.block, shape)[1];
  const context: RuleContext = { format, dtype, guarded, options, out, columns };
  const { rule } = format;
  if (rule.kind in PROCEDURES) {
    return (PROCEDURES[rule.kind as keyof typeof PROCEDURES] as Maker<Procedure>)(context, rule);
  }
  return blockwise(context, (BLOCK_RULES[rule.kind as keyof typeof BLOCK_RULES] as Maker<BlockRule>)(context, rule));
}

/** Runs a rule with independent blocks: one pass, or two when something spans all rows. */
function blockwise(context: RuleContext, rule: BlockRule): Procedure {
  const { format, out, columns } = context;
  const [n, k] = out.shape;
  const block = format.scales[0]?.block ?? ([1, "all"] as const);
  const tall = block[0] === "all";
  const height = extentOf(block[0], n);
  const width = extentOf(block[1], k);
  const bits = codecBits(format.element);
  const { stride } = out;
  const codes = new Int32Array(k);
  const lo = new Float64Array(columns);
  const hi = new Float64Array(columns);
  let prepared = new Float32Array(0);
  let writes = !tall && rule.begin === undefined;
  let greatest = 0;

  const forget = () => {
    lo.fill(Number.POSITIVE_INFINITY);
    hi.fill(Number.NEGATIVE_INFINITY);
  };
  const observe = (data: Float32Array, begin: number, end: number) => {
    for (let at = begin; at < end; at += k) {
      for (let column = 0; column < columns; column++)
        scan(data, at + column * width, at + (column + 1) * width, lo, hi, column);
    }
  };
  /** Shows `visit` every row of blocks of a tile that is not tall, its extremes observed. */
  const byBlocks = (
    data: Float32Array,
    { begin, end }: Tile,
    visit: (row: number, stop: number, base: number) => void,
  ) => {
    for (let row = begin; row < end; row += height) {
      const stop = Math.min(row + height, end);
      forget();
      if (format.scales.length > 0) observe(data, (row - begin) * k, (stop - begin) * k);
      visit(row, stop, Math.floor(row / height) * columns);
    }
  };
  const encodeRows = (data: Float32Array, from: number, to: number, offset: number) => {
    for (let row = from; row < to; row++) {
      const at = (row - offset) * k;
      for (let column = 0; column < columns; column++) {
        rule.encode(column, data, at + column * width, at + (column + 1) * width, codes, column * width);
      }
      packRow(out.buffers.qdata, (row - out.begin) * stride, codes, k, bits);
    }
  };
  const prepare = ({ data, begin, end }: Tile): Float32Array => {
    if (rule.prepare === undefined) return data;
    if (prepared.length < data.length) prepared = new Float32Array(data.length);
    prepared.set(data);
    for (let row = begin; row < end; row++) rule.prepare(prepared, (row - begin) * k, (row - begin + 1) * k, row);
    return prepared.subarray(0, data.length);
  };

  forget();
  return {
    get writes() {
      return writes;
    },
    pass: (tile) => {
      if (!writes && rule.collect === undefined) return observe(tile.data, 0, tile.data.length);
      if (!writes)
        return byBlocks(tile.data, tile, (_row, _stop, base) => {
          for (let column = 0; column < columns; column++)
            rule.collect?.(base + column, lo[column] as number, hi[column] as number);
        });
      if (tall) return encodeRows(tile.data, tile.begin, tile.end, tile.begin);
      const data = prepare(tile);
      byBlocks(data, tile, (row, stop, base) => {
        for (let column = 0; column < columns; column++)
          rule.choose(base + column, column, lo[column] as number, hi[column] as number);
        encodeRows(data, row, stop, tile.begin);
      });
    },
    finish: () => {
      writes = true;
      for (let column = 0; column < columns; column++)
        greatest = Math.max(greatest, -(lo[column] as number), hi[column] as number);
      rule.begin?.(greatest);
      if (tall && n > 0) {
        for (let column = 0; column < columns; column++) {
          rule.choose(column, column, lo[column] as number, hi[column] as number);
        }
      }
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
