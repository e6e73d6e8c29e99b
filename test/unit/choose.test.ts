import { describe, expect, test } from "vitest";
import { bucketFor, explainPlan, makePlan, type PlanOptions } from "../../src/plan/plan.js";
import type { KernelRow, Requirement } from "../../src/plan/select.js";
import { thrown } from "../support/failure.js";
import { device, kernel, small } from "../support/toy-plan.js";

describe("choosing kernels", () => {
  const never = (reason: string): Requirement => ({ unmet: () => reason });
  const plan = (kernels: readonly KernelRow[], options?: PlanOptions) => makePlan(small(), device(kernels), options);

  test("the plan of a small graph, as text", () => {
    const short: Requirement = { unmet: ({ symbols }) => (symbols.T === 1 ? null : `T must be 1: it is ${symbols.T}`) };
    const kernels = [
      kernel("toy/linear/plain", "linear", 0.1),
      kernel("toy/linear/gemv", "linear", 0.5, [short]),
      kernel("toy/linear/matrix", "linear", 1, [never("the device has no matrix units")]),
    ];
    const notConsidered = [{ id: "cuda/*", reason: "not considered: the native addon is not built" }];
    expect(explainPlan(plan(kernels, { buckets: [{ T: 1 }], notConsidered }))).toBe(
      `bucket T <= 1: 1 steps
linear #0  (linear+activation: linear+unary)  x f32 [T, 64], w int4_tinygemm[1x32:bf16;zfloat:bf16] [32, 64]
  -> toy/linear/gemv               est. 9.70 us, compute-bound
  toy/linear/matrix                no   the device has no matrix units
  toy/linear/plain                 no   slower: estimated 44.5 us against 9.70 us
  cuda/*                           no   not considered: the native addon is not built
bucket T <= 16: 1 steps
linear #0  (linear+activation: linear+unary)  x f32 [T, 64], w int4_tinygemm[1x32:bf16;zfloat:bf16] [32, 64]
  -> toy/linear/plain              est. 697 us, compute-bound
  toy/linear/gemv                  no   T must be 1: it is 16
  toy/linear/matrix                no   the device has no matrix units
  cuda/*                           no   not considered: the native addon is not built
memory: weights 1280 B, state 0 B, activations 2048 B in 1 slots`,
    );
  });

  test("no kernel is an error that says the step and every reason", () => {
    const kernels = [kernel("a", "linear", 1, [never("it is Sunday")]), kernel("b", "linear", 1, [never("it rains")])];
    const error = thrown(() =>
      plan(kernels, { notConsidered: [{ id: "cuda/*", reason: "not considered: no addon" }] }),
    );
    expect(error.code).toBe("plan/no-kernel");
    for (const text of [
      /linear #0.*w int4_tinygemm/,
      /a +no +it is Sunday/,
      /b +no +it rains/,
      /cuda\/\* +no +not considered/,
    ])
      expect(error.message).toMatch(text);
    expect(thrown(() => plan([])).code).toBe("plan/no-kernel");
  });

  test("requirements are asked in order, up to the first that is not met; ranking never admits", () => {
    const asked: string[] = [];
    const ask = (name: string, answer: string | null): Requirement => ({
      unmet: () => {
        asked.push(name);
        return answer;
      },
    });
    const fast = kernel("fast", "linear", 100, [ask("one", null), ask("two", "no"), ask("three", null)]);
    const { buckets } = plan([fast, kernel("slow", "linear", 0.001), kernel("other kind", "sdpa")]);
    expect(asked).toEqual(["one", "two"]);
    expect(buckets[0]?.choices[0]?.explanation).toMatchObject({
      kernel: "slow",
      rejected: [{ id: "fast", reason: "no" }],
    });
  });

  test("an activation larger than the device's buffers is plan/memory", () => {
    const error = thrown(() => makePlan(small(), device([kernel("a", "linear")], 2047)));
    expect(error).toMatchObject({ code: "plan/memory", context: { needed: 2048, limit: 2047 } });
  });

  test("a run takes the first bucket that holds its symbols; outside the largest it is refused", () => {
    const built = plan([kernel("a", "linear")], { buckets: [{ T: 1 }, { T: 4 }] });
    const bucket = (T: number) => bucketFor(built, { T });
    expect([0, 1, 2, 4, 5, 16].map(bucket)).toEqual([0, 0, 1, 1, 2, 2]);
    for (const T of [17, -1, 1.5, Number.NaN]) {
      expect(thrown(() => bucket(T))).toMatchObject({
        code: "argument/invalid",
        context: { name: "symbol T", value: T },
      });
    }
    expect(thrown(() => bucketFor(built, {}))).toMatchObject({ code: "argument/invalid" });
  });
});
