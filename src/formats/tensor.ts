import { FewbitError } from "../core/errors.js";
import { decode, decodeTable } from "./codec.js";
import {
  blockGrid,
  type Codec,
  codecBits,
  codecVector,
  extentOf,
  type Format,
  formatKey,
  midCode,
  type ScaleLevel,
} from "./format.js";
import { flatWords, readCode, rowWords, unpackFlat, unpackRow, unpackRows, writeCode } from "./pack.js";

/**
 * A matrix [rows, k] stored in a format. Buffers are words in the layout of `pack.ts`:
 * `qdata` holds element codes row-aligned ([rows / v0, k / v1] codes for a vector table of [v0, v1]);
 * `scales[i]` and `zero` hold one code per block, dense, in row-major block order; `table` is a learned table
 * [entries, v0 * v1] in float32.
 */
export interface QuantizedTensor {
  readonly format: Format;
  readonly shape: readonly [rows: number, k: number];
  readonly qdata: Uint32Array;
  readonly scales: readonly Uint32Array[];
  readonly zero?: Uint32Array;
  readonly table?: Float32Array;
}

/** The sizes in words of a tensor's buffers; what an upload or a device allocation needs. */
export function tensorWords(format: Format, shape: readonly [rows: number, k: number]) {
  const [rows, k] = shape;
  const [vectorRows, vectorK] = codecVector(format.element);
  const bits = codecBits(format.element);
  const count = (level: ScaleLevel) => {
    const grid = blockGrid(level.block, shape);
    return grid[0] * grid[1];
  };
  const first = format.scales[0];
  return {
    qdata: (rows / vectorRows) * rowWords(k / vectorK, bits),
    scales: format.scales.map((level) => flatWords(count(level), codecBits(level.codec))),
    zero:
      format.zero.domain === "none" || first === undefined ? 0 : flatWords(count(first), codecBits(format.zero.codec)),
  };
}

/** Bytes that a tensor's buffers hold. */
export function tensorBytes(tensor: QuantizedTensor): number {
  const buffers = [tensor.qdata, ...tensor.scales, ...(tensor.zero ? [tensor.zero] : [])];
  return buffers.reduce((sum, words) => sum + words.byteLength, tensor.table?.byteLength ?? 0);
}

/** Throws `shape/mismatch` unless every buffer has the size that the format and shape ask for. */
export function checkTensor(tensor: QuantizedTensor, what: string): void {
  const expected = tensorWords(tensor.format, tensor.shape);
  const got = [tensor.qdata.length, ...tensor.scales.map((words) => words.length), tensor.zero?.length ?? 0];
  const need = [expected.qdata, ...expected.scales, expected.zero];
  if (got.length !== need.length || got.some((words, i) => words !== need[i])) {
    throw new FewbitError("shape/mismatch", {
      what: `${what} (${formatKey(tensor.format)}, words of qdata, scales, zero_point)`,
      got,
      expected: `[${need.join(", ")}]`,
    });
  }
}

/**
 * The exact real value of every element of rows [begin, end), in float64, row-major: the meaning of a tensor. Scales of
 * several levels multiply in float32 (specification 13.1); everything else is exact or rounds only in float64.
 */
export function dequantize(tensor: QuantizedTensor, rows?: readonly [begin: number, end: number]): Float64Array {
  const { format, shape } = tensor;
  const [begin, end] = rows ?? [0, shape[0]];
  const k = shape[1];
  const out = new Float64Array((end - begin) * k);
  const values = new Float64Array(k);
  const readValues = valueReader(tensor);
  const run = scaleGranularity(format, k);
  const scaleAt = scaleReader(tensor);
  const zeroAt = zeroReader(tensor);
  const [mid, addZero] = format.zero.domain === "float" ? [midCode(format.element), true] : [0, false];
  for (let row = begin; row < end; row++) {
    const base = (row - begin) * k;
    readValues(row, values);
    for (let start = 0; start < k; start += run) {
      const scale = scaleAt(row, start);
      const zero = zeroAt(row, start);
      const stop = Math.min(start + run, k);
      if (addZero) for (let i = start; i < stop; i++) out[base + i] = ((values[i] as number) - mid) * scale + zero;
      else for (let i = start; i < stop; i++) out[base + i] = ((values[i] as number) - zero) * scale;
    }
  }
  return out;
}

