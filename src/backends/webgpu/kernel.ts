import { FewbitError } from "../../core/errors.js";
import type { Dim, ValueId } from "../../ir/graph.js";
import type { KernelRow } from "../../plan/select.js";
import { StepContext } from "../step-context.js";
import type { Source } from "../weights.js";

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

/** A step as a kernel builds it, with what WGSL calls its extents. */
export class BuildContext extends StepContext {
  /** Rows of a value under the run's symbols, as a WGSL expression of type u32. */
  rowsWgsl(id: ValueId): string {
    return this.type(id)
      .shape.slice(0, -1)
      .map((dim) => this.dimWgsl(dim))
      .reduce((a, b) => (a === "1u" ? b : b === "1u" ? a : `${a} * ${b}`), "1u");
  }

  dimWgsl(dim: Dim): string {
    return typeof dim === "number" ? `${dim}u` : this.symbolWgsl(dim);
  }

  /** A symbol's value in the uniform block, as a WGSL expression of type u32. */
  symbolWgsl(name: string): string {
    return symbolWgsl(this.bound.graph.symbols, name);
  }
}

/** Where a symbol stands in the uniform block `params`. */
export function symbolWgsl(symbols: Readonly<Record<string, number>>, name: string): string {
  const index = Object.keys(symbols).indexOf(name);
  if (index < 0)
    throw new FewbitError("graph/invalid", { where: `symbol ${name}`, reason: "the graph does not have it" });
  return `params.v[${Math.floor(index / 4)}].${"xyzw"[index % 4]}`;
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
