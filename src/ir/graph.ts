import type { DType } from "../core/dtype.js";
import { FewbitError, nearestNames } from "../core/errors.js";
import { type Format, formatKey } from "../formats/format.js";
import { OPS, type OpAttrs, type OpName } from "./ops.js";

/** An extent: a number, or the name of one of the graph's symbols, bound at every run. */
export type Dim = number | string;

/**
 * What a value holds: a dense array of a dtype, or a matrix stored in a format (the last dimension is k, the others fold
 * into rows).
 */
export type TensorType =
  | { readonly kind: "dense"; readonly dtype: DType; readonly shape: readonly Dim[] }
  | { readonly kind: "format"; readonly format: Format; readonly shape: readonly Dim[] };

/**
 * `input`: written by the host before a run. `weight`: resident and constant. `state`: resident, updated in place, kept
 * between runs (KV cache, current token ids). `value`: made by a node.
 */
export type Role = "input" | "weight" | "state" | "value";
export type ValueId = number;
export interface Value {
  readonly id: ValueId;
  readonly name: string;
  readonly role: Role;
  readonly type: TensorType;
}
interface NodeOf<Op extends OpName> {
  readonly op: Op;
  readonly inputs: readonly ValueId[];
  readonly outputs: readonly ValueId[];
  readonly attrs: OpAttrs[Op];
}
/** One application of an op; a union over the ops, told apart by `op`. */
export type Node<Op extends OpName = OpName> = { [O in Op]: NodeOf<O> }[Op];
/** What to compute: nodes in execution order over values. Symbols map to the largest value they may take. */
export interface Graph {
  readonly symbols: Readonly<Record<string, number>>;
  readonly values: readonly Value[];
  readonly nodes: readonly Node[];
  readonly outputs: Readonly<Record<string, ValueId>>;
}

export const dense = (dtype: DType, shape: readonly Dim[]): TensorType => ({ kind: "dense", dtype, shape });
export const stored = (format: Format, shape: readonly Dim[]): TensorType => ({ kind: "format", format, shape });

/** The concrete shape of a type under bound symbols. Throws `graph/invalid` for a symbol without a value. */
export function concreteShape(shape: readonly Dim[], symbols: Readonly<Record<string, number>>): number[] {
  return shape.map((dim) => {
    const extent = typeof dim === "number" ? dim : symbols[dim];
    if (extent === undefined)
      throw new FewbitError("graph/invalid", { where: `symbol ${dim}`, reason: "it has no value" });
    return extent;
  });
}

/** e.g. `f32 [T, 256]` or `int4_tinygemm[1x64:bf16] [768, 256]`. */
export function showType(type: TensorType): string {
  return `${type.kind === "dense" ? type.dtype : formatKey(type.format)} [${type.shape.join(", ")}]`;
}

/** Builds a graph node by node; every node is checked by its op's shape rule as it is added. */
export class GraphBuilder {
  readonly #symbols: Record<string, number>;
  readonly #values: Value[] = [];
  readonly #nodes: Node[] = [];
  readonly #outputs: Record<string, ValueId> = {};
  readonly #names = new Set<string>();
  /** Values whose memory an in-place op has reused, with the name of its result. */
  readonly #updated = new Map<ValueId, string>();

  /** `symbols` maps each symbol to the largest value it may take. */
  constructor(symbols: Record<string, number> = {}) {
    for (const [name, max] of Object.entries(symbols)) {
      if (!Number.isInteger(max) || max < 0) {
        throw new FewbitError("argument/invalid", {
          name: `symbol ${name}`,
          value: max,
          expected: "a non-negative integer",
        });
      }
    }
    this.#symbols = { ...symbols };
  }

  input(name: string, type: TensorType): ValueId {
    return this.#named(name, "input", type);
  }

  weight(name: string, type: TensorType): ValueId {
    return this.#named(name, "weight", type);
  }

