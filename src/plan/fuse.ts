import { FewbitError } from "../core/errors.js";
import { formatKey, rowsObstacle } from "../formats/format.js";
import type { Graph, Node, ValueId } from "../ir/graph.js";
import { OPS } from "../ir/ops.js";
import { kindOf, type Step, type StepKind } from "./step.js";

/** Who reads what, for the patterns below. */
interface View {
  readonly graph: Graph;
  readonly producer: ReadonlyMap<ValueId, number>;
  readonly readers: ReadonlyMap<ValueId, readonly number[]>;
  free(index: number): boolean;
}

/**
 * A fusion groups existing nodes into one step and never invents one. `match` is asked about every free node in order and
 * answers with the indices of the group that starts there.
 */
interface Fusion {
  readonly name: string;
  readonly kind: StepKind;
  /** Done only where a kernel of the device takes the step (`KernelRow.fusions`). */
  readonly optional?: true;
  match(view: View, index: number): number[] | null;
}

const nodeAt = (view: View, index: number): Node => view.graph.nodes[index] as Node;
const result = (node: Node): ValueId => node.outputs[0] as ValueId;

/** The only reader of a value, if there is exactly one, it is free and it is an `op`; outputs of the graph have none. */
function soleReader(view: View, id: ValueId, op: Node["op"]): number | null {
  const readers = view.readers.get(id) ?? [];
  const index = readers[0];
  if (readers.length !== 1 || index === undefined || !view.free(index) || nodeAt(view, index).op !== op) return null;
  return index;
}

/** The activation that alone reads a linear; a soft-cap, which has a number of its own, stays a step. */
function activationOf(view: View, linear: Node): number | null {
  const index = soleReader(view, result(linear), "unary");
  return index === null || (nodeAt(view, index) as Node<"unary">).attrs.fn === "softcap" ? null : index;
}

function weightFormat(view: View, node: Node): string {
  const type = view.graph.values[node.inputs[1] as ValueId]?.type;
  return type?.kind === "format" ? formatKey(type.format) : "";
}

/** The free linears that read `x`, with weights of one format and no table of their own to keep apart. */
function siblings(view: View, index: number): number[] {
  const node = nodeAt(view, index);
  const x = node.inputs[0] as ValueId;
  return (view.readers.get(x) ?? []).filter((other) => {
    if (!view.free(other)) return false;
    const sibling = nodeAt(view, other);
    if (sibling.op !== "linear" || sibling.inputs[0] !== x || sibling.inputs.length !== node.inputs.length)
      return false;
    const alike = Boolean(sibling.attrs.fastAccum) === Boolean((node as Node<"linear">).attrs.fastAccum);
    return alike && weightFormat(view, sibling) === weightFormat(view, node);
  });
}

/** Whether rows of weights in this format can be laid one after another: no block may span two weights. */
function concatenable(view: View, indices: readonly number[]): boolean {
  return indices.every((index) => {
    const type = view.graph.values[nodeAt(view, index).inputs[1] as ValueId]?.type;
    if (type?.kind !== "format") return false;
    if (type.format.element.kind === "lut" && type.format.element.entries === "learned") return false;
    const rows = type.shape[0] as number;
    return type.format.scales.every(({ block }) => block[0] === "all" || rows % block[0] === 0);
  });
}

/** Whether a group's cache writes find their rows alike, and everything that is quantized takes one format. */
function sameRows(view: View, group: readonly number[]): boolean {
  const formats = new Set<string>();
  const rows = new Set<string>();
  for (const node of group.map((index) => nodeAt(view, index))) {
    if (node.op === "quantize") {
      if (node.attrs.heads === undefined) return false;
      formats.add(formatKey(node.attrs.format));
    } else if (node.op === "kv_write") {
      const type = view.graph.values[node.inputs[0] as ValueId]?.type;
      if (type?.kind === "format") formats.add(formatKey(type.format));
      rows.add(JSON.stringify([type?.shape, node.attrs, node.inputs[2]]));
    }
  }
  return formats.size === 1 && rows.size === 1;
}

/**
 * The quantize that alone reads a value and looks at its rows one by one, so that a row can be made and quantized at once; for the one
 * scale of a tensor a row is made twice.
 */
function rowQuantizeOf(view: View, id: ValueId): number | null {
  const index = soleReader(view, id, "quantize");
  // Scales that are given are operands of their own, which no fused kernel reads.
  if (index === null || nodeAt(view, index).inputs.length > 1) return null;
  const { format, heads } = (nodeAt(view, index) as Node<"quantize">).attrs;
  const { scales } = format;
  const ofTensor = scales.length === 1 && scales[0]?.block.every((extent) => extent === "all") === true;
  const byRow = rowsObstacle(format) === null && (ofTensor || scales.every(({ block }) => block[0] === 1));
  return byRow && heads === undefined ? index : null;
}

