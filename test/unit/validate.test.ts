import { describe, expect, test } from "vitest";
import { f32Bits } from "../../src/core/dtype.js";
import { defineFormat, formatKey } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, type Graph, GraphBuilder, stored } from "../../src/ir/graph.js";
import type { DenseTensor, HostTensor } from "../../src/ir/tensor.js";
import { open } from "../../src/runtime/device.js";
import { halfUlp, magnitudes, U } from "../../src/validate/bounds.js";
import { judge } from "../../src/validate/bounds-judge.js";
import { caseTable, selectCases } from "../../src/validate/cases.js";
import { normals, random, randomTensor } from "../../src/validate/cases-random.js";
import { allowedOutputs, runCases } from "../../src/validate/run.js";

describe("the case table", () => {
  const table = caseTable();
  const runs = table.flatMap((program) => program.runs);

  test("names every case once", () => {
    expect(new Set(runs.map(({ id }) => id)).size).toBe(runs.length);
  });

  test("takes every format and every block of the format table through a linear", () => {
    const linear = new Set(table.filter(({ op }) => op === "linear").map(({ id }) => id.split("/")[1]));
    expect(Object.values(FORMATS).filter((format) => !linear.has(formatKey(format)))).toEqual([]);
    const quick = selectCases(table, { quick: true, ops: ["linear"] });
    for (const name of Object.keys(FORMATS)) expect(quick.map(({ format }) => format)).toContain(name);
  });

  test("makes the same numbers from the same seed, others from another", () => {
    const inputs = (seed: number) => {
      const [program] = selectCases(caseTable({ seed }), { ids: ["rmsnorm/f32/h37/T5"] });
      return program?.runs[0]?.inputs().x as DenseTensor;
    };
    expect(inputs(1)).toEqual(inputs(1));
    expect(inputs(1).data).not.toEqual(inputs(2).data);
  });

  test.each([1, 3, 16])("falls into %i shards that are the whole of it and share nothing", (count) => {
    const all = selectCases(table, { ops: ["quantize"] }).map(({ id }) => id);
    const shards = Array.from({ length: count }, (_, i) =>
      selectCases(table, { ops: ["quantize"], shard: { index: i + 1, count } }).map(({ id }) => id),
    );
    expect(shards.flat().sort()).toEqual(all.sort());
    const sizes = shards.map(({ length }) => length);
    expect(Math.max(...sizes) - Math.min(...sizes)).toBeLessThanOrEqual(1);
  });

  test("refuses an unknown case with the nearest names", () => {
    expect(() => selectCases(table, { ids: ["rmsnorm/f32/h38"] })).toThrowError(/unknown case .*did you mean rmsnorm/);
  });

  test("covers a format that was just made up, with no other edit", async () => {
    const made = defineFormat("made_up", {
      element: { kind: "float", exponent: 3, mantissa: 1, bias: 2, signed: true, specials: "none" },
      scales: [{ codec: FORMATS.f16.element, block: [1, 32] }],
      rule: { kind: "amax", floor: 1e-6, round: "after" },
      blocks: [[1, 64]],
      source: "this test",
    });
    const programs = caseTable({ formats: [made] }).filter(({ format }) => format === "made_up");
    expect([...new Set(programs.map(({ op }) => op))].sort()).toEqual([
      "dequantize",
      "embedding",
      "linear",
      "quantize",
    ]);
    for (const backend of ["reference", "webgpu"] as const) {
      await using device = await open({ prefer: [backend], ...(backend === "webgpu" && { tier: "default" }) });
      for await (const result of runCases(device, programs))
        expect(result).toMatchObject({ status: "passed", reason: null });
    }
  }, 60_000);
});

