import { type DType, type FloatType, roundTo } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";

/** How a block's least and greatest value become a scale (specification 3.2). */
export type Mapping = "symmetric" | "symmetric_no_clipping_err" | "asymmetric";
/**
 * In what units zero points are: codes (`int`), values (`float`, tinygemm), or there is none (specification 3.4 to
 * 3.7).
 */
export type ZeroDomain = "int" | "float" | "none";

/** What the affine rule needs to know about one tensor. */
export interface AffineRule {
  readonly mapping: Mapping;
  readonly min: number;
  readonly max: number;
  /** The scale's floor, already rounded to `dtype`. */
  readonly eps: number;
  /** The dtype of the values; every operation rounds to it. */
  readonly dtype: FloatType;
  readonly domain: ZeroDomain;
  /** Whether zero is made exactly representable. False only for `float`, and for 3.6. */
  readonly preserveZero: boolean;
  /** Guarded: a side of the range that has no codes does not count, so that one-bit symmetric ranges work (28.13). */
  readonly guarded: boolean;
}

/** The smallest normal number of each dtype: the default eps. */
export const SMALLEST_NORMAL: Readonly<Record<FloatType, number>> = {
  f32: 2 ** -126,
  bf16: 2 ** -126,
  f16: 2 ** -14,
};

/** Adding and subtracting this rounds a float64 below 2^51 to an integer, ties to even; larger ones keep their size. */
export const ROUND = 1.5 * 2 ** 52;

/** The scale of a block whose values span [lo, hi] (3.2, 3.5), before the cast to the scale's dtype. */
export function affineScale(rule: AffineRule, lo: number, hi: number): number {
  const { dtype, min, max } = rule;
  const [least, greatest] = rule.preserveZero ? [Math.min(lo, 0), Math.max(hi, 0)] : [lo, hi];
  let scale: number;
  if (rule.mapping === "asymmetric") {
    scale = roundTo(dtype, roundTo(dtype, greatest - least) / (max - min));
  } else if (rule.guarded && (min === 0 || max === 0) && max - min === 1) {
    scale = roundTo(dtype, max === 0 ? -least : greatest);
  } else if (rule.mapping === "symmetric") {
    scale = roundTo(dtype, Math.max(-least, greatest) / ((max - min) / 2));
  } else {
    const below = roundTo(dtype, least / min);
    const above = roundTo(dtype, greatest / max);
    scale = below > above ? below : above;
  }
  return scale < rule.eps ? rule.eps : scale;
}

/** The zero point that goes with `scale` = `affineScale(rule, lo, hi)`. */
export function affineZero(rule: AffineRule, lo: number, scale: number): number {
  const { dtype, min, max } = rule;
  if (rule.domain === "none") return 0;
  const middle = Math.trunc((max + min + 1) / 2);
  if (rule.domain === "float") return roundTo(dtype, lo + roundTo(dtype, scale * ((max + min + 1) / 2)));
  if (rule.mapping !== "asymmetric") return middle;
  const least = rule.preserveZero ? Math.min(lo, 0) : lo;
  const steps = roundTo(dtype, least / scale);
  const zero = roundTo(dtype, min - (steps + ROUND - ROUND));
  return zero < min ? min : zero > max ? max : zero;
}

/**
 * Codes (signed numbers, not bit patterns) of `x[begin .. end)` with one scale and zero point, written to `out` from
 * `at` (3.3, 3.5, 3.7). `scaleDtype` is the dtype that the scale is stored in. A NaN becomes code 0.
 */
export function affineCodes(
  rule: Pick<AffineRule, "min" | "max" | "dtype" | "domain">,
  scaleDtype: FloatType,
  scale: number,
  zero: number,
  x: Float32Array,
  begin: number,
  end: number,
  out: Int32Array,
  at: number,
): void {
  const { min, max, dtype, domain } = rule;
  const promoted = dtype === scaleDtype ? dtype : "f32";
  if (domain === "float") {
    const least = roundTo(promoted, zero - roundTo(promoted, scale * ((max + min + 1) / 2)));
    for (let i = begin; i < end; i++) {
      const steps = roundTo(promoted, roundTo(promoted, (x[i] as number) - least) / scale);
      const code = steps + ROUND - ROUND;
      out[at + i - begin] = code < min ? min : code > max ? max : code;
    }
    return;
  }
  const inverse = roundTo(scaleDtype, 1 / scale);
  if (promoted === "f32") {
    for (let i = begin; i < end; i++) {
      const code = Math.fround(Math.fround((x[i] as number) * inverse) + ROUND - ROUND + zero);
      out[at + i - begin] = code < min ? min : code > max ? max : code;
    }
    return;
  }
  for (let i = begin; i < end; i++) {
    const code = roundTo(promoted, roundTo(promoted, (x[i] as number) * inverse) + ROUND - ROUND + zero);
    out[at + i - begin] = code < min ? min : code > max ? max : code;
  }
}

