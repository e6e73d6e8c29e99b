import { describe, expect, test } from "vitest";
import type { Capabilities } from "../../src/backends/backend.js";
import { BuildContext } from "../../src/backends/webgpu/kernel.js";
import { SDPA_KERNELS } from "../../src/backends/webgpu/kernels/sdpa.js";
import { matrixParts } from "../../src/backends/webgpu/kernels/sdpa-matrix.js";
import { withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, stored } from "../../src/ir/graph.js";
import { fuse } from "../../src/plan/fuse.js";
import { planMemory } from "../../src/plan/memory.js";
import { select } from "../../src/plan/select.js";
import { BoundStep } from "../../src/plan/step.js";
import { type AttentionSetup, sdpaGraph } from "../support/attention.js";

const FEATURES = ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix"];
const UNIT = "subgroup-matrix-f16-f32-16x16x16";
const device: Capabilities = {
  features: new Set([...FEATURES, UNIT]),
  maxBinding: 2 ** 30,
  maxBuffer: 2 ** 30,
  workgroupMemory: 49152,
  maxInvocations: 1024,
  maxWorkgroupsPerDimension: 65535,
  maxStorageBuffers: 10,
  subgroupSize: [32, 32],
  bandwidth: 3e12,
  flops: 6e13,
  dispatchSeconds: 5e-6,
};
const llama: AttentionSetup = {
  name: "llama",
  heads: 32,
  kvHeads: 8,
  size: 128,
  kv: FORMATS.bf16,
  capacity: 1024,
  most: [512, 1024],
  attrs: { causal: true },
};
const kernel = SDPA_KERNELS.find(({ id }) => id === "webgpu/sdpa/prefill_matrix") as (typeof SDPA_KERNELS)[number];

function boundStep(setup: AttentionSetup, tokens = setup.most[0]): BoundStep {
  const graph = sdpaGraph(setup);
  const [step] = fuse(graph);
  return new BoundStep(graph, step as NonNullable<typeof step>, { ...graph.symbols, T: tokens });
}

function refusal(setup: Partial<AttentionSetup>, on: Partial<Capabilities> = {}, tokens?: number): string | null {
  const bound = boundStep({ ...llama, ...setup }, tokens);
  for (const { unmet } of kernel.requires) {
    const reason = unmet(bound, { ...device, ...on });
    if (reason !== null) return reason;
  }
  return null;
}

function source(setup: Partial<AttentionSetup>): string {
  const bound = boundStep({ ...llama, ...setup });
  const { graph } = bound;
  const memory = planMemory(graph, [bound.step], graph.symbols);
  return kernel.build(new BuildContext(bound, memory, device, graph.symbols))[0]?.wgsl as string;
}

describe("the matrix tier of attention", () => {
  test("takes a prompt of Llama's shape, and selection prefers it", () => {
    expect(refusal({})).toBeNull();
    expect(select(boundStep(llama), SDPA_KERNELS, device).kernel.id).toBe(kernel.id);
  });

  test.each([
    ["float32 keys", refusal({ kv: FORMATS.f32 }), "at most 20 significant bits, for f16 parts: theirs may have 24"],
    ["float zero points", refusal({ kv: FORMATS.int4_tinygemm }), "any number of them"],
    ["few rows", refusal({}, {}, 3), "at least 16 query rows (tokens x heads): it has 12"],
    ["an odd head", refusal({ size: 72 }), "a multiple of 16 up to 128: it is 72"],
    ["a large head", refusal({ size: 256 }), "a multiple of 16 up to 128: it is 256"],
    ["little memory", refusal({}, { workgroupMemory: 16384 }), "bytes of workgroup memory: 16384 are allowed"],
    ["no matrix unit", refusal({}, { features: new Set(FEATURES) }), "no f16 to f32 16x16x16"],
    ["subgroups of another size", refusal({}, { subgroupSize: [8, 32] }), "must have 32 invocations: 8 to 32"],
    ...FEATURES.map((feature) => [
      `no ${feature}`,
      refusal({}, { features: new Set([...FEATURES, UNIT].filter((name) => name !== feature)) }),
      `the device has no ${feature}`,
    ]),
  ])("refuses %s in words", (_, reason, words) => expect(reason).toContain(words));

  test("its text enables what it uses", () => {
    for (const setup of [
      {},
      { size: 16, kv: FORMATS.int8 },
      { size: 96, kv: withScale(FORMATS.uint4, { block: [1, 32] }), sinks: true },
    ]) {
      const text = source(setup);
      expect(text).toMatch(/^enable f16;\nenable subgroups;\nenable chromium_experimental_subgroup_matrix;\n/);
      expect(text).toContain("subgroupMatrixMultiplyAccumulate");
    }
  });

  test("operands of more than 11 bits, or whose scale changes along a row, take two parts", () => {
    const { bf16, f16, int8, float8_e4m3, f32, uint4, nf4 } = FORMATS;
    const of = (format: typeof f32) => matrixParts(stored(format, [32, 64]));
    expect([bf16, f16, int8, float8_e4m3].map(of)).toEqual([1, 1, 1, 1]);
    expect([f32, withScale(uint4, { block: [1, 32] }), withScale(nf4, { block: [1, 64] })].map(of)).toEqual([2, 2, 2]);
    expect(matrixParts(dense("f32", [32, 64]))).toBe(2);
    expect(source({ kv: withScale(uint4, { block: [1, 32] }) })).toContain("tile_lo");
    expect(source({ kv: FORMATS.bf16 })).not.toContain("tile_lo");
  });
});
