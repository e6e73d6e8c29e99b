import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { ConstantSource, Source } from "../../src/backends/native/kernel.js";
import { Arguments, type RuleOptions, ruleObstacle } from "../../src/backends/native/kernels/general-arguments.js";
import { layoutWords, storedLayout, tensorFromWords } from "../../src/backends/stored-layout.js";
import { type FloatType, f32FromBits } from "../../src/core/dtype.js";
import { decode } from "../../src/formats/codec.js";
import {
  type Block,
  blockGrid,
  codecBits,
  codecVector,
  extentOf,
  type Format,
  formatKey,
  type Rule,
  withRule,
  withScale,
} from "../../src/formats/format.js";
import { packFlat, packRows } from "../../src/formats/pack.js";
import { CODECS, FORMATS, VARIANTS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor } from "../../src/formats/tensor.js";
import { dequantizeTo } from "../../src/quantize/dequantize.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { adversarialRows, stack } from "../support/adversarial.js";
import { randomWords } from "../support/codecs.js";
import { differences } from "../support/quantized.js";

const run = promisify(execFile);

/**
 * Runs the kernels' device functions on the host, over a list of jobs: each is counts, arguments, buffers and a result. What a
 * launch spreads over threads is a loop here.
 */
const PROGRAM = /* cpp */ `
#include <algorithm>
#include <cstdio>
#include <vector>
#include "descriptor.hpp"
using namespace fewbit::general;

static std::vector<u32> quantize(Args& args, const float* x) {
  const i64 rows = args.next(), k = args.next(), words = args.next(), stride = args.next();
  const i64 height = args.next(), width = args.next();
  const i64 scaleAt = args.next(), outerAt = args.next(), zeroAt = args.next();
  const bool scaled = args.flag();
  const Rule rule = args.rule();
  const float* given = args.buffer<const float>();
  const float* givenZero = args.buffer<const float>();
  std::vector<u32> out(words, 0u);
  const i64 columns = k / width, bands = (rows + height - 1) / height;
  std::vector<float> outer(rows, 1.0f);
  if (rule.outerKind != 0) {
    const i64 tall = rule.outerKind == 1 ? rows : 1;
    for (i64 row = 0; row < rows; row += tall) {
      u32 low = 0xffffffffu, high = 0u;
      for (i64 i = row * k; i < (row + tall) * k; i++) low = std::min(low, lowKey(x[i])), high = std::max(high, highKey(x[i]));
      const u32 code = rule.outerCode(fromOrderKey(low), fromOrderKey(high));
      storeCode(out.data() + outerAt, row / tall, rule.outer.bits, code);
      for (i64 i = row; i < row + tall; i++) outer[i] = rule.outer.decode(code);
    }
  }
  std::vector<Chosen> chosen(bands * columns);
  for (i64 block = 0; scaled && block < bands * columns; block++) {
    u32 low = 0xffffffffu, high = 0u;
    const i64 top = block / columns * height;
    for (i64 row = top; row < std::min(top + height, rows); row++)
      for (i64 i = block % columns * width; i < (block % columns + 1) * width; i++) {
        const float value = rule.prepare(x[row * k + i], outer[row]);
        low = std::min(low, lowKey(value)), high = std::max(high, highKey(value));
      }
    chosen[block] = rule.choose(fromOrderKey(low), fromOrderKey(high), outer[top], given == nullptr ? nullptr : given + block,
                                givenZero == nullptr ? nullptr : givenZero + block);
    storeCode(out.data() + scaleAt, block, rule.scale.bits, chosen[block].scale);
    if (rule.zeroKind != ZeroKind::none) storeCode(out.data() + zeroAt, block, rule.zero.bits, chosen[block].zero);
  }
  for (i64 row = 0; row < rows; row++)
    for (i64 i = 0; i < k; i++) {
      const Chosen& c = chosen[row / height * columns + i / width];
      const u32 code = rule.codeOf(rule.prepare(x[row * k + i], outer[row]), c.a, c.b);
      const i64 bit = i * rule.element.bits;
      u32* at = out.data() + row * stride + bit / 32;
      at[0] |= code << (bit % 32);
      if (bit % 32 + rule.element.bits > 32) at[1] |= code >> (32 - bit % 32);
    }
  if (rule.scalers > 0) {
    u32* scales = out.data() + scaleAt;
    double sum = 0.0;
    for (const Chosen& c : chosen) sum += bitcast<float>(c.scale);
    const float mean = rule.rnd(static_cast<float>(sum / static_cast<double>(std::max<size_t>(chosen.size(), 1))));
    for (size_t begin = 0; begin < chosen.size(); begin += rule.scalers) {
      const size_t end = std::min(begin + rule.scalers, chosen.size());
      u32 largest = 0u;
      for (size_t i = begin; i < end; i++) largest = std::max(largest, highKey(fabsf(rule.scalerOffset(bitcast<float>(scales[i]), mean))));
      const float factor = rule.scalerFactor(fromOrderKey(largest));
      for (size_t i = begin; i < end; i++) scales[i] = bitcast<u32>(rule.scaler(bitcast<float>(scales[i]), mean, factor));
    }
  }
  return out;
}

static std::vector<u32> dequantize(Args& args) {
  const i64 rows = args.next();
  const Type type = static_cast<Type>(args.next());
  const Stored stored = args.stored();
  std::vector<u32> out;
  for (i64 row = 0; row < rows; row++)
    for (int i = 0; i < stored.k; i++) out.push_back(bitcast<u32>(stored.rounded(row, i, type)));
  return out;
}

int main(int, char** argv) {
  std::FILE* in = std::fopen(argv[1], "rb");
  std::FILE* to = std::fopen(argv[2], "wb");
  const auto number = [&] {
    i64 value = 0;
    if (std::fread(&value, 8, 1, in) != 1) value = -1;
    return value;
  };
  for (i64 kind = number(); kind >= 0; kind = number()) {
    std::vector<i64> args(number());
    for (auto& value : args) value = number();
    std::vector<std::vector<u32>> data(number());
    std::vector<void*> buffers;
    for (auto& words : data) {
      words.resize(number());
      if (std::fread(words.data(), 4, words.size(), in) != words.size()) return 1;
      buffers.push_back(words.data());
    }
    Args reader(args.data(), buffers.data());
    const std::vector<u32> out = kind == 0 ? quantize(reader, reinterpret_cast<const float*>(data.back().data())) : dequantize(reader);
    std::fwrite(out.data(), 4, out.size(), to);
  }
  std::fclose(to);
  return 0;
}
`;

