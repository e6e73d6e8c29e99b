import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import { type Entry, type NativeKernel, scratch } from "../kernel.js";
import { formatsOf, LinearArguments } from "./linear-arguments.js";
import { decodedObstacle, promotion, SEGMENT } from "./linear-decoded.js";
import { asLibrary } from "./linear-gemm.js";
import { needsFeature } from "./sdpa-step.js";

const MIXED: Entry = { name: "linear/mixed", abi: 2 };

/** Segments of a stage, and bytes of a column's sums of x in one, as in mixed-params.cuh. */
const SEGMENTS = 4;
const SUM_BYTES = 16;
/** Columns of x, as bf16 numbers, of one pass over the weights; fewer are padded. */
const MOST_COLUMNS = 128;
/** The widths that kernels for every format have. */
const WIDTHS = [32, MOST_COLUMNS] as const;
/** Fewer rows of x are columns of one narrower product; from more on, dense products amortize their copy of the weights. */
const LEAST_ROWS = 9;
const MOST_ROWS = 128;

const described: Requirement = { unmet: (bound) => decodedObstacle(bound, SEGMENTS) };

const someRows: Requirement = {
  unmet: ({ outputRows: rows }) =>
    rows >= LEAST_ROWS && rows <= MOST_ROWS ? null : `x must have ${LEAST_ROWS} to ${MOST_ROWS} rows: it has ${rows}`,
};

/** Where the library multiplies both operands as they lie, nothing is gained by decoding one. */
const decodes: Requirement = {
  unmet: (bound, device) =>
    device.features.has("cublaslt") && typeof asLibrary(bound, device) !== "string"
      ? "the matrix units multiply both operands as they are stored"
      : null,
};

/** x as columns of bf16, a pass after the other, with float zero points its sums over what is promoted together, and a factor a row. */
function scratchBytes(bound: BoundStep): number {
  const { weight, k } = formatsOf(bound);
  const { parts } = promotion(bound, SEGMENTS);
  const rows = bound.outputRows;
  const passes = Math.ceil(rows / Math.floor(MOST_COLUMNS / parts));
  const width = (passes === 1 ? WIDTHS.find((columns) => columns >= rows * parts) : undefined) ?? MOST_COLUMNS;
  const stages = Math.ceil(k / (SEGMENTS * SEGMENT));
  const sums = weight.zero.domain === "float" ? SUM_BYTES : 0;
  return passes * stages * width * (SEGMENTS * SEGMENT * 2 + sums) + 4 * rows;
}

/** Weights as they are stored by tens of rows of x, on Hopper's matrix units, in one pass over the weights. */
export const MIXED_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/linear/mixed",
    kind: "linear",
    entries: [MIXED],
    requires: [
      needsFeature("sm_90", "it is written for the matrix units of compute capability 9.0"),
      described,
      someRows,
      decodes,
    ],
    fusions: ["gate*up+quantize", "linear+activation+quantize"],
    rowTile: 16,
    efficiency: { bandwidth: 0.45, compute: 0.22 },
    scratch: scratchBytes,
    build: (context) => {
      const { bindings, args } = new LinearArguments()
        .weightGroup(context)
        .activations(context)
        .epilogue(context)
        .int(...promotion(context.bound, SEGMENTS).args)
        .buffer(scratch);
      return [{ label: context.bound.describe(), entry: MIXED, bindings, args }];
    },
  },
];