/** Arguments of `chooseQParams`, with torchao's names and defaults. */
export interface ChooseOptions {
  readonly mapping: Mapping;
  /** Extents of one block, one per dimension; each divides the shape's. */
  readonly blockSize: readonly number[];
  readonly min: number;
  readonly max: number;
  /** The dtype of the data, whose values must be representable in it. */
  readonly dtype: FloatType;
  /** The scale's floor; default the dtype's smallest normal number. */
  readonly eps?: number;
  /** Default `dtype`. */
  readonly scaleDtype?: FloatType;
  /** Default i32. A float dtype rounds a zero point of the float domain. */
  readonly zeroPointDtype?: DType;
  /** Default `int`. `float` is asymmetric and does not preserve zero (3.5). */
  readonly domain?: ZeroDomain;
  /** Default true, except for the float domain. False gives 3.6. */
  readonly preserveZero?: boolean;
  /** Keep dimensions that were reduced whole, as extent 1. Default false. */
  readonly keepdim?: boolean;
  /** `torchao` (default here: these are the literal primitives) or `guarded`. */
  readonly numerics?: "guarded" | "torchao";
}

/** One scale and zero point per block, in row-major block order. */
export interface QParams {
  readonly scale: Float32Array;
  readonly scaleDtype: FloatType;
  /** Empty for the domain `none`. */
  readonly zero: Float32Array;
  readonly shape: readonly number[];
}

/**
 * Scales and zero points of `data` [shape], block by block (`choose_qparams_affine`, specification 3.2, 3.5 and 3.6).
 * Throws `format/block` when a block does not divide its dimension and `argument/invalid` for an impossible domain.
 */
export function chooseQParams(data: Float32Array, shape: readonly number[], options: ChooseOptions): QParams {
  const grid = blocksOf(shape, options.blockSize);
  const count = grid.reduce((a, b) => a * b, 1);
  const lo = new Float32Array(count).fill(Number.POSITIVE_INFINITY);
  const hi = new Float32Array(count).fill(Number.NEGATIVE_INFINITY);
  forEachRun(shape, options.blockSize, (begin, end, block) => {
    for (let i = begin; i < end; i++) {
      const value = data[i] as number;
      // Math.min and Math.max let NaN through, as torch.amin and amax do.
      lo[block] = Math.min(lo[block] as number, value);
      hi[block] = Math.max(hi[block] as number, value);
    }
  });
  const { scale, zero, scaleDtype } = chooseQParamsWithMinMax(lo, hi, options);
  // A dimension is dropped when it was reduced whole; an extent of 1 was not reduced.
  const dropped = grid.filter((_, d) => options.blockSize[d] !== shape[d] || options.blockSize[d] === 1);
  return { scale, zero, scaleDtype, shape: options.keepdim === true ? grid : dropped };
}

/** `choose_qparams_affine_with_min_max`: the same from given minima and maxima, one per block. */
export function chooseQParamsWithMinMax(
  lo: Float32Array,
  hi: Float32Array,
  options: Omit<ChooseOptions, "blockSize" | "keepdim">,
): QParams {
  const rule = affineRule(options);
  const scaleDtype = options.scaleDtype ?? options.dtype;
  const zeroDtype = options.zeroPointDtype ?? "i32";
  const scale = new Float32Array(lo.length);
  const zero = new Float32Array(rule.domain === "none" ? 0 : lo.length);
  for (let i = 0; i < lo.length; i++) {
    const s = affineScale(rule, lo[i] as number, hi[i] as number);
    scale[i] = roundTo(scaleDtype, s);
    if (rule.domain === "none") continue;
    const z = affineZero(rule, lo[i] as number, s);
    zero[i] = isFloat(zeroDtype) ? roundTo(zeroDtype, z) : z;
  }
  return { scale, zero, scaleDtype, shape: [lo.length] };
}

function affineRule(options: Omit<ChooseOptions, "blockSize" | "keepdim">): AffineRule {
  const domain = options.domain ?? "int";
  if (domain === "float" && options.mapping !== "asymmetric") {
    throw new FewbitError("argument/invalid", {
      name: "mapping",
      value: options.mapping,
      expected: "asymmetric for a float zero point",
    });
  }
  if (options.min >= options.max) {
    throw new FewbitError("argument/invalid", {
      name: "min",
      value: options.min,
      expected: `less than max = ${options.max}`,
    });
  }
  return {
    mapping: options.mapping,
    min: options.min,
    max: options.max,
    eps: options.eps === undefined ? SMALLEST_NORMAL[options.dtype] : roundTo(options.dtype, options.eps),
    dtype: options.dtype,
    domain,
    preserveZero: options.preserveZero ?? domain !== "float",
    guarded: options.numerics === "guarded",
  };
}

