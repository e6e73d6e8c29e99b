import { codecName, type Format } from "../../../formats/format.js";
import { CODECS } from "../../../formats/table.js";
import type { TensorType } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import {
  type BuildContext,
  type Entry,
  type NativeDispatch,
  type NativeKernel,
  type Source,
  scratch,
  value,
} from "../kernel.js";
import { operand } from "./general-arguments.js";
import {
  extentOf,
  needsFeature,
  plainCodec,
  ROUNDED,
  real,
  roundsResult,
  roundsTo,
  type SdpaStep,
  scaledCodec,
  sdpaNeeds,
  sdpaStep,
} from "./sdpa-step.js";

const PREFILL16: Entry = { name: "sdpa/prefill16", abi: 3 };
const PREFILL8: Entry = { name: "sdpa/prefill8", abi: 2 };
const PREFILL_SCALED: Entry = { name: "sdpa/prefill_scaled", abi: 2 };
/** Query rows and keys of a tile. */
const TILE = 128;
const SIZE = 128;

const roundUp = (n: number) => Math.ceil(n / TILE) * TILE;
const isPlain = (codec: string) => (type: TensorType) => plainCodec(type) === codec && type.kind === "format";

const hopper = [
  needsFeature("sm_90", "it is written for the matrix units of compute capability 9.0"),
  sdpaNeeds(({ shape: { size } }) => (size === SIZE ? null : `the head dimension must be ${SIZE}: it is ${size}`)),
  sdpaNeeds(({ attrs, shape: { page, ring, extra } }) => {
    const other = [
      ...(extra.mask >= 0 ? ["a mask"] : []),
      ...(attrs.softcap === undefined ? [] : ["a soft-cap"]),
      ...(page === null ? [] : ["pages"]),
      ...(ring ? ["a ring"] : []),
      ...(attrs.scale > 0 ? [] : ["a scale that is not positive"]),
    ];
    return other.length === 0 ? null : `it does not do ${other.join(", ")}`;
  }),
  roundsResult,
  sdpaNeeds(({ shape: { keys } }) =>
    typeof keys === "number" ? null : "the room for keys must not change between runs",
  ),
];

/** The arguments that both entries begin with, and their bindings up to the result. */
function common(context: BuildContext, step: SdpaStep): { bindings: Source[]; args: number[] } {
  const { attrs, shape, operands, out, rounds, extra } = step;
  const sinks = extra("sinks");
  return {
    bindings: [
      ...operands.map((id) => operand(context, id)),
      ...(sinks === undefined ? [] : [operand(context, sinks)]),
      value(out),
    ],
    args: [
      attrs.heads,
      attrs.kvHeads,
      shape.batch,
      real(attrs.scale),
      Number(attrs.causal),
      attrs.window ?? 0,
      ...context.extent(shape.tokens),
      extentOf(shape.keys, context.bound),
      attrs.position === undefined ? -1 : context.symbol(attrs.position),
      Number(shape.tokenMajor),
      Number(sinks !== undefined),
      Number(rounds !== null),
    ],
  };
}

function build16(context: BuildContext): NativeDispatch[] {
  const { bound } = context;
  const step = sdpaStep(bound);
  const { attrs, shape, operands, types } = step;
  const { bindings, args } = common(context, step);
  const layout = types[0].shape.length === 2 ? context.strided(operands[0]) : [attrs.heads * shape.size, 0];
  const parts = roundsTo(attrs, CODECS.bf16, 1) ? 1 : 3;
  return [
    {
      label: bound.describe(),
      entry: PREFILL16,
      bindings,
      args: [...args, types[0].kind === "dense" ? 3 : 1, parts, ...layout],
    },
  ];
}

const isPerRow = ({ scales }: Format) => scales[0]?.block[0] === 1 && [SIZE, "all"].includes(scales[0].block[1]);
/** Codes of 8 bits with a scale a row: their codec, or null. */
function codedRows(type: TensorType): "int8" | "e4m3" | null {
  if (type.kind !== "format" || !isPerRow(type.format)) return null;
  const codec = scaledCodec(type.format);
  return codec === "int8" || codec === "e4m3" ? codec : null;
}
/** Bits of query elements as `prefill_scaled.cu` takes them. */
function queryBits(type: TensorType): 8 | 16 | 32 | null {
  if (type.kind === "dense") return plainCodec(type) === "f32" ? 32 : null;
  return isPlain("bf16")(type) ? 16 : codedRows(type) === "e4m3" ? 8 : null;
}

/** Bytes of keys and values as bf16 and float32 scales. */
function scratchScaled(bound: BoundStep): number {
  const { attrs, shape } = sdpaStep(bound);
  return 2 * shape.batch * attrs.kvHeads * roundUp(extentOf(shape.keys, bound)) * (SIZE * 2 + 4);
}

