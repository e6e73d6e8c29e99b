import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { typeBytes } from "../../src/ir/tensor.js";
import { parseAutoquantPlan } from "../../src/models/autoquant.js";
import { ROPE_TABLE } from "../../src/models/decoder.js";
import { evaluatePerplexity } from "../../src/models/evaluate.js";
import { openDecoder } from "../../src/models/load.js";
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

async function readRows<T extends Row>(name: string): Promise<T[]> {
  const text = await readFile(`bench/results/${name}.jsonl`, "utf8");
  return text
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line) as T);
}

/** The cells of a table of docs/accuracy.md, without its head. */
async function documented(name: string): Promise<string[][]> {
  const table = (await readFile("docs/accuracy.md", "utf8")).split(`<!-- table:${name} -->`)[1] ?? "";
  const lines = (table.split("\n\n")[1] ?? "").split("\n").slice(2);
  return lines.map((line) =>
    line
      .split("|")
      .slice(1, -1)
      .map((cell) => cell.replaceAll(/[`*]/g, "").trim()),
  );
}

/** What was measured on whole texts with `node bench/accuracy.mjs`, and is kept: running it takes hours of a core. */
describe("the measured accuracy table", async () => {
  const measured = await readRows("2026-11-22-accuracy");
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

  test("is what docs/accuracy.md shows", async () => {
    const lines = await documented("against-torchao");
    expect(lines.length).toBe(figure.size);
    for (const [name = "", torchao, reference, , webgpu, , cuda] of lines) {
      const shown = [figure.get(name), ...["reference", "webgpu", "cuda"].map((backend) => perplexity(backend, name))];
      expect([torchao, reference, webgpu, cuda]).toEqual(shown.map((value) => value?.toFixed(4)));
    }
  });
});

/** A plan of `fewbit autoquant` on the whole text. */
interface PlanRow extends Row {
  /** The search that made it, counted by docs/accuracy.md. */
  readonly search: number;
  readonly limit: number;
  /** The config of each layer; not kept for those of the first search. */
  readonly layers?: Readonly<Record<string, string>>;
}

describe("the measured autoquant plans", async () => {
  const table = await readRows("2026-11-22-accuracy");
  const plans = await readRows<PlanRow>("2026-11-22-autoquant");
  /** Backends differ by less where weights alone are quantized (docs/accuracy.md). */
  const SAME = 2e-6;

  /** The row that is no larger than a plan and has the least perplexity, whatever made it. */
  const rival = ({ weightBytes }: Row) =>
    table.filter((row) => row.weightBytes <= weightBytes).reduce((a, b) => (b.perplexity < a.perplexity ? b : a));
  const loses = (plan: Row) => plan.perplexity > rival(plan).perplexity * (1 + SAME);

  test("are of the whole text, and each perplexity is that of its loss", () => {
    for (const { nll, tokens, perplexity } of plans) {
      expect(tokens).toBe(table[0]?.tokens);
      expect(Math.log(perplexity)).toBeCloseTo(nll / tokens, 12);
    }
  });

  test("of the search as it is: no row of the table that is no larger beats one, on a text that no plan has seen", () => {
    const latest = plans.filter(({ search }) => search === 3);
    expect(latest.map(({ limit }) => limit)).toEqual([0.01, 0.02, 0.05, 0.1]);
    for (const plan of latest) expect(loses(plan), `${plan.quantize} and ${rival(plan).quantize}`).toBe(false);
  });

  test("of earlier searches: those that lost are kept", () => {
    const lost = plans.filter((plan) => plan.search < 3 && loses(plan));
    expect(lost.map(({ search, quantize }) => `${search} ${quantize}`)).toEqual([
      "1 autoquant-size-0.05",
      "2 autoquant-size-0.1",
    ]);
  });

  test.each(
    plans.filter(({ layers }) => layers !== undefined).map((plan) => [plan.search, plan.quantize, plan] as const),
  )("search %d, %s: the layers are as large as the row says", async (_, __, { layers, weightBytes }) => {
    const json = { kind: "fewbit-autoquant", version: 1, layers };
    await using opened = await openDecoder("models/fewbit-tiny", { quantize: parseAutoquantPlan(json) }, "last");
    const { values, symbols } = opened.graph;
    const weights = values.filter(({ role, name }) => role === "weight" && !name.startsWith(ROPE_TABLE));
    expect(weights.reduce((sum, { type }) => sum + typeBytes(type, symbols), 0)).toBe(weightBytes);
  });

  test("are what docs/accuracy.md shows, beside the best single config that is no larger", async () => {
    const shown = [
      ...(await documented("autoquant")).map((cells) => ["3", ...cells]),
      ...(await documented("autoquant-before")),
    ];
    expect(shown.length).toBe(plans.length);
    const singles = table.filter(({ quantize }) => !quantize.includes("+"));
    const size = (row: Row) => `${(row.weightBytes / 1e6).toFixed(2)}`;
    for (const [search, name, perplexity, bytes, best] of shown) {
      const plan = plans.find((row) => `${row.search}` === search && row.quantize === name) as PlanRow;
      expect([perplexity, bytes]).toEqual([plan.perplexity.toFixed(4), size(plan)]);
      const least = Math.min(
        ...singles.filter((row) => row.weightBytes <= plan.weightBytes).map((row) => row.perplexity),
      );
      const [single, rest = ""] = (best as string).split(": ");
      const rows = singles.filter(({ quantize }) => quantize === single);
      expect(rows.some((row) => rest.startsWith(`${row.perplexity.toFixed(4)}, ${size(row)} MB`))).toBe(true);
      expect(Number.parseFloat(rest)).toBeLessThanOrEqual(Number(least.toFixed(4)));
    }
  });
});
