import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { LONG } from "../../src/backends/webgpu/kernels/scalers.js";
import { EXACT } from "../../src/backends/webgpu/wgsl/exact.js";
import { f32Bits, f32FromBits, roundEven, roundTo } from "../../src/core/dtype.js";
import { float32Samples, randomWords, sameNumber } from "../support/codecs.js";
import { mapWords, openTestGpu, type TestGpu } from "../support/gpu.js";
import { SEED } from "../support/seed.js";

let gpu: TestGpu;
beforeAll(async () => {
  gpu = await openTestGpu();
});
afterAll(() => gpu?.destroy());

/** float64 has more than twice the bits of float32, so rounding its result once more is the correctly rounded result. */
const BINARY: Readonly<Record<string, (a: number, b: number) => number>> = {
  exact_mul: (a, b) => Math.fround(a * b),
  exact_div: (a, b) => Math.fround(a / b),
  exact_add: (a, b) => Math.fround(a + b),
  exact_sub: (a, b) => Math.fround(a - b),
};
const UNARY: Readonly<Record<string, (a: number) => number>> = {
  // IEEE keeps the sign of a zero result.
  exact_round_even: (a) => roundEven(a) || (a < 0 || Object.is(a, -0) ? -0 : roundEven(a)),
  exact_bf16: (a) => roundTo("bf16", a),
  exact_f16: (a) => roundTo("f16", a),
};

describe(`exact float32 arithmetic in WGSL, seed ${SEED}`, () => {
  test.each(Object.entries(BINARY))("%s of special and random numbers", async (name, reference) => {
    const special = [0, 1, 0x7fffff, 0x800000, 0x800001, 0xffffff, 0x3f800000, 0x3f7fffff, 0x3f800001, 0x3fc00000];
    special.push(0x4b000000, 0x4b7fffff, 0x7f000000, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0x33800000, 0x33800001);
    const signed = special.flatMap((bits) => [bits, (bits | 0x80000000) >>> 0]);
    const a = signed.flatMap((bits) => signed.map(() => bits));
    const b = signed.flatMap(() => signed);
    const next = randomWords(SEED);
    for (let i = 0; i < 60_000; i++) {
      const first = next();
      a.push(first);
      // Half of the partners are of a similar size: far apart, a sum is one of its operands and a product overflows.
      b.push(i % 2 === 0 ? next() : (first + (next() % 0x4000000) - 0x2000000) >>> 0);
    }
    await compareBinary(name, reference, Uint32Array.from(a), Uint32Array.from(b));
  });

  test.each(Object.entries(BINARY))("%s near the limits of float32", async (name, reference) => {
    const next = randomWords(SEED + 1);
    // Exponents whose sum or difference lands among the subnormals, at the smallest normal numbers or at overflow.
    const limits = name === "exact_div" ? [-153, -140, -128, -126, 126, 128] : [-151, -140, -128, -126, -125, 127, 128];
    const a: number[] = [];
    const b: number[] = [];
    for (let i = 0; i < 30_000; i++) {
      const exponent = (next() % 250) - 124;
      const partner = (limits[i % limits.length] as number) - (name === "exact_div" ? -exponent : exponent);
      const [x, y] = name === "exact_div" ? [partner - 2 * exponent, -exponent] : [exponent, partner];
      const bits = (power: number) => ((next() & 0x807fffff) | (Math.min(Math.max(power + 127, 0), 254) << 23)) >>> 0;
      a.push(bits(x));
      b.push(bits(y));
    }
    await compareBinary(name, reference, Uint32Array.from(a), Uint32Array.from(b));
  });

  test.each(Object.entries(BINARY))("%s of what fast-check finds", async (name, reference) => {
    const float = fc.float().map((value) => f32Bits(value));
    const pairs = fc.array(fc.tuple(float, float), { minLength: 64, maxLength: 256 });
    await fc.assert(
      fc.asyncProperty(pairs, (list) =>
        compareBinary(
          name,
          reference,
          Uint32Array.from(list, ([x]) => x),
          Uint32Array.from(list, ([, y]) => y),
        ),
      ),
      { numRuns: 20, seed: SEED },
    );
  });

  test.each(Object.entries(UNARY))("%s", async (name, reference) => {
    const samples = [...float32Samples(60_000)];
    // Halves and their neighbours, and the ties of bf16 and f16.
    for (let i = 0; i < 4096; i++) {
      for (const step of [-1, 0, 1]) {
        samples.push(f32Bits(i + 0.5) + step, (f32Bits(-i - 0.5) + step) >>> 0, ((i << 20) | 0x8000) + step);
        samples.push(f32Bits((i + 0.5) * 2 ** -24) + step, ((0x38000000 + (i << 14)) | 0x1000) + step);
      }
    }
    const input = Uint32Array.from(samples);
    const got = await mapWords(gpu, EXACT, name, input);
    report(
      [...input.keys()],
      got,
      (i) => reference(f32FromBits(input[i] as number)),
      (i) => [f32FromBits(input[i] as number)],
    );
  });

  test("order, clamping and keys", async () => {
    const next = randomWords(SEED + 2);
    const near = Uint32Array.from({ length: 3000 }, () => ((next() & 0x80000000) | (0x3f800000 + (next() % 5))) >>> 0);
    const a = Uint32Array.from([...float32Samples(0), ...near]);
    const b = Uint32Array.from(a, (_, i) => a[(i * 7919) % a.length] as number);
    const number = (list: Uint32Array, i: number) => f32FromBits(list[i] as number);
    const wrap = `${EXACT}
fn less(a: u32, b: u32) -> u32 { return select(0u, 1u, exact_less(a, b)); }
fn clamp1(a: u32) -> u32 { return exact_clamp(a, ${f32Bits(-1)}u, ${f32Bits(1)}u); }
fn there_and_back(a: u32) -> u32 { return exact_from_key(exact_key(a)); }`;
    const less = await mapWords(gpu, wrap, "less", a, b);
    expect([...less.keys()].filter((i) => (less[i] === 1) !== number(a, i) < number(b, i))).toEqual([]);
    const clamped = await mapWords(gpu, wrap, "clamp1", a);
    report(
      [...a.keys()],
      clamped,
      (i) => Math.min(Math.max(number(a, i), -1), 1),
      (i) => [number(a, i)],
    );
    expect(await mapWords(gpu, wrap, "there_and_back", a)).toEqual(a);
  });
});

