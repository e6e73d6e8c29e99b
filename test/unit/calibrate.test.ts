import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { FORMATS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor } from "../../src/formats/tensor.js";
import { isDense } from "../../src/ir/tensor.js";
import { autoquant, parseAutoquantPlan } from "../../src/models/autoquant.js";
import { type CalibrationAlgorithm, calibrate } from "../../src/models/calibrate.js";
import { evaluatePerplexity } from "../../src/models/evaluate.js";
import { linearGroups } from "../../src/models/linear-groups.js";
import { openDecoder } from "../../src/models/load.js";
import { loadModel } from "../../src/models/model.js";
import { saveQuantized } from "../../src/models/save.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { searchRanges } from "../../src/quantize/ranges.js";
import { InputStatistics, outputError } from "../../src/quantize/statistics.js";
import { failure } from "../support/failure.js";
import { load, PROMPT, reference } from "../support/generate.js";
import { randomUniform, tinyModel } from "../support/tiny-model.js";

const TEXT =
  "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.";
const settings = { context: 16, windows: 6 } as const;
const LAYER = "model.layers.1";

async function logitsOf(options: Parameters<typeof load>[1], folder = tinyModel()): Promise<Float32Array> {
  await using device = await reference();
  using model = await load(device, options, folder);
  return await model.logits(model.tokenizer.encode(PROMPT));
}

const distance = (a: Float32Array, b: Float32Array) =>
  Math.sqrt(a.reduce((sum, x, i) => sum + (x - (b[i] as number)) ** 2, 0));

describe("groups of linears", () => {
  test("are those that read one value; a scale of it folds into a norm or into rows of the linear before", async () => {
    await using decoder = await openDecoder(tinyModel(), {}, "last");
    const names = new Set(
      decoder.specs.filter(({ layer, shape }) => layer !== null && shape.length === 2).map(({ name }) => name),
    );
    const groups = linearGroups(decoder.graph, (name) => names.has(name)).slice(4);
    expect(groups.map(({ weights }) => weights.map((name) => name.slice(LAYER.length + 1, -".weight".length)))).toEqual(
      [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
      ],
    );
    expect(groups[0]?.producer).toEqual({ kind: "vectors", names: [`${LAYER}.input_layernorm.weight`] });
    const [, attention, , gated] = groups.map(({ producer }) => producer);
    if (attention?.kind !== "rows" || gated?.kind !== "rows") throw new Error("these fold into rows");
    expect([attention.weight, gated.weight]).toEqual([
      `${LAYER}.self_attn.v_proj.weight`,
      `${LAYER}.mlp.up_proj.weight`,
    ]);
    // Four heads of eight columns share two heads of values, two by two.
    expect([0, 7, 8, 15, 16, 23, 24, 31].map(attention.rowOf)).toEqual([0, 7, 0, 7, 8, 15, 8, 15]);
    expect([0, 63].map(gated.rowOf)).toEqual([0, 63]);
  });
});

describe("calibration", () => {
  test.each(["gptq", "awq", "smoothquant"] as const)(
    "by %s keeps the model's function to what int8 leaves of it",
    async (algorithm: CalibrationAlgorithm) => {
      await using device = await reference();
      const replace = await calibrate(tinyModel(), TEXT, { device, algorithm, quantize: "int8wo-32", ...settings });
      const exact = await logitsOf({});
      const plain = distance(await logitsOf({ quantize: "int8wo-32" }), exact);
      // A scale that is folded into the wrong row or column moves the logits by much of their size, a hundred times this.
      expect(distance(await logitsOf({ quantize: "int8wo-32", replace }), exact)).toBeLessThan(3 * plain);
      expect([...replace.values()].some(isDense)).toBe(algorithm !== "gptq");
    },
    60_000,
  );

  test("goes on after an abort with what it had, to the same tensors", async () => {
    await using device = await reference();
    const options = { device, algorithm: "awq", quantize: "int4wo-32", ...settings } as const;
    const whole = await calibrate(tinyModel(), TEXT, options);
    const files = new Map<string, Uint8Array>();
    const controller = new AbortController();
    const set = async (name: string, bytes: Uint8Array) => {
      files.set(name, bytes);
      if (files.size === 6) controller.abort();
    };
    const store = { get: async (name: string) => files.get(name), set };
    const stopped = calibrate(tinyModel(), TEXT, { ...options, store, signal: controller.signal });
    expect((await failure(stopped)).code).toBe("operation/aborted");
    expect(device.bytes).toBe(0);
    const before = new Set(files.keys());
    const written: string[] = [];
    const rest = { get: store.get, set: async (name: string) => void written.push(name) };
    expect(await calibrate(tinyModel(), TEXT, { ...options, store: rest })).toEqual(whole);
    // The first unit, q, k, v, o and a norm, was complete.
    expect(written.filter((name) => before.has(name) && name.includes("layers.0.self_attn"))).toEqual([]);
    expect(written.length).toBeGreaterThan(0);
  }, 60_000);

  test("is saved as it is loaded", async () => {
    const out = await mkdtemp(join(tmpdir(), "fewbit-calibrated-"));
    try {
      await using device = await reference();
      const replace = await calibrate(tinyModel(), TEXT, {
        device,
        algorithm: "awq",
        quantize: "int8wo-32",
        ...settings,
      });
      await saveQuantized(tinyModel(), out, { quantize: "int8wo-32" });
      await saveQuantized(tinyModel(), out, { quantize: "int8wo-32", replace });
      using saved = await loadModel(out, { device });
      const got = await saved.logits(saved.tokenizer.encode(PROMPT));
      expect(got).toEqual(await logitsOf({ quantize: "int8wo-32", replace }));
    } finally {
      await rm(out, { recursive: true });
    }
  }, 60_000);

  test("refuses what an algorithm cannot serve", async () => {
    await using device = await reference();
    for (const [algorithm, quantize] of [
      ["gptq", "none"],
      ["gptq", "int4wo-32-hqq"],
      ["gptq", "int8wo-tensor"],
      ["awq", "none"],
    ] as const) {
      const error = await failure(calibrate(tinyModel(), TEXT, { device, algorithm, quantize, ...settings }));
      expect(error.code).toBe("quantize/unsupported");
    }
  });
});