interface Job {
  readonly kind: 0 | 1;
  readonly args: Arguments;
  /** The words of each binding, and of x for quantizing. */
  readonly buffers: readonly Uint32Array[];
  readonly words: number;
}

const isConstant = (source: Source): source is ConstantSource => source.kind === "constant";
const wordsOf = (data: ArrayBufferView) => new Uint32Array(data.buffer, data.byteOffset, data.byteLength / 4);

interface Given {
  readonly scale: Float32Array;
  readonly zero?: Float32Array;
}

function quantizeJob(
  format: Format,
  data: Float32Array,
  [rows, k]: readonly [number, number],
  options: RuleOptions,
  given?: Given,
): Job {
  const layout = storedLayout(format, [rows, k]);
  const block = format.scales[0]?.block ?? ([1, "all"] as const);
  const parameters = [given?.scale, given?.zero];
  const source = (id: 0 | 1) => (parameters[id] === undefined ? undefined : ({ kind: "value", id } as const));
  const args = new Arguments()
    .int(rows, k, layout.words, layout.rowStride)
    .int(Math.max(extentOf(block[0], rows), 1), Math.max(extentOf(block[1], k), 1))
    .int(layout.scales[0] ?? 0, layout.scales[1] ?? 0, layout.zero, format.scales.length > 0)
    .rule(format, options)
    .buffer(source(0))
    .buffer(source(1));
  const buffers = args.bindings.map((bound) =>
    wordsOf(isConstant(bound) ? bound.data() : (parameters[(bound as { id: number }).id] as Float32Array)),
  );
  return { kind: 0, args, buffers: [...buffers, wordsOf(data)], words: layout.words };
}

function dequantizeJob(tensor: QuantizedTensor, dtype: FloatType): Job {
  const { layout, words } = layoutWords(tensor);
  const [rows, k] = tensor.shape;
  const args = new Arguments()
    .int(rows, ["f32", "f16", "bf16"].indexOf(dtype))
    .stored(layout, { kind: "value", id: 0 });
  const buffers = args.bindings.map((source) => (isConstant(source) ? wordsOf(source.data()) : words));
  return { kind: 1, args, buffers, words: rows * k };
}

const compiler = await run("g++", ["--version"]).then(
  () => "g++",
  () => null,
);

/** Node alone must do for the tests, so a missing compiler is an absence by name; CI is expected to have one. */
test("a C++ compiler: g++ is there, or its absence is named and this is not CI", () => {
  if (compiler === null) console.warn("absent: g++, so the native kernels' functions are not compiled by this run");
  expect(compiler !== null || process.env.CI === undefined).toBe(true);
});

