import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type FloatType, roundTo } from "../../src/core/dtype.js";
import { decode, decodeTable, encode } from "../../src/formats/codec.js";
import { type Codec, codecBits, formatKey, withScale } from "../../src/formats/format.js";
import { packFlat, packRows, unpackFlat, unpackRows } from "../../src/formats/pack.js";
import { FORMATS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor } from "../../src/formats/tensor.js";
import { joinRows } from "../../src/ir/tensor.js";
import { chooseQParams, dequantizeAffine, quantizeAffine } from "../../src/quantize/affine.js";
import { quantizeRows, quantizeTensor } from "../../src/quantize/quantize.js";

const seed = Number(process.env.FEWBIT_SEED ?? Date.now() % 2 ** 31);
console.log(`fast-check seed ${seed} (FEWBIT_SEED=${seed} repeats this run)`);
const settings = { seed, numRuns: 60 };

const floatCodec: fc.Arbitrary<Codec> = fc
  .record({
    kind: fc.constant("float" as const),
    exponent: fc.integer({ min: 1, max: 7 }),
    mantissa: fc.integer({ min: 0, max: 7 }),
    signed: fc.constant(true),
    specials: fc.constantFrom("ieee" as const, "nan" as const, "none" as const),
  })
  .map((codec) => ({ ...codec, bias: 2 ** (codec.exponent - 1) - 1 }))
  // A codec with no room for a finite number beside its specials means nothing.
  .filter(({ exponent, mantissa, specials }) =>
    specials === "ieee" ? exponent >= 2 && mantissa >= 1 : exponent + mantissa >= 2,
  );

/** Numbers that arithmetic breaks on, beside ordinary ones. */
const hard = fc.oneof(
  { weight: 4, arbitrary: fc.float({ noNaN: true, min: -100, max: 100 }) },
  { weight: 2, arbitrary: fc.float({ noNaN: true, min: Math.fround(-1e30), max: Math.fround(1e30) }) },
  { weight: 1, arbitrary: fc.constantFrom(0, -0, 2 ** -149, -(2 ** -126), 2 ** -127, 0.5, 1.5, 2.5, 448, 464, 61440) },
);
const special = fc.oneof(
  { weight: 8, arbitrary: hard },
  {
    weight: 1,
    arbitrary: fc.constantFrom(Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 3.4028234663852886e38),
  },
);
const same = (a: ArrayLike<number>, b: ArrayLike<number>) =>
  a.length === b.length && Array.prototype.every.call(a, (value, i) => Object.is(value, b[i]));
const parts = (tensor: QuantizedTensor) => [tensor.qdata, ...tensor.scales, tensor.zero ?? [], tensor.table ?? []];

describe("any float codec", () => {
  test("codes survive, encoding is nearest and monotone", () => {
    fc.assert(
      fc.property(floatCodec, fc.array(special, { minLength: 2, maxLength: 20 }), (codec, values) => {
        const table = decodeTable(codec);
        for (let code = 0; code < 2 ** codecBits(codec); code++) {
          const value = table[code] as number;
          if (!Number.isNaN(value) && encode(codec, value) !== code) expect.fail(`code ${code} of ${value} changes`);
        }
        const finite = [...table].filter(Number.isFinite);
        const top = Math.max(...finite);
        const sorted = values
          .filter((value) => !Number.isNaN(value))
          .map(Math.fround)
          .sort((a, b) => a - b);
        let previous = Number.NEGATIVE_INFINITY;
        for (const value of sorted) {
          const got = decode(codec, encode(codec, value));
          expect(got).toBeGreaterThanOrEqual(previous);
          previous = got;
          if (Math.abs(value) > top) continue;
          const nearest = Math.min(...finite.map((candidate) => Math.abs(candidate - value)));
          expect(Math.abs(got - value)).toBe(nearest);
        }
      }),
      settings,
    );
  });
});

