import { expect, test } from "vitest";
import { OPS } from "../../src/ir/ops.js";
import { failures, missing, QUICK, runOn } from "../support/cases.js";

const others = QUICK.filter(({ op }) => op !== "linear");
const count = others.reduce((sum, { runs }) => sum + runs.length, 0);

/** Named absences: rules that only the host can carry out. */
const ABSENT = [
  "quantize codebook4",
  "quantize codebook4_1x2",
  "quantize codebook8",
  "quantize codebook8_1x4",
  "quantize int4_hqq",
  "quantize int4_sinq",
];

test("the quick table has every op", () => {
  expect([...new Set(QUICK.map(({ op }) => op))].sort()).toEqual(Object.keys(OPS).sort());
});

test(`other ops on the reference: ${count} cases`, async () => {
  const results = await runOn({ prefer: ["reference"] }, others);
  expect(failures(results)).toEqual([]);
  expect(missing(results)).toEqual([]);
});

test(`other ops on WebGPU with default limits: ${count} cases`, { timeout: 240_000 }, async () => {
  const results = await runOn({ prefer: ["webgpu"], tier: "default" }, others);
  expect(failures(results)).toEqual([]);
  expect(missing(results)).toEqual(ABSENT);
  expect(results).toHaveLength(count);
});
