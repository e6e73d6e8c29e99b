import { type FloatType, f32Bits, roundTo } from "../core/dtype.js";
import { decode, decodeTable, encoder, floatFields, maxValue } from "../formats/codec.js";
import { type Codec, codecBits, codecName, type Format, type Rule } from "../formats/format.js";
import { writeCode } from "../formats/pack.js";
import type { RowWindow } from "../formats/window.js";
import { type AffineRule, affineCodes, affineScale, affineZero, ROUND, SMALLEST_NORMAL } from "./affine.js";
import { nf4Coder, quantizeScalers } from "./nf4.js";

/** How a tensor is quantized, beside its format. */
export interface QuantizeOptions {
  /**
   * `guarded` (default) keeps every result finite where torchao's literal arithmetic does not (specification 28.13);
   * `torchao` is the literal arithmetic. They differ only in the blocks concerned.
   */
  readonly numerics?: "guarded" | "torchao";
  /** nvfp4: the per-tensor scale p of a calibration, instead of amax / 2688. */
  readonly perTensorScale?: number;
  /** Codebooks: a learned table [entries, v0 * v1] to use instead of learning one. */
  readonly table?: Float32Array;
  /**
   * Scales (and zero points) to use, one per block of the first level, instead of chosen ones; not for searching rules.
   */
  readonly given?: { readonly scale: Float32Array; readonly zero?: Float32Array };
}

/** What a rule works on. */
export interface RuleContext {
  readonly format: Format;
  readonly dtype: FloatType;
  readonly guarded: boolean;
  readonly options: QuantizeOptions;
  /** Where it writes; its shape is that of the tensor. */
  readonly out: RowWindow;
  /** Blocks of the first scale level in one row of blocks. */
  readonly columns: number;
}

/** Rows [begin, end) of a matrix. */
export interface Tile {
  readonly data: Float32Array;
  readonly begin: number;
  readonly end: number;
}

/**
 * A rule at work on one tensor: it is shown every tile in order, as often as it needs to choose what depends on all of them, and
 * then once to write every row of each.
 */
export interface Procedure {
  /** Whether the tiles that come are written. */
  readonly writes: boolean;
  pass(tile: Tile): void;
  /** Called after the last tile of a pass that wrote nothing. */
  finish(): void;
}

/** A rule whose blocks do not depend on each other: parameters of a block from its extremes, then codes of its runs. */
export interface BlockRule {
  /** Asks for the extremes of every block before any is chosen. */
  collect?(index: number, lo: number, hi: number): void;
  /** Asks for the largest magnitude of the whole tensor before any block is chosen. */
  begin?(amax: number): void;
  /** Replaces a row before anything else looks at it. */
  prepare?(x: Float32Array, begin: number, end: number, row: number): void;
  /** Chooses and stores the parameters of block `index`, which is in `column` of the current row of blocks. */
  choose(index: number, column: number, lo: number, hi: number): void;
  /**
   * Codes of x[begin .. end), which lie in the block of `column`, written to `out` from `at`; high bits do not matter.
   */
  encode(column: number, x: Float32Array, begin: number, end: number, out: Int32Array, at: number): void;
}

type BlockKind = "cast" | "affine" | "amax" | "mslk_int4" | "mx" | "nvfp4" | "nf4";
type RuleOf<Kind extends Rule["kind"]> = Extract<Rule, { kind: Kind }>;

/** The rules whose blocks are independent; the others are procedures of their own. */
export const BLOCK_RULES: { readonly [Kind in BlockKind]: (context: RuleContext, rule: RuleOf<Kind>) => BlockRule } = {
  cast,
  affine,
  amax,
  mslk_int4: mslkInt4,
  mx,
  nvfp4,
  nf4,
};

/** The dtype whose numbers a scale codec holds; scales of any other codec compute in float32. */
export function scaleDtype(codec: Codec): FloatType {
  const name = codecName(codec);
  return name === "bf16" || name === "f16" ? name : "f32";
}