function buildScaled(context: BuildContext): NativeDispatch[] {
  const step = sdpaStep(context.bound);
  const { attrs, shape, operands, types } = step;
  const { bindings, args } = common(context, step);
  const bits = queryBits(types[0]) as number;
  const layout = types[0].shape.length === 2 ? context.strided(operands[0]) : [attrs.heads * shape.size, 0];
  const scales = operands.map((id, i) => (i === 0 && bits > 8 ? 0 : (context.layout(id).scales[0] as number) * 4));
  return [
    {
      label: context.bound.describe(),
      entry: PREFILL_SCALED,
      bindings: [...bindings, scratch],
      args: [
        ...args,
        bits,
        attrs.probabilities === undefined ? 3 : 1,
        ...layout,
        Number(codedRows(types[1]) === "e4m3"),
        ...scales,
      ],
    },
  ];
}

/** One scale for all rows that a KV head has. */
const isPerHead = ({ scales }: Format, rows: number) => {
  const [block] = scales.map((level) => level.block);
  return block?.[0] === rows && (block[1] === "all" || block[1] === SIZE);
};

/** Bytes of the turned values and widened keys. */
function scratch8(bound: BoundStep): number {
  const { attrs, shape } = sdpaStep(bound);
  const keys = extentOf(shape.keys, bound);
  return shape.batch * attrs.kvHeads * SIZE * (roundUp(keys) + 2 * keys);
}

function build8(context: BuildContext): NativeDispatch[] {
  const step = sdpaStep(context.bound);
  const { bindings, args } = common(context, step);
  const scales = step.operands.map((id) => (context.layout(id).scales[0] as number) * 4);
  return [
    {
      label: context.bound.describe(),
      entry: PREFILL8,
      bindings: [...bindings, scratch],
      args: [...args, ...scales],
    },
  ];
}

export const SDPA_PREFILL: readonly NativeKernel[] = [
  {
    id: "cuda/sdpa/prefill_bf16",
    kind: "sdpa",
    entries: [PREFILL16],
    requires: [
      ...hopper,
      sdpaNeeds(({ types: [q, k, v], attrs }) => {
        if (!isPlain("bf16")(k) || !isPlain("bf16")(v)) return "keys and values must be stored as bf16";
        if (plainCodec(q) !== "f32" && !isPlain("bf16")(q)) return "queries must be f32 or bf16";
        if (q.kind === "format" && !isPlain("bf16")(q)) return "stored queries must be bf16";
        return attrs.probabilities === undefined || roundsTo(attrs, CODECS.bf16, 1)
          ? null
          : "it rounds probabilities to bf16 or not at all";
      }),
    ],
    fusions: [ROUNDED],
    rowTile: TILE,
    efficiency: { bandwidth: 0.5, compute: 0.55 },
    build: build16,
  },
  {
    id: "cuda/sdpa/prefill_float8",
    kind: "sdpa",
    entries: [PREFILL8],
    requires: [
      ...hopper,
      sdpaNeeds(({ types, attrs, shape }, bound) => {
        const group = attrs.heads / attrs.kvHeads;
        const [tokens, keys] = [extentOf(shape.tokens, bound), extentOf(shape.keys, bound)];
        const fits = types.every(
          (type, i) =>
            type.kind === "format" &&
            scaledCodec(type.format) === "e4m3" &&
            isPerHead(type.format, i === 0 ? group * tokens : keys),
        );
        if (!fits || shape.tokenMajor)
          return "queries [B, heads, T, D], keys and values must be e4m3 with one scale a KV head";
        return roundsTo(attrs, CODECS.e4m3, 2 ** 8) ? null : "probabilities must be declared e4m3 times 2^8";
      }),
    ],
    fusions: [ROUNDED],
    rowTile: TILE,
    efficiency: { bandwidth: 0.5, compute: 0.65 },
    scratch: scratch8,
    build: build8,
  },
  {
    id: "cuda/sdpa/prefill_scaled",
    kind: "sdpa",
    entries: [PREFILL_SCALED],
    requires: [
      ...hopper,
      sdpaNeeds(({ types: [q, k, v], attrs }) => {
        if (codedRows(k) === null || codedRows(v) !== codedRows(k))
          return "keys and values must be int8 or e4m3 with a scale a row";
        if (queryBits(q) === null) return "queries must be f32, bf16 or e4m3 with a scale a row";
        // bf16 is within what rounding to e4m3 may do.
        return attrs.probabilities === undefined ||
          roundsTo(attrs, CODECS.bf16, 1) ||
          codecName(attrs.probabilities.codec) === "e4m3"
          ? null
          : "it rounds probabilities to bf16, within e4m3, or not at all";
      }),
    ],
    fusions: [ROUNDED],
    rowTile: TILE,
    efficiency: { bandwidth: 0.5, compute: 0.5 },
    scratch: scratchScaled,
    build: buildScaled,
  },
];
