import type { Format } from "../formats/format.js";
import { cacheRows, type KeyRows } from "../ir/attention-shape.js";
import type { Node, ValueId } from "../ir/graph.js";
import type { BoundStep } from "../plan/step.js";

/** One stream of heads through the step: perhaps rotated, perhaps transformed, into a dense value, a stored one or a cache. */
export interface Stream {
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
export function streams(bound: BoundStep): Stream[] {
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