/** Stores codes of one scale level; blocks are counted over the tensor. */
export function scaleWriter(
  { format, out }: Pick<RuleContext, "format" | "out">,
  level: number,
): (index: number, value: number) => number {
  const codec = format.scales[level]?.codec as Codec;
  const words = out.buffers.scales[level] as Uint32Array;
  const bits = codecBits(codec);
  const encode = encoder(codec);
  return (index, value) => {
    const code = encode(value);
    writeCode(words, 0, index - out.firstBlock(level), bits, code);
    return decode(codec, code);
  };
}

/** Stores zero points; does nothing for a format without them. */
export function zeroWriter({
  format,
  out,
}: Pick<RuleContext, "format" | "out">): (index: number, value: number) => number {
  const { zero } = format;
  const words = out.buffers.zero;
  if (zero.domain === "none" || words === undefined) return () => 0;
  const bits = codecBits(zero.codec);
  const encode = encoder(zero.codec);
  return (index, value) => {
    const code = encode(value);
    writeCode(words, 0, index - out.firstBlock(0), bits, code);
    return decode(zero.codec, code);
  };
}

const magnitude = (lo: number, hi: number) => Math.max(-lo, hi);

function cast({ format }: RuleContext): BlockRule {
  const encode = encoder(format.element);
  return {
    choose: () => {},
    encode: (_column, x, begin, end, out, at) => {
      for (let i = begin; i < end; i++) out[at + i - begin] = encode(x[i] as number);
    },
  };
}

function affine(context: RuleContext, rule: RuleOf<"affine">): BlockRule {
  const { format, dtype, options } = context;
  const level = format.scales[0]?.codec as Codec;
  const numbers: AffineRule = {
    mapping: rule.mapping,
    min: rule.min,
    max: rule.max,
    eps: rule.eps === "normal" ? SMALLEST_NORMAL[dtype] : roundTo(dtype, rule.eps),
    dtype,
    domain: format.zero.domain,
    preserveZero: rule.preserveZero ?? format.zero.domain !== "float",
    guarded: context.guarded,
  };
  const storedIn = scaleDtype(level);
  const storeScale = scaleWriter(context, 0);
  const storeZero = zeroWriter(context);
  const scales = new Float32Array(context.columns);
  const zeros = new Float32Array(context.columns);
  return {
    choose: (index, column, lo, hi) => {
      let scale = options.given?.scale[index] ?? affineScale(numbers, lo, hi);
      // A scale that float16 holds as (nearly) zero has no reciprocal there: 0 * infinity would be the code of zero.
      const reciprocal = roundTo(storedIn, 1 / roundTo(storedIn, scale));
      if (context.guarded && reciprocal === Number.POSITIVE_INFINITY) scale = SMALLEST_NORMAL[storedIn];
      const zero = options.given === undefined ? affineZero(numbers, lo, scale) : (options.given.zero?.[index] ?? 0);
      scales[column] = storeScale(index, scale);
      zeros[column] = storeZero(index, zero);
    },
    encode: (column, x, begin, end, out, at) => {
      affineCodes(numbers, storedIn, scales[column] as number, zeros[column] as number, x, begin, end, out, at);
    },
  };
}

function amax(context: RuleContext, rule: RuleOf<"amax">): BlockRule {
  const { dtype, guarded, options } = context;
  const { element } = context.format;
  const before = rule.round === "before";
  const bound = (value: number) => (before ? roundTo(dtype, value) : Math.fround(value));
  const [floor, ceiling] = [bound(rule.floor), bound(rule.ceiling ?? Number.POSITIVE_INFINITY)];
  const top = maxValue(element);
  const encode = encoder(element);
  const storeScale = scaleWriter(context, 0);
  const scales = new Float32Array(context.columns);
  const choose = (lo: number, hi: number): number => {
    const largest = magnitude(lo, hi);
    const clamped = largest < floor ? floor : largest > ceiling ? ceiling : largest;
    let scale = before ? roundTo(dtype, clamped / top) : Math.fround(clamped / top);
    if (rule.power) scale = 2 ** (Math.log2(scale) + ROUND - ROUND);
    // A scale of zero makes 0/0 of an all-zero block (28.4); a subnormal one is flushed by some devices.
    if (guarded && scale < 2 ** -126) scale = Math.max(Math.fround(clamped / top), 2 ** -126);
    return scale;
  };
  return {
    choose: (index, column, lo, hi) => {
      const scale = options.given?.scale[index] ?? choose(lo, hi);
      const stored = storeScale(index, scale);
      scales[column] = before ? stored : scale;
    },
    encode: (column, x, begin, end, out, at) => {
      const scale = scales[column] as number;
      for (let i = begin; i < end; i++) {
        const value = Math.fround((x[i] as number) / scale);
        out[at + i - begin] = encode(value < -top ? -top : value > top ? top : value);
      }
    },
  };
}

