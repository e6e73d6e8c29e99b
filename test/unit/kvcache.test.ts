import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openReference } from "../../src/backends/reference/device.js";
import { openWebGpu } from "../../src/backends/webgpu/device.js";
import type { Format } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor } from "../../src/formats/tensor.js";
import { dense, type Graph, GraphBuilder, stored } from "../../src/ir/graph.js";
import type { DenseTensor, HostTensor } from "../../src/ir/tensor.js";
import { copyBlocks, KV_FORMATS, KvPool, kvBytes, kvFormat, ringCapacity } from "../../src/models/kvcache.js";
import { explainPlan } from "../../src/plan/plan.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { Device, type Program } from "../../src/runtime/device.js";
import { randomWords } from "../support/codecs.js";

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

const HEADS = 4;
const KV_HEADS = 2;

interface Attention {
  readonly format: Format;
  readonly size?: number;
  readonly capacity?: number;
  readonly page?: number;
  readonly blocks?: number;
  readonly window?: number;
  readonly ring?: boolean;
  readonly interleaved?: boolean;
}

/** A decoder layer's attention: q, k and v are rotated, written and attended over. */
function attentionGraph({
  format,
  size = 64,
  capacity = 24,
  page,
  blocks = 0,
  window,
  ring = false,
  interleaved = false,
}: Attention): Graph {
  const g = new GraphBuilder({ T: 9, past: 200 });
  const [q, k, v] = [HEADS, KV_HEADS, KV_HEADS].map((heads, i) =>
    g.input("qkv"[i] as string, dense("f32", ["T", heads * size])),
  ) as [number, number, number];
  const angles = g.weight("angles", dense("f32", [256, size]));
  const pages = page === undefined ? [] : [g.input("pages", dense("u32", [capacity / page]))];
  const shape = page === undefined ? [KV_HEADS, capacity, size] : [blocks, KV_HEADS, page, size];
  const turn = (x: number, heads: number) => g.one("rope", [x, angles], { heads, position: "past", interleaved });
  const [turnedQ, turnedK] = [turn(q, HEADS), turn(k, KV_HEADS)];
  const write = (name: string, x: number) =>
    g.one("kv_write", [g.state(name, stored(format, shape)), x, ...pages], { position: "past", ring });
  const [keys, values] = [write("keys", turnedK), write("values", v)];
  const attrs = {
    heads: HEADS,
    kvHeads: KV_HEADS,
    scale: 1 / Math.sqrt(size),
    causal: true,
    position: "past",
    ring,
    extras: page === undefined ? [] : (["pages"] as const),
  };
  g.output(
    "out",
    g.one("sdpa", [turnedQ, keys, values, ...pages], window === undefined ? attrs : { ...attrs, window }),
  );
  return g.build();
}

const angles = (size: number): DenseTensor => {
  const data = Float32Array.from({ length: 256 * size }, (_, i) => {
    const [position, at] = [Math.floor(i / size), i % size];
    const angle = position * 10000 ** ((-2 * (at % (size / 2))) / size);
    return at < size / 2 ? Math.cos(angle) : Math.sin(angle);
  });
  return { dtype: "f32", shape: [256, size], data };
};

function inputs(tokens: number, size: number, seed: number): Record<string, HostTensor> {
  const next = randomWords(seed);
  const make = (heads: number): DenseTensor => {
    const data = Float32Array.from({ length: tokens * heads * size }, () => (next() / 2 ** 31 - 1) * 3);
    // A head of zeros, and one of a single outlier.
    if (tokens > 1) data.fill(0, size, 2 * size);
    data[3] = 1000;
    return { dtype: "f32", shape: [tokens, heads * size], data };
  };
  return { q: make(HEADS), k: make(KV_HEADS), v: make(KV_HEADS) };
}

const compile = (device: Device, graph: Graph, size = 64, fuse = true): Promise<Program> =>
  device.compile(graph, { weights: new Map([["angles", angles(size)]]), fuse });

const bits = (tensor: HostTensor) => {
  const { qdata, scales, zero } = tensor as QuantizedTensor;
  return [qdata, ...scales, ...(zero === undefined ? [] : [zero])].map((words) => [...words]);
};