/** What quantizing and dequantizing need beside the scales and zero points. */
export interface AffineOptions {
  readonly blockSize: readonly number[];
  readonly min: number;
  readonly max: number;
  /** Default `int`. */
  readonly domain?: ZeroDomain;
}

/** Codes of `data` [shape], values of `dtype` (`quantize_affine`, 3.3, 3.5, 3.7). Codes are numbers in [min, max]. */
export function quantizeAffine(
  data: Float32Array,
  shape: readonly number[],
  dtype: FloatType,
  qparams: Omit<QParams, "shape">,
  options: AffineOptions,
): Int32Array {
  const { domain = "int", min, max } = options;
  requireZero(qparams, domain);
  const rule = { min, max, dtype, domain };
  const codes = new Int32Array(data.length);
  forEachRun(shape, options.blockSize, (begin, end, block) => {
    const scale = qparams.scale[block] as number;
    affineCodes(rule, qparams.scaleDtype, scale, qparams.zero[block] ?? 0, data, begin, end, codes, begin);
  });
  return codes;
}

/** Values of `codes` [shape] in `out`, rounded after every operation (`dequantize_affine`, 3.4, 3.5, 3.7). */
export function dequantizeAffine(
  codes: Int32Array,
  shape: readonly number[],
  out: FloatType,
  qparams: Omit<QParams, "shape">,
  options: AffineOptions,
): Float32Array {
  const { domain = "int", min, max } = options;
  requireZero(qparams, domain);
  const promoted = out === qparams.scaleDtype ? out : "f32";
  const values = new Float32Array(codes.length);
  forEachRun(shape, options.blockSize, (begin, end, block) => {
    const scale = qparams.scale[block] as number;
    const zero = qparams.zero[block] ?? 0;
    const offset = domain === "float" ? (max + min + 1) / 2 : roundTo(out, zero);
    for (let i = begin; i < end; i++) {
      const code = domain === "float" ? (codes[i] as number) : roundTo(out, codes[i] as number);
      const product = roundTo(out, roundTo(promoted, roundTo(out, code - offset) * scale));
      values[i] = domain === "float" ? roundTo(out, product + zero) : product;
    }
  });
  return values;
}

/** Quantizes and dequantizes in floats without an integer cast (3.8): values of `dtype`. */
export function fakeQuantizeAffine(
  data: Float32Array,
  shape: readonly number[],
  dtype: FloatType,
  qparams: Omit<QParams, "shape">,
  options: AffineOptions,
): Float32Array {
  return dequantizeAffine(quantizeAffine(data, shape, dtype, qparams, options), shape, dtype, qparams, options);
}

function requireZero(qparams: Omit<QParams, "shape">, domain: ZeroDomain): void {
  if (domain !== "none" && qparams.zero.length !== qparams.scale.length) {
    throw new FewbitError("shape/mismatch", {
      what: "zero point",
      got: [qparams.zero.length],
      expected: `[${qparams.scale.length}], one per scale; symmetric callers pass zeros`,
    });
  }
}

function isFloat(dtype: DType): dtype is FloatType {
  return dtype === "f32" || dtype === "f16" || dtype === "bf16";
}

/** Blocks along each dimension (3.1). */
export function blocksOf(shape: readonly number[], blockSize: readonly number[]): number[] {
  if (shape.length !== blockSize.length) {
    throw new FewbitError("shape/mismatch", { what: "blockSize", got: blockSize, expected: `${shape.length} extents` });
  }
  return shape.map((size, d) => {
    const block = blockSize[d] as number;
    if (!Number.isInteger(block) || block < 1 || size % block !== 0) {
      const nearest = block >= 1 ? Math.max(1, Math.round(size / block)) * block : 1;
      throw new FewbitError("format/block", { format: "affine", size, block, axis: `dimension ${d}`, nearest });
    }
    return size / block;
  });
}

/** Visits every contiguous run of elements that share a block. */
export function forEachRun(
  shape: readonly number[],
  blockSize: readonly number[],
  visit: (begin: number, end: number, block: number) => void,
): void {
  const grid = blocksOf(shape, blockSize);
  const rank = shape.length;
  const last = shape[rank - 1] ?? 1;
  const run = blockSize[rank - 1] ?? 1;
  const total = shape.reduce((a, b) => a * b, 1);
  const columns = grid[rank - 1] ?? 1;
  for (let begin = 0; begin < total; begin += last) {
    let rest = begin / last;
    let block = 0;
    let stride = columns;
    for (let d = rank - 2; d >= 0; d--) {
      const size = shape[d] as number;
      block += Math.floor((rest % size) / (blockSize[d] as number)) * stride;
      stride *= grid[d] as number;
      rest = Math.floor(rest / size);
    }
    for (let start = 0, column = 0; start < last; start += run, column++) {
      visit(begin + start, begin + start + run, block + column);
    }
  }
}