describe("bounds", () => {
  const graphOf = (make: (g: GraphBuilder) => void): Graph => {
    const g = new GraphBuilder({});
    make(g);
    return g.build();
  };
  const dot = (format: keyof typeof FORMATS, k: number) =>
    graphOf((g) => {
      const x = g.input("x", dense("f32", [2, k]));
      g.output("y", g.one("linear", [x, g.weight("w", stored(FORMATS[format], [3, k]))], {}));
    });

  test("of a linear is 2 sqrt(K) u sum |x w| and half an ulp", () => {
    const [k, graph] = [64, dot("int8", 64)];
    const w = randomTensor(FORMATS.int8, [3, k], 1);
    const x = { dtype: "f32", shape: [2, k], data: normals(random(2), 2 * k) } as const;
    const y = allowedOutputs(graph, {}, (name) => (name === "x" ? x : w)).get("y");
    if (y?.kind !== "near") throw new Error("a linear is near");
    const values = magnitudes(w);
    const size = Array.from({ length: k }, (_, i) => Math.abs(x.data[i] as number) * (values[i] as number)).reduce(
      (a, b) => a + b,
    );
    expect(y.error[0]).toBeCloseTo(2 * Math.sqrt(k) * U * size + halfUlp(y.values[0] as number), 12);
  });

  test("of a float zero point count both terms, which may cancel", () => {
    const tensor = randomTensor(FORMATS.int4_tinygemm, [2, 64], 3);
    const values = magnitudes(tensor);
    const plain = magnitudes({ ...tensor, format: { ...tensor.format, zero: { domain: "none" } } });
    expect(values.some((value, i) => value > (plain[i] as number))).toBe(true);
  });

  test("half an ulp is half the distance to the next float", () => {
    for (const value of [1, 1.5, 1e-3, 12345.678, 2 ** -120]) {
      const next = new Float32Array(new Uint32Array([f32Bits(value) + 1]).buffer)[0] as number;
      expect(halfUlp(Math.fround(value))).toBe((next - Math.fround(value)) / 2);
    }
  });

  test("errors pass through an epilogue by the slope of its function", () => {
    const graph = graphOf((g) => {
      const x = g.input("x", dense("f32", [1, 32]));
      const y = g.one("linear", [x, g.weight("w", stored(FORMATS.f32, [1, 32]))], {});
      g.output("z", g.one("unary", [y], { fn: "silu" }));
      g.output("y", y);
    });
    const given = (name: string): HostTensor =>
      name === "w"
        ? randomTensor(FORMATS.f32, [1, 32], 5)
        : { dtype: "f32", shape: [1, 32], data: normals(random(6), 32) };
    const allowed = allowedOutputs(graph, {}, given);
    const [y, z] = [allowed.get("y"), allowed.get("z")];
    if (y?.kind !== "near" || z?.kind !== "near") throw new Error("both are near");
    expect(z.error[0]).toBeGreaterThan(1.1 * (y.error[0] as number));
  });
});

describe("a verdict", () => {
  const near = {
    kind: "near",
    shape: [4],
    values: Float64Array.of(1, Number.NaN, 3, Number.POSITIVE_INFINITY),
    error: Float64Array.of(0.5, 1, 1, 1),
  } as const;
  const got = (...data: number[]): DenseTensor => ({ dtype: "f32", shape: [4], data: Float32Array.from(data) });

  test("is the worst error as a fraction of its bound", () => {
    expect(judge(near, got(1.25, Number.NaN, 3, Number.POSITIVE_INFINITY))).toMatchObject({ worst: 0.5, failed: 0 });
    expect(judge(near, got(1, Number.NaN, 5, Number.POSITIVE_INFINITY))).toMatchObject({
      worst: 2,
      failed: 1,
      element: { index: 2, got: 5 },
    });
  });

  test("wants NaN for NaN and an infinity for that infinity", () => {
    expect(judge(near, got(1, 2, 3, Number.POSITIVE_INFINITY)).failed).toBe(1);
    expect(judge(near, got(1, Number.NaN, Number.NaN, Number.POSITIVE_INFINITY)).failed).toBe(1);
    expect(judge(near, got(1, Number.NaN, 3, Number.NEGATIVE_INFINITY)).failed).toBe(1);
    expect(judge(near, got(1, Number.NaN, 3, 3e38)).failed).toBe(1);
  });

  test("finds one flipped bit in a stored tensor", () => {
    const tensor = randomTensor(FORMATS.int8, [4, 64], 1);
    const qdata = tensor.qdata.slice();
    qdata[7] = (qdata[7] as number) ^ 4;
    expect(judge({ kind: "equal", tensor }, tensor)).toMatchObject({ failed: 0, worst: 0 });
    expect(judge({ kind: "equal", tensor }, { ...tensor, qdata })).toMatchObject({
      failed: 1,
      worst: Number.POSITIVE_INFINITY,
    });
  });
});