/** Runs of [tokens, past] on both backends: caches must be equal bit for bit, outputs near. */
async function expectSame(
  attention: Attention,
  runs: readonly (readonly [tokens: number, past: number])[],
  pages?: Uint32Array,
): Promise<void> {
  const graph = attentionGraph(attention);
  const size = attention.size ?? 64;
  using expected = await compile(reference, graph, size);
  using got = await compile(webgpu, graph, size);
  for (const [i, [tokens, past]] of runs.entries()) {
    const options = {
      inputs: {
        ...inputs(tokens, size, i + 1),
        ...(pages === undefined ? {} : { pages: { dtype: "u32", shape: [pages.length], data: pages } as const }),
      },
      symbols: { T: tokens, past },
    };
    const [a, b] = [await expected.run(options), await got.run(options)].map(
      (result) => (result.out as DenseTensor).data as Float32Array,
    ) as [Float32Array, Float32Array];
    for (let at = 0; at < tokens * HEADS * size; at++)
      expect(Math.abs((a[at] as number) - (b[at] as number))).toBeLessThan(2e-4);
    for (const name of ["keys", "values"]) {
      expect(bits(await got.executable.read(name)), `${name} after run ${i}`).toEqual(
        bits(await expected.executable.read(name)),
      );
    }
  }
}

const RUNS = [
  [5, 0],
  [1, 5],
  [9, 6],
  [1, 15],
  [8, 16],
] as const;

describe("a cache in every format holds the same bits on both backends", () => {
  const formats: Record<string, Format> = {
    ...Object.fromEntries(Object.entries(KV_FORMATS).filter(([name]) => name !== "none")),
    mxfp4: FORMATS.mxfp4,
    fp6: FORMATS.mxfp6_e2m3,
    int4_tinygemm: kvFormat("int4").scales.length === 1 ? FORMATS.int4_tinygemm : FORMATS.int4_plain,
  };
  test.each(Object.entries(formats))("%s", (_, format) => expectSame({ format }, RUNS));
  test("int8, heads of 80", () => expectSame({ format: kvFormat("int8"), size: 80 }, RUNS));
  test("int4, heads of 96: three scales a row", () => expectSame({ format: kvFormat("int4"), size: 96 }, RUNS));
  test("int8, interleaved pairs", () => expectSame({ format: kvFormat("int8"), interleaved: true }, RUNS));
  test("int4 in a ring of 20 for a window of 8", () =>
    expectSame({ format: kvFormat("int4"), capacity: 20, window: 8, ring: true }, [
      ...RUNS,
      [9, 24],
      [1, 33],
      [5, 150],
    ]));
  test("int8 in pages of 4", () =>
    expectSame({ format: kvFormat("int8"), page: 4, blocks: 9 }, RUNS, Uint32Array.of(7, 2, 0, 8, 3, 1)));
});

test("codes and scales are those of quantizeTensor", async () => {
  const format = kvFormat("int8");
  using program = await compile(webgpu, attentionGraph({ format }));
  const given = inputs(3, 64, 9);
  await program.run({ inputs: given, symbols: { T: 3, past: 4 } });
  const values = (await program.executable.read("values")) as QuantizedTensor;
  const expected = quantizeTensor((given.v as DenseTensor).data as Float32Array, [6, 64], "f32", format);
  for (let t = 0; t < 3; t++) {
    for (let head = 0; head < KV_HEADS; head++) {
      const [row, from] = [head * 24 + 4 + t, t * KV_HEADS + head];
      expect([...values.qdata.slice(row * 16, row * 16 + 16)]).toEqual([
        ...expected.qdata.slice(from * 16, from * 16 + 16),
      ]);
      expect(values.scales[0]?.[row]).toBe(expected.scales[0]?.[from]);
    }
  }
});