  state(name: string, type: TensorType): ValueId {
    return this.#named(name, "state", type);
  }

  /**
   * Adds a node and returns its outputs. Throws `argument/unknown-name` (no such op), `graph/invalid`, `format/block`, and
   * `shape/mismatch` or `dtype/mismatch` from the shape rule. Nothing is added then.
   */
  op<Op extends OpName>(op: Op, inputs: readonly ValueId[], attrs: OpAttrs[Op], name?: string): ValueId[] {
    const where = name ?? `${op}#${this.#nodes.length}`;
    const invalid = (reason: string) => new FewbitError("graph/invalid", { where, reason });
    if (!Object.hasOwn(OPS, op)) {
      throw new FewbitError("argument/unknown-name", {
        kind: "op",
        name: op,
        nearest: nearestNames(op, Object.keys(OPS)),
      });
    }
    const spec = OPS[op];
    const operands = inputs.map((id) => {
      const value = this.#values[id];
      if (value === undefined) throw invalid(`it reads value ${id}, which does not exist`);
      const by = this.#updated.get(id);
      if (by !== undefined)
        throw invalid(`it reads ${value.name}, which ${by} has updated in place: read ${by} instead`);
      return value;
    });
    const types = operands.map((value) => value.type);
    const [least, most] = [spec.operands.length - (spec.optional ?? 0), spec.operands.length];
    if (types.length < least || (types.length > most && spec.variadic !== true)) {
      throw invalid(`it takes ${spec.operands.join(", ")}; got ${types.length} operands`);
    }
    const { position } = attrs as { position?: string };
    if (position !== undefined && !Object.hasOwn(this.#symbols, position)) {
      throw invalid(`its position ${position} is not a symbol of the graph`);
    }
    const targets = Object.values(spec.aliases ?? {}).map((input) => operands[input] as Value);
    for (const target of targets) {
      if (target.role === "weight") throw invalid(`it would update ${target.name} in place, which is a weight`);
    }
    const outputs = spec
      .infer(types, attrs, where)
      .map((type, i) => this.#add(i === 0 ? where : `${where}.${i}`, "value", type));
    this.#nodes.push({ op, inputs: [...inputs], outputs, attrs } as unknown as Node);
    for (const target of targets) this.#updated.set(target.id, where);
    return outputs;
  }

  /** `op` for the ops with one output. */
  one<Op extends OpName>(op: Op, inputs: readonly ValueId[], attrs: OpAttrs[Op], name?: string): ValueId {
    return this.op(op, inputs, attrs, name)[0] as ValueId;
  }

  output(name: string, id: ValueId): void {
    if (this.#values[id] === undefined || this.#outputs[name] !== undefined) {
      throw new FewbitError("graph/invalid", { where: `output ${name}`, reason: "it is unknown or named twice" });
    }
    this.#outputs[name] = id;
  }

  build(): Graph {
    if (Object.keys(this.#outputs).length === 0) {
      throw new FewbitError("graph/invalid", { where: "outputs", reason: "the graph has none" });
    }
    return {
      symbols: { ...this.#symbols },
      values: [...this.#values],
      nodes: [...this.#nodes],
      outputs: { ...this.#outputs },
    };
  }

  #named(name: string, role: Role, type: TensorType): ValueId {
    if (this.#names.has(name))
      throw new FewbitError("graph/invalid", { where: name, reason: "the name is used twice" });
    this.#names.add(name);
    return this.#add(name, role, type);
  }

  #add(name: string, role: Role, type: TensorType): ValueId {
    for (const dim of type.shape) {
      const known = typeof dim === "string" ? Object.hasOwn(this.#symbols, dim) : Number.isInteger(dim) && dim >= 0;
      if (!known)
        throw new FewbitError("graph/invalid", { where: name, reason: `extent ${dim} is neither a size nor a symbol` });
    }
    const id = this.#values.length;
    this.#values.push({ id, name, role, type });
    return id;
  }
}
