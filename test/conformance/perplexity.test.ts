import { readFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { evaluatePerplexity } from "../../src/models/evaluate.js";
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
