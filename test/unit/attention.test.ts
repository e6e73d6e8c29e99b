import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openReference } from "../../src/backends/reference/device.js";
import { openTrace } from "../../src/backends/trace/device.js";
import { openWebGpu } from "../../src/backends/webgpu/device.js";
import { WEBGPU_KERNELS } from "../../src/backends/webgpu/kernels/table.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, type Graph, GraphBuilder, stored, type TensorType } from "../../src/ir/graph.js";
import type { SdpaAttrs } from "../../src/ir/ops.js";
import type { DenseTensor } from "../../src/ir/tensor.js";
import { applyLowPrecisionAttention, attentionMode } from "../../src/models/attention.js";
import { kvFormat } from "../../src/models/kvcache.js";
import { loadModel } from "../../src/models/model.js";
import { outlineModel } from "../../src/models/outline.js";
import { explainPlan } from "../../src/plan/plan.js";
import { Device } from "../../src/runtime/device.js";
import { randomWords } from "../support/codecs.js";
import { tinyModel } from "../support/tiny-model.js";

let reference: Device;
let webgpu: Device;
beforeAll(async () => {
  reference = new Device(openReference());
  webgpu = new Device(await openWebGpu({ tier: "default" }));
});
afterAll(async () => {
  await reference[Symbol.asyncDispose]();
  await webgpu[Symbol.asyncDispose]();
});

const coded = (code: string, message?: string) =>
  expect.objectContaining({ code, ...(message === undefined ? {} : { message: expect.stringContaining(message) }) });

describe("bad operands are coded errors", () => {
  const attrs: SdpaAttrs = { heads: 4, kvHeads: 2, scale: 1, causal: true };
  const whole: readonly TensorType[] = [
    dense("f32", [1, 4, 5, 32]),
    dense("f32", [1, 2, 7, 32]),
    dense("f32", [1, 2, 7, 32]),
  ];
  const build = (types: readonly TensorType[], change: Partial<SdpaAttrs> = {}): Graph => {
    const g = new GraphBuilder({ T: 8, past: 16 });
    g.output(
      "y",
      g.one(
        "sdpa",
        types.map((type, i) => g.input(`x${i}`, type)),
        { ...attrs, ...change },
      ),
    );
    return g.build();
  };
  const replace = (at: number, type: TensorType) => whole.map((old, i) => (i === at ? type : old));

  test.each([
    [
      "head counts that do not divide",
      "graph/invalid",
      () => build(replace(0, dense("f32", [1, 5, 5, 32])), { heads: 5 }),
    ],
    ["no heads", "argument/invalid", () => build(whole, { heads: 0 })],
    ["a window of nothing", "argument/invalid", () => build(whole, { window: 0 })],
    ["a soft-cap of zero", "argument/invalid", () => build(whole, { softcap: 0 })],
    ["a scale that is no number", "argument/invalid", () => build(whole, { scale: Number.NaN })],
    ["q of another head size", "shape/mismatch", () => build(replace(0, dense("f32", [1, 4, 5, 16])))],
    ["k and v of different lengths", "shape/mismatch", () => build(replace(2, dense("f32", [1, 2, 8, 32])))],
    ["KV heads that k does not have", "shape/mismatch", () => build(whole, { kvHeads: 1 })],
    ["a batch that k does not have", "shape/mismatch", () => build(replace(0, dense("f32", [2, 4, 5, 32])))],
    ["integers", "dtype/mismatch", () => build(replace(1, dense("i32", [1, 2, 7, 32])))],
    [
      "a block that does not divide the head",
      "format/block",
      () => build(whole.map((type, i) => (i > 0 ? stored(FORMATS.nf4, type.shape) : type))),
    ],
    ["an extra that is not there", "graph/invalid", () => build(whole, { extras: ["mask"] })],
    ["a mask of another shape", "shape/mismatch", () => build([...whole, dense("f32", [5, 8])], { extras: ["mask"] })],
    ["sinks for other heads", "shape/mismatch", () => build([...whole, dense("f32", [2])], { extras: ["sinks"] })],
    ["pages without a cache", "graph/invalid", () => build([...whole, dense("u32", [2])], { extras: ["pages"] })],
    [
      "a ring without a window",
      "graph/invalid",
      () =>
        build([dense("f32", ["T", 128]), stored(FORMATS.f32, [2, 16, 32]), stored(FORMATS.f32, [2, 16, 32])], {
          position: "past",
          ring: true,
        }),
    ],
  ] as const)("%s", (_, code, make) => {
    expect(make).toThrowError(coded(code));
  });

  test("a head that no kernel takes", () => {
    for (const size of [18, 320]) {
      const types = whole.map((type) => dense("f32", [...type.shape.slice(0, -1), size]));
      expect(() => webgpu.plan(build(types))).toThrowError(
        coded("plan/no-kernel", `the head dimension must be a multiple of 4 up to 256: it is ${size}`),
      );
    }
  });
});

