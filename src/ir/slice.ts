import type { Graph, Node, Value, ValueId } from "./graph.js";

/** What is left of a graph when only some of its nodes are run. */
export interface Slice {
  readonly graph: Graph;
  /** The inputs that take the place of values made by earlier nodes: name in the slice by id in the whole graph. */
  readonly taken: ReadonlyMap<ValueId, string>;
}

/**
 * Nodes [begin, end) of a graph as a graph of their own. Values that earlier nodes make become inputs, `keep` (ids of the whole
 * graph, made by these nodes) become outputs under the names of `valueName`; weights, states and inputs keep their names. `retype`
 * may change the types of weights.
 */
export function sliceGraph(
  graph: Graph,
  [begin, end]: readonly [begin: number, end: number],
  keep: readonly ValueId[],
  retype: (value: Value) => Value["type"] = ({ type }) => type,
): Slice {
  const nodes = graph.nodes.slice(begin, end);
  const made = new Set(nodes.flatMap((node) => node.outputs));
  const values: Value[] = [];
  const ids = new Map<ValueId, ValueId>();
  const taken = new Map<ValueId, string>();
  const place = (id: ValueId): ValueId => {
    const known = ids.get(id);
    if (known !== undefined) return known;
    const value = graph.values[id] as Value;
    const outside = value.role === "value" && !made.has(id);
    const placed = {
      id: values.length,
      name: outside ? valueName(id) : value.name,
      role: outside ? ("input" as const) : value.role,
      type: value.role === "weight" ? retype(value) : value.type,
    };
    if (outside) taken.set(id, placed.name);
    values.push(placed);
    ids.set(id, placed.id);
    return placed.id;
  };
  const placed = nodes.map(
    (node) => ({ ...node, inputs: node.inputs.map(place), outputs: node.outputs.map(place) }) as Node,
  );
  const outputs = Object.fromEntries(keep.map((id) => [valueName(id), ids.get(id) as ValueId]));
  return { graph: { symbols: graph.symbols, values, nodes: placed, outputs }, taken };
}

export const valueName = (id: ValueId): string => `value ${id}`;
