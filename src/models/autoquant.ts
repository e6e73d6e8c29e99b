import { FewbitError, throwIfAborted } from "../core/errors.js";
import { products } from "../core/matmul.js";
import { dequantize, tensorBytes } from "../formats/tensor.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import { parseQuantizeName } from "../quantize/names.js";
import { quantizeTensor } from "../quantize/quantize.js";
import type { Device } from "../runtime/device.js";
import { evaluatePerplexity } from "./evaluate.js";
import type { ModelFolder } from "./load.js";
import { observeLinears } from "./pieces.js";
import { timeLinear } from "./time-linear.js";

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

/** What is made small: the time of one token, or the bytes of the weights. */
export type Objective = "speed" | "size";

/** Of the linears of a model: seconds for one token, bytes of their weights. */
export interface Cost {
  readonly seconds: number;
  readonly bytes: number;
}

export interface AutoquantOptions {
  readonly device: Device;
  /** Names to choose from; `none` is always among them. */
  readonly candidates: readonly string[];
  readonly objective?: Objective;
  /** Nats a token that the loss may rise by (default 0.01, about 1 % of the perplexity). */
  readonly limit?: number;
  /** Tokens of a window (default 512). */
  readonly context?: number;
  /** Windows of the text that losses are measured on (default 4). */
  readonly windows?: number;
  readonly signal?: AbortSignal;
  readonly onProgress?: (what: string) => void;
}

/** Rows of each input on which the error of a quantized linear is measured. */
const SAMPLE = 256;

/** One way to do one linear. */
interface Choice extends Cost {
  readonly name: string;
  /** Squared error of the outputs as a share of their energy. */
  readonly error: number;
}

/**
 * Chooses a config for every linear: times each shape with each candidate on the device, measures what each does to each layer's
 * outputs, and takes the cheapest mixture whose loss on the text, measured with the whole model, stays within the limit. The result is
 * never worse than a single candidate that costs no more: then it is that candidate. Candidates that a layer cannot take are left
 * out for it. Throws as `loadModel`, `argument/invalid`, `argument/unknown-name`, `operation/aborted`.
 */
export async function autoquant(
  folder: ModelFolder,
  text: string | readonly number[],
  options: AutoquantOptions,
): Promise<AutoquantPlan> {
  const { device, objective = "speed", limit = 0.01, context = 512, windows = 4, signal, onProgress } = options;
  if (!(limit >= 0)) throw new FewbitError("argument/invalid", { name: "limit", value: limit, expected: "at least 0" });
  const names = [...new Set(["none", ...options.candidates])];
  const configs = new Map(names.map((name) => [name, parseQuantizeName(name)]));
  const layers = await chooseAmong(folder, text, configs, options);
  const costOf = (choice: Cost) => (objective === "speed" ? choice.seconds : choice.bytes);
  const evaluate = async (choices: ReadonlyMap<string, Choice>): Promise<number> => {
    const quantize = new Map([...choices].map(([layer, { name }]) => [layer, configs.get(name) ?? null]));
    const { nll, tokens } = await evaluatePerplexity(folder, text, {
      device,
      quantize,
      context,
      limit: windows,
      ...(signal && { signal }),
    });
    return nll / tokens;
  };
  const singles: Candidate[] = [];
  for (const name of names) {
    onProgress?.(`measuring the loss with ${name} alone`);
    const choices = new Map(
      [...layers].flatMap(([layer, each]) => {
        const choice = each.find((other) => other.name === name);
        return choice === undefined ? [] : [[layer, choice] as const];
      }),
    );
    if (choices.size === layers.size) singles.push({ name, choices, loss: await evaluate(choices), ...total(choices) });
  }
  const unquantized = (singles[0] as Candidate).loss;
  const allowed = ({ loss }: Candidate) => loss <= unquantized + limit;
  const tried = [...singles];
  // From the cheapest mixture to the most accurate one; the search halves the range until two neighbours differ.
  const path = mixtures(layers, costOf);
  let [low, high] = [0, path.length - 1];
  while (low <= high) {
    throwIfAborted(signal, "autoquant");
    const middle = (low + high) >> 1;
    const choices = path[middle] as ReadonlyMap<string, Choice>;
    onProgress?.(`measuring the loss of mixture ${middle + 1} of ${path.length}`);
    const candidate = { name: null, choices, loss: await evaluate(choices), ...total(choices) };
    tried.push(candidate);
    if (allowed(candidate)) high = middle - 1;
    else low = middle + 1;
  }
  // Unquantized is always allowed. Of equally cheap ones the more accurate.
  let best = tried.filter(allowed).reduce((a, b) => {
    const [x, y] = [costOf(a), costOf(b)];
    return y < x || (y === x && b.loss < a.loss) ? b : a;
  });
  for (const single of singles) if (costOf(single) <= costOf(best) && single.loss < best.loss) best = single;
  return {
    kind: "fewbit-autoquant",
    version: 1,
    device: device.info.name,
    objective,
    limit,
    loss: { unquantized, plan: best.loss },
    cost: { seconds: best.seconds, bytes: best.bytes },
    singles: Object.fromEntries(
      singles.map(({ name, loss, seconds, bytes }) => [name as string, { loss, seconds, bytes }]),
    ),
    layers: Object.fromEntries([...best.choices].map(([layer, { name }]) => [layer, name])),
  };
}

