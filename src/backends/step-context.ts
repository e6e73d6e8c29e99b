import { FewbitError } from "../core/errors.js";
import type { TensorType, ValueId } from "../ir/graph.js";
import type { MemoryPlan, Placement } from "../plan/memory.js";
import type { BoundStep } from "../plan/step.js";
import type { Capabilities } from "./backend.js";
import { type StoredLayout, storedLayout } from "./stored-layout.js";
import { type WeightGroup, weightGroup } from "./weights.js";

/** What a kernel of any backend needs to know to build a step: shapes, placements, layouts, capabilities. */
export class StepContext {
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

  /** Rows of a value for given symbols. */
  rows(id: ValueId, symbols: Readonly<Record<string, number>>): number {
    return this.type(id)
      .shape.slice(0, -1)
      .reduce<number>((product, dim) => product * (typeof dim === "number" ? dim : (symbols[dim] ?? 0)), 1);
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
