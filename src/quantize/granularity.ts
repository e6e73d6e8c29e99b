import { FewbitError } from "../core/errors.js";
import type { Block } from "../formats/format.js";

/** What shares one scale: torchao's granularity objects as data. */
export type Granularity =
  | { readonly kind: "tensor" }
  | { readonly kind: "row" }
  /** Along axis 0 of a weight: the same block as `row`. */
  | { readonly kind: "axis"; readonly axis: 0 }
  | { readonly kind: "group"; readonly groupSize: number }
  | { readonly kind: "block"; readonly blockSize: readonly [rows: number, k: number] };

export const perTensor = (): Granularity => ({ kind: "tensor" });
export const perRow = (): Granularity => ({ kind: "row" });
export const perAxis = (axis: 0): Granularity => ({ kind: "axis", axis });
export const perGroup = (groupSize: number): Granularity => ({ kind: "group", groupSize });
export const perBlock = (blockSize: readonly [rows: number, k: number]): Granularity => ({ kind: "block", blockSize });

/**
 * The block of a granularity over a matrix [rows, k]. Throws `argument/invalid` for a size that is not a positive
 * integer.
 */
export function blockOf(granularity: Granularity): Block {
  switch (granularity.kind) {
    case "tensor":
      return ["all", "all"];
    case "row":
    case "axis":
      return [1, "all"];
    case "group":
      return [1, positive("groupSize", granularity.groupSize)];
    case "block":
      return [positive("blockSize", granularity.blockSize[0]), positive("blockSize", granularity.blockSize[1])];
  }
}

function positive(name: string, value: number): number {
  if (Number.isInteger(value) && value > 0) return value;
  throw new FewbitError("argument/invalid", { name, value, expected: "a positive integer" });
}

/** Granularities as torchao prints them. */
export function granularityName(granularity: Granularity): string {
  switch (granularity.kind) {
    case "tensor":
      return "PerTensor()";
    case "row":
      return "PerRow()";
    case "axis":
      return `PerAxis(${granularity.axis})`;
    case "group":
      return `PerGroup(${granularity.groupSize})`;
    case "block":
      return `PerBlock([${granularity.blockSize.join(", ")}])`;
  }
}
