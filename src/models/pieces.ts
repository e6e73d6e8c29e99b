import type { FloatType } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { Format } from "../formats/format.js";
import { FORMATS } from "../formats/table.js";
import { dequantize } from "../formats/tensor.js";
import { type Graph, stored, type ValueId } from "../ir/graph.js";
import { sliceGraph, valueName } from "../ir/slice.js";
import { type DenseTensor, type HostTensor, isDense } from "../ir/tensor.js";
import type { Device } from "../runtime/device.js";
import type { Tokenizer } from "../text/tokenizer.js";
import { PAST, TOKENS } from "./decoder.js";
import { textWindows, type Window } from "./evaluate.js";
import { type LinearGroup, linearGroups } from "./linear-groups.js";
import { type ModelFolder, openDecoder } from "./load.js";
import { isLinearRole } from "./weights.js";

/*
 * A model run over a text piece by piece: consecutive nodes of its graph, each over all windows of the text before the next, so that
 * what a piece computes can be looked at, and changed, before anything after it runs.
 */

/** A linear of an unquantized model with the inputs it had in one window of a text. */
export interface ObservedLinear {
  /** The name of its weight. */
  readonly parameter: string;
  readonly data: Float32Array;
  readonly shape: readonly [n: number, k: number];
  readonly dtype: FloatType;
  /** The format of the weight as it is. */
  readonly plain: Format;
  /** [tokens, k]. */
  readonly input: Float32Array;
}

/** Runs the unquantized model over the first windows of a text and gives every linear with its inputs in the last of them. */
export async function* observeLinears(
  folder: ModelFolder,
  text: string | readonly number[],
  options: PieceOptions & { readonly context?: number; readonly windows?: number },
): AsyncGenerator<ObservedLinear> {
  const { context = 512, windows: limit = 1, signal } = options;
  await using source = await openTensors(folder, context, signal);
  const { graph, tokenizer } = source;
  const ids = typeof text === "string" ? tokenizer.encode(text, { addSpecialTokens: false }) : text;
  const windows = textWindows(ids, { context: source.context, bos: tokenizer.bosId }).slice(0, limit);
  const units = unitsOf(
    linearGroups(graph, (name) => source.names.has(name)),
    false,
  );
  const cuts = [0, ...units.map((unit) => firstNode(graph, unit)), graph.nodes.length];
  const piece = { replaced: new Map(), states: new HiddenStates(windows), options };
  await advancePiece(source, [0, cuts[1] as number], piece);
  for (const [i, unit] of units.entries()) {
    const range = [cuts[i + 1] as number, cuts[i + 2] as number] as const;
    for (const { input: id, weights } of unit) {
      let input = new Float32Array();
      const keep: Visit = (_, data) => {
        input = Float32Array.from(data);
      };
      await observePiece(source, range, [id], keep, piece);
      for (const parameter of weights) {
        const { data, shape, dtype } = await source.read(parameter);
        const matrix = [shape[0] as number, shape[1] as number] as const;
        yield { parameter, data, shape: matrix, dtype, plain: FORMATS[dtype], input };
      }
    }
    if (i + 1 < units.length) await advancePiece(source, range, piece);
  }
}

/** The tensors of a model before it is quantized, and its graph. */
export interface Tensors extends AsyncDisposable {
  readonly graph: Graph;
  readonly tokenizer: Tokenizer;
  /** Tokens of a window. */
  readonly context: number;
  /** The weights that a config may quantize. */
  readonly names: ReadonlySet<string>;
  /** A tensor as the graph takes it. */
  load(name: string): Promise<HostTensor>;
  read(name: string): Promise<{ data: Float32Array; shape: readonly number[]; dtype: FloatType }>;
}

export async function openTensors(
  folder: ModelFolder,
  context: number,
  signal: AbortSignal | undefined,
): Promise<Tensors> {
  const opened = await openDecoder(folder, { prefillChunk: context, ...(signal && { signal }) }, "last");
  const { checkpoint, specs, tokenizer, graph, maxTokens, load } = opened;
  return {
    graph,
    tokenizer,
    context: maxTokens,
    names: new Set(specs.filter(({ role }) => isLinearRole(role)).map(({ name }) => name)),
    load,
    read: async (name) => {
      if ((specs.find((spec) => spec.name === name)?.offset ?? 0) !== 0) {
        const supported = ["norms whose weights are stored as they are used"];
        throw new FewbitError("model/unsupported", { what: "folding a scale into", value: name, supported });
      }
      const dtype = ({ F32: "f32", F16: "f16", BF16: "bf16" } as const)[checkpoint.tensors.get(name)?.dtype as "F32"];
      if (dtype === undefined) {
        const reason = "it does not lie in a tensor of floats of its own: calibrate the original checkpoint";
        throw new FewbitError("quantize/layer", { layer: name, config: "calibration", reason });
      }
      const tensor = await load(name);
      const data = isDense(tensor) ? (tensor.data as Float32Array) : Float32Array.from(dequantize(tensor));
      return { data, shape: tensor.shape, dtype };
    },
    [Symbol.asyncDispose]: () => opened[Symbol.asyncDispose](),
  };
}

