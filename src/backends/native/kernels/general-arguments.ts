import { type FloatType, f32Bits, roundTo } from "../../../core/dtype.js";
import { floatFields, maxValue } from "../../../formats/codec.js";
import {
  type Codec,
  codecBits,
  codecVector,
  extentOf,
  type Format,
  midCode,
  type Rule,
  type ScaleLevel,
} from "../../../formats/format.js";
import { hostReason } from "../../../formats/host-rules.js";
import { scaleGranularity } from "../../../formats/tensor.js";
import type { ValueId } from "../../../ir/graph.js";
import type { OpAttrs, UnaryFn } from "../../../ir/ops.js";
import { SMALLEST_NORMAL } from "../../../quantize/affine.js";
import { LEAST_TENSOR_SCALE, scaleDtype } from "../../../quantize/rules.js";
import type { StoredLayout } from "../../stored-layout.js";
import { type BuildContext, constant, dense, type Source, value, weights } from "../kernel.js";

/** Scale levels that a kernel's description of a tensor has room for. */
export const MOST_LEVELS = 3;

export interface RuleOptions {
  /** Values of x are numbers of this type, and the steps that the specification rounds to it are. Default f32. */
  readonly dtype?: FloatType;
  /** As `QuantizeOptions` of `quantize/rules.ts`. Default `guarded`. */
  readonly numerics?: "guarded" | "torchao";
  /** nvfp4: the per-tensor scale of a calibration. */
  readonly perTensorScale?: number;
}

export const TYPES: readonly FloatType[] = ["f32", "f16", "bf16"];
const CODECS = ["float", "exponent", "int", "lut"] as const satisfies readonly Codec["kind"][];
const ZEROS = ["none", "int", "float"] as const;
const RULES = ["cast", "affine", "amax", "mslk_int4", "mx", "nvfp4", "nf4"] as const satisfies readonly Rule["kind"][];
const MAPPINGS = ["symmetric", "symmetric_no_clipping_err", "asymmetric"] as const;
const MODES = ["floor", "ceil", "even", "rceil"] as const;
/** In the order of the enumeration in `common.cuh`. */
const UNARY: readonly UnaryFn[] = ["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "softcap"];
type RuleOf<Kind extends Rule["kind"]> = Extract<Rule, { kind: Kind }>;

/**
 * What one dispatch hands to its entry: bindings, and integers that describe formats and rules, so that no kernel names one. The
 * C++ class `Args` (`descriptor.hpp`) reads them in the order in which they are written here.
 */
export class Arguments {
  readonly bindings: Source[] = [];
  readonly args: number[] = [];

  int(...values: readonly (number | boolean)[]): this {
    this.args.push(...values.map(Number));
    return this;
  }

  /** float32 numbers. */
  real(...values: readonly number[]): this {
    return this.int(...values.map((value) => f32Bits(Math.fround(value))));
  }

  /** Binds a buffer; `undefined` is none. */
  buffer(source: Source | undefined): this {
    return this.int(source === undefined ? -1 : this.bindings.push(source) - 1);
  }

  codec(codec: Codec): this {
    const [rows, k] = codecVector(codec);
    const real = codec.kind === "float" ? floatFields(codec) : null;
    const lowest = real !== null ? real.minNormalBits / 2 ** 23 : codec.kind === "exponent" ? 127 - codec.bias : 0;
    const isSigned = codec.kind === "float" || codec.kind === "int" ? codec.signed : false;
    return this.int(
      CODECS.indexOf(codec.kind),
      codecBits(codec),
      isSigned,
      codec.kind === "float" ? codec.mantissa : 0,
      lowest,
      real?.maxFinite ?? 0,
      real?.overflow ?? 0,
      real?.nan ?? 0,
      real?.infinity !== undefined,
      codec.kind === "lut" ? 2 ** codec.bits * rows * k : 0,
      rows * k,
    );
  }

  /** Where a table codec's numbers lie: in the tensor behind its zero points when they are learned, else in a constant. */
  table(codec: Codec, learned?: { readonly source: Source; readonly word: number }): this {
    if (codec.kind !== "lut") return this.int(-1, 0);
    if (codec.entries === "learned") return this.buffer(learned?.source).int(learned?.word ?? 0);
    const entries = Float32Array.from(codec.entries);
    return this.buffer(constant(`table ${entries.join()}`, () => entries)).int(0);
  }

  /** A function and its cap. */
  unary(attrs: OpAttrs["unary"] | undefined): this {
    return this.int(attrs === undefined ? 0 : UNARY.indexOf(attrs.fn)).real(attrs?.cap ?? 1);
  }

  stored(layout: StoredLayout, source: Source): this {
    const { format, shape } = layout;
    const { element, scales, zero } = format;
    this.buffer(source)
      .codec(element)
      .table(element, { source, word: layout.table })
      .int(...codecVector(element), shape[1], layout.rowStride, scaleGranularity(format, shape[1]))
      .real(zero.domain === "float" ? midCode(element) : 0)
      .int(scales.length);
    for (const [i, level] of scales.entries()) this.#blocks(level, level.codec, layout.scales[i] as number, shape[1]);
    this.int(ZEROS.indexOf(zero.domain));
    if (zero.domain !== "none") this.#blocks(scales[0] as ScaleLevel, zero.codec, layout.zero, shape[1]);
    return this;
  }

  #blocks({ block }: ScaleLevel, codec: Codec, offset: number, k: number): this {
    const width = Math.max(extentOf(block[1], k), 1);
    return this.codec(codec).int(offset, block[0] === "all" ? 0 : block[0], width, Math.ceil(k / width));
  }

  /** A format's rule; `ruleObstacle` is null. */
  rule(format: Format, options: RuleOptions = {}): this {
    const { element, scales, zero, rule } = format;
    const dtype = options.dtype ?? "f32";
    const guarded = options.numerics !== "torchao";
    const [first, second] = scales.map((level) => level.codec);
    const storedIn = first === undefined ? "f32" : scaleDtype(first);
    const promoted = dtype === storedIn ? dtype : "f32";
    const none: Codec = element;
    const pick = <Kind extends Rule["kind"]>(kind: Kind) => (rule.kind === kind ? (rule as RuleOf<Kind>) : undefined);
    const [affine, amax, mx, nvfp4] = [pick("affine"), pick("amax"), pick("mx"), pick("nvfp4")];
    const top = maxOf(element);
    const block = first?.kind === "float" ? floatFields(first) : null;
    const multiply = nvfp4?.variant === "multiply";
    const least =
      nvfp4 === undefined || block === null ? 0 : multiply ? block.quantum : block.quantum * 2 ** (23 - block.shift);
    const [min, max] =
      affine === undefined ? [least, first === undefined ? 0 : maxOf(first)] : [affine.min, affine.max];
    const oneSided = affine !== undefined && guarded && (min === 0 || max === 0) && max - min === 1;
    const bound = (value: number) => (amax?.round === "before" ? roundTo(dtype, value) : value);
    const prepares = rule.kind === "mslk_int4" && second !== undefined;
    return this.int(
      RULES.indexOf(rule.kind as (typeof RULES)[number]),
      TYPES.indexOf(dtype),
      TYPES.indexOf(storedIn),
      TYPES.indexOf(promoted),
      guarded,
      ZEROS.indexOf(zero.domain),
    )
      .codec(element)
      .table(element)
      .codec(first ?? none)
      .codec(zero.domain === "none" ? none : zero.codec)
      .codec(second ?? none)
      .int(
        affine === undefined ? 0 : MAPPINGS.indexOf(affine.mapping),
        oneSided ? (max === 0 ? -1 : 1) : 0,
        affine?.preserveZero ?? zero.domain !== "float",
      )
      .real(
        min,
        max,
        affine === undefined ? 0 : affine.eps === "normal" ? SMALLEST_NORMAL[dtype] : roundTo(dtype, affine.eps),
        affine?.mapping === "symmetric" ? (max - min) / 2 : max - min,
        (max + min + 1) / 2,
        bound(amax?.floor ?? 0),
        bound(amax?.ceiling ?? Number.POSITIVE_INFINITY),
        top,
        1 / top,
      )
      .int(
        amax?.round === "before",
        amax?.power === true,
        rule.kind === "mslk_int4" && rule.symmetric,
        mx === undefined ? 0 : MODES.indexOf(mx.mode),
        mx === undefined ? 0 : Math.floor(Math.log2(top)),
        mx !== undefined && element.kind === "float" ? 2 ** (22 - element.mantissa) : 0,
        multiply,
        second === undefined ? 0 : prepares ? 2 : 1,
        options.perTensorScale === undefined,
        prepares,
      )
      .real(
        first === undefined ? 0 : prepares ? maxOf(first) : top * maxOf(first),
        nvfp4 !== undefined && guarded ? LEAST_TENSOR_SCALE[nvfp4.variant] : 0,
        options.perTensorScale ?? 0,
      )
      .int("scalers" in rule ? rule.scalers : 0);
  }
}

