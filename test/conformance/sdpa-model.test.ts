import { afterAll, beforeAll, expect, test } from "vitest";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { openDirectory, readJson } from "../../src/io/source.js";
import type { DenseTensor } from "../../src/ir/tensor.js";
import { parseConfig, tensorSpecs } from "../../src/models/config.js";
import { buildDecoder, ROPE_TABLE, ropeTable, TOKENS } from "../../src/models/decoder.js";
import { kvFormat } from "../../src/models/kvcache.js";
import { planWeights } from "../../src/models/weights.js";
import { type Device, open } from "../../src/runtime/device.js";
import { loadTokenizer } from "../../src/text/tokenizer.js";

const FOLDER = new URL("../../models/fewbit-tiny/", import.meta.url);
const TEXT =
  "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, and the people went on.";

const devices = {} as Record<"reference" | "webgpu", Device>;
beforeAll(async () => {
  devices.reference = await open({ prefer: ["reference"] });
  devices.webgpu = await open();
});
afterAll(async () => {
  for (const device of Object.values(devices)) await device[Symbol.asyncDispose]();
});

/** Logits f32 [ids, V] of the bundled model after every token of a text, and the ids. */
async function logits(device: Device, kv: string): Promise<{ ids: number[]; rows: Float32Array; vocabulary: number }> {
  const directory = await openDirectory(FOLDER);
  const config = parseConfig(await readJson(directory, "config.json"));
  const tokenizer = loadTokenizer(
    await readJson(directory, "tokenizer.json"),
    await readJson(directory, "tokenizer_config.json"),
  );
  const ids = tokenizer.encode(TEXT);
  await using checkpoint = await openCheckpoint(directory);
  const specs = tensorSpecs(config);
  const weights = planWeights(checkpoint, specs, null);
  const capacity = 128;
  const graph = buildDecoder(config, {
    ...weights,
    kvFormat: kvFormat(kv),
    maxTokens: ids.length,
    capacity,
    logits: "all",
  });
  using program = await device.compile(graph, {
    weights: async (name) => {
      if (name === ROPE_TABLE)
        return { dtype: "f32", shape: [capacity, config.headDim], data: ropeTable(config, capacity) };
      return weights.load(specs.find((spec) => spec.name === name) as (typeof specs)[number], {});
    },
  });
  const inputs = { ids: { dtype: "i32", shape: [ids.length], data: Int32Array.from(ids) } } as const;
  const { logits: rows } = await program.run({ inputs, symbols: { [TOKENS]: ids.length, past: 0 } });
  return { ids, rows: (rows as DenseTensor).data as Float32Array, vocabulary: config.vocabSize };
}

function perplexity({ ids, rows, vocabulary }: Awaited<ReturnType<typeof logits>>): number {
  let loss = 0;
  for (let t = 0; t + 1 < ids.length; t++) {
    const row = rows.subarray(t * vocabulary, (t + 1) * vocabulary);
    const top = row.reduce((a, b) => Math.max(a, b));
    loss += top + Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0)) - (row[ids[t + 1] as number] as number);
  }
  return Math.exp(loss / (ids.length - 1));
}

/** The largest distance of two positions' logits, relative to the spread of the first's. */
function distance(a: Float32Array, b: Float32Array): number {
  const spread = a.reduce((m, x) => Math.max(m, x)) - a.reduce((m, x) => Math.min(m, x));
  return a.reduce((most, x, i) => Math.max(most, Math.abs(x - (b[i] as number))), 0) / spread;
}

test("the bundled model with a quantized cache, position by position", async () => {
  const plain = await logits(devices.reference, "none");
  const before = perplexity(plain);
  // The step of 8-bit codes is 2^-8 of a head's largest element, e4m3's 2^-4 of each element, int4's 2^-4 of a group's range.
  const limits = { bf16: [0.005, 0.01], int8: [0.005, 0.02], float8: [0.02, 0.06], int4: [0.1, 0.2] } as const;
  for (const [kv, [ppl, worst]] of Object.entries(limits)) {
    const quantized = await logits(devices.reference, kv);
    let most = 0;
    for (let t = 0; t < plain.ids.length; t++) {
      const [from, to] = [t * plain.vocabulary, (t + 1) * plain.vocabulary];
      most = Math.max(most, distance(plain.rows.subarray(from, to), quantized.rows.subarray(from, to)));
    }
    const change = perplexity(quantized) / before - 1;
    if (process.env.SDPA_RATIOS) console.log(kv, "perplexity", before, "change", change, "worst logit distance", most);
    expect(Math.abs(change), `${kv}: perplexity`).toBeLessThan(ppl);
    expect(most, `${kv}: logits`).toBeLessThan(worst);
    expect(most, `${kv}: logits differ from float32's`).toBeGreaterThan(0);
  }
}, 120_000);

test("WebGPU with an int8 cache gives the reference's logits", async () => {
  const [expected, got] = [await logits(devices.reference, "int8"), await logits(devices.webgpu, "int8")];
  // A code that a float32 rounding of q, k or v pushes over is a step of 2^-8 of one element: below the cache's own error.
  expect(distance(expected.rows, got.rows)).toBeLessThan(2e-3);
  expect(Math.abs(perplexity(got) / perplexity(expected) - 1)).toBeLessThan(1e-3);
}, 120_000);
