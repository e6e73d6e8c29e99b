import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  checkSettings,
  packSettings,
  pcg,
  type SampleSettings,
  sampleToken,
  uniform,
  unpackSettings,
} from "../../src/ir/sample.js";

const base: SampleSettings = { temperature: 1, topK: 0, topP: 1, seed: 0, step: 0 };
const pick = (logits: readonly number[], settings: Partial<SampleSettings> = {}) =>
  sampleToken(Float32Array.from(logits), { ...base, ...settings });

const u32 = fc.integer({ min: 0, max: 0xffffffff });
const logits = fc
  .array(fc.oneof(fc.float({ noNaN: true, min: -30, max: 30 }), fc.integer({ min: -2, max: 2 })), {
    minLength: 1,
    maxLength: 40,
  })
  .map((values) => Float32Array.from(values));
const settings = fc.record({
  temperature: fc.oneof(fc.constant(0), fc.double({ min: 0.05, max: 5, noNaN: true })),
  topK: fc.nat(45),
  topP: fc.double({ min: 0.01, max: 1, noNaN: true }),
  seed: u32,
  step: u32,
});

const sum = (values: Iterable<number>) => [...values].reduce((a, b) => a + b, 0);

/** The kept set as the law states it: one sentence for each token, nothing sorted or accumulated. */
function keptByLaw(values: Float32Array, { temperature, topK, topP }: SampleSettings) {
  const top = Math.max(...values);
  const weight = [...values].map((value) => Math.exp(Math.fround(Math.fround(value - top) / temperature)));
  const likelier = (than: number) => weight.filter((w) => w > than);
  const inTopK = weight.map((w) => topK === 0 || likelier(w).length < topK);
  const survivors = weight.filter((_, id) => inTopK[id]);
  const kept = weight.map((w, id) => {
    const above = sum(survivors.filter((other) => other > w));
    return {
      in: inTopK[id] === true && above < topP * sum(survivors),
      margin: Math.abs(above / sum(survivors) - topP),
    };
  });
  return { weight, kept };
}

/** How often each id is drawn over consecutive steps, as frequencies. */
function frequencies(values: readonly number[], draws: number, chosen: Partial<SampleSettings>): number[] {
  const counts = values.map(() => 0);
  for (let step = 0; step < draws; step++) {
    const { id } = pick(values, { ...chosen, step });
    counts[id] = (counts[id] as number) + 1;
  }
  return counts.map((count) => count / draws);
}

const softmax = (values: readonly number[], temperature = 1) => {
  const weights = values.map((value) => Math.exp(value / temperature));
  return weights.map((weight) => weight / sum(weights));
};

describe("the random numbers", () => {
  test("the hash is PCG-RXS-M-XS-32 over u32, checked with exact integers", () => {
    const mask = 0xffffffffn;
    fc.assert(
      fc.property(u32, (input) => {
        const state = (BigInt(input) * 747796405n + 2891336453n) & mask;
        const word = (((state >> ((state >> 28n) + 4n)) ^ state) * 277803737n) & mask;
        expect(pcg(input)).toBe(Number((word >> 22n) ^ word));
      }),
      { numRuns: 2000 },
    );
  });

  test("known values: a port must give these", () => {
    expect([0, 1, 2, 0xffffffff].map(pcg)).toEqual([129708002, 2831084092, 2055130248, 3861530882]);
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
      const chiSquared = sum(counts.map((count) => (count - n / 256) ** 2 / (n / 256)));
      // 255 degrees of freedom: mean 255, standard deviation 22.6; five of them either way.
      expect(Math.abs(chiSquared - 255)).toBeLessThan(5 * 22.6);
      expect(Math.abs((correlation / n) * 12)).toBeLessThan(5 / Math.sqrt(n));
    }
  });
});

