/** The number of elements of a shape. */
export function sizeOf(shape: readonly number[]): number {
  return shape.reduce((product, extent) => product * extent, 1);
}

/** `value` rounded up to a multiple of `step`. */
export function roundUp(value: number, step: number): number {
  return Math.ceil(value / step) * step;
}

/** A shape as rows x columns: every leading dimension folded into rows. */
export function asMatrix(shape: readonly number[]): [rows: number, columns: number] {
  const columns = shape[shape.length - 1] ?? 1;
  return [columns === 0 ? 0 : sizeOf(shape) / columns, columns];
}
