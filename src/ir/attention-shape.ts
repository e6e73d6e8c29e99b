import { FewbitError } from "../core/errors.js";
import type { Dim, TensorType } from "./graph.js";
import type { KvWriteAttrs, SdpaAttrs, SdpaExtra } from "./ops.js";
import { requireBlocks, requireDense, requireFormat, requireReal, requireShape } from "./require.js";

/** Where the rows of a cache or of k and v lie. */
export interface KeyRows {
  /** Keys there is room for: the extent of k, the capacity of a cache, or all slots of the pages. */
  readonly keys: Dim;
  /** Slots of one block of a pool; null where rows are [batch, kvHeads, keys]. */
  readonly page: number | null;
  readonly kvHeads: number;
  readonly ring: boolean;
}

/** An sdpa's extents, read off its operands' types. */
export interface AttentionShape extends KeyRows {
  readonly batch: number;
  readonly tokens: Dim;
  /** Elements of a head. */
  readonly size: number;
  /** Rows of q are [T, heads] rather than [B, heads, T]. */
  readonly tokenMajor: boolean;
  /** The operand that each extra is; -1 without it. */
  readonly extra: Readonly<Record<SdpaExtra, number>>;
  /** Whether the mask differs between batches and between heads. */
  readonly mask: { readonly batch: boolean; readonly heads: boolean };
}

const invalid = (where: string, reason: string) => new FewbitError("graph/invalid", { where, reason });

/** Throws `shape/mismatch`, `dtype/mismatch`, `format/block` or `graph/invalid` for operands that do not fit together. */
export function attentionShape(types: readonly TensorType[], attrs: SdpaAttrs, where: string): AttentionShape {
  const [qType, kType, vType] = types as readonly [TensorType, TensorType, TensorType];
  const { heads, kvHeads, window, softcap } = attrs;
  const count = (name: string, value: number | undefined, ok: boolean, expected: string) => {
    if (value !== undefined && !ok)
      throw new FewbitError("argument/invalid", { name: `${where}.${name}`, value, expected });
  };
  count("heads", heads, Number.isInteger(heads) && heads > 0, "a positive integer");
  count("kvHeads", kvHeads, Number.isInteger(kvHeads) && kvHeads > 0, "a positive integer");
  count("scale", attrs.scale, Number.isFinite(attrs.scale), "a finite number");
  count("window", window, Number.isInteger(window) && (window as number) > 0, "a positive integer");
  count("softcap", softcap, Number.isFinite(softcap) && (softcap as number) > 0, "a positive number");
  if (heads % kvHeads !== 0) throw invalid(where, `${heads} heads do not divide into ${kvHeads} KV heads`);

  const extras = attrs.extras ?? [];
  const operand = (name: SdpaExtra) => (extras.includes(name) ? 3 + extras.indexOf(name) : -1);
  const extra = { mask: operand("mask"), sinks: operand("sinks"), pages: operand("pages") };
  if (types.length !== 3 + extras.length || new Set(extras).size !== extras.length) {
    throw invalid(where, `it has ${types.length - 3} operands after v: its extras are [${extras.join(", ")}]`);
  }

  const k = requireReal(kType, `${where}.k`);
  requireShape(requireReal(vType, `${where}.v`), k, `${where}.v`);
  const size = k.at(-1) as number;
  const paged = extra.pages >= 0;
  const rank = k.length;
  if (typeof size !== "number" || (paged ? rank !== 4 : rank !== 3 && rank !== 4)) {
    const expected = paged ? "[blocks, kvHeads, slots, D]" : "[kvHeads, S, D] or [B, kvHeads, S, D]";
    throw new FewbitError("shape/mismatch", { what: `${where}.k`, got: k, expected });
  }
  requireShape(k, [...(rank === 4 ? [undefined] : []), kvHeads, undefined, size], `${where}.k`);
  for (const [type, name] of [
    [qType, "q"],
    [kType, "k"],
    [vType, "v"],
  ] as const) {
    if (type.kind === "format") requireBlocks(type.format, size, `${where}.${name}`);
  }
  const batch = paged || rank === 3 ? 1 : (k[0] as number);
  const extent = k[rank - 2] as Dim;
  if (typeof batch !== "number" || (typeof extent === "string" && kType.kind === "format")) {
    throw invalid(where, "stored keys and values, and the batch, have extents of fixed numbers");
  }
  if (attrs.position === undefined && (paged || attrs.ring))
    throw invalid(where, "pages and rings belong to a cache: it needs a position");
  if (attrs.ring && window === undefined) throw invalid(where, "a ring keeps the last tokens only: it needs a window");

  const q = requireReal(qType, `${where}.q`);
  const tokenMajor = q.length !== 4;
  if (q.length === 2) requireShape(requireDense(qType, "f32", `${where}.q`), [undefined, heads * size], `${where}.q`);
  else requireShape(q, tokenMajor ? [undefined, heads, size] : [batch, heads, undefined, size], `${where}.q`);
  if (tokenMajor && batch !== 1) throw invalid(where, `a batch of ${batch} needs q [B, heads, T, D]`);
  const tokens = (tokenMajor ? q[0] : q[2]) as Dim;
  if (!tokenMajor && qType.kind === "format" && typeof tokens === "string")
    throw invalid(where, "stored queries [B, heads, T, D] have a fixed T");

  const page = paged ? (extent as number) : null;
  const pages = paged ? requireDense(types[extra.pages] as TensorType, "u32", `${where}.pages`) : [1];
  requireShape(pages, [undefined], `${where}.pages`);
  if (typeof pages[0] !== "number") throw invalid(where, "the number of pages is fixed");
  const keys = page === null ? extent : page * pages[0];
  if (extra.sinks >= 0) {
    requireShape(requireDense(types[extra.sinks] as TensorType, "f32", `${where}.sinks`), [heads], `${where}.sinks`);
  }
  const mask = extra.mask < 0 ? [] : requireDense(types[extra.mask] as TensorType, "f32", `${where}.mask`);
  if (mask.length === 4) {
    const fits = (mask[0] === 1 || mask[0] === batch) && (mask[1] === 1 || mask[1] === heads);
    requireShape(mask, [fits ? mask[0] : batch, fits ? mask[1] : heads, tokens, keys], `${where}.mask`);
  } else if (extra.mask >= 0) requireShape(mask, [tokens, keys], `${where}.mask`);
  const varies = (axis: number, full: number) => mask.length === 4 && mask[axis] === full && full > 1;
  return {
    batch,
    tokens,
    keys,
    page,
    kvHeads,
    size,
    tokenMajor,
    extra,
    ring: attrs.ring === true,
    mask: { batch: varies(0, batch), heads: varies(1, heads) },
  };
}

