import { withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, type Graph, GraphBuilder, stored } from "../../src/ir/graph.js";
import type { KernelRow, Requirement } from "../../src/plan/select.js";
import type { StepKind } from "../../src/plan/step.js";

const INT4 = withScale(FORMATS.int4_tinygemm, { block: [1, 32] });

/** A device of made-up kernels. */
export function device(kernels: readonly KernelRow[], maxBuffer = 1e9) {
  const none = { maxBinding: maxBuffer, workgroupMemory: 0, maxInvocations: 1, maxWorkgroupsPerDimension: 1 };
  const speeds = { bandwidth: 1e9, flops: 1e9, dispatchSeconds: 1e-6, maxStorageBuffers: 8 };
  return {
    kernels,
    capabilities: { features: new Set<string>(), maxBuffer, subgroupSize: [0, 0] as const, ...none, ...speeds },
  };
}
export const kernel = (
  id: string,
  kind: StepKind,
  efficiency = 1,
  requires: readonly Requirement[] = [],
): KernelRow => ({
  id,
  kind,
  requires,
  efficiency: { bandwidth: efficiency, compute: efficiency },
});

/** out = relu(x W^T), as a graph and the device that can run it. */
export function small(): Graph {
  const g = new GraphBuilder({ T: 16 });
  const product = g.one(
    "linear",
    [g.input("x", dense("f32", ["T", 64])), g.weight("w", stored(INT4, [32, 64]))],
    {},
    "product",
  );
  g.output("out", g.one("unary", [product], { fn: "relu" }, "out"));
  return g.build();
}
