import { type FloatType, f32Bits, roundTo } from "../../../core/dtype.js";
import { decodeTable, floatFields, maxValue } from "../../../formats/codec.js";
import { type Codec, codecBits, type Format, type Rule } from "../../../formats/format.js";
import { type DeviceKind, hostReason, isHostKind } from "../../../formats/host-rules.js";
import { SMALLEST_NORMAL } from "../../../quantize/affine.js";
import { LEAST_TENSOR_SCALE, scaleDtype } from "../../../quantize/rules.js";
import { decodeFunction, encodeFunction, orderKey, u } from "./codec.js";

/**
 * The rules of `quantize/rules.ts` in WGSL, on float32 bits with the arithmetic of `exact.ts`, so that every code and scale is
 * the same bit for bit. A rule is text that declares
 *   `fn choose(lo: u32, hi: u32, outer: u32) -> Chosen`  codes of scale and zero point of a block and what `code_of` needs;
 *   `fn code_of(x: u32, a: u32, b: u32) -> u32`          the element code of a value;
 * where `lo` and `hi` are a block's extremes (both NaN if it holds one), or the scale and the zero point that are given for it,
 * and `outer` is the value of its second-level scale.
 */
export interface RuleText {
  readonly functions: string;
  /** How the second scale level comes about: from the whole tensor or from each row before its blocks are looked at. */
  readonly outer?: {
    readonly per: "tensor" | "row";
    /** `fn outer_code_of(lo: u32, hi: u32) -> u32` is its code, `fn outer_value(code: u32) -> u32` its value. */
    readonly functions: string;
    /** Whether the code depends on the data. */
    readonly dynamic: boolean;
    /** Whether `fn prepare(x: u32, outer: u32) -> u32` replaces every value first. */
    readonly prepares: boolean;
  };
  /** Scales of blocks are left unrounded and then quantized themselves, so many at a time, in steps of this type (15). */
  readonly scalers?: { readonly count: number; readonly dtype: FloatType };
}

export interface RuleOptions {
  /** Values of x are numbers of this type, and the steps that the specification rounds to it are. Default f32. */
  readonly dtype?: FloatType;
  /** As `QuantizeOptions` of `quantize/rules.ts`. Default `guarded`. */
  readonly numerics?: "guarded" | "torchao";
  /** nvfp4: the per-tensor scale of a calibration. */
  readonly perTensorScale?: number;
}

interface Context {
  readonly given: boolean;
  readonly format: Format;
  readonly dtype: FloatType;
  readonly guarded: boolean;
  readonly perTensorScale: number | undefined;
}
type RuleOf<Kind extends Rule["kind"]> = Extract<Rule, { kind: Kind }>;
type Generator<Kind extends Rule["kind"]> = (context: Context, rule: RuleOf<Kind>) => RuleText;

const GENERATORS: { readonly [Kind in DeviceKind]: Generator<Kind> } = {
  cast,
  affine,
  amax,
  mslk_int4: mslkInt4,
  mx,
  nvfp4,
  nf4,
};

/** Rules whose WGSL takes scales that are given. */
const TAKES_GIVEN: readonly Rule["kind"][] = ["affine", "amax"];

/** Why a format's rule has no WGSL, or null. */
export function ruleObstacle(format: Format, given = false): string | null {
  const { element, rule, zero } = format;
  if (given && !isHostKind(rule.kind) && !TAKES_GIVEN.includes(rule.kind))
    return `rule ${rule.kind} chooses its scales itself: it takes none that are given`;
  const reason = hostReason(format);
  if (reason !== null) return reason;
  if (rule.kind !== "affine" && rule.kind !== "mslk_int4") return null;
  if (element.kind !== "int") return `rule ${rule.kind} makes integer codes`;
  if (rule.kind !== "affine" || zero.domain !== "int") return null;
  if (zero.codec.kind !== "int") return "its zero points count codes and are not stored as integers";
  // Integers up to here are bfloat16 numbers, so no rounding moves a code across a bound.
  return Math.max(-rule.min, rule.max) > 256 ? "its codes exceed 256" : null;
}

