import { FewbitError } from "../core/errors.js";
import { extentOf, type Format, formatKey } from "../formats/format.js";
import type { Dim, TensorType } from "./graph.js";

/** The shape of a dense operand of `dtype`. Throws `dtype/mismatch`. */
export function requireDense(type: TensorType, dtype: string, what: string): readonly Dim[] {
  if (type.kind !== "dense" || type.dtype !== dtype) {
    const got = type.kind === "dense" ? type.dtype : formatKey(type.format);
    throw new FewbitError("dtype/mismatch", { what, got, expected: dtype });
  }
  return type.shape;
}

/** The shape of an operand that is dense float32 or stored in a format. Throws `dtype/mismatch`. */
export function requireReal(type: TensorType, what: string): readonly Dim[] {
  return type.kind === "format" ? type.shape : requireDense(type, "f32", what);
}

/** An operand that is stored in a format. Throws `dtype/mismatch`. */
export function requireFormat(type: TensorType, what: string): Extract<TensorType, { kind: "format" }> {
  if (type.kind !== "format") throw new FewbitError("dtype/mismatch", { what, got: type.dtype, expected: "a format" });
  return type;
}

/** Throws `shape/mismatch` unless the shape has the expected extents; `undefined` stands for any. */
export function requireShape(shape: readonly Dim[], expected: readonly (Dim | undefined)[], what: string): void {
  const same = shape.length === expected.length && expected.every((dim, i) => dim === undefined || dim === shape[i]);
  if (!same) {
    const text = `[${expected.map((dim) => dim ?? "any").join(", ")}]`;
    throw new FewbitError("shape/mismatch", { what, got: shape, expected: text });
  }
}

/** Throws `format/block` where a fixed block does not divide the last dimension. */
export function requireBlocks(format: Format, k: Dim, what: string): void {
  if (typeof k !== "number") return;
  for (const level of format.scales) {
    const block = extentOf(level.block[1], k);
    if (block === 0 || k % block !== 0) {
      const nearest = Math.max(block, Math.round(k / Math.max(block, 1)) * block);
      throw new FewbitError("format/block", {
        format: `${what}: ${formatKey(format)}`,
        size: k,
        block,
        axis: "K",
        nearest,
      });
    }
  }
}