/** The unsigned element codes, row-major: [rows / v0, k / v1] for a vector table. */
export function elementCodes(tensor: QuantizedTensor): Uint32Array {
  const [vectorRows, vectorK] = codecVector(tensor.format.element);
  const [rows, columns] = [tensor.shape[0] / vectorRows, tensor.shape[1] / vectorK];
  return unpackRows(tensor.qdata, rows, columns, codecBits(tensor.format.element));
}

/** The values of one scale level, one per block. */
export function scaleValues(tensor: QuantizedTensor, level: number): Float32Array {
  const { codec, block } = tensor.format.scales[level] as ScaleLevel;
  const grid = blockGrid(block, tensor.shape);
  return blockValues(codec, tensor.scales[level], grid[0] * grid[1]);
}

/** The zero points, one per block of the first level; empty for a format without them. */
export function zeroValues(tensor: QuantizedTensor): Float32Array {
  const { format, shape, zero } = tensor;
  const level = format.scales[0];
  if (format.zero.domain === "none" || level === undefined) return new Float32Array(0);
  const grid = blockGrid(level.block, shape);
  return blockValues(format.zero.codec, zero, grid[0] * grid[1]);
}

function blockValues(codec: Codec, words: Uint32Array | undefined, count: number): Float32Array {
  const codes = unpackFlat(words ?? new Uint32Array(0), count, codecBits(codec));
  return Float32Array.from(codes, (code) => decode(codec, code));
}

/** The value of an element code before scales; `lane` picks the element of a table's patch. */
export function elementValue(tensor: QuantizedTensor): (code: number, lane: number) => number {
  const codec = tensor.format.element;
  if (codec.kind !== "lut") return (code) => decode(codec, code);
  const size = codec.vector[0] * codec.vector[1];
  const table = tableOf(tensor, codec);
  return (code, lane) => table[code * size + lane] as number;
}

function tableOf({ format, table }: QuantizedTensor, codec: Extract<Codec, { kind: "lut" }>): Float32Array {
  if (codec.entries !== "learned") return Float32Array.from(codec.entries);
  if (table !== undefined) return table;
  throw new FewbitError("graph/invalid", { where: formatKey(format), reason: "its learned table is missing" });
}

/** Reads the element values of one row, before scales. */
function valueReader(tensor: QuantizedTensor): (row: number, out: Float64Array) => void {
  const { format, shape, qdata } = tensor;
  const codec = format.element;
  const bits = codecBits(codec);
  const [vectorRows, vectorK] = codecVector(codec);
  const columns = shape[1] / vectorK;
  const stride = rowWords(columns, bits);
  const codes = new Uint32Array(columns);
  if (codec.kind === "lut") {
    const size = vectorRows * vectorK;
    const table = tableOf(tensor, codec);
    return (row, out) => {
      unpackRow(qdata, Math.floor(row / vectorRows) * stride, codes, columns, bits);
      const lane = (row % vectorRows) * vectorK;
      for (let i = 0; i < columns; i++) {
        const entry = (codes[i] as number) * size + lane;
        for (let j = 0; j < vectorK; j++) out[i * vectorK + j] = table[entry + j] as number;
      }
    };
  }
  const table = bits <= 16 ? decodeTable(codec) : undefined;
  return (row, out) => {
    unpackRow(qdata, row * stride, codes, columns, bits);
    if (table !== undefined) for (let i = 0; i < columns; i++) out[i] = table[codes[i] as number] as number;
    else for (let i = 0; i < columns; i++) out[i] = decode(codec, codes[i] as number);
  };
}

function scaleReader(tensor: QuantizedTensor): (row: number, k: number) => number {
  const readers = tensor.format.scales.map((level, i) =>
    blockReader(level, level.codec, tensor.scales[i], tensor.shape),
  );
  const [only] = readers;
  if (only === undefined) return () => 1;
  if (readers.length === 1) return only;
  return (row, k) => readers.reduceRight((product, read) => Math.fround(product * read(row, k)), 1);
}