/** The functions of a format's rule, for scales that it chooses or that are given; `ruleObstacle` must be null. They need `EXACT`. */
export function ruleText(format: Format, options: RuleOptions, given = false): RuleText {
  const generate = GENERATORS[format.rule.kind as DeviceKind] as (context: Context, rule: Rule) => RuleText;
  const context: Context = {
    format,
    dtype: options.dtype ?? "f32",
    guarded: options.numerics !== "torchao",
    perTensorScale: options.perTensorScale,
    given,
  };
  const text = generate(context, format.rule);
  return { ...text, functions: `${COMMON}${encodeFunction(format.element, "element")}${text.functions}` };
}

const COMMON = /* wgsl */ `
struct Chosen { scale: u32, zero: u32, a: u32, b: u32 }
fn negative(a: u32) -> u32 { return a ^ 0x80000000u; }
fn larger(a: u32, b: u32) -> u32 {
  let larger = exact_from_key(max(exact_key(a), exact_key(b)));
  return select(larger, 0x7fc00000u, exact_is_nan(a) | exact_is_nan(b));
}
`;

/** The bits of a constant. */
const f = (value: number): string => u(f32Bits(Math.fround(value)));

/** Rounding to a type, as text around an expression. */
const rounded = (dtype: FloatType, text: string): string => (dtype === "f32" ? text : `exact_${dtype}(${text})`);

/** Encode `name_code(bits)` and decode `name_value(code)` on bits. */
function coder(codec: Codec, name: string): string {
  return `${encodeFunction(codec, name)}${decodeFunction(codec, `${name}_float`)}
fn ${name}_code(bits: u32) -> u32 { return ${name}_bits(bits); }
fn ${name}_value(code: u32) -> u32 { return bitcast<u32>(${name}_float(code)); }
`;
}

/** Cuts magnitudes at the element codec's largest value; only a codec with infinity needs it, the others saturate. */
function saturated(codec: Codec, text: string): string {
  if (codec.kind === "float" && codec.specials !== "ieee") return text;
  if (codec.kind === "int") return text;
  return `exact_clamp(${text}, ${f(-maxValue(codec))}, ${f(maxValue(codec))})`;
}

function firstScale(format: Format): Codec {
  return (format.scales[0] as Format["scales"][number]).codec;
}

function cast(): RuleText {
  return {
    functions: `
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen { return Chosen(0u, 0u, 0u, 0u); }
fn code_of(x: u32, a: u32, b: u32) -> u32 { return element_bits(x); }
`,
  };
}

