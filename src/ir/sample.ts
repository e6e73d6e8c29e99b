import { f32FromBits } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";

/** The settings of one draw, as the u32 [5] operand of the `sample` op holds them. */
export interface SampleSettings {
  /** 0 takes the most likely token (the lowest id on ties). */
  readonly temperature: number;
  /** Keep tokens at least as likely as the k-th; 0 keeps all. */
  readonly topK: number;
  /** Keep tokens while the mass of the strictly likelier ones is below topP of the total (nucleus sampling; Holtzman 2020). */
  readonly topP: number;
  readonly seed: number;
  /** Counts the draws of one generation: equal (seed, step) draw equal uniforms. */
  readonly step: number;
}

/** A uniform in [0, 1): the top 24 bits of pcg(pcg(seed) + step), exact in float32. */
export function uniform(seed: number, step: number): number {
  return (pcg((pcg(seed >>> 0) + step) >>> 0) >>> 8) * 2 ** -24;
}

/**
 * One step of PCG-RXS-M-XS-32 as a hash, in u32 arithmetic alone, so that shaders give the same bits (O'Neill 2014; Jarzynski
 * and Olano, JCGT 9(3), 2020).
 */
export function pcg(value: number): number {
  const state = (Math.imul(value, 747796405) + 2891336453) >>> 0;
  const word = Math.imul((state >>> ((state >>> 28) + 4)) ^ state, 277803737) >>> 0;
  return ((word >>> 22) ^ word) >>> 0;
}

/**
 * Draws a token: logits / temperature, top-k, then top-p of what is left, then the inverse of the cumulative distribution in
 * order of token id. The log-probability is that of the whole untempered softmax. The device kernels follow the same steps in
 * float32, so a draw can differ only where a float32 sum crosses the uniform.
 */
export function sampleToken(logits: ArrayLike<number>, settings: SampleSettings): { id: number; logprob: number } {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if ((logits[i] as number) > (logits[best] as number)) best = i;
  const id = settings.temperature === 0 ? best : drawToken(logits, settings, logits[best] as number);
  return { id, logprob: logProbability(logits, id) };
}

/** The natural logarithm of a token's share of the softmax. */
export function logProbability(logits: ArrayLike<number>, id: number): number {
  let top = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < logits.length; i++) top = Math.max(top, logits[i] as number);
  let mass = 0;
  for (let i = 0; i < logits.length; i++) mass += Math.exp((logits[i] as number) - top);
  return (logits[id] as number) - top - Math.log(mass);
}

function drawToken(logits: ArrayLike<number>, settings: SampleSettings, top: number): number {
  const weight = Float64Array.from(logits, (logit) =>
    Math.exp(Math.fround(Math.fround(logit - top) / settings.temperature)),
  );
  const order = Uint32Array.from(weight, (_, i) => i).sort((a, b) => (weight[b] as number) - (weight[a] as number));
  let least = 0;
  if (settings.topK > 0 && settings.topK < order.length) least = weight[order[settings.topK - 1] as number] as number;
  if (settings.topP < 1) least = Math.max(least, nucleusThreshold(weight, order, least, settings.topP));
  let kept = 0;
  for (const value of weight) if (value >= least) kept += value;
  const target = uniform(settings.seed, settings.step) * kept;
  let sum = 0;
  let last = 0;
  for (let i = 0; i < weight.length; i++) {
    if ((weight[i] as number) < least) continue;
    last = i;
    sum += weight[i] as number;
    if (sum > target) break;
  }
  return last;
}

/** The smallest weight whose strictly larger ones (among those at least `least`) hold less than `topP` of the mass. */
function nucleusThreshold(weight: Float64Array, order: Uint32Array, least: number, topP: number): number {
  let total = 0;
  for (const value of weight) if (value >= least) total += value;
  let above = 0;
  let threshold = weight[order[0] as number] as number;
  let atThreshold = 0;
  for (const i of order) {
    const value = weight[i] as number;
    if (value < least) break;
    if (value < threshold) {
      above += atThreshold;
      if (above >= topP * total) break;
      threshold = value;
      atThreshold = 0;
    }
    atThreshold += value;
  }
  return threshold;
}