function mslkInt4(context: RuleContext, rule: RuleOf<"mslk_int4">): BlockRule {
  const { format, columns } = context;
  const { given } = context.options;
  const storeScale = scaleWriter(context, 0);
  const storeZero = zeroWriter(context);
  const scales = new Float32Array(columns);
  const least = new Float32Array(columns);
  const floor = Math.fround(1e-6);
  const encodeSymmetric: BlockRule["encode"] = (column, x, begin, end, out, at) => {
    const scale = scales[column] as number;
    for (let i = begin; i < end; i++) {
      const code = Math.fround((x[i] as number) / scale) + ROUND - ROUND;
      out[at + i - begin] = code < -8 ? -8 : code > 7 ? 7 : code;
    }
  };
  if (!rule.symmetric) {
    return {
      choose: (index, column, lo, hi) => {
        const range = Math.fround(hi - lo);
        const scale = given?.scale[index] ?? Math.fround((range < floor ? floor : range) / 15);
        const eight = Math.fround(scale * 8);
        const zero = given?.zero?.[index] ?? Math.fround(lo + eight);
        scales[column] = scale;
        least[column] = given === undefined ? lo : zero - eight;
        storeScale(index, scale);
        storeZero(index, zero);
      },
      encode: (column, x, begin, end, out, at) => {
        const scale = scales[column] as number;
        const low = least[column] as number;
        for (let i = begin; i < end; i++) {
          const code = Math.fround(Math.fround((x[i] as number) - low) / scale) + ROUND - ROUND;
          out[at + i - begin] = (code < 0 ? 0 : code > 15 ? 15 : code) - 8;
        }
      },
    };
  }
  const choose: BlockRule["choose"] = (index, column, lo, hi) => {
    const largest = magnitude(lo, hi);
    const scale = given?.scale[index] ?? Math.fround((largest < floor ? floor : largest) / 8);
    scales[column] = scale;
    storeScale(index, scale);
  };
  if (format.scales.length < 2) return { choose, encode: encodeSymmetric };
  const inner = format.scales[0]?.codec as Codec;
  const values = decodeTable(inner);
  const encode = encoder(inner);
  const top = maxValue(inner);
  const storeRow = scaleWriter(context, 1);
  return {
    prepare: (x, begin, end, row) => {
      let largest = 1 / 512;
      for (let i = begin; i < end; i++) largest = Math.max(largest, Math.abs(x[i] as number));
      const scale = storeRow(row, Math.fround(largest / top));
      for (let i = begin; i < end; i++) x[i] = values[encode(Math.fround((x[i] as number) / scale))] as number;
    },
    choose,
    encode: encodeSymmetric,
  };
}

function mx(context: RuleContext, rule: RuleOf<"mx">): BlockRule {
  const { element } = context.format;
  const top = maxValue(element);
  const power = Math.floor(Math.log2(top));
  const inverse = Math.fround(1 / top);
  const halfUlp = element.kind === "float" ? 2 ** (22 - element.mantissa) : 0;
  const words = context.out.buffers.scales[0] as Uint32Array;
  const encode = encoder(element);
  const encodeScale = encoder(context.format.scales[0]?.codec as Codec);
  const reciprocals = new Float32Array(context.columns);
  const byteOf = (largest: number): number => {
    if (rule.mode === "rceil") {
      const bits = f32Bits(Math.fround(largest * inverse));
      const [exponent, fraction] = [bits >>> 23, bits & 0x7fffff];
      if (exponent === 255) return 255;
      if (exponent === 0) return fraction > 0x400000 ? 1 : 0;
      return exponent + (fraction === 0 ? 0 : 1);
    }
    const bits = rule.mode === "even" ? (f32Bits(largest) + halfUlp) & 0xff800000 : f32Bits(largest);
    const exponent = (bits >>> 23) + (rule.mode === "ceil" && (bits & 0x7fffff) !== 0 ? 1 : 0);
    if (bits >>> 23 === 255) return 255;
    return Math.max(exponent - power, 0);
  };
  return {
    choose: (index, column, lo, hi) => {
      const given = context.options.given?.scale[index];
      const byte = given === undefined ? byteOf(Math.abs(magnitude(lo, hi))) : encodeScale(given);
      writeCode(words, 0, index - context.out.firstBlock(0), 8, byte);
      reciprocals[column] = byte === 255 ? Number.NaN : 2 ** (127 - byte);
    },
    encode: (column, x, begin, end, out, at) => {
      const reciprocal = reciprocals[column] as number;
      for (let i = begin; i < end; i++) {
        const value = Math.fround((x[i] as number) * reciprocal);
        out[at + i - begin] = encode(value < -top ? -top : value > top ? top : value);
      }
    },
  };
}

