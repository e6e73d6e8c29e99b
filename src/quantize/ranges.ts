import { extentOf, type Format, withScale } from "../formats/format.js";
import { dequantize, scaleValues, zeroValues } from "../formats/tensor.js";
import { type QuantizeOptions, quantizeTensor } from "./quantize.js";

/** Scales and zero points of every group, as `QuantizeOptions.given` takes them: [n * groups]. */
export interface GroupParameters {
  readonly scale: Float32Array;
  readonly zero: Float32Array;
}

/** Rules that choose a group's scale from that group alone, so that it may be chosen at any time and from narrower ranges. */
export function choosesByGroup({ rule, scales }: Format): boolean {
  return !["hqq", "hqq_scale", "sinq", "codebook"].includes(rule.kind) && scales[0]?.block[0] === 1;
}

/** The shares of a group's range that a search tries. */
const SHARES = [1, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68];

/**
 * The parameters of one group of columns `part` [n, width], row by row: by the format's rule for the whole range, or with
 * `importance` [width] the best of narrower ranges, those that leave the least squared error weighted by it.
 */
export function groupParameters(
  part: Float32Array,
  width: number,
  format: Format,
  options: QuantizeOptions,
  importance?: Float64Array,
): GroupParameters {
  const n = part.length / width;
  const shape = [n, width] as const;
  const whole = withScale(format, { block: [1, "all"] });
  const parametersOf = (values: Float32Array): GroupParameters => {
    const made = quantizeTensor(values, shape, "f32", whole, options);
    const zero = zeroValues(made);
    return { scale: scaleValues(made, 0), zero: zero.length > 0 ? zero : new Float32Array(n) };
  };
  const best = parametersOf(part);
  if (importance === undefined) return best;
  const least = rowErrors(part, width, whole, { ...options, given: best }, importance);
  for (const share of SHARES.slice(1)) {
    const given = parametersOf(narrowed(part, width, share));
    for (const [row, error] of rowErrors(part, width, whole, { ...options, given }, importance).entries()) {
      if (!(error < (least[row] as number))) continue;
      least[row] = error;
      best.scale[row] = given.scale[row] as number;
      best.zero[row] = given.zero[row] as number;
    }
  }
  return best;
}

/** `groupParameters` of every group of a weight [n, k]; `importance` [k] is that of the columns. */
export function searchRanges(
  weight: Float32Array,
  [n, k]: readonly [n: number, k: number],
  format: Format,
  importance: Float64Array,
  options: QuantizeOptions = {},
): GroupParameters {
  const width = extentOf(format.scales[0]?.block[1] ?? "all", k);
  const groups = k / width;
  const all = { scale: new Float32Array(n * groups), zero: new Float32Array(n * groups) };
  const part = new Float32Array(n * width);
  for (let group = 0; group < groups; group++) {
    const begin = group * width;
    for (let row = 0; row < n; row++) part.set(weight.subarray(row * k + begin, row * k + begin + width), row * width);
    const found = groupParameters(part, width, format, options, importance.subarray(begin, begin + width));
    for (let row = 0; row < n; row++) {
      all.scale[row * groups + group] = found.scale[row] as number;
      all.zero[row * groups + group] = found.zero[row] as number;
    }
  }
  return all;
}

function rowErrors(
  part: Float32Array,
  width: number,
  format: Format,
  options: QuantizeOptions,
  importance: Float64Array,
): Float64Array {
  const n = part.length / width;
  const rounded = dequantize(quantizeTensor(part, [n, width], "f32", format, options));
  const errors = new Float64Array(n);
  for (let i = 0; i < part.length; i++) {
    const row = Math.floor(i / width);
    const off = (rounded[i] as number) - (part[i] as number);
    errors[row] = (errors[row] as number) + off * off * (importance[i % width] as number);
  }
  return errors;
}

/** Rows of `width` values cut off at a share of their largest and smallest. */
function narrowed(part: Float32Array, width: number, share: number): Float32Array {
  const out = new Float32Array(part.length);
  for (let begin = 0; begin < part.length; begin += width) {
    let [low, high] = [0, 0];
    for (let i = begin; i < begin + width; i++) {
      low = Math.min(low, part[i] as number);
      high = Math.max(high, part[i] as number);
    }
    for (let i = begin; i < begin + width; i++)
      out[i] = Math.min(Math.max(part[i] as number, share * low), share * high);
  }
  return out;
}
