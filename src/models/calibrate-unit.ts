import { type FloatType, roundTo } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import type { Format } from "../formats/format.js";
import type { HostTensor } from "../ir/tensor.js";
import { awqScale } from "../quantize/awq.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import { gptqQuantize, Hessian } from "../quantize/gptq.js";
import { quantizeTensor } from "../quantize/quantize.js";
import { choosesByGroup, searchRanges } from "../quantize/ranges.js";
import { smoothWeight } from "../quantize/smoothquant.js";
import type { InputStatistics } from "../quantize/statistics.js";
import type { CalibrateOptions } from "./calibrate.js";
import type { LinearGroup } from "./linear-groups.js";
import type { Tensors } from "./pieces.js";

interface Weight {
  readonly name: string;
  readonly data: Float32Array;
  readonly shape: readonly [n: number, k: number];
  readonly dtype: FloatType;
  readonly format: Format;
}

/**
 * The tensors that change when groups are quantized together, by parameter name: their weights, and what their scales are folded into.
 */
export async function quantizeUnit(
  unit: readonly LinearGroup[],
  statistics: ReadonlyMap<LinearGroup, InputStatistics>,
  source: Tensors,
  config: QuantizeConfig,
  options: CalibrateOptions,
): Promise<Map<string, HostTensor>> {
  const result = new Map<string, HostTensor>();
  const weights = new Map<string, Weight>();
  for (const name of unit.flatMap((group) => group.weights)) weights.set(name, await readWeight(source, name, config));
  const of = (group: LinearGroup) => group.weights.map((name) => weights.get(name) as Weight);
  if (options.algorithm === "gptq") {
    for (const group of unit) {
      const { k, gram } = statistics.get(group) as InputStatistics;
      const hessian = new Hessian(k);
      hessian.values.set(gram);
      for (const { name, data, shape, format } of of(group)) {
        requireFixed(format, config, options);
        result.set(name, gptqQuantize(data, shape, hessian, format, { numerics: config.numerics, searchRange: true }));
      }
    }
    return result;
  }
  const importance = new Map<string, Float64Array>();
  for (const group of unit) {
    const { gram, k } = statistics.get(group) as InputStatistics;
    const wanted = columnScale(group, of(group), statistics.get(group) as InputStatistics, config, options);
    const scale = await fold(group, wanted, weights, result, source);
    const squares = Float64Array.from(scale, (s, i) => (gram[i * k + i] as number) / s ** 2);
    for (const name of group.weights) importance.set(name, squares);
    for (const { name, data, ...weight } of of(group)) {
      weights.set(name, { name, ...weight, data: data.map((value, i) => value * (scale[i % scale.length] as number)) });
    }
  }
  for (const { name, data, shape, dtype, format } of weights.values()) {
    const rounded = data.map((value) => roundTo(dtype, value));
    const { numerics } = config;
    // AWQ's other half: ranges narrower than the weights, where the columns that matter gain by it.
    const given =
      options.algorithm === "awq" && choosesByGroup(format)
        ? searchRanges(rounded, shape, format, importance.get(name) as Float64Array, { numerics })
        : undefined;
    const tensor =
      given === undefined
        ? quantizeTensor(rounded, shape, dtype, format, { numerics })
        : quantizeTensor(rounded, shape, "f32", format, { numerics, given });
    result.set(name, tensor);
  }
  return result;
}

export async function readWeight(source: Tensors, name: string, config: QuantizeConfig): Promise<Weight> {
  const { data, shape, dtype } = await source.read(name);
  const matrix = [shape[0] as number, shape[1] as number] as const;
  const format = config.weight({ shape: matrix, dtype });
  if (!("refused" in format)) return { name, data, shape: matrix, dtype, format };
  const layer = name.replace(/\.weight$/, "");
  throw new FewbitError("quantize/layer", { layer, config: config.name, reason: format.refused });
}

