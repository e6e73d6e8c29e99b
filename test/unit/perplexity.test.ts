import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { evaluatePerplexity, textWindows, type WindowLoss, windowLoss } from "../../src/models/evaluate.js";
import { failure } from "../support/failure.js";
import { reference } from "../support/generate.js";
import { tinyModel } from "../support/tiny-model.js";

describe("windows of a text", () => {
  const ids = Array.from({ length: 25 }, (_, i) => 100 + i);

  test("with BOS: every token of the text is scored once, a tail that fills no window is dropped", () => {
    const windows = textWindows(ids, { context: 8, bos: 0 });
    expect(windows.map((window) => window.ids)).toEqual([0, 7, 14].map((begin) => [0, ...ids.slice(begin, begin + 7)]));
    expect(windows.every(({ scoredFrom }) => scoredFrom === 1)).toBe(true);
  });

  test("without BOS: the first token of a window is context only", () => {
    const windows = textWindows(ids, { context: 8, bos: null });
    expect(windows.map((window) => window.ids)).toEqual([0, 8, 16].map((begin) => ids.slice(begin, begin + 8)));
    expect(windows.every(({ scoredFrom }) => scoredFrom === 1)).toBe(true);
  });

  test("overlapping windows score a token once, with at least context - stride tokens before it", () => {
    for (const bos of [0, null]) {
      const windows = textWindows(ids, { context: 8, stride: 3, bos });
      const scored = windows.flatMap((window) => window.ids.slice(window.scoredFrom));
      expect(scored).toEqual(ids.slice(bos === null ? 1 : 0, (bos === null ? 1 : 0) + scored.length));
      for (const { scoredFrom } of windows.slice(1)) expect(scoredFrom).toBe(8 - 3);
    }
  });

  test.each([
    [{ context: 8, stride: 8, bos: 0 }, "stride"],
    [{ context: 8, stride: 0, bos: null }, "stride"],
    [{ context: 30, bos: 0 }, "context"],
  ])("%o is refused", (options, name) => {
    expect(() => textWindows(ids, options)).toThrow(
      expect.objectContaining({ code: "argument/invalid", context: expect.objectContaining({ name }) }),
    );
  });
});

test("the loss of a window is the sum of -log softmax at the next tokens", () => {
  const logits = Float32Array.of(1, 2, 3, 1000, 0, -1000, 0, 0, 0);
  const { nll, tokens } = windowLoss(logits, { ids: [0, 2, 1], scoredFrom: 1 });
  const first = Math.log(Math.exp(1) + Math.exp(2) + Math.exp(3)) - 3;
  expect(tokens).toBe(2);
  // The second is 1000 - 0: far beyond what exp could hold.
  expect(nll).toBeCloseTo(first + 1000, 12);
  expect(windowLoss(Float32Array.of(Number.NaN, 1), { ids: [0, 1], scoredFrom: 1 }).nll).toBeNaN();
});

describe("the bundled model", () => {
  /**
   * Nats of the first two windows of 128 tokens of models/test.txt, computed in float64 by another implementation (PyTorch 2.13) from
   * the checkpoint, int8wo with torchao's codes and scales.
   */
  const EXPECTED = {
    none: [346.4276899362544, 380.05276412353055],
    int8wo: [346.58439664876704, 380.10545186613444],
  } as const;

  test.each(["none", "int8wo"] as const)(
    "has the losses that PyTorch gives, with %s",
    async (quantize) => {
      await using device = await reference();
      const text = await readFile("models/test.txt", "utf8");
      const { windows } = await evaluatePerplexity("models/fewbit-tiny", text, {
        device,
        quantize,
        context: 128,
        limit: 2,
      });
      for (const [i, { nll, tokens }] of windows.entries()) {
        // Some hundred operations between a token and its logits are each rounded to float32, 2^-24 of values up to about 30: at most
        // 2e-4 nats a token, were they all to the same side, and a tenth of it as a walk. Int8 weights instead of bf16 move it by 1e-3.
        expect(Math.abs(nll - EXPECTED[quantize][i as 0 | 1]) / tokens).toBeLessThan(2e-5);
      }
    },
    120_000,
  );
});

describe("an evaluation", () => {
  const text = "Call me Ishmael. Some years ago, never mind how long precisely, having little money in my purse.";
  const options = { context: 16, quantize: "int8wo" } as const;

  test("goes on where an aborted one was, to the same result", async () => {
    await using device = await reference();
    const whole = await evaluatePerplexity(tinyModel(), text, { device, ...options });
    const controller = new AbortController();
    const done: WindowLoss[] = [];
    const stopped = evaluatePerplexity(tinyModel(), text, {
      device,
      ...options,
      signal: controller.signal,
      onWindow: (loss, index) => {
        done.push(loss);
        if (index === 1) controller.abort();
      },
    });
    expect((await failure(stopped)).code).toBe("operation/aborted");
    expect(done.length).toBe(2);
    expect(device.bytes).toBe(0);
    const rest: number[] = [];
    const resumed = await evaluatePerplexity(tinyModel(), text, {
      device,
      ...options,
      done,
      onWindow: (_, index) => rest.push(index),
    });
    expect(rest[0]).toBe(2);
    expect({ ...resumed, tokensPerSecond: 0 }).toEqual({ ...whole, tokensPerSecond: 0 });
    expect(whole.tokens).toBe(whole.windows.length * 15);
  });

  test("counts the weights as they are stored", async () => {
    await using device = await reference();
    const plain = await evaluatePerplexity(tinyModel(), text, { device, context: 16 });
    const { weightBytes } = await evaluatePerplexity(tinyModel(), text, { device, ...options });
    // Two layers of q, o [32, 32], k, v [16, 32], gate, up [64, 32], down [32, 64]: a byte less each, a float32 scale a row.
    const elements = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32);
    const rows = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32);
    expect(plain.weightBytes - weightBytes).toBe(elements - 4 * rows);
    expect(weightBytes).toBeGreaterThan(elements);
  });
});