describe(`float64 sums and means in WGSL, seed ${SEED}`, () => {
  const wrap = `${EXACT}${LONG}
fn sum(a: u32, b: u32, c: u32) -> Long { return long_add(long_add(long_of(a), long_of(b)), long_of(c)); }
fn sum_high(a: u32, b: u32, c: u32) -> u32 { return sum(a, b, c).high; }
fn sum_low(a: u32, b: u32, c: u32) -> u32 { return sum(a, b, c).low; }
fn sum_exponent(a: u32, b: u32, c: u32) -> u32 { return u32(sum(a, b, c).exponent + 1000); }
fn mean(a: u32, b: u32, c: u32, count: u32) -> u32 { return long_mean(sum(a, b, c), count); }`;
  const next = randomWords(SEED + 3);
  // Positive numbers whose exponents are up to 70 apart, some of them whole powers of two, and zeros.
  const positive = () => {
    const mantissa = next() % 4 === 0 ? 0 : next() & 0x7fffff;
    return next() % 16 === 0 ? 0 : ((90 + (next() % 70)) << 23) | mantissa;
  };
  // Sums and quotients whose rounding carries through every bit, then random ones.
  const ones = 2 ** 24 - 1;
  const directed = Array.from({ length: 64 }, (_, i) => {
    const [base, count] = i % 2 === 0 ? [2 ** (i - 20), 1] : [1, 2 ** 20 + 1];
    const [a, b, c] = i % 2 === 0 ? [(ones - i) * 2 ** 48, ones * 2 ** 24, ones] : [2 ** 52, ones * 2 ** 8, 255];
    return [...[a, b, c].map((part) => f32Bits(part * base)), count] as const;
  });
  const random = Array.from({ length: 20_000 }, (_, i) => {
    const count = i % 3 === 0 ? 1 + (i % 50) : 1 + (next() >>> (1 + (next() % 31)));
    return [positive(), positive(), positive(), count] as const;
  });
  const rows = [...directed, ...random];
  const columns = [0, 1, 2, 3].map((column) => Uint32Array.from(rows, (row) => row[column] as number));
  const [first, second, third, counts] = columns as [Uint32Array, Uint32Array, Uint32Array, Uint32Array];
  const value = (column: number, i: number) => f32FromBits((columns[column] as Uint32Array)[i] as number);

  test("sums", async () => {
    const high = await mapWords(gpu, wrap, "sum_high", first, second, third);
    const low = await mapWords(gpu, wrap, "sum_low", first, second, third);
    const exponent = await mapWords(gpu, wrap, "sum_exponent", first, second, third);
    const got = (i: number) => {
      const significand = (high[i] as number) * 2 ** 32 + (low[i] as number);
      return significand === 0 ? 0 : significand * 2 ** ((exponent[i] as number) - 1000 - 127 - 62);
    };
    const wrong = [...high.keys()].filter((i) => got(i) !== value(0, i) + value(1, i) + value(2, i));
    expect(wrong.slice(0, 5).map((i) => [value(0, i), value(1, i), value(2, i), got(i)])).toEqual([]);
  });

  test("means", async () => {
    const got = await mapWords(gpu, wrap, "mean", first, second, third, counts);
    const sum = (i: number) => value(0, i) + value(1, i) + value(2, i);
    const mean = (i: number) => Math.fround(sum(i) / (counts[i] as number));
    report([...counts.keys()], got, mean, (i) => [value(0, i), value(1, i), value(2, i), counts[i] as number]);
  });
});

async function compareBinary(
  name: string,
  reference: (a: number, b: number) => number,
  a: Uint32Array,
  b: Uint32Array,
): Promise<void> {
  const got = await mapWords(gpu, EXACT, name, a, b);
  const operands = (i: number): [number, number] => [f32FromBits(a[i] as number), f32FromBits(b[i] as number)];
  report([...a.keys()], got, (i) => reference(...operands(i)), operands);
}

function report(
  indices: number[],
  got: Uint32Array,
  expected: (i: number) => number,
  operands: (i: number) => number[],
): void {
  const wrong = indices.filter((i) => !sameNumber(got[i] as number, f32Bits(expected(i))));
  expect(
    wrong
      .slice(0, 5)
      .map((i) => ({ operands: operands(i), expected: expected(i), got: f32FromBits(got[i] as number) })),
  ).toEqual([]);
}