/** A config for every linear with what it costs and loses. */
interface Candidate extends Cost {
  /** Null for a mixture. */
  readonly name: string | null;
  readonly choices: ReadonlyMap<string, Choice>;
  readonly loss: number;
}

function total(choices: ReadonlyMap<string, Choice>): Cost {
  let [seconds, bytes] = [0, 0];
  for (const choice of choices.values()) {
    seconds += choice.seconds;
    bytes += choice.bytes;
  }
  return { seconds, bytes };
}

/** The choices of every linear, measured. */
async function chooseAmong(
  folder: ModelFolder,
  text: string | readonly number[],
  configs: ReadonlyMap<string, QuantizeConfig | null>,
  { device, context = 512, signal, onProgress }: AutoquantOptions,
): Promise<Map<string, Choice[]>> {
  const layers = new Map<string, Choice[]>();
  const times = new Map<string, number>();
  const inputs = observeLinears(folder, text, { device, context, windows: 1, ...(signal && { signal }) });
  for await (const { parameter, data, shape, dtype, plain, input } of inputs) {
    const layer = parameter.replace(/\.weight$/, "");
    onProgress?.(`measuring ${layer}`);
    const x = Float64Array.from(input.subarray(0, SAMPLE * shape[1]));
    const wanted = products(x, Float64Array.from(data), [x.length / shape[1], ...shape]);
    const choices: Choice[] = [];
    for (const [name, config] of configs) {
      throwIfAborted(signal, "autoquant");
      const weight = config === null ? plain : config.weight({ shape, dtype });
      if ("refused" in weight) continue;
      const activation = config?.activation ?? null;
      const numerics = { numerics: config?.numerics ?? "guarded" } as const;
      const tensor = quantizeTensor(data, shape, dtype, weight, numerics);
      const rounded =
        activation === null
          ? x
          : dequantize(quantizeTensor(Float32Array.from(x), [x.length / shape[1], shape[1]], "f32", activation));
      const got = products(rounded, dequantize(tensor), [x.length / shape[1], ...shape]);
      const key = `${shape} ${name}`;
      const seconds = times.get(key) ?? (await timeLinear(device, tensor, activation));
      times.set(key, seconds);
      choices.push({ name, seconds, bytes: tensorBytes(tensor), error: relativeError(got, wanted) });
    }
    layers.set(layer, choices);
  }
  return layers;
}

function relativeError(got: Float64Array, wanted: Float64Array): number {
  let [error, energy] = [0, 0];
  for (let i = 0; i < got.length; i++) {
    error += ((got[i] as number) - (wanted[i] as number)) ** 2;
    energy += (wanted[i] as number) ** 2;
  }
  return energy === 0 ? 0 : error / energy;
}

/**
 * Mixtures from the cheapest to the most accurate: those that minimize cost + weight * error for some weight of the error. From each,
 * the next is the one exchange of a layer's choice that lowers the error most for its cost.
 */
function mixtures(
  layers: ReadonlyMap<string, readonly Choice[]>,
  costOf: (choice: Choice) => number,
): ReadonlyMap<string, Choice>[] {
  const current = new Map<string, Choice>();
  for (const [layer, choices] of layers) {
    const cheapest = choices.reduce((a, b) =>
      costOf(b) < costOf(a) || (costOf(b) === costOf(a) && b.error < a.error) ? b : a,
    );
    current.set(layer, cheapest);
  }
  const path = [new Map(current)];
  for (;;) {
    let best: { layer: string; choice: Choice; gain: number } | undefined;
    for (const [layer, choices] of layers) {
      const now = current.get(layer) as Choice;
      for (const choice of choices) {
        if (choice.error >= now.error) continue;
        const gain = (now.error - choice.error) / Math.max(costOf(choice) - costOf(now), Number.MIN_VALUE);
        if (best === undefined || gain > best.gain) best = { layer, choice, gain };
      }
    }
    if (best === undefined) return path;
    current.set(best.layer, best.choice);
    path.push(new Map(current));
  }
}

/** The configs of a saved plan, for `quantize` of `loadModel`. Throws `io/malformed`, `argument/unknown-name`. */
export function parseAutoquantPlan(json: unknown, path = "the plan"): ReadonlyMap<string, QuantizeConfig | null> {
  const { kind, version, layers } = (json ?? {}) as Partial<AutoquantPlan>;
  if (kind !== "fewbit-autoquant" || version !== 1 || typeof layers !== "object" || layers === null)
    throw new FewbitError("io/malformed", { path, reason: "it is not an autoquant plan of version 1" });
  return new Map(Object.entries(layers).map(([layer, name]) => [layer, parseQuantizeName(String(name))]));
}
