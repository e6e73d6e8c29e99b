import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { LoadModelOptions } from "../../src/models/load.js";
import { loadModel, type Model } from "../../src/models/model.js";
import { type Device, open } from "../../src/runtime/device.js";
import { U } from "../../src/validate/bounds.js";
import { collect } from "../support/generate.js";

const PROMPTS = [
  "The captain looked at the sea",
  "It was a dark night",
  "Once upon a time",
  "He said nothing for",
  "In the morning the",
  "A",
  '"Where are you going?" asked the old man, and',
  "The house stood at the end of the road, and nobody had lived in it since the",
];

let webgpu: Device;
let reference: Device;
beforeAll(async () => {
  webgpu = await open({ prefer: ["webgpu"] });
  reference = await open({ prefer: ["reference"] });
});
afterAll(async () => {
  await webgpu?.[Symbol.asyncDispose]();
  await reference?.[Symbol.asyncDispose]();
});

const loadOn = (device: Device, quantize: string) => {
  const options: LoadModelOptions = { device, quantize, context: 128, prefillChunk: 32 };
  return loadModel("models/fewbit-tiny", options);
};
const greedy = async (model: Model, prompt: string, maxTokens: number) =>
  (await collect(model, prompt, { maxTokens })).map(({ id }) => id);

test("greedy tokens on WebGPU are the reference's: 64 tokens of 8 prompts", { timeout: 240_000 }, async () => {
  using a = await loadOn(webgpu, "none");
  using b = await loadOn(reference, "none");
  for (const prompt of PROMPTS) expect(await greedy(a, prompt, 64), prompt).toEqual(await greedy(b, prompt, 64));
});

/**
 * Two float32 evaluations of one model differ in their logits by the roundings of every step: each is within 2 sqrt(K) U of the
 * magnitudes it adds up, and errors of different steps are independent, so S steps give sqrt(S) of one. An argmax can then
 * only differ where the two largest logits are within twice that of each other.
 */
function logitBound(model: Model, logits: Float32Array): number {
  const { config, program } = model;
  const largest = logits.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  const k = Math.max(config.hiddenSize, config.intermediateSize);
  return Math.sqrt(program.plan.steps.length) * 2 * Math.sqrt(k) * U * largest;
}

describe("quantized generation differs only where two logits tie within the bound", () => {
  test.each(["int8wo", "int4wo-64", "float8wo", "int8dq"])("%s", { timeout: 120_000 }, async (quantize) => {
    using a = await loadOn(webgpu, quantize);
    using b = await loadOn(reference, quantize);
    for (const prompt of PROMPTS.slice(0, 2)) {
      const [got, expected] = [await greedy(a, prompt, 16), await greedy(b, prompt, 16)];
      const at = expected.findIndex((id, i) => got[i] !== id);
      if (at < 0) continue;
      const prefix = [...b.tokenizer.encode(prompt), ...expected.slice(0, at)];
      const logits = await b.logits(prefix);
      const [first, second] = [...logits].sort((x, y) => y - x) as [number, number];
      expect(first - second, `${prompt}: token ${at}`).toBeLessThanOrEqual(2 * logitBound(b, logits));
    }
  });
});
