import { describe, expect, test } from "vitest";
import { f32FromBits, roundTo } from "../../src/core/dtype.js";
import { Staging } from "../../src/core/staging.js";
import { type Codec, defineFormat, type Format, formatKey, withRule, withScale } from "../../src/formats/format.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import {
  dequantize,
  elementCodes,
  type QuantizedTensor,
  scaleValues,
  sliceRows,
  zeroValues,
} from "../../src/formats/tensor.js";
import { dequantizeTo } from "../../src/quantize/dequantize.js";
import { quantizeRows, quantizeTensor } from "../../src/quantize/quantize.js";

const [N, K] = [24, 256];
const ordinary = Float32Array.from({ length: N * K }, (_, i) =>
  roundTo("bf16", Math.fround(Math.sin(i * 12.9898 + 1) * (1 + (i % 7)) * 0.01)),
);

/** Rows that break careless arithmetic; all finite, all bfloat16. */
const PATTERNS: readonly ((i: number) => number)[] = [
  () => 0,
  (i) => (i % 2 === 0 ? 0 : -0),
  (i) => (i % 3) * 2 ** -133,
  (i) => (i % 5) * 2 ** -126,
  (i) => (i === 17 ? 1e4 : 0.001 * (i % 9)),
  (i) => (i === 3 ? 2 ** 20 : 0),
  () => 0.5,
  () => -3,
  (i) => 2 ** ((i % 40) - 20),
  (i) => -(2 ** ((i % 40) - 30)),
  (i) => (i % 16) - 8 + 0.5,
  (i) => (i % 2 === 0 ? 2 ** 60 : -(2 ** 60)),
];
const adversarial = Float32Array.from({ length: N * K }, (_, i) =>
  roundTo("bf16", (PATTERNS[Math.floor(i / K) % PATTERNS.length] as (i: number) => number)(i % K)),
);

/** Rows added here go through every law, as any row of the table does. */
const madeUp: Format[] = [
  defineFormat("made_up_float", {
    element: { kind: "float", exponent: 3, mantissa: 3, bias: 3, signed: true, specials: "none" },
    scales: [{ codec: CODECS.bf16, block: [1, 64] }],
    rule: { kind: "amax", floor: 1e-12, round: "after" },
    source: "this test",
  }),
  defineFormat("made_up_int", {
    element: { kind: "int", bits: 5, signed: true },
    scales: [{ codec: CODECS.f16, block: [2, 128] }],
    zero: { domain: "int", codec: CODECS.int8 },
    rule: { kind: "affine", mapping: "asymmetric", min: -16, max: 15, eps: 2 ** -20 },
    source: "this test",
  }),
  defineFormat("made_up_micro", {
    element: { kind: "float", exponent: 2, mantissa: 2, bias: 1, signed: true, specials: "none" },
    scales: [{ codec: CODECS.e8m0, block: [1, 16] }],
    rule: { kind: "mx", mode: "even" },
    source: "this test",
  }),
];
const blockVariants = Object.values(FORMATS).flatMap((format) =>
  format.blocks
    .map((block) => withScale(format, { block }))
    .filter((variant) => formatKey(variant) !== formatKey(format)),
);
const ruleVariants = [
  ...(["floor", "ceil", "even"] as const).map((mode) =>
    withRule(FORMATS.mxfp8_e5m2, mode, { rule: { kind: "mx", mode } }),
  ),
  withRule(FORMATS.nvfp4, "mslk", { rule: { kind: "nvfp4", variant: "multiply" } }),
  withRule(FORMATS.int4_tinygemm, "hqq", { rule: { kind: "hqq" } }),
  withRule(FORMATS.int4, "hqq", { rule: { kind: "hqq_scale", min: -8, max: 7 } }),
  withRule(FORMATS.float8_e4m3, "mslk", { rule: { kind: "amax", floor: 1 / 512, round: "after" } }),
];
const all = [...Object.values(FORMATS), ...blockVariants, ...ruleVariants, ...madeUp].map(
  (format) => [formatKey(format), format] as const,
);

