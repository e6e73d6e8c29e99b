import { decode } from "../../../formats/codec.js";
import { type Codec, codecBits, codecName, extentOf, type Format, midCode } from "../../../formats/format.js";
import { CODECS } from "../../../formats/table.js";
import type { ValueId } from "../../../ir/graph.js";
import type { UnaryFn } from "../../../ir/ops.js";
import type { BoundStep } from "../../../plan/step.js";
import { linearStep } from "../../linear-step.js";
import type { StoredLayout } from "../../stored-layout.js";
import { type BuildContext, constant, dense, value, weights } from "../kernel.js";
import { Arguments, operand } from "./general-arguments.js";

/** In the order of `ScaleCodec` in operands.cuh, after `none`. */
const SCALE_CODECS = ["f32", "f16", "bf16", "e8m0", "e4m3", "int8", "uint8"] as const satisfies (keyof typeof CODECS)[];
/** In the order of `CodeKind` in operands.cuh. */
const CODE_KINDS = [
  "bf16",
  "e4m3",
  "e5m2",
  "int8",
  "int4",
  "e2m1",
  "int1",
  "int2",
  "int3",
  "int5",
  "int6",
  "int7",
  "float5",
  "float6",
] as const;
/** In the order of `Activation` in operands.cuh, after `none`. */
const ACTIVATIONS: readonly UnaryFn[] = ["relu", "silu", "gelu_tanh", "gelu"];
/** In the order of `Rounding` in operands.cuh, after `none`. */
const ROUNDINGS = ["bf16", "f16"] as const satisfies (keyof typeof CODECS)[];

const same = (a: Codec, b: Codec) => JSON.stringify(a) === JSON.stringify(b);
const scaleCodec = (codec: Codec): number => SCALE_CODECS.findIndex((name) => same(CODECS[name], codec)) + 1;

/** What keeps a step's operands or its epilogue from being described to the kernels, or null. */
export function stepObstacle(bound: BoundStep): string | null {
  const { epilogue, rounds } = linearStep(bound);
  if ("fn" in epilogue && !ACTIVATIONS.includes(epilogue.fn)) return `its epilogue is ${epilogue.fn}`;
  if (rounds !== null && !ROUNDINGS.some((name) => same(CODECS[name], rounds.element)))
    return `its result is rounded to ${rounds.name}`;
  const { weight, x, k } = formatsOf(bound);
  return weightObstacle(weight, k) ?? (x === null ? null : activationObstacle(x));
}

/** How the kernels read a weight's codes, each of which is a bf16 exactly; null for codecs that are not. */
export function codeKind(codec: Codec): (typeof CODE_KINDS)[number] | null {
  if (codec.kind === "int") return codec.bits <= 8 ? (`int${codec.bits}` as (typeof CODE_KINDS)[number]) : null;
  if (codec.kind !== "float") return null;
  const named = (["bf16", "e4m3", "e5m2", "e2m1"] as const).find((name) => same(CODECS[name], codec));
  if (named !== undefined) return named;
  const bits = codecBits(codec);
  return codec.specials === "none" && codec.signed && (bits === 5 || bits === 6) ? `float${bits}` : null;
}

/** Significant bits of a codec's values, the sign not counted. */
export function significantBits(codec: Codec): number {
  if (codec.kind === "float") return codec.mantissa + 1;
  return codec.kind === "exponent" ? 1 : codec.kind === "int" ? codec.bits : 24;
}

export function isInteger({ element, zero }: Format): boolean {
  return (
    element.kind === "int" &&
    element.bits <= 8 &&
    (zero.domain === "none" || (zero.domain === "int" && zero.codec.kind === "int"))
  );
}

/** Elements of K that share a scale of level 0; K when it does not change along K. */
export const scaleRun = (format: Format, k: number): number =>
  Math.min(extentOf(format.scales[0]?.block[1] ?? "all", k), k);

