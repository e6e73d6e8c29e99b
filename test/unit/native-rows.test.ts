import { expect, test } from "vitest";
import { cudaCapabilities, H100 } from "../../src/backends/native/capabilities.js";
import { BuildContext, type NativeDispatch, type NativeKernel } from "../../src/backends/native/kernel.js";
import { GENERAL_KERNELS } from "../../src/backends/native/kernels/general-table.js";
import { ROWS_KERNELS } from "../../src/backends/native/kernels/rows-table.js";
import { FewbitError } from "../../src/core/errors.js";
import { type Format, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, type Graph, GraphBuilder } from "../../src/ir/graph.js";
import { makePlan, type Plan } from "../../src/plan/plan.js";
import { BoundStep } from "../../src/plan/step.js";
import { caseTable } from "../../src/validate/cases.js";

const hopper = cudaCapabilities(H100);
const every = [...ROWS_KERNELS, ...GENERAL_KERNELS];

/** A graph's plan, or null when none of the kernels takes one of its steps. */
function planned(graph: Graph, kernels: readonly NativeKernel[], capabilities = hopper): Plan | null {
  try {
    return makePlan(graph, { kernels, capabilities });
  } catch (error) {
    if (error instanceof FewbitError && error.code === "plan/no-kernel") return null;
    throw error;
  }
}

function dispatches(plan: Plan): NativeDispatch[] {
  return plan.buckets.flatMap(({ symbols, choices }) =>
    choices.flatMap(({ kernel }, i) => {
      const bound = new BoundStep(plan.graph, plan.steps[i] as Plan["steps"][number], symbols);
      return (kernel as NativeKernel).build(new BuildContext(bound, plan.memory, hopper, plan.graph.symbols));
    }),
  );
}

const kernelOf = (plan: Plan | null) => plan?.buckets[0]?.choices[0]?.kernel.id;

function quantize(format: Format, k: number, attrs: { perTensorScale?: number } = {}, normed = false, rows = 8): Graph {
  const g = new GraphBuilder({ T: rows });
  let x = g.input("x", dense("f32", ["T", k]));
  if (normed) x = g.one("rmsnorm", [x, g.weight("gain", dense("f32", [k]))], { eps: 1e-5 });
  g.output("y", g.one("quantize", [x], { format, ...attrs }));
  return g.build();
}

test("what a row kernel takes is described to it as to the general one, and it is the one that is chosen", () => {
  const kinds = new Set<string>(ROWS_KERNELS.map(({ kind }) => kind));
  let compared = 0;
  for (const row of caseTable()) {
    const { graph } = row.build();
    const fast = planned(graph, ROWS_KERNELS);
    if (fast === null || fast.steps.length !== 1 || !kinds.has(fast.steps[0]?.kind as string)) continue;
    const general = planned(graph, GENERAL_KERNELS) as Plan;
    if (general.steps.length !== 1) continue;
    const [ours, theirs] = [dispatches(fast), dispatches(general)];
    for (const [i, { args, bindings }] of ours.entries()) {
      const other = theirs[i] as NativeDispatch;
      // A quantize in one pass has no scratch, so its buffers are numbered otherwise.
      const passes = ours.length > 1;
      expect(bindings).toEqual(other.bindings.filter(({ kind }) => passes || kind !== "scratch"));
      if (bindings.length === other.bindings.length) expect(args, row.id).toEqual(other.args);
      else expect(args.length, row.id).toBe(other.args.length);
    }
    expect(kernelOf(planned(graph, every)), row.id).toBe(kernelOf(fast));
    compared++;
  }
  expect(compared).toBeGreaterThan(100);
});

test("rows that do not fit registers, and blocks that depend on others, stay with the general kernels", () => {
  const { bf16, int8, nf4, nvfp4, int3, mxfp8_e4m3 } = FORMATS as Record<string, Format>;
  const of = (format: Format | undefined, k: number, attrs = {}, normed = false) =>
    kernelOf(planned(quantize(format as Format, k, attrs, normed), every));
  expect(of(bf16, 65536)).toBe("cuda/quantize/rows");
  expect(of(bf16, 65536, {}, true)).not.toBe("cuda/quantize/rows");
  expect(of(int8, 32768)).toBe("cuda/quantize/rows");
  expect(of(int8, 32772)).toBe("cuda/quantize");
  expect(of(int8, 4098)).toBe("cuda/quantize");
  expect(of(int3, 4096)).toBe("cuda/quantize");
  expect(of(nf4, 4096)).toBe("cuda/quantize");
  expect(of(nvfp4, 4096)).toBe("cuda/quantize");
  expect(of(nvfp4, 4096, { perTensorScale: 0.01 })).toBe("cuda/quantize/rows");
  expect(of(mxfp8_e4m3, 4096, {}, true)).toBe("cuda/quantize/rows");
  expect(of(withScale(int8 as Format, { block: [2, "all"] }), 4096)).toBe("cuda/quantize");
});

test("the one scale of many rows takes a pass over them, of one row none", () => {
  const tensor = withScale(FORMATS.float8_e4m3 as Format, { block: ["all", "all"] });
  const of = (rows: number, normed: boolean) =>
    kernelOf(makePlan(quantize(tensor, 4096, {}, normed, rows), { kernels: every, capabilities: hopper }));
  for (const normed of [false, true]) {
    expect(of(8, normed)).toBe("cuda/quantize/tensor");
    expect(of(1, normed)).toBe("cuda/quantize/rows");
  }
  expect(kernelOf(planned(quantize(tensor, 65536), every))).toBe("cuda/quantize");
});

test("a draw by a cluster needs compute capability 9", () => {
  const g = new GraphBuilder({});
  const logits = g.input("logits", dense("f32", [1, 4096]));
  const [sampled] = g.op(
    "sample",
    [logits, g.input("settings", dense("u32", [5])), g.state("ids", dense("i32", [4]))],
    {},
  );
  g.output("sampled", sampled as number);
  const graph = g.build();
  expect(kernelOf(planned(graph, every))).toBe("cuda/sample/cluster");
  expect(kernelOf(planned(graph, every, cudaCapabilities({ ...H100, major: 8, minor: 0 })))).toBe("cuda/sample");
});

test("norms whose weights an earlier step may make are left to kernels that wait before they read them", () => {
  const normed = (made: boolean, format: Format | null) => {
    const g = new GraphBuilder({ T: 8 });
    const gain = g.weight("gain", dense("f32", [64]));
    const weight = made ? g.one("unary", [gain], { fn: "silu" }) : gain;
    const y = g.one("rmsnorm", [g.input("x", dense("f32", ["T", 64])), weight], { eps: 1e-5 });
    g.output("y", format === null ? y : g.one("quantize", [y], { format }));
    return planned(g.build(), every)?.buckets[0]?.choices.at(-1)?.kernel.id;
  };
  expect([normed(false, null), normed(true, null)]).toEqual(["cuda/rmsnorm/rows", "cuda/rmsnorm"]);
  expect([normed(false, FORMATS.bf16), normed(true, FORMATS.bf16)]).toEqual(["cuda/quantize/rows", "cuda/quantize"]);
});
