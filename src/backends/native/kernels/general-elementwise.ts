import type { Node, ValueId } from "../../../ir/graph.js";
import type { BinaryFn } from "../../../ir/ops.js";
import { type BuildContext, type Entry, type NativeDispatch, type NativeKernel, value } from "../kernel.js";
import { Arguments, operand, storedObstacle, TYPES } from "./general-arguments.js";

const UNARY: Entry = { name: "general/unary", abi: 2 };
const BINARY: Entry = { name: "general/binary", abi: 2 };
const LAST_ROW: Entry = { name: "general/last_row", abi: 1 };
const COMBINE: Entry = { name: "general/moe_combine", abi: 1 };
const DEQUANTIZE: Entry = { name: "general/dequantize", abi: 1 };
const EMBEDDING: Entry = { name: "general/embedding", abi: 1 };
/** In the order of the enumeration in `elementwise.cu`. */
const BINARY_FUNCTIONS: readonly BinaryFn[] = ["add", "mul"];

const nodeOf = <Op extends Node["op"]>(context: BuildContext) => context.bound.step.nodes[0] as Node<Op>;

/** Rows and width of a result, then each operand and the result with the columns that they take. */
function operands(context: BuildContext, rows: ValueId, inputs: readonly ValueId[]): Arguments {
  const out = context.bound.step.nodes[0]?.outputs[0] as ValueId;
  const made = new Arguments().int(...context.rowExtent(rows), context.lastExtent(out));
  for (const id of inputs) made.buffer(operand(context, id)).int(...context.strided(id));
  return made.buffer(value(out)).int(...context.strided(out));
}

const dispatch = (context: BuildContext, entry: Entry, { bindings, args }: Arguments): NativeDispatch[] => [
  { label: context.bound.describe(), entry, bindings, args },
];

/** Kernels that make every element by itself. */
export const ELEMENTWISE_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/elementwise",
    kind: "elementwise",
    entries: [UNARY, BINARY],
    requires: [],
    efficiency: { bandwidth: 0.7, compute: 0.05 },
    build: (context) => {
      const node = nodeOf<"unary" | "binary">(context);
      const made = operands(context, node.outputs[0] as ValueId, node.inputs);
      if (node.op === "unary") return dispatch(context, UNARY, made.unary(node.attrs));
      return dispatch(context, BINARY, made.int(BINARY_FUNCTIONS.indexOf(node.attrs.fn)));
    },
  },
  {
    id: "cuda/last_row",
    kind: "last_row",
    entries: [LAST_ROW],
    requires: [],
    efficiency: { bandwidth: 0.5, compute: 0.05 },
    build: (context) => {
      const [x] = nodeOf<"last_row">(context).inputs as [ValueId];
      return dispatch(context, LAST_ROW, operands(context, x, [x]));
    },
  },
  {
    id: "cuda/moe_combine",
    kind: "moe_combine",
    entries: [COMBINE],
    requires: [],
    efficiency: { bandwidth: 0.6, compute: 0.05 },
    build: (context) => {
      const { inputs, outputs } = nodeOf<"moe_combine">(context);
      const made = operands(context, outputs[0] as ValueId, inputs);
      return dispatch(context, COMBINE, made.int(context.lastExtent(inputs[1] as ValueId)));
    },
  },
  {
    id: "cuda/dequantize",
    kind: "dequantize",
    entries: [DEQUANTIZE],
    requires: [{ unmet: (bound) => obstacle(bound.type(bound.step.nodes[0]?.inputs[0] as ValueId)) }],
    efficiency: { bandwidth: 0.4, compute: 0.05 },
    build: (context) => {
      const { inputs, outputs, attrs } = nodeOf<"dequantize">(context);
      const [x] = inputs as [ValueId];
      const made = new Arguments()
        .int(...context.rowExtent(x))
        .stored(context.layout(x), operand(context, x))
        .buffer(value(outputs[0] as ValueId))
        .int(TYPES.indexOf(attrs.dtype ?? "f32"));
      return dispatch(context, DEQUANTIZE, made);
    },
  },
  {
    id: "cuda/embedding",
    kind: "embedding",
    entries: [EMBEDDING],
    requires: [{ unmet: (bound) => obstacle(bound.type(bound.step.nodes[0]?.inputs[1] as ValueId)) }],
    efficiency: { bandwidth: 0.3, compute: 0.05 },
    build: (context) => {
      const { inputs, outputs, attrs } = nodeOf<"embedding">(context);
      const [ids, table, positions] = inputs as readonly [ValueId, ValueId, ValueId?];
      const out = outputs[0] as ValueId;
      const layout = context.layout(table);
      const made = new Arguments()
        .int(...context.rowExtent(out))
        .stored(layout, operand(context, table))
        .int(layout.shape[0])
        .buffer(operand(context, ids))
        .buffer(value(out))
        .real(attrs.scale ?? 1)
        .buffer(positions === undefined ? undefined : operand(context, positions))
        .int(attrs.position === undefined ? -1 : context.symbol(attrs.position));
      return dispatch(context, EMBEDDING, made);
    },
  },
];

const obstacle = (type: ReturnType<BuildContext["type"]>): string | null =>
  type.kind === "format" ? storedObstacle(type.format) : "its operand is dense, a stored one is needed";
