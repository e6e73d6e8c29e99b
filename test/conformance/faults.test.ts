import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Device, open } from "../../src/runtime/device.js";
import { caseTable } from "../../src/validate/cases.js";
import { FAULTS, runFault } from "../../src/validate/faults.js";
import { makeOracle } from "../../src/validate/run.js";

let device: Device;
beforeAll(async () => {
  device = await open({ prefer: ["webgpu"], tier: "default" });
});
afterAll(async () => {
  await device?.[Symbol.asyncDispose]();
});

const table = caseTable();
const oracle = makeOracle();

test("there are at least 30, each once, over every family", () => {
  expect(FAULTS.length).toBeGreaterThanOrEqual(30);
  expect(new Set(FAULTS.map(({ id }) => id)).size).toBe(FAULTS.length);
});

describe("a seeded fault is caught by its family's cases", () => {
  test.each(FAULTS.map((fault) => [fault.id, fault] as const))("%s", async (_, fault) => {
    const { invalid, caughtBy } = await runFault(device, fault, table, oracle);
    expect(invalid).toBeNull();
    expect(caughtBy.length).toBeGreaterThan(0);
  });
});
