import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { accuracyCsv, accuracyLines, accuracySvg } from "../../src/cli/accuracy.js";
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
    const { head, line } = accuracyLines(rows.map(({ quantize }) => quantize));
    const lines = [head, ...rows.map(line)].map((each) => each.trimEnd());
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

  test("as SVG has a point and a label a row, and no label lies on another or outside", async () => {
    const text = await readFile("bench/results/2026-11-22-accuracy.jsonl", "utf8");
    const measured = text
      .trimEnd()
      .split("\n")
      .map((line) => JSON.parse(line) as { backend: string; quantize: string; perplexity: number; weightBytes: number })
      .filter(({ backend, quantize }) => backend === "webgpu" && ACCURACY_NAMES.includes(quantize))
      .map(({ quantize, perplexity, weightBytes }) => row(quantize, perplexity, weightBytes));
    const svg = await accuracySvg([...measured, rows[3] as (typeof rows)[3]], "title & more");
    expect(svg).toMatch(/^<svg /);
    expect(svg).toContain("title &amp; more");
    expect(svg).not.toContain("K = 7");
    // Letters of a sans-serif font of 9 px are less than 0.6 of it wide on average.
    const boxes = measured.map(({ quantize }) => {
      const label = new RegExp(`text-anchor="(\\w+)" transform="translate\\(([\\d.]+),([\\d.]+)\\)"[^>]*>${quantize}<`);
      const [, anchor, x, y] = label.exec(svg) ?? [];
      const width = quantize.length * 9 * 0.6;
      const left = anchor === "end" ? Number(x) - width : Number(x);
      return { quantize, left, right: left + width, y: Number(y) };
    });
    for (const [i, a] of boxes.entries()) {
      expect([a.left >= 0, a.y >= 0, a.y <= 720], a.quantize).toEqual([true, true, true]);
      for (const b of boxes.slice(0, i)) {
        const apart = a.right < b.left || b.right < a.left || Math.abs(a.y - b.y) >= 9;
        expect(apart, `${a.quantize} and ${b.quantize}`).toBe(true);
      }
    }
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

  test("Ctrl-C keeps every window, and the same command goes on after them", async () => {
    const text = "Call me Ishmael. Some years ago, never mind how long precisely. ".repeat(400);
    await writeFile(join(work, "long.txt"), text);
    const args = ["eval", ".", "--text", "long.txt", "--context", "16", "-q", "int8wo", "--work", "stopped"];
    const file = join(work, "stopped/int8wo.json");
    const command = [join(built.folder, "cli/main.js"), ...args, "--backend", "reference"];
    const child = spawn(process.execPath, command, { cwd: work, stdio: ["ignore", "ignore", "pipe"] });
    let stderr = "";
    child.stderr.on("data", (data) => {
      stderr += data;
    });
    const closed = once(child, "close");
    await vi.waitFor(() => readFile(file), { timeout: 60_000, interval: 20 });
    child.kill("SIGINT");
    const [code] = await closed;
    expect(code).toBe(130);
    expect(stderr).toMatch(/every window so far is in stopped/);
    const { losses } = JSON.parse(await readFile(file, "utf8"));
    const more = await fewbit(...args, "--windows", String(losses.length + 1));
    expect([more.code, more.stderr]).toEqual([
      0,
      `going on after ${losses.length.toLocaleString("en-US")} window${losses.length === 1 ? "" : "s"} in stopped\n`,
    ]);
    const after = JSON.parse(await readFile(file, "utf8")).losses;
    expect([after.length, after.slice(0, -1)]).toEqual([losses.length + 1, losses]);
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
