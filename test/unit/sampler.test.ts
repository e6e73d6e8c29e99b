import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { pcgHash, type SampleOptions, sample, uniform } from "../../src/text/sampler.js";

const base: SampleOptions = { temperature: 1, topK: 0, topP: 1, seed: 0, step: 0 };
const pick = (logits: readonly number[], options: Partial<SampleOptions> = {}) =>
  sample(Float32Array.from(logits), { ...base, ...options });

const u32 = fc.integer({ min: 0, max: 0xffffffff });
const logits = fc
  .array(fc.float({ noNaN: true, noDefaultInfinity: true, min: -30, max: 30 }), { minLength: 1, maxLength: 40 })
  .map((values) => Float32Array.from(values));
const options = fc.record({
  temperature: fc.oneof(fc.constant(0), fc.double({ min: 0.05, max: 5, noNaN: true })),
  topK: fc.nat(45),
  topP: fc.double({ min: 0.01, max: 1, noNaN: true }),
  seed: u32,
  step: u32,
});

/** How often each id is drawn over consecutive steps, as frequencies. */
function frequencies(values: readonly number[], draws: number, settings: Partial<SampleOptions>): number[] {
  const counts = values.map(() => 0);
  for (let step = 0; step < draws; step++) {
    const { id } = pick(values, { ...settings, step });
    counts[id] = (counts[id] as number) + 1;
  }
  return counts.map((count) => count / draws);
}

