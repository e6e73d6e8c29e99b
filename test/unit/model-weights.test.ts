import { readdirSync, readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openTrace } from "../../src/backends/trace/device.js";
import { WEBGPU_KERNELS } from "../../src/backends/webgpu/kernels/table.js";
import { dequantize, type QuantizedTensor, sliceRows } from "../../src/formats/tensor.js";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { type TensorEntry, type TensorStore, writeSafetensors } from "../../src/io/safetensors.js";
import { openDirectory } from "../../src/io/source.js";
import type { DenseTensor, HostTensor } from "../../src/ir/tensor.js";
import { parseConfig, type TensorSpec, tensorSpecs } from "../../src/models/config.js";
import { loadModel } from "../../src/models/model.js";
import { outlineModel } from "../../src/models/outline.js";
import { planWeights } from "../../src/models/weights.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { Device, open } from "../../src/runtime/device.js";
import { failure } from "../support/failure.js";
import { tinyModel } from "../support/tiny-model.js";

const ROOT = "test/golden/models";
const NAMES = readdirSync(ROOT, { withFileTypes: true }).flatMap((entry) => (entry.isDirectory() ? [entry.name] : []));
const json = (name: string) =>
  JSON.parse(readFileSync(`${ROOT}/${name}/config.json`, "utf8")) as Record<string, unknown>;

interface Opened extends AsyncDisposable {
  readonly store: TensorStore;
  readonly specs: readonly TensorSpec[];
}

/** A golden model's checkpoint, its tensors changed. */
async function opened(name: string, change = (entries: TensorEntry[]) => entries): Promise<Opened> {
  await using checkpoint = await openCheckpoint(await openDirectory(`${ROOT}/${name}`));
  const entries: TensorEntry[] = [];
  for (const { name: tensor, dtype, shape } of checkpoint.tensors.values())
    entries.push({ name: tensor, dtype, shape: [...shape], data: new Uint8Array(await checkpoint.read(tensor)) });
  const bytes = writeSafetensors(change(entries));
  const store = await openCheckpoint(await openDirectory(new Map([["model.safetensors", bytes]])));
  return { store, specs: tensorSpecs(parseConfig(json(name))), [Symbol.asyncDispose]: () => store.close() };
}

const refusal = (run: () => unknown) => failure(Promise.resolve().then(run));

/** bf16 numbers of a tensor. */
async function numbers(store: TensorStore, name: string): Promise<Float32Array> {
  const bits = new Uint16Array(new Uint8Array(await store.read(name)).buffer);
  return new Float32Array(Uint32Array.from(bits, (code) => code << 16).buffer);
}
const floats = (tensor: HostTensor) => Float32Array.from(dequantize(tensor as QuantizedTensor));

describe("a tensor that holds several weights", () => {
  test("gives each its rows, quantized as rows of the whole would be", async () => {
    await using model = await opened("phi3");
    const { store, specs } = model;
    const plan = planWeights(store, specs, parseQuantizeName("int8wo"));
    const name = "model.layers.1.self_attn.qkv_proj.weight";
    const parts = specs.filter((spec) => spec.source.name === name);
    expect(parts.map(({ role }) => role)).toEqual(["q", "k", "v"]);
    const whole = quantizeTensor(
      await numbers(store, name),
      [64, 32],
      "bf16",
      plan.weightFormat(parts[0] as TensorSpec),
    );
    for (const spec of parts) {
      const { first } = spec.source;
      expect(await plan.load(spec, {})).toEqual(sliceRows(whole, first, first + (spec.shape[0] as number)));
    }
  });

  test("is turned around where it is stored as [in, out]", async () => {
    await using model = await opened("gpt2");
    const { store, specs } = model;
    const plan = planWeights(store, specs, null);
    const name = "transformer.h.0.attn.c_attn";
    const [matrix, bias] = [await numbers(store, `${name}.weight`), await numbers(store, `${name}.bias`)];
    const of = (role: string) => specs.find((spec) => spec.role === role && spec.layer === 0) as TensorSpec;
    const k = floats(await plan.load(of("k"), {}));
    for (const [out, input] of [
      [0, 0],
      [31, 5],
      [7, 31],
    ] as const)
      expect(k[out * 32 + input]).toBe(matrix[input * 96 + 32 + out]);
    expect(((await plan.load(of("vBias"), {})) as DenseTensor).data).toEqual(bias.slice(64));
  });

  test("is checked as a whole, by its own name", async () => {
    const short = (entries: TensorEntry[]) =>
      entries.map((entry) =>
        entry.name.endsWith("0.self_attn.qkv_proj.weight")
          ? { ...entry, shape: [63, 32], data: entry.data.subarray(0, 63 * 64) }
          : entry,
      );
    await using model = await opened("phi3", short);
    const error = await refusal(() => planWeights(model.store, model.specs, null));
    expect(error.code).toBe("shape/mismatch");
    expect(error.message).toContain("model.layers.0.self_attn.qkv_proj.weight");
  });
});

