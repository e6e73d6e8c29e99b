import {
  type Block,
  blockGrid,
  type Codec,
  codecBits,
  codecName,
  codecVector,
  extentOf,
  type Format,
} from "./format.js";
import { rowWords, unpackRow } from "./pack.js";
import type { QuantizedTensor } from "./tensor.js";

/** One tensor of a file that a parameter is stored in; dtypes are safetensors'. */
export interface PartShape {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
}

/** How a quantized parameter is written: what its metadata says, and its parts. Nothing here depends on the codes. */
export interface StoredClass {
  readonly type: string;
  readonly attributes: Readonly<Record<string, unknown>>;
  readonly parts: readonly PartShape[];
  /** The bytes of a part, little-endian. */
  encode(tensor: QuantizedTensor, part: string): Uint8Array;
}

const DTYPES: Readonly<Record<string, string>> = {
  f32: "F32",
  f16: "F16",
  bf16: "BF16",
  e4m3: "F8_E4M3",
  e8m0: "F8_E8M0",
  int8: "I8",
  uint8: "U8",
};

/** safetensors' dtype of codes of at least a byte. */
export const partDtype = (codec: Codec): string => DTYPES[codecName(codec)] ?? `U${codecBits(codec)}`;

/** Bytes of the rows of element codes, side by side and least significant first, without fewbit's padding of rows. */
export function packedRows({ format, shape, qdata }: QuantizedTensor): Uint8Array {
  const [patchRows, patchK] = codecVector(format.element);
  const bits = codecBits(format.element);
  const columns = shape[1] / patchK;
  const length = Math.ceil((columns * bits) / 8);
  const stride = rowWords(columns, bits) * 4;
  const bytes = new Uint8Array(qdata.buffer, qdata.byteOffset, qdata.byteLength);
  if (length === stride) return bytes;
  const rows = shape[0] / patchRows;
  const out = new Uint8Array(rows * length);
  for (let r = 0; r < rows; r++) out.set(bytes.subarray(r * stride, r * stride + length), r * length);
  return out;
}

/** Bytes of a dense run of codes of 8, 16 or 32 bits. */
export function flatBytes(words: Uint32Array, count: number, bits: number): Uint8Array {
  return new Uint8Array(words.buffer, words.byteOffset, (count * bits) / 8);
}

/** One byte an element: two's complement for signed codes. */
export function byteElements({ format, shape, qdata }: QuantizedTensor): Uint8Array {
  const [n, k] = shape;
  const bits = codecBits(format.element);
  const signed = format.element.kind === "int" && format.element.signed;
  const stride = rowWords(k, bits);
  const codes = new Uint32Array(k);
  const out = new Uint8Array(n * k);
  for (let r = 0; r < n; r++) {
    unpackRow(qdata, r * stride, codes, k, bits);
    for (let c = 0; c < k; c++) {
      const code = codes[c] as number;
      out[r * k + c] = signed ? (code << (32 - bits)) >> (32 - bits) : code;
    }
  }
  return out;
}

/** The blocks of the first scale level. */
export function gridOf(format: Format, shape: readonly [number, number]): [number, number] {
  return blockGrid((format.scales[0] as { block: Block }).block, shape);
}

/** Scales of a level. */
export function scaleBytes(tensor: QuantizedTensor, level = 0): Uint8Array {
  const { codec, block } = tensor.format.scales[level] as { codec: Codec; block: Block };
  const [rows, columns] = blockGrid(block, tensor.shape);
  return flatBytes(tensor.scales[level] as Uint32Array, rows * columns, codecBits(codec));
}

/** Zero points, or zeros of one byte where the format has none. */
export function zeroBytes(tensor: QuantizedTensor): Uint8Array {
  const { format, shape, zero } = tensor;
  const [rows, columns] = gridOf(format, shape);
  if (format.zero.domain === "none" || zero === undefined) return new Uint8Array(rows * columns);
  return flatBytes(zero, rows * columns, codecBits(format.zero.codec));
}

/** A class whose parts are made by one function each. */
export function classOf(
  type: string,
  attributes: Readonly<Record<string, unknown>>,
  parts: Readonly<
    Record<string, readonly [dtype: string, shape: readonly number[], encode: (tensor: QuantizedTensor) => Uint8Array]>
  >,
): StoredClass {
  return {
    type,
    attributes,
    parts: Object.entries(parts).map(([name, [dtype, shape]]) => ({ name, dtype, shape })),
    encode: (tensor, part) => (parts[part] as (typeof parts)[string])[2](tensor),
  };
}

/** [rows, k] of a block of the first scale level. */
export const blockSize = (format: Format, shape: readonly [number, number]) =>
  (format.scales[0] as { block: Block }).block.map((extent, axis) => extentOf(extent, shape[axis] as number));
