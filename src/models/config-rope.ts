import { type Fields, invalid, type Json, positive, unsupported } from "./config-fields.js";

/**
 * How the frequencies of rotary pairs are stretched for contexts longer than `originalContext`, what the model was trained on
 * before. Formulas: `decoder-rope.ts`.
 */
export type RopeScaling =
  /** Positions are divided by `factor` (kaiokendev 2023). */
  | { readonly kind: "linear"; readonly factor: number }
  /** The base grows with the position from `originalContext` on (NTK-aware; bloc97 and emozilla 2023). */
  | { readonly kind: "dynamic"; readonly factor: number; readonly originalContext: number }
  /**
   * Llama 3.1's: frequencies with wavelengths above originalContext / lowFrequency are divided by `factor`, those below
   * originalContext / highFrequency stay, and what lies between is a mean of the two.
   */
  | {
      readonly kind: "llama3";
      readonly factor: number;
      readonly lowFrequency: number;
      readonly highFrequency: number;
      readonly originalContext: number;
    }
  /** As llama3 with a ramp over pairs, and cosines and sines times `magnitude` (Peng et al., YaRN, 2023). */
  | {
      readonly kind: "yarn";
      readonly factor: number;
      readonly originalContext: number;
      readonly betaFast: number;
      readonly betaSlow: number;
      /** The ramp starts and ends at whole pairs. */
      readonly truncate: boolean;
      readonly magnitude: number;
    }
  /** Each pair has a divisor of its own, other ones beyond `originalContext`; cosines and sines times `magnitude` (LongRoPE, 2024). */
  | {
      readonly kind: "longrope";
      readonly short: readonly number[];
      readonly long: readonly number[];
      readonly originalContext: number;
      readonly magnitude: number;
    };

/** One rotary embedding. `scaling` is null for plain frequencies `theta^(-2i/rotary)`. */
export interface RopeConfig {
  readonly theta: number;
  /** The first elements of a head that are rotated, an even number; those behind them stay. */
  readonly rotary: number;
  readonly scaling: RopeScaling | null;
}

/** What an architecture says of its rotary embedding. */
export interface RopeRules {
  /** Its theta when config.json leaves it out. */
  readonly theta: number;
  /** Names of scalings that mean another one here. */
  readonly renamed?: Readonly<Record<string, RopeScaling["kind"]>>;
  /** The original context when config.json leaves it out; null: max_position_embeddings. */
  readonly originalContext?: number;
  /** Layers with a window have a rotary embedding of their own, with this theta unless `rope_local_base_freq` says another. */
  readonly localTheta?: number;
}

const KINDS = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"] as const;

/** What the rope fields of a config.json are read with. */
interface Context {
  readonly headDim: number;
  readonly contextLength: number;
  readonly rules: RopeRules;
}

/**
 * The rotary embedding of most layers, and then that of layers with a window where it differs. transformers 5 writes
 * `rope_parameters` (by layer type where there are several), earlier versions `rope_theta` and `rope_scaling`.
 */
export function ropesOf(fields: Fields, context: Context): RopeConfig[] {
  const { rules } = context;
  const modern = object(fields, "rope_parameters");
  const field = modern === null ? "rope_scaling" : "rope_parameters";
  const parameters = modern ?? object(fields, "rope_scaling");
  const theta = fields.raw("rope_theta") ?? rules.theta;
  if (rules.localTheta === undefined) return [ropeOf(fields, context, field, parameters, theta)];
  const localTheta = fields.raw("rope_local_base_freq") ?? rules.localTheta;
  const nested = modern !== null && ("full_attention" in modern || "sliding_attention" in modern);
  const part = (name: string): Json | null => (nested ? ((modern[name] ?? null) as Json | null) : null);
  return [
    ropeOf(fields, context, field, nested ? part("full_attention") : parameters, theta),
    ropeOf(fields, context, "rope_parameters", part("sliding_attention"), localTheta),
  ];
}

function object(fields: Fields, field: string): Json | null {
  const value = fields.raw(field) ?? null;
  if (value !== null && (typeof value !== "object" || Array.isArray(value)))
    throw invalid(field, value, "an object or null");
  return value as Json | null;
}

