import { describe, expect, test } from "vitest";
import { f32Bits } from "../../src/core/dtype.js";
import { assembleTensor } from "../../src/formats/assemble.js";
import { decode, decodeTable, encode, encoder, floatFields, maxValue } from "../../src/formats/codec.js";
import {
  bitsPerElement,
  type Codec,
  codecBits,
  codecName,
  defineFormat,
  type Format,
  formatKey,
  withRule,
  withScale,
} from "../../src/formats/format.js";
import {
  cropMatrix,
  fromBlocked,
  packFpx,
  packGemlite,
  packNibbles,
  packShards,
  packTiles4d,
  padMatrix,
  signExtend,
  toBlocked,
  transpose,
  unpackFpx,
  unpackGemlite,
  unpackNibbles,
  unpackShards,
  unpackTiles4d,
} from "../../src/formats/layouts.js";
import { packFlat, packRows, readCode, rowWords, unpackFlat, unpackRows, writeCode } from "../../src/formats/pack.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import { dequantize, elementCodes, scaleValues, tensorWords } from "../../src/formats/tensor.js";

const formats = Object.values(FORMATS);
/** Every codec of the table, by name. */
const codecs = new Map<string, Codec>();
for (const codec of Object.values(CODECS)) codecs.set(codecName(codec), codec);
for (const { element, scales, zero } of formats) {
  for (const codec of [
    element,
    ...scales.map((level) => level.codec),
    ...(zero.domain === "none" ? [] : [zero.codec]),
  ]) {
    codecs.set(`${codecName(codec)}${codec.kind === "float" ? codec.specials : ""}`, codec);
  }
}
const small = [...codecs].filter(
  ([, codec]) => codecBits(codec) <= 16 && !(codec.kind === "lut" && codec.entries === "learned"),
);
const random = (length: number, bits: number) =>
  Uint32Array.from({ length }, (_, i) => (Math.imul(i + 1, 2654435761) >>> 0) % 2 ** bits);

