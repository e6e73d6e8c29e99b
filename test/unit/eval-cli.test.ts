import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { accuracyCsv, accuracySvg, accuracyText } from "../../src/cli/accuracy.js";
import { ACCURACY_NAMES, parseQuantizeName } from "../../src/quantize/names.js";
import { Built } from "../setup/built.js";
import { tinyModel } from "../support/tiny-model.js";

const row = (quantize: string, perplexity: number, weightBytes: number) => ({
  quantize,
  result: { perplexity, nll: 1, delta: perplexity - 17.5, weightBytes, tokensPerSecond: 12.3, windows: [] },
});
const rows = [
  row("none", 17.5, 13_600_000),
  row("int4wo-64", 19, 4_600_000),
  row("int4wo-32", 19, 4_600_000),
  { quantize: "nf4-64", refused: 'K = 7: "no", they said' },
];

describe("an accuracy table", () => {
  test("as text has one line a row, in columns", () => {
    const lines = accuracyText(rows).trimEnd().split("\n");
    expect(lines[1]).toMatch(/^none +17\.5000 +\+0\.0000 +13\.6 MB +12$/);
    expect(new Set(lines.slice(0, 4).map((line) => line.indexOf("MB"))).size).toBeLessThanOrEqual(2);
    expect(lines[4]).toMatch(/^nf4-64 +- +K = 7/);
  });

  test("as CSV keeps every digit and quotes what needs it", () => {
    const [head, none, , , refused, end] = accuracyCsv(rows).split("\r\n");
    expect(head).toBe("format,perplexity,delta,nll,bytes,tokens_per_second,refused");
    expect(none).toBe("none,17.5,0,1,13600000,12.3,");
    expect(refused).toBe('nf4-64,,,,,,"K = 7: ""no"", they said"');
    expect(end).toBe("");
  });

  test("as SVG has a point and a label a row, and no label on another", async () => {
    const svg = await accuracySvg(rows, "title & more");
    expect(svg).toMatch(/^<svg /);
    expect(svg).toContain("title &amp; more");
    expect(svg).not.toContain("nf4-64");
    const places = ["int4wo-64", "int4wo-32"].map((name) => {
      const [, x, y] = new RegExp(`translate\\(([\\d.]+),([\\d.]+)\\)"[^>]*>${name}<`).exec(svg) ?? [];
      return [Number(x), Number(y)] as const;
    });
    expect(places.flat().every(Number.isFinite)).toBe(true);
    expect(Math.abs((places[0]?.[1] as number) - (places[1]?.[1] as number))).toBeGreaterThanOrEqual(9);
  });

  test("of all names holds every row that torchao was measured with", async () => {
    const { rows: measured } = JSON.parse(await readFile("models/reference-perplexity.json", "utf8"));
    for (const { quantize } of measured) expect(ACCURACY_NAMES).toContain(quantize);
    expect(ACCURACY_NAMES[0]).toBe("none");
    expect(new Set(ACCURACY_NAMES).size).toBe(ACCURACY_NAMES.length);
    for (const name of ACCURACY_NAMES) expect(() => parseQuantizeName(name)).not.toThrow();
  });
});

describe("fewbit eval", () => {
  let built: Built;
  let work: string;
  beforeAll(async () => {
    built = await Built.of("cli/main.ts");
    work = await mkdtemp(join(tmpdir(), "fewbit-eval-"));
    for (const [name, bytes] of tinyModel()) await writeFile(join(work, name), bytes);
    await writeFile(join(work, "text.txt"), "Call me Ishmael. Some years ago, never mind how long precisely.");
  }, 120_000);
  afterAll(async () => {
    await built[Symbol.asyncDispose]();
    await rm(work, { recursive: true, force: true });
  });
  const fewbit = (...args: string[]) =>
    new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) => {
      const all = [join(built.folder, "cli/main.js"), ...args, "--backend", "reference"];
      const child = execFile(process.execPath, all, { cwd: work }, (_, stdout, stderr) =>
        resolve({ code: child.exitCode, stdout, stderr }),
      );
    });
  const onText = ["eval", ".", "--text", "text.txt", "--context", "16"];

  test("prints a row for each name, with the rise over none, and writes the files", async () => {
    const { code, stdout, stderr } = await fewbit(
      ...onText,
      "-q",
      "none,int8wo,int4wo-64",
      "--csv",
      "t.csv",
      "--svg",
      "t.svg",
    );
    expect([code, stderr]).toEqual([0, ""]);
    const lines = stdout.trimEnd().split("\n");
    expect(lines.map((line) => line.split(" ")[0])).toEqual(["format", "none", "int8wo", "int4wo-64"]);
    // K is 32: groups of 64 do not fit, and the table goes on.
    expect(lines[3]).toMatch(/not a multiple of 64/);
    expect((await readFile(join(work, "t.csv"), "utf8")).split("\r\n").length).toBe(5);
    expect(await readFile(join(work, "t.svg"), "utf8")).toContain("int8wo");
  }, 120_000);

  test("goes on from the work folder, and refuses one of other settings", async () => {
    const first = await fewbit(...onText, "-q", "int8wo", "--windows", "2", "--work", "w", "--json");
    const whole = await fewbit(...onText, "-q", "int8wo", "--work", "w", "--json");
    const windows = ({ stdout }: { stdout: string }) => JSON.parse(stdout).rows[0].result.windows;
    expect(windows(whole).slice(0, 2)).toEqual(windows(first));
    expect(windows(whole).length).toBeGreaterThan(2);
    const again = await fewbit(...onText, "-q", "int8wo", "--work", "w", "--json");
    expect(JSON.parse(again.stdout).rows[0].result.tokensPerSecond).toBeNull();
    const other = await fewbit(
      "eval",
      ".",
      "--text",
      "text.txt",
      "--context",
      "12",
      "-q",
      "int8wo",
      "--work",
      "w",
      "--json",
    );
    expect([other.code, JSON.parse(other.stdout).error.code]).toEqual([1, "io/malformed"]);
  }, 120_000);

  test("runs a plan of fewbit autoquant", async () => {
    const windows = ["--text", "text.txt", "--context", "16", "--windows", "2"];
    const made = await fewbit(
      "autoquant",
      ".",
      ...windows,
      "--candidates",
      "int8wo",
      "--objective",
      "size",
      "--limit",
      "1",
      "-o",
      "p.json",
    );
    expect([made.code, made.stdout]).toEqual([0, ""]);
    const plan = JSON.parse(await readFile(join(work, "p.json"), "utf8"));
    const { stdout } = await fewbit("eval", ".", ...windows, "-q", "p.json", "--json");
    const [{ result }] = JSON.parse(stdout).rows;
    expect(result.nll / (2 * 15)).toBe(plan.loss.plan);
  }, 120_000);

  test.each([
    [["--stride", "16", "-q", "int8wo"], 2, "argument/invalid"],
    [["--text", "no.txt"], 1, "io/not-found"],
    [["-q", "int8w"], 2, "argument/unknown-name"],
    [["-q", "no.json"], 1, "io/not-found"],
  ])(
    "%s exits %d with %s",
    async (args, code, error) => {
      const ended = await fewbit(...onText, ...args, "--json");
      expect([ended.code, JSON.parse(ended.stdout).error.code]).toEqual([code, error]);
    },
    60_000,
  );
});
