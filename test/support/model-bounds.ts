import { readFileSync } from "node:fs";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { openDirectory } from "../../src/io/source.js";
import type { Graph, ValueId } from "../../src/ir/graph.js";
import { type DenseTensor, type HostTensor, joinRows, zeros } from "../../src/ir/tensor.js";
import { type DecoderConfig, parseConfig, tensorSpecs } from "../../src/models/config.js";
import { buildDecoder, decoderBuckets, PAST, ROPE_TABLE, ropeTables, TOKENS } from "../../src/models/decoder.js";
import { kvFormat } from "../../src/models/kvcache.js";
import { planWeights } from "../../src/models/weights.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
import type { Device } from "../../src/runtime/device.js";
import { type Allowed, exactly, halfUlp, type Near } from "../../src/validate/bounds.js";
import { allowNodes } from "../../src/validate/run.js";
import { randomWords } from "./codecs.js";

/** A model folder's graph with the logits of every token, and its weights. */
export interface LoadedGraph {
  readonly config: DecoderConfig;
  readonly graph: Graph;
  readonly weights: ReadonlyMap<string, HostTensor>;
  readonly capacity: number;
}

export interface GraphOptions {
  readonly maxTokens: number;
  readonly quantize?: string;
  /** Another description than config.json's. */
  readonly change?: (config: DecoderConfig) => DecoderConfig;
}

export async function loadGraph(folder: string, options: GraphOptions): Promise<LoadedGraph> {
  const { maxTokens, quantize = "none", change = (config) => config } = options;
  const json = JSON.parse(readFileSync(`${folder}/config.json`, "utf8")) as Record<string, unknown>;
  const config = change(parseConfig(json));
  const capacity = config.contextLength;
  await using checkpoint = await openCheckpoint(await openDirectory(folder));
  const specs = tensorSpecs(config);
  const plan = planWeights(checkpoint, specs, parseQuantizeName(quantize));
  const weights = new Map<string, HostTensor>();
  for (const [name, table] of ropeTables(config, capacity)) weights.set(name, await joinRows(table));
  for (const spec of specs) weights.set(spec.name, await plan.load(spec, {}));
  const { weightFormat, activationFormat } = plan;
  const layout = { weightFormat, activationFormat, kvFormat: kvFormat("none"), maxTokens, capacity } as const;
  return { config, graph: buildDecoder(config, { ...layout, logits: "all" }), weights, capacity };
}

/** Logits f32 [tokens, V] of all tokens, `chunk` of them a run. */
export async function runGraph(
  device: Device,
  { graph, weights, capacity }: LoadedGraph,
  ids: readonly number[],
  chunk = ids.length,
): Promise<Float32Array> {
  using program = await device.compile(graph, {
    buckets: decoderBuckets(capacity),
    weights: (name) => weights.get(name) as HostTensor,
  });
  const parts: Float32Array[] = [];
  for (let begin = 0; begin < ids.length; begin += chunk) {
    const part = Int32Array.from(ids.slice(begin, begin + chunk));
    program.executable.write("ids", { dtype: "i32", shape: [part.length], data: part });
    program.executable.submit({ [TOKENS]: part.length, [PAST]: begin });
    const logits = (await program.executable.read("logits")) as DenseTensor;
    parts.push((logits.data as Float32Array).slice(0, part.length * (logits.shape[1] as number)));
  }
  return Float32Array.from(parts.flatMap((part) => [...part]));
}

/** The network in float64, and how far from its logits, row by row, a float32 backend may be. */
export interface NetworkBound {
  readonly values: Float64Array;
  /** One number a token. */
  readonly rows: Float64Array;
}

/**
 * Every op of a backend stays within its bound (docs/numerics.md), so a network differs from the exact one as if each op's result
 * had been moved by up to that. The bound of a network is six times the root mean square of what its logits do when all
 * results are moved by their whole bound, each up or down at random ("Whole networks"). `once`: for the reference, which
 * rounds every result once.
 */
export function networkBound(
  model: LoadedGraph,
  ids: readonly number[],
  { once, samples = 4 }: { readonly once: boolean; readonly samples?: number },
): NetworkBound {
  const values = exactLogits(model, ids);
  const width = values.length / ids.length;
  const squares = new Float64Array(ids.length);
  const next = randomWords(7);
  for (let sample = 0; sample < samples; sample++) {
    const side = () => (next() & 0x10000 ? 1 : -1);
    const moved = evaluateMoved(model, ids, (value, error) => side() * (once ? halfUlp(value) : error));
    for (const [i, value] of moved.entries()) {
      const row = Math.floor(i / width);
      squares[row] = (squares[row] as number) + (value - (values[i] as number)) ** 2;
    }
  }
  return { values, rows: squares.map((sum) => 6 * Math.sqrt(sum / width / samples)) };
}

/** The logits of all tokens, [T, V], as the network's definition has them in float64. */
export const exactLogits = (model: LoadedGraph, ids: readonly number[]): Float64Array =>
  evaluateMoved(model, ids, () => 0);

/** Logits with every op's results moved. Angles are float32 weights that stand for exact ones. */
function evaluateMoved(
  { graph, weights }: LoadedGraph,
  ids: readonly number[],
  by: (value: number, error: number) => number,
): Float64Array {
  const symbols = { [TOKENS]: ids.length, [PAST]: 0 };
  const values = new Map<ValueId, Allowed>();
  const move = (allowed: Allowed): Allowed => {
    if (allowed.kind === "stored") return { kind: "equal", tensor: allowed.tensor };
    if (allowed.kind !== "near") return allowed;
    const moved = allowed.values.map((value, i) => value + by(value, allowed.error[i] as number));
    return { ...allowed, values: moved, error: new Float64Array(moved.length) };
  };
  for (const { id, name, role, type } of graph.values) {
    if (role === "value") continue;
    const tensor =
      name === "ids"
        ? ({ dtype: "i32", shape: [ids.length], data: Int32Array.from(ids) } as const)
        : (weights.get(name) ?? zeros(type, { ...graph.symbols, ...symbols }));
    const allowed = exactly(tensor);
    const angles = name.startsWith(ROPE_TABLE) && allowed.kind === "near";
    values.set(id, angles ? move({ ...allowed, error: allowed.values.map((value) => halfUlp(value)) }) : allowed);
  }
  for (const node of graph.nodes) {
    allowNodes(graph, [node], values, symbols);
    for (const id of node.outputs) values.set(id, move(values.get(id) as Allowed));
  }
  return (values.get(graph.outputs.logits as ValueId) as Near).values;
}
