import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { quantizeKernel, quantizeObstacle } from "../../src/backends/webgpu/kernels/quantize.js";
import type { RuleOptions } from "../../src/backends/webgpu/wgsl/rules.js";
import { type FloatType, f32FromBits } from "../../src/core/dtype.js";
import { FewbitError } from "../../src/core/errors.js";
import {
  type Block,
  blockGrid,
  type Format,
  formatKey,
  type Rule,
  withRule,
  withScale,
} from "../../src/formats/format.js";
import { CODECS, FORMATS, VARIANTS } from "../../src/formats/table.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { adversarialRows, stack } from "../support/adversarial.js";
import { openTestGpu, type TestGpu } from "../support/gpu.js";
import { differences, quantizeOnGpu } from "../support/quantized.js";

let gpu: TestGpu;
beforeAll(async () => {
  gpu = await openTestGpu();
});
afterAll(() => gpu?.destroy());

const K = 256;
const table = Object.values(FORMATS);
const onDevice = table.filter((format) => quantizeObstacle(format) === null);
const named = (formats: readonly Format[]) => [...new Map(formats.map((format) => [formatKey(format), format]))];

describe.each(named(onDevice))("quantize to %s", (_, format) => {
  test("from f32", () => expectEqual(format, "f32"));
  test("from bf16", () => expectEqual(format, "bf16"));
  test("as torchao literally does", () => expectEqual(format, "f32", { numerics: "torchao" }));
});

describe("blocks", () => {
  const others = onDevice.flatMap((format) => format.blocks.map((block) => withScale(format, { block })));
  test.each(named(others))("%s", (_, format) => expectEqual(format, "f32"));
});

describe("from f16", () => {
  const formats = [
    FORMATS.float8_e4m3,
    FORMATS.int8_asymmetric,
    FORMATS.int4_tinygemm,
    FORMATS.uint5,
    FORMATS.fp6_e2m3,
  ];
  test.each(named(formats))("%s", (_, format) => expectEqual(format, "f16"));
  test.each(named(formats))("%s, torchao", (_, format) => expectEqual(format, "f16", { numerics: "torchao" }));
});

describe("rules that no row of the table has", () => {
  const { int4, int8, uint4, float8_e4m3, mxfp4, mxfp8_e5m2, nvfp4 } = FORMATS;
  const affine = (format: Format, change: Partial<Extract<Rule, { kind: "affine" }>>) =>
    withRule(format, Object.values(change).join(), {
      rule: { ...(format.rule as Extract<Rule, { kind: "affine" }>), ...change },
    });
  const amax = (change: Partial<Extract<Rule, { kind: "amax" }>>, format: Format = float8_e4m3) =>
    withRule(format, JSON.stringify(change), { rule: { kind: "amax", floor: 0, round: "before", ...change } });
  const mx = (format: Format, mode: "floor" | "ceil" | "even") =>
    withRule(format, mode, { rule: { kind: "mx", mode } });
  const block = (format: Format, ...extents: Block) => withScale(format, { block: extents });
  const formats = [
    affine(int4, { mapping: "symmetric_no_clipping_err" }),
    affine(int8, { mapping: "symmetric_no_clipping_err", min: -127 }),
    affine(int8, { min: -64, max: 63 }),
    affine(int8, { min: -127, max: 127, eps: 1e-5 }),
    affine(FORMATS.int1, { mapping: "symmetric" }),
    affine(FORMATS.int1, { mapping: "symmetric_no_clipping_err" }),
    affine(uint4, { preserveZero: false }),
    withScale(FORMATS.int4_tinygemm, { codec: CODECS.f32, zero: CODECS.f32 }),
    amax({ floor: 1 / 512, round: "after" }),
    amax({ floor: 1e-12, ceiling: 2.5 }),
    amax({ power: true }),
    amax({ power: true, round: "after" }, FORMATS.float8_e5m2),
    ...Object.values(VARIANTS),
    ...(["floor", "ceil", "even"] as const).flatMap((mode) => [mx(mxfp4, mode), mx(mxfp8_e5m2, mode)]),
    withRule(nvfp4, "multiply", { rule: { kind: "nvfp4", variant: "multiply" } }),
    // Blocks of two rows, of every row in some columns, and blocks that end inside a word of codes.
    block(FORMATS.uint3, 2, 64),
    block(FORMATS.int8_asymmetric, "all", 32),
    block(FORMATS.int5_asymmetric, 1, 16),
    block(FORMATS.int3, 1, 8),
    block(FORMATS.fp5_e2m2, 3, "all"),
    // Scales that have no reciprocal in their type.
    withScale(int4, { codec: CODECS.f16 }),
    withScale(FORMATS.uint5, { codec: CODECS.f16 }),
  ];
  describe.each(named(formats))("%s", (_, format) => {
    test("from f32", () => expectEqual(format, "f32"));
    test("from bf16, torchao", () => expectEqual(format, "bf16", { numerics: "torchao" }));
  });
  test("scales nearest to a power of two in log2: on both sides of sqrt(2)", async () => {
    // Its largest value is a power of two, so scales have the mantissas of the row.
    const element = { kind: "float", exponent: 3, mantissa: 0, bias: 3, signed: true, specials: "none" } as const;
    const format = withRule(float8_e4m3, "e3m0", {
      element,
      rule: { kind: "amax", floor: 0, round: "before", power: true },
    });
    const bits = [0x3fb504f2, 0x3fb504f3, 0x3fb504f4, 0x00004f3, 0x005a8279, 0x005a827a, 1, 2, 3];
    const data = Float32Array.from(bits, f32FromBits);
    for (const numerics of ["guarded", "torchao"] as const) {
      const expected = quantizeTensor(data, [bits.length, 1], "f32", format, { numerics });
      expect(differences(await quantizeOnGpu(gpu, format, data, [bits.length, 1], { numerics }), expected)).toEqual([]);
    }
  });
  test("nvfp4 with the per-tensor scale of a calibration", () => expectEqual(nvfp4, "f32", { perTensorScale: 0.0021 }));
});

