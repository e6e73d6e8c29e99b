import { extentOf, type Format, formatKey } from "../../../formats/format.js";
import { scaleGranularity } from "../../../formats/tensor.js";
import type { Node, ValueId } from "../../../ir/graph.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import { linearStep } from "../../linear-step.js";
import {
  type BuildContext,
  dense,
  type Entry,
  type NativeDispatch,
  type NativeKernel,
  value,
  weights,
} from "../kernel.js";
import { Arguments, inEights, operand, storedObstacle } from "./general-arguments.js";

const GEMV: Entry = { name: "general/linear_gemv", abi: 1 };
const TILE: Entry = { name: "general/linear_tile", abi: 1 };
const PLAIN: Entry = { name: "general/linear_plain", abi: 1 };

/** In the order of the enumeration in `linear.cu`. */
const EPILOGUES = ["none", "residual", "unary", "gated"] as const;
/** Elements whose products are summed exactly at most, where scales change along k. */
const RUN = 32;
/** Rows of x from which on weights are read so often that tiles pay. */
const FEW_ROWS = 16;

/** Whether code values minus zero points are integers, so that products can be summed exactly. */
const isInteger = ({ element, zero }: Format): boolean =>
  element.kind === "int" &&
  element.bits <= 8 &&
  (zero.domain === "none" || (zero.domain === "int" && zero.codec.kind === "int"));

/** The stored operands of a step: x where it is stored, then the weights. */
function storedOperands(bound: BoundStep): { id: ValueId; format: Format }[] {
  const node = bound.step.nodes[0] as Node<"linear" | "moe_linear">;
  const ids =
    node.op === "moe_linear"
      ? [node.inputs[0] as ValueId, ...node.inputs.slice(2)]
      : [linearStep(bound).x, ...linearStep(bound).parts.flat()];
  return ids.flatMap((id) => {
    const type = bound.type(id);
    return type.kind === "format" ? [{ id, format: type.format }] : [];
  });
}

const described: Requirement = {
  unmet: (bound) => {
    for (const { id, format } of storedOperands(bound)) {
      const obstacle = storedObstacle(format);
      if (obstacle !== null) return `${bound.name(id)}: ${obstacle}`;
    }
    return null;
  },
};

/** Operands are decoded 8 elements at a time, which must share their scales, and exact runs must be whole numbers of them. */
const eights: Requirement = {
  unmet: (bound) => {
    const found = storedOperands(bound);
    const k = bound.shape(found[0]?.id as ValueId).at(-1) as number;
    const bad = found.find(({ format }) => !inEights(format, k));
    if (bad !== undefined)
      return `${bound.name(bad.id)}: the blocks or table entries of ${formatKey(bad.format)} are not whole multiples of 8 elements`;
    const shared = Math.min(...found.map(({ format }) => scaleGranularity(format, k)));
    return shared >= k || RUN % Math.min(shared, RUN) === 0
      ? null
      : `its operands share scales over ${shared} elements, which does not divide ${RUN}`;
  },
};

const requirement = (unmet: (bound: BoundStep) => string | null): Requirement => ({ unmet });

export const LINEAR_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/linear/general_gemv",
    kind: "linear",
    entries: [GEMV],
    requires: [
      described,
      eights,
      requirement((bound) =>
        bound.outputRows <= FEW_ROWS
          ? null
          : `x has ${bound.outputRows} rows: from ${FEW_ROWS} on weights are read too often`,
      ),
    ],
    efficiency: { bandwidth: 0.4, compute: 0.01 },
    build: (context) => linear(context, GEMV),
  },
  {
    id: "cuda/linear/general_tile",
    kind: "linear",
    entries: [TILE],
    requires: [described, eights],
    rowTile: 64,
    efficiency: { bandwidth: 0.3, compute: 0.015 },
    build: (context) => linear(context, TILE),
  },
  {
    id: "cuda/linear/plain",
    kind: "linear",
    entries: [PLAIN],
    requires: [described],
    efficiency: { bandwidth: 0.01, compute: 0.0005 },
    build: (context) => linear(context, PLAIN),
  },
  {
    id: "cuda/moe_linear/general_gemv",
    kind: "moe_linear",
    entries: [GEMV],
    requires: [described, eights],
    efficiency: { bandwidth: 0.4, compute: 0.01 },
    build: (context) => experts(context, GEMV),
  },
  {
    id: "cuda/moe_linear/plain",
    kind: "moe_linear",
    entries: [PLAIN],
    requires: [described],
    efficiency: { bandwidth: 0.01, compute: 0.0005 },
    build: (context) => experts(context, PLAIN),
  },
];

