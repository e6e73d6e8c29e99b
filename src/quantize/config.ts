import type { FloatType } from "../core/dtype.js";
import { FewbitError, nearestNames } from "../core/errors.js";
import { type Codec, extentOf, type Format } from "../formats/format.js";
import { CODECS } from "../formats/table.js";

/** What a config must know of a linear layer: its weight's shape [n, k] and dtype. */
export interface LayerWeight {
  readonly shape: readonly [n: number, k: number];
  readonly dtype: FloatType;
}
/** Why a config cannot take a layer, naming the nearest legal value. */
export interface Refusal {
  readonly refused: string;
}

/**
 * What happens to the weight and the activation of a linear: one of torchao's configs with its arguments, as plain
 * data.
 */
export interface QuantizeConfig {
  /** torchao's class name. */
  readonly name: string;
  /** torchao's arguments in camelCase, defaults filled in. */
  readonly args: Readonly<Record<string, unknown>>;
  /** The format of a layer's weight, or the reason why there is none. */
  readonly weight: (layer: LayerWeight) => Format | Refusal;
  /** The format that a float32 activation [tokens, k] is quantized to on every call; null for weight-only configs. */
  readonly activation: Format | null;
  /** How both are quantized: see `QuantizeOptions.numerics`. */
  readonly numerics: "guarded" | "torchao";
  /** Whether the linears declare `fastAccum`. */
  readonly fastAccum?: boolean;
}

/** Every config takes this beside torchao's arguments. */
export interface CommonArgs {
  readonly numerics?: "guarded" | "torchao";
}

/** A config as data. */
export const make = (
  name: string,
  { numerics = "guarded", ...args }: CommonArgs & Record<string, unknown>,
  weight: QuantizeConfig["weight"],
  activation: Format | null = null,
): QuantizeConfig => ({ name, args, weight, activation, numerics });

/** The codec of scales that torchao stores in the weight's dtype. */
export function codecOf(dtype: FloatType): Codec {
  return CODECS[dtype];
}

/** A weight rule: the first reason that is not null refuses the layer, otherwise the format is made. */
export function weightRule(
  reasons: readonly ((layer: LayerWeight) => string | null)[],
  format: (layer: LayerWeight) => Format,
): QuantizeConfig["weight"] {
  return (layer) => {
    for (const reason of reasons) {
      const refused = reason(layer);
      if (refused !== null) return { refused };
    }
    const made = format(layer);
    // Whatever torchao thinks of a layer, fewbit's blocks must divide K.
    for (const level of made.scales) {
      const refused = notMultiple("K", layer.shape[1], extentOf(level.block[1], layer.shape[1]));
      if (refused !== null) return { refused };
    }
    return made;
  };
}

/** Null when `value` is a multiple of `step`, else the reason with the nearest multiple. */
export function notMultiple(name: string, value: number, step: number): string | null {
  if (step < 1 || value % step === 0) return null;
  return `${name} = ${value} is not a multiple of ${step} (nearest legal ${name}: ${Math.max(1, Math.round(value / step)) * step})`;
}

/** Refuses dimensions that are not multiples. */
export const multiples =
  (n: number, k: number) =>
  ({ shape }: LayerWeight): string | null =>
    notMultiple("N", shape[0], n) ?? notMultiple("K", shape[1], k);

/** Refuses weights of other dtypes. */
export const dtypes =
  (...legal: readonly FloatType[]) =>
  ({ dtype }: LayerWeight): string | null =>
    legal.includes(dtype)
      ? null
      : `its weight is ${dtype}: only ${legal.join(" and ")} can be taken (nearest legal: ${legal[0]})`;

/** Throws `argument/invalid` with the nearest legal value unless `value` is one of them. */
export function oneOf<T extends string | number | null>(
  config: string,
  name: string,
  value: T,
  legal: readonly T[],
): T {
  if (legal.includes(value)) return value;
  const nearest =
    typeof value === "number"
      ? legal
          .filter((v): v is T & number => typeof v === "number")
          .sort((a, b) => Math.abs(a - value) - Math.abs(b - value))[0]
      : nearestNames(String(value), legal.map(String), 1)[0];
  throw new FewbitError("argument/invalid", {
    name: `${config}.${name}`,
    value,
    expected: `one of ${legal.map(String).join(", ")} (nearest: ${String(nearest)})`,
  });
}

/** The config of every layer: one config (or null: leave alone), or a map of patterns to configs. */
export type ConfigSelection = QuantizeConfig | null | ReadonlyMap<string, QuantizeConfig | null>;

/**
 * The config of the linear `layer` (a module name such as `model.layers.0.self_attn.q_proj`), or null to leave it
 * alone. In a map the precedence is torchao's (specification 4): the exact parameter name (`<layer>.weight`), the exact
 * module name, the first `re:` pattern that matches the whole parameter name, the first that matches the whole module
 * name, `_default`. Throws `argument/invalid` when a filter comes with a map, as torchao does, or a pattern is not a
 * regular expression.
 */
export function configFor(
  layer: string,
  selection: ConfigSelection,
  filter?: (layer: string) => boolean,
): QuantizeConfig | null {
  if (!(selection instanceof Map)) {
    return filter === undefined || filter(layer) ? (selection as QuantizeConfig | null) : null;
  }
  if (filter !== undefined) {
    throw new FewbitError("argument/invalid", {
      name: "filter",
      value: "a function",
      expected: "no filter beside a map of configs",
    });
  }
  const map = selection as ReadonlyMap<string, QuantizeConfig | null>;
  const parameter = `${layer}.weight`;
  for (const name of [parameter, layer]) {
    const config = map.get(name);
    if (config !== undefined) return config;
  }
  for (const name of [parameter, layer]) {
    for (const [pattern, config] of map) {
      if (pattern.startsWith("re:") && wholeMatch(pattern, name)) return config;
    }
  }
  return map.get("_default") ?? null;
}

function wholeMatch(pattern: string, name: string): boolean {
  try {
    return new RegExp(`^(?:${pattern.slice(3)})$`).test(name);
  } catch (cause) {
    throw new FewbitError(
      "argument/invalid",
      { name: "pattern", value: pattern, expected: "re: and a regular expression" },
      { cause },
    );
  }
}
