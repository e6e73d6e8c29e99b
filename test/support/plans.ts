import type { Graph, Node, ValueId } from "../../src/ir/graph.js";
import { OPS } from "../../src/ir/ops.js";
import type { Step } from "../../src/plan/step.js";

/** The values that a node updates in place. */
export function updates({ op, inputs }: Node): ValueId[] {
  return Object.values(OPS[op].aliases ?? {}).map((input) => inputs[input] as ValueId);
}

/** What is wrong with steps as a schedule of a graph; nothing, for a legal one. */
export function scheduleFaults(graph: Graph, steps: readonly Step[]): string[] {
  const faults: string[] = [];
  const order = steps.flatMap((step) => step.nodes);
  if (order.length !== graph.nodes.length || new Set(order).size !== order.length)
    faults.push("not every node exactly once");
  for (const node of graph.nodes) if (!order.includes(node)) faults.push(`${node.op} -> ${node.outputs} is missing`);
  const known = new Set(graph.values.filter((value) => value.role !== "value").map((value) => value.id));
  const stale = new Set<ValueId>();
  for (const node of order) {
    for (const id of node.inputs) {
      if (!known.has(id)) faults.push(`${node.op} reads ${id} before it is made`);
      if (stale.has(id)) faults.push(`${node.op} reads ${id} after it was updated in place`);
    }
    for (const id of node.outputs) known.add(id);
    for (const id of updates(node)) stale.add(id);
  }
  for (const { id, fusion, nodes, outputs } of steps) {
    const single = fusion !== undefined && ["gate*up", "linear+residual", "linear+activation"].includes(fusion);
    if (single && outputs.join() !== nodes.at(-1)?.outputs.join())
      faults.push(`step ${id} shows what ${fusion} swallows`);
  }
  for (const step of steps) {
    const inside = new Set(step.nodes.flatMap((node) => node.outputs));
    const read = new Set(step.nodes.flatMap((node) => node.inputs).filter((id) => !inside.has(id)));
    if ([...read].sort().join() !== [...step.inputs].sort().join())
      faults.push(`step ${step.id} declares other inputs`);
    for (const id of Object.values(graph.outputs)) {
      if (inside.has(id) && !step.outputs.includes(id)) faults.push(`step ${step.id} hides the graph output ${id}`);
    }
    for (const other of steps) {
      if (other === step) continue;
      for (const id of other.inputs) {
        if (inside.has(id) && !step.outputs.includes(id))
          faults.push(`step ${step.id} hides ${id}, which ${other.id} reads`);
      }
    }
  }
  return faults;
}
