import type { Capabilities } from "../backends/backend.js";
import { openTrace } from "../backends/trace/device.js";
import { WEBGPU_KERNELS } from "../backends/webgpu/kernels/table.js";
import { outlineModel } from "../models/outline.js";
import type { Plan } from "../plan/plan.js";
import { Device } from "../runtime/device.js";

/** A kernel that a device with every feature would run for a model and this one cannot. */
export interface MissingKernel {
  readonly kernel: string;
  /** What runs in its place. */
  readonly instead: string;
  /** What the device lacks, in the kernel's words. */
  readonly reason: string;
  /** Steps of all buckets that it concerns. */
  readonly steps: number;
  /** How much longer these steps are estimated to take; the estimate is the planner's roofline. */
  readonly slowdown: number;
}

/** A GPU with everything that a kernel of the table can ask for. */
const EVERYTHING = {
  features: [
    "shader-f16",
    "subgroups",
    "timestamp-query",
    "chromium-experimental-subgroup-matrix",
    "subgroup-matrix-f16-f32-16x16x16",
  ],
  workgroupMemory: 65536,
  maxInvocations: 1024,
  subgroupSize: [32, 32],
} as const;

/** What a WebGPU device goes without for the model that `config` (its parsed config.json) describes. Runs nothing. */
export function missingKernels(
  device: Capabilities,
  config: Readonly<Record<string, unknown>>,
  quantize: string,
): MissingKernel[] {
  const best: Capabilities = {
    ...device,
    features: new Set([...device.features, ...EVERYTHING.features]),
    workgroupMemory: Math.max(device.workgroupMemory, EVERYTHING.workgroupMemory),
    maxInvocations: Math.max(device.maxInvocations, EVERYTHING.maxInvocations),
    subgroupSize: EVERYTHING.subgroupSize,
  };
  const [here, there] = [device, best].map((capabilities) => planOn(capabilities, config, quantize)) as [Plan, Plan];
  const found = new Map<string, { kernel: string; instead: string; reason: string; steps: number; times: number[] }>();
  for (const [b, bucket] of here.buckets.entries()) {
    for (const [i, { kernel, explanation }] of bucket.choices.entries()) {
      const wanted = there.buckets[b]?.choices[i]?.explanation;
      if (wanted === undefined || wanted.kernel === kernel.id) continue;
      const reason = explanation.rejected.find(({ id }) => id === wanted.kernel)?.reason ?? "";
      const key = `${wanted.kernel}\n${kernel.id}\n${reason}`;
      const entry = found.get(key) ?? { kernel: wanted.kernel, instead: kernel.id, reason, steps: 0, times: [0, 0] };
      const [mine, its] = entry.times as [number, number];
      found.set(key, {
        ...entry,
        steps: entry.steps + 1,
        times: [mine + explanation.microseconds, its + wanted.microseconds],
      });
    }
  }
  return [...found.values()].map(({ times, ...entry }) => ({
    ...entry,
    slowdown: (times[0] as number) / (times[1] as number),
  }));
}

function planOn(capabilities: Capabilities, config: Readonly<Record<string, unknown>>, quantize: string): Plan {
  const device = new Device(openTrace({ capabilities, kernels: WEBGPU_KERNELS, name: "a WebGPU device" }));
  return outlineModel(config, { device, quantize }).plan;
}