/** Why a weight cannot be described to these kernels, or null. */
function weightObstacle({ element, scales, zero, name }: Format, k: number): string | null {
  if (codeKind(element) === null) return `codes of ${name} are not exact in bf16`;
  if (scales.length > 2) return `${name} has ${scales.length} scale levels: 2 are read`;
  const unknown = scales.find(({ codec }) => scaleCodec(codec) === 0);
  if (unknown !== undefined) return `scales of ${name} are ${codecName(unknown.codec)}, which is not read`;
  if (scales[1] !== undefined && extentOf(scales[1].block[1], k) < k)
    return `the second scale of ${name} changes along K`;
  if (zero.domain === "none") return null;
  if (scaleCodec(zero.codec) === 0 || element.kind !== "int")
    return `zero points of ${name} are ${codecName(zero.codec)}`;
  if (zero.domain === "int") return zero.codec.kind === "int" ? null : `zero points of ${name} are no integers`;
  if (zero.codec.kind !== "float") return `zero points of ${name} are ${codecName(zero.codec)}`;
  return scales.length > 1 ? `${name} adds zero points that its second scale does not multiply` : null;
}

/** Why stored activations cannot be described, or null. */
function activationObstacle({ element, scales, zero, name }: Format): string | null {
  const bits = codecBits(element);
  if (element.kind === "lut" || bits > 16 || (bits > 8 && !isHalf(element))) return `codes of ${name} are not read`;
  if (bits <= 8 && element.kind === "exponent") return `codes of ${name} are not read`;
  if (scales.length > 2) return `${name} has ${scales.length} scale levels: 2 are read`;
  const unknown = scales.find(({ codec }) => scaleCodec(codec) === 0);
  if (unknown !== undefined) return `scales of ${name} are ${codecName(unknown.codec)}, which is not read`;
  if (zero.domain === "float") return `zero points of ${name} are added`;
  if (zero.domain === "int" && (zero.codec.kind !== "int" || scaleCodec(zero.codec) === 0))
    return `zero points of ${name} are ${codecName(zero.codec)}`;
  return null;
}

const isHalf = (codec: Codec) => same(codec, CODECS.bf16) || same(codec, CODECS.f16);

/** Whether codes are signed bytes as they lie, without zero points. */
export const isSigned8 = ({ element, zero }: Format): boolean =>
  element.kind === "int" && element.signed && element.bits === 8 && zero.domain === "none";

/** Whether x's codes are of the weight's codec, without zero points. */
export const isAlike = (x: Format, weight: Format): boolean =>
  x.zero.domain === "none" && same(x.element, weight.element);

/** Whether a format's codes are numbers of a codec, without scales. */
export const unscaled = ({ element, scales }: Format, codec: string): boolean =>
  scales.length === 0 && codecName(element) === codec;

/** Whether x's codes are bf16 exactly and its scales constant along K: one carrier an element, scales applied afterwards. */
export function isSeparable(format: Format, k: number): boolean {
  const constantAlongK = format.scales.every(({ block }) => extentOf(block[1], k) >= k);
  const { element } = format;
  return constantAlongK && (element.kind === "int" ? element.bits <= 8 : significantBits(element) <= 8);
}

/** Whether every code times its scale is a number of at most `bits` significant bits. */
export function exactProduct({ element, scales, zero }: Format, bits: number): boolean {
  const [first] = scales;
  if (first === undefined || (zero.domain === "int" && zero.codec.kind !== "int")) return false;
  // A code of b bits, its middle subtracted, is at most 2^(b - 1), itself a power of two: b - 1 significant bits.
  const ofCode =
    element.kind === "int" ? (zero.domain === "int" ? element.bits + 1 : element.bits - 1) : significantBits(element);
  return ofCode + significantBits(first.codec) <= bits;
}

/**
 * As how many bf16 numbers an element of x goes, float32 where it is not stored: one where its codes are exact in bf16, alone or with
 * their scale; a second scale is then a factor of the row.
 */
export function partsOf(x: Format | null, k: number): 1 | 3 {
  if (x === null) return 3;
  if (isSeparable(x, k)) return 1;
  const outer = x.scales.slice(1).every(({ block }) => extentOf(block[1], k) >= k);
  return outer && exactProduct(x, 8) ? 1 : 3;
}

/** The format that the weights of a step share, and that of x where it is stored. */
export function formatsOf(bound: BoundStep): { weight: Format; x: Format | null; n: number; k: number } {
  const { x, parts, k } = linearStep(bound);
  const types = (parts[0] as readonly ValueId[]).map((id) => bound.type(id));
  const [first] = types;
  const typeX = bound.type(x);
  if (first?.kind !== "format") throw new TypeError("a weight is stored in a format");
  const n = types.reduce((sum, type) => sum + (type.shape[0] as number), 0);
  return { weight: first.format, x: typeX.kind === "format" ? typeX.format : null, n, k };
}

