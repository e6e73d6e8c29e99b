import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { adjustLogits, sampleToken } from "../../src/ir/sample.js";
import { failure } from "../support/failure.js";
import { collect, load, PROMPT, reference } from "../support/generate.js";

const logits = fc.float32Array({ min: -30, max: 30, noNaN: true, minLength: 1, maxLength: 40 });
const settings = { topK: 0, topP: 1, seed: 3, step: 1 };

describe("adjusted logits", () => {
  test("of min-p: left out are just those less likely than its share of the likeliest", () => {
    fc.assert(
      fc.property(
        logits,
        fc.double({ min: 0.001, max: 1, noNaN: true }),
        fc.constantFrom(0.5, 1, 2),
        (values, minP, t) => {
          const adjusted = adjustLogits(values, [], { repetitionPenalty: 1, minP }, t);
          const top = Math.max(...values);
          for (const [i, value] of values.entries()) {
            const share = Math.exp((value - top) / t) / minP;
            // Either answer is right within the rounding of a difference and a threshold of at most 60 to float32.
            if (Math.abs(Math.log(share)) * t < 2 ** -18) continue;
            expect(adjusted[i]).toBe(share < 1 ? Number.NEGATIVE_INFINITY : value);
          }
          expect(adjusted[values.indexOf(top)]).toBe(top);
        },
      ),
    );
  });

  test("of a penalty: tokens of the text are less likely than before, by the factor, and others as they were", () => {
    fc.assert(
      fc.property(logits, fc.double({ min: 1, max: 4, noNaN: true }), (values, repetitionPenalty) => {
        const seen = [...values.keys()].filter((i) => i % 2 === 0);
        const adjusted = adjustLogits(values, [...seen, ...seen], { repetitionPenalty, minP: 0 }, 1);
        for (const [i, value] of values.entries()) {
          const factor = value > 0 ? 1 / repetitionPenalty : repetitionPenalty;
          if (i % 2 === 1) expect(adjusted[i]).toBe(value);
          else
            expect(Math.abs((adjusted[i] as number) - value * factor)).toBeLessThanOrEqual(
              Math.abs(value * factor) * 2 ** -23 + 2 ** -149,
            );
        }
      }),
    );
  });

  test("never leave a draw without a token", () => {
    fc.assert(
      fc.property(logits, fc.double({ min: 0, max: 1, noNaN: true }), (values, minP) => {
        const { id } = sampleToken(adjustLogits(values, [], { repetitionPenalty: 1, minP }, 1), {
          temperature: 1,
          ...settings,
        });
        expect(values[id]).toBeGreaterThanOrEqual(Math.max(...values) + Math.log(Math.max(minP, 1e-30)) - 1e-4);
      }),
    );
  });
});

describe("generation with adjusted logits", () => {
  test("draws what the device draws when the settings leave every token in", async () => {
    await using device = await reference();
    using model = await load(device);
    const drawn = { temperature: 1.2, topK: 20, topP: 0.9, seed: 5 };
    // Of 258 tokens none has a logit so far below the top.
    const host = await collect(model, PROMPT, { ...drawn, minP: 1e-30 });
    const own = await collect(model, PROMPT, drawn);
    expect(host.map(({ id }) => id)).toEqual(own.map(({ id }) => id));
    for (const [i, { logprob }] of host.entries()) expect(logprob).toBeCloseTo(own[i]?.logprob as number, 5);
  });

  test("with min-p 1 is greedy, and with a large penalty repeats nothing", async () => {
    await using device = await reference();
    using model = await load(device);
    const greedy = await collect(model, PROMPT);
    expect((await collect(model, PROMPT, { temperature: 2, minP: 1 })).map(({ id }) => id)).toEqual(
      greedy.map(({ id }) => id),
    );
    const fresh = (await collect(model, PROMPT, { repetitionPenalty: 1e6 })).map(({ id }) => id);
    const all = [...new Set(model.tokenizer.encode(PROMPT)), ...fresh];
    expect(new Set(all).size).toBe(all.length);
  });

  test("refuses settings out of range", async () => {
    await using device = await reference();
    using model = await load(device);
    for (const options of [
      { minP: -0.1 },
      { minP: 1.1 },
      { repetitionPenalty: 0 },
      { repetitionPenalty: Number.NaN },
    ]) {
      const error = await failure(collect(model, PROMPT, options));
      expect(error.code).toBe("argument/invalid");
    }
  });
});

test("a stop string ends the text before it and says so", async () => {
  await using device = await reference();
  using model = await load(device);
  const whole = (await collect(model, PROMPT)).map(({ text }) => text).join("");
  const stop = whole.slice(3, 5);
  const stopped = (await collect(model, PROMPT, { stop: [stop] })).map(({ text }) => text).join("");
  expect(stopped).toBe(whole.slice(0, whole.indexOf(stop)));
  expect(model.statistics?.finish).toBe("stop");
  expect((await collect(model, PROMPT, { stop: ["never in it"] })).map(({ text }) => text).join("")).toBe(whole);
  expect(model.statistics?.finish).toBe("length");
});