// Loops over all codes collect what is wrong: an assertion for each would take minutes.
describe("codecs", () => {
  test.each(small)("%s: encode(decode(c)) is c for every code", (_name, codec) => {
    const wrong: number[] = [];
    for (const [code, value] of decodeTable(codec).entries()) {
      const back = encode(codec, value);
      if (back === code) continue;
      // NaN has many codes; a table may hold a value twice.
      const same = Object.is(decode(codec, back), value);
      if (!same || !(Number.isNaN(value) || codec.kind === "lut")) wrong.push(code);
    }
    expect(wrong).toEqual([]);
  });

  test.each(small)("%s: encoding is monotone", (_name, codec) => {
    const encodeValue = encoder(codec);
    const finite = [...decodeTable(codec)].filter((value) => Number.isFinite(value)).sort((a, b) => a - b);
    const [least, most] = [finite[0] as number, finite.at(-1) as number];
    let previous = Number.NEGATIVE_INFINITY;
    const wrong: number[] = [];
    for (let i = 0; i <= 4000; i++) {
      const value = Math.fround(least + ((most - least) * i) / 4000);
      const decoded = decode(codec, encodeValue(value));
      if (!(decoded >= previous)) wrong.push(value);
      previous = decoded;
    }
    expect(wrong).toEqual([]);
  });

  const rounding = small.filter(([, codec]) => codec.kind === "float" || codec.kind === "int");
  test.each(rounding)("%s: encoding is to nearest, ties to even", (_name, codec) => {
    const finite = [...new Set(decodeTable(codec))].filter((value) => Number.isFinite(value)).sort((a, b) => a - b);
    const wrong: string[] = [];
    for (let i = 0; i + 1 < finite.length && i < 5000; i++) {
      const [low, high] = [finite[i] as number, finite[i + 1] as number];
      const middle = low + (high - low) / 2;
      if (Math.fround(middle) !== middle) continue;
      const codes = [encode(codec, low), encode(codec, high)];
      const even = codes.find((c) => c % 2 === 0 && decode(codec, c) !== 0) ?? encode(codec, 0);
      if (Math.abs(decode(codec, encode(codec, middle))) !== Math.abs(decode(codec, even))) wrong.push(`tie ${middle}`);
      if (decode(codec, encode(codec, nextDown(middle))) !== low) wrong.push(`just below ${middle}`);
      if (decode(codec, encode(codec, -nextDown(-middle))) !== high) wrong.push(`just above ${middle}`);
    }
    expect(wrong).toEqual([]);
  });

  test("overflow, infinity and NaN follow the codec's specials", () => {
    expect(encode(CODECS.e4m3, 1e9)).toBe(0x7e);
    expect(encode(CODECS.e4m3, Number.NEGATIVE_INFINITY)).toBe(0xfe);
    expect(encode(CODECS.e5m2, 61440)).toBe(0x7c);
    expect(encode(CODECS.e5m2, Math.fround(61439.9))).toBe(0x7b);
    expect(encode(CODECS.e2m1, 1e9)).toBe(7);
    expect(encode(CODECS.e2m1, -1e-30)).toBe(8);
    expect(decode(CODECS.e4m3, encode(CODECS.e4m3, Number.NaN))).toBeNaN();
    expect(decode(CODECS.e5m2, encode(CODECS.e5m2, Number.NaN))).toBeNaN();
    expect(encode(CODECS.f16, 65520)).toBe(0x7c00);
    expect(encode(CODECS.f16, 65519)).toBe(0x7bff);
    expect(encode(CODECS.bf16, 3.4e38)).toBe(0x7f80);
    expect(encode(CODECS.int8, Number.NaN)).toBe(0);
    expect(encode(CODECS.int8, -1e9)).toBe(0x80);
  });

  test("e8m0 is 2^(code - 127): no zero, no sign, 255 is NaN, ties go up", () => {
    expect(decode(CODECS.e8m0, 0)).toBe(2 ** -127);
    expect(decode(CODECS.e8m0, 254)).toBe(2 ** 127);
    expect(encode(CODECS.e8m0, 0)).toBe(0);
    expect(encode(CODECS.e8m0, 1.5)).toBe(128);
    expect(encode(CODECS.e8m0, Math.fround(1.4999))).toBe(127);
    expect(encode(CODECS.e8m0, 2 ** -127)).toBe(0);
    expect(encode(CODECS.e8m0, 1.5 * 2 ** -127)).toBe(1);
    expect(encode(CODECS.e8m0, Number.POSITIVE_INFINITY)).toBe(255);
    expect(encode(CODECS.e8m0, 3e38)).toBe(254);
  });

  test("float fields of e4m3", () => {
    expect(floatFields(CODECS.e4m3 as Extract<Codec, { kind: "float" }>)).toMatchObject({
      signShift: 7,
      maxFinite: 0x7e,
      nan: 0x7f,
      quantum: 2 ** -9,
    });
    expect(maxValue(CODECS.e4m3)).toBe(448);
    expect(maxValue(CODECS.e5m2)).toBe(57344);
    expect(maxValue(CODECS.e3m2)).toBe(28);
    expect(maxValue(CODECS.uint8)).toBe(255);
  });
});

describe("packing", () => {
  test.each(Array.from({ length: 32 }, (_, i) => i + 1))("%i bits: rows and runs come back", (bits) => {
    for (const columns of [1, 7, 32, 37]) {
      const codes = random(3 * columns, bits);
      const words = packRows(codes, 3, columns, bits);
      expect(words.length).toBe(3 * rowWords(columns, bits));
      expect(unpackRows(words, 3, columns, bits)).toEqual(codes);
      const flat = packFlat(codes, bits);
      expect(unpackFlat(flat, codes.length, bits)).toEqual(codes);
      expect(Array.from(codes, (_, i) => readCode(flat, 0, i, bits))).toEqual([...codes]);
      const written = new Uint32Array(flat.length);
      for (const [i, code] of codes.entries()) writeCode(written, 0, i, bits, code);
      expect(written).toEqual(flat);
    }
  });

  test("32 codes of b bits are b words, least significant first", () => {
    expect([...packRows([1, 2, 3, 4, 5, 6, 7, 8], 1, 8, 4)]).toEqual([0x87654321, 0, 0, 0]);
    expect([...packRows([0b101, 0b010, 0b111], 1, 3, 3)]).toEqual([0b111010101, 0, 0, 0]);
  });
});