const gated: Fusion = {
  name: "gate*up",
  kind: "linear",
  match: (view, index) => {
    const gate = nodeAt(view, index);
    if (gate.op !== "linear") return null;
    const activation = activationOf(view, gate);
    if (activation === null) return null;
    const product = soleReader(view, result(nodeAt(view, activation)), "binary");
    if (product === null) return null;
    const multiply = nodeAt(view, product) as Node<"binary">;
    const other = multiply.inputs.find((id) => id !== result(nodeAt(view, activation)));
    const up = other === undefined ? undefined : view.producer.get(other);
    if (multiply.attrs.fn !== "mul" || other === undefined || up === undefined || !siblings(view, index).includes(up))
      return null;
    if (up === index || soleReader(view, other, "binary") !== product || !concatenable(view, [index, up])) return null;
    return [index, up, activation, product];
  },
};

const activation: Fusion = {
  name: "linear+activation",
  kind: "linear",
  match: (view, index) => {
    if (nodeAt(view, index).op !== "linear") return null;
    const unary = activationOf(view, nodeAt(view, index));
    return unary === null ? null : [index, unary];
  },
};

const attention: Fusion = {
  name: "sdpa",
  kind: "sdpa",
  match: (view, index) => (nodeAt(view, index).op === "sdpa" ? [index] : null),
};

/** A group whose result, that of its last node, is read only by a quantize to a format without scales: it rounds what it stores. */
const rounded = (fusion: Fusion): Fusion => ({
  name: `${fusion.name}+quantize`,
  kind: fusion.kind,
  optional: true,
  match: (view, index) => {
    const group = fusion.match(view, index);
    const quantize = group === null ? null : rowQuantizeOf(view, result(nodeAt(view, group.at(-1) as number)));
    if (group === null || quantize === null) return null;
    const { format, dtype } = (nodeAt(view, quantize) as Node<"quantize">).attrs;
    return format.scales.length === 0 && dtype === undefined ? [...group, quantize] : null;
  },
});

/** The fusions, in the order they are tried. */
export const FUSIONS: readonly Fusion[] = [
  rounded(gated),
  gated,
  {
    name: "qkv",
    kind: "linear",
    match: (view, index) => {
      if (nodeAt(view, index).op !== "linear") return null;
      const group = siblings(view, index).filter((other) =>
        (view.readers.get(result(nodeAt(view, other))) ?? [-1]).every((reader) => {
          const op = view.graph.nodes[reader]?.op;
          return op === "rope" || op === "kv_write" || op === "hadamard" || op === "rmsnorm";
        }),
      );
      return group.length > 1 && group.includes(index) && concatenable(view, group) ? group : null;
    },
  },
  {
    name: "linear+residual",
    kind: "linear",
    match: (view, index) => {
      if (nodeAt(view, index).op !== "linear") return null;
      const add = soleReader(view, result(nodeAt(view, index)), "binary");
      const node = add === null ? undefined : (nodeAt(view, add) as Node<"binary">);
      return add !== null && node?.attrs.fn === "add" && node.inputs[0] !== node.inputs[1] ? [index, add] : null;
    },
  },
  rounded(activation),
  activation,
  rounded(attention),
  {
    name: "rope+kv_write",
    kind: "rope_kv",
    match: (view, index) => {
      const first = nodeAt(view, index);
      if (first.op !== "rope") return null;
      // One layer's ropes share a table and are followed by its cache writes; in between, what was rotated (and the values)
      // may be transformed, and a query quantized.
      const group: number[] = [];
      const count = { rope: 0, hadamard: 0, kv_write: 0, quantize: 0 };
      for (let i = index; i < view.graph.nodes.length && view.free(i); i++) {
        const node = nodeAt(view, i);
        if (node.op !== "rope" && node.op !== "kv_write" && node.op !== "quantize" && node.op !== "hadamard") break;
        if (node.op === "quantize" && node.inputs.length > 1) break;
        if (node.op === "quantize" && !group.includes(view.producer.get(node.inputs[0] as ValueId) ?? -1)) break;
        if ("position" in node.attrs && node.attrs.position !== first.attrs.position) break;
        count[node.op]++;
        group.push(i);
      }
      return count.rope === 2 && count.kv_write === 2 && sameRows(view, group) ? group : null;
    },
  },
  {
    name: "rmsnorm+quantize",
    kind: "quantize",
    optional: true,
    match: (view, index) => {
      const norm = nodeAt(view, index);
      if (norm.op !== "rmsnorm" || (norm.attrs.groups ?? 1) !== 1) return null;
      const quantize = rowQuantizeOf(view, result(norm));
      return quantize === null ? null : [index, quantize];
    },
  },
  {
    name: "activation*mul+quantize",
    kind: "quantize",
    optional: true,
    match: (view, index) => {
      if (nodeAt(view, index).op !== "unary") return null;
      const product = soleReader(view, result(nodeAt(view, index)), "binary");
      const node = product === null ? null : (nodeAt(view, product) as Node<"binary">);
      if (product === null || node?.attrs.fn !== "mul" || node.inputs[0] === node.inputs[1]) return null;
      const quantize = rowQuantizeOf(view, result(node));
      return quantize === null ? null : [index, product, quantize];
    },
  },
  {
    name: "activation+quantize",
    kind: "quantize",
    optional: true,
    match: (view, index) => {
      if (nodeAt(view, index).op !== "unary") return null;
      const quantize = rowQuantizeOf(view, result(nodeAt(view, index)));
      return quantize === null ? null : [index, quantize];
    },
  },
];

