import type { Executable } from "../backends/backend.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { sliceRows } from "../formats/tensor.js";
import type { Symbols } from "../ir/evaluate.js";
import { concreteShape, type Graph, type Node, type ValueId } from "../ir/graph.js";
import { shapeRows } from "../ir/ops.js";
import { type HostTensor, isDense, zeros } from "../ir/tensor.js";
import { bucketFor, type Plan } from "../plan/plan.js";
import { showExplanation } from "../plan/select.js";
import type { Device, Program } from "../runtime/device.js";
import { type Allowed, allow, exactly } from "./bounds.js";
import { type Deviation, type Deviations, deviations, exactBits, judge } from "./bounds-judge.js";
import type { CaseProgram, CaseRun } from "./cases.js";

/** One case on one backend. */
export interface CaseResult {
  readonly id: string;
  readonly op: string;
  readonly format: string;
  readonly backend: string;
  /** The tier of a WebGPU device; null elsewhere. */
  readonly tier: string | null;
  /** `unsupported`: the backend has no kernel for it, and says why in `reason`. */
  readonly status: "passed" | "failed" | "unsupported";
  /** The worst error as a fraction of its bound. */
  readonly worst: number;
  /** The worst element, and the output that it is in. */
  readonly element: (Deviation & { readonly output: string }) | null;
  /** Why it failed or cannot run; null when it passed. */
  readonly reason: string | null;
  readonly kernels: readonly string[];
  readonly explanation: string;
  /** The shaders that ran; empty without `shaders`. */
  readonly wgsl: readonly string[];
  readonly seconds: number;
  /** How to run this one case again. */
  readonly rerun: string;
  /**
   * SHA-256 of the outputs that have one right answer, such as the codes and scales of a quantized tensor, as the backend gave
   * them; null where there are none. Equal digests are equal bits.
   */
  readonly digest: string | null;
  /** With `detail`: the errors of every output's elements. */
  readonly outputs?: readonly OutputErrors[];
}

export interface OutputErrors extends Deviations {
  readonly name: string;
  readonly shape: readonly number[];
}

export interface RunCasesOptions {
  readonly tier?: string | null;
  readonly seed?: number;
  readonly signal?: AbortSignal;
  /** Keep the shaders' text in results. */
  readonly shaders?: boolean;
  readonly detail?: boolean;
  /** Remembers what is allowed, so that several devices share the work. */
  readonly oracle?: Oracle;
  /** Faults, see `faults.ts`: a change of shaders, and of host tensors before they are uploaded. */
  readonly rewrite?: (source: string, kernel: string) => string;
  readonly tamper?: (name: string, tensor: HostTensor) => HostTensor;
}

/** What a case's outputs may be, by output name; computed once a case. */
export type Oracle = (program: CaseProgram, run: CaseRun) => ReadonlyMap<string, Allowed>;

/** An oracle with a memory. */
export function makeOracle(): Oracle {
  const known = new Map<string, ReadonlyMap<string, Allowed>>();
  let last: { id: string; built: ReturnType<CaseProgram["build"]> } | null = null;
  return (program, run) => {
    let allowed = known.get(run.id);
    if (allowed === undefined) {
      if (last?.id !== program.id) last = { id: program.id, built: program.build() };
      const { graph, weights } = last.built;
      allowed = allowedOutputs(graph, run.symbols, (name) => weights.get(name) ?? run.inputs()[name]);
      known.set(run.id, allowed);
    }
    return allowed;
  };
}

/** What a graph's outputs may be: its nodes one after another, errors passed along. States that are not given start at zero. */
export function allowedOutputs(
  graph: Graph,
  symbols: Symbols,
  given: (name: string) => HostTensor | undefined,
): ReadonlyMap<string, Allowed> {
  const values = new Map<ValueId, Allowed>();
  for (const { id, name, role, type } of graph.values) {
    if (role !== "value") values.set(id, exactly(given(name) ?? zeros(type, symbols)));
  }
  allowNodes(graph, graph.nodes, values, symbols);
  return new Map(Object.entries(graph.outputs).map(([name, id]) => [name, values.get(id) as Allowed]));
}

