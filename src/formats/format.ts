import { FewbitError } from "../core/errors.js";

/**
 * What the bits of one stored number mean.
 * - `float`: sign, exponent and mantissa fields. `specials` says what the top exponent holds: `ieee` infinity and NaN
 *   (and overflow goes to infinity), `nan` only the all-ones code is NaN (e4m3fn; overflow saturates), `none` nothing
 *   special (all finite; overflow saturates).
 * - `exponent`: a bare power of two, 2^(code - bias), all ones is NaN (e8m0).
 * - `int`: two's complement or unsigned.
 * - `lut`: an index into a table; `vector` is the [rows, k] patch of elements one entry holds ([1, 1]: a scalar table). Where `entries`
 *   are `learned`, all numbers of a tensor are in memory, in float32, while they are: no other codec or rule asks for that.
 *   Source: numerics specification, section 2; OCP Microscaling Formats v1.0.
 */
export type Codec =
  | {
      readonly kind: "float";
      readonly exponent: number;
      readonly mantissa: number;
      readonly bias: number;
      readonly signed: boolean;
      readonly specials: "ieee" | "nan" | "none";
    }
  | { readonly kind: "exponent"; readonly bits: number; readonly bias: number }
  | { readonly kind: "int"; readonly bits: number; readonly signed: boolean }
  | {
      readonly kind: "lut";
      readonly bits: number;
      readonly entries: readonly number[] | "learned";
      readonly vector: readonly [rows: number, k: number];
    };

/** How far one scale reaches along a dimension: that many elements, or the whole dimension. */
export type Extent = number | "all";
export type Block = readonly [rows: Extent, k: Extent];

/**
 * One level of scales. An element's scale is the product over the levels of the scale of its block, rounded to float32.
 */
export interface ScaleLevel {
  readonly codec: Codec;
  readonly block: Block;
}

/**
 * The zero point, one per block of the first scale level, c the code's value and s the scale:
 * `none`: c * s. `int`: (c - z) * s (z in code units; a float codec gives HQQ's raw form).
 * `float`: (c - mid) * s + z, mid = 2^(bits-1) for unsigned codes and 0 for signed ones (tinygemm; z in value units).
 */
export type ZeroPoint = { readonly domain: "none" } | { readonly domain: "int" | "float"; readonly codec: Codec };

/**
 * How scales, zero points and codes are chosen from real numbers; data, read by `quantize/` in TypeScript and by the
 * quantize kernels alike. Section numbers are those of the numerics specification.
 */
export type Rule =
  /** No scale: each value is rounded to the element codec. */
  | { readonly kind: "cast" }
  /**
   * 3.2 and 3.3 (domain int), 3.5 (float: tinygemm), 3.7 (none). eps "normal" is the input dtype's smallest normal
   * number.
   */
  | {
      readonly kind: "affine";
      readonly mapping: "symmetric" | "symmetric_no_clipping_err" | "asymmetric";
      readonly min: number;
      readonly max: number;
      readonly eps: number | "normal";
      /** False gives 3.6. Default: true, except for the float domain. */
      readonly preserveZero?: boolean;
    }
  /**
   * 5.1: scale = amax / max, encode x / scale. amax is first clamped to [floor, ceiling]. `before` rounds the scale
   * (and the bounds) to the input's dtype and encodes with that: 5.1. `after` keeps float32 and rounds only what is
   * stored: 5.2 (MSLK, floor 1/512), 11 (fpx, floor 1e-12). `power` makes it the power of two nearest in log2.
   */
  | {
      readonly kind: "amax";
      readonly floor: number;
      readonly ceiling?: number;
      readonly round: "before" | "after";
      readonly power?: boolean;
    }
  /**
   * 7.1 (float zero point) and 7.5 (symmetric, amax / 8): MSLK int4, all in float32. With a second scale level, every
   * row of it is first rounded to the first level's codec by 5.2 (7.5, preshuffled).
   */
  | { readonly kind: "mslk_int4"; readonly symmetric: boolean }
  /** 12.2. */
  | { readonly kind: "mx"; readonly mode: "floor" | "ceil" | "even" | "rceil" }
  /** 13.1: floor 2^-6 and a division; 13.2 (the activation kernel): floor 2^-9 and a multiplication by 1/p. */
  | { readonly kind: "nvfp4"; readonly variant: "divide" | "multiply" }
  /** 15: nearest table entry of x / absmax; the absmax values are themselves quantized, `scalers` at a time. */
  | { readonly kind: "nf4"; readonly scalers: number }
  /**
   * 8: half-quadratic search for scale and zero point; zero domain `float` is the tinygemm form, `int` the raw form.
   */
  | { readonly kind: "hqq" }
  /** 8: least-squares search for the scale alone, codes in [min, max]. */
  | { readonly kind: "hqq_scale"; readonly min: number; readonly max: number }
  /** 8, SINQ: scale level 0 per group of a row, level 1 per column; columns and rows normalized in turn. */
  | { readonly kind: "sinq"; readonly min: number; readonly max: number; readonly iterations: number }
  /** 16: k-means, at most so many iterations. */
  | { readonly kind: "codebook"; readonly iterations: number };

