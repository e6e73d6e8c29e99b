import { FewbitError } from "../core/errors.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import { parseQuantizeName } from "../quantize/names.js";
import type { Device } from "../runtime/device.js";
import { measureLinears } from "./autoquant-choices.js";
import { weighErrors } from "./autoquant-influence.js";
import {
  type Candidate,
  type Choice,
  type Cost,
  candidate,
  type Mixture,
  type Objective,
  search,
} from "./autoquant-search.js";
import { evaluatePerplexity } from "./evaluate.js";
import { type ModelFolder, openDecoder } from "./load.js";

export type { Cost, Objective } from "./autoquant-search.js";

/** Which name of `--quantize` each linear takes, as it is saved. */
export interface AutoquantPlan {
  readonly kind: "fewbit-autoquant";
  readonly version: 1;
  /** The device whose times were measured. */
  readonly device: string;
  readonly objective: Objective;
  /** Nats a token that the loss on the text may rise by. */
  readonly limit: number;
  /** Of the text, in nats a token: without quantization, and with the plan. */
  readonly loss: { readonly unquantized: number; readonly plan: number };
  /** Of all linears: what the plan takes, and what every candidate alone would. */
  readonly cost: Cost;
  readonly singles: Readonly<Record<string, Cost & { readonly loss: number }>>;
  /** Names by layer, e.g. `model.layers.0.self_attn.q_proj`: `int4wo-64`. */
  readonly layers: Readonly<Record<string, string>>;
}

/**
 * What is chosen among unless said otherwise: every width from 8 to 3 bits, integers and floats, and at 4 bits, where they differ
 * most, each way to place a grid and each size of its groups. Roundings of activations other than that of `int8dq` make a single token
 * no faster.
 */
export const AUTOQUANT_CANDIDATES: readonly string[] = [
  ...["int8wo", "float8wo", "int8dq", "intx7wo-64", "intx6wo-64", "fpx-e2m3wo", "intx5wo-64", "int4wo-64"],
  ...["int4wo-32-hqq", "int4wo-64-hqq", "int4wo-128-hqq", "int4wo-256-hqq", "intx4wo-64-hqq"],
  ...["nvfp4wo", "mxfp4wo", "nf4-64", "codebook-4-64", "codebook-3-64", "intx3wo-64"],
];

export interface AutoquantOptions {
  readonly device: Device;
  /** Names to choose from (default `AUTOQUANT_CANDIDATES`); `none` is always among them. */
  readonly candidates?: readonly string[];
  /** What is made small within the limit (default `speed`). */
  readonly objective?: Objective;
  /** Nats a token that the loss may rise by (default 0.01, about 1 % of the perplexity). */
  readonly limit?: number;
  /** Tokens of a window (default 512). */
  readonly context?: number;
  /** Windows of the text that losses are measured on (default 8). */
  readonly windows?: number;
  readonly signal?: AbortSignal;
  readonly onProgress?: (what: string) => void;
}

/**
 * Chooses a config for every linear: times each shape with each candidate on the device, measures what each does to each layer's
 * outputs, and takes the fastest (or smallest) mixture that it finds whose loss on the text, measured with the whole model, is within
 * the limit and not above that of any candidate alone that takes no more bytes. Candidates alone are where the search starts, so that
 * there always is such a mixture. Candidates that a layer cannot take are left out for it. Throws as `loadModel`, `argument/invalid`,
 * `argument/unknown-name`, `operation/aborted`.
 */
export async function autoquant(
  folder: ModelFolder,
  text: string | readonly number[],
  options: AutoquantOptions,
): Promise<AutoquantPlan> {
  const { objective = "speed", limit = 0.01 } = options;
  checkLimit(limit);
  return (await autoquantPlanner(folder, text, options))(objective, limit);
}