const OPTIONAL: ReadonlySet<string> = new Set(FUSIONS.flatMap(({ name, optional }) => (optional ? [name] : [])));

/** Whether a step of this fusion may be given only to kernels that name it. */
export const isOptional = (fusion: string | undefined): boolean => fusion !== undefined && OPTIONAL.has(fusion);

/**
 * Groups a graph's nodes into steps, in an order that respects every dependency. `enabled: false` makes one step a node; `admits`
 * says whether a kernel of the device takes a step of an optional fusion.
 */
export function fuse(graph: Graph, enabled = true, admits: (step: Step) => boolean = () => false): Step[] {
  const groupOf = new Map<number, number>();
  const groups: { indices: number[]; fusion: Fusion | undefined }[] = [];
  const view = viewOf(graph, groupOf);
  const claim = (indices: number[], fusion: Fusion | undefined) => {
    for (const index of indices) groupOf.set(index, groups.length);
    groups.push({ indices: [...indices].sort((a, b) => a - b), fusion });
  };
  for (const fusion of enabled ? FUSIONS : []) {
    for (let index = 0; index < graph.nodes.length; index++) {
      if (!view.free(index)) continue;
      const indices = fusion.match(view, index);
      if (indices === null) continue;
      if (!fusion.optional || admits(makeStep(graph, view, indices, fusion, groups.length))) claim(indices, fusion);
    }
  }
  for (let index = 0; index < graph.nodes.length; index++) if (view.free(index)) claim([index], undefined);
  return order(graph, groups, view).map((group, id) => makeStep(graph, view, group.indices, group.fusion, id));
}

function viewOf(graph: Graph, groupOf: ReadonlyMap<number, number>): View {
  const producer = new Map<ValueId, number>();
  const readers = new Map<ValueId, number[]>();
  for (const [index, node] of graph.nodes.entries()) {
    for (const id of node.outputs) producer.set(id, index);
    for (const id of new Set(node.inputs)) readers.set(id, [...(readers.get(id) ?? []), index]);
  }
  // A graph output has a reader outside the graph, so it is never the inside of a step.
  for (const id of Object.values(graph.outputs)) readers.set(id, [...(readers.get(id) ?? []), -1]);
  return { graph, producer, readers, free: (index) => index >= 0 && !groupOf.has(index) };
}

/** Sorts groups so that every value is made before it is read; in-place updates follow earlier readers of the old value. */
function order<G extends { indices: number[] }>(graph: Graph, groups: readonly G[], view: View): G[] {
  const groupOf = new Map<number, number>();
  for (const [g, group] of groups.entries()) for (const index of group.indices) groupOf.set(index, g);
  const needs = groups.map((group, g) => {
    const before = new Set<number>();
    for (const index of group.indices) {
      for (const id of (graph.nodes[index] as Node).inputs) {
        const made = view.producer.get(id);
        const from = made === undefined ? undefined : groupOf.get(made);
        if (from !== undefined && from !== g) before.add(from);
      }
      for (const reader of overwritten(graph.nodes[index] as Node).flatMap((id) => view.readers.get(id) ?? [])) {
        const from = groupOf.get(reader);
        if (from !== undefined && from !== g) before.add(from);
      }
    }
    return before;
  });
  const done = new Set<number>();
  const sorted: G[] = [];
  const pending = groups.map((_, g) => g).sort((a, b) => last(groups[a]) - last(groups[b]));
  while (pending.length > 0) {
    const at = pending.findIndex((g) => [...(needs[g] as Set<number>)].every((need) => done.has(need)));
    if (at < 0) throw new FewbitError("graph/invalid", { where: "fusion", reason: "fused steps depend on each other" });
    const [g] = pending.splice(at, 1) as [number];
    done.add(g);
    sorted.push(groups[g] as G);
  }
  return sorted;
}

/** The operands that a node updates in place. */
const overwritten = ({ op, inputs }: Node): ValueId[] =>
  Object.values(OPS[op].aliases ?? {}).map((input) => inputs[input] as ValueId);

const last = (group: { indices: number[] } | undefined): number => group?.indices[group.indices.length - 1] ?? -1;

function makeStep(graph: Graph, view: View, indices: number[], fusion: Fusion | undefined, id: number): Step {
  const nodes = indices.map((index) => graph.nodes[index] as Node);
  const made = new Set(nodes.flatMap((node) => node.outputs));
  const inputs = [...new Set(nodes.flatMap((node) => node.inputs))].filter((value) => !made.has(value));
  const inside = new Set(indices);
  const outputs = [...made].filter((value) => {
    const readers = view.readers.get(value) ?? [];
    return readers.length === 0 || readers.some((reader) => !inside.has(reader));
  });
  const kind = fusion?.kind ?? kindOf(nodes[0] as Node);
  return { id, kind, nodes, inputs, outputs, ...(fusion === undefined ? {} : { fusion: fusion.name }) };
}
