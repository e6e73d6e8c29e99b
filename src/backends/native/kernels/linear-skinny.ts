import { codecBits, type Format } from "../../../formats/format.js";
import type { ValueId } from "../../../ir/graph.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import { linearStep } from "../../linear-step.js";
import { type Stream, streams } from "../../rope-step.js";
import { type BuildContext, type Entry, type NativeDispatch, type NativeKernel, scratch, value } from "../kernel.js";
import { operand } from "./general-arguments.js";
import { formatsOf, isAlike, LinearArguments, partsOf, unscaled } from "./linear-arguments.js";
import { decodedObstacle, promotion } from "./linear-decoded.js";
import { needsSharedMemory } from "./sdpa-step.js";

const SKINNY: Entry = { name: "linear/skinny", abi: 5 };

/** Rows of x from which on weights are read too often. */
const MOST_ROWS = 32;
/** Kinds of heads that one dispatch has room for: queries, keys and values. */
const MOST_STREAMS = 3;
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

/** How the entry stores heads: as float32, or as codes of 16 bits without scales, in the order of `Rounding` in operands.cuh; null: it cannot. */
function roundingOf(format: Format | null): number | null {
  if (format === null) return 0;
  const at = ["bf16", "f16"].findIndex((codec) => unscaled(format, codec));
  return at < 0 ? null : at + 1;
}

/** Whether heads of `size` can be turned and stored where they are multiplied. */
function storedAlone({ rope, hadamard, format, quantize, cache }: Stream, size: number): boolean {
  const byHalves = rope === undefined || (rope.attrs.interleaved !== true && (rope.attrs.rotary ?? size) === size);
  const inOneRun = cache === null || (cache.pages === undefined && !cache.rows.ring);
  return !hadamard && byHalves && inOneRun && quantize?.attrs.dtype === undefined && roundingOf(format) !== null;
}

/**
 * The heads that the step behind makes of all outputs of a linear of one row, in the order of those; null when the linear cannot store them
 * itself: then it takes a step of its own.
 */
function headsBehind(context: BuildContext, after: BuildContext): readonly Stream[] | null {
  const { bound, memory } = context;
  const { x, out, epilogue, rounds, parts } = linearStep(bound);
  if (after.bound.step.kind !== "rope_kv" || bound.outputRows !== 1 || scratchBytes(bound) > 0) return null;
  if (epilogue.kind !== "none" || rounds !== null || parts.length !== 1) return null;
  const column = (id: ValueId) => context.placement(id).column;
  const heads = [...streams(after.bound)].sort((a, b) => column(a.source) - column(b.source));
  const size = context.lastExtent((heads[0] as Stream).source) / (heads[0] as Stream).heads;
  if (heads.length > MOST_STREAMS || size < 16 || !Number.isInteger(Math.log2(size))) return null;
  let end = 0;
  for (const stream of heads) {
    if (context.placement(stream.source).root !== context.placement(out).root || column(stream.source) !== end)
      return null;
    if (!storedAlone(stream, size)) return null;
    // Rows of heads follow each other without a gap.
    if (stream.format !== null && after.layout(stream.target).rowStride * 2 !== size) return null;
    end += stream.heads * size;
  }
  // x is read while heads are stored.
  const slot = memory.slotOf.get(context.placement(x).root);
  const shared =
    slot !== undefined && heads.some(({ target }) => memory.slotOf.get(after.placement(target).root) === slot);
  return end === formatsOf(bound).n && !shared ? heads : null;
}

function dispatch(context: BuildContext, after: BuildContext | null, heads: readonly Stream[]): NativeDispatch[] {
  const { bound } = context;
  const { x, weight, n } = formatsOf(bound);
  const written = new LinearArguments()
    .weightGroup(context)
    .activations(context)
    .epilogue(context)
    .int(...promotion(bound, chunkOf(bound)).args)
    .buffer(scratchBytes(bound) > 0 ? scratch : undefined)
    .int(x !== null && isAlike(x, weight), heads.length);
  if (after !== null) {
    const size = n / heads.reduce((sum, stream) => sum + stream.heads, 0);
    written.int(Math.log2(size) - 1);
    for (const stream of heads) {
      const { rope, cache, target, format } = stream;
      const angles = rope?.inputs[1];
      written
        .int(stream.heads)
        .buffer(angles === undefined ? undefined : operand(after, angles))
        .int(rope === undefined ? -1 : after.symbol(rope.attrs.position), roundingOf(format) as number)
        .buffer(value(target))
        .int(format === null ? after.strided(target)[1] * 4 : 0)
        .int(cache === null ? -1 : after.symbol(cache.position), (cache?.rows.keys ?? 0) as number);
    }
  }
  const label = after === null ? bound.describe() : `${bound.describe()} and ${after.bound.describe()}`;
  const { bindings, args } = written;
  return [{ label, entry: SKINNY, bindings, args }];
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
    build: (context) => dispatch(context, null, []),
    join: (context, after) => {
      const heads = headsBehind(context, after);
      return heads === null ? null : dispatch(context, after, heads);
    },
  },
];
