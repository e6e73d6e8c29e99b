import type { Graph, Node, ValueId } from "../ir/graph.js";

/** Linears that read the same value, and where a scale of that value's columns could be folded into. */
export interface LinearGroup {
  /** The value that they read, before it is quantized on the fly. */
  readonly input: ValueId;
  /** Names of their weights. */
  readonly weights: readonly string[];
  /** What makes the value, if scaling its columns is scaling this; null where it is not, with the reason. */
  readonly producer: Producer | null;
  readonly reason: string;
}

export type Producer =
  /** Vectors [k] that multiply (and shift) the value's columns: the weights of a norm. */
  | { readonly kind: "vectors"; readonly names: readonly string[] }
  /** Rows of a linear's weight (and bias): column c of the value comes from row `rowOf(c)`, in which it is linear. */
  | {
      readonly kind: "rows";
      readonly weight: string;
      readonly bias?: string;
      readonly rowOf: (column: number) => number;
    };

/** The groups of the linears whose weights `take` accepts, in the order of the graph. */
export function linearGroups(graph: Graph, take: (weight: string) => boolean): LinearGroup[] {
  const makers = new Map<ValueId, Node>(graph.nodes.flatMap((node) => node.outputs.map((id) => [id, node] as const)));
  const name = (id: ValueId | undefined) => graph.values[id as ValueId]?.name as string;
  /** A value before the quantize node that may follow it. */
  const source = (id: ValueId): ValueId => {
    const node = makers.get(id);
    return node?.op === "quantize" ? (node.inputs[0] as ValueId) : id;
  };
  const groups = new Map<ValueId, string[]>();
  for (const node of graph.nodes) {
    if (node.op !== "linear" || !take(name(node.inputs[1]))) continue;
    const input = source(node.inputs[0] as ValueId);
    groups.set(input, [...(groups.get(input) ?? []), name(node.inputs[1])]);
  }
  const outputs = new Set(Object.values(graph.outputs));
  /** Whether nothing but these linears reads a value. */
  const readOnlyBy = (id: ValueId, weights: readonly string[]): boolean =>
    !outputs.has(id) &&
    graph.nodes.every(
      (node) =>
        !node.inputs.includes(id) ||
        (node.op === "quantize" && node.outputs.every((output) => readOnlyBy(output, weights))) ||
        (node.op === "linear" && weights.includes(name(node.inputs[1]))),
    );
  const rowsOf = (id: ValueId, rowOf: (column: number) => number): Producer | null => {
    const node = makers.get(id);
    const single = graph.nodes.filter((other) => other.inputs.includes(id)).length === 1;
    if (node?.op !== "linear" || !single || !take(name(node.inputs[1]))) return null;
    const bias = node.inputs[2];
    return { kind: "rows", weight: name(node.inputs[1]), rowOf, ...(bias === undefined ? {} : { bias: name(bias) }) };
  };
  const producerOf = (id: ValueId): Producer | null => {
    const node = makers.get(id);
    if (node?.op === "rmsnorm" || node?.op === "layernorm")
      return { kind: "vectors", names: node.inputs.slice(1).map(name) };
    if (node?.op === "binary" && node.attrs.fn === "mul")
      return rowsOf(node.inputs[1] as ValueId, (c) => c) ?? rowsOf(node.inputs[0] as ValueId, (c) => c);
    if (node?.op !== "sdpa") return null;
    // Values pass attention as they are: a mean over positions, head by head.
    const written = makers.get(node.inputs[2] as ValueId);
    const values = written?.op === "kv_write" ? (written.inputs[1] as ValueId) : (node.inputs[2] as ValueId);
    const { heads, kvHeads } = node.attrs;
    const type = graph.values[id]?.type.shape ?? [];
    const size = (type[1] as number) / heads;
    return rowsOf(values, (c) => Math.floor((Math.floor(c / size) * kvHeads) / heads) * size + (c % size));
  };
  return [...groups].map(([input, weights]) => {
    const alone = readOnlyBy(input, weights);
    const producer = alone ? producerOf(input) : null;
    const reason = alone
      ? `the input of ${weights.join(", ")} comes from ${makers.get(input)?.op ?? "outside"}`
      : `something else reads the input of ${weights.join(", ")}`;
    return { input, weights, producer, reason };
  });
}