describe("fusion", () => {
  test.each(Object.keys(KV_FORMATS))("%s: fused and unfused are equal bit for bit on the reference", async (name) => {
    const graph = attentionGraph({ format: kvFormat(name) });
    using fused = await compile(reference, graph);
    using plain = await compile(reference, graph, 64, false);
    expect(fused.plan.steps.length).toBe(2);
    expect(plain.plan.steps.length).toBe(5);
    for (const [tokens, past] of RUNS) {
      const options = { inputs: inputs(tokens, 64, past), symbols: { T: tokens, past } };
      expect(await fused.run(options)).toEqual(await plain.run(options));
    }
    for (const state of ["keys", "values"])
      expect(bits(await fused.executable.read(state))).toEqual(bits(await plain.executable.read(state)));
  });

  test("unfused steps give the same cache on WebGPU", async () => {
    const graph = attentionGraph({ format: kvFormat("int4") });
    using fused = await compile(webgpu, graph);
    using plain = await compile(webgpu, graph, 64, false);
    const options = { inputs: inputs(7, 64, 3), symbols: { T: 7, past: 2 } };
    expect(await fused.run(options)).toEqual(await plain.run(options));
    expect(bits(await fused.executable.read("keys"))).toEqual(bits(await plain.executable.read("keys")));
  });

  test("explain names it", () => {
    expect(explainPlan(webgpu.plan(attentionGraph({ format: kvFormat("int8") })))).toContain(
      "(rope+kv_write: rope+rope+kv_write+kv_write)",
    );
  });

  test("caches of two formats are written one by one", () => {
    const graph = attentionGraph({ format: kvFormat("int8") });
    const values = graph.values.map((value) =>
      value.name === "values" ? { ...value, type: stored(FORMATS.bf16, value.type.shape) } : value,
    );
    expect(webgpu.plan({ ...graph, values }).steps.map((step) => step.fusion)).toEqual([
      undefined,
      undefined,
      undefined,
      undefined,
      undefined,
    ]);
  });
});

describe("bytes", () => {
  const config = { layers: 32, kvHeads: 8, headDim: 128 };

  test("int8 takes at most 0.54 of bf16, int4 at most 0.30, by the byte counter", async () => {
    for (const size of [64, 128]) {
      const held = async (name: string, capacity: number): Promise<number> => {
        using program = await compile(webgpu, attentionGraph({ format: kvFormat(name), size, capacity }), size);
        void program;
        return webgpu.bytes;
      };
      const perToken = async (name: string) => ((await held(name, 768)) - (await held(name, 512))) / 256;
      const bf16 = await perToken("bf16");
      expect(bf16).toBe(2 * KV_HEADS * size * 2);
      expect((await perToken("int8")) / bf16).toBeLessThanOrEqual(0.54);
      expect((await perToken("float8")) / bf16).toBeLessThanOrEqual(0.54);
      expect((await perToken("int4")) / bf16).toBeLessThanOrEqual(0.3);
    }
  });

  test("of a whole model", () => {
    expect(kvBytes(config, kvFormat("bf16"), 131072)).toBe(2 * 32 * 8 * 128 * 2 * 131072);
    expect(kvBytes(config, kvFormat("int8"), 131072)).toBe(2 * 32 * 8 * (128 + 4) * 131072);
  });
});