describe("layouts of other libraries are undone by their inverse", () => {
  test("nibbles, tiles, shards, gemlite, fpx, swizzled scales", () => {
    const codes = random(128 * 128, 4);
    for (const low of ["first", "second"] as const)
      expect([...unpackNibbles(packNibbles(codes, low), low)]).toEqual([...codes]);
    expect([...unpackTiles4d(packTiles4d(codes, 128, 128), 128, 128)]).toEqual([...codes]);
    for (const width of [8, 16, 32] as const) {
      expect([...unpackGemlite(packGemlite(codes, 128, 128, width), 128, 128, width)]).toEqual([...codes]);
    }
    for (const bits of [1, 2, 3, 4, 5, 6, 7]) {
      const some = random(64 * 128, bits);
      expect([...unpackShards(packShards(some, 64, 128, bits), 64, 128, bits)]).toEqual([...some]);
      expect([...unpackFpx(packFpx(some, 64, 128, bits), 64, 128, bits)]).toEqual([...some]);
    }
    for (const [rows, columns] of [
      [1, 1],
      [130, 5],
      [256, 8],
    ] as const) {
      const bytes = random(rows * columns, 8);
      expect([...fromBlocked(toBlocked(bytes, rows, columns), rows, columns)]).toEqual([...bytes]);
    }
  });

  test("matrices", () => {
    expect([...transpose(Uint8Array.of(1, 2, 3, 4, 5, 6), 2, 3)]).toEqual([1, 4, 2, 5, 3, 6]);
    const padded = padMatrix([1, 2, 3, 4], [2, 2], [3, 4], 9);
    expect([...padded]).toEqual([1, 2, 9, 9, 3, 4, 9, 9, 9, 9, 9, 9]);
    expect([...cropMatrix(padded, [2, 2], 4)]).toEqual([1, 2, 3, 4]);
    expect([...signExtend([0, 7, 8, 15], 4)]).toEqual([0, 7, -8, -1]);
  });

  test("a size that cannot be packed names the nearest that can", () => {
    expect(() => packTiles4d([], 4, 128)).toThrow(/N = 4 is not a multiple of its block 8; nearest legal N is 8/);
    expect(() => packFpx([], 64, 65, 6)).toThrow(/nearest legal K is 128/);
    expect(() => packShards([], 1, 12, 3)).toThrow(/K = 12/);
  });
});

describe("rows", () => {
  const row = { element: CODECS.int8, rule: { kind: "cast" }, source: "test" } as const;

  test.each(formats.map((format) => [format.name, format] as const))("%s is complete", (_name, format) => {
    expect(format.source).not.toBe("");
    expect(Object.isFrozen(format)).toBe(true);
    const shape = [256, 512] as const;
    const words = tensorWords(format, shape);
    const bits = bitsPerElement(format, shape);
    expect(bits).toBeGreaterThan(0);
    expect((words.qdata + words.zero + words.scales.reduce((a, b) => a + b, 0)) * 32).toBeGreaterThanOrEqual(
      Math.floor(bits * shape[0] * shape[1]),
    );
    expect(
      format.blocks.length === 0 || format.blocks.some((block) => block.join() === format.scales[0]?.block.join()),
    ).toBe(true);
  });

  test("keys tell apart what means something else or is made otherwise", () => {
    const keys = new Set(formats.map(formatKey));
    expect(keys.size).toBe(formats.length);
    const other = withScale(FORMATS.int8, { block: ["all", "all"] });
    expect(formatKey(other)).not.toBe(formatKey(FORMATS.int8));
    expect(formatKey(withRule(FORMATS.mxfp4, "floor", { rule: { kind: "mx", mode: "floor" } }))).toBe(
      "mxfp4~floor[1x32:e8m0]",
    );
  });

  test.each([
    ["a code of 33 bits", { ...row, element: { kind: "int", bits: 33, signed: true } }],
    ["a table of the wrong size", { ...row, element: { kind: "lut", bits: 2, entries: [0, 1], vector: [1, 1] } }],
    ["a scale of 4 bits", { ...row, scales: [{ codec: CODECS.e2m1, block: [1, 4] }] }],
    ["an empty block", { ...row, scales: [{ codec: CODECS.f32, block: [1, 0] }] }],
    ["a zero point without a scale", { ...row, zero: { domain: "int", codec: CODECS.int8 } }],
    ["an empty code range", { ...row, rule: { kind: "affine", mapping: "symmetric", min: 1, max: 1, eps: 1 } }],
    [
      "no exponent",
      { ...row, element: { kind: "float", exponent: 0, mantissa: 3, bias: 0, signed: true, specials: "none" } },
    ],
    [
      "a bias beyond float32",
      { ...row, element: { kind: "float", exponent: 4, mantissa: 3, bias: 200, signed: true, specials: "none" } },
    ],
    [
      "a number beyond float32",
      {
        ...row,
        element: { kind: "float", exponent: 8, mantissa: 2, bias: 127, signed: true, specials: "none" },
      },
    ],
  ] as const)("%s is refused", (_what, bad) => {
    expect(() => defineFormat("bad", bad as Parameters<typeof defineFormat>[1])).toThrow(
      expect.objectContaining({ code: "format/invalid-row" }),
    );
  });
});