/** x and the sums' exactness, as `readLinear` of `linear.cu` reads them. */
function operandX(context: BuildContext, made: Arguments, x: ValueId): Arguments {
  if (context.type(x).kind === "format") return made.int(true).stored(context.layout(x), operand(context, x));
  return made
    .int(false)
    .buffer(operand(context, x))
    .int(...context.strided(x));
}

function exactness(context: BuildContext, x: ValueId, weight: Format, k: number): [boolean, boolean, number] {
  const type = context.type(x);
  if (type.kind !== "format" || !isInteger(type.format) || !isInteger(weight)) return [false, false, RUN];
  const shared = Math.min(scaleGranularity(type.format, k), scaleGranularity(weight, k));
  return [true, shared >= k, Math.min(shared, RUN)];
}

/** One dispatch: outputs of grouped weights lie side by side, so their rows are one matrix. */
function linear(context: BuildContext, entry: Entry): NativeDispatch[] {
  const { x, parts, biases, epilogue, out, k } = linearStep(context.bound);
  const groups = parts.map((ids) => context.weights(ids));
  const [first] = groups as [(typeof groups)[number]];
  const made = new Arguments().int(...context.rowExtent(out), first.rows, k);
  operandX(context, made, x).int(parts.length);
  for (const [part, ids] of parts.entries()) {
    const bias = biases[part];
    made
      .stored((groups[part] as (typeof groups)[number]).slices[0]?.layout as never, weights(...ids))
      .buffer(bias === undefined ? undefined : dense(...bias));
  }
  made.int(EPILOGUES.indexOf(epilogue.kind)).unary("fn" in epilogue ? { fn: epilogue.fn } : undefined);
  if (epilogue.kind === "residual")
    made.buffer(operand(context, epilogue.other)).int(...context.strided(epilogue.other));
  else made.buffer(undefined).int(0, 0);
  const { bindings, args } = made
    .buffer(value(out))
    .int(...context.strided(out))
    .int(...exactness(context, x, first.format, k))
    .buffer(undefined)
    .int(0, 0, 0, 1);
  return [{ label: context.bound.describe(), entry, bindings, args }];
}

/** Whether rows of weights in a format can be laid one after another: no block and no table belongs to one of them alone. */
function concatenable({ element, scales }: Format, rows: number): boolean {
  if (element.kind === "lut" && element.entries === "learned") return false;
  return scales.every(({ block }) => block[0] === "all" || rows % extentOf(block[0], rows) === 0);
}

/** The experts' weights as one matrix where that is possible, else a dispatch an expert. */
function experts(context: BuildContext, entry: Entry): NativeDispatch[] {
  const { inputs, outputs } = context.bound.step.nodes[0] as Node<"moe_linear">;
  const [x, ids, ...all] = inputs as readonly [ValueId, ValueId, ...ValueId[]];
  const out = outputs[0] as ValueId;
  const first = context.layout(all[0] as ValueId);
  const [n, k] = first.shape;
  const slots = context.lastExtent(ids);
  const shared = context.type(x).shape.length === 2;
  const groups = concatenable(first.format, n) ? [all] : all.map((id) => [id]);
  return groups.map((group, at) => {
    const { format, slices } = context.weights(group);
    const made = new Arguments().int(...context.rowExtent(out), n, k);
    const { bindings, args } = operandX(context, made, x)
      .int(1)
      .stored(slices[0]?.layout as never, weights(...group))
      .buffer(undefined)
      .int(0)
      .unary(undefined)
      .buffer(undefined)
      .int(0, 0)
      .buffer(value(out))
      .int(n, 0)
      .int(...exactness(context, x, format, k))
      .buffer(operand(context, ids))
      .int(all.length, groups.length === 1 ? 0 : at, group.length, shared ? slots : 1);
    return { label: context.bound.describe(), entry, bindings, args };
  });
}