/**
 * What stored bits mean: an element codec, its scales, its zero point, and the rule that makes them from real numbers.
 */
export interface Format {
  /** The row's name in the format table. */
  readonly name: string;
  readonly element: Codec;
  readonly scales: readonly ScaleLevel[];
  readonly zero: ZeroPoint;
  readonly rule: Rule;
  /** Where the format is defined. */
  readonly source: string;
  /** When to use it, one sentence; every row of the table has it. */
  readonly use?: string;
  /** The other blocks of the first scale level that the format is used with. */
  readonly blocks: readonly Block[];
  /** Set by `withRule`: tells apart formats that mean the same and are made differently. */
  readonly variant?: string;
}

/** Bits of one code. */
export function codecBits(codec: Codec): number {
  return codec.kind === "float" ? (codec.signed ? 1 : 0) + codec.exponent + codec.mantissa : codec.bits;
}

/** Elements that one code stands for. */
export function codecVector(codec: Codec): readonly [rows: number, k: number] {
  return codec.kind === "lut" ? codec.vector : [1, 1];
}

/** The code in the middle of the range, subtracted by the float zero-point domain (3.5). */
export function midCode(codec: Codec): number {
  return codec.kind === "int" && !codec.signed ? 2 ** (codec.bits - 1) : 0;
}

/**
 * A short text that tells apart any two formats that mean different things or are made differently; used as cache key
 * and in explanations.
 */
export function formatKey(format: Format): string {
  const levels = format.scales.map((level) => `${level.block.join("x")}:${codecName(level.codec)}`);
  const zero = format.zero.domain === "none" ? [] : [`z${format.zero.domain}:${codecName(format.zero.codec)}`];
  const detail = [...levels, ...zero];
  const name = format.variant === undefined ? format.name : `${format.name}~${format.variant}`;
  return detail.length === 0 ? name : `${name}[${detail.join(";")}]`;
}

/** The field's usual name of a codec, e.g. `e4m3`, `int4`, `uint8`, `lut4`. */
export function codecName(codec: Codec): string {
  if (codec.kind === "int") return `${codec.signed ? "" : "u"}int${codec.bits}`;
  if (codec.kind === "lut") return `lut${codec.bits}`;
  if (codec.kind === "exponent") return `e${codec.bits}m0`;
  const short = codec.specials === "ieee" ? { "8,23": "f32", "5,10": "f16", "8,7": "bf16" } : {};
  const key = `${codec.exponent},${codec.mantissa}` as keyof typeof short;
  return short[key] ?? `e${codec.exponent}m${codec.mantissa}`;
}

/** Why a format's rows cannot be quantized by themselves, or null: the scales of many rows are quantized together. */
export const rowsObstacle = ({ rule }: Format): string | null =>
  "scalers" in rule ? `rule ${rule.kind} quantizes scales of many rows together` : null;

/** Numbers in the extent of a dimension of `size`. */
export function extentOf(extent: Extent, size: number): number {
  return extent === "all" ? size : extent;
}

/** The [rows, k] grid of blocks over a weight of `shape` = [rows, k]; the last block of a dimension may be short. */
export function blockGrid(block: Block, shape: readonly [rows: number, k: number]): [rows: number, k: number] {
  return [
    Math.ceil(shape[0] / Math.max(1, extentOf(block[0], shape[0]))),
    Math.ceil(shape[1] / Math.max(1, extentOf(block[1], shape[1]))),
  ];
}