function affine({ format, dtype, guarded, given }: Context, rule: RuleOf<"affine">): RuleText {
  const { min, max } = rule;
  const { element, zero } = format;
  const level = firstScale(format);
  const storedIn = scaleDtype(level);
  const promoted = dtype === storedIn ? dtype : "f32";
  const preserveZero = rule.preserveZero ?? zero.domain !== "float";
  const eps = rule.eps === "normal" ? SMALLEST_NORMAL[dtype] : roundTo(dtype, rule.eps);
  const middle = (max + min + 1) / 2;
  const rnd = (text: string) => rounded(dtype, text);
  const wide = (text: string) => rounded(promoted, text);

  const scale = (): string => {
    if (rule.mapping === "asymmetric") return rnd(`exact_div(${rnd("exact_sub(greatest, least)")}, ${f(max - min)})`);
    if (guarded && (min === 0 || max === 0) && max - min === 1) return rnd(max === 0 ? "negative(least)" : "greatest");
    if (rule.mapping === "symmetric") return rnd(`exact_div(larger(negative(least), greatest), ${f((max - min) / 2)})`);
    return `steepest(${rnd(`exact_div(least, ${f(min)})`)}, ${rnd(`exact_div(greatest, ${f(max)})`)})`;
  };
  const inverse = rounded(storedIn, `exact_div(${f(1)}, stored)`);
  // A scale that float16 holds as (nearly) zero has no reciprocal there: 0 * infinity would be the code of zero.
  const tooSmall =
    guarded && (given || storedIn === "f16")
      ? `if (${rounded(storedIn, `exact_div(${f(1)}, ${rounded(storedIn, "scale")})`)} == 0x7f800000u) { scale = ${f(SMALLEST_NORMAL[storedIn])}; }`
      : "";
  const steps = wide("exact_mul(x, a)");
  let parameters = `let zero = 0u;
  return Chosen(code, zero, ${inverse}, 0u);`;
  let codes = `let steps = ${steps};
  let integer = exact_to_int(steps);`;
  if (zero.domain === "int") {
    const [least, greatest] = intRange(zero.codec);
    // Rounding a sum of integers to any float type cannot take it across a bound that the type holds (`ruleObstacle`).
    const chosen =
      rule.mapping === "asymmetric"
        ? `${min} - exact_to_int(${rnd("exact_div(least, scale)")})`
        : `${Math.trunc(middle)}`;
    const fitting = given ? "exact_to_int(hi)" : `clamp(${chosen}, ${min}, ${max})`;
    parameters = `let zero = clamp(${fitting}, ${least}, ${greatest});
  return Chosen(code, bitcast<u32>(zero) & ${u(2 ** codecBits(zero.codec) - 1)}, ${inverse}, bitcast<u32>(zero));`;
    codes = `let steps = ${steps};
  let integer = exact_to_int(steps) + bitcast<i32>(b);`;
  }
  if (zero.domain === "float") {
    const chosen = given ? "hi" : rnd(`exact_add(lo, ${rnd(`exact_mul(scale, ${f(middle)})`)})`);
    parameters = `let zero = zero_code(${chosen});
  return Chosen(code, zero, stored, ${wide(`exact_sub(zero_value(zero), ${wide(`exact_mul(stored, ${f(middle)})`)})`)});`;
    codes = `let steps = ${wide(`exact_div(${wide("exact_sub(x, b)")}, a)`)};
  let integer = exact_to_int(steps);`;
  }
  return {
    functions: `${coder(level, "scale")}${zero.domain === "float" ? coder(zero.codec, "zero") : ""}
fn steepest(below: u32, above: u32) -> u32 { return select(above, below, exact_less(above, below)); }
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen {
  ${
    given
      ? "var scale = lo;"
      : `let least = ${preserveZero ? "select(lo, 0u, exact_less(0u, lo))" : "lo"};
  let greatest = ${preserveZero ? "select(hi, 0u, exact_less(hi, 0u))" : "hi"};
  let chosen = ${scale()};
  var scale = select(chosen, ${f(eps)}, exact_less(chosen, ${f(eps)}));`
  }
  ${tooSmall}
  let code = scale_code(scale);
  let stored = scale_value(code);
  ${parameters}
}
fn code_of(x: u32, a: u32, b: u32) -> u32 {
  ${codes}
  return select(bitcast<u32>(clamp(integer, ${min}, ${max})) & ${u(2 ** codecBits(element) - 1)}, 0u, exact_is_nan(steps));
}
`,
  };
}

function intRange(codec: Codec): [number, number] {
  const signed = codec.kind === "int" && codec.signed;
  return [signed ? -(2 ** (codecBits(codec) - 1)) : 0, maxValue(codec)];
}

function amax({ format, dtype, guarded, given }: Context, rule: RuleOf<"amax">): RuleText {
  const before = rule.round === "before";
  const bound = (value: number) => f(before ? roundTo(dtype, value) : value);
  const top = maxValue(format.element);
  const least = f(2 ** -126);
  return {
    functions: `${coder(firstScale(format), "scale")}${rule.power ? POWER : ""}
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen {
  ${
    given
      ? "let scale = lo;"
      : `let largest = exact_clamp(larger(negative(lo), hi), ${bound(rule.floor)}, ${bound(rule.ceiling ?? Number.POSITIVE_INFINITY)});
  let quotient = exact_div(largest, ${f(top)});
  var scale = ${before ? rounded(dtype, "quotient") : "quotient"};
  ${rule.power ? "scale = nearest_power(scale);" : ""}
  ${guarded ? `if (exact_less(scale, ${least})) { scale = larger(quotient, ${least}); }` : ""}`
  }
  let code = scale_code(scale);
  return Chosen(code, 0u, ${before ? "scale_value(code)" : "scale"}, 0u);
}
fn code_of(x: u32, a: u32, b: u32) -> u32 { return element_bits(${saturated(format.element, "exact_div(x, a)")}); }
`,
  };
}

