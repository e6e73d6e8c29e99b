import type { KeyRows } from "../../../ir/attention-shape.js";

/**
 * WGSL `fn key_row(b: u32, h: u32, j: u32) -> u32`: the stored row of the key at position j, as `keyRowOf` of `ir/attention.ts`.
 * A paged cache needs the binding `pages: array<u32>`. `keys` is the extent of the keys in WGSL.
 */
export function keyRowFunction({ page, kvHeads, ring }: KeyRows, keys: string): string {
  const slot = ring ? `j % ${keys}` : "j";
  const row =
    page === null
      ? `(b * ${kvHeads}u + h) * ${keys} + slot`
      : `(pages[slot / ${page}u] * ${kvHeads}u + h) * ${page}u + slot % ${page}u`;
  return `fn key_row(b: u32, h: u32, j: u32) -> u32 { let slot = ${slot}; return ${row}; }`;
}
