import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import pc from "picocolors";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { explainConfig } from "../../src/cli/explain-config.js";
import { parseConfig } from "../../src/models/config.js";
import { ropeTable } from "../../src/models/decoder.js";
import { loadModel } from "../../src/models/model.js";
import { type Device, open } from "../../src/runtime/device.js";
import { TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

type Output = Parameters<typeof explainConfig>[0];
const devices = {} as Record<"reference" | "webgpu", Device>;
let folder: string;
beforeAll(async () => {
  devices.reference = await open({ prefer: ["reference"] });
  devices.webgpu = await open({ tier: "default" });
  folder = await mkdtemp(join(tmpdir(), "fewbit-"));
});
afterAll(async () => {
  for (const device of Object.values(devices)) await device[Symbol.asyncDispose]();
  await rm(folder, { recursive: true });
});

const IDS = Array.from({ length: 30 }, (_, i) => 2 + ((i * 37) % 250));
const windowed = () => tinyModel({ config: { architectures: ["MistralForCausalLM"], sliding_window: 8 } });

describe("a model with a sliding window", () => {
  test("keeps a ring of the window and a run's tokens, and gives the logits of the whole cache", async () => {
    using ring = await loadModel(windowed(), { device: devices.reference, prefillChunk: 4 });
    using whole = await loadModel(windowed(), { device: devices.reference, prefillChunk: 64 });
    const slots = (model: typeof ring) => model.program.plan.caches.map(({ rows }) => [rows.keys, rows.ring]);
    expect(new Set(slots(ring).map(String))).toEqual(new Set(["11,true"]));
    expect(new Set(slots(whole).map(String))).toEqual(new Set(["64,false"]));
    expect(await ring.logits(IDS)).toEqual(await whole.logits(IDS));
    using open = await loadModel(tinyModel(), { device: devices.reference });
    expect(await open.logits(IDS)).not.toEqual(await whole.logits(IDS));
  });

  test("generates the reference's tokens on WebGPU, past the ring's end", async () => {
    const run = async (device: Device) => {
      using model = await loadModel(windowed(), { device, prefillChunk: 4, kv: "bf16" });
      const ids: number[] = [];
      for await (const token of model.generate(IDS, { maxTokens: 12, ignoreEos: true })) ids.push(token.id);
      return ids;
    };
    expect(await run(devices.webgpu)).toEqual(await run(devices.reference));
  });
});

/** `_compute_llama3_parameters` of transformers (modeling_rope_utils.py), line by line. */
function llama3Frequencies(
  base: number,
  size: number,
  factor: number,
  low: number,
  high: number,
  old: number,
): number[] {
  return Array.from({ length: size / 2 }, (_, i) => {
    const frequency = 1 / base ** ((2 * i) / size);
    const wavelength = (2 * Math.PI) / frequency;
    if (wavelength > old / low) return frequency / factor;
    if (wavelength < old / high) return frequency;
    const smooth = (old / wavelength - low) / (high - low);
    return ((1 - smooth) * frequency) / factor + smooth * frequency;
  });
}

test("Llama 3.1's rope frequencies are those of transformers", () => {
  const rope_scaling = {
    rope_type: "llama3",
    factor: 8,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 8192,
  };
  const config = parseConfig({
    ...TINY_CONFIG,
    head_dim: 128,
    rope_theta: 5e5,
    max_position_embeddings: 131072,
    rope_scaling,
  });
  const table = ropeTable(config, 8);
  for (const [i, frequency] of llama3Frequencies(5e5, 128, 8, 1, 4, 8192).entries()) {
    expect(table[7 * 128 + i]).toBeCloseTo(Math.cos(7 * frequency), 6);
    expect(table[7 * 128 + 64 + i]).toBeCloseTo(Math.sin(7 * frequency), 6);
  }
});

test("how a position is turned does not depend on what follows it, with dynamic scaling", () => {
  const config = parseConfig({ ...TINY_CONFIG, rope_scaling: { type: "dynamic", factor: 4 } });
  const [short, long] = [ropeTable(config, 80), ropeTable(config, 256)];
  expect(long.slice(0, short.length)).toEqual(short);
  const plain = ropeTable(parseConfig(TINY_CONFIG), 64);
  expect(short.slice(0, plain.length)).toEqual(plain);
  expect(short.slice(plain.length)).not.toEqual(
    ropeTable(parseConfig({ ...TINY_CONFIG, max_position_embeddings: 80 }), 80).slice(plain.length),
  );
});

test("LongRoPE has its long divisors in caches that are longer than the original context, and only there", () => {
  const rope_scaling = { type: "longrope", short_factor: [1, 2, 3, 4], long_factor: [2, 3, 5, 7] };
  const config = parseConfig({ ...TINY_CONFIG, original_max_position_embeddings: 16, rope_scaling });
  const magnitude = Math.sqrt(1 + Math.log(64 / 16) / Math.log(16));
  for (const [capacity, divisors] of [
    [16, rope_scaling.short_factor],
    [17, rope_scaling.long_factor],
  ] as const) {
    const table = ropeTable(config, capacity);
    for (const [i, divisor] of divisors.entries())
      expect(table[9 * 8 + i]).toBeCloseTo(magnitude * Math.cos(9 * (10000 ** (-i / 4) / divisor)), 6);
  }
});

describe("fewbit explain --model-config", () => {
  const config = { ...TINY_CONFIG, head_dim: 32, max_position_embeddings: 4096 };
  const options = {
    quantize: "none",
    backend: "auto",
    kv: "int8",
    attention: "auto",
    tokens: 128,
    context: 4096,
  } as const;

  async function explained(json: boolean, change: object = {}): Promise<{ out: string; err: string }> {
    const path = join(folder, "config.json");
    await writeFile(path, JSON.stringify(config));
    const text = { out: "", err: "" };
    const screen = (name: keyof typeof text) => ({
      tty: false,
      color: pc.createColors(false),
      write: (part: string) => {
        text[name] += part;
      },
    });
    await explainConfig({ out: screen("out"), err: screen("err"), json }, path, { ...options, ...change });
    return text;
  }

  test("prints bytes by kind", async () => {
    const { out, err } = await explained(false);
    // 2 layers x keys and values x 2 KV heads x (32 codes + 4 bytes of scale).
    const cache = 2 * 2 * 2 * 36 * 4096;
    expect(out).toContain(`KV cache     ${(cache / 1e6).toFixed(1)} MB (${cache.toLocaleString("en-US")} B)`);
    for (const kind of ["weights", "activations", "scratch", "total"]) expect(out).toContain(kind);
    expect(err).toContain("webgpu/sdpa/decode_split");
  });

  test("as JSON", async () => {
    const { bytes, context } = JSON.parse((await explained(true)).out) as {
      bytes: Record<string, number>;
      context: number;
    };
    expect(context).toBe(4096);
    expect(bytes.cache).toBe(2 * 2 * 2 * 36 * 4096);
    expect(bytes.cachePerToken).toBe(288);
  });

  test("refuses what the device cannot hold, and files that are no config", async () => {
    await expect(explained(false, { memory: 0.001 })).rejects.toMatchObject({ code: "plan/memory" });
    await expect(explained(false, { maxBinding: 0.1 })).rejects.toMatchObject({ code: "plan/memory" });
    await expect(explained(false, { context: 5000 })).rejects.toMatchObject({ code: "argument/invalid" });
    await expect(explainConfig({} as Output, join(folder, "nothing.json"), options)).rejects.toMatchObject({
      code: "io/not-found",
    });
    await writeFile(join(folder, "list.json"), "[1]");
    await expect(explainConfig({} as Output, join(folder, "list.json"), options)).rejects.toMatchObject({
      code: "io/malformed",
    });
  });
});