const maxOf = (codec: Codec): number => (codec.kind === "lut" && codec.entries === "learned" ? 0 : maxValue(codec));

/** The buffer of an operand of any role. */
export function operand(context: BuildContext, id: ValueId): Source {
  if (context.bound.graph.values[id]?.role !== "weight") return value(id);
  return context.type(id).kind === "format" ? weights(id) : dense(id);
}

/** Why no kernel here makes a format's codes, or null. */
export function ruleObstacle(format: Format): string | null {
  const { element, rule, zero, scales } = format;
  const reason = hostReason(format);
  if (reason !== null) return reason;
  if (element.kind === "lut" && (element.entries === "learned" || element.vector[0] * element.vector[1] !== 1))
    return `rule ${rule.kind} needs an element codec of single fixed numbers`;
  const [first, second, ...more] = scales;
  if (first === undefined) return rule.kind === "cast" ? null : `rule ${rule.kind} needs a scale`;
  if ((rule.kind === "affine" || rule.kind === "mslk_int4") && element.kind !== "int")
    return `rule ${rule.kind} makes integer codes`;
  if (rule.kind === "mx" && codecBits(first.codec) !== 8) return "rule mx makes scales of one byte";
  if (rule.kind === "nvfp4" && first.codec.kind !== "float") return "rule nvfp4 makes scales of a float codec";
  if (zero.domain !== "none" && ![8, 16, 32].includes(codecBits(zero.codec)))
    return `its zero points have ${codecBits(zero.codec)} bits: 8, 16 and 32 are stored`;
  if (second === undefined) return null;
  const made = { nvfp4: "allxall", mslk_int4: "1xall" }[rule.kind as string];
  if (second.block.join("x") === made && more.length === 0) return null;
  return `rule ${rule.kind} does not make second scales per ${second.block.join("x")}`;
}

/** Why a tensor in a format cannot be described to a kernel, or null. */
export function storedObstacle({ scales, name }: Format): string | null {
  return scales.length <= MOST_LEVELS ? null : `${name} has ${scales.length} scale levels: ${MOST_LEVELS} are read`;
}

/** Whether 8 neighbouring elements share their scales and whole codes stand for them, so that they are decoded at once. */
export function inEights(format: Format, k: number): boolean {
  const shared = scaleGranularity(format, k);
  return 8 % codecVector(format.element)[1] === 0 && (shared >= k || shared % 8 === 0);
}