describe("scales and zero points that are given", () => {
  const { int8, int8_asymmetric, float8_e4m3, uint4, int4_tinygemm, int5_asymmetric } = FORMATS;
  const formats = [
    withScale(int8, { block: ["all", "all"] }),
    int8,
    int8_asymmetric,
    withScale(float8_e4m3, { block: ["all", "all"] }),
    withScale(float8_e4m3, { block: [3, 64] }),
    uint4,
    int4_tinygemm,
    withScale(int5_asymmetric, { block: [1, 16], codec: CODECS.f16 }),
  ];
  // Ordinary ones, ones that no reciprocal or type of scales holds, and zero points beyond the range of their codec.
  const SCALES = [0.013, 1, 3.5e-5, 2 ** -149, 1e-30, 6e-8, 3e38, 700];
  const ZEROS = [0, 3, -2, 7, 127.4, 1e9, -300, 0.5];
  describe.each(named(formats))("%s", (_, format) => {
    test.each(["guarded", "torchao"] as const)("%s", async (numerics) => {
      const data = stack(Object.values(adversarialRows(format.element, K, "f32", 1)));
      const shape = [data.length / K, K] as const;
      const [rows, columns] = blockGrid((format.scales[0] as Format["scales"][number]).block, shape);
      for (let offset = 0; offset < (rows * columns === 1 ? SCALES.length : 1); offset++) {
        const list = (from: readonly number[]) =>
          Float32Array.from({ length: rows * columns }, (_, i) => from[(i + offset) % from.length] as number);
        const zero = format.zero.domain === "none" ? {} : { zero: list(ZEROS) };
        const given = { scale: list(SCALES), ...zero };
        const expected = quantizeTensor(data, shape, "f32", format, { numerics, given });
        expect(
          differences(await quantizeOnGpu(gpu, format, data, shape, { numerics }, shape[0], given), expected),
        ).toEqual([]);
      }
    });
  });

  test("rules that do not take them say so", () => {
    expect(quantizeObstacle(FORMATS.mxfp4, true)).toBe(
      "rule mx chooses its scales itself: it takes none that are given",
    );
  });
});