/** [T, heads * D] or, for queries [B, heads, T, D], the same. */
export function outputShape({ tokenMajor, tokens, batch, size }: AttentionShape, { heads }: SdpaAttrs): Dim[] {
  return tokenMajor ? [tokens, heads * size] : [batch, heads, tokens, size];
}

export function inferSdpa(types: readonly TensorType[], attrs: SdpaAttrs, where: string): TensorType[] {
  return [{ kind: "dense", dtype: "f32", shape: outputShape(attentionShape(types, attrs, where), attrs) }];
}

/** Where the rows of a cache or a pool of blocks lie. Throws as `attentionShape`. */
export function cacheRows(types: readonly TensorType[], attrs: KvWriteAttrs, where: string): KeyRows {
  const cache = requireFormat(types[0] as TensorType, `${where}.cache`);
  const { shape, format } = cache;
  const pages = types[2];
  requireShape(shape, Array.from({ length: pages === undefined ? 3 : 4 }), `${where}.cache`);
  if (shape.some((dim) => typeof dim !== "number")) throw invalid(where, "a cache has extents of fixed numbers");
  const [kvHeads, slots, size] = shape.slice(-3) as [number, number, number];
  requireBlocks(format, size, `${where}.cache`);
  requireShape(requireDense(types[1] as TensorType, "f32", `${where}.x`), [undefined, kvHeads * size], `${where}.x`);
  const ring = attrs.ring === true;
  if (pages === undefined) return { keys: slots, page: null, kvHeads, ring };
  const [count] = requireDense(pages, "u32", `${where}.pages`);
  if (pages.shape.length !== 1 || typeof count !== "number") throw invalid(where, "the number of pages is fixed");
  return { keys: slots * count, page: slots, kvHeads, ring };
}

export function inferKvWrite(types: readonly TensorType[], attrs: KvWriteAttrs, where: string): TensorType[] {
  cacheRows(types, attrs, where);
  return [types[0] as TensorType];
}
