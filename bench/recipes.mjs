// What a recipe makes of a linear.
import { FORMATS, parseQuantizeName } from "./library.mjs";

/**
 * The formats of a linear's weight [n, k] and input, and what the linear declares. `none` is bf16; weight-only recipes take the input in `inputs` (null: float32).
 * Throws with the config's reason for a layer that it refuses.
 */
export function formatsOf(recipe, shape, inputs) {
  const config = parseQuantizeName(recipe);
  if (config === null) return { weight: FORMATS.bf16, activation: inputs, attrs: {} };
  const weight = config.weight({ shape, dtype: "bf16" });
  if ("refused" in weight) throw new Error(weight.refused);
  return { weight, activation: config.activation ?? inputs, attrs: config.fastAccum ? { fastAccum: true } : {} };
}

/** The format by the name of an option: f32 rounds nothing. */
export const inputFormat = (name) => (name === "f32" ? null : FORMATS[name]);

/** Which matrix unit multiplies the operands of a linear at best. */
export function unitOf({ weight, activation }) {
  const bits = (format) => (format?.element.kind === "int" || format?.element.kind === "float" ? format.element : null);
  const [w, x] = [bits(weight), bits(activation)];
  const isInt8 = (codec) => codec?.kind === "int" && codec.bits <= 8;
  const isFloat8 = (codec) => codec?.kind === "float" && codec.exponent + codec.mantissa <= 7;
  // Scales along a row keep the units of 8 bits from summing all of it.
  const perRow = [weight, activation].every((format) => format?.scales.every(({ block }) => block[1] === "all"));
  if (!perRow) return "bf16";
  return isInt8(w) && isInt8(x) ? "int8" : isFloat8(w) && isFloat8(x) ? "float8" : "bf16";
}
