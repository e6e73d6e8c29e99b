import type { Capabilities } from "../backend.js";
import type { ProbedDevice } from "./addon.js";

/** Dense bf16 tensor-core operations of a multiprocessor per clock, by compute capability; the newest one not above counts. */
const TENSOR_FLOPS: readonly (readonly [capability: number, flops: number])[] = [
  [120, 2048],
  [100, 8192],
  [90, 4096],
  [89, 1024],
  [86, 1024],
  [80, 2048],
];

/** Compute capabilities that kernels ask for with `sm>=N`. */
const LEVELS = [80, 89, 90, 100, 120] as const;

/** 10 * major + minor. */
export const capabilityOf = ({ major, minor }: Pick<ProbedDevice, "major" | "minor">): number => 10 * major + minor;

/** The lowest compute capability that kernels are built for. */
export const LOWEST = 80;

/**
 * Features whose kernels have not yet passed `fewbit validate` through the addon on a device. They are used where the environment
 * variable FEWBIT_CUDA_TRIAL names them.
 */
export const TRIALS = {
  blocks: "trial:blocks",
} as const;

/** The features that a list of names, separated by commas, puts on trial. Unknown names are left out. */
export function trialFeatures(names = ""): string[] {
  const asked = names.split(",");
  return Object.entries(TRIALS).flatMap(([name, feature]) => (asked.includes(name) ? [feature] : []));
}

/**
 * The compute capability of the code that a device of capability `capability` runs, of what an addon was compiled for (CMake's names: `80-real`,
 * `90a-real`, `80-virtual`): code of its own, of an older one of its generation, or what the driver makes of PTX. Code that is not `a` counts as 8.9 at most. 0 without any.
 */
export function codeFor(architectures: string, capability: number): number {
  const levels = architectures.split(/[ ;]+/).map((text) => {
    if (/^(native|all|all-major)$/.test(text)) return Math.min(capability, 89);
    const [, level, own, kind] = /^(\d+)(a?)(?:-(real|virtual))?$/.exec(text) ?? [];
    const code = Number(level ?? 0);
    const binary = kind !== "virtual" && Math.floor(code / 10) === Math.floor(capability / 10);
    const runs = own === "a" ? code === capability : code <= capability && (binary || kind !== "real");
    // From 9.0 on kernels use what only the architecture's own code has.
    return !runs ? 0 : own === "a" ? code : Math.min(code, 89);
  });
  return Math.max(...levels);
}

/** What a CUDA device can do with code of a compute capability. `flops` counts dense bf16 tensor cores; kernels without them reach a small part of it. */
export function cudaCapabilities(
  device: ProbedDevice,
  more: readonly string[] = [],
  code = capabilityOf(device),
): Capabilities {
  const capability = capabilityOf(device);
  const each = TENSOR_FLOPS.find(([least]) => capability >= least)?.[1] ?? 512;
  return {
    features: new Set([
      "cuda",
      `sm_${code}`,
      ...LEVELS.filter((level) => code >= level).map((level) => `sm>=${level}`),
      ...more,
    ]),
    // Nothing but memory limits a buffer.
    maxBinding: device.memory,
    maxBuffer: device.memory,
    memory: device.memory,
    workgroupMemory: device.sharedMemory,
    maxInvocations: 1024,
    maxWorkgroupsPerDimension: 2 ** 31 - 1,
    maxStorageBuffers: 64,
    subgroupSize: [32, 32],
    // Two transfers a clock. What programs reach is 0.92 of it on an H100.
    bandwidth: (2 * device.memoryClock * device.busWidth) / 8,
    flops: device.multiprocessors * device.clock * each,
    dispatchSeconds: 2e-6,
  };
}

/** An H100 SXM, for plans that are made without a device. */
export const H100: ProbedDevice = {
  name: "NVIDIA H100 80GB HBM3",
  index: 0,
  major: 9,
  minor: 0,
  multiprocessors: 132,
  memory: 85_029_158_912,
  sharedMemory: 232_448,
  cache: 52_428_800,
  clock: 1.98e9,
  memoryClock: 2.619e9,
  busWidth: 5120,
};
