import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { beforeEach, describe, expect, test } from "vitest";
import { type FloatType, toFloat32, viewAs } from "../../src/core/dtype.js";
import { formatKey } from "../../src/formats/format.js";
import { loadStored } from "../../src/formats/stored-matrix.js";
import { dequantize, elementCodes, type QuantizedTensor, scaleValues, zeroValues } from "../../src/formats/tensor.js";
import { openModelFolder } from "../../src/io/model-folder.js";
import { openWeights } from "../../src/io/quantized.js";
import { openSafetensors, type TensorEntry } from "../../src/io/safetensors.js";
import { memorySource, readJson } from "../../src/io/source.js";
import { parseConfig, tensorSpecs } from "../../src/models/config.js";
import { loadModel } from "../../src/models/model.js";
import { saveQuantized } from "../../src/models/save.js";
import { isLinearRole } from "../../src/models/weights.js";
import { listQuantizeNames, parseQuantizeName } from "../../src/quantize/names.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { open } from "../../src/runtime/device.js";
import { failure } from "../support/failure.js";
import { loadEveryWay } from "../support/stored.js";
import { TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

/** Sizes that blocks of 256 and of [128, 128] and rows of 64 divide. */
const CONFIG = {
  hidden_size: 256,
  intermediate_size: 256,
  num_hidden_layers: 1,
  num_attention_heads: 4,
  num_key_value_heads: 2,
};

let out: string;
beforeEach(async () => {
  out = await mkdtemp(join(tmpdir(), "fewbit-"));
  return () => rm(out, { recursive: true });
});

const opened = async (folder: string) => {
  const directory = await openModelFolder(folder);
  return openWeights(directory, (await readJson(directory, "config.json")).quantization_config);
};

const base64 = ({ buffer, byteOffset, byteLength }: Uint32Array | Float32Array) =>
  Buffer.from(buffer, byteOffset, byteLength).toString("base64");

/** Codes, scales and zero points as numbers: what must come back whatever buffers hold. */
function contents(tensor: QuantizedTensor) {
  return {
    codes: base64(elementCodes(tensor)),
    scales: tensor.format.scales.map((_, level) => base64(scaleValues(tensor, level))),
    zeros: base64(zeroValues(tensor)),
    table: tensor.table && base64(tensor.table),
  };
}

describe("a saved model holds the codes and scales that quantizing gives", () => {
  // One group size of each family, and every width once: the first.
  const families = new Map<string, string>();
  for (const name of listQuantizeNames()) {
    const bits = /row|asym|nce|hqq|^8da/.test(name) ? "B" : "$1";
    const family = name.replace(/-\d+/g, "-N").replace(/^(?:intx|8da)(\d)/, bits);
    if (name !== "none" && !families.has(family)) families.set(family, name);
  }
  const names = [...families.values()];
  for (const quantize of names)
    test(quantize, async () => {
      const model = tinyModel({ config: CONFIG });
      const report = await saveQuantized(model, out, { quantize });
      const config = parseQuantizeName(quantize);
      await using file = await openSafetensors(memorySource(model.get("model.safetensors") as Uint8Array));
      await using store = await opened(out);
      const linears = tensorSpecs(parseConfig({ ...TINY_CONFIG, ...CONFIG })).filter((spec) => isLinearRole(spec.role));
      expect(store.stored?.size).toBe(linears.length);
      for (const { name, shape } of linears) {
        const dtype: FloatType = "bf16";
        const data = toFloat32(dtype, viewAs(dtype, (await file.read(name)).slice()));
        const format = config?.weight({ shape: shape as [number, number], dtype });
        if (format === undefined || "refused" in format) throw new Error(`${quantize} does not take the test's model`);
        const made = quantizeTensor(data, shape as [number, number], dtype, format, {
          numerics: config?.numerics ?? "guarded",
        });
        const matrix = store.stored?.get(name);
        if (matrix === undefined) throw new Error(`${name} is not stored`);
        const back = await loadEveryWay(matrix);
        const { activation } = matrix;
        expect(activation && formatKey(activation)).toEqual(config?.activation ? formatKey(config.activation) : null);
        // torchao's int4 class always has zero points; a symmetric weight comes back with zeros.
        const zeros = back.format.zero.domain !== made.format.zero.domain;
        if (zeros) expect(zeroValues(back).every((zero) => zero === 0)).toBe(true);
        expect({ ...contents(back), ...(zeros ? { zeros: "" } : {}) }).toEqual(contents(made));
        expect(Buffer.compare(Buffer.from(dequantize(back).buffer), Buffer.from(dequantize(made).buffer))).toBe(0);
      }
      for (const { name } of [...file.tensors.values()].filter(
        (info) => !linears.some((spec) => spec.name === info.name),
      ))
        expect(Buffer.compare(await store.read(name), await file.read(name))).toBe(0);
      expect(report.quantized).toBe(linears.length);
    });
});

describe("saving", () => {
  const quantize = "int8wo";

  test("gives a folder that answers as quantizing at load does", async () => {
    const model = tinyModel();
    await saveQuantized(model, out, { quantize });
    await using device = await open({ prefer: ["reference"] });
    const ids = [0, 72, 101, 108];
    using direct = await loadModel(model, { device, quantize });
    using saved = await loadModel(out, { device });
    expect(await saved.logits(ids)).toEqual(await direct.logits(ids));
  });

  test("splits large models into files with an index, and reads them back alike", async () => {
    const model = tinyModel();
    const whole = join(out, "whole");
    const split = join(out, "split");
    await saveQuantized(model, whole, { quantize });
    const report = await saveQuantized(model, split, { quantize, shardBytes: 10_000 });
    expect(report.files.length).toBeGreaterThan(3);
    expect(report.files[0]).toBe(`model-00001-of-0000${report.files.length}.safetensors`);
    await using a = await opened(whole);
    await using b = await opened(split);
    expect([...(b.stored?.keys() ?? [])].sort()).toEqual([...(a.stored?.keys() ?? [])].sort());
    for (const [name, matrix] of a.stored ?? [])
      expect(contents(await loadStored(b.stored?.get(name) ?? matrix))).toEqual(contents(await loadStored(matrix)));
  });

  test("interrupted leaves whole files only and no config.json; run again it keeps them and ends the same", async () => {
    const model = tinyModel();
    const options = { quantize, shardBytes: 10_000 };
    const [folder, other] = [join(out, "a"), join(out, "b")];
    const stop = new AbortController();
    let written = 0;
    const onProgress = () => void (++written === 14 && stop.abort());
    const error = await failure(saveQuantized(model, folder, { ...options, signal: stop.signal, onProgress }));
    expect(error.code).toBe("operation/aborted");
    const left = await readdir(folder);
    expect(left.length).toBeGreaterThan(0);
    expect(left.filter((name) => !/^model-\d+-of-\d+\.safetensors$/.test(name))).toEqual([]);
    const report = await saveQuantized(model, folder, options);
    expect(report.kept).toEqual(left.sort());
    await saveQuantized(model, other, options);
    for (const name of await readdir(other))
      expect(Buffer.compare(await readFile(join(folder, name)), await readFile(join(other, name)))).toBe(0);
  });

  test("over a finished model writes every file anew", async () => {
    const options = { quantize, shardBytes: 10_000 };
    await saveQuantized(tinyModel({ seed: 1 }), out, options);
    const report = await saveQuantized(tinyModel({ seed: 2 }), out, options);
    expect(report.kept).toEqual([]);
    await using device = await open({ prefer: ["reference"] });
    using direct = await loadModel(tinyModel({ seed: 2 }), { device, quantize });
    using saved = await loadModel(out, { device });
    expect(await saved.logits([0, 7])).toEqual(await direct.logits([0, 7]));
  });

  test("keeps weights that lie in one tensor together, and loads each of them from it", async () => {
    const phi = { architectures: ["Phi3ForCausalLM"], attention_bias: false, pad_token_id: 0 };
    const specs = tensorSpecs(parseConfig({ ...TINY_CONFIG, ...phi }));
    // The support's tensors are one for each weight: those of one tensor are laid one after another.
    const tensors = (entries: TensorEntry[]) => {
      const whole = new Map<string, TensorEntry>();
      for (const [i, entry] of entries.entries()) {
        const { name, shape } = (specs[i] as (typeof specs)[number]).source;
        const before = whole.get(name)?.data ?? new Uint8Array(0);
        whole.set(name, { ...entry, name, shape, data: new Uint8Array(Buffer.concat([before, entry.data])) });
      }
      return [...whole.values()];
    };
    const model = tinyModel({ config: phi, tensors });
    await saveQuantized(model, out, { quantize });
    await using store = await opened(out);
    expect([...(store.stored?.keys() ?? [])].filter((name) => name.includes("layers.0")).sort()).toEqual(
      ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"].map(
        (name) => `model.layers.0.${name}.weight`,
      ),
    );
    await using device = await open({ prefer: ["reference"] });
    using direct = await loadModel(model, { device, quantize });
    using saved = await loadModel(out, { device });
    expect(await saved.logits([0, 7])).toEqual(await direct.logits([0, 7]));
  });

  test("refuses what is quantized already", async () => {
    await saveQuantized(tinyModel(), out, { quantize });
    const error = await failure(saveQuantized(out, join(out, "again"), { quantize: "int4wo-32-plain" }));
    expect(error).toMatchObject({ code: "quantize/unsupported" });
    expect(error.message).toContain("is stored as torchao Int8Tensor already");
  });
});