test("packing any codes of any width loses nothing", () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 32 }),
      fc.integer({ min: 1, max: 5 }),
      fc.integer({ min: 1, max: 70 }),
      fc.infiniteStream(fc.nat(2 ** 31 - 1)),
      (bits, rows, columns, stream) => {
        const codes = Uint32Array.from(
          { length: rows * columns },
          () => ((stream.next().value as number) * 2 + 1) % 2 ** bits,
        );
        expect(same(unpackRows(packRows(codes, rows, columns, bits), rows, columns, bits), codes)).toBe(true);
        expect(same(unpackFlat(packFlat(codes, bits), codes.length, bits), codes)).toBe(true);
      },
    ),
    settings,
  );
});

const rows = Object.values(FORMATS).flatMap((format) => [
  format,
  ...format.blocks.map((block) => withScale(format, { block })),
]);
const matrix = (values: fc.Arbitrary<number>) => fc.array(values, { minLength: 3 * 256, maxLength: 3 * 256 });

describe("any format", () => {
  test("pieces equal the whole for every number there is, and equal numbers give equal bits", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(...rows),
        fc.constantFrom<FloatType>("f32", "bf16", "f16"),
        matrix(special),
        async (format, dtype, values) => {
          const data = Float32Array.from(values, (value) => roundTo(dtype, value));
          for (const numerics of ["guarded", "torchao"] as const) {
            const whole = quantizeTensor(data, [3, 256], dtype, format, { numerics });
            const source = {
              shape: [3, 256] as const,
              dtype,
              read: (begin: number, end: number) => data.slice(begin * 256, end * 256),
            };
            const tiles = quantizeRows(source, format, { numerics, tileBytes: 1 });
            const pieces = (await joinRows({
              storage: format,
              shape: [3, 256],
              tiles: () => tiles,
            })) as QuantizedTensor;
            expect(
              parts(pieces).every((part, i) => same(part, parts(whole)[i] as ArrayLike<number>)),
              formatKey(format),
            ).toBe(true);
          }
        },
      ),
      settings,
    );
  });

  test("finite numbers of a format's range stay finite", () => {
    // float16 parts overflow, and SINQ's column scales compound without bound over such ranges.
    const wide = rows.filter((format) => !/(^|:)f16/.test(formatKey(format)) && format.rule.kind !== "sinq");
    fc.assert(
      fc.property(fc.constantFrom(...wide), matrix(hard), (format, values) => {
        const tensor = quantizeTensor(Float32Array.from(values), [3, 256], "f32", format);
        expect(
          dequantize(tensor).findIndex((value) => !Number.isFinite(value)),
          formatKey(format),
        ).toBe(-1);
      }),
      settings,
    );
  });
});

test("affine codes are in range and values within a step, for any block of any shape", () => {
  const shapes = fc.constantFrom<[number[], number[]]>(
    [[12], [4]],
    [
      [2, 6],
      [2, 3],
    ],
    [
      [3, 2, 2],
      [3, 1, 2],
    ],
    [
      [2, 3, 2, 1],
      [1, 3, 1, 1],
    ],
  );
  const ranges = fc.constantFrom([-8, 7], [0, 15], [-128, 127], [0, 1], [-2, 1]);
  fc.assert(
    fc.property(
      shapes,
      ranges,
      fc.boolean(),
      fc.array(fc.float({ noNaN: true, min: -50, max: 50 }), { minLength: 12, maxLength: 12 }),
      ([shape, blockSize], [min, max], symmetric, values) => {
        const options = { blockSize, min: min as number, max: max as number };
        const data = Float32Array.from(values);
        const mapping = symmetric && (min as number) < 0 ? "symmetric" : "asymmetric";
        const chosen = chooseQParams(data, shape, { ...options, mapping, dtype: "f32", numerics: "guarded" });
        const codes = quantizeAffine(data, shape, "f32", chosen, options);
        expect(codes.every((code) => code >= options.min && code <= options.max)).toBe(true);
        const back = dequantizeAffine(codes, shape, "f32", chosen, options);
        const largest = Math.max(...chosen.scale);
        for (let i = 0; i < data.length; i++)
          expect(Math.abs((back[i] as number) - (data[i] as number))).toBeLessThanOrEqual(1.01 * largest);
      },
    ),
    settings,
  );
});
