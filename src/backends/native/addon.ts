import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import { FewbitError } from "../../core/errors.js";
import type { Entry, NativeKernel } from "./kernel.js";

/** The interface that this file describes; the addon tells its own. */
const ADDON_ABI = 1;

/** A CUDA device as the addon sees it. Sizes in bytes, clocks in Hz, the bus in bits. */
export interface ProbedDevice {
  readonly name: string;
  readonly index: number;
  readonly major: number;
  readonly minor: number;
  readonly multiprocessors: number;
  readonly memory: number;
  readonly sharedMemory: number;
  readonly cache: number;
  readonly clock: number;
  readonly memoryClock: number;
  readonly busWidth: number;
}

export interface Probe {
  /** Versions as 1000 * major + 10 * minor; the driver's is 0 without one. */
  readonly driver: number;
  readonly runtime: number;
  /** What the runtime says against using it; empty when there are devices. */
  readonly status: string;
  readonly devices: readonly ProbedDevice[];
}

/** One launch of a program: an entry by name, buffers by number. */
export interface LaunchText {
  readonly entry: string;
  readonly label: string;
  readonly buffers: readonly number[];
  readonly args: readonly number[];
}

export interface BucketText {
  /** The largest symbols of the bucket: what a captured graph is laid out for. */
  readonly largest: readonly number[];
  /** Whether to replay its launches as one graph from the second run on. */
  readonly capture: boolean;
  readonly launches: readonly LaunchText[];
}

/** What is alive on a device. Pinned memory and events are kept for the next use. */
export interface Counters {
  readonly bytes: number;
  readonly buffers: number;
  readonly programs: number;
  readonly graphs: number;
  readonly reads: number;
  readonly pinnedBytes: number;
  readonly events: number;
}

/** A device of the addon. Every call may throw an Error with `cuda`, see `CudaFailure`; calls take effect in order. */
export interface AddonDevice {
  /** A zeroed buffer that begins on 256 bytes. */
  allocate(bytes: number): number;
  free(buffer: number): void;
  /** Copies the data before it returns. */
  write(buffer: number, at: number, data: ArrayBufferView): void;
  fill(buffer: number, at: number, words: number, word: number): void;
  read(buffers: readonly number[], at: readonly number[], bytes: readonly number[]): Promise<ArrayBuffer>;
  load(program: { readonly symbols: number; readonly buckets: readonly BucketText[] }): number;
  /** With `replay` as a captured graph, even if the bucket's runs are not. Returns the number of launches. */
  run(program: number, bucket: number, symbols: Uint32Array, replay: boolean): number;
  /** Seconds of every launch, as float64. */
  profile(program: number, bucket: number, symbols: Uint32Array): Promise<ArrayBuffer>;
  unload(program: number): void;
  counters(): Counters;
  /** The version of the cuBLASLt that was found (10000 * major + 100 * minor), or 0 and why there is none. */
  blas(): { readonly version: number; readonly reason: string };
  dispose(): void;
}

export interface Addon {
  readonly abi: number;
  readonly entries: readonly Entry[];
  /** What it was compiled for, e.g. `80-real 90a-real 80-virtual`. */
  readonly architectures: string;
  probe(): Probe;
  readonly Device: new (index: number) => AddonDevice;
}

/** What the addon puts on an error as `cuda`. */
export interface CudaFailure {
  /** `lost`: the error is sticky, nothing works on this device any more. */
  readonly kind: "error" | "memory" | "lost";
  readonly operation: string;
  readonly reason: string;
  readonly needed: number;
  readonly limit: number;
}

/** Where `npm run build:native` leaves the addon. */
export const ADDON_PATH = fileURLToPath(new URL("../../../native/build/Release/fewbit.node", import.meta.url));

/**
 * Loads the addon; it loads with and without a driver. Throws `device/unavailable` when it is not built or cannot be loaded,
 * and `build/addon-mismatch` when it does not fit the kernel table.
 */
export function loadAddon(kernels: readonly NativeKernel[], path: string = ADDON_PATH): Addon {
  if (!existsSync(path)) {
    throw new FewbitError(
      "device/unavailable",
      { backend: "cuda", reason: "the native addon is not built" },
      { hint: "npm run build:native builds it where a CUDA compiler (nvcc) is installed" },
    );
  }
  let addon: Addon;
  try {
    addon = createRequire(import.meta.url)(path) as Addon;
  } catch (cause) {
    const reason = `the native addon cannot be loaded: ${(cause as Error).message}`;
    throw new FewbitError("device/unavailable", { backend: "cuda", reason }, { cause });
  }
  checkAddon(addon, kernels);
  return addon;
}

/** Throws `build/addon-mismatch` with everything in which an addon and a kernel table differ. */
export function checkAddon(addon: Pick<Addon, "abi" | "entries">, kernels: readonly NativeKernel[]): void {
  const entries = [
    ...(addon.abi === ADDON_ABI ? [] : [`interface ${addon.abi} instead of ${ADDON_ABI}`]),
    ...mismatches(addon.entries, kernels),
  ];
  if (entries.length > 0) {
    throw new FewbitError("build/addon-mismatch", { entries }, { hint: "npm run build:native builds it anew" });
  }
}

function mismatches(has: readonly Entry[], kernels: readonly NativeKernel[]): string[] {
  const versions = new Map(has.map(({ name, abi }) => [name, abi]));
  const needed = new Map(kernels.flatMap((kernel) => kernel.entries.map(({ name, abi }) => [name, abi] as const)));
  return [...needed].flatMap(([name, abi]) => {
    const built = versions.get(name);
    if (built === undefined) return [`${name} is missing`];
    return built === abi ? [] : [`${name} has version ${built} instead of ${abi}`];
  });
}

/** An error of the addon as one of ours; anything else passes through. */
export function codedError(error: unknown): unknown {
  const failure = (error as { cuda?: CudaFailure } | null)?.cuda;
  if (failure === undefined) return error;
  const { kind, operation, reason, needed, limit } = failure;
  if (kind === "lost") return new FewbitError("device/lost", { reason: `${operation}: ${reason}` }, { cause: error });
  if (kind === "memory") return new FewbitError("plan/memory", { what: operation, needed, limit }, { cause: error });
  return new FewbitError("device/error", { operation, reason }, { cause: error });
}
