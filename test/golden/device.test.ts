import { readFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { open } from "../../src/runtime/device.js";
import { parseManifest, runGolden } from "../../src/validate/golden.js";
import { goldenDevice } from "../../src/validate/golden-device.js";

const file = (name: string) => readFile(new URL(`data/${name}`, import.meta.url));

/** What of the cases runs on the host beside WebGPU, by reason: reviewed; a case that appears in it or leaves it must be looked at. */
const EXPECTED: Record<string, string[]> = JSON.parse(
  await readFile(new URL("device-host.json", import.meta.url), "utf8"),
);

test("every golden case passes on WebGPU, and what runs on the host is listed with the reason", async () => {
  const manifest = parseManifest(JSON.parse(await readFile(new URL("data/manifest.json", import.meta.url), "utf8")));
  await using device = await open({ prefer: ["webgpu"] });
  const wrong: string[] = [];
  const host: Record<string, string[]> = {};
  let passed = 0;
  for await (const result of runGolden({ manifest, readFile: file, backend: goldenDevice(device) })) {
    if (result.status === "passed") passed++;
    else wrong.push(`${result.case} ${result.status}: ${result.reason}`);
    for (const reason of result.host) {
      const key = `${result.calls === 0 ? "wholly" : "in part"}: ${reason}`;
      host[key] = [...(host[key] ?? []), result.case];
    }
  }
  expect(wrong).toEqual([]);
  expect(passed).toBe(manifest.cases.length);
  if (process.env.UPDATE_GOLDEN_HOST) console.log(JSON.stringify(host, null, 2));
  expect(host).toEqual(EXPECTED);
}, 900_000);
