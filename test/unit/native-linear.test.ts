import { describe, expect, test } from "vitest";
import { codeFor, cudaCapabilities, H100, TRIALS, trialFeatures } from "../../src/backends/native/capabilities.js";
import { BuildContext, type NativeDispatch, type NativeKernel } from "../../src/backends/native/kernel.js";
import { GENERAL_KERNELS } from "../../src/backends/native/kernels/general-table.js";
import { LINEAR_KERNELS } from "../../src/backends/native/kernels/linear-table.js";
import { storedLayout } from "../../src/backends/stored-layout.js";
import { codecVector, type Format, formatKey, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { scaleGranularity } from "../../src/formats/tensor.js";
import { dense, GraphBuilder, stored } from "../../src/ir/graph.js";
import { makePlan, type Plan } from "../../src/plan/plan.js";
import type { Choice } from "../../src/plan/select.js";
import { BoundStep } from "../../src/plan/step.js";
import { linearArguments } from "../support/native-linear.js";

const hopper = cudaCapabilities(H100, ["cublaslt"]);
const kernels = [...LINEAR_KERNELS, ...GENERAL_KERNELS];
const [N, K] = [512, 1024];

interface Case {
  readonly weight: Format;
  readonly x?: Format;
  readonly rows?: number;
  readonly gated?: boolean;
  readonly residual?: boolean;
  readonly bias?: boolean;
  readonly n?: number;
  readonly k?: number;
  readonly fastAccum?: boolean;
}

function plan(made: Case, on = hopper): Plan {
  const { weight, x, rows = 1, gated = false, residual = false, bias = false, n = N, k = K, fastAccum = false } = made;
  const g = new GraphBuilder({});
  const input = x === undefined ? g.input("x", dense("f32", [rows, k])) : g.state("x", stored(x, [rows, k]));
  const linear = (name: string) => {
    const operands = [input, g.weight(`${name}.weight`, stored(weight, [n, k]))];
    if (bias) operands.push(g.weight(`${name}.bias`, dense("f32", [n])));
    return g.one("linear", operands, fastAccum ? { fastAccum } : {}, name);
  };
  let y = linear("gate");
  if (gated) y = g.one("binary", [g.one("unary", [y], { fn: "silu" }, "act"), linear("up")], { fn: "mul" }, "product");
  else if (residual) y = g.one("binary", [y, g.input("r", dense("f32", [rows, n]))], { fn: "add" }, "sum");
  g.output("y", y);
  return makePlan(g.build(), { kernels, capabilities: on });
}

const chosen = (made: Plan) => made.buckets[0]?.choices[0] as Choice<NativeKernel>;

const stepOf = (made: Plan) => new BoundStep(made.graph, made.steps[0] as Plan["steps"][number], {});

function dispatchOf(made: Plan, on = hopper): NativeDispatch {
  const bound = stepOf(made);
  const [dispatch] = chosen(made).kernel.build(new BuildContext(bound, made.memory, on, {}));
  return dispatch as NativeDispatch;
}

const activations = { dense: undefined, bf16: FORMATS.bf16, int8: FORMATS.int8, float8: FORMATS.float8_e4m3 } as const;
const formats = Object.values(FORMATS).flatMap((format) => [
  format,
  ...format.blocks.filter(([, size]) => size === "all" || K % size === 0).map((block) => withScale(format, { block })),
]);

describe("linear on CUDA", () => {
  test.each(Object.keys(activations) as (keyof typeof activations)[])(
    "every format, x %s: args are read to their end",
    (name) => {
      const x = activations[name];
      for (const weight of formats) {
        if (codecVector(weight.element)[0] !== 1 || K % scaleGranularity(weight, K) !== 0) continue;
        for (const shape of [
          { rows: 1 },
          { rows: 8, gated: true, bias: true },
          { rows: 64, gated: true },
          { rows: 512, residual: true },
        ]) {
          const made = plan({ weight, ...(x === undefined ? {} : { x }), ...shape });
          const { kernel } = chosen(made);
          if (!LINEAR_KERNELS.includes(kernel)) continue;
          const read = linearArguments(dispatchOf(made));
          const { words, rowStride } = storedLayout(weight, [N, K]);
          expect([read.n, read.k, read.rowBytes, read.parts], formatKey(weight)).toEqual([
            N,
            K,
            rowStride * 4,
            "gated" in shape ? 2 : 1,
          ]);
          for (const found of [read.weights[0]?.scale, read.weights[0]?.outer, read.weights[0]?.zero]) {
            if (found === null || found === undefined) continue;
            // Each run of scales starts within the tensor, and its blocks cover it.
            expect(found.offset).toBeLessThan(words * 4);
            expect(found.k * found.columns).toBeGreaterThanOrEqual(K);
          }
          const bytes = kernel.scratch?.(new BoundStep(made.graph, made.steps[0] as never, {}), hopper) ?? 0;
          expect(read.scratch >= 0, `${kernel.id} ${formatKey(weight)}`).toBe(bytes > 0);
        }
      }
    },
  );

  const id = (made: Case, on = hopper) => chosen(plan(made, on)).kernel.id;
  const big = { n: 4096, k: 4096 };

  test("one row streams the weights; many rows go to tensor cores, as few products as are exact", () => {
    for (const weight of [FORMATS.bf16, FORMATS.int8, FORMATS.int4_plain, FORMATS.nvfp4, FORMATS.mxfp4])
      expect(id({ weight, ...big })).toBe("cuda/linear/skinny");
    const many = { rows: 4096, x: FORMATS.bf16, ...big };
    expect(id({ weight: FORMATS.bf16, ...many })).toBe("cuda/linear/cublaslt");
    expect(id({ weight: FORMATS.int8, ...many })).toBe("cuda/linear/wgmma_bf16");
    expect(id({ weight: FORMATS.nvfp4, ...many })).toBe("cuda/linear/wgmma_bf16");
    // Seven times a bf16 has 11 significant bits: too many for bf16, exact in f16.
    expect(id({ weight: FORMATS.int4_plain, ...many })).toBe("cuda/linear/wgmma_f16");
    expect(id({ weight: FORMATS.int4_int_zero, ...many })).toBe("cuda/linear/cublaslt_bf16_split");
    // Its zero point may be any byte, so the row's largest value is not known from its scales.
    expect(id({ weight: FORMATS.uint2, ...many })).toBe("cuda/linear/cublaslt_bf16_split");
    expect(id({ weight: FORMATS.int8, ...many, x: FORMATS.int8 })).toBe("cuda/linear/wgmma");
    expect(id({ weight: FORMATS.int4_symmetric, ...many, x: FORMATS.int8 })).toMatch(/general|plain/);
  });

  test("the library multiplies what it stores itself; other results are finished where their sums are", () => {
    const many = { weight: FORMATS.bf16, x: FORMATS.bf16, rows: 4096, ...big };
    expect(id({ ...many, residual: true })).toBe("cuda/linear/cublaslt");
    for (const more of [{ gated: true }, { bias: true }]) expect(id({ ...many, ...more })).toBe("cuda/linear/wgmma");
    const ada = cudaCapabilities({ ...H100, name: "NVIDIA L40S", major: 8, minor: 9 }, ["cublaslt"]);
    expect(id({ ...many, gated: true }, ada)).toBe("cuda/linear/cublaslt_finish");
    // Such products need no memory for their sums.
    const made = plan({ ...many, gated: true });
    expect(chosen(made).kernel.scratch?.(stepOf(made), hopper)).toBeLessThan(4096 * 16);
  });

  test("blocks of mxfp8 and nvfp4 are scaled by the units of compute capability 10.0, where that is tried", () => {
    const blackwell = { ...H100, name: "NVIDIA B200", major: 10, minor: 0 };
    const on = cudaCapabilities(blackwell, ["cublaslt", TRIALS.blocks]);
    for (const format of [FORMATS.mxfp8_e4m3, FORMATS.nvfp4]) {
      const made = { weight: format, x: format, rows: 300, gated: true, n: 272, k: 544 };
      expect(id(made, on)).toBe("cuda/linear/cublaslt_blocks");
      const reason = (features: typeof on) =>
        chosen(plan(made, features)).explanation.rejected.find((row) => row.id === "cuda/linear/cublaslt_blocks")
          ?.reason;
      expect(reason(cudaCapabilities(blackwell, ["cublaslt"]))).toContain("FEWBIT_CUDA_TRIAL=blocks");
      expect(reason(hopper)).toContain("10.0");
      const program = plan(made, on);
      const { rest, parts, k } = linearArguments(dispatchOf(program, on));
      expect([rest[0], parts, k]).toEqual([4, 2, 544]);
      // Scales of 300 rows fill 3 tiles of 128 down, those of 272 three as well; 512 bytes are 4 blocks of 128 rows.
      const tiles = Math.ceil(544 / (format === FORMATS.nvfp4 ? 16 : 32) / 4);
      const bytes = 3 * (3 * tiles * 512) + 1280 + 2304 + 4 * 2 * 300 * 272;
      expect(chosen(program).kernel.scratch?.(stepOf(program), on)).toBe(bytes);
    }
    expect(id({ weight: FORMATS.mxfp4, x: FORMATS.mxfp4, rows: 300, ...big }, on)).not.toBe(
      "cuda/linear/cublaslt_blocks",
    );
  });

  test("features are those of the code that a device runs, not of the device", () => {
    const all = "80-real 89-real 90a-real 100a-real 120a-real 80-virtual";
    const found = [80, 86, 89, 90, 100, 103, 120, 121, 75].map((capability) => codeFor(all, capability));
    expect(found).toEqual([80, 80, 89, 90, 100, 80, 120, 80, 0]);
    expect(["80-real", "80", "90-real", "90a", "native", "none"].map((built) => codeFor(built, 90))).toEqual([
      0, 80, 89, 90, 89, 0,
    ]);
    const old = cudaCapabilities(H100, ["cublaslt"], 80);
    expect(["sm_90", "sm>=90", "sm>=89"].filter((feature) => old.features.has(feature))).toEqual([]);
    const made = plan({ weight: FORMATS.int8, x: FORMATS.int8, rows: 4096, n: 4096, k: 4096 }, old);
    expect(chosen(made).kernel.id).not.toContain("wgmma");
  });

  test.each(["mxfp8_e4m3", "mxfp6_e3m2", "mxfp4", "nvfp4"] as const)(
    "%s by itself: an element and its scale are one bf16",
    (name) => {
      const format = FORMATS[name];
      const made = plan({ weight: format, x: format, rows: 4096, ...big });
      expect(["cuda/linear/wgmma_bf16", "cuda/linear/cublaslt_bf16"]).toContain(chosen(made).kernel.id);
      const [carrier, xParts, wParts, scaledX, scaledW] = linearArguments(dispatchOf(made)).rest;
      expect([carrier, xParts, wParts, scaledX, scaledW]).toEqual([1, 1, 1, 1, 1]);
      // promote, unit, fold, separable, parts: the row's scales are no factor of it.
      expect(linearArguments(dispatchOf(plan({ weight: format, x: format }))).rest.slice(-2)).toEqual([0, 1]);
    },
  );

  test("codes of x are multiplied as they lie where they are of the weight's codec, without zero points", () => {
    const alike = (weight: Format, x: Format) => linearArguments(dispatchOf(plan({ weight, x }))).alike;
    const rows = (format: Format) => withScale(format, { block: [1, "all"] });
    const [int8, e4m3] = [rows(FORMATS.int8), rows(FORMATS.float8_e4m3)];
    expect(alike(FORMATS.int8, int8)).toBe(true);
    expect(alike(FORMATS.float8_e4m3, e4m3)).toBe(true);
    expect(alike(FORMATS.float8_e4m3, int8)).toBe(false);
    for (const x of [rows(FORMATS.int8_asymmetric), e4m3, FORMATS.bf16]) expect(alike(FORMATS.int8, x)).toBe(false);
  });

  test("only names of kernels on trial put a feature on trial", () => {
    expect(trialFeatures("other,blocks")).toEqual([TRIALS.blocks]);
    expect(trialFeatures()).toEqual([]);
  });

  test("float32 activations are split, never rounded", () => {
    const made = plan({ weight: FORMATS.bf16, rows: 4096, ...big });
    expect(chosen(made).kernel.id).toBe("cuda/linear/cublaslt_bf16_split");
    const [carrier, xParts, wParts, scaledX] = linearArguments(dispatchOf(made)).rest;
    expect([carrier, xParts, wParts, scaledX]).toEqual([1, 3, 1, 1]);
    expect(linearArguments(dispatchOf(plan({ weight: FORMATS.bf16 }))).rest.slice(-2)).toEqual([0, 3]);
  });

  test("float8 tensor cores, whose sums are short, are used only where the linear declares such sums", () => {
    const made = { weight: FORMATS.float8_e4m3, x: FORMATS.float8_e4m3, rows: 4096, ...big };
    const refused = chosen(plan(made)).explanation;
    expect(refused.kernel).toBe("cuda/linear/wgmma_bf16");
    for (const row of ["cuda/linear/wgmma", "cuda/linear/cublaslt_finish"])
      expect(refused.rejected.find(({ id }) => id === row)?.reason).toContain("14 bits");
    expect(id({ ...made, fastAccum: true })).toBe("cuda/linear/cublaslt");
  });

  test("one wave of short tiles goes to the kernel that has weights before x, where rows have scales; all else to the library", () => {
    const rows = withScale(FORMATS.float8_e4m3, { block: [1, "all"] });
    const made = { weight: rows, x: rows, fastAccum: true, n: 1024, k: 1024 };
    const at = (more: Partial<Case>) => id({ ...made, ...more });
    expect([64, 512, 1024].map((count) => at({ rows: count }))).toEqual(Array(3).fill("cuda/linear/wgmma_short"));
    const whole = withScale(FORMATS.float8_e4m3, { block: ["all", "all"] });
    for (const more of [{ rows: 32 }, { rows: 1025 }, { n: 1040 }, { k: 1040 }, { weight: whole, x: whole }])
      expect(at({ rows: 1024, ...more }), JSON.stringify(more)).toBe("cuda/linear/cublaslt");
    expect(at({ rows: 1024, weight: FORMATS.bf16, x: FORMATS.bf16, fastAccum: false })).toBe("cuda/linear/cublaslt");
  });

  test("a device with little shared memory has no room for rings of weights", () => {
    const ada = cudaCapabilities({ ...H100, name: "NVIDIA L40S", major: 8, minor: 9, sharedMemory: 101_376 });
    const { kernel, rejected } = chosen(plan({ weight: FORMATS.bf16 }, ada)).explanation;
    expect(kernel).toMatch(/^cuda\/linear\/(general|plain)/);
    expect(rejected.find((row) => row.id === "cuda/linear/skinny")?.reason).toContain("shared memory");
  });

  test("without the library everything still has a kernel", () => {
    const on = cudaCapabilities(H100);
    const { kernel, rejected } = chosen(plan({ weight: FORMATS.bf16, x: FORMATS.bf16, rows: 512 }, on)).explanation;
    expect(kernel).toBe("cuda/linear/wgmma");
    expect(rejected.find((row) => row.id === "cuda/linear/cublaslt")?.reason).toContain("no cuBLASLt");
    const ada = cudaCapabilities({ ...H100, name: "NVIDIA L40S", major: 8, minor: 9 });
    expect(id({ weight: FORMATS.bf16, x: FORMATS.bf16, rows: 512 }, ada)).toMatch(/^cuda\/linear\/(general|plain)/);
  });
});
