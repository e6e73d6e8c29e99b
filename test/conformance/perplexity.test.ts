import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { evaluatePerplexity } from "../../src/models/evaluate.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
import { open } from "../../src/runtime/device.js";

/** Nats a token that a weight-only perplexity may be off by: 0.05 % of it. */
const ALLOWED = 5e-4;

test.each(["none", "int4wo-64", "nvfp4wo"])(
  "the perplexity of the bundled model on WebGPU is the reference's, with %s",
  async (quantize) => {
    await using webgpu = await open({ prefer: ["webgpu"] });
    await using reference = await open({ prefer: ["reference"] });
    const text = await readFile("models/test.txt", "utf8");
    const options = { quantize, context: 48, limit: 1 };
    const expected = await evaluatePerplexity("models/fewbit-tiny", text, { device: reference, ...options });
    const got = await evaluatePerplexity("models/fewbit-tiny", text, { device: webgpu, ...options });
    expect(got.tokens).toBe(47);
    expect(Math.abs(got.nll - expected.nll) / got.tokens).toBeLessThan(ALLOWED);
    expect(got.weightBytes).toBe(expected.weightBytes);
  },
  240_000,
);

interface Row {
  readonly backend: string;
  readonly quantize: string;
  readonly perplexity: number;
  readonly nll: number;
  readonly tokens: number;
  readonly weightBytes: number;
}

/** What was measured on whole texts with `node bench/accuracy.mjs`, and is kept: running it takes hours of a core. */
describe("the measured accuracy table", async () => {
  const text = await readFile("bench/results/2026-11-22-accuracy.jsonl", "utf8");
  const measured = text
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line) as Row);
  const { rows: figures, scored_tokens } = JSON.parse(await readFile("models/reference-perplexity.json", "utf8")) as {
    rows: { quantize: string; bf16: number }[];
    scored_tokens: number;
  };
  const figure = new Map(figures.map(({ quantize, bf16 }) => [quantize, bf16]));
  const perplexity = (backend: string, name: string) =>
    measured.find(({ backend: b, quantize }) => b === backend && quantize === name)?.perplexity ?? Number.NaN;

  /** The share of torchao's figure that a perplexity may differ by: without quantization, of weights alone, of activations as well. */
  function allowed(name: string): number {
    const config = parseQuantizeName(name);
    if (config === null) return 1e-4;
    return config.activation === null ? 5e-4 : 2e-3;
  }

  test("is of the whole text, and each perplexity is that of its loss", () => {
    for (const { nll, tokens, perplexity } of measured) {
      expect(tokens).toBe(scored_tokens);
      expect(Math.log(perplexity)).toBeCloseTo(nll / tokens, 12);
    }
  });

  test.each(["reference", "webgpu"])("on %s is torchao's, row by row", (backend) => {
    for (const [name, expected] of figure) {
      const difference = Math.abs(perplexity(backend, name) / expected - 1);
      expect(difference, name).toBeLessThanOrEqual(allowed(name));
    }
  });

  test.each(["reference", "webgpu", "cuda"])("on %s: what looking at data recovers of int4wo-64's loss", (backend) => {
    const [none, plain] = [perplexity(backend, "none"), perplexity(backend, "int4wo-64")];
    const recovered = (name: string) => (plain - perplexity(backend, name)) / (plain - none);
    expect(recovered("int4wo-64+gptq")).toBeGreaterThanOrEqual(0.3);
    expect(recovered("int4wo-64+awq")).toBeGreaterThanOrEqual(0.15);
  });

  test("no candidate alone that is no larger beats an autoquant plan made from it, on a text that the plan has not seen", () => {
    const long =
      "int8wo,intx7wo-64,intx6wo-64,intx5wo-64,int4wo-64,int4wo-32-hqq,int4wo-64-hqq,nvfp4wo,float8wo,intx3wo-64".split(
        ",",
      );
    const candidates: Readonly<Record<string, readonly string[]>> = {
      "autoquant-speed": ["int8wo", "int8dq", "int4wo-64", "float8wo", "intx6wo-64"],
      "autoquant-size-0.005": long,
      "autoquant-size-0.02": long,
      "autoquant-size-0.03": ["codebook-4-64", "int4wo-64-hqq", "int4wo-32-hqq", "intx5wo-64"],
      "autoquant-size-0.05": long,
    };
    const plans = measured.filter(({ quantize }) => quantize.startsWith("autoquant-"));
    expect(plans.map(({ quantize }) => quantize).sort()).toEqual(Object.keys(candidates).sort());
    for (const plan of plans) {
      for (const name of candidates[plan.quantize] as readonly string[]) {
        const single = measured.find(({ backend, quantize }) => backend === "cuda" && quantize === name) as Row;
        if (single.weightBytes > plan.weightBytes) continue;
        expect(plan.perplexity, `${plan.quantize} and ${name}`).toBeLessThanOrEqual(single.perplexity);
      }
    }
  });

  test("is what docs/accuracy.md shows", async () => {
    const table = (await readFile("docs/accuracy.md", "utf8")).split("<!-- table:against-torchao -->")[1] ?? "";
    const lines = (table.split("\n\n")[1] ?? "").split("\n").slice(2);
    expect(lines.length).toBe(figure.size);
    for (const line of lines) {
      const cells = line.split("|").map((cell) => cell.trim());
      const name = (cells[1] as string).replaceAll("`", "");
      const [torchao, reference, , webgpu, , cuda] = cells.slice(2);
      const shown = [figure.get(name), ...["reference", "webgpu", "cuda"].map((backend) => perplexity(backend, name))];
      expect([torchao, reference, webgpu, cuda]).toEqual(shown.map((value) => value?.toFixed(4)));
    }
  });
});