/** Rope, cache writes and attention of one layer: 4 heads over 2 KV heads. */
function layer(size: number): Graph {
  const g = new GraphBuilder({ T: 9, past: 20 });
  const [q, k, v] = (
    [
      ["q", 4],
      ["k", 2],
      ["v", 2],
    ] as const
  ).map(([name, heads]) => g.input(name, dense("f32", ["T", heads * size]))) as [number, number, number];
  const table = g.weight("table", dense("f32", [32, size]));
  const turn = (x: number, heads: number) => g.one("rope", [x, table], { heads, position: "past" });
  const [turnedQ, turnedK] = [turn(q, 4), turn(k, 2)];
  const caches = [turnedK, v].map((x, i) =>
    g.one("kv_write", [g.state(`cache${i}`, stored(FORMATS.f32, [2, 24, size])), x], { position: "past" }),
  ) as [number, number];
  g.output(
    "out",
    g.one("sdpa", [turnedQ, ...caches], {
      heads: 4,
      kvHeads: 2,
      scale: 1 / Math.sqrt(size),
      causal: true,
      position: "past",
    }),
  );
  return g.build();
}

function numbers(shape: readonly number[], seed: number, gain: number): DenseTensor {
  const next = randomWords(seed);
  return {
    dtype: "f32",
    shape,
    data: Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => (next() / 2 ** 31 - 1) * gain),
  };
}

/** A few outliers among small numbers, which a transform spreads. */
function layerInputs(tokens: number, size: number): Record<string, DenseTensor> {
  const operands = {
    q: numbers([tokens, 4 * size], 1, 1),
    k: numbers([tokens, 2 * size], 2, 1),
    v: numbers([tokens, 2 * size], 3, 1),
  };
  for (const { data } of Object.values(operands)) data[5] = 20;
  return operands;
}

const decoder = (options: Parameters<typeof loadModel>[1]) => loadModel(tinyModel(), { context: 48, ...options });
const IDS = Array.from({ length: 20 }, (_, i) => 2 + ((i * 37) % 250));

async function generated(device: Device, options: object): Promise<number[]> {
  using model = await decoder({ device, ...options });
  const ids: number[] = [];
  for await (const token of model.generate(IDS, { maxTokens: 8, ignoreEos: true })) ids.push(token.id);
  return ids;
}

