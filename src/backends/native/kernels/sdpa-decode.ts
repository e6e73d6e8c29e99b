import { codecName, type Format } from "../../../formats/format.js";
import { CODECS } from "../../../formats/table.js";
import type { Node, TensorType, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import type { Capabilities } from "../../backend.js";
import {
  type BuildContext,
  constant,
  type Entry,
  type NativeDispatch,
  type NativeKernel,
  scratch,
  value,
} from "../kernel.js";
import { operand } from "./general-arguments.js";
import {
  extentOf,
  needsSharedMemory,
  plainCodec,
  ROUNDED,
  real,
  roundsResult,
  roundsTo,
  scaledCodec,
  sdpaNeeds,
  sdpaStep,
} from "./sdpa-step.js";

const DECODE: Entry = { name: "sdpa/decode", abi: 2 };
/** Query rows of a block at most: the keys are read once for all of them. */
const ROWS = 8;
/** No device has more multiprocessors: keys are divided so that each has one block. */
const MULTIPROCESSORS = 192;
/** Bytes of shared memory that a block of any of the kernels may take (`decode_shape.cuh`). */
const LEAST_MEMORY = 160 * 1024;
/** Keys up to which the blocks of one cluster are enough, and join their results without a second kernel. */
const CLUSTER_KEYS = 4096;

/** What cached elements are, in the order of the cases in `decode.cu`. */
const CACHES: readonly ((format: Format) => boolean)[] = [
  (format) => isPlain(format, "f32"),
  (format) => isPlain(format, "f16"),
  (format) => isPlain(format, "bf16"),
  (format) => scaledCodec(format) === "int8" && isPerRow(format),
  (format) => scaledCodec(format) === "e4m3" && isPerRow(format),
  ({ element, scales, zero }) =>
    codecName(element) === "uint4" &&
    scales.length === 1 &&
    scales[0]?.block.join() === "1,32" &&
    codecName(scales[0].codec) === "bf16" &&
    zero.domain === "int" &&
    codecName(zero.codec) === "uint8",
];
const isPlain = (format: Format, codec: string) => plainCodec({ kind: "format", format, shape: [] }) === codec;
const isPerRow = ({ scales }: Format) => scales[0]?.block[0] === 1 && scales[0].block[1] === "all";
const cacheOf = (type: TensorType) => (type.kind === "dense" ? 0 : CACHES.findIndex((is) => is(type.format)));

/** Bits of a query's elements, or null for queries that the kernel does not read. */
function queryBits(type: TensorType): number | null {
  const plain = plainCodec(type);
  if (plain === "f32" && type.kind === "dense") return 32;
  if (plain === "bf16") return 16;
  return type.kind === "format" && scaledCodec(type.format) === "e4m3" && isPerRow(type.format) ? 8 : null;
}

/** Whether keys before the position were written by earlier runs: all that a run writes to the cache are its own tokens. */
function isEarly({ graph }: BoundStep, cache: ValueId, position: string | undefined): boolean {
  const isState = (id: ValueId | undefined) => id !== undefined && graph.values[id]?.role === "state";
  const writes = graph.nodes.filter((node): node is Node<"kv_write"> => node.op === "kv_write");
  const write = writes.find(({ outputs }) => outputs.includes(cache));
  const state = write === undefined ? cache : write.inputs[0];
  const ofState = writes.filter(({ inputs }) => state !== undefined && inputs.includes(state));
  return isState(state) && ofState.every((node) => node === write && node.attrs.position === position);
}

/** KV heads of all batches, blocks of query rows of each, and the splits of its keys: 0 for a cluster. */
function cut(bound: BoundStep, device: Capabilities): { planes: number; blocks: number; splits: number } {
  const { attrs, shape } = sdpaStep(bound);
  const planes = shape.batch * attrs.kvHeads;
  const blocks = Math.max(Math.ceil(((attrs.heads / attrs.kvHeads) * extentOf(shape.tokens, bound)) / ROWS), 1);
  const tokens = extentOf(shape.tokens, bound);
  const all = extentOf(shape.keys, bound);
  const seen = attrs.position === undefined ? all : extentOf(attrs.position, bound) + tokens;
  const keys = Math.min(all, seen, attrs.window ?? all);
  const clusters = device.features.has("sm>=90") && keys <= CLUSTER_KEYS && planes * blocks <= MULTIPROCESSORS;
  return { planes, blocks, splits: clusters ? 0 : Math.max(Math.ceil(MULTIPROCESSORS / (planes * blocks)), 1) };
}

export const SDPA_DECODE: NativeKernel = {
  id: "cuda/sdpa/decode",
  kind: "sdpa",
  entries: [DECODE],
  requires: [
    sdpaNeeds(({ shape: { size } }) =>
      size === 64 || size === 128 ? null : `the head dimension must be 64 or 128: it is ${size}`,
    ),
    sdpaNeeds(({ types: [, k, v], operands }, bound) => {
      if (cacheOf(k) < 0 || cacheOf(v) !== cacheOf(k))
        return `${bound.name(operands[1])} and ${bound.name(operands[2])} are not alike f32, f16, bf16, int8 or e4m3 with a scale a row, or uint4 in groups of 32`;
      return null;
    }),
    sdpaNeeds(({ types: [q], operands }, bound) =>
      queryBits(q) === null ? `${bound.name(operands[0])} is neither f32, bf16 nor e4m3 with a scale a row` : null,
    ),
    sdpaNeeds(({ attrs }) =>
      attrs.probabilities === undefined ||
      roundsTo(attrs, CODECS.bf16, 1) ||
      codecName(attrs.probabilities.codec) === "e4m3"
        ? null
        : "it rounds probabilities to e4m3 or not at all",
    ),
    roundsResult,
    needsSharedMemory(LEAST_MEMORY),
  ],
  fusions: [ROUNDED],
  rowTile: 2,
  efficiency: { bandwidth: 0.85, compute: 0.05 },
  scratch: (bound, device) => {
    const { planes, blocks, splits } = cut(bound, device);
    return planes * blocks * ROWS * splits * (sdpaStep(bound).shape.size + 2) * 4;
  },
  build: (context) => buildDecode(context),
};

function buildDecode(context: BuildContext): NativeDispatch[] {
  const { bound } = context;
  const { attrs, shape, operands, types, out, rounds, extra } = sdpaStep(bound);
  const [q, k, v] = operands;
  const [mask, sinks, pages] = [extra("mask"), extra("sinks"), extra("pages")];
  const { planes, blocks, splits } = cut(bound, context.device);
  const counts = planes * blocks;
  const bits = queryBits(types[0]) as number;
  const [stride, column] = types[0].shape.length === 2 ? context.strided(q) : [attrs.heads * shape.size, 0];
  /** Byte offsets of scales and zero points. */
  const parts = (id: typeof k): [number, number] => {
    if (context.type(id).kind === "dense") return [0, 0];
    const { scales, zero } = context.layout(id);
    return [(scales[0] ?? 0) * 4, zero * 4];
  };
  // Probabilities that are declared bf16 are kept in full: nothing is gained by rounding them here.
  const round = attrs.probabilities !== undefined && codecName(attrs.probabilities.codec) === "e4m3";
  const extras = [mask, sinks, pages].filter((id) => id !== undefined);
  return [
    {
      label: bound.describe(),
      entry: DECODE,
      bindings: [
        ...[...operands, ...extras].map((id) => operand(context, id)),
        value(out),
        ...(splits > 0 ? [scratch, constant(`sdpa/arrivals/${counts}`, () => new Uint32Array(counts))] : []),
      ],
      args: [
        shape.size,
        cacheOf(types[1]),
        attrs.heads,
        attrs.kvHeads,
        shape.batch,
        real(attrs.scale),
        real(attrs.softcap ?? 0),
        Number(attrs.causal),
        attrs.window ?? 0,
        ...context.extent(shape.tokens),
        ...context.extent(shape.keys),
        attrs.position === undefined ? -1 : context.symbol(attrs.position),
        shape.page ?? 0,
        Number(shape.ring),
        Number(shape.tokenMajor),
        bits,
        stride,
        column,
        ...[mask, sinks, pages].map((id) => Number(id !== undefined)),
        Number(shape.mask.batch),
        Number(shape.mask.heads),
        ...parts(k),
        ...parts(v),
        splits,
        real(round ? (attrs.probabilities?.scale as number) : 0),
        bits === 8 ? parts(q)[0] : 0,
        Number(rounds !== null),
        Number([k, v].every((cache) => isEarly(bound, cache, attrs.position))),
      ],
    },
  ];
}