const K = 256;
const table = Object.values(FORMATS);
const onDevice = table.filter((format) => ruleObstacle(format) === null);
const named = (formats: readonly Format[]) => [...new Map(formats.map((format) => [formatKey(format), format]))];

describe.runIf(compiler !== null)("device functions of the native kernels on the host", () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "fewbit-general-"));
    await writeFile(join(folder, "main.cpp"), PROGRAM);
    const flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"];
    const checks = ["-fsanitize=undefined", "-fno-sanitize-recover"];
    const include = resolve("native/kernels/general");
    await run("g++", [...flags, ...checks, `-I${include}`, "main.cpp", "-o", "main"], { cwd: folder });
  }, 120_000);
  afterAll(() => rm(folder, { recursive: true, force: true }));

  async function results(jobs: readonly Job[]): Promise<Uint32Array[]> {
    const parts = jobs.flatMap(({ kind, args, buffers }) => [
      BigInt64Array.from([kind, args.args.length, ...args.args, buffers.length].map(BigInt)),
      ...buffers.flatMap((words) => [BigInt64Array.of(BigInt(words.length)), words]),
    ]);
    const [from, to] = [join(folder, `${Math.random()}.in`), join(folder, `${Math.random()}.out`)];
    await writeFile(
      from,
      Buffer.concat(parts.map((part) => new Uint8Array(part.buffer, part.byteOffset, part.byteLength))),
    );
    await run(join(folder, "main"), [from, to]);
    const bytes = await readFile(to);
    const all = new Uint32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    let at = 0;
    return jobs.map(({ words }) => {
      at += words;
      return all.subarray(at - words, at);
    });
  }

  /** Adversarial rows: as one matrix, and where blocks span rows also one by one, so that one row does not hide another. */
  async function expectEqual(format: Format, options: RuleOptions = {}): Promise<void> {
    const dtype = options.dtype ?? "f32";
    const rows = adversarialRows(format.element, K, dtype, 1);
    const spans = format.rule.kind === "nf4" || format.scales.some((level) => level.block[0] !== 1);
    const tame = Object.entries(rows).filter(([name]) => !spans || !/infinit|NaN|huge|largest|magnitudes/.test(name));
    const sets: (readonly [string, Float32Array])[] = [["all rows", stack(tame.map(([, row]) => row))]];
    if (spans) for (const [name, row] of Object.entries(rows)) sets.push([name, stack([row, row.slice().reverse()])]);
    const shapes = sets.map(([, data]) => [data.length / K, K] as const);
    const jobs = sets.map(([, data], i) => quantizeJob(format, data, shapes[i] as (typeof shapes)[number], options));
    for (const [i, words] of (await results(jobs)).entries()) {
      const [name, data] = sets[i] as (typeof sets)[number];
      const shape = shapes[i] as (typeof shapes)[number];
      const got = tensorFromWords(storedLayout(format, shape), words, shape[0]);
      expect(differences(got, quantizeTensor(data, shape, dtype, format, options)), name).toEqual([]);
    }
  }

  describe.each(named(onDevice))("the rule of %s", (_, format) => {
    test.each(["f32", "bf16", "f16"] as const)("from %s", (dtype) => expectEqual(format, { dtype }));
    test("as torchao literally does", () => expectEqual(format, { numerics: "torchao" }));
  });

  test.each(named(onDevice.flatMap((format) => format.blocks.map((block) => withScale(format, { block })))))(
    "the rule of %s",
    (_, format) => expectEqual(format),
  );

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
      block(FORMATS.uint3, 2, 64),
      block(FORMATS.int8_asymmetric, "all", 32),
      block(FORMATS.int5_asymmetric, 1, 16),
    ];
    test.each(named(formats))("%s", async (_, format) => {
      await expectEqual(format);
      await expectEqual(format, { dtype: "bf16", numerics: "torchao" });
    });
    test("nvfp4 with the per-tensor scale of a calibration", () => expectEqual(nvfp4, { perTensorScale: 0.0021 }));
    test("scales nearest to a power of two in log2: on both sides of sqrt(2)", async () => {
      const element = { kind: "float", exponent: 3, mantissa: 0, bias: 3, signed: true, specials: "none" } as const;
      const format = withRule(float8_e4m3, "e3m0", {
        element,
        rule: { kind: "amax", floor: 0, round: "before", power: true },
      });
      const bits = [0x3fb504f2, 0x3fb504f3, 0x3fb504f4, 0x00004f3, 0x005a8279, 0x005a827a, 1, 2, 3];
      const shape = [bits.length, 1] as const;
      const data = Float32Array.from(bits, f32FromBits);
      const [words] = await results([quantizeJob(format, data, shape, {})]);
      const got = tensorFromWords(storedLayout(format, shape), words as Uint32Array, bits.length);
      expect(differences(got, quantizeTensor(data, shape, "f32", format))).toEqual([]);
    });
  });

  test.each(named(onDevice.filter(({ rule, scales }) => scales.length === 1 && rule.kind !== "nf4")))(
    "the rule of %s with scales and zero points that are given",
    async (_, format) => {
      const rows = adversarialRows(format.element, K, "f32", 1);
      const data = stack(Object.values(rows));
      const shape = [data.length / K, K] as const;
      const blocks = blockGrid((format.scales[0] as { block: Block }).block, shape).reduce((a, b) => a * b, 1);
      // Ordinary ones, ones that no reciprocal or type of scales holds, and zero points beyond the range of their codec.
      const list = (from: readonly number[]) =>
        Float32Array.from({ length: blocks }, (_, i) => from[(i * 5) % from.length] as number);
      const scale = list([0.013, 1, 3.5e-5, 2 ** -149, 1e-30, 6e-8, 3e38, 700]);
      const zero = list([0, 3, -2, 7, 127.4, 1e9, -300, 0.5, 11]);
      const given = format.zero.domain === "none" ? { scale } : { scale, zero };
      const [words] = await results([quantizeJob(format, data, shape, {}, given)]);
      const got = tensorFromWords(storedLayout(format, shape), words as Uint32Array, shape[0]);
      expect(differences(got, quantizeTensor(data, shape, "f32", format, { given }))).toEqual([]);
    },
  );

  const others = [
    withScale(FORMATS.float8_e4m3, { block: ["all", "all"] }),
    withScale(FORMATS.float8_e5m2, { block: [128, 128] }),
    withScale(FORMATS.int4_plain, { codec: CODECS.f32, zero: CODECS.f32 }),
    withScale(FORMATS.uint3, { block: [1, 32] }),
  ];
  test.each(named([...table, ...others]))("reads every code of %s under any scale", async (_, format) => {
    const tensor = randomTensor(format, [256, 512], 7);
    const types = ["f32", "f16", "bf16"] as const;
    const read = await results(types.map((dtype) => dequantizeJob(tensor, dtype)));
    for (const [i, dtype] of types.entries()) {
      const got = new Float32Array((read[i] as Uint32Array).slice().buffer);
      const expected = dequantizeTo(tensor, dtype);
      const wrong = [...expected.keys()].filter((at) => !Object.is(got[at], expected[at]) && got[at] !== expected[at]);
      expect(
        wrong.slice(0, 5).map((at) => [at, got[at], expected[at]]),
        dtype,
      ).toEqual([]);
    }
    // A product has one rounding, so it is the exact value's nearest number.
    if (format.zero.domain === "none") {
      const exact = Float32Array.from(dequantize(tensor));
      const got = new Float32Array((read[0] as Uint32Array).slice().buffer);
      expect([...exact.keys()].filter((at) => !Object.is(got[at], exact[at]) && got[at] !== exact[at])).toEqual([]);
    }
  });
});