/** Throws `argument/invalid` for settings outside their ranges, before any token is computed. */
export function checkSettings({ temperature, topK, topP, seed, step }: SampleSettings): void {
  check("temperature", temperature, Number.isFinite(temperature) && temperature >= 0, "a finite number of at least 0");
  check("topK", topK, isU32(topK), "an integer of at least 0 (0: no limit)");
  check("topP", topP, topP > 0 && topP <= 1, "a number above 0 and at most 1");
  check("seed", seed, isU32(seed), "an integer from 0 to 2^32 - 1");
  check("step", step, isU32(step), "an integer from 0 to 2^32 - 1");
}

const isU32 = (value: number): boolean => Number.isInteger(value) && value >= 0 && value <= 0xffffffff;

function check(name: string, value: unknown, legal: boolean, expected: string): void {
  if (!legal) throw new FewbitError("argument/invalid", { name, value, expected });
}

/** Packs settings for the `sample` op. */
export function packSettings(settings: SampleSettings): Uint32Array {
  const words = new Uint32Array(5);
  const floats = new Float32Array(words.buffer);
  floats[0] = settings.temperature;
  words[1] = settings.topK;
  floats[2] = settings.topP;
  words[3] = settings.seed;
  words[4] = settings.step;
  return words;
}

export function unpackSettings(words: Uint32Array): SampleSettings {
  return {
    temperature: f32FromBits(words[0] as number),
    topK: words[1] as number,
    topP: f32FromBits(words[2] as number),
    seed: words[3] as number,
    step: words[4] as number,
  };
}

/** What is done to logits before a token is drawn from them. */
export interface LogitSettings {
  /**
   * Logits of tokens that the text holds already are divided by it where positive and multiplied where negative (Keskar et al.,
   * CTRL, 2019). 1 changes nothing.
   */
  readonly repetitionPenalty: number;
  /** Tokens less likely than this share of the likeliest one's probability, after the temperature, are left out. 0 keeps all. */
  readonly minP: number;
}

/** Whether the settings leave logits as they are. */
export const leavesLogits = ({ repetitionPenalty, minP }: LogitSettings): boolean =>
  repetitionPenalty === 1 && minP === 0;

/** Throws `argument/invalid` for settings outside their ranges. */
export function checkLogitSettings({ repetitionPenalty, minP }: LogitSettings): void {
  const penalty = Number.isFinite(repetitionPenalty) && repetitionPenalty > 0;
  check("repetitionPenalty", repetitionPenalty, penalty, "a number above 0 (1: none)");
  check("minP", minP, minP >= 0 && minP <= 1, "a number from 0 to 1");
}

/**
 * Logits f32 [V] as `sampleToken` is to see them: first the penalty for the ids in `seen`, then minus infinity for those that min-p
 * leaves out (never the likeliest). Operations are rounded to float32 one by one.
 */
export function adjustLogits(
  logits: Float32Array,
  seen: Iterable<number>,
  { repetitionPenalty, minP }: LogitSettings,
  temperature: number,
): Float32Array {
  const adjusted = logits.slice();
  for (const id of new Set(seen)) {
    const logit = adjusted[id] as number;
    adjusted[id] = logit > 0 ? logit / repetitionPenalty : logit * repetitionPenalty;
  }
  if (minP === 0) return adjusted;
  let top = Number.NEGATIVE_INFINITY;
  for (const logit of adjusted) top = Math.max(top, logit);
  // exp((logit - top) / temperature) < minP, without the exponential.
  const least = Math.fround(Math.log(minP) * temperature);
  return adjusted.map((logit) => (Math.fround(logit - top) < least ? Number.NEGATIVE_INFINITY : logit));
}
