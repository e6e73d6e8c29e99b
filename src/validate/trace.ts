import type { BackendDevice, Executable, LoadOptions, WeightSource } from "../backends/backend.js";
import { throwIfAborted } from "../core/errors.js";
import { decode } from "../formats/codec.js";
import { codecBits } from "../formats/format.js";
import { dequantize, elementCodes } from "../formats/tensor.js";
import type { Symbols } from "../ir/evaluate.js";
import { concreteShape, type Graph, type Value, type ValueId } from "../ir/graph.js";
import { copyTensor, type HostTensor, isDense, joinRows } from "../ir/tensor.js";
import { planMemory } from "../plan/memory.js";
import { bucketFor, type Plan } from "../plan/plan.js";
import { BoundStep, type Step } from "../plan/step.js";
import { type Allowed, exactly } from "./bounds.js";
import { type Deviation, judge } from "./bounds-judge.js";
import { allowNodes, firstRows } from "./run.js";

/** A plan on a device, twice: as it always runs, and with every step's outputs kept so that they can be read. */
export interface Tap {
  readonly backend: string;
  readonly plan: Plan;
  readonly plain: Executable;
  readonly tapped: Executable;
  /** The weights as they were meant, by name. */
  readonly weights: ReadonlyMap<string, HostTensor>;
  /** Output names of the tapped values. */
  readonly names: ReadonlyMap<ValueId, string>;
}

/** Changes of what a device is given, for seeded faults. */
export interface TapFaults {
  readonly rewrite?: LoadOptions["rewrite"];
  readonly tamper?: (name: string, tensor: HostTensor) => HostTensor;
}

/** Loads a plan for tracing. The tapped copy has the same steps and kernels; only its memory is not reused. */
export async function tap(
  device: BackendDevice,
  plan: Plan,
  weights: WeightSource,
  options: LoadOptions = {},
  { rewrite, tamper }: TapFaults = {},
): Promise<Tap> {
  const known = new Map<string, HostTensor>();
  const source = async (name: string): Promise<HostTensor> => {
    const tensor = known.get(name) ?? (await joinRows(await weights(name)));
    known.set(name, tensor);
    return tamper?.(name, tensor) ?? tensor;
  };
  const names = new Map(plan.steps.flatMap((step) => step.outputs.map((id) => [id, `tap ${id}`] as const)));
  const outputs = { ...plan.graph.outputs, ...Object.fromEntries([...names].map(([id, name]) => [name, id])) };
  const graph = { ...plan.graph, outputs };
  const kept = { ...plan, graph, memory: planMemory(graph, plan.steps, graph.symbols) };
  const load = { ...options, ...(rewrite && { rewrite }) };
  const plain = await device.load(plan, source, load);
  try {
    return {
      backend: device.info.backend,
      plan,
      plain,
      tapped: await device.load(kept, source, load),
      weights: known,
      names,
    };
  } catch (error) {
    plain[Symbol.dispose]();
    throw error;
  }
}

export function disposeTap({ plain, tapped }: Tap): void {
  tapped[Symbol.dispose]();
  plain[Symbol.dispose]();
}

/** Where a tensor's numbers lie; counters tell an overflow that a later step makes finite again. */
export interface Range {
  readonly name: string;
  readonly largest: number;
  readonly nonFinite: number;
  /** Nonzero, and below float32's smallest normal number (of stored values: below their codec's). */
  readonly subnormal: number;
  /** At the largest code of its format; of float32 values: beyond float16's range. */
  readonly saturated: number;
}

/** One step of one run on one device, judged on the inputs that it had there. */
export interface TracedStep {
  readonly backend: string;
  readonly run: number;
  readonly step: number;
  readonly what: string;
  readonly kernel: string;
  /** The worst error as a fraction of its bound; more than 1 is a divergence. */
  readonly worst: number;
  readonly element: (Deviation & { readonly output: string }) | null;
  readonly inputs: readonly Range[];
  readonly outputs: readonly Range[];
  /** Inputs, results and expected results of a step beyond its bound, to be saved. */
  readonly tensors?: ReadonlyMap<string, HostTensor>;
}

export interface TraceRun {
  readonly symbols: Symbols;
  /** Inputs and states by name, written before the run. */
  readonly inputs: Readonly<Record<string, HostTensor>>;
}

/**
 * Runs a plan with taps and yields every step with its error. Each step is judged against the float64 definition on the very inputs
 * that it had on the device, so its bound holds for it alone and a fault shows at the step that has it, not after. At the
 * end of every run the outputs of the plain plan must be those of the tapped one bit for bit (step -1): memory that is reused
 * too early would differ.
 */
