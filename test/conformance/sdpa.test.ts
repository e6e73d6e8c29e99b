import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openWebGpu, type WebGpuDevice } from "../../src/backends/webgpu/device.js";
import { evaluateSdpa, sdpaBound } from "../../src/ir/attention.js";
import type { Node } from "../../src/ir/graph.js";
import { KernelRunner, operandsOf, sdpaGraph, symbolsOf } from "../support/attention.js";
import { ATTENTION_CASES, type NamedCase } from "../support/attention-cases.js";

let device: WebGpuDevice;
let runner: KernelRunner;
/** All that the adapter has, for the kernel that needs matrix units. */
let full: WebGpuDevice;
let fullRunner: KernelRunner;
beforeAll(async () => {
  // WebGPU's default limits and no optional feature: what every other kernel must run with.
  device = await openWebGpu({ tier: "default" });
  runner = new KernelRunner(device);
  full = await openWebGpu({ tier: "f16" });
  fullRunner = new KernelRunner(full);
});
afterAll(async () => {
  await device[Symbol.asyncDispose]();
  await full[Symbol.asyncDispose]();
});

const MATRIX = "webgpu/sdpa/prefill_matrix";
const KERNELS = ["webgpu/sdpa/prefill", MATRIX, "webgpu/sdpa/decode", "webgpu/sdpa/decode_split"];

/** The case on the reference and on every kernel that takes it: the worst error in units of the bound. */
async function runCase(named: NamedCase): Promise<Record<string, number>> {
  const { setup } = named;
  const graph = sdpaGraph(setup);
  const node = graph.nodes[0] as Node<"sdpa">;
  const types = node.inputs.map((id) => (graph.values[id] as (typeof graph.values)[number]).type);
  const symbols = symbolsOf(named);
  const operands = operandsOf(graph, named);
  const values = node.inputs.map(
    (id) => operands.get(graph.values[id]?.name as string) as NonNullable<ReturnType<typeof operands.get>>,
  );
  const { value, bound } = sdpaBound(values, types, node.attrs, symbols);
  const worst = (out: ArrayLike<number>): number => {
    expect(out.length).toBe(value.length);
    let most = 0;
    for (let i = 0; i < out.length; i++) {
      const error = Math.abs((out[i] as number) - (value[i] as number));
      if (error === 0) continue;
      most = Math.max(most, Number.isNaN(error) ? Number.POSITIVE_INFINITY : error / (bound[i] as number));
    }
    return most;
  };
  const found: Record<string, number> = { reference: worst(evaluateSdpa(values, types, node.attrs, symbols).data) };
  for (const id of KERNELS) {
    // A kernel is built for a bucket of lengths: few pipelines, and rows that a run leaves idle.
    const bucket = [1, 4, 8, 32].find((tokens) => named.tokens <= tokens) ?? (graph.symbols.T as number);
    const tokens = Math.min(
      id === "webgpu/sdpa/prefill" || id === MATRIX ? Number.POSITIVE_INFINITY : bucket,
      graph.symbols.T as number,
    );
    const largest = { ...graph.symbols, T: tokens };
    const on = id === MATRIX ? fullRunner : runner;
    if (on.unmet(id, graph, largest) !== null) continue;
    const { out, damaged } = await on.run(id, graph, operands, symbols, largest);
    expect(damaged, `${id}: words changed outside its output`).toBe(0);
    found[id] = worst(out);
  }
  return found;
}

describe.each(ATTENTION_CASES)("$name", (named) => {
  test("within the bound", async () => {
    const found = await runCase(named);
    if (process.env.SDPA_RATIOS) console.log(named.name, JSON.stringify(found));
    expect(Object.keys(found).length).toBeGreaterThan(1);
    for (const [id, ratio] of Object.entries(found)) expect(ratio, id).toBeLessThanOrEqual(1);
  });
});
