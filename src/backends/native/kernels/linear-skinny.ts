import { codecBits } from "../../../formats/format.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import { linearStep } from "../../linear-step.js";
import { type Entry, type NativeKernel, scratch } from "../kernel.js";
import { formatsOf, isSeparable, LinearArguments } from "./linear-arguments.js";
import { decodedObstacle, promotion } from "./linear-decoded.js";

const SKINNY: Entry = { name: "linear/skinny", abi: 2 };

/** Rows of x from which on weights are read too often. */
const MOST_ROWS = 32;
/** Columns of x, as bf16 numbers, that one pass over the weights takes. */
const MOST_COLUMNS = 32;

/** Segments of one chunk, as `Chunk` in skinny-params.cuh. */
const chunkSegments = (bits: number): number => (bits === 16 ? 2 : bits <= 4 ? 8 : 4);

const chunkOf = (bound: BoundStep): number => chunkSegments(codecBits(formatsOf(bound).weight.element));

const described: Requirement = { unmet: (bound) => decodedObstacle(bound, chunkOf(bound)) };

const fewRows: Requirement = {
  unmet: (bound) => {
    const rows = bound.outputRows;
    return rows <= MOST_ROWS ? null : `x must have at most ${MOST_ROWS} rows: it has ${rows}`;
  },
};

/** Shared memory that a block's rings of weights need beside `SLICE_BYTES` of x. */
const LEAST_MEMORY = 160 * 1024;
/** Bytes of x, as bf16 columns, that fit in a block of any device with that much. */
const SLICE_BYTES = 32 * 1024;

const sharedMemory: Requirement = {
  unmet: (_, { workgroupMemory }) =>
    workgroupMemory >= LEAST_MEMORY
      ? null
      : `a block needs ${LEAST_MEMORY} bytes of shared memory: it has ${workgroupMemory}`,
};

/** Partial sums of slices of K, for when x does not fit in one block's shared memory. */
function scratchBytes(bound: BoundStep): number {
  const { n, k, x } = formatsOf(bound);
  const columns = Math.min(bound.outputRows * (x !== null && isSeparable(x, k) ? 1 : 3), MOST_COLUMNS);
  const bytes = k * columns * 2;
  if (bytes <= SLICE_BYTES) return 0;
  return 4 * (Math.ceil(bytes / SLICE_BYTES) + 1) * bound.outputRows * n * linearStep(bound).parts.length;
}

export const SKINNY_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/linear/skinny",
    kind: "linear",
    entries: [SKINNY],
    requires: [sharedMemory, described, fewRows],
    fusions: ["gate*up+quantize", "linear+activation+quantize"],
    rowTile: 8,
    efficiency: { bandwidth: 0.75, compute: 0.06 },
    scratch: scratchBytes,
    build: (context) => {
      const needed = scratchBytes(context.bound) > 0;
      const { bindings, args } = new LinearArguments()
        .weightGroup(context)
        .activations(context)
        .epilogue(context)
        .int(...promotion(context.bound, chunkOf(context.bound)).args)
        .buffer(needed ? scratch : undefined);
      return [{ label: context.bound.describe(), entry: SKINNY, bindings, args }];
    },
  },
];
