import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { f32FromBits } from "../../src/core/dtype.js";
import { decode } from "../../src/formats/codec.js";
import { type Format, withScale } from "../../src/formats/format.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import { dequantize, elementCodes, type QuantizedTensor, scaleValues, zeroValues } from "../../src/formats/tensor.js";
import { dense, GraphBuilder, stored } from "../../src/ir/graph.js";
import type { OpAttrs, OpName } from "../../src/ir/ops.js";
import { packSettings, sampleToken } from "../../src/ir/sample.js";
import { type DenseTensor, type HostTensor, isDense } from "../../src/ir/tensor.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { open } from "../../src/runtime/device.js";
import { randomUniform } from "../support/tiny-model.js";

/** Evaluates one op on its own, as the reference device does. `shapes` gives the types of stored operands that are no matrix. */
async function run<Op extends OpName>(
  op: Op,
  operands: HostTensor[],
  attrs: OpAttrs[Op],
  past = 0,
  shapes: Record<number, number[]> = {},
): Promise<HostTensor[]> {
  const g = new GraphBuilder({ past: 64 });
  const typeOf = (tensor: HostTensor, shape: readonly number[]) =>
    isDense(tensor) ? dense(tensor.dtype, shape) : stored(tensor.format, shape);
  const inputs = operands.map((tensor, i) => g.input(`${i}`, typeOf(tensor, shapes[i] ?? tensor.shape)));
  const outputs = g.op(op, inputs, attrs);
  for (const [i, id] of outputs.entries()) g.output(`${i}`, id);
  await using device = await open({ prefer: ["reference"] });
  using program = await device.compile(g.build());
  const results = await program.run({ inputs: Object.fromEntries(operands.entries()), symbols: { past } });
  return outputs.map((_, i) => results[`${i}`] as HostTensor);
}
const first = (results: HostTensor[]) => (results[0] as DenseTensor).data as Float32Array;

const f32 = (shape: number[], data: ArrayLike<number>): DenseTensor => ({
  dtype: "f32",
  shape,
  data: Float32Array.from(data),
});
const uniform = randomUniform(7);
const random = (...shape: number[]) => f32(shape, Array.from({ length: shape.reduce((a, b) => a * b, 1) }, uniform));
const matrix = (format: Format, rows: number, k: number): QuantizedTensor =>
  quantizeTensor(random(rows, k).data as Float32Array, [rows, k], "f32", format);
const at = (tensor: DenseTensor, ...index: number[]) =>
  tensor.data[index.reduce((offset, i, axis) => offset * (tensor.shape[axis] as number) + i, 0)] as number;
const range = (n: number) => Array.from({ length: n }, (_, i) => i);

/** Each result is the float64 value of its formula rounded once to float32; `noise` is what may come on top of half an ulp. */
function expectRounded(got: ArrayLike<number>, expected: number[], noise: number | number[] = 1e-13): void {
  expect(got.length).toBe(expected.length);
  for (const [i, value] of expected.entries()) {
    const slack = typeof noise === "number" ? noise : (noise[i] as number);
    const bound = Math.abs(value) * 2 ** -24 + 2 ** -150 + slack;
    expect(Math.abs((got[i] as number) - value), `element ${i}: ${got[i]} for ${value}`).toBeLessThanOrEqual(bound);
  }
}

describe("linear", () => {
  test("is x W^T + b with W = (code - 8) * scale + zero for int4 with a float zero point, written out", async () => {
    const format = withScale(FORMATS.int4_tinygemm, { block: [1, 32], codec: CODECS.bf16, zero: CODECS.bf16 });
    const [x, weight, bias] = [random(3, 64), matrix(format, 5, 64), random(5)];
    const [codes, scales, zeros] = [elementCodes(weight), scaleValues(weight, 0), zeroValues(weight)];
    const expected = range(3).flatMap((t) =>
      range(5).map((n) =>
        range(64).reduce((sum, k) => {
          const block = n * 2 + Math.floor(k / 32);
          const value = ((codes[n * 64 + k] as number) - 8) * (scales[block] as number) + (zeros[block] as number);
          return sum + at(x, t, k) * value;
        }, bias.data[n] as number),
      ),
    );
    expectRounded(first(await run("linear", [x, weight, bias], {})), expected, 1e-11);
  });

  test("is sum of code * scale products for int8 activations and int8 weights", async () => {
    const [x, weight] = [matrix(FORMATS.int8, 2, 32), matrix(FORMATS.int8, 4, 32)];
    const value = (tensor: QuantizedTensor, row: number, k: number) =>
      (((elementCodes(tensor)[row * 32 + k] as number) << 24) >> 24) * (scaleValues(tensor, 0)[row] as number);
    const expected = range(2).flatMap((t) =>
      range(4).map((n) => range(32).reduce((sum, k) => sum + value(x, t, k) * value(weight, n, k), 0)),
    );
    expectRounded(first(await run("linear", [x, weight], {})), expected, 1e-11);
  });

  test("folds leading dimensions into rows, and takes no rows", async () => {
    const weight = matrix(FORMATS.f32, 4, 8);
    expect((await run("linear", [random(2, 3, 8), weight], {}))[0]?.shape).toEqual([2, 3, 4]);
    expect(first(await run("linear", [random(0, 8), weight], {}))).toHaveLength(0);
  });
});