describe("shapes", () => {
  const { float8_e4m3, mxfp6_e2m3, nvfp4, int8_asymmetric, uint3, bf16, nf4 } = FORMATS;
  const formats = [bf16, float8_e4m3, withScale(float8_e4m3, { block: [128, 128] }), int8_asymmetric, nvfp4];
  const values = (rows: number, k: number) =>
    Float32Array.from({ length: rows * k }, (_, i) => Math.sin(i * 12.9898) * 3);

  test.each(named(formats))("%s: storage for more rows than there are", async (_, format) => {
    const data = values(5, 128);
    const expected = quantizeTensor(data, [5, 128], "f32", format);
    expect(differences(await quantizeOnGpu(gpu, format, data, [5, 128], {}, 300), expected)).toEqual([]);
  });

  test.each([
    ["one row", float8_e4m3, 1, 4096],
    ["a row of one element", int8_asymmetric, 3, 1],
    ["rows that leave padding", withScale(uint3, { block: [1, 32] }), 7, 96],
    ["scales of two rows in a word", withScale(uint3, { block: [1, 32] }), 9, 32],
    ["an odd width", int8_asymmetric, 6, 77],
    ["bytes of scales of four rows in a word", mxfp6_e2m3, 7, 32],
    ["last block of rows short", withScale(float8_e4m3, { block: [128, 128] }), 130, 256],
    ["more workgroups than one dimension has", float8_e4m3, 66_000, 16],
    ["more tiles than one dimension has", bf16, 2_100_000, 1],
    ["scalers of several groups, the last one short", nf4, 37, 1024],
    ["no rows", nvfp4, 0, 64],
  ] as const)("%s", async (_, format, rows, k) => {
    const data = values(rows, k);
    const expected = quantizeTensor(data, [rows, k], "f32", format);
    expect(differences(await quantizeOnGpu(gpu, format, data, [rows, k]), expected)).toEqual([]);
  });

  test.each(named([float8_e4m3, mxfp6_e2m3]))("%s: columns of a wider matrix", async (_, format) => {
    const [rows, k, stride, column] = [6, 64, 200, 36];
    const wide = values(rows, stride);
    const narrow = Float32Array.from(
      { length: rows * k },
      (_, i) => wide[Math.floor(i / k) * stride + column + (i % k)] as number,
    );
    const expected = quantizeTensor(narrow, [rows, k], "f32", format);
    const options = { x: { stride, column } };
    expect(differences(await quantizeOnGpu(gpu, format, wide, [rows, k], options), expected)).toEqual([]);
  });
});

describe("what has no kernel", () => {
  test("is a coded error with the reason", () => {
    const refused = table.filter((format) => quantizeObstacle(format) !== null);
    expect(
      refused.map((format) => format.rule.kind).filter((kind) => !["hqq", "sinq", "codebook"].includes(kind)),
    ).toEqual([]);
    for (const format of refused) {
      expect(() => quantizeKernel(format, K, 1)).toThrowError(
        expect.objectContaining({ code: "quantize/unsupported" }),
      );
    }
  });

  test("a block that does not divide k", () => {
    const attempt = () => quantizeKernel(FORMATS.mxfp4, 100, 1);
    expect(attempt).toThrowError(FewbitError);
    expect(attempt).toThrowError(/nearest legal K is 96/);
  });
});

/** Adversarial rows: as one matrix, and where blocks span rows also one by one, so that one row does not hide another. */
async function expectEqual(format: Format, dtype: FloatType, options: RuleOptions = {}): Promise<void> {
  const rows = adversarialRows(format.element, K, dtype, 1);
  const spans = format.rule.kind === "nf4" || format.scales.some((level) => level.block[0] !== 1);
  const compare = async (name: string, data: Float32Array) => {
    const shape = [data.length / K, K] as const;
    const expected = quantizeTensor(data, shape, dtype, format, options);
    const found = differences(await quantizeOnGpu(gpu, format, data, shape, { ...options, dtype }), expected);
    expect(found, name).toEqual([]);
  };
  if (spans) {
    for (const [name, row] of Object.entries(rows)) await compare(name, stack([row, row.slice().reverse()]));
  }
  const tame = Object.entries(rows).filter(([name]) => !spans || !/infinit|NaN|huge|largest|magnitudes/.test(name));
  await compare("all rows", stack(tame.map(([, row]) => row)));
}
