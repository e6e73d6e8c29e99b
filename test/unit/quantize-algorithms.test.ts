import { describe, expect, test } from "vitest";
import { withScale } from "../../src/formats/format.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import { dequantize, scaleValues } from "../../src/formats/tensor.js";
import { describeTorchao, torchaoPartName } from "../../src/formats/torchao.js";
import { hadamard, quantizeFloat8Operand } from "../../src/quantize/attention.js";
import { awqQuantize } from "../../src/quantize/awq.js";
import { quantizeGgufQ4K } from "../../src/quantize/gguf.js";
import { gptqQuantize, Hessian } from "../../src/quantize/gptq.js";
import { learnCenters, nearestCenter } from "../../src/quantize/kmeans.js";
import { LowBitAdam, quantizeState, stateMap } from "../../src/quantize/optim.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { columnMaxima, smoothWeight } from "../../src/quantize/smoothquant.js";
import { compress24, expand24, prune24 } from "../../src/quantize/sparse.js";

const noise = (length: number, seed = 1) =>
  Float32Array.from({ length }, (_, i) => Math.fround(Math.sin((i + seed) * 12.9898) * Math.cos((i + seed) * 78.233)));
const [N, K, T] = [16, 64, 48];
const weight = noise(N * K);
/** Activations whose columns differ a thousandfold. */
const inputs = noise(T * K, 7).map((value, i) => value * 10 ** ((i % K) % 4));

function outputError(w: ArrayLike<number>, scale: ArrayLike<number> | null = null): number {
  let error = 0;
  for (let t = 0; t < T; t++) {
    for (let n = 0; n < N; n++) {
      let difference = 0;
      for (let k = 0; k < K; k++) {
        const x = inputs[t * K + k] as number;
        difference += x * ((w[n * K + k] as number) * (scale?.[k] ?? 1) - (weight[n * K + k] as number));
      }
      error += difference ** 2;
    }
  }
  return error;
}

const int4 = withScale(FORMATS.int4_plain, { block: [1, 32], codec: CODECS.f32, zero: CODECS.f32 });
const plainError = outputError(dequantize(quantizeTensor(weight, [N, K], "f32", int4)));

describe("calibration lowers the output error", () => {
  test("GPTQ", () => {
    const hessian = new Hessian(K);
    hessian.observe(inputs, [T, K]);
    const tensor = gptqQuantize(weight, [N, K], hessian, int4);
    expect(outputError(dequantize(tensor))).toBeLessThan(0.5 * plainError);
  });

  test("AWQ, which never does worse than its first candidate, no scaling", () => {
    const made = awqQuantize(weight, [N, K], "f32", inputs, int4);
    const error = outputError(dequantize(made.tensor), made.preScale);
    expect(error).toBeLessThan(0.9 * plainError);
    expect(made.ratio).toBeGreaterThan(0);
  });

  test("SmoothQuant moves the activation's range into the weight", () => {
    const made = smoothWeight(weight, columnMaxima(inputs, K), "f32");
    for (let i = 0; i < weight.length; i++) {
      expect((made.weight[i] as number) * (made.preScale[i % K] as number)).toBeCloseTo(weight[i] as number, 5);
    }
    const smoothed = columnMaxima(
      inputs.map((value, i) => value * (made.preScale[i % K] as number)),
      K,
    );
    const spread = (values: Float32Array) => Math.max(...values) / Math.min(...values);
    expect(spread(smoothed)).toBeLessThan(0.1 * spread(columnMaxima(inputs, K)));
    expect([...smoothWeight(weight, columnMaxima(inputs, K), "f32", null).factor]).toEqual(new Array(K).fill(1));
    expect(() => smoothWeight(weight, columnMaxima(inputs, K), "f32", 2)).toThrow(/alpha is 2/);
  });

  test("GPTQ int8: torchao sees the first block only, the guarded rule the whole row", () => {
    const rising = weight.map((value, i) => value * (1 + (i % K)));
    const scaleOf = (numerics: "guarded" | "torchao") => {
      const hessian = new Hessian(K);
      hessian.observe(inputs, [T, K]);
      return scaleValues(
        gptqQuantize(rising, [N, K], hessian, FORMATS.int8, { numerics, blockSize: 16 }),
        0,
      )[0] as number;
    };
    expect(scaleOf("guarded")).toBeGreaterThan(2 * scaleOf("torchao"));
  });

  test("inputs of another width are refused", () => {
    expect(() => new Hessian(K).observe(inputs, [T * 2, K / 2])).toThrow(
      expect.objectContaining({ code: "shape/mismatch" }),
    );
  });
});