/** `autoquant` for several limits: measures linears and candidates alone once, and gives what makes plans of that. */
export async function autoquantPlanner(
  folder: ModelFolder,
  text: string | readonly number[],
  options: Omit<AutoquantOptions, "objective" | "limit">,
): Promise<(objective: Objective, limit: number) => Promise<AutoquantPlan>> {
  const { device, candidates = AUTOQUANT_CANDIDATES, context = 512, windows = 8, signal, onProgress } = options;
  const abort = signal === undefined ? {} : { signal };
  const report = onProgress === undefined ? {} : { onProgress };
  const configs = new Map(["none", ...candidates].map((name) => [name, parseQuantizeName(name)]));
  const ids = typeof text === "string" ? await encode(folder, text, signal) : text;
  const settings = { device, context, ...abort, ...report };
  const measured = await measureLinears(folder, ids, configs, settings);
  const load = (mixture: Mixture) => ({
    quantize: new Map([...mixture].map(([layer, { name }]) => [layer, configs.get(name) as QuantizeConfig | null])),
    replace: measured.replacement(mixture),
  });
  const layers = await weighErrors(folder, ids, measured.layers, { ...settings, load });
  const loss = async (mixture: Mixture, what: string): Promise<number> => {
    onProgress?.(`measuring the loss: ${what}`);
    const options = { device, context, ...load(mixture), limit: windows, ...abort };
    const { nll, tokens } = await evaluatePerplexity(folder, ids, options);
    return nll / tokens;
  };
  const singles = new Map<string, Candidate>();
  for (const name of configs.keys()) {
    const mixture = alone(name, layers);
    if (mixture !== null) singles.set(name, await candidate(mixture, loss, `${name} alone`));
  }
  const unquantized = (singles.get("none") as Candidate).loss;
  return async (objective, limit) => {
    checkLimit(limit);
    const goal = { objective, unquantized, limit, singles: [...singles.values()] };
    const best = await search(layers, { ...goal, loss, ...abort });
    return {
      kind: "fewbit-autoquant",
      version: 1,
      device: device.info.name,
      objective,
      limit,
      loss: { unquantized, plan: best.loss },
      cost: { seconds: best.seconds, bytes: best.bytes },
      singles: Object.fromEntries(
        [...singles].map(([name, { loss, seconds, bytes }]) => [name, { loss, seconds, bytes }]),
      ),
      layers: Object.fromEntries([...best.mixture].map(([layer, { name }]) => [layer, name])),
    };
  };
}

function checkLimit(limit: number): void {
  if (!(limit >= 0)) throw new FewbitError("argument/invalid", { name: "limit", value: limit, expected: "at least 0" });
}

/** One config for all layers; null where a layer cannot take it. */
function alone(name: string, layers: ReadonlyMap<string, readonly Choice[]>): Mixture | null {
  const mixture = new Map(
    [...layers].flatMap(([layer, choices]) => {
      const choice = choices.find((other) => other.name === name);
      return choice === undefined ? [] : [[layer, choice] as const];
    }),
  );
  return mixture.size === layers.size ? mixture : null;
}

async function encode(folder: ModelFolder, text: string, signal: AbortSignal | undefined): Promise<readonly number[]> {
  await using opened = await openDecoder(folder, signal === undefined ? {} : { signal }, "last");
  return opened.tokenizer.encode(text, { addSpecialTokens: false });
}

/** The configs of a saved plan, for `quantize` of `loadModel`. Throws `io/malformed`, `argument/unknown-name`. */
export function parseAutoquantPlan(json: unknown, path = "the plan"): ReadonlyMap<string, QuantizeConfig | null> {
  const { kind, version, layers } = (json ?? {}) as Partial<AutoquantPlan>;
  if (kind !== "fewbit-autoquant" || version !== 1 || typeof layers !== "object" || layers === null)
    throw new FewbitError("io/malformed", { path, reason: "it is not an autoquant plan of version 1" });
  return new Map(Object.entries(layers).map(([layer, name]) => [layer, parseQuantizeName(String(name))]));
}
