import { FewbitError } from "../../core/errors.js";
import type { Dim, ValueId } from "../../ir/graph.js";
import type { KernelRow } from "../../plan/select.js";
import { StepContext } from "../step-context.js";
import type { Source as SharedSource } from "../weights.js";

/** Host data that a kernel reads, e.g. a decode table; uploaded once for a program and found again by its key. */
export interface ConstantSource {
  readonly kind: "constant";
  readonly key: string;
  readonly data: () => ArrayBufferView;
}

/** A device buffer that a dispatch is given a pointer to. */
export type Source = SharedSource | ConstantSource;

/** A host function of the addon: its name, and the version of what its bindings and args mean. */
export interface Entry {
  readonly name: string;
  readonly abi: number;
}

/** One call of an addon entry. */
export interface NativeDispatch {
  readonly label: string;
  readonly entry: Entry;
  /** The buffers in the order in which the entry expects them. */
  readonly bindings: readonly Source[];
  /** Integers of at most 53 bits that stay the same for every run. */
  readonly args: readonly number[];
}

/** A row of the native kernel table: how to build the dispatches of a step that the row's requirements admit. */
export interface NativeKernel extends KernelRow {
  /** Every entry that `build` may name; an addon without one of them is refused when it is opened. */
  readonly entries: readonly Entry[];
  build(context: BuildContext): NativeDispatch[];
  /**
   * The dispatches of a step together with those of the step right behind it, which alone reads its results; null when they do not go
   * together. Values between the two are not stored.
   */
  join?(context: BuildContext, after: BuildContext): NativeDispatch[] | null;
}

/** A step as a native kernel builds it: shapes and layouts as launch arguments. */
export class BuildContext extends StepContext {
  /**
   * A product of extents as the two args of `fewbit::Extent`: coefficient and index of a symbol, or -1. Throws `graph/invalid`
   * for a product of two symbols.
   */
  extent(...dims: readonly Dim[]): [coefficient: number, symbol: number] {
    const symbols = dims.filter((dim) => typeof dim === "string");
    if (symbols.length > 1) {
      const where = this.bound.describe();
      throw new FewbitError("graph/invalid", { where, reason: `an extent is the product of ${symbols.join(" and ")}` });
    }
    const coefficient = dims.reduce<number>((product, dim) => product * (typeof dim === "number" ? dim : 1), 1);
    return [coefficient, symbols[0] === undefined ? -1 : this.symbol(symbols[0])];
  }

  /** The rows of a value, leading dimensions folded, as an `extent`. */
  rowExtent(id: ValueId): [coefficient: number, symbol: number] {
    return this.extent(...this.type(id).shape.slice(0, -1));
  }

  /** Where a symbol stands in `Launch::symbols`. Throws `graph/invalid`. */
  symbol(name: string): number {
    const index = Object.keys(this.bound.graph.symbols).indexOf(name);
    if (index < 0)
      throw new FewbitError("graph/invalid", { where: `symbol ${name}`, reason: "the graph does not have it" });
    return index;
  }

  /** The row stride and first column of a dense value in its storage, in elements. */
  strided(id: ValueId): [stride: number, column: number] {
    const { stride, column } = this.placement(id);
    return [stride, column];
  }
}

export const value = (id: ValueId): Source => ({ kind: "value", id });
export const dense = (...ids: readonly ValueId[]): Source => ({ kind: "dense", ids });
/** The rows of one or several stored weights, one after another in one buffer: native bindings need no slices. */
export const weights = (...ids: readonly ValueId[]): Source => ({ kind: "weights", ids, slice: 0 });
export const scratch: Source = { kind: "scratch" };
export const constant = (key: string, data: () => ArrayBufferView): Source => ({ kind: "constant", key, data });
