import type { Capabilities } from "../backends/backend.js";
import { WEBGPU_KERNELS } from "../backends/webgpu/kernels/table.js";
import { FewbitError } from "../core/errors.js";
import type { Format } from "../formats/format.js";
import { dense, GraphBuilder, stored } from "../ir/graph.js";
import { makePlan } from "../plan/plan.js";

const LIMITS = {
  maxBinding: 2 ** 27,
  maxBuffer: 2 ** 28,
  workgroupMemory: 16384,
  maxInvocations: 256,
  maxWorkgroupsPerDimension: 65535,
  maxStorageBuffers: 8,
  bandwidth: 1e12,
  flops: 2e13,
  dispatchSeconds: 2e-6,
};

/** WebGPU's capability tiers as devices to plan for: the default limits, then with more and more features. */
export const TIERS: Readonly<Record<string, Capabilities>> = {
  "default limits": { ...LIMITS, features: new Set(), subgroupSize: [0, 0] },
  "+ subgroups": { ...LIMITS, features: new Set(["subgroups"]), subgroupSize: [32, 32] },
  "+ f16, subgroup matrix": {
    ...LIMITS,
    workgroupMemory: 49152,
    features: new Set([
      "subgroups",
      "shader-f16",
      "chromium-experimental-subgroup-matrix",
      "subgroup-matrix-f16-f32-16x16x16",
    ]),
    subgroupSize: [32, 32],
  },
};

/** The kernels that a linear of `format` would take on a device, for one row and for many: e.g. `gemv, tile`. */
export function linearKernels(format: Format, device: Capabilities): string {
  const kernels = [1, 128].map((rows) =>
    planned(device, (g) => {
      const x = g.input("x", dense("f32", [rows, 4096]));
      return g.one("linear", [x, g.weight("w", stored(format, [4096, 4096]))], {});
    }),
  );
  return [...new Set(kernels.map((id) => id.replace("webgpu/linear/", "")))].join(", ");
}

/** Whether a device can quantize to `format`, or `host`. */
export function quantizedOn(format: Format, device: Capabilities): string {
  const id = planned(device, (g) => g.one("quantize", [g.input("x", dense("f32", [1, 4096]))], { format }));
  return id === "none" ? "host" : "host, device";
}

function planned(device: Capabilities, build: (g: GraphBuilder) => number): string {
  const g = new GraphBuilder();
  try {
    g.output("y", build(g));
    const plan = makePlan(g.build(), { kernels: WEBGPU_KERNELS, capabilities: device });
    return plan.buckets[0]?.choices[0]?.kernel.id ?? "none";
  } catch (error) {
    if (error instanceof FewbitError && error.code === "plan/no-kernel") return "none";
    throw error;
  }
}
