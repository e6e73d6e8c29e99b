import { describe, expect, test } from "vitest";
import { withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, GraphBuilder, stored } from "../../src/ir/graph.js";
import { float8DynamicActivationFloat8Weight } from "../../src/quantize/configs.js";
import { perBlock, perRow } from "../../src/quantize/granularity.js";
import { shortSumBound } from "../../src/validate/bounds-short.js";
import { normals, random } from "../../src/validate/cases-random.js";

/** A model of the tensor core that truncates most: all terms of 32 products, and the sum so far, lose what is below 2^-13 of the largest. */
function truncatedSum(terms: Float64Array): number {
  let sum = 0;
  for (let begin = 0; begin < terms.length; begin += 32) {
    const all = [sum, ...terms.subarray(begin, begin + 32)];
    const largest = all.reduce((most, term) => Math.max(most, Math.abs(term)), 0);
    if (largest === 0) continue;
    const unit = 2 ** (Math.floor(Math.log2(largest)) - 13);
    sum = all.reduce((total, term) => total + Math.trunc(term / unit) * unit, 0);
  }
  return sum;
}

const kinds = {
  normal: (x: number) => x,
  positive: (x: number) => Math.abs(x),
  outlier: (x: number, i: number) => (i === 17 ? 1000 : x),
  cancelling: (x: number, i: number) => x + (i < 512 ? 4 : -4),
} as const;

describe("short sums", () => {
  test.each(Object.entries(kinds))("a sum truncated at every step is inside the bound: %s", (_, kind) => {
    for (let seed = 1; seed <= 20; seed++) {
      const terms = Float64Array.from(normals(random(seed), 1024), kind);
      const exact = terms.reduce((sum, term) => sum + term, 0);
      const bound = shortSumBound((j) => terms[j] as number, terms.length);
      expect(Math.abs(truncatedSum(terms) - exact)).toBeLessThanOrEqual(bound);
    }
  });

  test("the bound is far below the sum of one step's products, so that most sums which miss a step are outside", () => {
    for (let seed = 1; seed <= 20; seed++) {
      const terms = Float64Array.from(normals(random(seed), 1024));
      const bound = shortSumBound((j) => terms[j] as number, terms.length);
      // The standard deviation of the sum of one step's 32 products.
      expect(bound).toBeLessThan(Math.sqrt(32) / 2);
    }
  });

  test("only float8 operands whose scales are constant along K may declare it", () => {
    const row = withScale(FORMATS.float8_e4m3, { block: [1, "all"] });
    const build = (x: typeof row | null, weight: typeof row) => {
      const g = new GraphBuilder({ T: 4 });
      const type = x === null ? dense("f32", ["T", 128]) : stored(x, ["T", 128]);
      return g.one("linear", [g.input("x", type), g.weight("w", stored(weight, [16, 128]))], { fastAccum: true });
    };
    expect(() => build(row, row)).not.toThrow();
    const refused = expect.objectContaining({ code: "graph/invalid" });
    const blocks = withScale(FORMATS.float8_e4m3, { block: [1, 64] });
    for (const [x, weight] of [
      [null, row],
      [FORMATS.bf16, row],
      [row, FORMATS.int8],
      [blocks, row],
    ] as const)
      expect(() => build(x, weight)).toThrow(refused);
  });

  test("torchao's default: short sums but for blocks, where they are refused", () => {
    expect(float8DynamicActivationFloat8Weight({ granularity: perRow() }).fastAccum).toBe(true);
    expect(float8DynamicActivationFloat8Weight({ useFastAccum: false }).fastAccum).toBe(false);
    const granularity = [perBlock([1, 128]), perBlock([128, 128])] as const;
    expect(float8DynamicActivationFloat8Weight({ granularity }).fastAccum).toBe(false);
    expect(() => float8DynamicActivationFloat8Weight({ granularity, useFastAccum: true })).toThrow(/useFastAccum/);
  });
});