/** Adds what the nodes make to `values`, which holds what they read. */
export function allowNodes(
  graph: Graph,
  nodes: readonly Node[],
  values: Map<ValueId, Allowed>,
  symbols: Symbols,
): void {
  for (const node of nodes) {
    const types = node.inputs.map((id) => (graph.values[id] as Graph["values"][number]).type);
    const results = allow(
      node,
      node.inputs.map((id) => values.get(id) as Allowed),
      symbols,
      types,
    );
    for (const [i, allowed] of results.entries()) values.set(node.outputs[i] as ValueId, allowed);
  }
}

/**
 * Runs cases on a device and yields each result as it is there. A failing case does not stop the others; a lost device and
 * an abort do. Throws `operation/aborted`, `device/lost`.
 */
export async function* runCases(
  device: Device,
  programs: readonly CaseProgram[],
  options: RunCasesOptions = {},
): AsyncGenerator<CaseResult> {
  const oracle = options.oracle ?? makeOracle();
  // Compiling takes most of the time and runs beside this thread: programs are loaded ahead of their turn.
  const ahead: Promise<Program | FewbitError>[] = [];
  const next = (index: number) => {
    const program = programs[index];
    if (program === undefined) return;
    const loading = load(device, program, options).catch((error: unknown) => asFailure(error));
    loading.catch(() => {});
    ahead[index] = loading;
  };
  for (let i = 0; i < AHEAD; i++) next(i);
  let done = 0;
  try {
    for (const [index, program] of programs.entries()) {
      throwIfAborted(options.signal, "validating");
      const loaded = await (ahead[index] as Promise<Program | FewbitError>);
      next(index + AHEAD);
      try {
        for (const run of program.runs) {
          if (loaded instanceof FewbitError) yield describeError(device, program, run, loaded, options);
          else
            yield await runCase(device, program, run, loaded, oracle, options).catch((error) =>
              describeError(device, program, run, asFailure(error), options),
            );
        }
      } finally {
        if (!(loaded instanceof FewbitError)) loaded[Symbol.dispose]();
        done = index + 1;
      }
    }
  } finally {
    for (const settled of await Promise.allSettled(ahead.slice(done))) {
      if (settled.status === "fulfilled" && !(settled.value instanceof FewbitError)) settled.value[Symbol.dispose]();
    }
  }
}

/** Programs that are compiled at a time. */
const AHEAD = 3;

/** Errors that concern one case; all others end the run. */
function asFailure(error: unknown): FewbitError {
  if (error instanceof FewbitError && !stops(error)) return error;
  throw error;
}

const stops = (error: FewbitError): boolean =>
  error.code === "operation/aborted" || error.code === "device/lost" || error.code === "object/disposed";

function load(device: Device, program: CaseProgram, { rewrite, tamper, signal }: RunCasesOptions): Promise<Program> {
  const { graph, weights } = program.build();
  const weight = (name: string): HostTensor => {
    const tensor = weights.get(name) as HostTensor;
    return tamper === undefined ? tensor : tamper(name, tensor);
  };
  const extra = { ...(rewrite && { rewrite }), ...(signal && { signal }) };
  return device.compile(graph, { buckets: program.buckets, weights: weight, guard: true, ...extra });
}

async function runCase(
  device: Device,
  program: CaseProgram,
  run: CaseRun,
  { executable, plan }: Program,
  oracle: Oracle,
  options: RunCasesOptions,
): Promise<CaseResult> {
  const { symbols } = run;
  const allowed = oracle(program, run);
  const start = performance.now();
  const inputs = run.inputs();
  for (const [name, tensor] of Object.entries(inputs)) executable.write(name, options.tamper?.(name, tensor) ?? tensor);
  executable.submit(symbols);
  const got = await readOutputs(executable);
  const damaged = (await executable.damage?.()) ?? [];
  const seconds = (performance.now() - start) / 1000;

  const problems = damaged.map((name) => `it wrote past the end of ${name}`);
  if (executable.replay !== undefined) problems.push(...(await replayed(executable, plan, run, inputs, allowed)));
  let worst = 0;
  let element: CaseResult["element"] = null;
  const outputs: OutputErrors[] = [];
  const exact: Uint8Array[] = [];
  for (const [name, limit] of allowed) {
    const id = plan.graph.outputs[name] as ValueId;
    const shape = concreteShape((plan.graph.values[id] as Graph["values"][number]).type.shape, symbols);
    const tensor = firstRows(got.get(name) as HostTensor, shape);
    const verdict = judge(limit, tensor);
    if (element === null || verdict.worst > worst) element = verdict.element && { ...verdict.element, output: name };
    worst = Math.max(worst, verdict.worst);
    if (verdict.failed > 0)
      problems.push(`${verdict.failed} of ${verdict.total} elements of ${name} are beyond their bound`);
    exact.push(...(exactBits(limit, tensor) ?? []));
    if (options.detail) outputs.push({ name, shape, ...deviations(limit, tensor) });
  }
  const status = problems.length === 0 ? "passed" : "failed";
  return {
    ...describe(device, program, run, options),
    status,
    worst,
    element,
    reason: problems.length === 0 ? null : problems.join("; "),
    ...explained(plan, symbols),
    wgsl: options.shaders ? (executable.shaders?.(symbols) ?? []).map(({ source }) => source) : [],
    seconds,
    digest: await digestOf(exact),
    ...(options.detail ? { outputs } : {}),
  };
}