/** What pieces of the graph hand to later ones, for every window of the text. */
export class HiddenStates {
  readonly windows: readonly Window[];
  readonly #values: Map<ValueId, Float32Array>[];

  constructor(windows: readonly Window[]) {
    this.windows = windows;
    this.#values = windows.map(() => new Map());
  }

  get(window: number, id: ValueId): Float32Array {
    return this.#values[window]?.get(id) as Float32Array;
  }

  /** Keeps the values that a piece made, and those of before that are still read. */
  replace(window: number, made: ReadonlyMap<ValueId, Float32Array>, stillRead: (id: ValueId) => boolean): void {
    const old = [...(this.#values[window] as Map<ValueId, Float32Array>)].filter(([id]) => stillRead(id));
    this.#values[window] = new Map([...old, ...made]);
  }
}

export interface PieceOptions {
  readonly device: Device;
  readonly signal?: AbortSignal;
}

export type Visit = (id: ValueId, data: Float32Array) => void;

export interface Piece {
  /** Tensors as they are by now. */
  readonly replaced: ReadonlyMap<string, HostTensor>;
  readonly states: HiddenStates;
  readonly options: PieceOptions;
}

/** Shows `visit` values that nodes [begin, end) read or make, window by window. */
export async function observePiece(
  source: Tensors,
  [begin]: readonly [number, number],
  wanted: readonly ValueId[],
  visit: Visit,
  piece: Piece,
): Promise<void> {
  const { nodes } = source.graph;
  const maker = (id: ValueId) => nodes.findIndex((node) => node.outputs.includes(id));
  const made = wanted.filter((id) => maker(id) >= begin);
  for (const id of wanted.filter((other) => !made.includes(other)))
    for (const i of piece.states.windows.keys()) visit(id, piece.states.get(i, id));
  if (made.length === 0) return;
  const end = Math.max(...made.map(maker)) + 1;
  await runPiece(source, [begin, end], made, piece, (_, results) => {
    for (const [id, data] of results) visit(id, data);
  });
}

/** Runs nodes [begin, end) and keeps what later nodes read. */
export async function advancePiece(source: Tensors, range: readonly [number, number], piece: Piece): Promise<void> {
  const { nodes } = source.graph;
  const later = new Set(nodes.slice(range[1]).flatMap((node) => node.inputs));
  const caches = new Set(nodes.flatMap((node) => (node.op === "kv_write" ? node.outputs : [])));
  const made = nodes.slice(...range).flatMap((node) => node.outputs);
  const keep = made.filter((id) => later.has(id) && !caches.has(id));
  await runPiece(source, range, keep, piece, (window, results) =>
    piece.states.replace(window, results, (id) => later.has(id)),
  );
}

async function runPiece(
  source: Tensors,
  range: readonly [number, number],
  keep: readonly ValueId[],
  { replaced, states, options: { device, signal } }: Piece,
  done: (window: number, results: ReadonlyMap<ValueId, Float32Array>) => void,
): Promise<void> {
  const { graph } = source;
  const { graph: slice, taken } = sliceGraph(graph, range, keep, ({ name, type }) => {
    const tensor = replaced.get(name);
    return tensor === undefined || isDense(tensor) ? type : stored(tensor.format, type.shape);
  });
  using program = await device.compile(slice, {
    weights: async (name) => replaced.get(name) ?? source.load(name),
    ...(signal && { signal }),
  });
  const { executable } = program;
  const readsIds = slice.values.some(({ name }) => name === "ids");
  for (const [i, { ids }] of states.windows.entries()) {
    throwIfAborted(signal, "calibrating");
    const tokens = ids.length;
    if (readsIds) executable.write("ids", { dtype: "i32", shape: [tokens], data: Int32Array.from(ids) });
    for (const [id, name] of taken)
      executable.write(name, { dtype: "f32", shape: [tokens, widthOf(graph, id)], data: states.get(i, id) });
    executable.submit({ [TOKENS]: tokens, [PAST]: 0 });
    const results = new Map<ValueId, Float32Array>();
    for (const id of keep) {
      const { data } = (await executable.read(valueName(id))) as DenseTensor;
      results.set(id, (data as Float32Array).slice(0, tokens * widthOf(graph, id)));
    }
    done(i, results);
  }
}

export const widthOf = (graph: Graph, id: ValueId): number => graph.values[id]?.type.shape.at(-1) as number;

/** The first node that has to be run again when the unit is quantized: a norm that takes its scale, or the first to read its input. */
export function firstNode(graph: Graph, unit: readonly LinearGroup[]): number {
  const { input, producer } = unit[0] as LinearGroup;
  const makes = graph.nodes.findIndex((node) => node.outputs.includes(input));
  return producer?.kind === "vectors" ? makes : graph.nodes.findIndex((node) => node.inputs.includes(input));
}

/** Groups that have to be quantized together: with `folds`, those of which one is what another's scale is folded into. */
export function unitsOf(groups: readonly LinearGroup[], folds: boolean): LinearGroup[][] {
  const units: LinearGroup[][] = [];
  for (const group of groups) {
    const { producer } = group;
    const unit =
      folds &&
      producer?.kind === "rows" &&
      units.find((known) => known.some(({ weights }) => weights.includes(producer.weight)));
    if (unit) unit.push(group);
    else units.push([group]);
  }
  return units;
}