function zeroReader(tensor: QuantizedTensor): (row: number, k: number) => number {
  const { format, shape, zero } = tensor;
  const level = format.scales[0];
  if (format.zero.domain === "none" || level === undefined) return () => 0;
  return blockReader(level, format.zero.codec, zero, shape);
}

function blockReader(
  level: ScaleLevel,
  codec: Codec,
  words: Uint32Array | undefined,
  shape: readonly [number, number],
): (row: number, k: number) => number {
  const [blockRows, blockK] = [extentOf(level.block[0], shape[0]), extentOf(level.block[1], shape[1])];
  const columns = blockGrid(level.block, shape)[1];
  const bits = codecBits(codec);
  const data = words ?? new Uint32Array(0);
  return (row, k) =>
    decode(codec, readCode(data, 0, Math.floor(row / blockRows) * columns + Math.floor(k / blockK), bits));
}

/** Elements along k over which every scale level stays constant. */
export function scaleGranularity(format: Format, k: number): number {
  return format.scales.reduce((least, level) => Math.min(least, extentOf(level.block[1], k)), k);
}

/**
 * The format with every whole-tensor row extent narrowed to single rows: the same values with one scale a row, so that
 * rows of several tensors can be laid one after another.
 */
export function rowwise(format: Format): Format {
  if (format.scales.every(({ block }) => block[0] !== "all")) return format;
  const scales = format.scales.map((level) =>
    level.block[0] === "all" ? { ...level, block: [1, level.block[1]] as const } : level,
  );
  return { ...format, scales };
}

/** A tensor in its `rowwise` format: what was one code for every row is one a row. */
export function rowwiseTensor(tensor: QuantizedTensor): QuantizedTensor {
  const format = rowwise(tensor.format);
  if (format === tensor.format) return tensor;
  const { shape, scales, zero } = tensor;
  const repeated = (codes: Uint32Array | undefined, level: number, bits: number): Uint32Array => {
    const { block } = tensor.format.scales[level] as ScaleLevel;
    if (block[0] !== "all" || codes === undefined) return codes ?? new Uint32Array(0);
    const columns = blockGrid(block, shape)[1];
    const out = new Uint32Array(flatWords(shape[0] * columns, bits));
    for (let i = 0; i < shape[0] * columns; i++) writeCode(out, 0, i, bits, readCode(codes, 0, i % columns, bits));
    return out;
  };
  return {
    ...tensor,
    format,
    scales: scales.map((codes, i) => repeated(codes, i, codecBits((format.scales[i] as ScaleLevel).codec))),
    ...(format.zero.domain === "none" ? {} : { zero: repeated(zero, 0, codecBits(format.zero.codec)) }),
  };
}

/** Rows [begin, end) of a tensor; `begin` must start a block of every scale level that is not the whole tensor. */
export function sliceRows(tensor: QuantizedTensor, begin: number, end: number): QuantizedTensor {
  const { format, shape } = tensor;
  if (begin === 0 && end === shape[0]) return tensor;
  const part = [end - begin, shape[1]] as const;
  const words = tensorWords(format, part);
  const [vectorRows] = codecVector(format.element);
  const stride = tensor.qdata.length / (shape[0] / vectorRows);
  const codes = (from: Uint32Array | undefined, level: ScaleLevel, bits: number, count: number): Uint32Array => {
    const out = new Uint32Array(count);
    const columns = blockGrid(level.block, shape)[1];
    const first = level.block[0] === "all" ? 0 : Math.floor(begin / level.block[0]);
    const [rows] = blockGrid(level.block, part);
    for (let i = 0; i < rows * columns; i++)
      writeCode(out, 0, i, bits, readCode(from ?? out, 0, first * columns + i, bits));
    return out;
  };
  const scales = format.scales.map((level, i) =>
    codes(tensor.scales[i], level, codecBits(level.codec), words.scales[i] as number),
  );
  const level = format.scales[0];
  const zero =
    format.zero.domain !== "none" && level !== undefined
      ? { zero: codes(tensor.zero, level, codecBits(format.zero.codec), words.zero) }
      : {};
  return {
    format,
    shape: part,
    qdata: tensor.qdata.subarray((begin / vectorRows) * stride, (end / vectorRows) * stride),
    scales,
    ...zero,
    ...(tensor.table === undefined ? {} : { table: tensor.table }),
  };
}