function ropeOf(
  fields: Fields,
  { headDim, contextLength, rules }: Context,
  field: string,
  given: Json | null,
  defaultTheta: unknown,
): RopeConfig {
  const parameters = given ?? {};
  // A legacy rope_scaling object always scales; a rope_parameters object says "default" when it does not.
  const named = parameters.rope_type ?? parameters.type ?? (given && field === "rope_scaling" ? "unnamed" : "default");
  const kind = rules.renamed?.[String(named)] ?? String(named);
  if (!KINDS.includes(kind as (typeof KINDS)[number])) throw unsupported(`${field} type`, kind, KINDS);
  const theta = positive("rope_theta", parameters.rope_theta ?? defaultTheta);
  const share = parameters.partial_rotary_factor ?? fields.raw("partial_rotary_factor") ?? 1;
  if (typeof share !== "number" || !(share > 0 && share <= 1))
    throw invalid("partial_rotary_factor", share, "a number above 0 and at most 1");
  const rotary = Math.trunc(headDim * share);
  if (rotary < 2 || rotary % 2 !== 0)
    throw invalid("partial_rotary_factor", share, `an even number of the ${headDim} elements of a head`);
  const number = (name: string, absent?: number) => positive(`${field}.${name}`, parameters[name] ?? absent);
  const original = () => {
    const value =
      fields.raw("original_max_position_embeddings") ??
      parameters.original_max_position_embeddings ??
      rules.originalContext;
    return positive("original_max_position_embeddings", value ?? contextLength);
  };
  return { theta, rotary, scaling: scalingOf(kind, parameters, { field, contextLength, rotary, number, original }) };
}

interface ScalingFields {
  readonly field: string;
  readonly contextLength: number;
  readonly rotary: number;
  number(name: string, absent?: number): number;
  original(): number;
}

function scalingOf(kind: string, parameters: Json, fields: ScalingFields): RopeScaling | null {
  const { field, contextLength, rotary, number, original } = fields;
  const factor = () => number("factor");
  switch (kind) {
    case "linear":
      return { kind, factor: factor() };
    case "dynamic":
      return { kind, factor: factor(), originalContext: contextLength };
    case "llama3":
      return {
        kind,
        factor: factor(),
        lowFrequency: number("low_freq_factor"),
        highFrequency: number("high_freq_factor"),
        // Without it the scaling would do nothing sensible: there is no default worth having.
        originalContext: number("original_max_position_embeddings"),
      };
    case "yarn": {
      const originalContext = original();
      const stretch = number("factor", contextLength / originalContext);
      const grown = (scale: number) => (stretch <= 1 ? 1 : 0.1 * scale * Math.log(stretch) + 1);
      const { mscale, mscale_all_dim: all } = parameters;
      const inferred = mscale && all ? grown(number("mscale")) / grown(number("mscale_all_dim")) : grown(1);
      return {
        kind,
        factor: stretch,
        originalContext,
        betaFast: number("beta_fast", 32),
        betaSlow: number("beta_slow", 1),
        truncate: parameters.truncate !== false,
        magnitude: number("attention_factor", inferred),
      };
    }
    case "longrope": {
      const originalContext = original();
      const stretch = number("factor", contextLength / originalContext);
      const inferred = stretch <= 1 ? 1 : Math.sqrt(1 + Math.log(stretch) / Math.log(originalContext));
      const divisors = (name: string): readonly number[] => {
        const list = parameters[name];
        const legal = Array.isArray(list) && list.length === rotary / 2;
        if (!legal) throw invalid(`${field}.${name}`, list, `a list of ${rotary / 2} numbers`);
        return list.map((value) => positive(`${field}.${name}`, value));
      };
      return {
        kind,
        short: divisors("short_factor"),
        long: divisors("long_factor"),
        originalContext,
        magnitude: number("attention_factor", inferred),
      };
    }
    default:
      return null;
  }
}

/** Positions that a scaled model was made for, where config.json tells those before scaling only. */
export function scaledContext(contextLength: number, { scaling }: RopeConfig): number {
  if (scaling?.kind === "dynamic") return Math.floor(contextLength * scaling.factor);
  if (scaling?.kind === "yarn") return Math.max(contextLength, Math.floor(scaling.originalContext * scaling.factor));
  return contextLength;
}