/** All codes in every row, scales of all sizes (a few of them special). */
function randomTensor(format: Format, shape: readonly [number, number], seed: number): QuantizedTensor {
  const next = randomWords(seed);
  const [rows, k] = shape;
  const [patchRows, patchK] = codecVector(format.element);
  const bits = codecBits(format.element);
  const count = (rows / patchRows) * (k / patchK);
  const codes = Array.from({ length: count }, (_, i) => (bits === 32 ? next() : (i + (next() & 1)) % 2 ** bits));
  const blocks = (block: Block | undefined, width: number, code: () => number) =>
    packFlat(
      Array.from({ length: block === undefined ? 0 : blockGrid(block, shape).reduce((a, b) => a * b, 1) }, code),
      width,
    );
  const scales = format.scales.map(({ block, codec }) =>
    blocks(block, codecBits(codec), () => next() >>> (32 - codecBits(codec))),
  );
  const { zero, element } = format;
  const qdata = packRows(codes, rows / patchRows, k / patchK, bits);
  const learned =
    element.kind === "lut" && element.entries === "learned"
      ? {
          table: Float32Array.from(
            { length: 2 ** element.bits * patchRows * patchK },
            () => (next() / 2 ** 31 - 1) * 3,
          ),
        }
      : {};
  if (zero.domain === "none") return { format, shape, qdata, scales, ...learned };
  const finite = () => {
    const code = next() >>> (32 - codecBits(zero.codec));
    return Number.isFinite(decode(zero.codec, code)) ? code : 0;
  };
  const zeros = blocks(format.scales[0]?.block, codecBits(zero.codec), finite);
  return { format, shape, qdata, scales, zero: zeros, ...learned };
}
