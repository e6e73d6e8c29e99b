import { FewbitError } from "../core/errors.js";
import { type Codec, codecBits, type Format } from "./format.js";
import { packFlat, packRows } from "./pack.js";
import { checkTensor, type QuantizedTensor } from "./tensor.js";

/**
 * Codes of a tensor before they are packed: what files of other libraries hold. Only the low bits of each number count.
 */
export interface TensorCodes {
  /** Element codes [n / v0, k / v1], row-major. */
  readonly elements: ArrayLike<number>;
  /** Codes of each scale level, one per block, row-major. */
  readonly scales: readonly ArrayLike<number>[];
  readonly zero?: ArrayLike<number>;
  /** A learned table [entries, v0 * v1]. */
  readonly table?: Float32Array;
}

/**
 * Packs codes into a tensor of `format` [n, k]. Throws `shape/mismatch` when their counts are not those of the format.
 */
export function assembleTensor(
  format: Format,
  shape: readonly [n: number, k: number],
  codes: TensorCodes,
): QuantizedTensor {
  const { element, scales, zero } = format;
  const [vectorRows, vectorK] = element.kind === "lut" ? element.vector : [1, 1];
  const [rows, columns] = [shape[0] / vectorRows, shape[1] / vectorK];
  if (codes.elements.length !== rows * columns) {
    throw new FewbitError("shape/mismatch", {
      what: `codes of ${format.name}`,
      got: [codes.elements.length],
      expected: `[${rows} * ${columns}]`,
    });
  }
  const tensor: QuantizedTensor = {
    format,
    shape: [shape[0], shape[1]],
    qdata: packRows(codes.elements, rows, columns, codecBits(element)),
    scales: scales.map((level, i) => packFlat(codes.scales[i] ?? [], codecBits(level.codec))),
    ...(zero.domain === "none" ? {} : { zero: packFlat(codes.zero ?? [], codecBits(zero.codec as Codec)) }),
    ...(codes.table === undefined ? {} : { table: codes.table }),
  };
  checkTensor(tensor, "assembled tensor");
  return tensor;
}