describe("a pool of blocks", () => {
  test("a fork shares blocks and copies the last one when it writes", () => {
    const pool = new KvPool(6, 4);
    const a = pool.open();
    expect(a.append(6)).toEqual([]);
    const b = a.fork();
    expect(pool.free).toBe(4);
    expect(b.pages(3)).toEqual(a.pages(3));
    const [copy] = b.append(1);
    expect(copy?.from).toBe(a.pages(2)[1]);
    expect(b.pages(2)[0]).toBe(a.pages(2)[0]);
    expect(b.pages(2)[1]).toBe(copy?.to);
    // Now nobody shares the last blocks.
    expect(a.append(1)).toEqual([]);
    expect(pool.free).toBe(3);
    a[Symbol.dispose]();
    expect(pool.free).toBe(4);
    b.truncate(0);
    expect([pool.free, b.length]).toEqual([6, 0]);
  });

  test("an overflow is an error and changes nothing", () => {
    const pool = new KvPool(3, 4);
    const a = pool.open();
    a.append(10);
    expect(() => a.append(3)).toThrowError(
      expect.objectContaining({ code: "cache/overflow", context: { needed: 13, capacity: 12 } }),
    );
    expect([a.length, pool.free]).toEqual([10, 0]);
    const b = a.fork();
    // The shared last block would have to be copied, and there is no block for it.
    expect(() => b.append(1)).toThrowError(expect.objectContaining({ code: "cache/overflow" }));
    expect(b.length).toBe(10);
    expect(a.pages(3)).toEqual(b.pages(3));
    expect(() => a.pages(2)).toThrowError(expect.objectContaining({ code: "cache/overflow" }));
    expect(() => new KvPool(0, 4)).toThrowError(expect.objectContaining({ code: "argument/invalid" }));
    b[Symbol.dispose]();
    expect(() => b.fork()).toThrowError(expect.objectContaining({ code: "object/disposed" }));
  });

  test.each(["int8", "int4", "bf16"])("two sequences of one %s pool do not disturb each other", async (name) => {
    const format = kvFormat(name);
    const paged = { format, page: 4, blocks: 8, capacity: 24 };
    using program = await compile(webgpu, attentionGraph(paged));
    using alone = await compile(webgpu, attentionGraph({ format }));
    const pool = new KvPool(8, 4);
    const step = async (sequence: ReturnType<KvPool["open"]>, tokens: number, seed: number) => {
      const past = sequence.length;
      for (const copy of sequence.append(tokens)) {
        for (const state of ["keys", "values"]) {
          program.executable.write(
            state,
            copyBlocks((await program.executable.read(state)) as QuantizedTensor, KV_HEADS * 4, [copy]),
          );
        }
      }
      const pages: DenseTensor = { dtype: "u32", shape: [6], data: sequence.pages(6) };
      return program.run({ inputs: { ...inputs(tokens, 64, seed), pages }, symbols: { T: tokens, past } });
    };
    const plain = (tokens: number, past: number, seed: number) =>
      alone.run({ inputs: inputs(tokens, 64, seed), symbols: { T: tokens, past } });
    const a = pool.open();
    await step(a, 6, 1);
    const b = a.fork();
    const first = await step(b, 3, 2);
    const second = await step(a, 5, 3);
    await plain(6, 0, 1);
    expect(await plain(3, 6, 2)).toEqual(first);
    expect(await plain(5, 6, 3)).toEqual(second);
    expect(a.pages(6)[0]).toBe(b.pages(6)[0]);
  });

  test("blocks are copied with their scales and zero points", () => {
    const next = randomWords(5);
    const data = Float32Array.from({ length: 3 * 8 * 64 }, () => next() / 2 ** 31 - 1);
    const tensor = quantizeTensor(data, [24, 64], "f32", kvFormat("int4"));
    const copied = dequantize(copyBlocks(tensor, 8, [{ from: 2, to: 0 }]));
    expect(copied.slice(0, 512)).toEqual(dequantize(tensor).slice(1024));
    expect(copied.slice(512)).toEqual(dequantize(tensor).slice(512));
  });
});

describe("what a cache cannot hold", () => {
  test.each(["reference", "webgpu"] as const)("is an error on %s, and the cache is unchanged", async (name) => {
    const device = name === "reference" ? reference : webgpu;
    using program = await compile(device, attentionGraph({ format: kvFormat("int8") }));
    await program.run({ inputs: inputs(5, 64, 1), symbols: { T: 5, past: 16 } });
    const before = bits(await program.executable.read("keys"));
    await expect(program.run({ inputs: inputs(4, 64, 2), symbols: { T: 4, past: 21 } })).rejects.toMatchObject({
      code: "cache/overflow",
      context: { needed: 25, capacity: 24 },
    });
    expect(bits(await program.executable.read("keys"))).toEqual(before);
  });

  test("is an error for a ring that a step would overrun", async () => {
    using program = await compile(
      reference,
      attentionGraph({ format: kvFormat("bf16"), capacity: 14, window: 8, ring: true }),
    );
    await program.run({ inputs: inputs(7, 64, 1), symbols: { T: 7, past: 0 } });
    const before = bits(await program.executable.read("values"));
    await expect(program.run({ inputs: inputs(8, 64, 1), symbols: { T: 8, past: 7 } })).rejects.toMatchObject({
      code: "cache/overflow",
    });
    expect(bits(await program.executable.read("values"))).toEqual(before);
    expect(ringCapacity(8, 7, 1000)).toBe(14);
    expect(ringCapacity(8, 7, 10)).toBe(10);
  });

  test("is refused by name", () => {
    expect(() => kvFormat("int9")).toThrowError(expect.objectContaining({ code: "argument/unknown-name" }));
    expect(() => attentionGraph({ format: kvFormat("int4"), size: 48 })).toThrowError(
      expect.objectContaining({ code: "format/block" }),
    );
    expect(() => webgpu.plan(attentionGraph({ format: FORMATS.nvfp4 }))).toThrowError(
      expect.objectContaining({ code: "plan/no-kernel", message: expect.stringContaining("second scale level") }),
    );
  });
});
