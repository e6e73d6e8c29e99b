import type { Symbols } from "../ir/evaluate.js";
import type { Graph, ValueId } from "../ir/graph.js";
import { OPS } from "../ir/ops.js";
import { typeBytes } from "../ir/tensor.js";
import type { Step } from "./step.js";

/** Where a step's value lives: columns `column .. column + width` of the rows of `root`, whose rows are `stride` wide. */
export interface Placement {
  readonly root: ValueId;
  readonly column: number;
  readonly stride: number;
}

/** Memory of the activations: values that are never alive together share a slot. Sizes in bytes. */
export interface MemoryPlan {
  readonly slots: readonly number[];
  /** The slot of each value that owns storage. */
  readonly slotOf: ReadonlyMap<ValueId, number>;
  /** Steps [first, last] over which each value is alive. */
  readonly live: ReadonlyMap<ValueId, readonly [first: number, last: number]>;
  /** Values stored inside another one: members of a grouped linear, and in-place results. */
  readonly placement: ReadonlyMap<ValueId, Placement>;
}

/**
 * Assigns a slot to every value that a step makes. A value lives from the step that makes it to the last that reads it (or
 * reads something placed inside it); graph outputs live to the end. Slots are filled largest value first, best fit.
 */
export function planMemory(graph: Graph, steps: readonly Step[], symbols: Symbols): MemoryPlan {
  const placement = placements(graph, steps);
  const root = (id: ValueId): ValueId => placement.get(id)?.root ?? id;
  const live = lifetimes(graph, steps, root);
  const bytes = new Map<ValueId, number>();
  for (const id of live.keys()) bytes.set(id, rootBytes(graph, id, placement, symbols));

  const slots: { bytes: number; taken: (readonly [number, number])[] }[] = [];
  const slotOf = new Map<ValueId, number>();
  const bySize = [...live.keys()].sort((a, b) => (bytes.get(b) as number) - (bytes.get(a) as number) || a - b);
  for (const id of bySize) {
    const [first, last] = live.get(id) as readonly [number, number];
    let slot = slots.findIndex((candidate) => candidate.taken.every(([from, to]) => last < from || to < first));
    if (slot < 0) slot = slots.push({ bytes: bytes.get(id) as number, taken: [] }) - 1;
    slots[slot]?.taken.push([first, last]);
    slotOf.set(id, slot);
  }
  return { slots: slots.map((slot) => slot.bytes), slotOf, live, placement };
}

/** Steps that a backend may run together with the step behind them: what they read is kept for that one too. */
const TOGETHER: Partial<Record<Step["kind"], Step["kind"]>> = { linear: "rope_kv" };

/** In-place results sit on their operand; a grouped linear's outputs are column ranges of its first output. */
function placements(graph: Graph, steps: readonly Step[]): Map<ValueId, Placement> {
  const placement = new Map<ValueId, Placement>();
  const width = (id: ValueId): number => {
    const shape = graph.values[id]?.type.shape ?? [];
    return shape[shape.length - 1] as number;
  };
  for (const step of steps) {
    for (const node of step.nodes) {
      for (const [output, input] of Object.entries(OPS[node.op].aliases ?? {})) {
        const target = node.inputs[input] as ValueId;
        const base = placement.get(target) ?? { root: target, column: 0, stride: width(target) };
        placement.set(node.outputs[Number(output)] as ValueId, base);
      }
    }
    if (step.kind !== "linear" || step.outputs.length < 2) continue;
    const stride = step.outputs.reduce((sum, id) => sum + width(id), 0);
    let column = 0;
    for (const id of step.outputs) {
      placement.set(id, { root: step.outputs[0] as ValueId, column, stride });
      column += width(id);
    }
  }
  return placement;
}

function lifetimes(graph: Graph, steps: readonly Step[], root: (id: ValueId) => ValueId) {
  const live = new Map<ValueId, readonly [number, number]>();
  const owns = (id: ValueId) => graph.values[id]?.role === "value";
  for (const [at, step] of steps.entries()) {
    const end = TOGETHER[step.kind] === steps[at + 1]?.kind ? at + 1 : at;
    for (const id of [...step.outputs, ...step.inputs].map(root).filter(owns)) {
      live.set(id, [live.get(id)?.[0] ?? at, end]);
    }
  }
  for (const id of Object.values(graph.outputs).map(root).filter(owns)) {
    live.set(id, [live.get(id)?.[0] ?? 0, Number.POSITIVE_INFINITY]);
  }
  return live;
}

function rootBytes(graph: Graph, id: ValueId, placement: ReadonlyMap<ValueId, Placement>, symbols: Symbols): number {
  const type = (graph.values[id] as Graph["values"][number]).type;
  const group = placement.get(id);
  if (group?.root !== id) return typeBytes(type, symbols);
  return typeBytes({ ...type, shape: [...type.shape.slice(0, -1), group.stride] }, symbols);
}
