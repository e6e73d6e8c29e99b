import { FewbitError } from "../core/errors.js";
import type { Symbols } from "../ir/evaluate.js";
import { concreteShape, type Graph, type Node, showType, type TensorType, type ValueId } from "../ir/graph.js";
import { OPS } from "../ir/ops.js";
import { typeBytes } from "../ir/tensor.js";

/** The families of kernels: a step of a kind is what one kernel of that kind can do. */
export type StepKind =
  | "embedding"
  | "rmsnorm"
  | "layernorm"
  | "linear"
  | "conv2d"
  | "rope_kv"
  | "sdpa"
  | "moe_route"
  | "moe_linear"
  | "moe_combine"
  | "elementwise"
  | "quantize"
  | "dequantize"
  | "last_row"
  | "sample";

/**
 * Nodes that run as one. Running `nodes` in order is the definition of the step. `inputs` are values made outside that the
 * step reads, `outputs` values it makes that are read outside; what stays inside is in neither.
 */
export interface Step {
  readonly id: number;
  readonly kind: StepKind;
  readonly nodes: readonly Node[];
  /** The fusion that made the step, if any. */
  readonly fusion?: string;
  readonly inputs: readonly ValueId[];
  readonly outputs: readonly ValueId[];
}

const KIND_OF: Readonly<Record<Node["op"], StepKind>> = {
  embedding: "embedding",
  rmsnorm: "rmsnorm",
  layernorm: "layernorm",
  linear: "linear",
  conv2d: "conv2d",
  rope: "rope_kv",
  hadamard: "rope_kv",
  kv_write: "rope_kv",
  sdpa: "sdpa",
  moe_route: "moe_route",
  moe_linear: "moe_linear",
  moe_combine: "moe_combine",
  unary: "elementwise",
  binary: "elementwise",
  quantize: "quantize",
  dequantize: "dequantize",
  last_row: "last_row",
  sample: "sample",
};

export function kindOf(node: Node): StepKind {
  return KIND_OF[node.op];
}

/** Operands that a description names: a mixture of experts has one for each. */
const SHOWN = 10;

/** A step under concrete extents: what kernels ask about. */
export class BoundStep {
  readonly step: Step;
  readonly graph: Graph;
  readonly symbols: Symbols;

  constructor(graph: Graph, step: Step, symbols: Symbols) {
    this.graph = graph;
    this.step = step;
    this.symbols = symbols;
  }

  type(id: ValueId): TensorType {
    const value = this.graph.values[id];
    if (value === undefined)
      throw new FewbitError("graph/invalid", { where: `value ${id}`, reason: "it does not exist" });
    return value.type;
  }

  name(id: ValueId): string {
    return this.graph.values[id]?.name ?? `value ${id}`;
  }

  shape(id: ValueId): number[] {
    return concreteShape(this.type(id).shape, this.symbols);
  }

  /** Bytes that the step must move once: everything it reads and writes; of experts, as many as there are slots for them. */
  get bytes(): number {
    const { kind, inputs, outputs } = this.step;
    const size = (ids: readonly ValueId[]) => ids.reduce((sum, id) => sum + typeBytes(this.type(id), this.symbols), 0);
    const experts = kind === "moe_linear" ? inputs.filter((id) => this.graph.values[id]?.role === "weight") : [];
    const others = [...new Set([...inputs, ...outputs])].filter((id) => !experts.includes(id));
    return size(others) + size(experts) * Math.min(1, this.outputRows / Math.max(experts.length, 1));
  }

  get flops(): number {
    return this.step.nodes.reduce((sum, node) => {
      const flops = OPS[node.op].flops as (shapes: number[][], attrs: unknown) => number;
      return (
        sum +
        flops(
          node.inputs.map((id) => this.shape(id)),
          node.attrs,
        )
      );
    }, 0);
  }

  /** Rows of the step's first output, leading dimensions folded. */
  get outputRows(): number {
    const first = this.step.outputs[0];
    return first === undefined
      ? 0
      : this.shape(first)
          .slice(0, -1)
          .reduce((a, b) => a * b, 1);
  }

  describe(): string {
    const { id, kind, nodes, inputs, fusion } = this.step;
    const operands = inputs.slice(0, SHOWN).map((input) => `${this.name(input)} ${showType(this.type(input))}`);
    if (inputs.length > SHOWN) operands.push(`${inputs.length - SHOWN} more`);
    const how = fusion === undefined ? "" : `  (${fusion}: ${nodes.map((node) => node.op).join("+")})`;
    return `${kind} #${id}${how}  ${operands.join(", ")}`;
  }
}
