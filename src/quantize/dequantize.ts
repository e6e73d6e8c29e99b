import { type FloatType, roundTo } from "../core/dtype.js";
import { codecVector, extentOf, midCode } from "../formats/format.js";
import { elementCodes, elementValue, type QuantizedTensor, scaleValues, zeroValues } from "../formats/tensor.js";

/**
 * The elements [n, k] of a tensor in `dtype` as torchao dequantizes them, rounded after every operation (specification
 * 3.4, 3.5, 5.1, 12.5, 13.1, 15). `formats/tensor.ts`'s `dequantize` is the exact value instead.
 */
export function dequantizeTo(tensor: QuantizedTensor, dtype: FloatType): Float32Array {
  const { format, shape } = tensor;
  const [n, k] = shape;
  const codes = elementCodes(tensor);
  const read = elementValue(tensor);
  const [vectorRows, vectorK] = codecVector(format.element);
  const levels = format.scales.map((level, i) => ({
    values: scaleValues(tensor, i),
    rows: Math.max(extentOf(level.block[0], n), 1),
    k: Math.max(extentOf(level.block[1], k), 1),
    columns: Math.ceil(k / Math.max(extentOf(level.block[1], k), 1)),
  }));
  const zeros = zeroValues(tensor);
  const { domain } = format.zero;
  const mid = midCode(format.element);
  const out = new Float32Array(n * k);
  for (let row = 0; row < n; row++) {
    for (let column = 0; column < k; column++) {
      const code = codes[Math.floor(row / vectorRows) * (k / vectorK) + Math.floor(column / vectorK)] as number;
      const lane = (row % vectorRows) * vectorK + (column % vectorK);
      let scale = 1;
      let block = 0;
      for (let i = levels.length - 1; i >= 0; i--) {
        const level = levels[i] as (typeof levels)[number];
        block = Math.floor(row / level.rows) * level.columns + Math.floor(column / level.k);
        scale = Math.fround(scale * (level.values[block] as number));
      }
      const value = roundTo(dtype, read(code, lane));
      const at = row * k + column;
      if (domain === "none") out[at] = roundTo(dtype, value * scale);
      else if (domain === "int") {
        out[at] = roundTo(dtype, roundTo(dtype, value - roundTo(dtype, zeros[block] as number)) * scale);
      } else {
        out[at] = roundTo(dtype, roundTo(dtype, roundTo(dtype, value - mid) * scale) + (zeros[block] as number));
      }
    }
  }
  return out;
}
