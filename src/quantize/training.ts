import { encoder, maxValue } from "../formats/codec.js";
import { CODECS } from "../formats/table.js";

/** What a float8 training cast gives (specification 24). */
export interface Float8TrainingCast {
  /** Multiplicative scales: one, or one per row. */
  readonly scale: Float32Array;
  readonly codes: Uint8Array;
}

/**
 * Casts an operand of a training GEMM to float8 (24): the scale multiplies, and is computed in float64 as max / amax.
 * `gradOutput` uses e5m2, everything else e4m3.
 */
export function castFloat8Training(
  data: Float32Array,
  shape: readonly [rows: number, k: number],
  options: { rowwise?: boolean; powerOfTwo?: boolean; gradOutput?: boolean } = {},
): Float8TrainingCast {
  const codec = options.gradOutput ? CODECS.e5m2 : CODECS.e4m3;
  const top = maxValue(codec);
  const encode = encoder(codec);
  const block = options.rowwise ? shape[1] : data.length;
  const scale = new Float32Array(options.rowwise ? shape[0] : 1);
  const codes = new Uint8Array(data.length);
  for (let b = 0; b < scale.length; b++) {
    const [begin, end] = [b * block, (b + 1) * block];
    let amax = 0;
    for (let i = begin; i < end; i++) amax = Math.max(amax, Math.abs(data[i] as number));
    const exact = Math.fround(top / Math.max(amax, 1e-12));
    const factor = options.powerOfTwo ? 2 ** Math.floor(Math.log2(exact)) : exact;
    scale[b] = factor;
    for (let i = begin; i < end; i++) {
      const value = Math.fround((data[i] as number) * factor);
      codes[i] = encode(Math.min(Math.max(value, -top), top));
    }
  }
  return { scale, codes };
}
