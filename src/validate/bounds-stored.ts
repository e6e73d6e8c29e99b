import { decodeTable } from "../formats/codec.js";
import { blockGrid, type Codec, codecBits, extentOf } from "../formats/format.js";
import { dequantize, elementCodes, type QuantizedTensor, scaleValues } from "../formats/tensor.js";

/**
 * A stored tensor made from float32 values that are only known to be within an error: a value close to a tie may be stored as either
 * neighbour. Rows whose source is exact have one right answer.
 */
export interface Stored {
  readonly kind: "stored";
  readonly tensor: QuantizedTensor;
  /** How far each decoded value may be from this tensor's. */
  readonly error: Float64Array;
}

/**
 * The bound of `tensor`, which holds the rounded exact values: an element whose source is off by e decodes to at most e and one
 * step between neighbouring codes away (two where the zero point is rounded as well). Its block's scale follows extremes that are off
 * themselves, which moves no value of the block further than the extremes (twice as far between two of them). `errorsOf` gives the
 * errors of a row's source, or null for a row that was not written.
 */
export function storeBound(tensor: QuantizedTensor, errorsOf: (row: number) => Float64Array | null): Stored {
  const { format, shape } = tensor;
  const [rows, k] = shape;
  const error = new Float64Array(rows * k);
  const levels = format.scales.map(({ block }, i) => {
    const values = scaleValues(tensor, i);
    const columns = blockGrid(block, shape)[1];
    const [height, width] = [extentOf(block[0], rows), extentOf(block[1], k)];
    return (row: number, at: number) => values[Math.floor(row / height) * columns + Math.floor(at / width)] as number;
  });
  const step = stepReader(tensor);
  const steps = format.zero.domain === "int" ? 2 : 1;
  for (let row = 0; row < rows; row++) {
    const errors = errorsOf(row);
    if (errors === null || errors.every((e) => e === 0)) continue;
    const moved = levels.length === 0 ? 0 : steps * errors.reduce((a, b) => Math.max(a, b), 0);
    for (let i = 0; i < k; i++) {
      const scale = levels.reduce((product, level) => product * level(row, i), 1);
      error[row * k + i] = (errors[i] as number) + moved + steps * step(row * k + i) * Math.abs(scale);
    }
  }
  return { kind: "stored", tensor, error };
}

/** The distance from an element's code value to its farther neighbour. */
function stepReader(tensor: QuantizedTensor): (index: number) => number {
  const codec: Codec = tensor.format.element;
  if (codec.kind === "int") return () => 1;
  if (codecBits(codec) > 16) {
    const values = dequantize(tensor);
    return (index) => Math.max(Math.abs(values[index] as number) * 2 ** -23, 2 ** -149);
  }
  if (codec.kind === "lut" && codec.entries === "learned") return () => Number.POSITIVE_INFINITY;
  const table = decodeTable(codec);
  const sorted = [...table].filter(Number.isFinite).sort((a, b) => a - b);
  const codes = elementCodes(tensor);
  const steps = new Map<number, number>();
  return (index) => {
    const value = table[codes[index] as number] as number;
    let found = steps.get(value);
    if (found === undefined) {
      const at = sorted.indexOf(value);
      const around = [sorted.lastIndexOf(value) + 1, at - 1].map((i) => Math.abs((sorted[i] ?? value) - value));
      found = Math.max(...around);
      steps.set(value, found);
    }
    return found;
  };
}
