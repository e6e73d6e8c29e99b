import { readFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { open } from "../../src/runtime/device.js";
import { parseManifest, runGolden } from "../../src/validate/golden.js";
import { goldenDevice } from "../../src/validate/golden-device.js";

const file = (name: string) => readFile(new URL(`data/${name}`, import.meta.url));

/** Cases that WebGPU cannot run, by reason: reviewed; a case that appears in it or leaves it must be looked at. */
const EXPECTED: Record<string, string[]> = JSON.parse(
  await readFile(new URL("device-unsupported.json", import.meta.url), "utf8"),
);

/** The kernel table's last word, without the step it is about. */
const reasonOf = (text: string): string =>
  (text.split("\n").at(-1) as string)
    .replace(/^.*no {3}/, "")
    .replace(/^.*: the device/, "the device")
    .trim();

test("every golden case passes on WebGPU, or is listed with the reason why it cannot run there", async () => {
  const manifest = parseManifest(JSON.parse(await readFile(new URL("data/manifest.json", import.meta.url), "utf8")));
  await using device = await open();
  const failed: string[] = [];
  const unsupported: Record<string, string[]> = {};
  let passed = 0;
  for await (const result of runGolden({ manifest, readFile: file, backend: goldenDevice(device) })) {
    if (result.status === "passed") passed++;
    else if (result.status === "failed") failed.push(`${result.case}: ${result.reason}`);
    else {
      const reason = reasonOf(result.reason ?? "");
      unsupported[reason] = [...(unsupported[reason] ?? []), result.case];
    }
  }
  expect(failed).toEqual([]);
  expect(unsupported).toEqual(EXPECTED);
  expect(passed).toBe(manifest.cases.length - Object.values(EXPECTED).flat().length);
}, 900_000);