/** Average stored bits of one element of a tensor of `shape`, scales and zero points included. */
export function bitsPerElement(format: Format, shape: readonly [rows: number, k: number]): number {
  const [vectorRows, vectorK] = codecVector(format.element);
  const total = shape[0] * shape[1];
  let bits = (codecBits(format.element) * total) / (vectorRows * vectorK);
  for (const [index, level] of format.scales.entries()) {
    const [rows, columns] = blockGrid(level.block, shape);
    bits += rows * columns * codecBits(level.codec);
    if (index === 0 && format.zero.domain !== "none") bits += rows * columns * codecBits(format.zero.codec);
  }
  return bits / total;
}

/**
 * The same format with another block or codec of its first scale level (and, with `zero`, another zero-point codec).
 */
export function withScale(format: Format, change: { block?: Block; codec?: Codec; zero?: Codec }): Format {
  const [first, ...rest] = format.scales;
  if (first === undefined) return format;
  const scales = [{ block: change.block ?? first.block, codec: change.codec ?? first.codec }, ...rest];
  const zero =
    change.zero === undefined || format.zero.domain === "none" ? format.zero : { ...format.zero, codec: change.zero };
  return checked({ ...format, scales, zero });
}

/**
 * The same row made by another rule (and perhaps with another zero point or table); `variant` says how, for
 * `formatKey`.
 */
export function withRule(
  format: Format,
  variant: string,
  change: Partial<Pick<Format, "rule" | "zero" | "scales" | "element">>,
): Format {
  return checked({
    ...format,
    ...change,
    variant: format.variant === undefined ? variant : `${format.variant}~${variant}`,
  });
}

/** Fields of a row that are usually left out. */
type Row = Omit<Format, "name" | "zero" | "scales" | "blocks"> & Partial<Pick<Format, "zero" | "scales" | "blocks">>;

/** Completes a row of the table and proves it consistent. Throws `format/invalid-row`. */
export function defineFormat(name: string, row: Row): Format {
  return checked({ name, zero: { domain: "none" }, scales: [], blocks: [], ...row });
}

function checked(format: Format): Format {
  const fail = (reason: string): never => {
    throw new FewbitError("format/invalid-row", { format: format.name, reason });
  };
  const codecs = [format.element, ...format.scales.map((level) => level.codec)];
  if (format.zero.domain !== "none") codecs.push(format.zero.codec);
  for (const codec of codecs) {
    const bits = codecBits(codec);
    if (!Number.isInteger(bits) || bits < 1 || bits > 32)
      fail(`${codecName(codec)} has ${bits} bits: 1 to 32 are possible`);
    if (codec.kind === "float") {
      if (codec.exponent < 1 || codec.exponent > 8) fail("a float codec has 1 to 8 exponent bits");
      if (codec.mantissa > 22 && codec.exponent !== 8) fail("only float32 has more than 22 mantissa bits");
      if (codec.bias > 127) fail("its smallest normal number is below float32's");
      const top = 2 ** codec.exponent - (codec.specials === "ieee" ? 2 : 1);
      if (top - codec.bias > 127) fail("its largest number is above float32's");
    }
    if (codec.kind === "lut" && codec.entries !== "learned") {
      const expected = 2 ** codec.bits * codec.vector[0] * codec.vector[1];
      if (codec.entries.length !== expected)
        fail(`its table has ${codec.entries.length} entries: ${expected} are needed`);
    }
  }
  for (const level of format.scales) {
    if (![8, 16, 32].includes(codecBits(level.codec))) fail("a scale has 8, 16 or 32 bits");
    for (const extent of level.block) {
      if (extent !== "all" && (!Number.isInteger(extent) || extent < 1))
        fail(`block ${level.block.join("x")} is not positive`);
    }
  }
  if (format.zero.domain !== "none" && format.scales.length === 0) fail("a zero point needs a scale");
  if ("min" in format.rule && format.rule.min >= format.rule.max) fail("its code range is empty");
  return Object.freeze(format);
}