test("embedding is the named rows, scaled; ids outside the table take its nearest row", async () => {
  const table = matrix(FORMATS.bf16, 4, 8);
  const rows = [2, 0, 3, 0, 3];
  const ids: DenseTensor = { dtype: "i32", shape: [5], data: Int32Array.of(2, 0, 3, -7, 99) };
  const codes = elementCodes(table);
  const expected = rows.flatMap((row) => range(8).map((k) => 4 * decode(CODECS.bf16, codes[row * 8 + k] as number)));
  expectRounded(first(await run("embedding", [ids, table], { scale: 4 })), expected);
});

test("rmsnorm is x / sqrt(mean(x^2) + eps) * weight, row by row", async () => {
  const [x, weight] = [random(3, 6), random(6)];
  const expected = range(3).flatMap((t) => {
    const mean = range(6).reduce((sum, k) => sum + at(x, t, k) ** 2, 0) / 6;
    return range(6).map((k) => (at(x, t, k) / Math.sqrt(mean + 0.25)) * at(weight, k));
  });
  expectRounded(first(await run("rmsnorm", [x, weight], { eps: 0.25 })), expected);
});

test("rope multiplies the complex number x[i] + j x[i + D/2] by e^(j angle) of its position, its products rounded once", async () => {
  const [heads, size, tokens, past] = [3, 8, 4, 5];
  const angle = (position: number, i: number) => position * 10000 ** ((-2 * i) / size);
  const table = f32(
    [16, size],
    range(16).flatMap((p) => [
      ...range(4).map((i) => Math.cos(angle(p, i))),
      ...range(4).map((i) => Math.sin(angle(p, i))),
    ]),
  );
  const x = random(tokens, heads * size);
  const [expected, rounding] = [new Array<number>(tokens * heads * size), new Array<number>(tokens * heads * size)];
  for (const t of range(tokens))
    for (const h of range(heads))
      for (const i of range(4)) {
        const [re, im] = [at(x, t, h * size + i), at(x, t, h * size + 4 + i)];
        const [cos, sin] = [at(table, past + t, i), at(table, past + t, 4 + i)];
        // |z| and arg z apart, so that the product is not the implementation's formula.
        const [radius, turn] = [Math.hypot(re, im) * Math.hypot(cos, sin), Math.atan2(im, re) + Math.atan2(sin, cos)];
        const place = t * heads * size + h * size + i;
        expected[place] = radius * Math.cos(turn);
        expected[place + 4] = radius * Math.sin(turn);
        rounding[place] = 2 ** -24 * (Math.abs(re * cos) + Math.abs(im * sin));
        rounding[place + 4] = 2 ** -24 * (Math.abs(im * cos) + Math.abs(re * sin));
      }
  expectRounded(first(await run("rope", [x, table], { heads, position: "past" }, past)), expected, rounding);
});

