import type {
  BackendDevice,
  Capabilities,
  DeviceInfo,
  Executable,
  LoadOptions,
  WeightSource,
} from "../backends/backend.js";
import { openReference } from "../backends/reference/device.js";
import { openWebGpu, type WebGpuOptions } from "../backends/webgpu/device.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { Symbols } from "../ir/evaluate.js";
import type { Graph } from "../ir/graph.js";
import type { HostTensor } from "../ir/tensor.js";
import { explainPlan, makePlan, type Plan, type PlanOptions } from "../plan/plan.js";
import type { Rejection } from "../plan/select.js";

/** The backends there are. `cuda` needs Node, the native addon (`npm run build:native`) and an NVIDIA GPU. */
export type BackendName = "webgpu" | "reference" | "cuda";

export interface OpenOptions extends WebGpuOptions {
  /** Backends in order of preference; the first that gives a device is taken. Default: webgpu. The reference is never implied. */
  readonly prefer?: readonly BackendName[];
}

/**
 * Opens a device. Throws `device/unavailable` with every backend's reason when none of `prefer` gives one; nothing else is
 * tried in their place.
 */
export async function open(options: OpenOptions = {}): Promise<Device> {
  const prefer = options.prefer ?? ["webgpu"];
  if (prefer.length === 0) {
    throw new FewbitError("argument/invalid", { name: "prefer", value: "[]", expected: "at least one backend" });
  }
  const notConsidered: Rejection[] = [];
  const failures: unknown[] = [];
  for (const name of prefer) {
    throwIfAborted(options.signal, "opening a device");
    try {
      return new Device(await openBackend(name, options), notConsidered);
    } catch (error) {
      const reason = whyAbsent(error);
      if (reason === null) throw error;
      notConsidered.push({ id: `${name}/*`, reason: `not considered: ${reason}` });
      failures.push(error);
    }
  }
  const reason = notConsidered.map(({ id, reason }) => `${id} ${reason}`).join("; ");
  const first = failures[0];
  // Asked for alone, an addon that does not fit is an error of its own.
  if (failures.length === 1 && first instanceof FewbitError && first.code === "build/addon-mismatch") throw first;
  const hint = first instanceof FewbitError ? first.hint : undefined;
  throw new FewbitError(
    "device/unavailable",
    { backend: prefer.join(" or "), reason },
    { cause: first, ...(hint === undefined ? {} : { hint }) },
  );
}

/** Why an error means that a backend is not here, or null when it means something else. */
export function whyAbsent(error: unknown): string | null {
  if (!(error instanceof FewbitError)) return null;
  if (error.code === "device/unavailable") return (error as FewbitError<"device/unavailable">).context.reason;
  return error.code === "build/addon-mismatch" ? error.message : null;
}

/** Opens a device of one backend. Throws `device/unavailable`, and for `cuda` also `build/addon-mismatch`. */
export async function openBackend(name: BackendName, options: OpenOptions = {}): Promise<BackendDevice> {
  if (name === "reference") return openReference();
  if (name === "webgpu") return openWebGpu(options);
  if (typeof process === "undefined" || process.versions?.node === undefined)
    throw new FewbitError("device/unavailable", {
      backend: name,
      reason: "it needs Node: addons do not load in a web page",
    });
  // Reached by import() alone: it is no part of what a web page loads.
  const { openCuda } = await import("../backends/native/device.js");
  return openCuda();
}

export interface CompileOptions extends LoadOptions, PlanOptions {
  /** Supplies the graph's weights by name. */
  readonly weights?: WeightSource | ReadonlyMap<string, HostTensor>;
}

/** A device of some backend. Disposing it disposes its programs. */
export class Device implements AsyncDisposable {
  readonly #backend: BackendDevice;
  readonly #notConsidered: readonly Rejection[];

  constructor(backend: BackendDevice, notConsidered: readonly Rejection[] = []) {
    this.#backend = backend;
    this.#notConsidered = notConsidered;
  }

  get info(): DeviceInfo {
    return this.#backend.info;
  }

  get capabilities(): Capabilities {
    return this.#backend.capabilities;
  }

  /** Live bytes that this device's programs hold. */
  get bytes(): number {
    return this.#backend.bytes;
  }

  /** Resolves with the reason when the device is lost. */
  get lost(): Promise<string> {
    return this.#backend.lost;
  }

  /** Decides how this device would run a graph, without loading anything. Throws as `makePlan`. */
  plan(graph: Graph, options: PlanOptions = {}): Plan {
    return makePlan(graph, this.#backend, { notConsidered: this.#notConsidered, ...options });
  }

  /** Plans a graph, uploads its weights and builds its kernels. Throws as `plan`, and `shader/compile`, `operation/aborted`. */
  async compile(graph: Graph, options: CompileOptions = {}): Promise<Program> {
    return this.load(this.plan(graph, options), options);
  }

  /** `compile` of a plan that was made before (by this device, or with changes to it). */
  async load(plan: Plan, options: CompileOptions = {}): Promise<Program> {
    const { weights } = options;
    const source: WeightSource = (name) => {
      const tensor = typeof weights === "function" ? weights(name) : weights?.get(name);
      if (tensor === undefined)
        throw new FewbitError("graph/invalid", { where: name, reason: "the weight was not given" });
      return tensor;
    };
    return new Program(plan, await this.#backend.load(plan, source, options));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#backend[Symbol.asyncDispose]();
  }
}

export interface RunOptions {
  readonly inputs?: Readonly<Record<string, HostTensor>>;
  readonly symbols?: Symbols;
  /** Names of the outputs to read back; default: all. */
  readonly outputs?: readonly string[];
  readonly signal?: AbortSignal;
}

/** A plan resident on a device. */
export class Program implements Disposable {
  readonly plan: Plan;
  /** The raw steps of a run, for callers that overlap them: `write`, `submit`, `read`. */
  readonly executable: Executable;

  constructor(plan: Plan, executable: Executable) {
    this.plan = plan;
    this.executable = executable;
  }

  /** Writes inputs, runs once, reads outputs. */
  async run(options: RunOptions = {}): Promise<Record<string, HostTensor>> {
    throwIfAborted(options.signal, "running a program");
    for (const [name, tensor] of Object.entries(options.inputs ?? {})) this.executable.write(name, tensor);
    this.executable.submit(options.symbols ?? {});
    const names = options.outputs ?? Object.keys(this.plan.graph.outputs);
    const tensors = await Promise.all(names.map((name) => this.executable.read(name)));
    throwIfAborted(options.signal, "running a program");
    return Object.fromEntries(names.map((name, i) => [name, tensors[i] as HostTensor]));
  }

  /** Why every step runs as it does, as text. */
  explain(): string {
    return explainPlan(this.plan);
  }

  [Symbol.dispose](): void {
    this.executable[Symbol.dispose]();
  }
}
