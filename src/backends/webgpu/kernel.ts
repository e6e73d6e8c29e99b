import { FewbitError } from "../../core/errors.js";
import type { Format } from "../../formats/format.js";
import { rowwise } from "../../formats/tensor.js";
import type { Dim, TensorType, ValueId } from "../../ir/graph.js";
import type { MemoryPlan, Placement } from "../../plan/memory.js";
import type { KernelRow } from "../../plan/select.js";
import type { BoundStep } from "../../plan/step.js";
import type { Capabilities } from "../backend.js";
import { type StoredLayout, storedLayout } from "./layout.js";

/** A buffer that a dispatch binds: a value's storage, one row slice of (concatenated) weights,
 * dense weights one after another, or the step's scratch. */
export type Source =
  | { readonly kind: "value"; readonly id: ValueId }
  | { readonly kind: "weights"; readonly ids: readonly ValueId[]; readonly slice: number }
  | { readonly kind: "dense"; readonly ids: readonly ValueId[] }
  | { readonly kind: "scratch" };

export interface Binding {
  readonly source: Source;
  readonly access: "read" | "read_write";
}

/** One compute dispatch. `workgroups` maps the run's symbols to a grid. */
export interface Dispatch {
  readonly label: string;
  readonly wgsl: string;
  readonly bindings: readonly Binding[];
  readonly workgroups: (symbols: Readonly<Record<string, number>>) => readonly [x: number, y: number, z: number];
}

/** A row of the WebGPU kernel table: how to build the dispatches of a step that the row's requirements admit. */
export interface WebGpuKernel extends KernelRow {
  build(context: BuildContext): Dispatch[];
}

/** Rows [begin, end) of weights that fit one binding. */
export interface WeightSlice {
  readonly begin: number;
  readonly end: number;
  readonly layout: StoredLayout;
}

/** Weights as they lie on the device: the rows of all `ids` one after another, in slices that fit a binding. */
export interface WeightGroup {
  readonly ids: readonly ValueId[];
  readonly format: Format;
  readonly rows: number;
  readonly k: number;
  readonly slices: readonly WeightSlice[];
}

/** What a kernel needs to know to build a step: shapes, placements, layouts, capabilities. */
export class BuildContext {
  readonly bound: BoundStep;
  readonly memory: MemoryPlan;
  readonly device: Capabilities;
  /** The largest values of the symbols: storage is laid out for these. */
  readonly capacity: Readonly<Record<string, number>>;

  constructor(bound: BoundStep, memory: MemoryPlan, device: Capabilities, capacity: Readonly<Record<string, number>>) {
    this.bound = bound;
    this.memory = memory;
    this.device = device;
    this.capacity = capacity;
  }

  type(id: ValueId): TensorType {
    return this.bound.type(id);
  }

  /** The columns that a value takes in the rows of its storage. */
  placement(id: ValueId): Placement {
    const width = this.lastExtent(id);
    return this.memory.placement.get(id) ?? { root: id, column: 0, stride: width };
  }

  lastExtent(id: ValueId): number {
    const shape = this.type(id).shape;
    return shape[shape.length - 1] as number;
  }

  /** Rows of a value under the run's symbols, as a WGSL expression of type u32. */
  rowsWgsl(id: ValueId): string {
    return this.type(id)
      .shape.slice(0, -1)
      .map((dim) => this.dimWgsl(dim))
      .reduce((a, b) => (a === "1u" ? b : b === "1u" ? a : `${a} * ${b}`), "1u");
  }

  /** Rows of a value for given symbols. */
  rows(id: ValueId, symbols: Readonly<Record<string, number>>): number {
    return this.type(id)
      .shape.slice(0, -1)
      .reduce<number>((product, dim) => product * (typeof dim === "number" ? dim : (symbols[dim] ?? 0)), 1);
  }

  dimWgsl(dim: Dim): string {
    return typeof dim === "number" ? `${dim}u` : this.symbolWgsl(dim);
  }

  /** A symbol's value in the uniform block, as a WGSL expression of type u32. */
  symbolWgsl(name: string): string {
    return symbolWgsl(this.bound.graph.symbols, name);
  }

