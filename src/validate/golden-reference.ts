import { decode, encoder } from "../formats/codec.js";
import { FORMATS } from "../formats/table.js";
import { dequantize, type QuantizedTensor } from "../formats/tensor.js";
import { dequantizeTo } from "../quantize/dequantize.js";
import { quantizeTensor } from "../quantize/quantize.js";
import type { AttentionShape, GoldenBackend } from "./golden-case.js";

/** The TypeScript definition of every number, as a golden backend. */
export const REFERENCE_GOLDEN: GoldenBackend = {
  name: "reference",
  primitives: {
    encode: (codec, values) => Uint32Array.from(values, encoder(codec)),
    decode: (codec, codes) => Float32Array.from(codes, (code) => decode(codec, code)),
    quantize: quantizeTensor,
    dequantize: dequantizeTo,
    linear,
    sdpa,
    store: (tensor) => tensor,
  },
};

function linear(x: Float32Array | QuantizedTensor, weight: QuantizedTensor, bias: Float32Array | null): Float32Array {
  const input = x instanceof Float32Array ? Float64Array.from(x) : dequantize(x);
  const w = dequantize(weight);
  const [n, k] = weight.shape;
  const rows = input.length / k;
  const out = new Float32Array(rows * n);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < n; column++) {
      let sum = bias === null ? 0 : (bias[column] as number);
      for (let i = 0; i < k; i++) sum += (input[row * k + i] as number) * (w[column * k + i] as number);
      out[row * n + column] = sum;
    }
  }
  return out;
}

function sdpa(q: Float32Array, k: Float32Array, v: Float32Array, shape: AttentionShape): Float32Array {
  const { batch, heads, kvHeads, tokens, keys, size, causal } = shape;
  const out = new Float32Array(q.length);
  const scale = 1 / Math.sqrt(size);
  for (let b = 0; b < batch; b++) {
    for (let head = 0; head < heads; head++) {
      const kv = (b * kvHeads + Math.floor((head * kvHeads) / heads)) * keys * size;
      for (let token = 0; token < tokens; token++) {
        const at = ((b * heads + head) * tokens + token) * size;
        const seen = causal ? Math.min(token + 1, keys) : keys;
        const scores = new Float64Array(seen);
        for (let j = 0; j < seen; j++) {
          let dot = 0;
          for (let i = 0; i < size; i++) dot += (q[at + i] as number) * (k[kv + j * size + i] as number);
          scores[j] = dot * scale;
        }
        const top = scores.reduce((a, s) => Math.max(a, s), Number.NEGATIVE_INFINITY);
        const weights = scores.map((score) => Math.exp(score - top));
        const total = weights.reduce((a, w) => a + w, 0);
        for (let i = 0; i < size; i++) {
          let sum = 0;
          for (let j = 0; j < seen; j++) sum += (weights[j] as number) * (v[kv + j * size + i] as number);
          out[at + i] = sum / total;
        }
      }
    }
  }
  return out;
}

/** float32 values as a tensor of the unscaled f32 format, for operands that are not quantized. */
export function denseTensor(values: Float32Array, shape: readonly [n: number, k: number]): QuantizedTensor {
  return quantizeTensor(values, shape, "f32", FORMATS.f32);
}
