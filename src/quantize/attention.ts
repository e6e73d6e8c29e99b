import { roundTo } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { decodeTable, encoder, maxValue } from "../formats/codec.js";
import { CODECS } from "../formats/table.js";

/** Attention operands are [batch, heads, tokens, size], row-major. */
export interface AttentionDims {
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly tokens: number;
  readonly keys: number;
  readonly size: number;
}
/** Which operands are rotated by a Hadamard transform before they are quantized (specification 20.2). */
export type Hadamard = "NONE" | "QKV" | "V_ONLY";

/** An e4m3 operand with one descale per (batch, key/value head). */
export interface Float8Operand {
  readonly codes: Uint8Array;
  readonly descale: Float32Array;
}

/**
 * x H / sqrt(size) along the last axis, in float32: butterflies of stride 1, 2, 4, ..., then one multiplication (20.2).
 * `size` is a power of two up to 256. It is its own inverse.
 */
export function hadamard(data: Float32Array, size: number): Float32Array {
  if (size > 256 || size < 1 || (size & (size - 1)) !== 0) {
    throw new FewbitError("argument/invalid", { name: "size", value: size, expected: "a power of two up to 256" });
  }
  const out = data.slice();
  for (let stride = 1; stride < size; stride *= 2) {
    for (let i = 0; i < out.length; i++) {
      if ((i & stride) !== 0) continue;
      const [a, b] = [out[i] as number, out[i + stride] as number];
      out[i] = a + b;
      out[i + stride] = a - b;
    }
  }
  const factor = Math.fround(1 / Math.sqrt(size));
  return out.map((value) => value * factor);
}

/**
 * One operand of float8 attention (20.2): `groups` equal runs of `data`, a scale 448 / amax each, that multiplies. amax
 * is taken of the rotated values before they are rounded to `dtype`.
 */
export function quantizeFloat8Operand(
  data: Float32Array,
  groups: number,
  options: { size: number; rotate: boolean; dtype: "bf16" | "f16" },
): Float8Operand {
  const exact = options.rotate ? hadamard(data, options.size) : data;
  const top = maxValue(CODECS.e4m3);
  const encode = encoder(CODECS.e4m3);
  const width = data.length / groups;
  const codes = new Uint8Array(data.length);
  const descale = new Float32Array(groups);
  for (let group = 0; group < groups; group++) {
    let amax = 0;
    for (let i = group * width; i < (group + 1) * width; i++) amax = Math.max(amax, Math.abs(exact[i] as number));
    const silent = amax <= 1e-12;
    const scale = silent ? 1 : Math.fround(top / amax);
    descale[group] = silent ? 1 : Math.fround(amax / top);
    for (let i = group * width; i < (group + 1) * width; i++) {
      codes[i] = encode(Math.fround(roundTo(options.dtype, exact[i] as number) * scale));
    }
  }
  return { codes, descale };
}

/** The values of an operand. */
export function float8Values({ codes, descale }: Float8Operand): Float32Array {
  const table = decodeTable(CODECS.e4m3);
  const width = codes.length / descale.length;
  return Float32Array.from(codes, (code, i) => (table[code] as number) * (descale[Math.floor(i / width)] as number));
}

/**
 * Attention over float8 operands (20.2): P = exp(S - max) is rounded to e4m3 after multiplication by 2^8 before it
 * meets V; row sums use the unrounded P. [batch, heads, tokens, size] in float32.
 */
export function float8Attention(
  q: Float8Operand,
  k: Float8Operand,
  v: Float8Operand,
  dims: AttentionDims & { causal: boolean },
): Float32Array {
  const { batch, heads, kvHeads, tokens, keys, size, causal } = dims;
  const [qs, ks, vs] = [float8Values(q), float8Values(k), float8Values(v)];
  const encode = encoder(CODECS.e4m3);
  const table = decodeTable(CODECS.e4m3);
  const out = new Float32Array(qs.length);
  const scale = 1 / Math.sqrt(size);
  for (let head = 0; head < batch * heads; head++) {
    const kv = (Math.floor(head / heads) * kvHeads + Math.floor(((head % heads) * kvHeads) / heads)) * keys * size;
    for (let token = 0; token < tokens; token++) {
      const at = (head * tokens + token) * size;
      const seen = causal ? Math.min(token + 1, keys) : keys;
      const scores = new Float64Array(seen);
      for (let j = 0; j < seen; j++) {
        for (let i = 0; i < size; i++) {
          scores[j] = (scores[j] as number) + (qs[at + i] as number) * (ks[kv + j * size + i] as number) * scale;
        }
      }
      const top = scores.reduce((a, s) => Math.max(a, s), Number.NEGATIVE_INFINITY);
      const weights = scores.map((score) => Math.exp(score - top));
      const total = weights.reduce((a, w) => a + w, 0);
      for (let i = 0; i < size; i++) {
        let sum = 0;
        for (let j = 0; j < seen; j++) {
          const weight = (table[encode(Math.fround((weights[j] as number) * 256))] as number) / 256;
          sum += weight * (vs[kv + j * size + i] as number);
        }
        out[at + i] = sum / total;
      }
    }
  }
  return out;
}
