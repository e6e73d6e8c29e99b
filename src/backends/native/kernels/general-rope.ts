import { extentOf, type Format, rowsObstacle } from "../../../formats/format.js";
import type { BoundStep } from "../../../plan/step.js";
import { type Stream, streams } from "../../rope-step.js";
import { type BuildContext, type Entry, type NativeDispatch, type NativeKernel, value } from "../kernel.js";
import { Arguments, operand, ruleObstacle } from "./general-arguments.js";

const ROPE: Entry = { name: "general/rope_kv", abi: 1 };
/** A head has at most this many elements: one a thread. */
const MOST = 512;
/** Streams that one dispatch has room for. */
const STREAMS = 4;
/** In the order of the enumeration in `rope.cuh`. */
const TARGETS = ["dense", "rows", "cache"] as const;

export const sizeOfHead = (bound: BoundStep, { source, heads }: Stream) =>
  (bound.shape(source).at(-1) as number) / heads;

/** Why a block of threads cannot quantize a row of `size` elements to the format by itself, or null. */
function rowObstacle(format: Format, size: number): string | null {
  const obstacle = ruleObstacle(format);
  if (obstacle !== null) return obstacle;
  const [first, second] = format.scales;
  if (second !== undefined) return `${format.name} has a second scale level, which other tokens share`;
  const together = rowsObstacle(format);
  if (together !== null) return together;
  if (first === undefined) return null;
  if (first.block[0] !== 1) return `a block of ${format.name} spans ${first.block[0]} rows, which other tokens share`;
  return size % extentOf(first.block[1], size) === 0 ? null : `its block of ${first.block[1]} does not divide ${size}`;
}

/** Why no block of threads holds a head of the step, or quantizes it by itself, or null. */
export function headObstacle(bound: BoundStep): string | null {
  for (const stream of streams(bound)) {
    const size = sizeOfHead(bound, stream);
    if (size > MOST) return `the head dimension must be at most ${MOST}: it is ${size}`;
    const obstacle = stream.format === null ? null : rowObstacle(stream.format, size);
    if (obstacle !== null) return obstacle;
  }
  return null;
}

/** Dispatches that take a step's streams: heads of one size go together. */
export function ropeOf(context: BuildContext, entry: Entry): NativeDispatch[] {
  const groups = new Map<number, Stream[]>();
  for (const stream of streams(context.bound)) {
    const size = sizeOfHead(context.bound, stream);
    groups.set(size, [...(groups.get(size) ?? []), stream]);
  }
  return [...groups].flatMap(([size, all]) =>
    Array.from({ length: Math.ceil(all.length / STREAMS) }, (_, i) => {
      const part = all.slice(i * STREAMS, (i + 1) * STREAMS);
      const [first] = part as [Stream];
      const made = new Arguments().int(...context.rowExtent(first.source), size, part.length);
      for (const stream of part) write(context, made, stream, size);
      return { label: context.bound.describe(), entry, bindings: made.bindings, args: made.args };
    }),
  );
}

/** Rotates heads and writes caches of any format whose rows are quantized by themselves. A block of threads takes one head of a token. */
export const ROPE_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/rope_kv",
    kind: "rope_kv",
    entries: [ROPE],
    requires: [{ unmet: headObstacle }],
    efficiency: { bandwidth: 0.4, compute: 0.05 },
    build: (context) => ropeOf(context, ROPE),
  },
];

/** What `stream` of `rope.cuh` reads. */
function write(context: BuildContext, made: Arguments, stream: Stream, size: number): void {
  const { source, heads, rope, hadamard, target, format, quantize, cache } = stream;
  const angles = rope?.inputs[1];
  made
    .buffer(operand(context, source))
    .int(...context.strided(source), heads)
    .int(rope === undefined ? 0 : (rope.attrs.rotary ?? size), rope?.attrs.interleaved === true)
    .buffer(angles === undefined ? undefined : operand(context, angles))
    .int(rope === undefined ? -1 : context.symbol(rope.attrs.position))
    .real(hadamard ? Math.fround(1 / Math.sqrt(size)) : 0)
    .int(TARGETS.indexOf(cache !== null ? "cache" : format !== null ? "rows" : "dense"));
  if (format === null) {
    made.buffer(value(target)).int(...context.strided(target));
    return;
  }
  const layout = context.layout(target);
  const block = format.scales[0]?.block;
  const width = block === undefined ? size : extentOf(block[1], size);
  const { dtype, numerics, perTensorScale } = quantize?.attrs ?? {};
  made
    .buffer(value(target))
    .int(layout.rowStride, layout.scales[0] ?? 0, layout.zero, width, block === undefined ? 0 : size / width)
    .rule(format, {
      ...(dtype === undefined ? {} : { dtype }),
      ...(numerics === undefined ? {} : { numerics }),
      ...(perTensorScale === undefined ? {} : { perTensorScale }),
    });
  if (cache === null) return;
  const { page, ring, keys } = cache.rows;
  made
    .buffer(cache.pages === undefined ? undefined : operand(context, cache.pages))
    .int(page ?? 0, context.symbol(cache.position), ring, keys as number);
}