describe("tensors", () => {
  test("a value is (code - zero) * scale, or (code - mid) * scale + zero", () => {
    const scale = [f32Bits(0.5)];
    const integer: Format = withScale(FORMATS.int8_asymmetric, {});
    const a = assembleTensor(integer, [1, 2], { elements: [3, 0xff], scales: [scale], zero: [1] });
    expect([...dequantize(a)]).toEqual([1, -1]);
    const float = withScale(FORMATS.int4_tinygemm, { block: [1, 2], codec: CODECS.f32, zero: CODECS.f32 });
    const b = assembleTensor(float, [1, 2], { elements: [8, 10], scales: [scale], zero: [f32Bits(3)] });
    expect([...dequantize(b)]).toEqual([3, 4]);
  });

  test("levels multiply, tables hold patches, rows can be read alone", () => {
    const two = assembleTensor(FORMATS.nvfp4, [2, 16], {
      elements: new Array(32).fill(2),
      scales: [[0x38, 0x40], [f32Bits(0.25)]],
    });
    expect([...dequantize(two)].slice(15, 17)).toEqual([0.25, 0.5]);
    expect([...dequantize(two, [1, 2])].slice(0, 2)).toEqual([0.5, 0.5]);
    const element: Codec = { kind: "lut", bits: 1, entries: "learned", vector: [2, 2] };
    const patches = defineFormat("patches", {
      ...FORMATS.codebook4,
      element,
      scales: [{ codec: CODECS.f32, block: [1, "all"] }],
    });
    const table = Float32Array.of(1, 2, 3, 4, 5, 6, 7, 8);
    const tensor = assembleTensor(patches, [2, 4], { elements: [0, 1], scales: [[f32Bits(1), f32Bits(10)]], table });
    expect([...dequantize(tensor)]).toEqual([1, 2, 5, 6, 30, 40, 70, 80]);
    expect([...elementCodes(tensor)]).toEqual([0, 1]);
    expect([...scaleValues(tensor, 0)]).toEqual([1, 10]);
  });

  test("codes of the wrong count are refused", () => {
    expect(() => assembleTensor(FORMATS.int8, [1, 4], { elements: [1], scales: [[0]] })).toThrow(
      expect.objectContaining({ code: "shape/mismatch" }),
    );
    expect(() => assembleTensor(FORMATS.int8, [8, 4], { elements: new Array(32).fill(0), scales: [[0]] })).toThrow(
      expect.objectContaining({ code: "shape/mismatch" }),
    );
  });
});

/** The float32 just below a value. */
function nextDown(value: number): number {
  const bits = f32Bits(value);
  if (value === 0) return -(2 ** -149);
  const next = value > 0 ? bits - 1 : bits + 1;
  return new Float32Array(Uint32Array.of(next).buffer)[0] as number;
}