describe("float8 attention", () => {
  test("takes the tokens that the reference takes", async () => {
    expect(await generated(webgpu, { attention: "float8" })).toEqual(
      await generated(reference, { attention: "float8" }),
    );
  });

  test("is near the attention it replaces, and not the same", async () => {
    const logits = async (options: object) => {
      using model = await decoder({ device: reference, ...options });
      return model.logits(IDS);
    };
    const [exact, rounded] = [await logits({}), await logits({ attention: "float8" })];
    const spread = Math.max(...exact) - Math.min(...exact);
    const distance = Math.max(...exact.map((x, i) => Math.abs(x - (rounded[i] as number)))) / spread;
    expect(distance).toBeGreaterThan(0);
    expect(distance).toBeLessThan(0.1);
  });

  test("costs no dispatch: explain shows the queries quantized with the rope", async () => {
    using model = await decoder({ device: webgpu, attention: "float8" });
    using plain = await decoder({ device: webgpu });
    expect(model.explain()).toContain("(rope+kv_write: rope+quantize+rope+kv_write+kv_write)");
    expect(model.program.plan.steps.length).toBe(plain.program.plan.steps.length);
    const sdpa = model.program.plan.steps.filter((step) => step.kind === "sdpa");
    expect(sdpa.length).toBe(2);
    for (const { nodes } of sdpa) expect(nodes[0]?.attrs).toMatchObject({ probabilities: { scale: 256 } });
  });

  test.each(["NONE", "QKV", "V_ONLY"] as const)(
    "with hadamard %s: both backends, near the plain result",
    async (mode) => {
      const graph = layer(64);
      const options = { inputs: layerInputs(7, 64), symbols: { T: 7, past: 3 } };
      const out = async (device: Device, of: Graph) => {
        using program = await device.compile(of, { weights: new Map([["table", numbers([32, 64], 4, 1)]]) });
        return ((await program.run(options)).out as DenseTensor).data as Float32Array;
      };
      const changed = applyLowPrecisionAttention(graph, { hadamard: mode });
      const [plain, expected, got] = [
        await out(reference, graph),
        await out(reference, changed),
        await out(webgpu, changed),
      ];
      const most = (a: Float32Array, b: Float32Array) =>
        a.reduce((m, x, i) => Math.max(m, Math.abs(x - (b[i] as number))), 0);
      const size = plain.reduce((m, x) => Math.max(m, Math.abs(x)), 0);
      expect(most(expected, plain) / size).toBeLessThan(0.1);
      expect(most(expected, plain)).toBeGreaterThan(0);
      // Probabilities are rounded against the running maximum on the device: half a step of e4m3 apart at most.
      expect(most(expected, got) / size).toBeLessThan(0.05);
      const counts = { NONE: 0, QKV: 4, V_ONLY: 2 };
      expect(changed.nodes.filter(({ op }) => op === "hadamard").length).toBe(counts[mode]);
      const steps = webgpu.plan(changed).steps;
      expect(steps.length).toBe(mode === "NONE" ? 2 : 3);
      expect(steps[0]?.fusion).toBe("rope+kv_write");
    },
  );

  test("a hadamard transform of heads that are no power of two is an error", () => {
    expect(() => applyLowPrecisionAttention(layer(80), { hadamard: "QKV" })).toThrowError(coded("shape/mismatch"));
    expect(() => applyLowPrecisionAttention(layer(80))).not.toThrow();
  });

  test("refuses masks, stored queries and keys without a cache", () => {
    const g = new GraphBuilder({ T: 8 });
    const q = g.input("q", dense("f32", ["T", 128]));
    const [k, v] = ["k", "v"].map((name) => g.input(name, dense("f32", [2, 8, 32]))) as [number, number];
    g.output("y", g.one("sdpa", [q, k, v], { heads: 4, kvHeads: 2, scale: 1, causal: true }));
    expect(() => applyLowPrecisionAttention(g.build())).toThrowError(coded("graph/invalid", "must come from a cache"));
    expect(() => attentionMode("fast")).toThrowError(coded("argument/unknown-name"));
  });
});

describe("a decoder with a quantized cache", () => {
  test.each(["bf16", "int8", "float8", "int4"])("%s: WebGPU takes the reference's tokens", async (kv) => {
    // Heads of 32: int4 has groups of 32.
    const config = { hidden_size: 64, num_attention_heads: 2, num_key_value_heads: 1 };
    const run = async (device: Device) => {
      using model = await loadModel(tinyModel({ config }), { device, context: 48, kv });
      const ids: number[] = [];
      for await (const token of model.generate(IDS, { maxTokens: 8, ignoreEos: true })) ids.push(token.id);
      return ids;
    };
    expect(await run(webgpu)).toEqual(await run(reference));
  });
});

/** Llama-3.1-8B's shapes, without its rope scaling. */
const LLAMA_8B = {
  architectures: ["LlamaForCausalLM"],
  vocab_size: 128256,
  hidden_size: 4096,
  intermediate_size: 14336,
  num_hidden_layers: 32,
  num_attention_heads: 32,
  num_key_value_heads: 8,
  hidden_act: "silu",
  max_position_embeddings: 131072,
  rms_norm_eps: 1e-5,
  rope_theta: 500000,
  tie_word_embeddings: false,
  torch_dtype: "bfloat16",
};