describe("sampling", () => {
  test("temperature 0 takes the largest logit, the lowest id among equals, whatever the rest says", () => {
    expect(pick([1, 3, 3, 2], { temperature: 0 }).id).toBe(1);
    expect(pick([-0, 0], { temperature: 0 }).id).toBe(0);
    fc.assert(
      fc.property(logits, settings, (values, chosen) => {
        const { id } = sampleToken(values, { ...chosen, temperature: 0 });
        expect(id).toBe(values.indexOf(Math.max(...values)));
      }),
    );
  });

  test("topK = 1, or a tiny topP, draws among the largest logits only", () => {
    fc.assert(
      fc.property(logits, settings, (values, chosen) => {
        const top = Math.max(...values);
        // A temperature at which distinct float32 logits keep distinct weights.
        const cold = { ...chosen, temperature: 0.01 };
        expect(values[sampleToken(values, { ...cold, topK: 1 }).id]).toBeCloseTo(top, 10);
        expect(values[sampleToken(values, { ...cold, topK: 0, topP: 1e-9 }).id]).toBeCloseTo(top, 10);
      }),
    );
  });

  test("what is drawn is kept: in the top k, ties included, and in the nucleus of those, ties included", () => {
    fc.assert(
      fc.property(logits, settings, (values, chosen) => {
        fc.pre(chosen.temperature > 0);
        const { kept } = keptByLaw(values, chosen);
        const drawn = kept[sampleToken(values, chosen).id];
        // A sum taken in another order may decide otherwise only where it touches the limit.
        expect(drawn?.in || (drawn?.margin ?? 1) < 1e-12).toBe(true);
      }),
      { numRuns: 2000 },
    );
  });

  test("the draw is the inverse of the cumulative distribution in order of id: no sort is needed", () => {
    fc.assert(
      fc.property(logits, settings, (values, chosen) => {
        fc.pre(chosen.temperature > 0);
        const { weight, kept } = keptByLaw(values, chosen);
        fc.pre(kept.every(({ margin }) => margin > 1e-9 || chosen.topP === 1));
        const masses = weight.map((w, id) => (kept[id]?.in ? w : 0));
        const target = uniform(chosen.seed, chosen.step) * sum(masses);
        const { id } = sampleToken(values, chosen);
        const below = sum(masses.slice(0, id));
        const slack = 1e-12 * sum(masses);
        expect(below - slack <= target && target <= below + (masses[id] as number) + slack).toBe(true);
      }),
      { numRuns: 2000 },
    );
  });

  const values = [0.5, 2, -1, 1, 2];
  const laws: [law: string, settings: Partial<SampleSettings>, expected: number[]][] = [
    ["softmax of the logits", {}, softmax(values)],
    ["softmax of logits / temperature", { temperature: 0.5 }, softmax(values, 0.5)],
    ["topK renormalized, both of two equals kept", { topK: 1 }, [0, 0.5, 0, 0, 0.5]],
    ["the three largest", { topK: 3 }, softmax([Number.NEGATIVE_INFINITY, 2, Number.NEGATIVE_INFINITY, 1, 2])],
    ["the nucleus", { topP: 0.7 }, [0, 0.5, 0, 0, 0.5]],
    ["a nucleus that splits equals keeps both", { topP: 0.1 }, [0, 0.5, 0, 0, 0.5]],
    ["topP counted after topK", { topK: 3, topP: 0.8 }, [0, 0.5, 0, 0, 0.5]],
  ];
  for (const [law, chosen, expected] of laws)
    test(`frequencies over 20,000 steps follow ${law}`, () => {
      const got = frequencies(values, 20_000, { ...chosen, seed: 11 });
      for (const [id, p] of expected.entries()) {
        expect(Math.abs((got[id] as number) - p)).toBeLessThan(0.018);
        if (p === 0) expect(got[id]).toBe(0);
      }
    });

  test("logprob is of the plain softmax of the raw logits, whatever was filtered", () => {
    fc.assert(
      fc.property(logits, settings, (raw, chosen) => {
        const { id, logprob } = sampleToken(raw, chosen);
        const max = Math.max(...raw);
        const expected = (raw[id] as number) - max - Math.log(raw.reduce((total, v) => total + Math.exp(v - max), 0));
        expect(logprob).toBeCloseTo(expected, 10);
        expect(logprob).toBeLessThanOrEqual(0);
      }),
    );
  });

  test("is a function of its arguments: the same again, and the logits are not touched", () => {
    fc.assert(
      fc.property(logits, settings, (raw, chosen) => {
        const copy = raw.slice();
        expect(sampleToken(raw, chosen)).toEqual(sampleToken(copy, chosen));
        expect(raw).toEqual(copy);
      }),
    );
  });

  test("adding a constant to every logit, exactly, changes nothing", () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: -8, max: 8 }), { minLength: 1, maxLength: 20 }),
        settings,
        (raw, chosen) => {
          const moved = raw.map((value) => value + 1024);
          expect(pick(moved, chosen)).toEqual(pick(raw, chosen));
        },
      ),
    );
  });

  test("on the edge between two tokens, and at 0, the draw belongs to the interval that starts there", () => {
    const [zero, half] = [4666037, 36176455];
    expect([uniform(0, zero), uniform(0, half)]).toEqual([0, 0.5]);
    expect([pick([1, 1], { step: zero }).id, pick([1, 1], { step: half }).id]).toEqual([0, 1]);
  });

  test("an excluded token (-Infinity) is never drawn, huge and tiny scales do not overflow", () => {
    const masked = [Number.NEGATIVE_INFINITY, 0, Number.NEGATIVE_INFINITY, 0, Number.NEGATIVE_INFINITY];
    expect(frequencies(masked, 500, { temperature: 3 }).filter((p) => p > 0)).toHaveLength(2);
    expect(pick([3e38, -3e38], { temperature: 1e-300 })).toEqual({ id: 0, logprob: 0 });
    expect(pick([-3e38, -3e38 + 1e37], { temperature: 1e300 }).logprob).toBeTypeOf("number");
    expect(pick([5], { step: 0xffffffff })).toEqual({ id: 0, logprob: 0 });
  });

  test("a vocabulary of 128,000 takes well under a second", () => {
    const big = Float32Array.from({ length: 128_000 }, (_, i) => uniform(1, i) * 20);
    const start = performance.now();
    sampleToken(big, { ...base, topK: 50, topP: 0.9 });
    sampleToken(big, base);
    expect(performance.now() - start).toBeLessThan(2000);
  });
});

