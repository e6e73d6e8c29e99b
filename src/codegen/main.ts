import { mkdir, readFile, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { FORMATS } from "../formats/table.js";
import { formatsHeader } from "./cxx.js";
import { formatsPage, formatsTable, withFormats } from "./docs.js";

const formats = Object.values(FORMATS);

/** Every generated file, by its path in the repository; `current` is its text now, empty if there is none. */
export const GENERATED: Readonly<Record<string, (current: string) => string>> = {
  "native/generated/formats.hpp": () => formatsHeader(formats),
  "docs/formats.md": () => formatsPage(formats),
  "README.md": (current) => withFormats(current, formatsTable(formats)),
};

/** Writes the files under `root` that are not as they should be, or with `check` only finds them. Returns their paths. */
export async function generate(root: string, check: boolean): Promise<string[]> {
  const stale: string[] = [];
  for (const [path, make] of Object.entries(GENERATED)) {
    const file = join(root, path);
    const current = await readFile(file, "utf8").catch((error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT") return "";
      throw error;
    });
    const text = make(current);
    if (text === current) continue;
    stale.push(path);
    if (check) continue;
    await mkdir(dirname(file), { recursive: true });
    await writeFile(file, text);
  }
  return stale;
}

/** `node dist/codegen/main.js [--check]`: exit status 1 when `--check` finds files that are not up to date. */
if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const check = process.argv.includes("--check");
  const stale = await generate(fileURLToPath(new URL("../..", import.meta.url)), check);
  for (const path of stale) console.log(`${check ? "out of date" : "written"}: ${path}`);
  if (stale.length === 0) console.log("generated files are up to date");
  if (check && stale.length > 0) {
    console.error('run "npm run generate"');
    process.exitCode = 1;
  }
}
