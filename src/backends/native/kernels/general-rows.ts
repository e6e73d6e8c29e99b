import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { type BuildContext, type Entry, type NativeDispatch, type NativeKernel, value } from "../kernel.js";
import { Arguments, operand } from "./general-arguments.js";

const NORM: Entry = { name: "general/norm", abi: 1 };
const SAMPLE: Entry = { name: "general/sample", abi: 1 };
const ROUTE: Entry = { name: "general/moe_route", abi: 1 };

/** Why a norm's weights cannot be read before earlier kernels are complete, or null. */
export function earlyObstacle(bound: BoundStep, { inputs }: Node<"rmsnorm" | "layernorm">): string | null {
  const made = inputs.slice(1).find((id) => bound.graph.values[id]?.role !== "weight");
  return made === undefined ? null : `${bound.name(made)} is no weight: it may be made by an earlier step`;
}

/** A norm as `readNorm` of `norm.cuh` takes it. */
export function normOf(context: BuildContext, entry: Entry): NativeDispatch[] {
  const node = context.bound.step.nodes[0] as Node<"rmsnorm" | "layernorm">;
  const [x, weight, bias] = node.inputs as readonly [ValueId, ValueId, ValueId?];
  const out = node.outputs[0] as ValueId;
  const groups = node.op === "rmsnorm" ? (node.attrs.groups ?? 1) : 1;
  const { bindings, args } = new Arguments()
    .int(...context.rowExtent(out), groups, context.lastExtent(out) / groups)
    .buffer(operand(context, x))
    .int(...context.strided(x))
    .buffer(operand(context, weight))
    .buffer(bias === undefined ? undefined : operand(context, bias))
    .buffer(value(out))
    .int(...context.strided(out))
    .real(node.attrs.eps)
    .int(node.op === "layernorm");
  return [{ label: context.bound.describe(), entry, bindings, args }];
}

/** A draw as `readSample` of `sample.cuh` takes it. */
export function sampleOf(context: BuildContext, entry: Entry): NativeDispatch[] {
  const { inputs, outputs } = context.bound.step.nodes[0] as Node<"sample">;
  const [logits, settings, ids] = inputs as [ValueId, ValueId, ValueId];
  const { bindings, args } = new Arguments()
    .buffer(operand(context, logits))
    .int(context.lastExtent(logits))
    .buffer(operand(context, settings))
    .buffer(value(ids))
    .buffer(value(outputs[0] as ValueId));
  return [{ label: context.bound.describe(), entry, bindings, args }];
}

/** Kernels that work on whole rows: norms and choices among logits. */
export const ROW_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/rmsnorm",
    kind: "rmsnorm",
    entries: [NORM],
    requires: [],
    efficiency: { bandwidth: 0.5, compute: 0.05 },
    build: (context) => normOf(context, NORM),
  },
  {
    id: "cuda/layernorm",
    kind: "layernorm",
    entries: [NORM],
    requires: [],
    efficiency: { bandwidth: 0.5, compute: 0.05 },
    build: (context) => normOf(context, NORM),
  },
  {
    id: "cuda/sample",
    kind: "sample",
    entries: [SAMPLE],
    requires: [],
    efficiency: { bandwidth: 0.02, compute: 0.01 },
    build: (context) => sampleOf(context, SAMPLE),
  },
  {
    id: "cuda/moe_route",
    kind: "moe_route",
    entries: [ROUTE],
    requires: [],
    efficiency: { bandwidth: 0.2, compute: 0.02 },
    build: (context) => {
      const { inputs, outputs, attrs } = context.bound.step.nodes[0] as Node<"moe_route">;
      const [logits] = inputs as [ValueId];
      const { bindings, args } = new Arguments()
        .int(...context.rowExtent(logits), context.lastExtent(logits), attrs.top, attrs.normalize)
        .buffer(operand(context, logits))
        .int(...context.strided(logits))
        .buffer(value(outputs[0] as ValueId))
        .buffer(value(outputs[1] as ValueId));
      return [{ label: context.bound.describe(), entry: ROUTE, bindings, args }];
    },
  },
];