describe("statistics", () => {
  test("give the squared error of outputs for any error of the weight", () => {
    const [n, k, tokens] = [5, 7, 11];
    const uniform = randomUniform(3);
    const [x, d] = [Float32Array.from({ length: tokens * k }, uniform), Float64Array.from({ length: n * k }, uniform)];
    const statistics = new InputStatistics(k);
    statistics.observe(x.subarray(0, 4 * k));
    statistics.observe(x.subarray(4 * k));
    let expected = 0;
    for (let t = 0; t < tokens; t++) {
      for (let row = 0; row < n; row++) {
        let y = 0;
        for (let i = 0; i < k; i++) y += (d[row * k + i] as number) * (x[t * k + i] as number);
        expected += y * y;
      }
    }
    expect(outputError(d, statistics)).toBeCloseTo(expected, 10);
    expect(statistics.tokens).toBe(tokens);
  });
});

test("narrower ranges never leave more weighted error than the whole range", () => {
  const [n, k] = [16, 64] as const;
  const uniform = randomUniform(9);
  const weight = Float32Array.from({ length: n * k }, () => uniform() ** 5);
  const importance = Float64Array.from({ length: k }, () => Math.abs(uniform()));
  for (const format of [FORMATS.int4_tinygemm, FORMATS.int4, FORMATS.int8]) {
    const error = (tensor: QuantizedTensor) =>
      dequantize(tensor).reduce(
        (sum, x, i) => sum + (x - (weight[i] as number)) ** 2 * (importance[i % k] as number),
        0,
      );
    const given = searchRanges(weight, [n, k], format, importance);
    const plain = error(quantizeTensor(weight, [n, k], "f32", format));
    expect(error(quantizeTensor(weight, [n, k], "f32", format, { given }))).toBeLessThanOrEqual(plain);
  }
});

describe("autoquant", () => {
  const candidates = ["int8wo", "int4wo-32", "intx2wo-32"];

  test("takes the smallest mixture within the limit, and none that a single config of that size beats", async () => {
    await using device = await reference();
    const options = { device, candidates, objective: "size", context: 16, windows: 3 } as const;
    const quantized: number[] = [];
    let singles: number[] = [];
    for (const limit of [0, 0.02, 10]) {
      const plan = await autoquant(tinyModel(), TEXT, { ...options, limit });
      expect(plan.loss.plan - plan.loss.unquantized).toBeLessThanOrEqual(limit);
      for (const single of Object.values(plan.singles)) {
        if (single.bytes <= plan.cost.bytes) expect(plan.loss.plan).toBeLessThanOrEqual(single.loss);
      }
      quantized.push(plan.cost.bytes);
      singles = Object.values(plan.singles).map(({ bytes }) => bytes);
      expect(Object.keys(plan.layers).length).toBe(14);
      // The plan that is loaded from JSON has the loss that was measured.
      const quantize = parseAutoquantPlan(JSON.parse(JSON.stringify(plan)));
      const { nll, tokens } = await evaluatePerplexity(tinyModel(), TEXT, { device, quantize, context: 16, limit: 3 });
      expect(nll / tokens).toBe(plan.loss.plan);
    }
    // A wider limit never asks for more bytes, and one that all keep asks for the fewest.
    expect(quantized).toEqual([...quantized].sort((a, b) => b - a));
    expect(quantized[2]).toBe(Math.min(...singles));
  }, 120_000);

  test("a file that is no plan is refused", () => {
    for (const json of [null, {}, { kind: "fewbit-autoquant", version: 2, layers: {} }]) {
      expect(() => parseAutoquantPlan(json)).toThrow(expect.objectContaining({ code: "io/malformed" }));
    }
    expect(() => parseAutoquantPlan({ kind: "fewbit-autoquant", version: 1, layers: { a: "int4w" } })).toThrow(
      expect.objectContaining({ code: "argument/unknown-name" }),
    );
  });
});