async function readOutputs(executable: Executable): Promise<Map<string, HostTensor>> {
  const got = new Map<string, HostTensor>();
  for (const name of Object.keys(executable.graph.outputs)) got.set(name, await executable.read(name));
  return got;
}

/** What is wrong with the same run in the way that repeated runs take, from the same inputs and states. */
async function replayed(
  executable: Executable,
  plan: Plan,
  { symbols }: CaseRun,
  inputs: Readonly<Record<string, HostTensor>>,
  allowed: ReadonlyMap<string, Allowed>,
): Promise<string[]> {
  const { graph } = plan;
  for (const { name, role, type } of graph.values) {
    if (role === "state") executable.write(name, inputs[name] ?? zeros(type, graph.symbols));
    else if (role === "input") executable.write(name, inputs[name] as HostTensor);
  }
  executable.replay?.(symbols);
  const got = await readOutputs(executable);
  const problems = ((await executable.damage?.()) ?? []).map((name) => `replayed, it wrote past the end of ${name}`);
  for (const [name, limit] of allowed) {
    const { type } = graph.values[graph.outputs[name] as ValueId] as Graph["values"][number];
    const { failed, total } = judge(limit, firstRows(got.get(name) as HostTensor, concreteShape(type.shape, symbols)));
    if (failed > 0) problems.push(`replayed, ${failed} of ${total} elements of ${name} are beyond their bound`);
  }
  return problems;
}

/** The rows of a result that a run has: storage is laid out for the largest run. */
export function firstRows(tensor: HostTensor, shape: readonly number[]): HostTensor {
  const [rows, width] = shapeRows(shape);
  if (!isDense(tensor)) return rows < tensor.shape[0] ? sliceRows(tensor, 0, rows) : tensor;
  return { dtype: tensor.dtype, shape, data: tensor.data.subarray(0, rows * width) };
}

function explained(plan: Plan, symbols: Symbols): { kernels: string[]; explanation: string } {
  const choices = plan.buckets[bucketFor(plan, symbols)]?.choices ?? [];
  return {
    kernels: choices.map(({ kernel }) => kernel.id),
    explanation: choices.map(({ explanation }) => showExplanation(explanation)).join("\n"),
  };
}

function describe(device: Device, program: CaseProgram, run: CaseRun, { tier = null, seed }: RunCasesOptions) {
  const { backend } = device.info;
  const parts = [
    `fewbit validate --backend ${backend}`,
    ...(tier === null ? [] : [`--tier ${tier}`]),
    `--case "${run.id}"`,
  ];
  if (seed !== undefined) parts.push(`--seed ${seed}`);
  return { id: run.id, op: program.op, format: program.format, backend, tier, rerun: parts.join(" ") };
}

function describeError(
  device: Device,
  program: CaseProgram,
  run: CaseRun,
  error: FewbitError,
  options: RunCasesOptions,
): CaseResult {
  const unsupported = error.code === "plan/no-kernel";
  return {
    ...describe(device, program, run, options),
    status: unsupported ? "unsupported" : "failed",
    worst: unsupported ? 0 : Number.POSITIVE_INFINITY,
    element: null,
    reason: error.message,
    kernels: [],
    explanation: error.message,
    wgsl: [],
    seconds: 0,
    digest: null,
  };
}

/** SHA-256 in hexadecimal; null of nothing. */
async function digestOf(parts: readonly Uint8Array[]): Promise<string | null> {
  if (parts.length === 0) return null;
  const bytes = new Uint8Array(await new Blob(parts as Uint8Array<ArrayBuffer>[]).arrayBuffer());
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