describe("2:4 sparsity", () => {
  test("pruning keeps the two largest of four; compressing loses nothing", () => {
    const pruned = prune24(Float32Array.of(1, -4, 2, 3, 5, 5, 5, 5));
    expect([...pruned]).toEqual([0, -4, 0, 3, 0, 0, 5, 5]);
    const some = prune24(weight);
    expect(expand24(compress24(some))).toEqual(some);
    expect(() => prune24(new Float32Array(6))).toThrow(/K = 6 is not a multiple of its block 4/);
  });
});

describe("attention operands", () => {
  test("the Hadamard transform is its own inverse and keeps length", () => {
    const back = hadamard(hadamard(weight, K), K);
    for (let i = 0; i < weight.length; i++) expect(back[i]).toBeCloseTo(weight[i] as number, 5);
    expect(() => hadamard(weight, 48)).toThrow(/power of two/);
  });

  test("a silent head has scale 1", () => {
    const made = quantizeFloat8Operand(new Float32Array(8), 2, { size: 4, rotate: false, dtype: "bf16" });
    expect([...made.descale]).toEqual([1, 1]);
    expect([...made.codes]).toEqual(new Array(8).fill(0));
  });
});

describe("k-means", () => {
  test("one dimension is a special case of the general one", () => {
    const points = noise(500);
    const flat = new Float32Array(8);
    learnCenters(points.slice(), 1, 8, 100, flat);
    const paired = new Float32Array(16);
    const pairs = Float32Array.from({ length: 1000 }, (_, i) => (i % 2 === 0 ? (points[i >> 1] as number) : 0));
    learnCenters(pairs, 2, 8, 100, paired);
    for (let i = 0; i < 8; i++) expect(flat[i]).toBeCloseTo(paired[2 * i] as number, 5);
  });

  test("fewer distinct points than entries leave no gap, and ties go to the first entry", () => {
    const centers = new Float32Array(4);
    learnCenters(Float32Array.of(1, 1, 3, 3), 1, 4, 10, centers);
    expect([...centers]).toEqual([1, 3, 1, 1]);
    const nearest = nearestCenter(centers, 4, 1);
    expect([1, 3, 2, -9, 9].map((value) => nearest(Float32Array.of(value), 0))).toEqual([0, 1, 0, 0, 1]);
  });
});

describe("low-bit optimizer states", () => {
  test("maps are sorted and every entry keeps its code", () => {
    for (const kind of ["8bit_signed", "8bit_unsigned", "4bit_signed", "4bit_unsigned"] as const) {
      const map = stateMap(kind);
      expect([...map]).toEqual([...map].sort((a, b) => a - b));
      expect([...quantizeState(map, kind, map.length).codes]).toEqual([...map.keys()]);
    }
  });

  test("small states stay in float32", () => {
    const parameters = new Float32Array(8).fill(1);
    const adam = new LowBitAdam(8, { bits: 8 });
    adam.step(parameters, new Float32Array(8).fill(1));
    expect(adam.moments[0]).toBeInstanceOf(Float32Array);
    expect(parameters[0]).toBeCloseTo(1 - 1e-3 - 1e-5, 6);
    expect(new LowBitAdam(4096, { bits: 4 }).moments[0]).not.toBeInstanceOf(Float32Array);
  });
});

describe("GGUF-like blocks", () => {
  test("the guarded rule rounds, the literal one does not", () => {
    const data = noise(512);
    const rounded = quantizeGgufQ4K(data, [2, 256]);
    expect(rounded.codes.every((code) => Number.isInteger(code) && code >= 0 && code <= 15)).toBe(true);
    expect(rounded.blockMin.every(Number.isInteger)).toBe(true);
    for (let i = 0; i < data.length; i++)
      expect(Math.abs((rounded.values[i] as number) - (data[i] as number))).toBeLessThan(0.12);
    expect(quantizeGgufQ4K(data, [2, 256], { numerics: "torchao" }).codes.every(Number.isInteger)).toBe(false);
    expect([...quantizeGgufQ4K(new Float32Array(256), [1, 256]).values]).toEqual(new Array(256).fill(0));
    expect(() => quantizeGgufQ4K(data, [4, 128])).toThrow(/K = 128 is not a multiple of its block 256/);
  });
});

describe("torchao parameters", () => {
  test("names of parts split at the last dot", () => {
    expect(torchaoPartName("model.layers.0.q_proj.weight", "qdata")).toBe("model.layers.0.q_proj._weight_qdata");
  });

  test("unknown classes and missing parts are coded errors", async () => {
    await expect(describeTorchao("a.weight", "NF4Tensor", {}, new Map())).rejects.toThrow(
      expect.objectContaining({ code: "model/unsupported" }),
    );
    await expect(describeTorchao("a.weight", "Int8Tensor", {}, new Map())).rejects.toThrow(
      /a.weight is malformed: Int8Tensor: its part a._weight_qdata is missing/,
    );
  });
});
