import { bitsPerElement, formatKey } from "../formats/format.js";
import { shapeRows } from "../ir/ops.js";
import { typeBytes } from "../ir/tensor.js";
import type { GenerateStatistics, Model } from "../models/model.js";
import type { Device } from "../runtime/device.js";
import { count, showBytes, showSeconds } from "./terminal.js";

/** Matrices of a model that are stored alike. */
interface StoredAs {
  readonly format: string;
  readonly matrices: number;
  readonly bytes: number;
  /** Average over the matrices, scales and zero points included. */
  readonly bitsPerWeight: number;
}

/** A loaded model as `--json` shows it. */
export function describeModel(path: string, model: Model, quantize: string) {
  const { architecture, layers, hiddenSize, vocabSize } = model.config;
  return {
    path,
    architecture,
    layers,
    hiddenSize,
    vocabSize,
    context: model.capacity,
    quantize,
    formats: storedFormats(model),
    weightBytes: model.weightBytes,
    deviceBytes: model.program.plan.bytes,
  };
}

export function describeDevice({ info }: Device) {
  const { backend, name, kind, reason, detail } = info;
  return { backend, name, kind, reason, detail };
}

function storedFormats(model: Model): StoredAs[] {
  const { graph } = model.program.plan;
  const found = new Map<string, { matrices: number; bytes: number; bits: number; elements: number }>();
  for (const { role, type } of graph.values) {
    if (role !== "weight" || type.kind !== "format") continue;
    const shape = shapeRows(type.shape as number[]);
    const elements = shape[0] * shape[1];
    const entry = found.get(formatKey(type.format)) ?? { matrices: 0, bytes: 0, bits: 0, elements: 0 };
    found.set(formatKey(type.format), {
      matrices: entry.matrices + 1,
      bytes: entry.bytes + typeBytes(type, graph.symbols),
      bits: entry.bits + bitsPerElement(type.format, shape) * elements,
      elements: entry.elements + elements,
    });
  }
  return [...found].map(([format, { matrices, bytes, bits, elements }]) => ({
    format,
    matrices,
    bytes,
    bitsPerWeight: bits / elements,
  }));
}

/** Speeds of one generation. The first token comes from the prompt's run; decoding makes the others. Null: nothing to measure. */
export function describeSpeed(statistics: GenerateStatistics) {
  const { promptTokens, promptSeconds, tokens, decodeSeconds, decodeDispatches, encodeSeconds } = statistics;
  const decoded = Math.max(0, tokens - 1);
  const each = (value: number) => (decoded > 0 ? value / decoded : null);
  return {
    promptTokens,
    promptSeconds,
    promptTokensPerSecond: promptSeconds > 0 ? promptTokens / promptSeconds : null,
    generatedTokens: tokens,
    decodeSeconds,
    decodeTokensPerSecond: decoded > 0 && decodeSeconds > 0 ? decoded / decodeSeconds : null,
    dispatchesPerToken: each(decodeDispatches),
    encodeSecondsPerToken: each(encodeSeconds),
  };
}

type Rows = [heading: string, text: string][];

export function deviceRows(device: ReturnType<typeof describeDevice>): Rows {
  return [
    ["device", `${device.name}, ${device.backend} (${device.kind})`],
    ["why", device.reason],
  ];
}

export function modelRows(model: ReturnType<typeof describeModel>): Rows {
  const formats = model.formats.map(
    ({ format, matrices, bitsPerWeight }) =>
      `${count(matrices, "matrix").replace("matrixs", "matrices")} ${bitsPerWeight.toFixed(2)} bits a weight  ${format}`,
  );
  return [
    [
      "model",
      `${model.path}: ${model.architecture}, ${count(model.layers, "layer")}, context ${count(model.context, "token")}`,
    ],
    ["format", [model.quantize, ...formats].join("\n")],
    ["weights", `${showBytes(model.weightBytes)}, KV cache ${showBytes(model.deviceBytes.state)}`],
  ];
}

export function speedRows(speed: ReturnType<typeof describeSpeed>, layers: number, backend: string): Rows {
  const rate = (tokens: number, seconds: number, perSecond: number | null) =>
    `${count(tokens, "token")} in ${showSeconds(seconds)}${perSecond === null ? "" : `, ${perSecond.toFixed(1)} tokens/s`}`;
  if (speed.generatedTokens === 0) return [];
  const rows: Rows = [
    ["prompt", rate(speed.promptTokens, speed.promptSeconds, speed.promptTokensPerSecond)],
    ["decode", rate(Math.max(0, speed.generatedTokens - 1), speed.decodeSeconds, speed.decodeTokensPerSecond)],
  ];
  if (speed.dispatchesPerToken === null) return rows;
  const work = backend === "reference" ? "computing" : "encoding";
  const dispatches = `${speed.dispatchesPerToken.toFixed(0)} dispatches a token for ${count(layers, "layer")}`;
  return [
    ...rows,
    ["work", `${dispatches}; ${work} them takes ${showSeconds(speed.encodeSecondsPerToken ?? 0)} a token`],
  ];
}
