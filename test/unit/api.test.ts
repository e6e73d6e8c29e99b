import { describe, expect, test } from "vitest";
import { fromFloat32 } from "../../src/core/dtype.js";
import { scaleValues } from "../../src/formats/tensor.js";
import * as api from "../../src/index.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { randomUniform } from "../support/tiny-model.js";

const { FewbitError, FORMATS, quantize, dequantize } = api;
const uniform = randomUniform(3);
const data = Float32Array.from({ length: 2 * 128 }, uniform);

const code = (run: () => unknown) => {
  try {
    run();
  } catch (error) {
    if (error instanceof FewbitError) return error.code;
    throw error;
  }
  return null;
};

test("the package exports what the README uses, a config for each of torchao's, and no inner workings", () => {
  const names = Object.keys(api);
  const promised = [
    "open",
    "Device",
    "Program",
    "loadModel",
    "Model",
    "quantize",
    "quantizeModel",
    "dequantize",
    "GraphBuilder",
    "dense",
  ];
  expect(names).toEqual(expect.arrayContaining([...promised, "stored", "FORMATS", "CODECS", "FewbitError"]));
  expect(names).toEqual(expect.arrayContaining(["parseQuantizeName", "listQuantizeNames", "withScale", "formatKey"]));
  const configs = Object.entries(api).filter(([name]) => /(Only|Weight)$/.test(name));
  expect(configs.length).toBeGreaterThanOrEqual(16);
  for (const inner of ["fuse", "makePlan", "evaluateNode", "openReference", "openWebGpu", "Scope"])
    expect(names).not.toContain(inner);
});

describe("quantize", () => {
  test("by the name of a format's row, by the row, and by a short name that means it, gives one tensor", () => {
    const tensor = quantize(data, [2, 128], "mxfp4");
    expect(tensor).toEqual(quantizeTensor(data, [2, 128], "f32", FORMATS.mxfp4));
    expect(quantize(data, [2, 128], FORMATS.mxfp4)).toEqual(tensor);
    const half = { dtype: "bf16" } as const;
    expect(quantize(data, [2, 128], "mxfp4wo", half)).toEqual(quantize(data, [2, 128], "mxfp4", half));
  });

  test("by every short name gives a tensor that reads back near the numbers", () => {
    const matrix = Float32Array.from({ length: 64 * 256 }, uniform);
    const rms = (values: Float32Array) => Math.sqrt(values.reduce((sum, x) => sum + x * x, 0) / values.length);
    for (const name of api.listQuantizeNames()) {
      const back = dequantize(quantize(matrix, [64, 256], name, { dtype: "bf16" }));
      const error = rms(back.map((x, i) => x - (matrix[i] as number))) / rms(matrix);
      // Uniform numbers in n levels are off by 1/n of their spread.
      expect(error, name).toBeLessThan(
        /^intx1|^8da1/.test(name) ? 1.1 : /^intx2|^8da2|codebook-2/.test(name) ? 0.8 : 0.35,
      );
    }
  });

  test("folds leading dimensions into rows", () => {
    expect(quantize(data, [2, 2, 64], "int8").shape).toEqual([4, 64]);
    expect(quantize(data, [256], "int8").shape).toEqual([1, 256]);
  });

  test("rounds the numbers to their dtype first; raw bits are the same numbers", () => {
    const bits = fromFloat32("bf16", data);
    expect(quantize(bits, [2, 128], "int8", { dtype: "bf16" })).toEqual(
      quantize(data, [2, 128], "int8", { dtype: "bf16" }),
    );
    expect(quantize(data, [2, 128], "int8")).not.toEqual(quantize(data, [2, 128], "int8", { dtype: "bf16" }));
    expect(quantize(bits, [2, 128], "none", { dtype: "bf16" }).format).toBe(FORMATS.bf16);
  });

  test("takes given scales", () => {
    const given = { scale: Float32Array.of(0.5, 0.25) };
    expect([...scaleValues(quantize(data, [2, 128], "int8", { given }), 0)]).toEqual([0.5, 0.25]);
  });

  test("refuses what does not fit, by code", () => {
    expect(code(() => quantize(data, [2, 128], "int9"))).toBe("argument/unknown-name");
    expect(code(() => quantize(data, [2, 100], "int8"))).toBe("shape/mismatch");
    expect(code(() => quantize(data, [], "int8"))).toBe("shape/mismatch");
    expect(code(() => quantize(data, [-2, -128], "int8"))).toBe("shape/mismatch");
    expect(code(() => quantize(data.subarray(0, 48), [1, 48], "mxfp4"))).toBe("format/block");
    expect(code(() => quantize(data.subarray(0, 48), [1, 48], "mxfp4wo"))).toBe("quantize/unsupported");
    expect(code(() => quantize(new Uint16Array(32), [1, 32], "int8"))).toBe("dtype/mismatch");
  });
});