/** GPTQ freezes a group's scales when it comes to its first column: rules that look at more than a group have none then. */
function requireFixed(format: Format, config: QuantizeConfig, { quantize }: CalibrateOptions): void {
  if (choosesByGroup(format)) return;
  const reason = "gptq needs scales along rows, chosen group by group";
  throw new FewbitError("quantize/unsupported", { config: `${quantize} (${config.name})`, reason });
}

/** The scale of each input column that the algorithm wants: weights are multiplied by it, activations divided. */
function columnScale(
  { producer, reason }: LinearGroup,
  weights: readonly Weight[],
  statistics: InputStatistics,
  config: QuantizeConfig,
  { algorithm, alpha = 0.5 }: CalibrateOptions,
): Float32Array {
  if (producer === null) {
    throw new FewbitError("model/unsupported", {
      what: `${algorithm} on a model where`,
      value: reason,
      supported: ["norms", "gated products", "attention"],
    });
  }
  const tie = producer.kind === "rows" ? producer.rowOf : (column: number) => column;
  const { dtype } = weights[0] as Weight;
  if (algorithm === "awq") return awqScale(weights, dtype, statistics, { numerics: config.numerics, tie });
  const { k, maxima } = statistics;
  const tied = new Float32Array(k);
  for (let i = 0; i < k; i++) tied[tie(i)] = Math.max(tied[tie(i)] as number, maxima[i] as number);
  // All linears of the group share the factor, so it sees their rows as one weight; tied columns as one column.
  const stacked = new Float32Array(weights.reduce((sum, { data }) => sum + data.length, 0));
  let at = 0;
  for (const { data } of weights) {
    for (let i = 0; i < data.length; i++) {
      const to = at + i - (i % k) + tie(i % k);
      stacked[to] = Math.max(stacked[to] as number, Math.abs(data[i] as number));
    }
    at += data.length;
  }
  const { factor } = smoothWeight(stacked, tied, dtype, alpha);
  return Float32Array.from({ length: k }, (_, i) => factor[tie(i)] as number);
}

/**
 * Divides the group's input by `wanted` where it is made, and returns what its weights have to be multiplied by for the model to
 * compute the same: a norm's weight is rounded to its dtype, so that is not quite `wanted`.
 */
async function fold(
  { producer }: LinearGroup,
  wanted: Float32Array,
  weights: Map<string, Weight>,
  result: Map<string, HostTensor>,
  source: Tensors,
): Promise<Float32Array> {
  if (producer?.kind === "vectors") {
    const scale = wanted.slice();
    for (const [index, name] of producer.names.entries()) {
      const { data, shape, dtype } = await source.read(name);
      const divided = data.map((value, i) => roundTo(dtype, value / (scale[i] as number)));
      // The first vector is the norm's weight; a shift follows what became of it.
      if (index === 0) {
        for (const [i, value] of data.entries()) {
          const made = divided[i] as number;
          scale[i] = made === 0 || value === 0 ? 1 : value / made;
          if (made === 0) divided[i] = value;
        }
      }
      result.set(name, { dtype: "f32", shape: [...shape], data: divided });
    }
    return scale;
  }
  if (producer === null) return wanted;
  const { weight: name, bias, rowOf } = producer;
  const before = weights.get(name) as Weight;
  const rows = new Float32Array(before.shape[0]).fill(1);
  for (let c = 0; c < wanted.length; c++) rows[rowOf(c)] = wanted[c] as number;
  const k = before.shape[1];
  weights.set(name, {
    ...before,
    data: before.data.map((value, i) => value / (rows[Math.floor(i / k)] as number)),
  });
  if (bias !== undefined) {
    const { data, shape, dtype } = await source.read(bias);
    const divided = data.map((value, i) => roundTo(dtype, value / (rows[i] as number)));
    result.set(bias, { dtype: "f32", shape: [...shape], data: divided });
  }
  return wanted;
}