/** Formats with a float16 part cannot hold the largest of these numbers. */
const narrow = adversarial.map((value) => (Math.abs(value) > 2 ** 14 ? Math.sign(value) * 2 ** 14 : value));
const hasFloat16 = (format: Format) => formatKey(format).includes("f16") && /(^|[:[])f16/.test(formatKey(format));
const hardest = (format: Format) => (hasFloat16(format) ? narrow : adversarial);

/** Equality of large arrays; vitest's own is slow. */
const same = (a: ArrayLike<number>, b: ArrayLike<number>) =>
  a.length === b.length && Array.prototype.every.call(a, (value, i) => Object.is(value, b[i]));
const sameWords = (a: QuantizedTensor, b: QuantizedTensor) => words(a).map((part, i) => same(part, words(b)[i] ?? []));

const words = (tensor: QuantizedTensor) => [
  tensor.qdata,
  ...tensor.scales,
  tensor.zero ?? new Uint32Array(0),
  tensor.table ?? new Float32Array(0),
];
const source = (data: Float32Array) => ({
  shape: [N, K] as const,
  dtype: "bf16" as const,
  read: (begin: number, end: number) => data.slice(begin * K, end * K),
});

describe.each(all)("%s", (_key, format) => {
  test("quantizing in tiles is quantizing whole, bit for bit", async () => {
    const memory = new Staging();
    for (const data of [ordinary, hardest(format)]) {
      const whole = quantizeTensor(data, [N, K], "bf16", format);
      for (const height of [1, 5, 7, N]) {
        let begin = 0;
        // Whatever is left in memory by what was there before must not be seen.
        memory.take(2 ** 16).fill(0xa5);
        memory.release();
        for await (const tile of quantizeRows(source(data), format, { tileBytes: height * K * 4, memory })) {
          const end = begin + tile.shape[0];
          expect(sameWords(tile, sliceRows(whole, begin, end))).not.toContain(false);
          begin = end;
        }
        expect(begin).toBe(N);
      }
    }
    expect(memory.mark).toBe(0);
  });

  test("finite numbers stay finite, and zero stays zero", () => {
    const values = dequantize(quantizeTensor(hardest(format), [N, K], "bf16", format));
    expect(values.findIndex((value) => !Number.isFinite(value))).toBe(-1);
    const zeros = dequantize(quantizeTensor(new Float32Array(N * K), [N, K], "bf16", format));
    expect(zeros.findIndex((value) => value !== 0)).toBe(-1);
  });

  test("torchao's literal numerics differ only where they break", () => {
    const [guarded, literal] = (["guarded", "torchao"] as const).map((numerics) =>
      quantizeTensor(ordinary, [N, K], "bf16", format, { numerics }),
    );
    if (format.rule.kind === "codebook") return expect(literal?.shape).toEqual([N, K]);
    expect(sameWords(guarded as QuantizedTensor, literal as QuantizedTensor)).not.toContain(false);
  });

  test("what is read back is near what was written", () => {
    const tensor = quantizeTensor(ordinary, [N, K], "bf16", format);
    const exact = dequantize(tensor);
    const rounded = dequantizeTo(tensor, "f32");
    let [error, signal, apart] = [0, 0, 0];
    for (let i = 0; i < exact.length; i++) {
      apart = Math.max(apart, Math.abs((rounded[i] as number) - (exact[i] as number)));
      error += ((exact[i] as number) - (ordinary[i] as number)) ** 2;
      signal += (ordinary[i] as number) ** 2;
    }
    expect(apart).toBeLessThan(1e-7);
    expect(error).toBeLessThan(signal * (format.name.endsWith("int1") || format.name === "uint1" ? 1.5 : 0.5));
  });
});

describe("laws", () => {
  const scaled = (data: Float32Array, factor: number) => data.map((value) => value * factor);

  test.each(
    (
      [
        "float8_e4m3",
        "int8",
        "int8_asymmetric",
        "int4_tinygemm",
        "int4",
        "mxfp8_e4m3",
        "mxfp4",
        "nvfp4",
        "nf4",
        "fp6_e3m2",
      ] as const
    ).map((name) => [name]),
  )("%s: scaling by a power of two changes scales only", (name) => {
    const [a, b] = [ordinary, scaled(ordinary, 2 ** 9)].map((data) =>
      quantizeTensor(data, [N, K], "bf16", FORMATS[name]),
    );
    expect(elementCodes(b as QuantizedTensor)).toEqual(elementCodes(a as QuantizedTensor));
    const values = dequantize(a as QuantizedTensor);
    expect(dequantize(b as QuantizedTensor)).toEqual(values.map((value) => value * 2 ** 9));
  });

  test.each((["f16", "bf16", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4"] as const).map((name) => [name]))(
    "%s: quantizing twice is quantizing once",
    (name) => {
      const once = quantizeTensor(ordinary, [N, K], "f32", FORMATS[name]);
      const values = Float32Array.from(dequantize(once));
      expect(dequantize(quantizeTensor(values, [N, K], "f32", FORMATS[name]))).toEqual(dequantize(once));
    },
  );

  test("float8 stays within half a unit of its largest binade", () => {
    const tensor = quantizeTensor(ordinary, [N, K], "f32", FORMATS.float8_e4m3);
    const scales = scaleValues(tensor, 0);
    for (const [i, value] of dequantize(tensor).entries()) {
      expect(Math.abs(value - (ordinary[i] as number))).toBeLessThanOrEqual(
        16.001 * (scales[Math.floor(i / K)] as number),
      );
    }
  });
});

describe("guarded numerics", () => {
  const one = (value: number, format: Format, numerics: "guarded" | "torchao") =>
    quantizeTensor(new Float32Array(64).fill(value), [1, 64], "f32", format, { numerics });

  test("a row of zeros is NaN in torchao's float8, nvfp4 and nf4, and zero here", () => {
    for (const format of [FORMATS.float8_e4m3, FORMATS.float8_e5m2, FORMATS.nvfp4]) {
      expect(dequantize(one(0, format, "torchao"))[0], format.name).toBeNaN();
      expect(dequantize(one(0, format, "guarded"))[0], format.name).toBe(0);
    }
    expect(elementCodes(one(0, FORMATS.nf4, "torchao"))[0]).toBe(0);
    expect(elementCodes(one(0, FORMATS.nf4, "guarded"))[0]).toBe(7);
  });

  test("a row too small for its dtype's scale keeps its values", () => {
    const tiny = new Float32Array(64).fill(2 ** -20);
    const tensor = quantizeTensor(tiny, [1, 64], "f16", FORMATS.float8_e4m3);
    expect(dequantize(tensor)[0]).toBeCloseTo(2 ** -20, 9);
    expect(scaleValues(tensor, 0)[0]).toBeGreaterThan(0);
  });

  test("a codebook's scale is the largest magnitude, not the largest value", () => {
    const data = Float32Array.from({ length: 64 }, (_, i) => -1 - i);
    const of = (numerics: "guarded" | "torchao") =>
      quantizeTensor(data, [1, 64], "f32", withScale(FORMATS.codebook4, { codec: CODECS.f32 }), { numerics });
    expect(scaleValues(of("guarded"), 0)[0]).toBe(64);
    expect(scaleValues(of("torchao"), 0)[0]).toBe(Math.fround(1e-9));
  });

  test("infinities and NaN stay in their own block", () => {
    for (const format of [FORMATS.float8_e4m3, FORMATS.int8, FORMATS.mxfp4]) {
      const data = new Float32Array(128).fill(1);
      data[3] = Number.NaN;
      const values = dequantize(quantizeTensor(data, [2, 64], "f32", format));
      expect(values.slice(64)).toEqual(new Float64Array(64).fill(values[64] as number));
      expect(values[64]).toBeCloseTo(1, 1);
      expect(values[0]).toBeNaN();
    }
  });
});

const drain = async (tiles: AsyncIterable<unknown>) => {
  for await (const _ of tiles);
};

describe("tiles", () => {
  const tall = withScale(FORMATS.float8_e4m3, { block: ["all", "all"] });

  test("a tile is all that is held", async () => {
    const rows = 4096;
    let largest = 0;
    let read = 0;
    const big = {
      shape: [rows, 512] as const,
      dtype: "bf16" as const,
      read: (begin: number, end: number) => {
        largest = Math.max(largest, end - begin);
        read += end - begin;
        return new Float32Array((end - begin) * 512).fill(0.25);
      },
    };
    const limit = 64 * 1024;
    const memory = new Staging();
    for await (const tile of quantizeRows(big, tall, { tileBytes: limit, memory })) {
      expect(scaleValues(tile, 0)[0]).toBe(roundTo("bf16", 0.25 / 448));
      // The codes of a tile are a quarter of its numbers.
      expect(memory.bytes).toBeLessThanOrEqual(limit / 2);
    }
    expect(largest * 512 * 4).toBeLessThanOrEqual(limit);
    expect(read).toBe(2 * rows);
  });

  test("tiles are whole blocks, and one row of blocks at least", async () => {
    const block = withScale(FORMATS.float8_e4m3, { block: [16, 128] });
    const begins: number[] = [];
    const { shape, dtype, read } = source(ordinary);
    const spy = (begin: number, end: number) => {
      begins.push(begin);
      return read(begin, end);
    };
    await drain(quantizeRows({ shape, dtype, read: spy }, block, { tileBytes: 1 }));
    expect(begins).toEqual([0, 16]);
  });

  test("progress is told and an abort is heard", async () => {
    const seen: string[] = [];
    await drain(
      quantizeRows(source(ordinary), tall, {
        tileBytes: 12 * K * 4,
        onProgress: (rows, total, pass) => void seen.push(`${pass}:${rows}/${total}`),
      }),
    );
    expect(seen).toEqual(["0:12/24", "0:24/24", "1:12/24", "1:24/24"]);
    const controller = new AbortController();
    const started = quantizeRows(source(ordinary), tall, {
      tileBytes: K * 4,
      signal: controller.signal,
      onProgress: () => controller.abort(),
    });
    await expect(drain(started)).rejects.toMatchObject({ code: "operation/aborted" });
  });
});

describe("given parameters", () => {
  test("are used instead of chosen ones", () => {
    const scale = new Float32Array(1).fill(0.5);
    const tensorwide: Format[] = [FORMATS.int8, FORMATS.int8_asymmetric, FORMATS.float8_e4m3].map((format) =>
      withScale(format, { block: ["all", "all"] }),
    );
    for (const format of tensorwide) {
      const tensor = quantizeTensor(Float32Array.of(1, -2, 3, 0), [2, 2], "f32", format, {
        given: { scale, zero: Float32Array.of(2) },
      });
      expect(scaleValues(tensor, 0)[0]).toBe(0.5);
      if (format.zero.domain === "int") expect(zeroValues(tensor)[0]).toBe(2);
      expect([...dequantize(tensor)]).toEqual([1, -2, 3, 0]);
    }
    const fixed = quantizeTensor(ordinary, [N, K], "bf16", FORMATS.nvfp4, { perTensorScale: 2 ** -10 });
    expect(scaleValues(fixed, 1)[0]).toBe(2 ** -10);
  });

  test("a table is used instead of a learned one", () => {
    const element: Codec = { kind: "lut", bits: 1, entries: "learned", vector: [1, 1] };
    const format = withRule(FORMATS.codebook4, "one", { element });
    const table = Float32Array.of(-1, 1);
    const tensor = quantizeTensor(Float32Array.of(0.2, -4), [1, 2], "f32", format, {
      table,
      given: { scale: Float32Array.of(2) },
    });
    expect([...dequantize(tensor)]).toEqual([2, -2]);
  });
});

describe("bad input", () => {
  test("a K that the block does not divide names the nearest K", () => {
    expect(() => quantizeTensor(new Float32Array(100), [1, 100], "f32", FORMATS.mxfp4)).toThrow(
      /K = 100 is not a multiple of its block 32; nearest legal K is 96/,
    );
    expect(() => quantizeTensor(new Float32Array(3), [3, 1], "f32", FORMATS.codebook4_1x2)).toThrow(
      expect.objectContaining({ code: "format/block" }),
    );
    expect(() => quantizeTensor(new Float32Array(3), [1, 4], "f32", FORMATS.int8)).toThrow(
      expect.objectContaining({ code: "shape/mismatch" }),
    );
  });

  test("an empty matrix is an empty tensor", () => {
    for (const format of [
      FORMATS.int8,
      FORMATS.nvfp4,
      FORMATS.int4_hqq,
      FORMATS.codebook4,
      withScale(FORMATS.int8, { block: ["all", "all"] }),
    ]) {
      expect(dequantize(quantizeTensor(new Float32Array(0), [0, 64], "f32", format))).toHaveLength(0);
    }
  });
});

test("int4 of a million weights takes a fraction of a second", () => {
  const data = Float32Array.from({ length: 1024 * 1024 }, (_, i) =>
    f32FromBits((Math.imul(i + 1, 2654435761) & 0x807f0000) | 0x3c000000),
  );
  quantizeTensor(data.subarray(0, 1024 * 64), [64, 1024], "bf16", FORMATS.int4_tinygemm);
  const began = performance.now();
  quantizeTensor(data, [1024, 1024], "bf16", FORMATS.int4_tinygemm);
  // 6.8 million weights are to take well under 2 s; this leaves room for a busy machine.
  expect(performance.now() - began).toBeLessThan(1500);
});
