import { expect, test } from "vitest";
import { makeReport, type ValidateEvent, validate } from "../../src/validate/run-tiers.js";
import { failures, missing, QUICK, runOn } from "../support/cases.js";

const cases = QUICK.filter(({ tiered }) => tiered);

test.each(["portable", "subgroups"] as const)(
  "the %s tier computes what the default tier does",
  { timeout: 120_000 },
  async (tier) => {
    const results = await runOn({ prefer: ["webgpu"], tier }, cases);
    expect(failures(results)).toEqual([]);
    expect(missing(results)).toEqual([]);
    const kernels = new Set(results.flatMap((result) => result.kernels));
    expect(kernels.has("webgpu/linear/gemv_subgroup")).toBe(tier === "subgroups");
  },
);

test("a tier that the adapter does not offer is a named absence", async () => {
  const events: ValidateEvent[] = [];
  for await (const event of validate({
    backends: ["webgpu"],
    tiers: ["f16"],
    selection: { quick: true, ops: ["last_row"] },
  }))
    events.push(event);
  const [first] = events;
  // SwiftShader has no shader-f16; a machine with a GPU that has it runs the cases.
  if (first?.kind === "absent") expect(first.reason).toMatch(/has no shader-f16$/);
  else expect(events.filter((event) => event.kind === "result").length).toBeGreaterThan(0);
});

test("the feature that breaks a tier is found and named", { timeout: 120_000 }, async () => {
  // A driver whose subgroupAdd is wrong.
  const rewrite = (source: string) => source.replace(/= subgroupAdd\((\w+)\)/g, "= 2 * subgroupAdd($1)");
  const id = "linear/int8[1xall:f32]/n37_k256";
  const report = await makeReport(
    { backends: ["webgpu"], tiers: ["subgroups"], selection: { ids: [id] }, faults: { rewrite } },
    { fewbit: "test", host: "test", created: "now" },
  );
  expect(report.results.filter(({ status }) => status === "failed").map((result) => result.id)).toEqual([`${id}/T1`]);
  expect(report.culprits).toEqual([
    { backend: "webgpu", tier: "subgroups", feature: "subgroups", cases: [`${id}/T1`] },
  ]);
});