  /** The storage of a value in a format, its rows at capacity. */
  layout(id: ValueId): StoredLayout {
    const type = this.type(id);
    if (type.kind !== "format") {
      throw new FewbitError("graph/invalid", {
        where: this.bound.name(id),
        reason: "it is dense, a stored value is needed",
      });
    }
    return storedLayout(type.format, [this.rows(id, this.capacity), this.lastExtent(id)]);
  }

  /** How the rows of one or several weights lie on the device. */
  weights(ids: readonly ValueId[]): WeightGroup {
    return weightGroup(
      ids.map((id) => [id, this.type(id)] as const),
      this.device.maxBinding,
    );
  }
}

/** Where a symbol stands in the uniform block `params`. */
export function symbolWgsl(symbols: Readonly<Record<string, number>>, name: string): string {
  const index = Object.keys(symbols).indexOf(name);
  if (index < 0)
    throw new FewbitError("graph/invalid", { where: `symbol ${name}`, reason: "the graph does not have it" });
  return `params.v[${Math.floor(index / 4)}].${"xyzw"[index % 4]}`;
}

/** Lays weights out in row slices of at most `maxBinding` bytes. Throws `plan/memory` when one row block is larger. */
export function weightGroup(weights: readonly (readonly [ValueId, TensorType])[], maxBinding: number): WeightGroup {
  const types = weights.map(([, type]) => type);
  const first = types[0];
  if (first?.kind !== "format")
    throw new FewbitError("graph/invalid", { where: "weights", reason: "they are not stored in a format" });
  const format = types.length > 1 ? rowwise(first.format) : first.format;
  const k = first.shape[1] as number;
  const rows = types.reduce((sum, type) => sum + (type.shape[0] as number), 0);
  const step = format.scales.reduce(
    (most, { block }) => (typeof block[0] === "number" ? Math.max(most, block[0]) : most),
    4,
  );
  let count = Math.max(rows, 1);
  while (count > step && storedLayout(format, [count, k]).bytes > maxBinding)
    count = Math.ceil(count / 2 / step) * step;
  const slices: WeightSlice[] = [];
  for (let begin = 0; begin < rows; begin += count) {
    const end = Math.min(begin + count, rows);
    slices.push({ begin, end, layout: storedLayout(format, [end - begin, k]) });
  }
  const needed = slices[0]?.layout.bytes ?? 0;
  if (needed > maxBinding)
    throw new FewbitError("plan/memory", { what: "a block of weight rows", needed, limit: maxBinding });
  return { ids: weights.map(([id]) => id), format, rows, k, slices };
}

/** The head of every shader: features, the uniform block of symbols, and the bindings in order from 1 on. */
export function shaderHead(
  bindings: readonly { readonly name: string; readonly type: string; readonly binding: Binding }[],
  enables: readonly string[] = [],
): string {
  const lines = enables.map((feature) => `enable ${feature};`);
  lines.push("struct Params { v: array<vec4<u32>, 4> }", "@group(0) @binding(0) var<uniform> params: Params;");
  for (const [i, { name, type, binding }] of bindings.entries()) {
    lines.push(`@group(0) @binding(${i + 1}) var<storage, ${binding.access}> ${name}: array<${type}>;`);
  }
  return lines.join("\n");
}

export const read = (source: Source): Binding => ({ source, access: "read" });
export const write = (source: Source): Binding => ({ source, access: "read_write" });
export const value = (id: ValueId): Source => ({ kind: "value", id });

/** A grid of `count` workgroups that respects the limit per dimension; shaders recover the index with `FLAT_WORKGROUP`. */
export function flatGrid(count: number, limit = 65535): [number, number, number] {
  return count <= limit ? [count, 1, 1] : [limit, Math.ceil(count / limit), 1];
}

/** The index of a workgroup in a `flatGrid`, from builtins `wid` (workgroup_id) and `groups` (num_workgroups). */
export const FLAT_WORKGROUP = "(wid.y * groups.x + wid.x)";
