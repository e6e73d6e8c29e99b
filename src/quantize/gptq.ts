import { FewbitError } from "../core/errors.js";
import { extentOf, type Format, withScale } from "../formats/format.js";
import { dequantize, type QuantizedTensor, scaleValues } from "../formats/tensor.js";
import { type QuantizeOptions, quantizeTensor, requireBlocks } from "./quantize.js";
import { type GroupParameters, groupParameters } from "./ranges.js";

/** The second moment of a layer's inputs, gathered batch by batch (specification 17.3). */
export class Hessian {
  readonly k: number;
  /** [k, k]. */
  readonly values: Float64Array;
  #samples = 0;

  constructor(k: number) {
    this.k = k;
    this.values = new Float64Array(k * k);
  }

  /** Adds inputs [..., k]. A matrix counts as one sample, a tensor of higher rank as many as its first dimension. */
  observe(data: Float32Array, shape: readonly number[]): void {
    const { k, values } = this;
    if (shape.at(-1) !== k)
      throw new FewbitError("shape/mismatch", { what: "calibration input", got: shape, expected: `[..., ${k}]` });
    const count = shape.length <= 2 ? 1 : (shape[0] as number);
    const kept = this.#samples / (this.#samples + count);
    this.#samples += count;
    for (let i = 0; i < values.length; i++) values[i] = (values[i] as number) * kept;
    const factor = 2 / this.#samples;
    for (let row = 0; row < data.length; row += k) {
      for (let i = 0; i < k; i++) {
        const scaled = factor * (data[row + i] as number);
        if (scaled === 0) continue;
        for (let j = 0; j < k; j++)
          values[i * k + j] = (values[i * k + j] as number) + scaled * (data[row + j] as number);
      }
    }
  }
}

export interface GptqOptions extends QuantizeOptions {
  /** Damping, as a share of the mean diagonal. Default 0.01. */
  readonly percdamp?: number;
  /** Columns whose errors are spread at once. Default 256. */
  readonly blockSize?: number;
  /**
   * Try narrower ranges for each group's scales and take those with the least error, weighted by the Hessian's diagonal (default
   * false: torchao takes the whole range).
   */
  readonly searchRange?: boolean;
}

/**
 * Quantizes a float32 weight [n, k] column by column, moving each column's error to the columns that are still to come
 * (17.3). `format` has groups along rows and a rule that does not search. The literal rule (`torchao`) chooses a
 * group's scales from the columns of the current block only, also where the group is longer; `guarded` looks at the
 * whole group (28.13).
 */
export function gptqQuantize(
  weight: Float32Array,
  shape: readonly [n: number, k: number],
  hessian: Hessian,
  format: Format,
  options: GptqOptions = {},
): QuantizedTensor {
  requireBlocks(format, shape);
  const [n, k] = shape;
  const { percdamp = 0.01, blockSize = 256 } = options;
  const groupSize = extentOf(format.scales[0]?.block[1] ?? "all", k);
  const w = Float64Array.from(weight);
  const { damped, dead } = prepare(hessian, percdamp);
  for (const column of dead) for (let row = 0; row < n; row++) w[row * k + column] = 0;
  const diagonal = Float64Array.from({ length: k }, (_, i) => damped[i * k + i] as number);
  const u = inverseFactor(damped, k);
  const perTensor = tensorScale(weight, shape, format, options);
  const literal = options.numerics === "torchao";
  const groups = k / groupSize;
  const chosen = { scale: new Float32Array(n * groups), zero: new Float32Array(n * groups) };
  const errors = new Float64Array(n * blockSize);

  for (let begin = 0; begin < k; begin += blockSize) {
    const end = Math.min(begin + blockSize, k);
    for (let column = begin; column < end; column++) {
      if (column % groupSize === 0) {
        const stop = literal ? Math.min(column + groupSize, end) : column + groupSize;
        const place = { index: column / groupSize, count: groups };
        chooseGroup(w, shape, [column, stop], format, { ...options, ...perTensor }, chosen, place, diagonal);
      }
      const group = Math.floor(column / groupSize);
      const given = columnOf(chosen, group, groups, n);
      const values = Float32Array.from({ length: n }, (_, row) => w[row * k + column] as number);
      const single = withScale(format, { block: [1, 1] });
      const rounded = dequantize(quantizeTensor(values, [n, 1], "f32", single, { ...options, ...perTensor, given }));
      const pivot = u[column * k + column] as number;
      for (let row = 0; row < n; row++) {
        const error = ((w[row * k + column] as number) - (rounded[row] as number)) / pivot;
        errors[row * blockSize + column - begin] = error;
        for (let j = column; j < end; j++)
          w[row * k + j] = (w[row * k + j] as number) - error * (u[column * k + j] as number);
      }
    }
    for (let row = 0; row < n; row++) {
      for (let j = end; j < k; j++) {
        let sum = 0;
        for (let column = begin; column < end; column++) {
          sum += (errors[row * blockSize + column - begin] as number) * (u[column * k + j] as number);
        }
        w[row * k + j] = (w[row * k + j] as number) - sum;
      }
    }
  }
  return quantizeTensor(Float32Array.from(w), shape, "f32", format, { ...options, ...perTensor, given: chosen });
}

