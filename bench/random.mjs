// Random operands, written in their stored form: nothing is quantized, so that gigabytes take no time.
import { codecBits, encode, maxValue, midCode, tensorWords } from "./library.mjs";

let state = 1;
const next = () => {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return state >>> 0;
};

/** Numbers of mean zero and variance one, of a normal distribution as nearly as four uniform ones give. */
const normal = () => ((next() + next() + next() + next()) / 2 ** 32 - 2) * Math.sqrt(3);

/** Fills an array with what `make` gives, which repeats after a prime number of items, so that neighbouring rows differ. */
function fill(items, make) {
  const period = Math.min(items.length, 65521);
  for (let i = 0; i < period; i++) items[i] = make();
  for (let done = period; done > 0 && done < items.length; done *= 2)
    items.copyWithin(done, 0, Math.min(done, items.length - done));
  return items;
}

/** A code in every lane of a word. */
function everywhere(code, bits) {
  let word = 0;
  for (let at = 0; at < 32; at += bits) word |= code << at;
  return word >>> 0;
}

/** The standard deviation of codes: of floats that a scale brings into range a quarter of the largest, of wide ones 1 / sqrt(k). */
function deviation(codec, k) {
  if (codec.kind === "int") return 2 ** (codec.bits - 2);
  if (codec.kind !== "float") return 1;
  return codec.exponent + codec.mantissa < 8 ? maxValue(codec) / 4 : 1 / Math.sqrt(k);
}

/** A word of random codes: floats as normal numbers have them, since what a product takes depends on its bits; all others alike. */
function wordOf(codec, size) {
  const bits = codecBits(codec);
  if (codec.kind === "exponent") return () => everywhere(codec.bias, bits);
  if (codec.kind !== "float" || 32 % bits !== 0) return next;
  return () => {
    let word = 0;
    for (let at = 0; at < 32; at += bits) word |= encode(codec, normal() * size) << at;
    return word >>> 0;
  };
}

const flat = (words, codec, value) => new Uint32Array(words).fill(everywhere(encode(codec, value), codecBits(codec)));

/** A stored tensor of random codes; numbers are about 1 / sqrt(k). */
export function randomTensor(format, shape) {
  const words = tensorWords(format, shape);
  const { element, scales, zero } = format;
  const bits = codecBits(element);
  const size = deviation(element, shape[1]);
  const last = scales.length - 1;
  return {
    format,
    shape,
    qdata: fill(new Uint32Array(words.qdata), wordOf(element, size)),
    scales: scales.map(({ codec }, i) => flat(words.scales[i], codec, i < last ? 1 : 1 / (size * Math.sqrt(shape[1])))),
    ...(words.zero > 0
      ? { zero: flat(words.zero, zero.codec, zero.domain === "int" ? 2 ** (bits - 1) - midCode(element) : 0) }
      : {}),
    ...(element.kind === "lut" && element.entries === "learned"
      ? {
          table: Float32Array.from(
            { length: 2 ** bits * element.vector[0] * element.vector[1] },
            () => next() / 2 ** 31 - 1,
          ),
        }
      : {}),
  };
}

/** Dense float32 numbers of mean zero and variance one. */
export function randomDense(shape) {
  const count = shape.reduce((a, b) => a * b, 1);
  return { dtype: "f32", shape, data: fill(new Float32Array(count), normal) };
}
