import { describe, expect, test } from "vitest";
import { cudaCapabilities, H100 } from "../../src/backends/native/capabilities.js";
import { BuildContext, type NativeDispatch, type NativeKernel } from "../../src/backends/native/kernel.js";
import { GENERAL_KERNELS } from "../../src/backends/native/kernels/general-table.js";
import { LINEAR_KERNELS } from "../../src/backends/native/kernels/linear-table.js";
import { codecVector, type Format, formatKey, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { scaleGranularity } from "../../src/formats/tensor.js";
import { dense, GraphBuilder, stored } from "../../src/ir/graph.js";
import { makePlan, type Plan } from "../../src/plan/plan.js";
import type { Choice } from "../../src/plan/select.js";
import { BoundStep } from "../../src/plan/step.js";

const hopper = cudaCapabilities(H100, ["cublaslt"]);
const kernels = [...LINEAR_KERNELS, ...GENERAL_KERNELS];
const MIXED = "cuda/linear/mixed";

interface Case {
  readonly weight: Format;
  readonly x?: Format | undefined;
  readonly rows: number;
  readonly n?: number;
  readonly k?: number;
  readonly fastAccum?: boolean;
}

function plan({ weight, x, rows, n = 4096, k = 4096, fastAccum = false }: Case, on = hopper): Plan {
  const g = new GraphBuilder({});
  const input = x === undefined ? g.input("x", dense("f32", [rows, k])) : g.state("x", stored(x, [rows, k]));
  g.output("y", g.one("linear", [input, g.weight("w", stored(weight, [n, k]))], fastAccum ? { fastAccum } : {}, "y"));
  return makePlan(g.build(), { kernels, capabilities: on });
}

const chosen = (made: Plan) => made.buckets[0]?.choices[0] as Choice<NativeKernel>;
const id = (made: Case, on = hopper) => chosen(plan(made, on)).kernel.id;
const refusal = (made: Case, on = hopper) =>
  chosen(plan(made, on)).explanation.rejected.find((row) => row.id === MIXED)?.reason;

/** What follows the operands and the epilogue: promote, unit, fold, separable, parts, and whether there is scratch. */
function rest(made: Case): number[] {
  const program = plan(made);
  const step = new BoundStep(program.graph, program.steps[0] as Plan["steps"][number], {});
  const kernel = LINEAR_KERNELS.find((row) => row.id === MIXED) as NativeKernel;
  const [dispatch] = kernel.build(new BuildContext(step, program.memory, hopper, {}));
  return (dispatch as NativeDispatch).args.slice(-6);
}

function scratchOf(made: Case): number {
  const program = plan(made);
  const step = new BoundStep(program.graph, program.steps[0] as Plan["steps"][number], {});
  return LINEAR_KERNELS.find((row) => row.id === MIXED)?.scratch?.(step, hopper) as number;
}

describe("linears of some tens of rows on CUDA", () => {
  const { bf16, int8, float8_e4m3, int4_tinygemm, int4_symmetric, nvfp4, mxfp4, mxfp8_e4m3 } = FORMATS;
  const g64 = withScale(int4_tinygemm, { block: [1, 64] });

  test("stored weights are decoded where they are multiplied, by 9 to 128 rows of x", () => {
    for (const weight of [g64, int8, float8_e4m3, nvfp4, mxfp4, mxfp8_e4m3])
      for (const x of [bf16, undefined])
        for (const rows of [24, 64, 100]) expect(id({ weight, x, rows }), `${weight.name} ${rows}`).toBe(MIXED);
    expect(refusal({ weight: g64, x: bf16, rows: 8 })).toContain("9 to 128 rows");
    expect(refusal({ weight: g64, x: bf16, rows: 129 })).toContain("9 to 128 rows");
  });

  test("operands that the matrix units multiply as they lie are left to them", () => {
    expect(refusal({ weight: bf16, x: bf16, rows: 64 })).toContain("as they are stored");
    expect(refusal({ weight: int8, x: int8, rows: 64 })).toContain("as they are stored");
    const float8 = { weight: float8_e4m3, x: float8_e4m3, rows: 64 };
    expect(refusal({ ...float8, fastAccum: true })).toContain("as they are stored");
    // Their sums are too short for a linear that does not declare such; without a library nobody else takes bf16.
    expect(id(float8)).toBe(MIXED);
    expect(id({ weight: bf16, x: bf16, rows: 64 }, cudaCapabilities(H100))).toBe(MIXED);
    expect(id({ weight: bf16, rows: 64 })).toBe(MIXED);
  });

  test("only Hopper has its matrix units", () => {
    const ada = cudaCapabilities({ ...H100, name: "NVIDIA L40S", major: 8, minor: 9 }, ["cublaslt"]);
    expect(refusal({ weight: g64, x: bf16, rows: 64 }, ada)).toContain("9.0");
  });

  test("partial sums are promoted where scales change, at the latest after a stage", () => {
    const of = (weight: Format, x?: Format) => rest({ weight, x, rows: 16 }).slice(0, 5);
    expect(of(g64, bf16)).toEqual([1, 2, 0, 1, 1]);
    expect(of(withScale(int4_tinygemm, { block: [1, 256] }), bf16)).toEqual([1, 4, 0, 1, 1]);
    expect(of(mxfp4, bf16)).toEqual([1, 1, 0, 1, 1]);
    expect(of(nvfp4, bf16)).toEqual([0, 4, 1, 1, 1]);
    expect(of(int8, bf16)).toEqual([0, 4, 0, 1, 1]);
    expect(of(int8)).toEqual([0, 4, 0, 0, 3]);
    const rows = withScale(int4_symmetric, { block: [1, "all"] });
    expect(of(rows, int8)).toEqual([2, 4, 0, 1, 1]);
  });

  test("scratch holds the columns of x that every kernel pads them to, for every run of a bucket", () => {
    // As mixed-launch.cuh counts them: 16, 32, 64 or 128 columns a pass, for rarer formats 32 or 128.
    const needed = (rows: number, parts: number, widths: readonly number[], k: number, sums: number) => {
      const passes = Math.ceil(rows / Math.floor(128 / parts));
      const columns = passes === 1 ? rows * parts : 128;
      return (
        passes * Math.ceil(k / 128) * (widths.find((width) => width >= columns) as number) * (256 + sums) + 4 * rows
      );
    };
    for (const [weight, x, parts, sums] of [
      [g64, bf16, 1, 16],
      [g64, undefined, 3, 16],
      [int8, bf16, 1, 0],
      [int8, undefined, 3, 0],
    ] as const)
      for (const rows of [16, 33, 43, 64, 85, 100, 128]) {
        const bytes = scratchOf({ weight, x, rows, k: 4160 });
        for (let run = 1; run <= rows; run++)
          for (const widths of [
            [16, 32, 64, 128],
            [32, 128],
          ])
            expect(needed(run, parts, widths, 4160, sums), `${weight.name} ${rows} ${run}`).toBeLessThanOrEqual(bytes);
      }
  });

  test("every format is taken or refused with a reason in words", () => {
    const K = 1024;
    const formats = Object.values(FORMATS).flatMap((format) => [
      format,
      ...format.blocks
        .filter(([, size]) => size === "all" || K % size === 0)
        .map((block) => withScale(format, { block })),
    ]);
    for (const weight of formats) {
      if (codecVector(weight.element)[0] !== 1 || K % scaleGranularity(weight, K) !== 0) continue;
      for (const x of [undefined, bf16, int8, float8_e4m3]) {
        const made = { weight, x, rows: 64, n: 512, k: K };
        const reason = refusal(made);
        if (id(made) !== MIXED) expect(reason, formatKey(weight)).toMatch(/ /);
        else expect(rest(made)).toHaveLength(6);
      }
    }
  });
});