test("GPT-2 checkpoints may leave out the prefix of their names; a missing tensor is named with it", async () => {
  const bare = (entries: TensorEntry[]) =>
    entries.map((entry) => ({ ...entry, name: entry.name.replace("transformer.", "") }));
  await using full = await opened("gpt2");
  await using model = await opened("gpt2", bare);
  const [a, b] = [planWeights(full.store, full.specs, null), planWeights(model.store, model.specs, null)];
  for (const spec of model.specs) expect(await b.load(spec, {})).toEqual(await a.load(spec, {}));
  await using gone = await opened("gpt2", (entries) => bare(entries).filter(({ name }) => name !== "wpe.weight"));
  expect(await refusal(() => planWeights(gone.store, gone.specs, null))).toMatchObject({
    code: "model/missing-tensor",
    context: { name: "transformer.wpe.weight" },
  });
});

test("norms that are stored as differences from 1 get it when they are loaded", async () => {
  await using model = await opened("gemma2");
  const plan = planWeights(model.store, model.specs, null);
  const spec = model.specs.find(({ role }) => role === "mlpPostNorm") as TensorSpec;
  const stored = await numbers(model.store, spec.name);
  expect(((await plan.load(spec, {})) as DenseTensor).data).toEqual(stored.map((value) => value + 1));
});

test("routers and gates of shared experts stay as they are, whatever experts become", async () => {
  await using model = await opened("qwen2-moe");
  const plan = planWeights(model.store, model.specs, parseQuantizeName("int8wo"));
  const formats = (role: string) =>
    new Set(model.specs.flatMap((spec) => (spec.role === role ? [plan.weightFormat(spec).name] : [])));
  for (const role of ["router", "sharedRouter", "embedding", "head"]) expect(formats(role)).toEqual(new Set(["bf16"]));
  for (const role of ["expertGate", "expertDown", "sharedUp", "gate"]) expect(formats(role)).toEqual(new Set(["int8"]));
});

describe("an outline from config.json", () => {
  let reference: Device;
  beforeAll(async () => {
    reference = await open({ prefer: ["reference"] });
  });
  afterAll(() => reference[Symbol.asyncDispose]());

  test.each(NAMES)("%s: the bytes of the loaded model, and a WebGPU kernel for every step", async (name) => {
    const capabilities = {
      ...{ features: new Set<string>(), maxBinding: 2 ** 27, maxBuffer: 2 ** 28, workgroupMemory: 16384 },
      ...{ maxInvocations: 256, maxWorkgroupsPerDimension: 65535, maxStorageBuffers: 8 },
      ...{ subgroupSize: [0, 0] as const, bandwidth: 1e12, flops: 1e13, dispatchSeconds: 1e-6 },
    };
    await using device = new Device(openTrace({ name: "imagined", kernels: WEBGPU_KERNELS, capabilities }));
    const outline = outlineModel(json(name), { device });
    const files = new Map<string, Uint8Array>(tinyModel());
    for (const file of ["config.json", "model.safetensors"]) files.set(file, readFileSync(`${ROOT}/${name}/${file}`));
    using model = await loadModel(files, { device: reference });
    expect(outline.bytes.weights).toBe(model.weightBytes);
    expect(outline.context).toBe(model.capacity);
  });
});
