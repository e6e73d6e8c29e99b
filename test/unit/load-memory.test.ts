import { mkdir, mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { FewbitError } from "../../src/core/errors.js";
import { Staging } from "../../src/core/staging.js";
import { withScale } from "../../src/formats/format.js";
import { GGML_TYPES, ggmlType } from "../../src/formats/ggml.js";
import { FORMATS } from "../../src/formats/table.js";
import { torchaoPartName } from "../../src/formats/torchao.js";
import { torchaoClass } from "../../src/formats/torchao-write.js";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { ggmlMatrix } from "../../src/io/gguf-model.js";
import { withStored } from "../../src/io/quantized.js";
import { layOut, type SafetensorsDtype, type TensorStore } from "../../src/io/safetensors.js";
import { gptqScheme } from "../../src/io/scheme-packed.js";
import { createSource, memorySource, type SourceDirectory } from "../../src/io/source.js";
import { hostBytes } from "../../src/ir/tensor.js";
import { parseConfig, type TensorSpec, tensorSpecs } from "../../src/models/config.js";
import { planWeights } from "../../src/models/weights.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
import { Built } from "../setup/built.js";
import { TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

const MiB = 2 ** 20;
/** A matrix of 4096 x 8192: 64 MiB in bf16, as the largest of a model of eight billion parameters. */
const [N, K] = [4096, 8192];

interface Part {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
}

/** Shards of zeros that are made as they are read: `count` of them, with the parts of one parameter each. */
function shards(count: number, parts: (shard: number) => Part[], metadata: (shard: number) => Record<string, string>) {
  const reads = { total: 0 };
  const names = Array.from({ length: count }, (_, i) => `${i}.safetensors`);
  const weightMap = Object.fromEntries(names.flatMap((file, i) => parts(i).map((part) => [part.name, file])));
  const directory: SourceDirectory = {
    name: "synthetic",
    async open(file) {
      if (file === "model.safetensors.index.json")
        return memorySource(new TextEncoder().encode(JSON.stringify({ weight_map: weightMap })), file);
      const shard = names.indexOf(file);
      if (shard < 0) throw new FewbitError("io/not-found", { path: file, reason: "it does not exist" });
      const { header, size } = layOut(parts(shard), metadata(shard));
      return createSource({
        name: file,
        size,
        async read(offset, length, _signal, memory) {
          reads.total += length;
          const out = memory?.take(length).fill(0) ?? new Uint8Array(length);
          if (offset < header.length) out.set(header.subarray(offset, offset + length));
          return out;
        },
      });
    },
  };
  return { directory, reads };
}

/** The most bytes of buffers above what was there before `body`, which samples whenever they may be most. */
async function peakOf(body: (sample: () => void) => Promise<void>): Promise<number> {
  const used = () => process.memoryUsage().arrayBuffers;
  // Buffers are freed by another thread.
  for (let i = 0; i < 2; i++) {
    collect();
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  const before = used();
  let peak = before;
  await body(() => {
    peak = Math.max(peak, used());
  });
  return peak - before;
}

const spec = (name: string): TensorSpec => {
  const source = { name, alternatives: [], shape: [N, K], first: 0, transposed: false };
  return { role: "up", layer: 0, expert: null, name, shape: [N, K], source, offset: 0 };
};

/** Reads every weight of a store as a device takes it: tile by tile, one tensor after another, in the same memory. */
async function loadAll(store: TensorStore, quantize: string): Promise<{ peak: number; largest: number }> {
  const names = [...(store.stored?.keys() ?? store.tensors.keys())];
  const all = names.length > 0 ? names : [...store.tensors.keys()];
  const plan = planWeights(store, all.map(spec), parseQuantizeName(quantize));
  let largest = 0;
  const peak = await peakOf(async (sample) => {
    const memory = new Staging();
    for (const name of all)
      for await (const tile of plan.rows(spec(name), { memory }).tiles()) {
        sample();
        largest = Math.max(largest, hostBytes(tile));
      }
  });
  return { peak, largest };
}

/** A file's bytes, a tile of float32 made of them, its codes, and room for the sizes of other tensors: 4 MiB each at most. */
const TILES = 24 * MiB;

describe("loading holds a tile of a tensor and little more, without waiting for the garbage collector", () => {
  const cases = [
    ["bf16 as it is", "none", null],
    ["bf16, quantized at load", "int8wo", null],
    ["bf16, quantized with one scale for the tensor", "float8dq-tensor", null],
    ["torchao int8", "none", { format: FORMATS.int8 }],
    ["torchao intx (4 bits)", "none", { format: withScale(FORMATS.int4, { block: [1, 32] }) }],
    ["torchao int4", "none", { format: FORMATS.int4_plain }],
    ["torchao nvfp4", "none", { format: FORMATS.nvfp4 }],
  ] as const;
  for (const [what, quantize, stored] of cases)
    test(what, { timeout: 120_000 }, async () => {
      const made = stored && torchaoClass({ ...stored, shape: [N, K], dtype: "bf16", activation: null });
      const parts = (shard: number): Part[] =>
        made === null
          ? [{ name: `m${shard}.weight`, dtype: "BF16", shape: [N, K] }]
          : (made?.parts ?? []).map(({ name, dtype, shape }) => ({
              name: torchaoPartName(`m${shard}.weight`, name),
              dtype: dtype as SafetensorsDtype,
              shape,
            }));
      const metadata = (shard: number): Record<string, string> =>
        made === null || made === undefined
          ? {}
          : {
              tensor_names: JSON.stringify([`m${shard}.weight`]),
              [`m${shard}.weight`]: JSON.stringify({
                _type: made.type,
                _data: made.attributes,
                _tensor_data_names: made.parts.map((part) => part.name),
              }),
            };
      const { directory, reads } = shards(3, parts, metadata);
      await using store = await withStored(await openCheckpoint(directory), null);
      const { peak, largest } = await loadAll(store, quantize);
      console.log(`${what}: ${(peak / MiB).toFixed(0)} MiB at most, ${(largest / MiB).toFixed(0)} of them a tile`);
      expect(reads.total).toBeGreaterThan(3 * 16 * MiB);
      expect(largest).toBeLessThan(8 * MiB);
      expect(peak - largest).toBeLessThan(TILES);
    });

  test.each(["Q4_K", "Q6_K"])("GGUF %s", async (kind) => {
    const id = GGML_TYPES.find((candidate) => ggmlType(candidate)?.name === kind) as number;
    const type = ggmlType(id) as NonNullable<ReturnType<typeof ggmlType>>;
    const byteLength = (N * K * type.bytes) / type.elements;
    const source = createSource({
      name: "synthetic",
      size: byteLength,
      read: async (_offset, length, _signal, memory) => memory?.take(length).fill(0) ?? new Uint8Array(length),
    });
    const matrix = ggmlMatrix(
      source,
      { name: "m.weight", shape: [N, K], type: id, byteOffset: 0, byteLength },
      type,
      null,
    );
    const none = {
      name: "synthetic",
      tensors: new Map(),
      close: async () => {},
      [Symbol.asyncDispose]: async () => {},
    };
    const read = async () => new Uint8Array(0);
    const { peak, largest } = await loadAll({ ...none, read, stored: new Map([["m.weight", matrix]]) }, "none");
    console.log(`GGUF ${kind}: ${(peak / MiB).toFixed(0)} MiB at most, ${(largest / MiB).toFixed(0)} of them a tile`);
    expect(largest).toBeLessThan(8 * MiB);
    // Codes are unpacked to a byte each on their way.
    expect(peak - largest).toBeLessThan(TILES);
  });

  test.each([
    ["", false],
    [", in order of activation", true],
  ])("GPTQ, which is stored as the transpose%s", { timeout: 120_000 }, async (_, shuffled) => {
    const parts = (shard: number): Part[] => [
      { name: `m${shard}.qweight`, dtype: "I32", shape: [K / 8, N] },
      { name: `m${shard}.qzeros`, dtype: "I32", shape: [K / 128, N / 8] },
      { name: `m${shard}.scales`, dtype: "F16", shape: [K / 128, N] },
      ...(shuffled ? [{ name: `m${shard}.g_idx`, dtype: "I32", shape: [K] } as const] : []),
    ];
    const { directory } = shards(3, parts, () => ({}));
    await using zeros = await openCheckpoint(directory);
    const order = new Uint8Array(Int32Array.from({ length: K }, (_, i) => ((i * 77) % K) >> 7).buffer);
    const checkpoint: TensorStore = {
      ...zeros,
      read: async (name, options) => (name.endsWith("g_idx") ? order : zeros.read(name, options)),
    };
    const stored = await gptqScheme({ bits: 4, group_size: 128, sym: false }).describe(checkpoint);
    const { peak, largest } = await loadAll({ ...checkpoint, stored }, "none");
    // The transpose of a tensor is known when all of it was read: the largest tile is the tensor, and others lie about.
    expect(largest).toBeGreaterThan(16 * MiB);
    expect(peak - largest).toBeLessThan(64 * MiB);
  });
});

/** A folder of 396 MiB of bf16, of which the embedding has 200; the file is one hole, so that it takes no room on the disk. */
async function writeModel(folder: string): Promise<void> {
  const sizes = { vocab_size: 51200, hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 2 };
  const heads = { num_attention_heads: 16, num_key_value_heads: 16, tie_word_embeddings: true };
  const json = { ...TINY_CONFIG, ...sizes, ...heads, max_position_embeddings: 131072 };
  const specs = tensorSpecs(parseConfig(json));
  const { header, size } = layOut(
    specs.map(({ name, shape }) => ({ name, dtype: "BF16", shape })),
    {},
  );
  const files = new Map<string, Uint8Array>(tinyModel());
  files.set("config.json", new TextEncoder().encode(JSON.stringify(json)));
  files.set("model.safetensors", header);
  for (const [name, bytes] of files) await writeFile(join(folder, name), bytes);
  await truncate(join(folder, "model.safetensors"), size);
}

/**
 * Loads a folder on a device that takes every byte, counts it and keeps none: plan, layout and upload are those of the CUDA backend, and
 * what is left is the memory of the host. (The addon itself adds 32 MiB of pinned memory, whatever is loaded; WebGPU on a CPU would
 * hold the weights in this very process.) Nothing is collected by force.
 */
const LOAD = `
import { H100 } from "./backends/native/capabilities.js";
import { CudaDevice } from "./backends/native/device.js";
import { loadDecoder } from "./models/load.js";
import { Device } from "./runtime/device.js";
const { WARM, FOLDER, QUANTIZE } = process.env;
let before;
let largest = 0;
let written = 0;
const peak = { rss: 0, arrayBuffers: 0 };
const sample = () => {
  if (before === undefined) return;
  const now = process.memoryUsage();
  for (const name of Object.keys(peak)) peak[name] = Math.max(peak[name], now[name] - before[name]);
};
class Sink {
  buffers = 0;
  allocate() { return ++this.buffers; }
  free() {}
  write(_buffer, _at, data) {
    written += data.byteLength;
    largest = Math.max(largest, data.byteLength);
    sample();
  }
  fill() {}
  load() { return 1; }
  unload() {}
  blas() { return { version: 0, reason: "a sink has none" }; }
  counters() { return { bytes: 0 }; }
  dispose() {}
}
const probe = { driver: 13000, runtime: 13000, status: "", devices: [H100] };
const addon = { abi: 1, entries: [], architectures: "90a-real", probe: () => probe, Device: Sink };
const load = async (folder, context) => {
  const device = new Device(new CudaDevice(new Sink(), addon, probe, H100, false));
  const { program } = await loadDecoder(folder, { device, quantize: QUANTIZE, context }, "last");
  program[Symbol.dispose]();
};
// A small model first: it brings code into memory.
await load(WARM, 16);
largest = written = 0;
before = process.memoryUsage();
const timer = setInterval(sample, 1);
await load(FOLDER, 131072);
clearInterval(timer);
console.log(JSON.stringify({ ...peak, largest, written }));
`;

describe("a process grows by a tile and at most 64 MiB while it loads a folder from disk", () => {
  let folder = "";
  let built: Built | undefined;

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "fewbit-memory-"));
    for (const name of ["warm", "model"]) await mkdir(join(folder, name));
    for (const [name, bytes] of tinyModel()) await writeFile(join(folder, "warm", name), bytes);
    await writeModel(join(folder, "model"));
    built = await Built.of("backends/native/device.ts", "models/load.ts", "runtime/device.ts");
  });

  afterAll(async () => {
    await built?.[Symbol.asyncDispose]();
    await rm(folder, { recursive: true, force: true });
  });

  test.each([
    ["none", 450],
    ["int8wo", 340],
  ])("%s", { timeout: 120_000 }, async (quantize, atLeast) => {
    const env = { WARM: join(folder, "warm"), FOLDER: join(folder, "model"), QUANTIZE: quantize };
    const { stdout, stderr } = await (built as Built).node(LOAD, env, 100_000);
    expect(stderr).toBe("");
    const { rss, arrayBuffers, largest, written } = JSON.parse(stdout) as Record<string, number>;
    const shown = [rss, arrayBuffers, largest, written].map((bytes) => ((bytes ?? 0) / MiB).toFixed(0));
    console.log(
      `${quantize}: resident ${shown[0]} MiB more, buffers ${shown[1]}, a tile ${shown[2]}, in all ${shown[3]}`,
    );
    expect(written).toBeGreaterThan(atLeast * MiB);
    expect(largest).toBeLessThan(8 * MiB);
    expect(arrayBuffers).toBeLessThan((largest as number) + TILES);
    expect(rss).toBeLessThan((largest as number) + 64 * MiB);
  });
});
