import { FewbitError } from "../core/errors.js";

/** How the next token is chosen from the logits. */
export interface SampleOptions {
  /** 0 takes the largest logit; otherwise logits are divided by it before the softmax. */
  temperature: number;
  /** Only this many of the largest logits take part; 0 means all. */
  topK: number;
  /** Only the smallest set of most probable tokens whose probabilities reach this sum takes part; in (0, 1]. */
  topP: number;
  /** u32: the text's random stream. */
  seed: number;
  /** u32: the number of the drawn token within the stream. */
  step: number;
}

export interface Sampled {
  /** Index into the logits. */
  id: number;
  /** Natural logarithm of the token's probability under the plain softmax of the raw logits. */
  logprob: number;
}

/**
 * The definition of sampling that every backend is held to. In float64:
 *
 * 1. `temperature = 0`: the largest logit, the lowest index among equals. Done.
 * 2. Order tokens by raw logit, largest first, lower index first among equals; keep the first `topK` (0: all).
 * 3. Weight of a token: `exp((logit - largest) / temperature)`.
 * 4. Keep the shortest prefix whose summed weight is at least `topP` times the sum over the kept tokens; never empty.
 * 5. Draw `u = uniform(seed, step)`; the token is the first whose running sum exceeds `u` times the prefix's sum.
 *
 * A logit of -Infinity excludes a token. The result depends only on the arguments: there is no hidden state.
 *
 * @throws FewbitError `argument/invalid` for options outside their ranges, and for logits that are NaN, +Infinity, or all
 *   -Infinity
 */
export function sample(logits: Float32Array, options: SampleOptions): Sampled {
  checkSampleOptions(options);
  const best = argmax(logits);
  const logprob = (id: number) => at(logits, id) - at(logits, best) - Math.log(sumOfExponentials(logits, best));
  if (options.temperature === 0) return { id: best, logprob: logprob(best) };

  const candidates = largest(logits, options.topK === 0 ? logits.length : options.topK);
  const weights = Float64Array.from(candidates, (id) =>
    Math.exp((at(logits, id) - at(logits, best)) / options.temperature),
  );
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const kept = prefixReaching(weights, (sum) => sum >= options.topP * total);
  const target = uniform(options.seed, options.step) * kept.sum;
  const drawn = prefixReaching(weights, (sum) => sum > target);
  const id = candidates[drawn.length - 1] as number;
  return { id, logprob: logprob(id) };
}

/**
 * Checks everything but the logits, so that a bad option fails before any token is computed.
 * @throws FewbitError `argument/invalid`
 */
export function checkSampleOptions({ temperature, topK, topP, seed, step }: SampleOptions): void {
  check("temperature", temperature, Number.isFinite(temperature) && temperature >= 0, "a finite number of at least 0");
  check("topK", topK, Number.isSafeInteger(topK) && topK >= 0, "an integer of at least 0 (0: no limit)");
  check("topP", topP, topP > 0 && topP <= 1, "a number above 0 and at most 1");
  check("seed", seed, isU32(seed), "an integer from 0 to 2^32 - 1");
  check("step", step, isU32(step), "an integer from 0 to 2^32 - 1");
}

/**
 * The uniform number in [0, 1) that belongs to `step` of the stream `seed`: the top 24 bits of
 * `pcgHash(pcgHash(seed) + step)` times 2^-24, exact in float32.
 */
export function uniform(seed: number, step: number): number {
  return (pcgHash((pcgHash(seed) + step) >>> 0) >>> 8) * 2 ** -24;
}

/**
 * One step of PCG-RXS-M-XS-32 used as a hash, u32 to u32, in u32 arithmetic modulo 2^32 only: WGSL gives the same bits.
 * Source: O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms for Random Number
 * Generation" (2014); Jarzynski and Olano, "Hash Functions for GPU Rendering", JCGT 9(3), 2020.
 */
export function pcgHash(input: number): number {
  const state = (Math.imul(input, 747796405) + 2891336453) >>> 0;
  const word = Math.imul((state >>> ((state >>> 28) + 4)) ^ state, 277803737) >>> 0;
  return ((word >>> 22) ^ word) >>> 0;
}

/** The index of the largest logit, the lowest among equals; refuses logits that have no softmax. */
function argmax(logits: Float32Array): number {
  let best = -1;
  let value = Number.NEGATIVE_INFINITY;
  for (let id = 0; id < logits.length; id++) {
    const logit = at(logits, id);
    // Written so that NaN fails too.
    if (!(logit < Number.POSITIVE_INFINITY)) check(`logits[${id}]`, logit, false, "a finite number or -Infinity");
    if (logit > value) {
      best = id;
      value = logit;
    }
  }
  check("logits", `${logits.length} values`, best >= 0, "at least one finite value");
  return best;
}

/** The indices of the `count` largest logits, largest first, lower index first among equals. */
function largest(logits: Float32Array, count: number): Uint32Array {
  const limit = Math.min(count, logits.length);
  // Sorting values is much cheaper than sorting indices with a comparison, so few candidates are found by value first.
  const threshold = at(logits.slice().sort(), logits.length - limit);
  const candidates = new Uint32Array(logits.length);
  let found = 0;
  for (let id = 0; id < logits.length; id++) if (at(logits, id) >= threshold) candidates[found++] = id;
  return candidates
    .subarray(0, found)
    .sort((a, b) => at(logits, b) - at(logits, a) || a - b)
    .subarray(0, limit);
}

/** The shortest prefix whose sum satisfies `reached`, or everything. */
function prefixReaching(weights: Float64Array, reached: (sum: number) => boolean): { length: number; sum: number } {
  let sum = 0;
  let length = 0;
  while (length < weights.length) {
    sum += weights[length++] as number;
    if (reached(sum)) break;
  }
  return { length, sum };
}

function sumOfExponentials(logits: Float32Array, best: number): number {
  const shift = at(logits, best);
  return logits.reduce((sum, logit) => sum + Math.exp(logit - shift), 0);
}

function at(values: Float32Array, index: number): number {
  return values[index] as number;
}

function isU32(value: number): boolean {
  return Number.isInteger(value) && value >= 0 && value <= 0xffffffff;
}

function check(name: string, value: unknown, legal: boolean, expected: string): void {
  if (!legal) throw new FewbitError("argument/invalid", { name, value, expected });
}
