import { FewbitError } from "../core/errors.js";
import type { Format } from "../formats/format.js";
import type { Node, ValueId } from "../ir/graph.js";
import type { UnaryFn } from "../ir/ops.js";
import type { BoundStep } from "../plan/step.js";

/** What happens to a linear's sums before they are stored. */
export type Epilogue =
  | { readonly kind: "none" }
  | { readonly kind: "residual"; readonly other: ValueId }
  | { readonly kind: "unary"; readonly fn: UnaryFn }
  | { readonly kind: "gated"; readonly fn: UnaryFn };

/** A step of kind `linear`, taken apart. */
export interface LinearStep {
  readonly x: ValueId;
  /** The weights of each output; for a gated step [gate, up], else all concatenated. */
  readonly parts: readonly (readonly ValueId[])[];
  /** Biases of each part, or none. */
  readonly biases: readonly (readonly ValueId[])[];
  readonly epilogue: Epilogue;
  readonly out: ValueId;
  /** The format without scales to which `out` is rounded when it is stored; null: `out` is dense float32. */
  readonly rounds: Format | null;
  readonly k: number;
  /** Whether every linear of the step declares short sums. */
  readonly fastAccum: boolean;
}

export function linearStep(bound: BoundStep): LinearStep {
  const { nodes, outputs } = bound.step;
  const linears = nodes.filter((node): node is Node<"linear"> => node.op === "linear");
  const unary = nodes.find((node): node is Node<"unary"> => node.op === "unary");
  const binary = nodes.find((node): node is Node<"binary"> => node.op === "binary");
  const quantize = nodes.find((node): node is Node<"quantize"> => node.op === "quantize");
  const first = linears[0];
  if (first === undefined)
    throw new FewbitError("graph/invalid", { where: bound.describe(), reason: "it holds no linear" });
  let epilogue: Epilogue = { kind: "none" };
  let ordered = linears;
  if (unary !== undefined && binary !== undefined) {
    epilogue = { kind: "gated", fn: unary.attrs.fn };
    ordered = [...linears].sort(
      (a, b) => Number(b.outputs[0] === unary.inputs[0]) - Number(a.outputs[0] === unary.inputs[0]),
    );
  } else if (unary !== undefined) epilogue = { kind: "unary", fn: unary.attrs.fn };
  else if (binary !== undefined) {
    epilogue = { kind: "residual", other: binary.inputs.find((id) => id !== first.outputs[0]) as ValueId };
  }
  const weights = ordered.map((node) => node.inputs[1] as ValueId);
  const biases = ordered.flatMap((node) => (node.inputs[2] === undefined ? [] : [node.inputs[2]]));
  const gated = epilogue.kind === "gated";
  const x = first.inputs[0] as ValueId;
  return {
    x,
    parts: gated ? weights.map((id) => [id]) : [weights],
    biases: biases.length === 0 ? [] : gated ? biases.map((id) => [id]) : [biases],
    epilogue,
    out: outputs[0] as ValueId,
    rounds: quantize?.attrs.format ?? null,
    k: bound.shape(x).at(-1) as number,
    fastAccum: linears.every(({ attrs }) => attrs.fastAccum === true),
  };
}
