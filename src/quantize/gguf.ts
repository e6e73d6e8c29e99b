import { FewbitError } from "../core/errors.js";
import { ROUND } from "./affine.js";

const BLOCK = 32;
const BLOCKS = 8;

/**
 * torchao's GGUF prototype (specification 16): super-blocks of 256, each 8 blocks of 32, Q4_K-like. Not a GGUF file's
 * bytes.
 */
export interface GgufQ4K {
  /** [n, k / 256]. */
  readonly superScale: Float32Array;
  readonly superMin: Float32Array;
  /** 6-bit parameters [n, k / 256, 8]. */
  readonly blockScale: Float32Array;
  readonly blockMin: Float32Array;
  /** 4-bit codes [n, k]. */
  readonly codes: Float32Array;
  /** What they mean [n, k]: code * (superScale * blockScale) + superMin * blockMin. */
  readonly values: Float32Array;
}

/**
 * Quantizes [n, k], k a multiple of 256, in float32. The literal rule (`torchao`) never rounds parameters and codes and
 * clamps negative minima to 0; `guarded` does what is meant: it rounds them, and keeps signed 6-bit minima (28.13).
 */
export function quantizeGgufQ4K(
  data: Float32Array,
  shape: readonly [n: number, k: number],
  options: { numerics?: "guarded" | "torchao" } = {},
): GgufQ4K {
  const size = BLOCK * BLOCKS;
  if (shape[1] % size !== 0) {
    const nearest = Math.max(1, Math.round(shape[1] / size)) * size;
    throw new FewbitError("format/block", { format: "GGUF Q4_K", size: shape[1], block: size, axis: "K", nearest });
  }
  const literal = options.numerics === "torchao";
  const supers = data.length / size;
  const out = {
    superScale: new Float32Array(supers),
    superMin: new Float32Array(supers),
    blockScale: new Float32Array(supers * BLOCKS),
    blockMin: new Float32Array(supers * BLOCKS),
    codes: new Float32Array(data.length),
    values: new Float32Array(data.length),
  };
  const clamp = (value: number, least: number, most: number) => {
    const kept = literal ? value : value + ROUND - ROUND;
    return Math.min(Math.max(kept, least), most);
  };
  for (let s = 0; s < supers; s++) {
    const scales = new Float32Array(BLOCKS);
    const minima = new Float32Array(BLOCKS);
    for (let b = 0; b < BLOCKS; b++) {
      const block = data.subarray(s * size + b * BLOCK, s * size + (b + 1) * BLOCK);
      const least = block.reduce((a, v) => Math.min(a, v), Number.POSITIVE_INFINITY);
      const most = block.reduce((a, v) => Math.max(a, v), Number.NEGATIVE_INFINITY);
      scales[b] = Math.fround(most - least) / 15;
      minima[b] = least;
    }
    const largest = (values: Float32Array) => values.reduce((a, v) => Math.max(a, Math.abs(v)), 0);
    const superScale = Math.fround(largest(scales) / 63);
    const superMin = Math.fround(largest(minima) / 63);
    out.superScale[s] = superScale;
    out.superMin[s] = superMin;
    for (let b = 0; b < BLOCKS; b++) {
      const ratio = (value: number, by: number) => (by === 0 && !literal ? 0 : Math.fround(value / by));
      const blockScale = clamp(ratio(scales[b] as number, superScale), 0, 63);
      const blockMin = clamp(ratio(minima[b] as number, superMin), literal ? 0 : -63, 63);
      out.blockScale[s * BLOCKS + b] = blockScale;
      out.blockMin[s * BLOCKS + b] = blockMin;
      const scale = Math.fround(superScale * Math.fround(blockScale));
      const least = Math.fround(superMin * Math.fround(blockMin));
      for (let i = s * size + b * BLOCK; i < s * size + (b + 1) * BLOCK; i++) {
        const steps = scale === 0 && !literal ? 0 : Math.fround(Math.fround((data[i] as number) - least) / scale);
        const code = literal ? steps : clamp(steps, 0, 15);
        out.codes[i] = code;
        out.values[i] = Math.fround(Math.fround(code * scale) + least);
      }
    }
  }
  return out;
}