/** What the entries of native/kernels/linear read, in the order of `Arguments` in arguments.hpp. */
export class LinearArguments extends Arguments {
  /** Scales or zero points of `codec` at word `offset`. */
  #blocks(layout: StoredLayout, codec: Codec | undefined, level: number, offset: number | undefined): this {
    const block = layout.format.scales[level]?.block;
    if (codec === undefined || block === undefined || offset === undefined) return this.int(0);
    const [rows, k] = layout.shape;
    const width = Math.max(Math.min(extentOf(block[1], k), k), 1);
    return this.int(scaleCodec(codec), offset * 4, Math.max(extentOf(block[0], rows), 1), width, Math.ceil(k / width));
  }

  #scales(layout: StoredLayout): this {
    const { scales, zero } = layout.format;
    for (const level of [0, 1]) this.#blocks(layout, scales[level]?.codec, level, layout.scales[level]);
    return this.#blocks(layout, zero.domain === "none" ? undefined : zero.codec, 0, layout.zero);
  }

  weightGroup(context: BuildContext): this {
    const { parts, k } = linearStep(context.bound);
    const groups = parts.map((ids) => context.weights(ids));
    const [first] = groups as [(typeof groups)[number]];
    const layout = first.slices[0]?.layout as StoredLayout;
    const { element, zero } = first.format;
    const half = element.kind === "int" ? 2 ** (element.bits - 1) : 0;
    const signed = element.kind === "int" && element.signed;
    const float = element.kind === "float" ? element : null;
    const kind = codeKind(element) as (typeof CODE_KINDS)[number];
    this.int(CODE_KINDS.indexOf(kind), parts.length, first.rows, k, layout.rowStride * 4, signed ? half : 0)
      .real(signed ? half : zero.domain === "float" ? midCode(element) : 0)
      .int(zero.domain === "int", float?.mantissa ?? 0)
      .real(float === null ? 1 : 2 ** (127 - float.bias))
      .int(zero.domain === "float");
    for (const [part, ids] of parts.entries())
      this.buffer(weights(...ids)).#scales(groups[part]?.slices[0]?.layout as StoredLayout);
    return this;
  }

  activations(context: BuildContext): this {
    const { x } = linearStep(context.bound);
    const type = context.type(x);
    this.buffer(operand(context, x));
    if (type.kind === "dense") {
      const [stride, column] = context.strided(x);
      return this.int(0, 0, stride * 4, column * 4, -1, 0, 0, 0, ...context.rowExtent(x));
    }
    const layout = context.layout(x);
    const { element } = type.format;
    const bits = codecBits(element);
    const wide = same(element, CODECS.f16) || same(element, CODECS.e5m2);
    this.int(bits, wide, layout.rowStride * 4, 0);
    if (bits > 8) this.int(-1);
    else {
      const values = () => Float32Array.from({ length: 2 ** bits }, (_, code) => decode(element, code));
      this.buffer(constant(`values ${JSON.stringify(element)}`, values));
    }
    return this.#scales(layout).int(...context.rowExtent(x));
  }

  epilogue(context: BuildContext): this {
    const { epilogue, out, biases, rounds } = linearStep(context.bound);
    this.int("fn" in epilogue ? ACTIVATIONS.indexOf(epilogue.fn) + 1 : 0);
    this.int(rounds === null ? 0 : ROUNDINGS.findIndex((name) => same(CODECS[name], rounds.element)) + 1);
    // Rows of codes of 16 bits: two a word.
    const place = rounds === null ? context.strided(out) : [context.layout(out).rowStride * 2, 0];
    this.buffer(value(out)).int(...place);
    if (epilogue.kind === "residual")
      this.buffer(operand(context, epilogue.other)).int(...context.strided(epilogue.other));
    else this.int(-1);
    for (const part of [0, 1]) {
      const ids = biases[part];
      this.buffer(ids === undefined ? undefined : dense(...ids));
    }
    return this;
  }
}
