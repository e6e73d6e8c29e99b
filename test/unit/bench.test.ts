import { spawn } from "node:child_process";
import { symlink } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, expect, test } from "vitest";
import { Built } from "../setup/built.js";

const bench = fileURLToPath(new URL("../../bench", import.meta.url));
let built: Built;

beforeAll(async () => {
  // What bench/library.mjs loads.
  built = await Built.of(
    ...["runtime/device.ts", "ir/graph.ts", "ir/tensor.ts", "ir/sample.ts", "formats/table.ts", "formats/format.ts"],
    ...["formats/codec.ts", "formats/tensor.ts", "backends/stored-layout.ts", "quantize/names.ts"],
    ...["models/kvcache.ts", "models/config.ts", "models/decoder.ts", "models/attention.ts"],
  );
  await symlink(".", join(built.folder, "dist"));
}, 180_000);
afterAll(() => built[Symbol.asyncDispose]());

interface Ran {
  readonly code: number | null;
  readonly rows: Record<string, unknown>[];
  readonly errors: string;
}

/** Runs the bench on the reference with JSON lines on standard output; `interrupt` sends Ctrl-C after the first of them. */
function run(args: readonly string[], interrupt = false): Promise<Ran> {
  const env = { ...process.env, FEWBIT: built.folder };
  const child = spawn(process.execPath, [join(bench, "main.mjs"), ...args, "--backend", "reference", "--json"], {
    env,
  });
  let [out, errors] = ["", ""];
  child.stdout.on("data", (data) => {
    out += data;
    if (interrupt) child.kill("SIGINT");
  });
  child.stderr.on("data", (data) => {
    errors += data;
  });
  return new Promise((resolve) =>
    child.on("close", (code) => {
      const rows = out.split("\n").filter((line) => line !== "");
      resolve({ code, rows: rows.map((line) => JSON.parse(line)), errors });
    }),
  );
}

test("a line a case, with its samples, what it moved and computed, or why it has no time", async () => {
  const { code, rows } = await run([
    "roofline",
    "--small",
    "--runs",
    "2",
    "--sizes",
    "32,64",
    "--recipes",
    "int8dq,bogus",
  ]);
  expect(code).toBe(0);
  // Size by size; bf16 is what speed-ups compare with, asked for or not.
  expect(rows.map(({ recipe, size }) => `${recipe} ${size}`)).toEqual([
    ...["none 32", "int8dq 32", "bogus 32", "none 64", "int8dq 64", "bogus 64"],
  ]);
  for (const row of rows.filter(({ recipe }) => recipe !== "bogus")) {
    expect(row).toMatchObject({ bench: "roofline", backend: "reference", flops: 2 * (row.size as number) ** 3 });
    const samples = row.samples as number[];
    expect(samples).toHaveLength(2);
    expect(row.median_us).toBe(samples[1]);
    expect(samples[0]).toBeGreaterThan(0);
  }
  for (const row of rows.filter(({ recipe }) => recipe === "bogus")) expect(row.refused).toContain("bogus");
});

test.each([
  ["linear", ["--recipes", "none,nvfp4wo", "--rows", "3"], 2],
  ["sdpa", ["--contexts", "20"], 9],
  ["model", ["--recipes", "none,int4wo-64"], 4],
] as const)("%s measures all of its small cases", async (name, more, cases) => {
  const { code, rows, errors } = await run([name, "--small", "--runs", "1", ...more]);
  expect(errors).not.toContain("Error");
  expect(code).toBe(0);
  expect(rows).toHaveLength(cases);
  for (const row of rows) expect(row.refused).toBeUndefined();
});

test("Ctrl-C stops after the run in flight and keeps what was measured", async () => {
  const { code, rows, errors } = await run(["linear", "--small", "--runs", "1"], true);
  expect(code).toBe(130);
  expect(errors).toContain("stopped");
  expect(rows.length).toBeGreaterThan(0);
});

test("random operands are finite and differ along and between rows, in every format", async () => {
  const script = `
    const { randomTensor } = await import(${JSON.stringify(join(bench, "random.mjs"))});
    const { FORMATS } = await import("./formats/table.js");
    const { dequantize } = await import("./formats/tensor.js");
    for (const [name, format] of Object.entries(FORMATS)) {
      const values = dequantize(randomTensor(format, [128, 256]));
      const [first, second] = [values.slice(0, 256), values.slice(256, 512)];
      const same = first.every((x, i) => x === second[i]) || first.every((x) => x === first[0]);
      if (same || !values.every(Number.isFinite)) console.log(name);
    }`;
  const { stdout, stderr, code } = await built.node(script, { FEWBIT: built.folder });
  expect([code, stderr, stdout]).toEqual([0, "", ""]);
});
