import { expect, test } from "vitest";
import { failures, missing, QUICK, runOn } from "../support/cases.js";

const linear = QUICK.filter(({ op }) => op === "linear");
const count = linear.reduce((sum, { runs }) => sum + runs.length, 0);

test(`linear on the reference: ${count} cases`, async () => {
  const results = await runOn({ prefer: ["reference"] }, linear);
  expect(failures(results)).toEqual([]);
  expect(missing(results)).toEqual([]);
  expect(results).toHaveLength(count);
});

test(`linear on WebGPU with default limits: ${count} cases`, { timeout: 240_000 }, async () => {
  const results = await runOn({ prefer: ["webgpu"], tier: "default" }, linear);
  expect(failures(results)).toEqual([]);
  expect(missing(results)).toEqual([]);
  expect(results).toHaveLength(count);
  const kernels = new Set(results.flatMap((result) => result.kernels));
  for (const kernel of ["webgpu/linear/gemv", "webgpu/linear/tile"]) expect(kernels).toContain(kernel);
});
