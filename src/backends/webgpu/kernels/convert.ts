import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { type BuildContext, type Dispatch, read, value, type WebGpuKernel, write } from "../kernel.js";
import { dequantizeKernel } from "./dequantize.js";
import { type KernelText, quantizeKernel, quantizeObstacle } from "./quantize.js";

/** The steps that only change how values are stored. */
export const CONVERT_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/quantize",
    kind: "quantize",
    requires: [
      {
        unmet: (bound) => {
          const { attrs, inputs } = nodeOf<"quantize">(bound);
          return quantizeObstacle(attrs.format, inputs.length > 1);
        },
      },
    ],
    efficiency: { bandwidth: 0.3, compute: 0.1 },
    scratch: (bound) => quantizeText(bound, bound.graph.symbols, {}).scratchWords * 4,
    build: (context) => {
      const [x] = nodeOf<"quantize">(context.bound).inputs as [ValueId];
      const { attrs, outputs } = nodeOf<"quantize">(context.bound);
      const rowsExpression = context.rowsWgsl(outputs[0] as ValueId);
      // What is split into heads is a value of its own, never columns of another.
      const { stride, column } = context.placement(attrs.heads === undefined ? x : (outputs[0] as ValueId));
      return passes(context, quantizeText(context.bound, context.capacity, { rowsExpression, x: { stride, column } }));
    },
  },
  {
    id: "webgpu/dequantize",
    kind: "dequantize",
    requires: [],
    efficiency: { bandwidth: 0.3, compute: 0.1 },
    build: (context) => {
      const [x] = nodeOf<"dequantize">(context.bound).inputs as [ValueId];
      const { format, shape } = context.layout(x);
      return passes(
        context,
        dequantizeKernel(format, shape[1], shape[0], {
          ...nodeOf<"dequantize">(context.bound).attrs,
          rowsExpression: context.rowsWgsl(x),
        }),
      );
    },
  },
];

function nodeOf<Op extends "quantize" | "dequantize">(bound: BoundStep): Node<Op> {
  return bound.step.nodes[0] as Node<Op>;
}

function quantizeText(
  bound: BoundStep,
  capacity: Readonly<Record<string, number>>,
  options: Parameters<typeof quantizeKernel>[3],
): KernelText {
  const { attrs, inputs, outputs } = nodeOf<"quantize">(bound);
  const shape = bound
    .type(outputs[0] as ValueId)
    .shape.map((dim) => (typeof dim === "number" ? dim : (capacity[dim] as number)));
  const k = shape.at(-1) as number;
  const { format, heads: _, ...rule } = attrs;
  return quantizeKernel(
    format,
    k,
    shape.slice(0, -1).reduce((a, b) => a * b, 1),
    { ...rule, ...options, given: (["given_scale", "given_zero"] as const).slice(0, inputs.length - 1) },
  );
}

function passes(context: BuildContext, text: KernelText): Dispatch[] {
  const node = context.bound.step.nodes[0] as Node<"quantize" | "dequantize">;
  const [x, out] = [node.inputs[0] as ValueId, node.outputs[0] as ValueId];
  const given = (i: number) => read(value(context.placement(node.inputs[i] as ValueId).root));
  const bind = {
    x: read(value(context.placement(x).root)),
    get given_scale() {
      return given(1);
    },
    get given_zero() {
      return given(2);
    },
    out: write(value(out)),
    scratch: write({ kind: "scratch" }),
  };
  return text.passes.map((pass) => ({
    label: context.bound.describe(),
    wgsl: pass.wgsl,
    bindings: pass.bindings.flatMap((name) => (name === "params" ? [] : [bind[name]])),
    workgroups: (symbols) => pass.workgroups(context.rows(node.op === "quantize" ? out : x, symbols)),
  }));
}