export async function* traceSteps(
  { backend, plan, plain, tapped, weights, names }: Tap,
  runs: readonly TraceRun[],
  signal?: AbortSignal,
): AsyncGenerator<TracedStep> {
  const { graph } = plan;
  for (const [run, { symbols, inputs }] of runs.entries()) {
    throwIfAborted(signal, "tracing");
    for (const executable of [plain, tapped])
      for (const [name, tensor] of Object.entries(inputs)) executable.write(name, tensor);
    const before = new Map<ValueId, HostTensor>();
    for (const value of graph.values) {
      if (value.role === "state") before.set(value.id, copyTensor(await tapped.read(value.name)));
      else if (value.role === "input" && inputs[value.name] !== undefined)
        before.set(value.id, inputs[value.name] as HostTensor);
      else if (value.role === "weight") before.set(value.id, weights.get(value.name) as HostTensor);
    }
    for (const executable of [plain, tapped]) executable.submit(symbols);
    const found = new Map<ValueId, HostTensor>();
    for (const [id, name] of names) found.set(id, firstRows(await tapped.read(name), shapeOf(graph, id, symbols)));
    // A state is what it was before the run to the step that reads it: one that changed it has an output of its own.
    const of = (id: ValueId): HostTensor => {
      const tensor = (
        graph.values[id]?.role === "state" ? before.get(id) : (found.get(id) ?? before.get(id))
      ) as HostTensor;
      const whole = !isDense(tensor) || graph.values[id]?.role === "weight";
      return whole ? tensor : firstRows(tensor, shapeOf(graph, id, symbols));
    };
    const bucket = plan.buckets[bucketFor(plan, symbols)];
    for (const [index, step] of plan.steps.entries()) {
      throwIfAborted(signal, "tracing");
      yield {
        backend,
        run,
        ...judgeStep(graph, step, index, symbols, of),
        kernel: bucket?.choices[index]?.kernel.id ?? "",
      };
    }
    const different = await differing(graph, plain, tapped);
    yield { ...EVERYTHING, backend, run, worst: different === null ? 0 : Number.POSITIVE_INFINITY, element: different };
  }
}

const EVERYTHING = { step: -1, what: "outputs of the plan without taps", kernel: "", inputs: [], outputs: [] } as const;

const shapeOf = (graph: Graph, id: ValueId, symbols: Symbols): number[] =>
  concreteShape((graph.values[id] as Value).type.shape, symbols);

function judgeStep(
  graph: Graph,
  step: Step,
  index: number,
  symbols: Symbols,
  of: (id: ValueId) => HostTensor,
): Omit<TracedStep, "backend" | "run" | "kernel"> {
  const values = new Map<ValueId, Allowed>();
  for (const id of step.inputs) values.set(id, exactly(of(id)));
  allowNodes(graph, step.nodes, values, symbols);
  let worst = 0;
  let element: TracedStep["element"] = null;
  const tensors = new Map<string, HostTensor>();
  const name = (id: ValueId) => graph.values[id]?.name ?? `value ${id}`;
  for (const id of step.outputs) {
    const allowed = values.get(id) as Allowed;
    const verdict = judge(allowed, of(id));
    if (element === null || verdict.worst > worst)
      element = verdict.element && { ...verdict.element, output: name(id) };
    worst = Math.max(worst, verdict.worst);
    tensors.set(`got.${name(id)}`, of(id));
    if (allowed.kind === "near") {
      tensors.set(`expected.${name(id)}`, {
        dtype: "f32",
        shape: allowed.shape,
        data: Float32Array.from(allowed.values),
      });
      tensors.set(`bound.${name(id)}`, { dtype: "f32", shape: allowed.shape, data: Float32Array.from(allowed.error) });
    } else if (allowed.kind === "equal") tensors.set(`expected.${name(id)}`, allowed.tensor);
  }
  for (const id of step.inputs) tensors.set(`input.${name(id)}`, of(id));
  const what = new BoundStep(graph, step, symbols).describe();
  return {
    step: index,
    what,
    worst,
    element,
    inputs: step.inputs.map((id) => rangeOf(name(id), of(id))),
    outputs: step.outputs.map((id) => rangeOf(name(id), of(id))),
    ...(worst > 1 ? { tensors } : {}),
  };
}

/** The first element at which the outputs of two executables differ. */
async function differing(graph: Graph, a: Executable, b: Executable): Promise<TracedStep["element"]> {
  for (const output of Object.keys(graph.outputs)) {
    const [x, y] = [await a.read(output), await b.read(output)];
    if (!isDense(x) || !isDense(y)) continue;
    const index = x.data.findIndex((value, i) => !Object.is(value, y.data[i]));
    if (index >= 0) return { output, index, got: x.data[index] as number, expected: y.data[index] as number, bound: 0 };
  }
  return null;
}

function rangeOf(name: string, tensor: HostTensor): Range {
  const values = isDense(tensor) ? tensor.data : dequantize(tensor);
  const smallest = 2 ** -126;
  let [largest, nonFinite, subnormal, saturated] = [0, 0, 0, 0];
  for (const value of values) {
    const magnitude = Math.abs(value);
    if (!Number.isFinite(magnitude)) nonFinite++;
    else if (magnitude > largest) largest = magnitude;
    if (magnitude > 0 && magnitude < smallest) subnormal++;
    if (isDense(tensor) && magnitude > 65504) saturated++;
  }
  if (!isDense(tensor)) saturated = saturatedCodes(tensor);
  return { name, largest, nonFinite, subnormal, saturated };
}

/** Codes whose value is the largest or smallest of their codec; 0 for codecs of more than 8 bits and learned tables. */
function saturatedCodes(tensor: Exclude<HostTensor, { dtype: unknown }>): number {
  const codec = tensor.format.element;
  if (codecBits(codec) > 8 || (codec.kind === "lut" && codec.entries === "learned")) return 0;
  const values = Array.from({ length: 2 ** codecBits(codec) }, (_, code) => decode(codec, code));
  const finite = values.filter(Number.isFinite);
  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  let count = 0;
  for (const code of elementCodes(tensor)) if (values[code] === low || values[code] === high) count++;
  return count;
}
