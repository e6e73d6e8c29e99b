import { extentOf, type Format } from "../../../formats/format.js";
import { cacheRows, type KeyRows } from "../../../ir/attention-shape.js";
import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { type BuildContext, type Entry, type NativeKernel, value } from "../kernel.js";
import { Arguments, operand, ruleObstacle } from "./general-arguments.js";

const ROPE: Entry = { name: "general/rope_kv", abi: 1 };
/** A head has at most this many elements: one a thread. */
const MOST = 512;
/** Streams that one dispatch has room for. */
const STREAMS = 4;
/** In the order of the enumeration in `rope.cu`. */
const TARGETS = ["dense", "rows", "cache"] as const;

/** One stream of heads through the step: perhaps rotated, perhaps transformed, into a dense value, a stored one or a cache. */
interface Stream {
  readonly source: ValueId;
  readonly heads: number;
  readonly rope: Node<"rope"> | undefined;
  readonly hadamard: boolean;
  readonly target: ValueId;
  /** Null for a dense target. */
  readonly format: Format | null;
  readonly quantize: Node<"quantize"> | undefined;
  readonly cache: { readonly rows: KeyRows; readonly pages: ValueId | undefined; readonly position: string } | null;
}

/** Follows each result's operand back to where it enters the step. */
function streams(bound: BoundStep): Stream[] {
  const { nodes, outputs } = bound.step;
  const producer = new Map(nodes.flatMap((node) => node.outputs.map((id) => [id, node] as const)));
  const enter = (x: ValueId) => {
    const turned = producer.get(x);
    const hadamard = turned?.op === "hadamard";
    const inner = hadamard ? (turned.inputs[0] as ValueId) : x;
    const rope = producer.get(inner);
    return rope?.op === "rope"
      ? { source: rope.inputs[0] as ValueId, rope, hadamard }
      : { source: inner, rope: undefined, hadamard };
  };
  const found: Stream[] = [];
  for (const node of nodes) {
    const out = node.outputs[0] as ValueId;
    const [first, second, pages] = node.inputs as readonly [ValueId, ValueId, ValueId | undefined];
    const plain = { quantize: undefined, cache: null };
    if (node.op === "kv_write") {
      const types = node.inputs.map((id) => bound.type(id));
      const { format } = types[0] as Extract<(typeof types)[number], { kind: "format" }>;
      const rows = cacheRows(types, node.attrs, bound.name(out));
      const cache = { rows, pages, position: node.attrs.position };
      found.push({ ...enter(second), ...plain, heads: rows.kvHeads, target: first, format, cache });
    } else if (node.op === "quantize") {
      const { format, heads = 1 } = node.attrs;
      found.push({ ...enter(first), ...plain, heads, target: out, format, quantize: node });
    } else if ((node.op === "rope" || node.op === "hadamard") && outputs.includes(out)) {
      found.push({ ...enter(out), ...plain, heads: node.attrs.heads, target: out, format: null });
    }
  }
  return found;
}

const sizeOfHead = (bound: BoundStep, { source, heads }: Stream) => (bound.shape(source).at(-1) as number) / heads;

/** Why a block of threads cannot quantize a row of `size` elements to the format by itself, or null. */
function rowObstacle(format: Format, size: number): string | null {
  const obstacle = ruleObstacle(format);
  if (obstacle !== null) return obstacle;
  const [first, second] = format.scales;
  if (second !== undefined) return `${format.name} has a second scale level, which other tokens share`;
  if (format.rule.kind === "nf4") return "rule nf4 quantizes scales of many rows together";
  if (first === undefined) return null;
  if (first.block[0] !== 1) return `a block of ${format.name} spans ${first.block[0]} rows, which other tokens share`;
  return size % extentOf(first.block[1], size) === 0 ? null : `its block of ${first.block[1]} does not divide ${size}`;
}

/** Rotates heads and writes caches of any format whose rows are quantized by themselves. A block of threads takes one head of a token. */
export const ROPE_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/rope_kv",
    kind: "rope_kv",
    entries: [ROPE],
    requires: [
      {
        unmet: (bound) => {
          for (const stream of streams(bound)) {
            const size = sizeOfHead(bound, stream);
            if (size > MOST) return `the head dimension must be at most ${MOST}: it is ${size}`;
            const obstacle = stream.format === null ? null : rowObstacle(stream.format, size);
            if (obstacle !== null) return obstacle;
          }
          return null;
        },
      },
    ],
    efficiency: { bandwidth: 0.4, compute: 0.05 },
    build: (context) => {
      // Heads of one size go together.
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
          return { label: context.bound.describe(), entry: ROPE, bindings: made.bindings, args: made.args };
        }),
      );
    },
  },
];

/** What `stream` of `rope.cu` reads. */
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
