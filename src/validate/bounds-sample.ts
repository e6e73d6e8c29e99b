import { uniform, unpackSettings } from "../ir/sample.js";
import type { DenseTensor } from "../ir/tensor.js";

const U = 2 ** -24;

/** Tokens that a correct backend may draw. */
export interface Drawn {
  readonly kind: "drawn";
  /** More than one only where a float32 sum may fall on either side of the uniform or of top-p's mass. */
  readonly admissible: ReadonlySet<number>;
  /** The exact log-probability of every token, and its bound. */
  readonly logprobs: Float64Array;
  readonly error: number;
  /** For the op's second output: the token ids, whose first entry is the drawn token. */
  readonly ids?: DenseTensor;
}

/**
 * What `sample` may give. A token's weight exp((logit - top) / temperature) is off by exp's 3 + 2 |x| ulp and by the roundings of x
 * (a subtraction and a division of 2.5 ulp, times |x|); sums of V of them by 2 sqrt(V) U more. A token may be drawn when the
 * target lies within that of its interval of the cumulative sum. Greedy draws and top-k compare logits and have one answer.
 */
export function drawnOf(logits: Float64Array, packed: Uint32Array): Drawn {
  const settings = unpackSettings(packed);
  const { temperature, topK, topP } = settings;
  let best = 0;
  for (let i = 1; i < logits.length; i++) if ((logits[i] as number) > (logits[best] as number)) best = i;
  const top = logits[best] as number;
  const sums = 2 * Math.sqrt(logits.length) * U;
  let [mass, slack] = [0, 0];
  for (const logit of logits) {
    const weight = Math.exp(logit - top);
    mass += weight;
    slack += weight * ((3 + 2 * (top - logit)) * 2 * U + U * (top - logit));
  }
  const logMass = Math.log(mass);
  const logprobs = logits.map((logit) => logit - top - logMass);
  // log is within 3 ulp, or 2^-21 near 1; then two subtractions.
  const range = top - logits.reduce((least, logit) => Math.min(least, logit), top);
  const error = slack / mass + sums + Math.max(2 ** -21, 6 * U * logMass) + 2 * U * (range + logMass);
  if (temperature === 0) return { kind: "drawn", admissible: new Set([best]), logprobs, error };

  const x = logits.map((logit) => (logit - top) / temperature);
  const weights = x.map((value) => Math.exp(value));
  const order = Uint32Array.from(weights, (_, i) => i).sort((a, b) => (logits[b] as number) - (logits[a] as number));
  const least =
    topK > 0 && topK < order.length ? (logits[order[topK - 1] as number] as number) : Number.NEGATIVE_INFINITY;
  let [kept, off] = [0, 0];
  for (const i of order) {
    if ((logits[i] as number) < least) break;
    kept += weights[i] as number;
    off += (weights[i] as number) * ((3 + 2 * -(x[i] as number)) * 2 * U + 6 * U * -(x[i] as number));
  }
  const relative = off / kept + sums;
  const thresholds = new Set(
    topP < 1
      ? [1 - 2 * relative, 1, 1 + 2 * relative].map((part) =>
          nucleus(logits, weights, order, least, topP * part * kept),
        )
      : [least],
  );
  const admissible = new Set<number>();
  for (const threshold of thresholds) {
    let total = 0;
    for (let i = 0; i < weights.length; i++) if ((logits[i] as number) >= threshold) total += weights[i] as number;
    const target = uniform(settings.seed, settings.step) * total;
    let sum = 0;
    for (let i = 0; i < weights.length; i++) {
      if ((logits[i] as number) < threshold) continue;
      const before = sum;
      sum += weights[i] as number;
      if (before <= target + 2 * relative * total && target <= sum + 2 * relative * total) admissible.add(i);
    }
  }
  return { kind: "drawn", admissible, logprobs, error };
}

/** The smallest logit that is kept: strictly likelier tokens hold less than `wanted`. */
function nucleus(
  logits: Float64Array,
  weights: Float64Array,
  order: Uint32Array,
  least: number,
  wanted: number,
): number {
  let threshold = logits[order[0] as number] as number;
  let [above, here] = [0, 0];
  for (const i of order) {
    const logit = logits[i] as number;
    if (logit < least) break;
    if (logit < threshold) {
      above += here;
      if (above >= wanted) break;
      [threshold, here] = [logit, 0];
    }
    here += weights[i] as number;
  }
  return threshold;
}