test("a graph of one's own runs: relu(x W^T) on the reference", async () => {
  const g = new api.GraphBuilder({ T: 4 });
  const w = quantize(data, [2, 128], "int8");
  const x = g.input("x", api.dense("f32", ["T", 128]));
  g.output(
    "y",
    g.one("unary", [g.one("linear", [x, g.weight("w", api.stored(w.format, [2, 128]))], {})], { fn: "relu" }),
  );
  await using device = await api.open({ prefer: ["reference"] });
  using program = await device.compile(g.build(), { weights: new Map([["w", w]]) });
  const { y } = await program.run({
    inputs: { x: { dtype: "f32", shape: [1, 128], data: data.slice(0, 128) } },
    symbols: { T: 1 },
  });
  const values = dequantize(w);
  const dot = (row: number) =>
    data.slice(0, 128).reduce((sum, value, k) => sum + value * (values[row * 128 + k] as number), 0);
  const out = (y as api.DenseTensor).data;
  expect([...out].map((value) => value.toFixed(4))).toEqual([0, 1].map((row) => Math.max(0, dot(row)).toFixed(4)));
  expect(program.explain()).toContain("reference/linear");
});

describe("quantizeModel", () => {
  const matrix = (n: number, k: number) => ({
    dtype: "f32" as const,
    shape: [n, k],
    data: Float32Array.from({ length: n * k }, (_, i) => Math.sin(i)),
  });
  const parameters = new Map([
    ["layers.0.q.weight", matrix(8, 64)],
    ["layers.0.down.weight", matrix(8, 96)],
    ["layers.0.norm.weight", { dtype: "f32" as const, shape: [64], data: new Float32Array(64) }],
  ]);

  test("every linear takes the config, with the values of quantize; other parameters are left alone", () => {
    const { weights, activations } = api.quantizeModel(parameters, "int8dq");
    expect([...weights.keys()]).toEqual(["layers.0.q.weight", "layers.0.down.weight"]);
    expect([...activations.keys()]).toEqual(["layers.0.q", "layers.0.down"]);
    expect(weights.get("layers.0.q.weight")).toEqual(quantize(matrix(8, 64).data, [8, 64], "int8dq"));
  });

  test("a filter or a map of patterns chooses layers", () => {
    const only = api.quantizeModel(parameters, "int8wo", (layer) => layer.endsWith("down"));
    expect([...only.weights.keys()]).toEqual(["layers.0.down.weight"]);
    const map = new Map([["re:.*\\.q", api.parseQuantizeName("int8wo")]]);
    expect([...api.quantizeModel(parameters, map).weights.keys()]).toEqual(["layers.0.q.weight"]);
  });

  test("a layer that its config cannot take is an error that names it and the nearest legal K", () => {
    expect(() => api.quantizeModel(parameters, "int4wo-64")).toThrow(/layers\.0\.down.*K = 96.*nearest legal K/);
  });
});
