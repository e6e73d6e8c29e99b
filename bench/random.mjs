// Random operands, written in their stored form: nothing is quantized, so that gigabytes take no time.
import { codecBits, encode, midCode, tensorWords } from "./library.mjs";

let state = 1;
const next = () => {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return state >>> 0;
};

/** Fills words with random ones that repeat after a prime number of them, so that neighbouring rows differ. */
function fill(words, change) {
  const period = Math.min(words.length, 65521);
  for (let i = 0; i < period; i++) words[i] = change(next());
  for (let done = period; done > 0 && done < words.length; done *= 2)
    words.copyWithin(done, 0, Math.min(done, words.length - done));
  return words;
}

/** A code in every lane of a word. */
function everywhere(code, bits) {
  let word = 0;
  for (let at = 0; at < 32; at += bits) word |= code << at;
  return word >>> 0;
}

/** What keeps random codes of a codec finite and of one size: [bits to keep, bits to set]. */
function limits(codec) {
  const bits = codecBits(codec);
  if (codec.kind === "exponent") return [0, everywhere(codec.bias, bits)];
  if (codec.kind !== "float") return [0xffffffff, 0];
  const { exponent, mantissa, bias } = codec;
  const field = (2 ** exponent - 1) * 2 ** mantissa;
  // Wide exponents would be mostly tiny numbers: all are in [0.5, 1). Small floats keep theirs below 2.
  if (exponent >= 5) return [~everywhere(field, bits) >>> 0, everywhere((bias - 1) * 2 ** mantissa, bits)];
  return 32 % bits === 0 ? [~everywhere(2 ** (exponent + mantissa - 1), bits) >>> 0, 0] : [0xffffffff, 0];
}

const flat = (words, codec, value) => new Uint32Array(words).fill(everywhere(encode(codec, value), codecBits(codec)));

/** A stored tensor of random codes; values are about 1 / sqrt(k). */
export function randomTensor(format, shape) {
  const words = tensorWords(format, shape);
  const { element, scales, zero } = format;
  const [keep, set] = limits(element);
  const bits = codecBits(element);
  const size = element.kind === "int" ? 2 ** (bits - 2) : 1;
  const last = scales.length - 1;
  return {
    format,
    shape,
    qdata: fill(new Uint32Array(words.qdata), (word) => ((word & keep) | set) >>> 0),
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
  const data = new Float32Array(count);
  const period = Math.min(count, 65521);
  for (let i = 0; i < period; i++) data[i] = ((next() + next() + next()) / 2 ** 32 - 1.5) * 2;
  for (let done = period; done > 0 && done < count; done *= 2) data.copyWithin(done, 0, Math.min(done, count - done));
  return { dtype: "f32", shape, data };
}
