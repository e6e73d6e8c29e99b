import type { Graph } from "../ir/graph.js";
import type { HostTensor, TensorRows } from "../ir/tensor.js";
import type { Plan } from "../plan/plan.js";
import type { KernelRow } from "../plan/select.js";

/** What a device can do, as kernel requirements and the memory planner ask for it. Sizes in bytes. */
export interface Capabilities {
  /** Feature names in the backend's own words, e.g. `shader-f16`, `subgroups`. */
  readonly features: ReadonlySet<string>;
  readonly maxBinding: number;
  readonly maxBuffer: number;
  readonly workgroupMemory: number;
  readonly maxInvocations: number;
  readonly maxWorkgroupsPerDimension: number;
  readonly maxStorageBuffers: number;
  /** Bytes that everything on the device may take together, where that is known. */
  readonly memory?: number;
  /** The sizes a subgroup may have; [0, 0] without subgroups. */
  readonly subgroupSize: readonly [min: number, max: number];
  /** Figures the roofline ranks with: bytes/s, f32 operations/s, seconds per dependent dispatch. */
  readonly bandwidth: number;
  readonly flops: number;
  readonly dispatchSeconds: number;
}

/** A device as people see it. */
export interface DeviceInfo {
  readonly backend: string;
  readonly name: string;
  readonly kind: "hardware" | "software" | "reference" | "injected" | "trace";
  /** Why this device was taken, in a sentence. */
  readonly reason: string;
  readonly detail: Readonly<Record<string, string>>;
}

/**
 * Supplies weights by name, whole or a few rows at a time. The next one is asked for when all rows of one were: a source may use the
 * same memory for all of them.
 */
export type WeightSource = (name: string) => HostTensor | TensorRows | Promise<HostTensor | TensorRows>;

export interface LoadOptions {
  readonly signal?: AbortSignal;
  /** Called after each weight with the bytes uploaded so far and in all. */
  readonly onProgress?: (done: number, total: number) => void;
  /** For validation: guard words after every buffer and a pattern in every activation; see `Executable.damage`. */
  readonly guard?: boolean;
  /** For validation: replaces the shader text of a kernel's dispatch, so that a fault can be put in. */
  readonly rewrite?: (source: string, kernel: string, step: number) => string;
}

/** What `guard` fills activations and guard words with: a NaN with a pattern, so that what was not written shows. */
export const GUARD_WORD = 0x7fc0beef;

/** One dispatch as a device runs it. */
export interface ShaderText {
  /** The index of its step in the plan. */
  readonly step: number;
  readonly kernel: string;
  readonly source: string;
}

/** THE SEAM. Everything a backend offers; the planner sees only its kernel rows and capabilities. */
export interface BackendDevice extends AsyncDisposable {
  readonly info: DeviceInfo;
  readonly capabilities: Capabilities;
  readonly kernels: readonly KernelRow[];
  /** Live bytes held on the device for this device's programs. */
  readonly bytes: number;
  /** Resolves with the reason when the device is lost. */
  readonly lost: Promise<string>;
  load(plan: Plan, weights: WeightSource, options?: LoadOptions): Promise<Executable>;
}

/** Counts of one executable since it was loaded. */
export interface ExecutableStatistics {
  readonly submits: number;
  readonly dispatches: number;
  /** Host time spent encoding and submitting, in seconds. */
  readonly encodeSeconds: number;
}

/** A plan resident on a device. Calls take effect in order; only `read` waits for the device. */
export interface Executable extends Disposable {
  readonly graph: Graph;
  readonly statistics: ExecutableStatistics;
  /** Whether a run goes on after `submit` has returned. */
  readonly overlaps?: boolean;
  /** Writes an input or a state from its first element on. Throws `shape/mismatch`, `dtype/mismatch`. */
  write(name: string, tensor: HostTensor): void;
  /** Enqueues one run of every step with these symbol values. */
  submit(symbols: Readonly<Record<string, number>>): void;
  /**
   * For validation: `submit` in the way that repeated runs take, with grids laid out for the bucket's largest symbols. Absent where
   * all runs are alike.
   */
  replay?(symbols: Readonly<Record<string, number>>): void;
  /** Runs once and times it: seconds of each step, in order of the plan. Absent where nothing can be timed. */
  profile?(symbols: Readonly<Record<string, number>>): Promise<number[]>;
  /** Reads an output or a state as the last submitted run leaves it. */
  read(name: string): Promise<HostTensor>;
  /** The shader of every dispatch of a run with these symbols; absent where there are no shaders. */
  shaders?(symbols: Readonly<Record<string, number>>): readonly ShaderText[];
  /**
   * With `LoadOptions.guard`: the names of buffers whose guard words were changed since the last call. Activations are filled
   * with the pattern again. Absent where memory is not guarded.
   */
  damage?(): Promise<string[]>;
}
