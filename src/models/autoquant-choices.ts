import { throwIfAborted } from "../core/errors.js";
import { products } from "../core/matmul.js";
import { dequantize, type QuantizedTensor, tensorBytes } from "../formats/tensor.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import { quantizeTensor } from "../quantize/quantize.js";
import type { Choice, Mixture } from "./autoquant-search.js";
import type { ModelFolder } from "./load.js";
import { type ObservedLinear, observeLinears, type PieceOptions } from "./pieces.js";
import { timeLinear } from "./time-linear.js";
import type { Replacement } from "./weights.js";

/** Tokens of the window on which the error of a quantized linear is measured. */
const SAMPLE = 64;

/** Bytes of quantized weights that are kept: what learns codebooks or zero points is slow, and a loss is measured dozens of times. */
const KEPT_BYTES = 2 ** 31;

/** What each linear of a model may be, measured. */
export interface MeasuredLinears {
  /** By layer, e.g. `model.layers.0.self_attn.q_proj`. Never empty: `none` is taken by all. */
  readonly layers: ReadonlyMap<string, readonly Choice[]>;
  /** The weights of a mixture as far as they are kept, for `replace` of `loadModel`. */
  replacement(mixture: Mixture): Replacement;
}

export interface MeasureOptions extends PieceOptions {
  readonly context: number;
  readonly onProgress?: (what: string) => void;
}

/**
 * Quantizes every linear by every config that it can take, times each shape with each config on the device, and measures what the
 * config does to the layer's outputs.
 */
export async function measureLinears(
  folder: ModelFolder,
  ids: readonly number[],
  configs: ReadonlyMap<string, QuantizeConfig | null>,
  { device, context, signal, onProgress }: MeasureOptions,
): Promise<MeasuredLinears> {
  const layers = new Map<string, Choice[]>();
  const parameters = new Map<string, string>();
  const kept = new Map<string, QuantizedTensor>();
  const times = new Map<string, number>();
  let room = KEPT_BYTES;
  const inputs = observeLinears(folder, ids, { device, context, windows: 1, ...(signal && { signal }) });
  for await (const linear of inputs) {
    const { parameter, data, shape, dtype, plain } = linear;
    const layer = parameter.replace(/\.weight$/, "");
    onProgress?.(`measuring ${layer}`);
    const error = outputError(linear);
    const choices: Choice[] = [];
    for (const [name, config] of configs) {
      throwIfAborted(signal, "autoquant");
      const weight = config === null ? plain : config.weight({ shape, dtype });
      if ("refused" in weight) continue;
      const activation = config?.activation ?? null;
      const tensor = quantizeTensor(data, shape, dtype, weight, { numerics: config?.numerics ?? "guarded" });
      const key = `${shape} ${name}`;
      const seconds = times.get(key) ?? (await timeLinear(device, tensor, activation));
      times.set(key, seconds);
      const bytes = tensorBytes(tensor);
      choices.push({ name, seconds, bytes, error: error(dequantize(tensor), activation) });
      if (config === null || bytes > room) continue;
      kept.set(`${layer} ${name}`, tensor);
      room -= bytes;
    }
    layers.set(layer, choices);
    parameters.set(layer, parameter);
  }
  return {
    layers,
    replacement: (mixture) =>
      new Map(
        [...mixture].flatMap(([layer, { name }]) => {
          const tensor = kept.get(`${layer} ${name}`);
          return tensor === undefined ? [] : [[parameters.get(layer) as string, tensor] as const];
        }),
      ),
  };
}

/**
 * The error of a linear's outputs with another weight [n, k]: squared, as a share of their energy, averaged over tokens. Token by
 * token, because a few (the first above all) carry outliers that would hide all others.
 */
function outputError({ data, shape, input }: ObservedLinear) {
  const [n, k] = shape;
  const tokens = input.length / k;
  const rows = Math.min(SAMPLE, tokens);
  const x = new Float32Array(rows * k);
  for (let row = 0; row < rows; row++) {
    const token = Math.floor((row * tokens) / rows);
    x.set(input.subarray(token * k, (token + 1) * k), row * k);
  }
  const exact = Float64Array.from(x);
  const wanted = products(exact, Float64Array.from(data), [rows, n, k]);
  return (weight: Float64Array, activation: QuantizeConfig["activation"]): number => {
    const rounded = activation === null ? exact : dequantize(quantizeTensor(x, [rows, k], "f32", activation));
    const got = products(rounded, weight, [rows, n, k]);
    let sum = 0;
    for (let row = 0; row < rows; row++) {
      let [error, energy] = [0, 0];
      for (let i = row * n; i < (row + 1) * n; i++) {
        error += ((got[i] as number) - (wanted[i] as number)) ** 2;
        energy += (wanted[i] as number) ** 2;
      }
      if (energy > 0) sum += error / energy;
    }
    return sum / rows;
  };
}