const softmax = (values: readonly number[], temperature = 1) => {
  const weights = values.map((value) => Math.exp(value / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
};

describe("the random numbers", () => {
  test("the hash is PCG-RXS-M-XS-32 over u32, checked with exact integers", () => {
    const mask = 0xffffffffn;
    fc.assert(
      fc.property(u32, (input) => {
        const state = (BigInt(input) * 747796405n + 2891336453n) & mask;
        const word = (((state >> ((state >> 28n) + 4n)) ^ state) * 277803737n) & mask;
        expect(pcgHash(input)).toBe(Number((word >> 22n) ^ word));
      }),
      { numRuns: 2000 },
    );
  });

  test("known values: a port must give these", () => {
    expect([0, 1, 2, 0xffffffff].map(pcgHash)).toEqual([129708002, 2831084092, 2055130248, 3861530882]);
    const uniforms = [uniform(0, 0), uniform(0, 1), uniform(42, 7), uniform(0xffffffff, 0xffffffff)];
    expect(uniforms.map((u) => u * 2 ** 24)).toEqual([3194371, 6185729, 14044408, 331257]);
  });

  test("a uniform number is a multiple of 2^-24 in [0, 1), exact in float32", () => {
    fc.assert(
      fc.property(u32, u32, (seed, step) => {
        const u = uniform(seed, step);
        expect(u >= 0 && u < 1 && Number.isInteger(u * 2 ** 24) && Math.fround(u) === u).toBe(true);
      }),
    );
  });

  test("steps of one seed, and seeds of one step, are uniform and uncorrelated", () => {
    const n = 65536;
    for (const at of [(i: number) => uniform(7, i), (i: number) => uniform(i, 7), (i: number) => uniform(i, i)]) {
      const counts = new Array<number>(256).fill(0);
      let correlation = 0;
      for (let i = 0; i < n; i++) {
        const u = at(i);
        const bin = Math.floor(u * 256);
        counts[bin] = (counts[bin] as number) + 1;
        correlation += (u - 0.5) * (at(i + 1) - 0.5);
      }
      const chiSquared = counts.reduce((sum, count) => sum + (count - n / 256) ** 2 / (n / 256), 0);
      // 255 degrees of freedom: mean 255, standard deviation 22.6; five of them either way.
      expect(Math.abs(chiSquared - 255)).toBeLessThan(5 * 22.6);
      expect(Math.abs((correlation / n) * 12)).toBeLessThan(5 / Math.sqrt(n));
    }
  });
});

describe("sampling", () => {
  test("temperature 0 takes the largest logit, the lowest index among equals, whatever the rest says", () => {
    expect(pick([1, 3, 3, 2], { temperature: 0 }).id).toBe(1);
    expect(pick([-0, 0], { temperature: 0 }).id).toBe(0);
    fc.assert(
      fc.property(logits, options, (values, settings) => {
        const { id } = sample(values, { ...settings, temperature: 0 });
        expect(id).toBe(values.indexOf(Math.max(...values)));
      }),
    );
  });

  test("topK = 1, or a tiny topP, is temperature 0", () => {
    fc.assert(
      fc.property(logits, options, (values, settings) => {
        const greedy = sample(values, { ...settings, temperature: 0 });
        expect(sample(values, { ...settings, topK: 1 })).toEqual(greedy);
        expect(sample(values, { ...settings, topP: 1e-9 })).toEqual(greedy);
      }),
    );
  });

  test("the drawn token is the inverse CDF in descending order, recomputed plainly", () => {
    fc.assert(
      fc.property(logits, options, (values, settings) => {
        fc.pre(settings.temperature > 0);
        const order = [...values.keys()].sort((a, b) => (values[b] as number) - (values[a] as number) || a - b);
        const top = order.slice(0, settings.topK || undefined);
        const p = softmax(
          top.map((id) => (values[id] as number) - (values[order[0] as number] as number)),
          settings.temperature,
        );
        const sums = p.map((_, rank) => p.slice(0, rank + 1).reduce((a, b) => a + b));
        const kept = sums.findIndex((sum) => sum >= settings.topP - 1e-12);
        const nucleus = p.slice(0, kept < 0 ? p.length : kept + 1);
        const total = nucleus.reduce((a, b) => a + b, 0);
        const target = uniform(settings.seed, settings.step) * total;
        const { id } = sample(values, settings);
        const rank = top.indexOf(id);
        expect(rank).toBeGreaterThanOrEqual(0);
        const below = p.slice(0, rank).reduce((a, b) => a + b, 0);
        expect(below - 1e-9 <= target && target <= below + (p[rank] as number) + 1e-9).toBe(true);
        expect(rank).toBeLessThan(nucleus.length);
      }),
      { numRuns: 2000 },
    );
  });

  const values = [0.5, 2, -1, 1, 2];
  const laws: [law: string, settings: Partial<SampleOptions>, expected: number[]][] = [
    ["softmax of the logits", {}, softmax(values)],
    ["softmax of logits / temperature", { temperature: 0.5 }, softmax(values, 0.5)],
    ["topK renormalized, the lower index kept among equals", { topK: 1 }, [0, 1, 0, 0, 0]],
    ["the three largest", { topK: 3 }, softmax([Number.NEGATIVE_INFINITY, 2, Number.NEGATIVE_INFINITY, 1, 2])],
    ["the nucleus", { topP: 0.7 }, [0, 0.5, 0, 0, 0.5]],
    ["topP counted after topK", { topK: 3, topP: 0.8 }, [0, 0.5, 0, 0, 0.5]],
  ];
  for (const [law, settings, expected] of laws)
    test(`frequencies over 20,000 steps follow ${law}`, () => {
      const got = frequencies(values, 20_000, { ...settings, seed: 11 });
      for (const [id, p] of expected.entries()) {
        expect(Math.abs((got[id] as number) - p)).toBeLessThan(0.018);
        if (p === 0) expect(got[id]).toBe(0);
      }
    });

  test("logprob is of the plain softmax of the raw logits, whatever was filtered", () => {
    fc.assert(
      fc.property(logits, options, (raw, settings) => {
        const { id, logprob } = sample(raw, settings);
        const max = Math.max(...raw);
        const expected = (raw[id] as number) - max - Math.log(raw.reduce((sum, v) => sum + Math.exp(v - max), 0));
        expect(logprob).toBeCloseTo(expected, 10);
        expect(logprob).toBeLessThanOrEqual(0);
      }),
    );
  });

  test("is a function of its arguments: the same again, and the logits are not touched", () => {
    fc.assert(
      fc.property(logits, options, (raw, settings) => {
        const copy = raw.slice();
        expect(sample(raw, settings)).toEqual(sample(copy, settings));
        expect(raw).toEqual(copy);
      }),
    );
  });

  test("on the edge between two tokens, and at 0, the draw belongs to the interval that starts there", () => {
    const [zero, half] = [4666037, 36176455];
    expect([uniform(0, zero), uniform(0, half)]).toEqual([0, 0.5]);
    expect([pick([1, 1], { step: zero }).id, pick([1, 1], { step: half }).id]).toEqual([0, 1]);
  });

  test("an excluded token (-Infinity) is never drawn, huge and tiny scales do not overflow", () => {
    const masked = [Number.NEGATIVE_INFINITY, 0, Number.NEGATIVE_INFINITY, 0];
    expect(frequencies(masked, 500, { temperature: 3 }).filter((p) => p > 0)).toHaveLength(2);
    expect(pick([3e38, -3e38], { temperature: 1e-300 })).toEqual({ id: 0, logprob: 0 });
    expect(pick([-3e38, -3e38 + 1e37], { temperature: 1e300 }).logprob).toBeTypeOf("number");
    expect(pick([5], { step: 0xffffffff })).toEqual({ id: 0, logprob: 0 });
  });

  test("a vocabulary of 128,000 takes well under a second", () => {
    const big = Float32Array.from({ length: 128_000 }, (_, i) => uniform(1, i) * 20);
    const start = performance.now();
    sample(big, { ...base, topK: 50, topP: 0.9 });
    sample(big, base);
    expect(performance.now() - start).toBeLessThan(2000);
  });
});

describe("arguments outside their ranges are refused", () => {
  const cases: [name: string, settings: Partial<SampleOptions>][] = [
    ...[-0.1, Number.NaN, Number.POSITIVE_INFINITY].map((v): [string, Partial<SampleOptions>] => [
      "temperature",
      { temperature: v },
    ]),
    ...[-1, 1.5, Number.NaN].map((v): [string, Partial<SampleOptions>] => ["topK", { topK: v }]),
    ...[0, -1, 1.01, Number.NaN].map((v): [string, Partial<SampleOptions>] => ["topP", { topP: v }]),
    ...[-1, 0.5, 2 ** 32].map((v): [string, Partial<SampleOptions>] => ["seed", { seed: v }]),
    ...[-1, 0.5, 2 ** 32].map((v): [string, Partial<SampleOptions>] => ["step", { step: v }]),
  ];
  for (const [name, settings] of cases)
    test(`${name} = ${Object.values(settings)[0]}`, () => {
      const invalid = expect.objectContaining({ code: "argument/invalid", context: expect.objectContaining({ name }) });
      expect(() => pick([1, 2], settings)).toThrowError(invalid);
    });

  test("logits without a softmax", () => {
    const inf = Number.POSITIVE_INFINITY;
    for (const bad of [[], [1, Number.NaN], [1, inf], [-inf, -inf]])
      for (const temperature of [0, 1])
        expect(() => pick(bad, { temperature })).toThrowError(expect.objectContaining({ code: "argument/invalid" }));
  });
});
