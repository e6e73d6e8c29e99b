import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { HostTensor } from "../ir/tensor.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import { parseQuantizeName } from "../quantize/names.js";
import { InputStatistics } from "../quantize/statistics.js";
import type { Device } from "../runtime/device.js";
import { quantizeUnit, readWeight } from "./calibrate-unit.js";
import { type CalibrationStore, packTensor, unpackTensor } from "./calibration-store.js";
import { textWindows } from "./evaluate.js";
import { type LinearGroup, linearGroups } from "./linear-groups.js";
import type { ModelFolder } from "./load.js";
import {
  advancePiece,
  firstNode,
  HiddenStates,
  observePiece,
  openTensors,
  type Tensors,
  unitsOf,
  type Visit,
  widthOf,
} from "./pieces.js";

/**
 * `gptq`: codes are chosen column by column so that each corrects the errors before it. `awq`: columns that carry large
 * activations are scaled up before they are quantized. `smoothquant`: outliers move from activations into weights.
 */
export type CalibrationAlgorithm = "gptq" | "awq" | "smoothquant";
export const CALIBRATION_ALGORITHMS: readonly CalibrationAlgorithm[] = ["gptq", "awq", "smoothquant"];

export interface CalibrateOptions {
  /** Runs the unquantized model over the text. */
  readonly device: Device;
  readonly algorithm: CalibrationAlgorithm;
  /** The short name of the config that says the formats. */
  readonly quantize: string;
  /** Tokens of a window (default 512, at most the model's context length). */
  readonly context?: number;
  /** Windows of the text to use at most (default: all). */
  readonly windows?: number;
  /** SmoothQuant's share of the outliers that moves into the weights, 0 to 1 (default 0.5). */
  readonly alpha?: number;
  readonly store?: CalibrationStore;
  readonly signal?: AbortSignal;
  readonly onProgress?: (progress: CalibrateProgress) => void;
}

export interface CalibrateProgress {
  /** Of groups of linears. */
  readonly done: number;
  readonly total: number;
  readonly what: string;
}

/**
 * Quantizes the linears of a model with the help of a text: its tensors that change, by parameter name, for `replace` of `loadModel`
 * and `saveQuantized`. The text goes through the model once, piece by piece: what a linear sees comes from linears that are quantized
 * already, so that later ones make up for earlier ones. Scales of activations (AWQ, SmoothQuant) are folded into what makes the
 * activations (a norm, or the rows of the linear before): the model computes the same function and needs no operation that it did
 * not have. The host holds the hidden states of the whole text, 4 bytes a token and channel.
 *
 * Throws `quantize/unsupported` for a config that the algorithm cannot serve, `quantize/layer` for a layer, `model/unsupported`
 * where there is nothing to fold a scale into, and as `loadModel`.
 */
export async function calibrate(
  folder: ModelFolder,
  text: string | readonly number[],
  options: CalibrateOptions,
): Promise<Map<string, HostTensor>> {
  const { algorithm, quantize, context = 512, windows: limit, store, signal, onProgress } = options;
  const config = parseQuantizeName(quantize);
  if (config === null) {
    throw new FewbitError("quantize/unsupported", { config: quantize, reason: `${algorithm} needs a format` });
  }
  await using source = await openTensors(folder, context, signal);
  const { graph, tokenizer } = source;
  const ids = typeof text === "string" ? tokenizer.encode(text, { addSpecialTokens: false }) : text;
  const windows = textWindows(ids, { context: source.context, bos: tokenizer.bosId }).slice(0, limit);
  const groups = linearGroups(graph, (name) => source.names.has(name));
  const units = unitsOf(groups, algorithm !== "gptq");
  const cuts = [0, ...units.map((unit) => firstNode(graph, unit)), graph.nodes.length];
  const states = new HiddenStates(windows);
  const replaced = new Map<string, HostTensor>();
  const piece = { replaced, states, options };
  const rangeOf = (i: number) => [cuts[i] as number, cuts[i + 1] as number] as const;
  const finished: (readonly [string, HostTensor][] | undefined)[] = [];
  for (const unit of units) finished.push(store && (await restored(store, unit, source, config, algorithm)));
  // What comes after the last unit that is to be quantized need not be run.
  const last = finished.lastIndexOf(undefined);
  if (last >= 0) await advancePiece(source, rangeOf(0), piece);
  for (const [i, unit] of units.entries()) {
    throwIfAborted(signal, "calibrating");
    const what = (unit[0] as LinearGroup).weights.join(", ");
    onProgress?.({ done: i, total: units.length, what });
    for (const [name, tensor] of finished[i] ?? []) replaced.set(name, tensor);
    if (finished[i] === undefined) {
      const statistics = new Map(unit.map((group) => [group, new InputStatistics(widthOf(graph, group.input))]));
      const observed = new Map([...statistics].map(([group, each]) => [group.input, each]));
      const visit: Visit = (id, data) => observed.get(id)?.observe(data);
      await observePiece(source, rangeOf(i + 1), [...observed.keys()], visit, piece);
      for (const [name, tensor] of await quantizeUnit(unit, statistics, source, config, options)) {
        await store?.set(name, packTensor(tensor));
        replaced.set(name, tensor);
      }
    }
    if (i < last) await advancePiece(source, rangeOf(i + 1), piece);
  }
  return replaced;
}

/** Parameters that quantizing a unit changes. */
function namesOf(unit: readonly LinearGroup[], algorithm: CalibrationAlgorithm): string[] {
  const folded = algorithm === "gptq" ? [] : unit.flatMap(({ producer }) => foldedNames(producer));
  return [...new Set([...unit.flatMap(({ weights }) => weights), ...folded])];
}

function foldedNames(producer: LinearGroup["producer"]): readonly string[] {
  if (producer === null) return [];
  return producer.kind === "vectors" ? producer.names : producer.bias === undefined ? [] : [producer.bias];
}

async function restored(
  store: CalibrationStore,
  unit: readonly LinearGroup[],
  source: Tensors,
  config: QuantizeConfig,
  algorithm: CalibrationAlgorithm,
) {
  const found: [string, HostTensor][] = [];
  for (const name of namesOf(unit, algorithm)) {
    const bytes = await store.get(name);
    if (bytes === undefined) return undefined;
    const format = source.names.has(name) ? (await readWeight(source, name, config)).format : null;
    found.push([name, await unpackTensor(bytes, name, format)]);
  }
  return found;
}