/** The smallest per-tensor scale of the guarded rule: its reciprocal over the smallest block scale stays finite. */
export const LEAST_TENSOR_SCALE = { divide: 2 ** -120, multiply: 2 ** -117 } as const;

function nvfp4(context: RuleContext, rule: RuleOf<"nvfp4">): BlockRule {
  const { format, options, guarded } = context;
  const block = format.scales[0]?.codec as Codec;
  const fields = floatFields(block as Extract<Codec, { kind: "float" }>);
  const multiply = rule.variant === "multiply";
  const least = multiply ? fields.quantum : fields.quantum * 2 ** (23 - fields.shift);
  const top = maxValue(format.element);
  const greatest = maxValue(block);
  const levels = format.scales.length;
  const storeBlock = scaleWriter(context, 0);
  const encode = encoder(format.element);
  const factors = new Float32Array(context.columns);
  let tensorScale = 1;
  let inverse = 1;
  const rescale = (scale: number) => {
    if (levels < 2) return scale;
    return Math.fround(multiply ? scale * inverse : scale / tensorScale);
  };
  const begin = (amax: number) => {
    tensorScale = options.perTensorScale ?? Math.fround(amax / (top * greatest));
    if (guarded && tensorScale < LEAST_TENSOR_SCALE[rule.variant]) tensorScale = LEAST_TENSOR_SCALE[rule.variant];
    tensorScale = scaleWriter(context, 1)(0, tensorScale);
    inverse = Math.fround(1 / tensorScale);
  };
  const known = options.perTensorScale !== undefined;
  if (levels > 1 && known) begin(0);
  return {
    ...(levels > 1 && !known ? { begin } : {}),
    choose: (index, column, lo, hi) => {
      const scale = options.given?.scale[index] ?? rescale(Math.fround(magnitude(lo, hi) / top));
      const stored = storeBlock(index, scale < least ? least : scale > greatest ? greatest : scale);
      factors[column] = Math.fround(inverse / stored);
    },
    encode: (column, x, start, end, out, at) => {
      const factor = factors[column] as number;
      for (let i = start; i < end; i++) {
        const value = Math.fround((x[i] as number) * factor);
        out[at + i - start] = encode(value < -top ? -top : value > top ? top : value);
      }
    },
  };
}

function nf4(context: RuleContext, rule: RuleOf<"nf4">): BlockRule {
  const { format, dtype, guarded } = context;
  const table = decodeTable(format.element);
  const coder = nf4Coder(table, dtype);
  const absmax = new Float32Array(context.out.shape[0] * context.columns);
  const scales = new Float32Array(context.columns);
  const store = scaleWriter(context, 0);
  let stored: Float32Array = absmax;
  return {
    collect: (index, lo, hi) => {
      absmax[index] = magnitude(lo, hi);
    },
    begin: () => {
      stored = quantizeScalers(absmax, dtype, rule.scalers).scales;
    },
    choose: (index, column) => {
      store(index, stored[index] as number);
      // An all-zero block is 0/0; any divisor makes its codes those of zero.
      const largest = absmax[index] as number;
      scales[column] = guarded && largest === 0 ? 1 : largest;
    },
    encode: (column, x, begin, end, out, at) => coder(scales[column] as number, x, begin, end, out, at),
  };
}
