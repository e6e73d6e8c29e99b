import { readFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Device, open } from "../../src/runtime/device.js";
import { parseManifest, runGolden } from "../../src/validate/golden.js";
import { goldenDevice } from "../../src/validate/golden-device.js";

const read = async (name: string) => new Uint8Array(await readFile(new URL(`data/${name}`, import.meta.url)));
const manifest = parseManifest(JSON.parse(new TextDecoder().decode(await read("manifest.json"))));
const isAttention = ({ name }: { name: string }) => /^(sdpa|kv_int8)_/.test(name);

/** The device's own kernels; only the float8 cases' operands (scales over whole sequences) are made on the host. */
describe.each(["reference", "webgpu"] as const)("golden attention cases on the sdpa op of %s", (backend) => {
  let device: Device;
  beforeAll(async () => {
    device = await open({ prefer: [backend], tier: "default" });
  });
  afterAll(async () => device[Symbol.asyncDispose]());

  test("all 24 pass", async () => {
    const { primitives } = goldenDevice(device);
    const failed: string[] = [];
    let count = 0;
    for await (const result of runGolden({
      manifest,
      readFile: read,
      backend: { name: backend, primitives },
      filter: isAttention,
    })) {
      count++;
      if (result.status !== "passed") failed.push(`${result.case}: ${result.reason}`);
    }
    expect(failed).toEqual([]);
    expect(count).toBe(manifest.cases.filter(isAttention).length);
    expect(count).toBeGreaterThanOrEqual(24);
  });
});
