import { expect, test } from "vitest";
import type { Capabilities } from "../../src/backends/backend.js";
import { FORMATS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor } from "../../src/formats/tensor.js";
import type { DenseTensor, HostTensor } from "../../src/ir/tensor.js";
import { loadModel } from "../../src/models/model.js";
import { open } from "../../src/runtime/device.js";
import { deviations, exactBits, judge } from "../../src/validate/bounds-judge.js";
import { caseTable, selectCases } from "../../src/validate/cases.js";
import { randomTensor } from "../../src/validate/cases-random.js";
import { diffReports } from "../../src/validate/diff.js";
import { logitDifferences } from "../../src/validate/logits.js";
import { missingKernels } from "../../src/validate/missing.js";
import { type CaseResult, runCases } from "../../src/validate/run.js";
import { makeReport, ReportDraft, validate } from "../../src/validate/run-tiers.js";
import { TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

const f32 = (...data: number[]): DenseTensor => ({ dtype: "f32", shape: [data.length], data: Float32Array.from(data) });
const ABOUT = { fewbit: "0.0.0", host: "test", created: "2026-01-01T00:00:00Z" };

test("errors are signed units in the last place, and fractions of the bound", () => {
  const values = Float64Array.of(1, -1.5, 3, 0.1, Number.NaN);
  const error = new Float64Array(5).fill(2 ** -20);
  const got = f32(1 + 2 ** -23, -1.5 - 2 ** -22, 3, 0.1, Number.NaN);
  const near = { kind: "near", shape: [5], values, error } as const;
  const { ulps, fractions } = deviations(near, got);
  // From 1 to 2 an ulp of float32 is 2^-23; 0.1 is no float32, so what is nearest to it is off by less than half of one.
  expect([...ulps.slice(0, 3)]).toEqual([1, -2, 0]);
  expect(Math.abs(ulps[3] as number)).toBeGreaterThan(0);
  expect(Math.abs(ulps[3] as number)).toBeLessThan(0.5);
  expect(ulps[4]).toBe(0);
  expect(Math.max(...fractions)).toBe(judge(near, got).worst);
  expect(fractions[0]).toBe(2 ** -3);
});

test("a stored tensor's errors are those of what it decodes to", () => {
  const tensor = randomTensor(FORMATS.int8, [3, 64], 5);
  const qdata = tensor.qdata.slice();
  qdata[0] = (qdata[0] as number) ^ 1;
  const got: QuantizedTensor = { ...tensor, qdata };
  const { ulps, fractions } = deviations({ kind: "equal", tensor }, got);
  expect(ulps).toHaveLength(3 * 64);
  const differs = [...dequantize(got)].map((value, i) => value !== dequantize(tensor)[i]);
  expect([...ulps].map((value) => value !== 0)).toEqual(differs);
  expect(differs.filter(Boolean)).toHaveLength(1);
  expect(fractions[differs.indexOf(true)]).toBe(Number.POSITIVE_INFINITY);
});

test("only results with one right answer have exact bits, without what lies behind the last code", () => {
  const near = { kind: "near", shape: [1], values: Float64Array.of(1), error: Float64Array.of(1) } as const;
  expect(exactBits(near, f32(1))).toBeNull();
  const tensor = randomTensor(FORMATS.mxfp4, [3, 32], 2);
  const error = new Float64Array(3 * 32);
  expect(exactBits({ kind: "stored", tensor, error: error.map(() => 1) }, tensor)).toBeNull();
  const bits = exactBits({ kind: "stored", tensor, error }, tensor);
  // Three scales of 8 bits fill three quarters of a word.
  const scales = (tensor.scales[0] as Uint32Array).slice();
  scales[0] = (scales[0] as number) ^ 0xff000000;
  expect(exactBits({ kind: "equal", tensor }, { ...tensor, scales: [scales] })).toEqual(bits);
  scales[0] = (scales[0] as number) ^ 1;
  expect(exactBits({ kind: "equal", tensor }, { ...tensor, scales: [scales] })).not.toEqual(bits);
});

test("every quantize case has a digest, which a changed input changes, and a difference of reports names", async () => {
  await using device = await open({ prefer: ["reference"] });
  const programs = selectCases(caseTable(), { quick: true, ops: ["quantize", "rmsnorm"] });
  const run = async (tamper?: (name: string, tensor: HostTensor) => HostTensor) => {
    const results: CaseResult[] = [];
    for await (const result of runCases(device, programs, tamper ? { tamper } : {})) results.push(result);
    return results;
  };
  const [first, second] = [await run(), await run()];
  // What a norm or an activation has made has a tolerance, and so have its codes.
  const exact = ({ id }: CaseResult) => /^quantize\/.*\/values\//.test(id);
  for (const [i, result] of first.entries()) {
    const { digest } = result;
    if (exact(result)) expect(digest).toMatch(/^[0-9a-f]{64}$/);
    else expect(digest).toBeNull();
    expect(second[i]?.digest).toBe(digest);
  }
  const negated = await run((_, tensor) => {
    const { data, ...rest } = tensor as DenseTensor;
    return data instanceof Float32Array ? { ...rest, data: data.map((value) => -2.5 * value) } : tensor;
  });
  for (const [i, result] of negated.entries()) if (exact(result)) expect(result.digest).not.toBe(first[i]?.digest);
  const report = await makeReport({ backends: ["reference"], selection: { quick: true, ops: ["quantize"] } }, ABOUT);
  const [one] = report.results as [CaseResult];
  const other = { ...report, results: [{ ...one, digest: "0".repeat(64) }, ...report.results.slice(1)] };
  expect(diffReports(report, other).details).toMatchObject([{ id: one.id, changes: ["stored bits differ"] }]);
  // Reports from before digests say nothing about bits.
  const { digest: _, ...old } = one;
  expect(diffReports({ ...report, results: [old as CaseResult] }, { ...report, results: [one] }).same).toBe(1);
});

test("a validation that skips what was done completes the report of one that stopped", async () => {
  const options = { backends: ["reference" as const], selection: { quick: true, ops: ["rmsnorm", "last_row"] } };
  const whole = await makeReport(options, ABOUT);
  const draft = new ReportDraft({ ...ABOUT, seed: whole.seed });
  for await (const event of validate(options)) {
    draft.add(event);
    if (draft.results.length === 4) break;
  }
  const done = new Set(draft.results.map(({ id }) => id));
  const skip = (device: string, id: string) => device === "reference" && done.has(id);
  for await (const event of validate({ ...options, skip })) draft.add(event);
  const untimed = ({ seconds: _, ...result }: CaseResult) => result;
  const report = draft.report(whole.seconds);
  expect(report.results.map(untimed)).toEqual(whole.results.map(untimed));
  expect({ ...report, results: [] }).toEqual({ ...whole, results: [] });
});

const PLAIN: Capabilities = {
  features: new Set(),
  maxBinding: 2 ** 27,
  maxBuffer: 2 ** 28,
  workgroupMemory: 16384,
  maxInvocations: 256,
  maxWorkgroupsPerDimension: 65535,
  maxStorageBuffers: 8,
  subgroupSize: [0, 0],
  bandwidth: 1e12,
  flops: 2e13,
  dispatchSeconds: 2e-6,
};

test("what a device goes without is named with its reason; a device with everything goes without nothing", () => {
  const missing = missingKernels(PLAIN, { ...TINY_CONFIG, hidden_size: 256, intermediate_size: 512 }, "int8dq");
  expect(missing.map(({ kernel, reason }) => [kernel, reason])).toContainEqual([
    "webgpu/linear/gemv_subgroup",
    "the device has no subgroups",
  ]);
  // Ranking takes the best of what is admitted, and a device with everything admits more.
  for (const { kernel, instead, reason, steps, slowdown } of missing) {
    expect(instead).not.toBe(kernel);
    expect(reason).not.toBe("");
    expect(steps).toBeGreaterThan(0);
    expect(slowdown).toBeGreaterThanOrEqual(1);
  }
  const everything: Capabilities = {
    ...PLAIN,
    features: new Set([
      "shader-f16",
      "subgroups",
      "timestamp-query",
      "chromium-experimental-subgroup-matrix",
      "subgroup-matrix-f16-f32-16x16x16",
    ]),
    workgroupMemory: 65536,
    maxInvocations: 1024,
    subgroupSize: [32, 32],
  };
  for (const quantize of ["int8dq", "int4wo-32"]) expect(missingKernels(everything, TINY_CONFIG, quantize)).toEqual([]);
});

test("logits are compared after the prompt and after every token, however the prompt is cut", async () => {
  await using device = await open({ prefer: ["reference"] });
  const load = (quantize: string, prefillChunk: number) => loadModel(tinyModel(), { device, quantize, prefillChunk });
  using same = await load("none", 16);
  using cut = await load("none", 3);
  using other = await load("int4wo-32", 16);
  const [prompt, tokens] = [
    [0, 70, 71, 72, 73, 74, 75],
    [80, 81],
  ];
  const compare = async (a: typeof same, b: typeof same) => {
    const found = [];
    for await (const difference of logitDifferences(a, b, prompt, tokens)) found.push(difference);
    return found;
  };
  const equal = await compare(same, cut);
  expect(equal.map(({ position }) => position)).toEqual([7, 8, 9]);
  // Both ran in chunks of three, so that they did the same arithmetic.
  expect(equal.map(({ worst }) => worst)).toEqual([0, 0, 0]);
  const logits = await same.logits([...prompt, ...tokens]);
  expect(equal.at(-1)?.range).toBe(Math.max(...logits.map(Math.abs)));
  const different = await compare(other, same);
  const ours = await other.logits([...prompt, ...tokens]);
  expect(different.at(-1)?.worst).toBe(Math.max(...ours.map((value, i) => Math.abs(value - (logits[i] as number)))));
  expect(different.at(-1)?.best).toEqual([ours.indexOf(Math.max(...ours)), logits.indexOf(Math.max(...logits))]);
});
