import type { Format } from "../formats/format.js";
import { codecBits, codecVector } from "../formats/format.js";
import { rowWords } from "../formats/pack.js";
import { type QuantizedTensor, tensorWords } from "../formats/tensor.js";

/**
 * One device buffer per stored tensor: [qdata | scales[0] | scales[1] ... | zero | table], each part a multiple of four
 * words. Offsets and strides are in words.
 */
export interface StoredLayout {
  readonly format: Format;
  readonly shape: readonly [rows: number, k: number];
  readonly rowStride: number;
  readonly scales: readonly number[];
  readonly zero: number;
  readonly table: number;
  readonly words: number;
  readonly bytes: number;
}

export function storedLayout(format: Format, shape: readonly [rows: number, k: number]): StoredLayout {
  const parts = tensorWords(format, shape);
  let at = parts.qdata;
  const scales = parts.scales.map((words) => {
    const offset = at;
    at += words;
    return offset;
  });
  const zero = at;
  const table = zero + parts.zero;
  const codec = format.element;
  const learned = codec.kind === "lut" && codec.entries === "learned";
  const entries = learned ? 2 ** codec.bits * codec.vector[0] * codec.vector[1] : 0;
  const words = Math.max(table + Math.ceil(entries / 4) * 4, 4);
  const rowStride = rowWords(shape[1] / codecVector(codec)[1], codecBits(codec));
  return { format, shape, rowStride, scales, zero, table, words, bytes: words * 4 };
}

/** The words of a host tensor in device layout; `layout` may have room for more rows than the tensor. */
export function layoutWords(
  tensor: QuantizedTensor,
  layout: StoredLayout = storedLayout(tensor.format, tensor.shape),
): { layout: StoredLayout; words: Uint32Array<ArrayBuffer> } {
  const words = new Uint32Array(layout.words);
  words.set(tensor.qdata, 0);
  for (const [i, offset] of layout.scales.entries()) words.set(tensor.scales[i] as Uint32Array, offset);
  if (tensor.zero !== undefined) words.set(tensor.zero, layout.zero);
  if (tensor.table !== undefined)
    words.set(new Uint32Array(tensor.table.buffer, tensor.table.byteOffset, tensor.table.length), layout.table);
  return { layout, words };
}

/** The inverse of `layoutWords`, for `rows` of the layout's rows. */
export function tensorFromWords(layout: StoredLayout, words: Uint32Array, rows: number): QuantizedTensor {
  const shape = [rows, layout.shape[1]] as const;
  const parts = tensorWords(layout.format, shape);
  const scales = layout.scales.map((offset, i) => words.slice(offset, offset + (parts.scales[i] as number)));
  return {
    format: layout.format,
    shape,
    qdata: words.slice(0, parts.qdata),
    scales,
    ...(parts.zero > 0 ? { zero: words.slice(layout.zero, layout.zero + parts.zero) } : {}),
    ...(layout.words > layout.table &&
    parts.qdata > 0 &&
    layout.format.element.kind === "lut" &&
    layout.format.element.entries === "learned"
      ? { table: new Float32Array(words.slice(layout.table).buffer) }
      : {}),
  };
}