/** The per-tensor scale of the original weight, where the format has one. */
function tensorScale(weight: Float32Array, shape: readonly [number, number], format: Format, options: QuantizeOptions) {
  if (format.rule.kind !== "nvfp4" || format.scales.length < 2 || options.perTensorScale !== undefined) return {};
  return { perTensorScale: scaleValues(quantizeTensor(weight, shape, "f32", format, options), 1)[0] as number };
}

/** Freezes the scales of one group of columns, chosen from the weight as it is now. */
function chooseGroup(
  w: Float64Array,
  [n, k]: readonly [number, number],
  [begin, end]: readonly [begin: number, end: number],
  format: Format,
  { searchRange = false, ...options }: GptqOptions,
  chosen: GroupParameters,
  { index, count }: { readonly index: number; readonly count: number },
  diagonal: Float64Array,
): void {
  const width = end - begin;
  const part = new Float32Array(n * width);
  for (let row = 0; row < n; row++) part.set(w.subarray(row * k + begin, row * k + end), row * width);
  const importance = searchRange ? diagonal.subarray(begin, end) : undefined;
  const found = groupParameters(part, width, format, options, importance);
  for (let row = 0; row < n; row++) {
    chosen.scale[row * count + index] = found.scale[row] as number;
    chosen.zero[row * count + index] = found.zero[row] as number;
  }
}

function columnOf(chosen: { scale: Float32Array; zero: Float32Array }, group: number, groups: number, n: number) {
  const pick = (values: Float32Array) =>
    Float32Array.from({ length: n }, (_, row) => values[row * groups + group] as number);
  return { scale: pick(chosen.scale), zero: pick(chosen.zero) };
}

/** The damped Hessian, and the columns that no input ever used. */
function prepare({ values, k }: Hessian, percdamp: number): { damped: Float64Array; dead: number[] } {
  const damped = values.slice();
  const dead: number[] = [];
  let trace = 0;
  for (let i = 0; i < k; i++) {
    if (damped[i * k + i] === 0) {
      damped[i * k + i] = 1;
      dead.push(i);
    }
    trace += damped[i * k + i] as number;
  }
  for (let i = 0; i < k; i++) damped[i * k + i] = (damped[i * k + i] as number) + (percdamp * trace) / k;
  return { damped, dead };
}

/** The upper triangular U with U^T U = A^-1. */
function inverseFactor(a: Float64Array, k: number): Float64Array {
  const lower = cholesky(a, k);
  // A^-1 = L^-T L^-1.
  const inverse = new Float64Array(k * k);
  const columnInverse = invertLower(lower, k);
  for (let i = 0; i < k; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = 0;
      for (let m = i; m < k; m++) sum += (columnInverse[m * k + i] as number) * (columnInverse[m * k + j] as number);
      inverse[i * k + j] = sum;
      inverse[j * k + i] = sum;
    }
  }
  const factor = cholesky(inverse, k);
  const upper = new Float64Array(k * k);
  for (let i = 0; i < k; i++) for (let j = 0; j <= i; j++) upper[j * k + i] = factor[i * k + j] as number;
  return upper;
}

/** The lower triangular L with L L^T = A. */
function cholesky(a: Float64Array, k: number): Float64Array {
  const l = new Float64Array(k * k);
  for (let i = 0; i < k; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = a[i * k + j] as number;
      for (let m = 0; m < j; m++) sum -= (l[i * k + m] as number) * (l[j * k + m] as number);
      if (i !== j) l[i * k + j] = sum / (l[j * k + j] as number);
      else if (sum > 0) l[i * k + i] = Math.sqrt(sum);
      else
        throw new FewbitError("argument/invalid", {
          name: "percdamp",
          value: "too small",
          expected: "a damping that makes the Hessian positive definite",
        });
    }
  }
  return l;
}

function invertLower(l: Float64Array, k: number): Float64Array {
  const inverse = new Float64Array(k * k);
  for (let column = 0; column < k; column++) {
    for (let row = column; row < k; row++) {
      let sum = row === column ? 1 : 0;
      for (let m = column; m < row; m++) sum -= (l[row * k + m] as number) * (inverse[m * k + column] as number);
      inverse[row * k + column] = sum / (l[row * k + row] as number);
    }
  }
  return inverse;
}
