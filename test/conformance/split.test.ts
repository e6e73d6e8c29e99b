import { afterAll, beforeAll, expect, test } from "vitest";
import { recordDevice } from "../../src/backends/trace/record.js";
import { destroyDevice, requestGpu } from "../../src/backends/webgpu/adapter.js";
import { open } from "../../src/runtime/device.js";
import { caseTable } from "../../src/validate/cases.js";
import { makeOracle, runCases } from "../../src/validate/run.js";
import { failures } from "../support/cases.js";

let gpu: GPUDevice;
let keep: unknown;
beforeAll(async () => {
  const { adapter } = await requestGpu();
  keep = adapter;
  gpu = await adapter.requestDevice();
});
afterAll(() => keep && destroyDevice(gpu));

/** Weights of 40 KiB and more; everything else is small. */
const IDS = /\/tall(_\w+)?$|^embedding\/(f32|bf16)\/table$/;

test("weights larger than a binding are split by rows and give the same results", { timeout: 120_000 }, async () => {
  const programs = caseTable().filter(({ id }) => IDS.test(id));
  expect(programs.length).toBeGreaterThanOrEqual(10);
  const limit = 24 * 1024;
  const recording = recordDevice(gpu, { maxStorageBufferBindingSize: limit });
  await using device = await open({ device: recording.device });
  expect(device.capabilities.maxBinding).toBe(limit);
  const results = [];
  for await (const result of runCases(device, programs, { oracle: makeOracle() })) results.push(result);
  expect(failures(results)).toEqual([]);
  expect(results.filter(({ status }) => status === "passed").length).toBe(results.length);
  expect(recording.largestBinding()).toBeLessThanOrEqual(limit);
  await using whole = await open({ device: gpu });
  for await (const result of runCases(whole, programs.slice(0, 3), { oracle: makeOracle() })) {
    const split = results.find(({ id }) => id === result.id);
    expect(split?.worst).toBe(result.worst);
  }
});