const GIB = 2 ** 30;
const hardware = (memory: number, maxBinding = 2 * GIB - 4) => ({
  features: new Set(["subgroups"]),
  maxBinding,
  maxBuffer: 4 * GIB,
  memory,
  workgroupMemory: 32768,
  maxInvocations: 1024,
  maxWorkgroupsPerDimension: 65535,
  maxStorageBuffers: 10,
  subgroupSize: [32, 32] as const,
  bandwidth: 1e12,
  flops: 2e13,
  dispatchSeconds: 2e-6,
});
const trace = (memory: number, maxBinding?: number) =>
  new Device(
    openTrace({ name: "an imagined GPU", kernels: WEBGPU_KERNELS, capabilities: hardware(memory, maxBinding) }),
  );

describe("128 K tokens of an 8B model, planned without a device", () => {
  test.each([
    ["bf16", 2 * 128 * 8 * 32 * 2],
    ["int8", 2 * (128 + 4) * 8 * 32],
    ["float8", 2 * (128 + 4) * 8 * 32],
    ["int4", 2 * (64 + 4 * 3) * 8 * 32],
  ] as const)("%s", (kv, perToken) => {
    const outline = outlineModel(LLAMA_8B, { device: trace(80 * GIB), context: 131072, kv, quantize: "int4wo-128" });
    expect(outline.bytes.cachePerToken).toBe(perToken);
    expect(outline.bytes.cache).toBe(perToken * 131072);
    const { weights, cache, activations, scratch, total } = outline.bytes;
    expect(total).toBe(weights + cache + activations + scratch);
    expect(weights).toBeGreaterThan(4e9);
    expect(weights).toBeLessThan(6e9);
    // Short contexts keep to one dispatch; long ones divide the keys.
    const kernels = outline.plan.buckets.map(({ choices }) => [
      ...new Set(choices.flatMap(({ kernel }) => (kernel.kind === "sdpa" ? [kernel.id] : []))),
    ]);
    expect(kernels).toEqual([["webgpu/sdpa/decode"], ["webgpu/sdpa/decode_split"], ["webgpu/sdpa/prefill"]]);
    // Norm, qkv, rope and cache, attention, o, norm, gate and up, down.
    expect(outline.plan.steps.length).toBe(32 * 8 + 5);
  });

  test("int8 saves 73 % of float32's cache", () => {
    const bytes = (kv: string) => outlineModel(LLAMA_8B, { device: trace(200 * GIB), kv }).bytes.cache;
    expect(1 - bytes("int8") / bytes("none")).toBeGreaterThan(0.73);
  });

  test("what the device cannot hold is refused before anything is loaded", () => {
    const plan = (memory: number, binding?: number) => () =>
      outlineModel(LLAMA_8B, { device: trace(memory, binding), context: 131072, kv: "int8", quantize: "int4wo-128" });
    expect(plan(12 * GIB)).toThrowError(coded("plan/memory", "the program needs"));
    expect(plan(80 * GIB, 128 * 2 ** 20)).toThrowError(coded("plan/memory", "layer0.k_cache needs"));
    expect(plan(80 * GIB)).not.toThrow();
  });

  test("a context past the model's is an error", () => {
    expect(() => outlineModel(LLAMA_8B, { device: trace(80 * GIB), context: 131073 })).toThrowError(
      coded("argument/invalid"),
    );
  });

  test("the device runs nothing", async () => {
    await expect(trace(GIB).compile(attentionOnly())).rejects.toMatchObject({ code: "device/unavailable" });
  });
});

function attentionOnly(): Graph {
  const g = new GraphBuilder({ T: 4, past: 8 });
  const cache = stored(kvFormat("int8"), [2, 8, 32]);
  const q = g.input("q", dense("f32", ["T", 128]));
  g.output(
    "y",
    g.one("sdpa", [q, g.state("k", cache), g.state("v", cache)], {
      heads: 4,
      kvHeads: 2,
      scale: 1,
      causal: true,
      position: "past",
    }),
  );
  return g.build();
}

test("explain says when a split pays", () => {
  const text = explainPlan(webgpu.plan(attentionOnly()));
  expect(text).toContain("its second dispatch pays from 1024 keys on: a query sees 8 at most");
});