/** The power of two nearest in log2: no float32 is sqrt(2) times a power of two, 0x3504f3 is the last mantissa below. */
const POWER = /* wgsl */ `
fn nearest_power(a: u32) -> u32 {
  if (a == 0u || a >= 0x7f800000u) { return a; }
  let parts = exact_parts(a);
  let exponent = bitcast<i32>(parts.x) + select(0, 1, (parts.y & 0x7fffffu) > 0x3504f3u);
  return select(1u << u32(max(exponent + 22, 0)), u32(exponent) << 23u, exponent > 0);
}
`;

function mslkInt4({ format }: Context, rule: RuleOf<"mslk_int4">): RuleText {
  const floor = f(1e-6);
  const scale = firstScale(format);
  if (!rule.symmetric) {
    return {
      functions: `${coder(scale, "scale")}${format.zero.domain === "none" ? "" : coder(format.zero.codec, "zero")}
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen {
  let range = exact_sub(hi, lo);
  let scale = exact_div(select(range, ${floor}, exact_less(range, ${floor})), ${f(15)});
  let zero = exact_add(lo, exact_mul(scale, ${f(8)}));
  return Chosen(scale_code(scale), ${format.zero.domain === "none" ? "0u" : "zero_code(zero)"}, scale, lo);
}
fn code_of(x: u32, a: u32, b: u32) -> u32 {
  let steps = exact_clamp(exact_round_even(exact_div(exact_sub(x, b), a)), ${f(0)}, ${f(15)});
  return element_bits(exact_sub(steps, ${f(8)}));
}
`,
    };
  }
  const functions = `${coder(scale, "scale")}
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen {
  let largest = larger(negative(lo), hi);
  let scale = exact_div(select(largest, ${floor}, exact_less(largest, ${floor})), ${f(8)});
  return Chosen(scale_code(scale), 0u, scale, 0u);
}
fn code_of(x: u32, a: u32, b: u32) -> u32 {
  return element_bits(exact_clamp(exact_div(x, a), ${f(-8)}, ${f(7)}));
}
`;
  const second = format.scales[1];
  if (second === undefined) return { functions };
  return {
    functions,
    outer: {
      per: "row",
      dynamic: true,
      prepares: true,
      functions: `${coder(second.codec, "outer")}
fn outer_code_of(lo: u32, hi: u32) -> u32 {
  return outer_code(exact_div(larger(larger(negative(lo), hi), ${f(1 / 512)}), ${f(maxValue(scale))}));
}
fn prepare(x: u32, outer: u32) -> u32 { return scale_value(scale_code(exact_div(x, outer))); }
`,
    },
  };
}

function mx({ format }: Context, rule: RuleOf<"mx">): RuleText {
  const { element } = format;
  const top = maxValue(element);
  const power = Math.floor(Math.log2(top));
  const halfUlp = element.kind === "float" ? 2 ** (22 - element.mantissa) : 0;
  const byte = {
    rceil: `
  let bits = exact_mul(largest, ${f(1 / top)});
  let exponent = bits >> 23u;
  let up = select(bits & 0x7fffffu, select(0u, 1u, (bits & 0x7fffffu) > 0x400000u), exponent == 0u);
  let byte = exponent + min(up, 1u);`,
    even: `
  let bits = (largest + ${u(halfUlp)}) & 0xff800000u;
  let exponent = bits >> 23u;
  let byte = max(exponent, ${u(power)}) - ${u(power)};`,
    ceil: `
  let exponent = largest >> 23u;
  let byte = max(exponent + min(largest & 0x7fffffu, 1u), ${u(power)}) - ${u(power)};`,
    floor: `
  let exponent = largest >> 23u;
  let byte = max(exponent, ${u(power)}) - ${u(power)};`,
  }[rule.mode];
  return {
    functions: `
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen {
  let largest = larger(negative(lo), hi) & 0x7fffffffu;${byte}
  let code = select(byte, 255u, exponent == 255u);
  let reciprocal = select((254u - code) << 23u, 0x400000u, code == 254u);
  return Chosen(code, 0u, select(reciprocal, 0x7fc00000u, code == 255u), 0u);
}
fn code_of(x: u32, a: u32, b: u32) -> u32 { return element_bits(${saturated(element, "exact_mul(x, a)")}); }
`,
  };
}