describe("kv_write", () => {
  const formats = ["f32", "f16", "int8", "mxfp8_e4m3"] as const;
  test.each(formats)(
    "stores each head's row of a token in format %s at its position and leaves the others",
    async (name) => {
      const [heads, capacity, size, past] = [2, 6, 32, 3];
      const format = FORMATS[name];
      const cache = matrix(format, heads * capacity, size);
      const before = dequantize(cache);
      const x = random(2, heads * size);
      const shapes = { 0: [heads, capacity, size] };
      const [written] = await run("kv_write", [cache, x], { position: "past" }, past, shapes);
      const after = dequantize(written as QuantizedTensor);
      for (const head of range(heads))
        for (const slot of range(capacity)) {
          const row = (values: Float64Array) =>
            values.slice((head * capacity + slot) * size, (head * capacity + slot + 1) * size);
          const token = slot - past;
          const part = (x.data as Float32Array).slice((token * heads + head) * size, (token * heads + head + 1) * size);
          const expected =
            token === 0 || token === 1 ? dequantize(quantizeTensor(part, [1, size], "f32", format)) : row(before);
          expect(row(after)).toEqual(expected);
        }
    },
  );

  test("past the capacity is cache/overflow", async () => {
    const cache = matrix(FORMATS.f32, 4, 8);
    const write = run("kv_write", [cache, random(2, 8)], { position: "past" }, 3, { 0: [1, 4, 8] });
    await expect(write).rejects.toMatchObject({ code: "cache/overflow", context: { needed: 5, capacity: 4 } });
  });
});

describe("sdpa is softmax(scale q k^T + mask) v with the matrices written out", () => {
  const cases: [what: string, heads: number, kvHeads: number, tokens: number, past: number, causal: boolean][] = [
    ["one token after others", 4, 4, 1, 5, true],
    ["a prompt", 2, 2, 6, 0, true],
    ["a prompt's second part, three query heads to a KV head", 6, 2, 3, 4, true],
    ["every key for every query", 4, 1, 3, 2, false],
  ];
  test.each(cases)("%s", async (_, heads, kvHeads, tokens, past, causal) => {
    const [size, capacity, scale] = [8, 10, 0.7];
    const [k, v] = [matrix(FORMATS.f16, kvHeads * capacity, size), matrix(FORMATS.f16, kvHeads * capacity, size)];
    const q = random(tokens, heads * size);
    const [keys, values] = [dequantize(k), dequantize(v)];
    const cell = (matrix: Float64Array, head: number, j: number, i: number) =>
      matrix[(Math.floor((head * kvHeads) / heads) * capacity + j) * size + i] as number;
    const expected = range(tokens).flatMap((t) =>
      range(heads).flatMap((h) => {
        const scores = range(past + tokens).map((j) => {
          if (causal && j > past + t) return Number.NEGATIVE_INFINITY;
          return scale * range(size).reduce((sum, i) => sum + at(q, t, h * size + i) * cell(keys, h, j, i), 0);
        });
        const weights = scores.map((score) => Math.exp(score));
        const total = weights.reduce((a, b) => a + b, 0);
        return range(size).map((i) => weights.reduce((sum, w, j) => sum + (w / total) * cell(values, h, j, i), 0));
      }),
    );
    const attrs = { heads, kvHeads, scale, causal, position: "past" };
    const shape = [kvHeads, capacity, size];
    expectRounded(first(await run("sdpa", [q, k, v], attrs, past, { 1: shape, 2: shape })), expected);
  });

  test("scores far beyond exp's range do not overflow", async () => {
    const [k, v] = [matrix(FORMATS.f32, 4, 8), matrix(FORMATS.f32, 4, 8)];
    const attrs = { heads: 1, kvHeads: 1, scale: 1e6, causal: true, position: "past" };
    expect(
      [...first(await run("sdpa", [random(1, 8), k, v], attrs, 3, { 1: [1, 4, 8], 2: [1, 4, 8] }))].every(
        Number.isFinite,
      ),
    ).toBe(true);
  });
});

