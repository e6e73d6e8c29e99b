import { codecBits } from "../../../formats/format.js";
import type { ValueId } from "../../../ir/graph.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import { linearStep } from "../../linear-step.js";
import { TRIALS } from "../capabilities.js";
import { type BuildContext, type Entry, type NativeDispatch, type NativeKernel, scratch } from "../kernel.js";
import { operand } from "./general-arguments.js";
import { quantizeStep } from "./general-quantize.js";
import { earlyObstacle } from "./general-rows.js";
import { formatsOf, isSigned8, LinearArguments, partsOf, unscaled } from "./linear-arguments.js";
import { decodedObstacle, promotion } from "./linear-decoded.js";
import { needsSharedMemory } from "./sdpa-step.js";

const SKINNY: Entry = { name: "linear/skinny", abi: 3 };

/** Rows of x from which on weights are read too often. */
const MOST_ROWS = 32;
/** Elements of a row that is normed where it is multiplied, as in skinny-params.cuh. */
const MOST_NORMED = 8192;
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

/** Partial sums of slices of K, for when x does not fit in one block's shared memory. */
function scratchBytes(bound: BoundStep): number {
  const { n, k, x } = formatsOf(bound);
  const columns = Math.min(bound.outputRows * partsOf(x, k), MOST_COLUMNS);
  const bytes = k * columns * 2;
  if (bytes <= SLICE_BYTES) return 0;
  return 4 * (Math.ceil(bytes / SLICE_BYTES) + 1) * bound.outputRows * n * linearStep(bound).parts.length;
}

/** The rmsnorm that makes x, and the row that it norms. */
interface NormedRow {
  readonly row: ValueId;
  readonly weight: ValueId;
  readonly eps: number;
}

/** What the step before norms and rounds to bf16, when a linear of one row can do that itself: the row must still be there. */
function normedRow(context: BuildContext, before: BuildContext): NormedRow | null {
  const { bound, memory, device } = context;
  if (!device.features.has(TRIALS.norms) || bound.outputRows !== 1 || before.bound.step.kind !== "quantize")
    return null;
  const { node, norm, operands } = quantizeStep(before.bound);
  const { x, k } = linearStep(bound);
  if (norm === undefined || node.outputs[0] !== x || node.attrs.dtype !== undefined) return null;
  if (!unscaled(node.attrs.format, "bf16") || k % 8 !== 0 || k > MOST_NORMED) return null;
  const { root, column } = before.placement(operands[0]);
  const [, last] = memory.live.get(root) ?? [0, Number.POSITIVE_INFINITY];
  if (column % 4 !== 0 || last < bound.step.id || earlyObstacle(before.bound, norm) !== null) return null;
  return { row: operands[0], weight: norm.inputs[1] as ValueId, eps: norm.attrs.eps };
}

/** Ways that a row may take where the kernel finds that it can, as skinny.cu reads them. */
const WAYS = { bytes: 1, groups: 2 } as const;

function dispatch(context: BuildContext, normed: NormedRow | null): NativeDispatch[] {
  const { bound, device } = context;
  const { x } = formatsOf(bound);
  const bytes = device.features.has(TRIALS.bytes) && x !== null && isSigned8(x) ? WAYS.bytes : 0;
  const groups = device.features.has(TRIALS.groups) ? WAYS.groups : 0;
  const written = new LinearArguments()
    .weightGroup(context)
    .activations(context)
    .epilogue(context)
    .int(...promotion(bound, chunkOf(bound)).args)
    .buffer(scratchBytes(bound) > 0 ? scratch : undefined)
    .int(bytes | groups)
    .buffer(normed === null ? undefined : operand(context, normed.row));
  if (normed !== null)
    written.int(context.strided(normed.row)[1]).buffer(operand(context, normed.weight)).real(normed.eps);
  const { bindings, args } = written;
  return [{ label: bound.describe(), entry: SKINNY, bindings, args }];
}

export const SKINNY_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/linear/skinny",
    kind: "linear",
    entries: [SKINNY],
    requires: [needsSharedMemory(LEAST_MEMORY), described, fewRows],
    fusions: ["gate*up+quantize", "linear+activation+quantize"],
    rowTile: 8,
    efficiency: { bandwidth: 0.75, compute: 0.06 },
    scratch: scratchBytes,
    build: (context) => dispatch(context, null),
    join: (context, before) => {
      const row = normedRow(context, before);
      return row === null ? null : dispatch(context, row);
    },
  },
];
