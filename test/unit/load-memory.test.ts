import { mkdtemp, open, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { describe, expect, test } from "vitest";
import { FewbitError } from "../../src/core/errors.js";
import { withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { tensorBytes } from "../../src/formats/tensor.js";
import { torchaoPartName } from "../../src/formats/torchao.js";
import { torchaoClass } from "../../src/formats/torchao-write.js";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { withStored } from "../../src/io/quantized.js";
import { layOut, type SafetensorsDtype, type TensorStore } from "../../src/io/safetensors.js";
import { gptqScheme } from "../../src/io/scheme-packed.js";
import { createSource, memorySource, type SourceDirectory } from "../../src/io/source.js";
import { parseConfig, type TensorSpec, tensorSpecs } from "../../src/models/config.js";
import { openDecoder } from "../../src/models/load.js";
import { planWeights } from "../../src/models/weights.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
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
  const reads = { largest: 0, total: 0 };
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
        async read(offset, length) {
          reads.largest = Math.max(reads.largest, length);
          reads.total += length;
          const out = new Uint8Array(length);
          if (offset < header.length) out.set(header.subarray(offset, offset + length));
          return out;
        },
      });
    },
  };
  return { directory, reads };
}

/** The most bytes of buffers above what was there before `body`, sampled whenever it may have grown. */
async function peakOf(body: (sample: () => void) => Promise<void>): Promise<number> {
  const used = () => process.memoryUsage().arrayBuffers;
  collect();
  const before = used();
  let peak = before;
  const sample = () => {
    peak = Math.max(peak, used());
  };
  const timer = setInterval(sample, 1);
  try {
    await body(sample);
  } finally {
    clearInterval(timer);
  }
  return peak - before;
}

const spec = (name: string): TensorSpec => {
  const source = { name, alternatives: [], shape: [N, K], first: 0, transposed: false };
  return { role: "up", layer: 0, expert: null, name, shape: [N, K], source, offset: 0 };
};

/** Loads every weight of a store one after another, letting go of each, as a device does that has taken it. */
async function loadAll(store: TensorStore, quantize: string): Promise<{ peak: number; largest: number }> {
  const names = [...(store.stored?.keys() ?? store.tensors.keys())];
  const all = names.length > 0 ? names : [...store.tensors.keys()];
  const plan = planWeights(store, all.map(spec), parseQuantizeName(quantize));
  let largest = 0;
  const peak = await peakOf(async (sample) => {
    const load = async (name: string) => {
      const tensor = await plan.load(spec(name), { onRows: sample });
      sample();
      return "qdata" in tensor ? tensorBytes(tensor) : tensor.data.byteLength;
    };
    for (const name of all) {
      largest = Math.max(largest, await load(name));
      collect();
    }
  });
  return { peak, largest };
}

describe("loading holds the tensor that is made and at most 64 MiB more", () => {
  const cases = [
    ["bf16, quantized at load", "int8wo", null],
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
      console.log(`${what}: ${(peak / MiB).toFixed(0)} MiB at most, ${(largest / MiB).toFixed(0)} of them the tensor`);
      expect(reads.total).toBeGreaterThan(3 * 16 * MiB);
      expect(peak - largest).toBeLessThan(64 * MiB);
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
    expect(peak - largest).toBeLessThan(64 * MiB);
  });
});

/** A folder of two shards, 260 MiB of bf16. */
async function writeShards(folder: string): Promise<void> {
  const sizes = { vocab_size: 16000, hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 2 };
  const config = { ...TINY_CONFIG, ...sizes, num_attention_heads: 16, num_key_value_heads: 16 };
  const json = { ...config, tie_word_embeddings: true };
  const specs = tensorSpecs(parseConfig(json));
  const half = Math.ceil(specs.length / 2);
  const weightMap: Record<string, string> = {};
  const tile = new Uint8Array(Uint16Array.from({ length: 2 ** 21 }, (_, i) => 0x3c00 + ((i * 40503) & 0x81ff)).buffer);
  for (const part of [specs.slice(0, half), specs.slice(half)]) {
    const file = `${part[0]?.name}.safetensors`;
    const { header, size } = layOut(
      part.map(({ name, shape }) => ({ name, dtype: "BF16", shape })),
      {},
    );
    const handle = await open(join(folder, file), "w");
    await handle.write(header);
    for (let at = header.length; at < size; at += tile.length)
      await handle.write(tile, 0, Math.min(tile.length, size - at), at);
    await handle.close();
    for (const { name } of part) weightMap[name] = file;
  }
  const files = new Map<string, Uint8Array>(tinyModel());
  files.delete("model.safetensors");
  files.set("config.json", new TextEncoder().encode(JSON.stringify(json)));
  files.set("model.safetensors.index.json", new TextEncoder().encode(JSON.stringify({ weight_map: weightMap })));
  for (const [name, bytes] of files) await writeFile(join(folder, name), bytes);
}

test("the process grows by the largest tensor and at most 64 MiB while it loads a folder from disk", {
  timeout: 240_000,
}, async () => {
  const folder = await mkdtemp(join(tmpdir(), "fewbit-memory-"));
  try {
    await writeShards(folder);
    const load = async (count: number): Promise<{ resident: number; buffers: number; largest: number }> => {
      collect();
      const before = process.memoryUsage();
      const peak = { resident: 0, buffers: 0, largest: 0 };
      const sample = () => {
        const { rss, arrayBuffers } = process.memoryUsage();
        peak.resident = Math.max(peak.resident, rss - before.rss);
        peak.buffers = Math.max(peak.buffers, arrayBuffers - before.arrayBuffers);
      };
      const timer = setInterval(sample, 1);
      await using decoder = await openDecoder(folder, { quantize: "int8wo" }, "last");
      const weights = decoder.graph.values.filter(({ role }) => role === "weight").slice(-count);
      for (const { name } of weights) {
        const tensor = await decoder.load(name);
        sample();
        peak.largest = Math.max(peak.largest, "qdata" in tensor ? tensorBytes(tensor) : tensor.data.byteLength);
        collect();
      }
      clearInterval(timer);
      return peak;
    };
    // Some weights first: they bring code and tables into memory.
    await load(3);
    const { resident, buffers, largest } = await load(Number.POSITIVE_INFINITY);
    const shown = [resident, buffers, largest].map((bytes) => (bytes / MiB).toFixed(0));
    console.log(`resident ${shown[0]} MiB more, buffers ${shown[1]}, the largest tensor ${shown[2]}`);
    expect(largest).toBeGreaterThan(60 * MiB);
    expect(buffers - largest).toBeLessThan(16 * MiB);
    expect(resident - largest).toBeLessThan(64 * MiB);
  } finally {
    await rm(folder, { recursive: true });
  }
});