describe("elementwise functions", () => {
  /** The normal distribution function, Abramowitz and Stegun table 26.1 and its tail, to float64. */
  const PHI: readonly (readonly [x: number, phi: number])[] = [
    [0, 0.5],
    [0.5, 0.6914624612740131],
    [1, 0.8413447460685429],
    [2, 0.9772498680518208],
    [3, 0.9986501019683699],
    [-1, 0.15865525393145707],
    [-3, 0.0013498980316300933],
    [-5, 2.866515718791939e-7],
    [-8, 6.220960574271785e-16],
    [-10, 7.619853024160527e-24],
  ];
  const unary = async (fn: OpAttrs["unary"]["fn"], values: readonly number[]) =>
    first(await run("unary", [f32([values.length], values)], { fn }));

  test("gelu is x times the normal distribution function, by its table, its tail included", async () => {
    const got = await unary(
      "gelu",
      PHI.map(([x]) => x),
    );
    for (const [i, [x, phi]] of PHI.entries()) {
      expect(Math.abs((got[i] as number) - x * phi)).toBeLessThanOrEqual(Math.abs(x * phi) * 2 ** -23);
    }
  });

  const floats = fc.array(fc.float({ noNaN: true, noDefaultInfinity: true, min: -30, max: 30 }), { maxLength: 20 });
  const formulas: [fn: OpAttrs["unary"]["fn"], formula: (x: number) => number][] = [
    ["relu", (x) => (x > 0 ? x : 0)],
    ["silu", (x) => x * (1 / (1 + Math.exp(-x)))],
    ["gelu_tanh", (x) => 0.5 * x * (1 + Math.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))],
  ];
  test.each(formulas)("%s is its formula", async (fn, formula) => {
    await fc.assert(
      fc.asyncProperty(floats, async (values) => expectRounded(await unary(fn, values), values.map(formula))),
    );
  });

  test("gelu(x) - gelu(-x) is x, and both gelus agree to a thousandth", async () => {
    await fc.assert(
      fc.asyncProperty(floats, async (values) => {
        const negated = values.map((x) => -x);
        const [plus, minus] = [await unary("gelu", values), await unary("gelu", negated)];
        const tanh = await unary("gelu_tanh", values);
        for (const [i, x] of values.entries()) {
          expect((plus[i] as number) - (minus[i] as number)).toBeCloseTo(x, 4);
          expect(Math.abs((plus[i] as number) - (tanh[i] as number))).toBeLessThan(1e-3);
        }
      }),
    );
  });

  test("add and mul round once to float32", async () => {
    const [a, b] = [random(4, 4), random(4, 4)];
    const pairs = [...a.data].map((x, i) => [x, b.data[i] as number] as const);
    expect([...first(await run("binary", [a, b], { fn: "add" }))]).toEqual(pairs.map(([x, y]) => Math.fround(x + y)));
    expect([...first(await run("binary", [a, b], { fn: "mul" }))]).toEqual(pairs.map(([x, y]) => Math.fround(x * y)));
  });
});

describe("quantize and dequantize", () => {
  test("to a symmetric int8 row is round(x * 127.5 / amax) clamped, and back is code * scale", async () => {
    const x = random(3, 32);
    const tensor = (await run("quantize", [x], { format: FORMATS.int8 }))[0] as QuantizedTensor;
    const back = first(await run("dequantize", [tensor], {}));
    for (const row of range(3)) {
      const amax = Math.max(...range(32).map((k) => Math.abs(at(x, row, k))));
      const scale = scaleValues(tensor, 0)[row] as number;
      expect(scale).toBeCloseTo(amax / 127.5, 6);
      for (const k of range(32)) {
        const code = Math.min(127, Math.max(-128, Math.round(at(x, row, k) / scale)));
        expect(back[row * 32 + k]).toBe(Math.fround(code * scale));
      }
    }
  });

  test("leading dimensions fold into rows", async () => {
    expect((await run("quantize", [random(2, 3, 32)], { format: FORMATS.mxfp4 }))[0]?.shape).toEqual([6, 32]);
  });
});

test("last_row is the last row", async () => {
  const x = random(4, 3);
  expect([...first(await run("last_row", [x], {}))]).toEqual([...x.data.slice(9)]);
});

test("sample gives the token, the bits of its log-probability, and the token as the next id", async () => {
  const settings = { temperature: 0.5, topK: 4, topP: 0.75, seed: 3, step: 9 };
  const logits = random(1, 40);
  const ids: DenseTensor = { dtype: "i32", shape: [4], data: Int32Array.of(5, 6, 7, 8) };
  const words: DenseTensor = { dtype: "u32", shape: [5], data: packSettings(settings) };
  const [sampled, next] = (await run("sample", [logits, words, ids], {})) as [DenseTensor, DenseTensor];
  const expected = sampleToken(logits.data, settings);
  expect(sampled.data[0]).toBe(expected.id);
  expect(f32FromBits(sampled.data[1] as number)).toBe(Math.fround(expected.logprob));
  expect([...next.data]).toEqual([expected.id, 6, 7, 8]);
});
