import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { formatsPage, formatsTable, withFormats } from "../../src/codegen/docs.js";
import { GENERATED, generate } from "../../src/codegen/main.js";
import { FORMATS } from "../../src/formats/table.js";

const root = fileURLToPath(new URL("../..", import.meta.url));

describe("generated files", () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), "fewbit-generate-"));
    await writeFile(join(folder, "README.md"), "# x\n\n<!-- formats:begin --><!-- formats:end -->\n\ntail\n");
  });
  afterEach(() => rm(folder, { recursive: true, force: true }));

  test("in the repository are up to date", async () => {
    expect(await generate(root, true)).toEqual([]);
  });

  test("are written once, and found when one is changed", async () => {
    expect(await generate(folder, true)).toEqual(Object.keys(GENERATED));
    expect(await generate(folder, false)).toEqual(Object.keys(GENERATED));
    expect(await generate(folder, true)).toEqual([]);
    await writeFile(join(folder, "docs/formats.md"), "stale");
    expect(await generate(folder, true)).toEqual(["docs/formats.md"]);
    expect(await readFile(join(folder, "docs/formats.md"), "utf8")).toBe("stale");
    expect(await generate(folder, false)).toEqual(["docs/formats.md"]);
    expect(await generate(folder, true)).toEqual([]);
  });

  test("keep the rest of the README", async () => {
    await generate(folder, false);
    const page = await readFile(join(folder, "README.md"), "utf8");
    expect(page).toMatch(/^# x\n/);
    expect(page).toMatch(/\n\ntail\n$/);
    expect(page).toMatch(/\n\n\| format \|.*\n\| `nvfp4` \| 4\.5 \|/s);
  });

  test("a README without markers is an error", async () => {
    await rm(join(folder, "README.md"));
    await expect(generate(folder, false)).rejects.toThrow("formats:begin");
    expect(() => withFormats("<!-- formats:end --><!-- formats:begin -->", "")).toThrow("formats:begin");
  });
});

test("every format has a row, a section and a sentence on when to use it", () => {
  const formats = Object.values(FORMATS);
  const [rows, page] = [formatsTable(formats), formatsPage(formats)];
  for (const { name, use } of formats) {
    expect(rows).toContain(`| \`${name}\` |`);
    expect(page).toContain(`## ${name}\n\n${use}\n`);
    expect(use).toMatch(/^[A-Z0-9].*\.$/);
  }
});