describe("settings", () => {
  const float32 = (value: number) => Math.fround(value);

  test("survive being packed into five words, rounded once to float32", () => {
    fc.assert(
      fc.property(settings, (chosen) => {
        const words = packSettings(chosen);
        expect(words).toHaveLength(5);
        const expected = { ...chosen, temperature: float32(chosen.temperature), topP: float32(chosen.topP) };
        expect(unpackSettings(words)).toEqual(expected);
        expect(packSettings(unpackSettings(words))).toEqual(words);
      }),
    );
  });

  test("inside their ranges are accepted", () => {
    fc.assert(fc.property(settings, (chosen) => checkSettings(chosen)));
  });

  const refused: [name: keyof SampleSettings, values: number[]][] = [
    ["temperature", [-0.1, Number.NaN, Number.POSITIVE_INFINITY]],
    ["topK", [-1, 1.5, Number.NaN, 2 ** 32]],
    ["topP", [0, -1, 1.01, Number.NaN]],
    ["seed", [-1, 0.5, 2 ** 32]],
    ["step", [-1, 0.5, 2 ** 32]],
  ];
  for (const [name, numbers] of refused)
    test.each(numbers)(`${name} = %s is refused by name`, (value) => {
      const invalid = expect.objectContaining({ code: "argument/invalid", context: expect.objectContaining({ name }) });
      expect(() => checkSettings({ ...base, [name]: value })).toThrowError(invalid);
    });
});
