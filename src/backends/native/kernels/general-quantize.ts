import { extentOf, type Format } from "../../../formats/format.js";
import type { Node, ValueId } from "../../../ir/graph.js";
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
import { Arguments, operand, ruleObstacle } from "./general-arguments.js";

const entry = (name: string): Entry => ({ name: `general/quantize_${name}`, abi: 1 });
const ROWS = entry("rows");
const EXTREMES = entry("extremes");
const ROW_EXTREMES = entry("row_extremes");
const OUTER = entry("outer");
/** Scales of blocks of several rows, from the extremes in scratch; what encoding needs of them, to scratch. */
export const CHOOSE = entry("choose");
const ENCODE = entry("encode");
const SCALER_MEAN = entry("scaler_mean");
const SCALERS = entry("scalers");

/** In the order of the enumeration in `quantize.cuh`. */
const INPUTS = ["plain", "norm", "unary", "gated"] as const;

/** A step of kind `quantize`, taken apart: what makes the values, and their format. */
export interface QuantizeStep {
  readonly node: Node<"quantize">;
  readonly input: (typeof INPUTS)[number];
  /** The operands of `input`: x; for `gated` what the function is applied to, then the other factor. */
  readonly operands: readonly [ValueId, ValueId?];
  readonly norm: Node<"rmsnorm"> | undefined;
  readonly unary: Node<"unary"> | undefined;
}

export function quantizeStep(bound: BoundStep): QuantizeStep {
  const { nodes } = bound.step;
  const find = <Op extends Node["op"]>(op: Op) => nodes.find((node) => node.op === op) as Node<Op> | undefined;
  const [node, norm, unary, binary] = [find("quantize"), find("rmsnorm"), find("unary"), find("binary")] as const;
  const step = { node: node as Node<"quantize">, norm, unary };
  const first = (from: Node | undefined) => from?.inputs[0] as ValueId;
  if (norm !== undefined) return { ...step, input: "norm", operands: [first(norm)] };
  if (unary !== undefined && binary !== undefined) {
    const other = binary.inputs.find((id) => id !== unary.outputs[0]) as ValueId;
    return { ...step, input: "gated", operands: [first(unary), other] };
  }
  if (unary !== undefined) return { ...step, input: "unary", operands: [first(unary)] };
  return { ...step, input: "plain", operands: [first(node)] };
}

/** Whether the blocks of a format lie in one row, so that a row is quantized without the others. */
const byRow = ({ scales }: Format): boolean => scales[0] === undefined || scales[0].block[0] === 1;

/** The passes that quantize to a format. */
function passesOf(format: Format, perTensorScale: number | undefined): Entry[] {
  const { scales, rule } = format;
  const outer = scales[1] === undefined || rule.kind === "mslk_int4" ? [] : [OUTER];
  if (outer.length > 0 && perTensorScale === undefined) outer.unshift(ROW_EXTREMES);
  const blocks = byRow(format) ? [ROWS] : [EXTREMES, CHOOSE, ENCODE];
  return [...outer, ...blocks, ...("scalers" in rule ? [SCALER_MEAN, SCALERS] : [])];
}

/** Blocks along k, and words of scratch before the parameters of blocks. */
function extents(format: Format, rows: number, k: number) {
  const block = format.scales[0]?.block ?? (["all", "all"] as const);
  const width = Math.max(extentOf(block[1], k), 1);
  const columns = Math.ceil(k / width);
  return { width, columns, height: block[0] === "all" ? 0 : block[0], parametersAt: 2 * rows * columns };
}

/** The shared memory that one row takes in `quantize_rows`, past which no block of threads holds its parameters. */
const MOST_COLUMNS = 4096;

export const QUANTIZE_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/quantize",
    kind: "quantize",
    fusions: ["rmsnorm+quantize", "activation*mul+quantize", "activation+quantize"],
    entries: [ROWS, EXTREMES, ROW_EXTREMES, OUTER, CHOOSE, ENCODE, SCALER_MEAN, SCALERS],
    requires: [
      { unmet: (bound) => ruleObstacle(quantizeStep(bound).node.attrs.format) },
      {
        unmet: (bound) => {
          const { node } = quantizeStep(bound);
          const { format } = node.attrs;
          const { columns } = extents(format, 1, bound.shape(node.outputs[0] as ValueId).at(-1) as number);
          return !byRow(format) || columns <= MOST_COLUMNS
            ? null
            : `a row has ${columns} blocks: ${MOST_COLUMNS} fit the shared memory`;
        },
      },
      {
        unmet: (bound) => {
          const { node, input } = quantizeStep(bound);
          return input === "plain" || byRow(node.attrs.format)
            ? null
            : `what makes its input is fused where blocks lie in one row: ${node.attrs.format.name} has taller ones`;
        },
      },
    ],
    efficiency: { bandwidth: 0.5, compute: 0.05 },
    scratch: quantizeScratch,
    build: (context) => {
      const { node } = quantizeStep(context.bound);
      const { bindings, args } = quantizeJob(context, scratch);
      return passesOf(node.attrs.format, node.attrs.perTensorScale).map(
        (pass): NativeDispatch => ({ label: context.bound.describe(), entry: pass, bindings, args }),
      );
    },
  },
];

/** Bytes of scratch of a quantize in several passes, for as many rows as the graph allows. */
export function quantizeScratch(bound: BoundStep): number {
  const { node } = quantizeStep(bound);
  const { format } = node.attrs;
  const shape = bound
    .type(node.outputs[0] as ValueId)
    .shape.map((dim) => (typeof dim === "number" ? dim : (bound.graph.symbols[dim] as number)));
  const k = shape.at(-1) as number;
  const rows = shape.slice(0, -1).reduce((a, b) => a * b, 1);
  const { columns, parametersAt } = extents(format, rows, k);
  // Parameters: two words a block, and no more blocks than rows of them.
  return 4 * Math.max(byRow(format) ? 2 * rows : parametersAt + 2 * rows * columns, 4);
}

/** What every pass is given: `readQuantizeJob` of `quantize.cuh`. Kernels of one pass take no scratch. */
export function quantizeJob(context: BuildContext, room?: Source): Arguments {
  const { node, input, operands, norm, unary } = quantizeStep(context.bound);
  const out = node.outputs[0] as ValueId;
  const { format, heads, ...options } = node.attrs;
  const layout = context.layout(out);
  const [rows, k] = layout.shape;
  const { width, columns, height, parametersAt } = extents(format, rows, k);
  const [a, b] = operands;
  // What is split into heads is a value of its own, never columns of another.
  const given = (id: ValueId | undefined) => (id === undefined ? undefined : operand(context, id));
  const place = (id: ValueId) => (heads === undefined ? context.strided(id) : [k, 0]);
  return new Arguments()
    .int(...context.rowExtent(out), k, width, columns, height)
    .int(layout.rowStride, layout.scales[0] ?? 0, layout.scales[1] ?? 0, layout.zero)
    .buffer(value(out))
    .buffer(room)
    .int(parametersAt, format.scales.length > 0)
    .buffer(given(node.inputs[1]))
    .buffer(given(node.inputs[2]))
    .int(INPUTS.indexOf(input))
    .buffer(operand(context, a))
    .int(...place(a))
    .buffer(b === undefined ? undefined : operand(context, b))
    .int(...(b === undefined ? [0, 0] : place(b)))
    .buffer(norm === undefined ? undefined : operand(context, norm.inputs[1] as ValueId))
    .real(norm?.attrs.eps ?? 0)
    .unary(unary?.attrs)
    .rule(format, options);
}