function nvfp4({ format, guarded, perTensorScale }: Context, rule: RuleOf<"nvfp4">): RuleText {
  const { element } = format;
  const block = firstScale(format) as Extract<Codec, { kind: "float" }>;
  const { quantum, shift } = floatFields(block);
  const multiply = rule.variant === "multiply";
  const least = multiply ? quantum : quantum * 2 ** (23 - shift);
  const [top, greatest] = [maxValue(element), maxValue(block)];
  const second = format.scales[1];
  const one = f(1);
  const rescale = second === undefined ? "scale" : multiply ? "exact_mul(scale, inverse)" : "exact_div(scale, outer)";
  const functions = `${coder(block, "scale")}
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen {
  let inverse = ${second === undefined ? one : `exact_div(${one}, outer)`};
  let scale = exact_div(larger(negative(lo), hi), ${f(top)});
  let code = scale_code(exact_clamp(${rescale}, ${f(least)}, ${f(greatest)}));
  return Chosen(code, 0u, exact_div(inverse, scale_value(code)), 0u);
}
fn code_of(x: u32, a: u32, b: u32) -> u32 { return element_bits(${saturated(element, "exact_mul(x, a)")}); }
`;
  if (second === undefined) return { functions };
  const floor = guarded ? f(LEAST_TENSOR_SCALE[rule.variant]) : f(0);
  const chosen =
    perTensorScale === undefined ? `exact_div(larger(negative(lo), hi), ${f(top * greatest)})` : f(perTensorScale);
  return {
    functions,
    outer: {
      per: "tensor",
      dynamic: perTensorScale === undefined,
      prepares: false,
      functions: `${coder(second.codec, "outer")}
fn outer_code_of(lo: u32, hi: u32) -> u32 {
  let scale = ${chosen};
  return outer_code(select(scale, ${floor}, exact_less(scale, ${floor})));
}
`,
    },
  };
}

function nf4({ format, dtype, guarded }: Context, rule: RuleOf<"nf4">): RuleText {
  const table = [...decodeTable(format.element)];
  const rnd = (text: string) => rounded(dtype, text);
  const steps = table.slice(1, -1).map((entry) => `select(0u, 1u, key >= ${u(orderKey(entry))})`);
  return {
    functions: `
fn choose(lo: u32, hi: u32, outer: u32) -> Chosen {
  let largest = larger(negative(lo), hi);
  return Chosen(largest, 0u, ${guarded ? `select(largest, ${f(1)}, largest == 0u)` : "largest"}, 0u);
}
fn code_of(x: u32, a: u32, b: u32) -> u32 {
  let ratio = ${rnd("exact_div(x, a)")};
  let key = exact_key(ratio);
  let entries = array<u32, ${table.length}>(${table.map(f).join(", ")});
  let low = ${steps.join(" + ")};
  let below = ${rnd("exact_sub(ratio, entries[low])")} & 0x7fffffffu;
  let above = ${rnd("exact_sub(ratio, entries[low + 1u])")} & 0x7fffffffu;
  return select(select(low, low + 1u, above < below), 0u, exact_is_nan(ratio));
}
`,
    scalers: { count: rule.scalers, dtype },
  };
}
