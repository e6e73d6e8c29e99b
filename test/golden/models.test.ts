import { readdirSync, readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { openDirectory } from "../../src/io/source.js";
import type { DecoderConfig, LayerConfig, RopeScaling } from "../../src/models/config.js";
import { loadModel } from "../../src/models/model.js";
import { type Device, open } from "../../src/runtime/device.js";
import { halfUlp } from "../../src/validate/bounds.js";
import { exactLogits, loadGraph, type NetworkBound, networkBound, runGraph } from "../support/model-bounds.js";
import { tinyModel } from "../support/tiny-model.js";

/** Small models with the logits and tokens of transformers: see `make.py` there. */
const ROOT = "test/golden/models";
const NAMES = readdirSync(ROOT, { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name);
const PROMPT = 20;

interface Expected {
  readonly ids: readonly number[];
  readonly logits: Float32Array;
  readonly greedy: readonly number[];
}

async function expected(name: string): Promise<Expected> {
  const bytes = new Map([["model.safetensors", readFileSync(`${ROOT}/${name}/expected.safetensors`)]]);
  await using file = await openCheckpoint(await openDirectory(bytes));
  const read = async (tensor: string) => new Uint8Array(await file.read(tensor)).buffer;
  return {
    ids: [...new Int32Array(await read("ids"))],
    logits: new Float32Array(await read("logits")),
    greedy: [...new Int32Array(await read("greedy"))],
  };
}

/** The worst error as a fraction of its bound; the expected logits were rounded to float32. */
function worst(got: ArrayLike<number>, logits: Float32Array, { rows }: NetworkBound): number {
  expect(got.length).toBe(logits.length);
  const width = logits.length / rows.length;
  return logits.reduce((most, value, i) => {
    const bound = (rows[Math.floor(i / width)] as number) + halfUlp(value);
    const off = Math.abs((got[i] as number) - value) / bound;
    return Math.max(most, Number.isNaN(off) ? Number.POSITIVE_INFINITY : off);
  }, 0);
}

const devices = {} as Record<"reference" | "webgpu", Device>;
beforeAll(async () => {
  devices.reference = await open({ prefer: ["reference"] });
  devices.webgpu = await open({ prefer: ["webgpu"], tier: "default" });
});
afterAll(async () => {
  for (const device of Object.values(devices)) await device[Symbol.asyncDispose]();
});

/** The files of a golden model with a tokenizer, which transformers did not need. */
function files(name: string): Map<string, Uint8Array> {
  const all = new Map<string, Uint8Array>(tinyModel());
  for (const file of ["config.json", "model.safetensors"]) all.set(file, readFileSync(`${ROOT}/${name}/${file}`));
  return all;
}

async function generated(name: string, device: Device, options: { quantize?: string; prefillChunk: number }) {
  const { ids, greedy } = await expected(name);
  using model = await loadModel(files(name), { device, ...options });
  const tokens: number[] = [];
  const generation = model.generate(ids.slice(0, PROMPT), { maxTokens: greedy.length, ignoreEos: true });
  for await (const { id } of generation) tokens.push(id);
  return tokens;
}

describe.each(NAMES)("%s", (name) => {
  test("has the logits of transformers: the reference within its roundings, WebGPU within the bounds of its ops", {
    timeout: 240_000,
  }, async () => {
    const { ids, logits } = await expected(name);
    const model = await loadGraph(`${ROOT}/${name}`, { maxTokens: ids.length });
    const rounded = networkBound(model, ids, { once: true });
    expect(worst(await runGraph(devices.reference, model, ids), logits, rounded)).toBeLessThan(1);
    const bound = networkBound(model, ids, { once: false });
    expect(worst(await runGraph(devices.webgpu, model, ids), logits, bound)).toBeLessThan(1);
  });

  test("through the cache gives the logits of a full forward pass, bit for bit", async () => {
    const { ids } = await expected(name);
    const whole = await runGraph(devices.reference, await loadGraph(`${ROOT}/${name}`, { maxTokens: ids.length }), ids);
    for (const chunk of [1, 7])
      expect(
        await runGraph(devices.reference, await loadGraph(`${ROOT}/${name}`, { maxTokens: chunk }), ids, chunk),
      ).toEqual(whole);
  });

  test("continues as transformers does, on the reference and on WebGPU", { timeout: 120_000 }, async () => {
    const { greedy } = await expected(name);
    for (const device of Object.values(devices))
      expect(await generated(name, device, { prefillChunk: 8 })).toEqual(greedy);
  });
});

const QUANTIZED: readonly [name: string, quantize: string, format: string][] = [
  ["mixtral", "int8wo", "int8"],
  ["mixtral", "int4wo-32", "int4_tinygemm"],
  ["qwen2-moe", "int8wo", "int8"],
];

test.each(QUANTIZED)("%s with %s is on WebGPU what it is on the reference", { timeout: 240_000 }, async (...row) => {
  const [name, quantize, format] = row;
  const { ids, logits } = await expected(name);
  const tokens = await generated(name, devices.reference, { quantize, prefillChunk: 8 });
  expect(await generated(name, devices.webgpu, { quantize, prefillChunk: 8 })).toEqual(tokens);
  const model = await loadGraph(`${ROOT}/${name}`, { maxTokens: ids.length, quantize });
  const { config, weights } = model;
  const stored = [...weights].filter(([key]) => key.includes(".experts."));
  const sparse = config.layerConfigs.filter((layer) => layer.sparse).length;
  expect(stored.length).toBe(3 * (config.experts?.count ?? 0) * sparse);
  expect(new Set(stored.map(([, tensor]) => "format" in tensor && tensor.format.name))).toEqual(new Set([format]));
  const bound = networkBound(model, ids, { once: false });
  const exact = Float32Array.from(bound.values);
  expect(worst(await runGraph(devices.webgpu, model, ids), exact, bound)).toBeLessThan(1);
  // Fewer bits change the logits, by a part of their spread of about 1.
  const off = exact.reduce((sum, value, i) => sum + (value - (logits[i] as number)) ** 2, 0) / exact.length;
  expect(Math.sqrt(off)).toBeGreaterThan(1e-3);
  expect(Math.sqrt(off)).toBeLessThan(0.5);
});

type Change = (config: DecoderConfig) => DecoderConfig;
const layers =
  (change: (layer: LayerConfig, index: number) => Partial<LayerConfig>): Change =>
  (config) => ({
    ...config,
    layerConfigs: config.layerConfigs.map((layer, i) => ({ ...layer, ...change(layer, i) })),
  });
const scaling =
  (change: object): Change =>
  (config) => ({
    ...config,
    ropes: config.ropes.map((rope) => ({ ...rope, scaling: { ...rope.scaling, ...change } as RopeScaling })),
  });
const experts =
  (change: object): Change =>
  (config) => ({ ...config, experts: { ...config.experts, ...change } as DecoderConfig["experts"] });
const eps: Change = (config) => ({ ...config, norm: { ...config.norm, eps: config.norm.eps * 10 } });
const turned: Change = (config) => ({
  ...config,
  ropes: config.ropes.map((rope) => ({ ...rope, theta: rope.theta * 1.01 })),
});
const wider = layers(({ window }) => ({ window: window === null ? null : window + 1 }));
const windowless = layers(() => ({ window: null }));

/** Descriptions that are wrong in one place each. */
const WRONG: readonly [model: string, what: string, change: Change][] = [
  ...NAMES.map((name): [string, string, Change] => [name, "eps of the norms", eps]),
  ["llama-llama3", "factor", scaling({ factor: 7.9 })],
  ["llama-llama3", "low frequency", scaling({ lowFrequency: 1.1 })],
  ["llama-llama3", "high frequency", scaling({ highFrequency: 4.1 })],
  ["llama-linear", "factor", scaling({ factor: 4.01 })],
  ["llama-dynamic", "factor", scaling({ factor: 4.1 })],
  ["llama-dynamic", "original context", scaling({ originalContext: 17 })],
  ["llama-yarn", "magnitude", scaling({ magnitude: 1 })],
  ["llama-yarn", "beta_fast", scaling({ betaFast: 2 })],
  ["llama-yarn", "truncate", scaling({ truncate: false })],
  ["mistral", "window", wider],
  ["mistral", "window: none", windowless],
  ["mistral", "theta", turned],
  ["qwen2", "window", wider],
  ["qwen2", "a window in the first layer", layers((_, i) => ({ window: i < 2 ? 7 : null }))],
  ["gemma2", "soft-cap of scores", (c) => ({ ...c, attention: { ...c.attention, softcap: null } })],
  ["gemma2", "scale of scores", (c) => ({ ...c, attention: { ...c.attention, scale: 1 / 4 } })],
  ["gemma2", "soft-cap of logits", (c) => ({ ...c, logitSoftcap: null })],
  ["gemma2", "scale of embeddings", (c) => ({ ...c, embeddingScale: 5.66 })],
  ["gemma2", "alternation", layers(({ window }) => ({ window: window === null ? 9 : null }))],
  ["gemma2", "offset of norms", (c) => ({ ...c, norm: { ...c.norm, offset: 0 } })],
  ["gemma2", "activation", (c) => ({ ...c, activation: "gelu" })],
  ["gemma3", "local rope", layers(() => ({ rope: 0 }))],
  ["gemma3", "window", wider],
  ["phi3", "window", wider],
  ["phi3-longrope", "magnitude", scaling({ magnitude: 1.2 })],
  ["phi3-longrope", "factors", scaling({ long: [1.5, 3, 5.9] })],
  ["smollm3", "a layer without rope", layers(() => ({ rope: 0 }))],
  ["gpt2", "activation", (c) => ({ ...c, activation: "gelu" })],
  ["mixtral", "gates", experts({ normalize: false })],
  ["mixtral", "experts a token", experts({ active: 1 })],
  ["qwen2-moe", "gates", experts({ normalize: true })],
  ["qwen3-moe", "gates", experts({ normalize: false })],
];

test.each(WRONG)("%s with another %s is noticed", async (name, _, change) => {
  const { ids, logits } = await expected(name);
  const rounded = networkBound(await loadGraph(`${ROOT}/${name}`, { maxTokens: ids.length }), ids, {
    once: true,
    samples: 2,
  });
  const wrong = await loadGraph(`${ROOT}/${name}`, { maxTokens: ids.length, change });
  expect(worst(exactLogits(wrong, ids), logits, rounded)).toBeGreaterThan(1);
});
