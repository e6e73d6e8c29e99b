import type { FloatType } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import type { Codec, Format } from "../formats/format.js";
import { inferKvWrite, inferSdpa } from "./attention-shape.js";
import { type ConvAttrs, convSize, inferConv } from "./conv.js";
import type { Dim, TensorType } from "./graph.js";
import { inferMoeCombine, inferMoeLinear, inferMoeRoute, type MoeRouteAttrs } from "./moe.js";
import { requireBlocks, requireDense, requireFormat, requireShape } from "./require.js";

/** `softcap` is cap * tanh(x / cap). */
export type UnaryFn = "relu" | "gelu" | "gelu_tanh" | "silu" | "sigmoid" | "softcap";
export type BinaryFn = "add" | "mul";

/** The attributes of each op. A `position` names the symbol that counts the tokens already in the KV cache. */
export interface OpAttrs {
  /** `position` goes with learned positions. */
  embedding: { readonly scale?: number; readonly position?: string };
  /** `groups`: a row is that many groups (heads), each with a mean square of its own and the same weights (default 1). */
  rmsnorm: { readonly eps: number; readonly groups?: number };
  layernorm: { readonly eps: number };
  /**
   * `fastAccum`: sums of float8 products may be as short as Hopper's tensor cores keep them (14 bits), torchao's `use_fast_accum`;
   * without it they are float32. Only of float8 operands whose scales do not change along K.
   */
  linear: { readonly fastAccum?: boolean };
  conv2d: ConvAttrs;
  /**
   * `rotary`: only the first R elements of a head are rotated (default D, all of them). `interleaved` rotates neighbours
   * (2i, 2i + 1); without it the halves (i, i + R/2), as NeoX and Llama do.
   */
  rope: {
    readonly heads: number;
    readonly position: string;
    readonly interleaved?: boolean;
    readonly rotary?: number;
  };
  hadamard: { readonly heads: number };
  kv_write: KvWriteAttrs;
  sdpa: SdpaAttrs;
  moe_route: MoeRouteAttrs;
  moe_linear: Record<string, never>;
  moe_combine: Record<string, never>;
  /** `cap`: of `softcap` alone. */
  unary: { readonly fn: UnaryFn; readonly cap?: number };
  binary: { readonly fn: BinaryFn };
  /** `dtype`: the type whose values x holds, to which the specification rounds (default f32). `numerics`, `perTensorScale`: see `quantizeTensor`. */
  quantize: {
    readonly format: Format;
    /** x [T, heads * D] is split into heads first: the result is [T, heads, D]. */
    readonly heads?: number;
    readonly dtype?: FloatType;
    readonly numerics?: "guarded" | "torchao";
    readonly perTensorScale?: number;
  };
  /** `dtype`: rounds every operation to it, as torchao does; without it the exact value is rounded once to f32. */
  dequantize: { readonly dtype?: FloatType };
  last_row: Record<string, never>;
  sample: Record<string, never>;
}
export type OpName = keyof OpAttrs;

/** `ring`: token p is kept in slot p modulo the capacity, so that only the last tokens stay (sliding windows). */
export interface KvWriteAttrs {
  readonly position: string;
  readonly ring?: boolean;
}

/** The optional operands of `sdpa`. */
export type SdpaExtra = "mask" | "sinks" | "pages";

/** Attention over keys of a cache (with `position`) or over all rows of k and v (without); see `attention.ts`. */
export interface SdpaAttrs {
  /** Query heads; `kvHeads` divides it: query head h reads KV head floor(h * kvHeads / heads). */
  readonly heads: number;
  readonly kvHeads: number;
  /** Scores are scale * q k. */
  readonly scale: number;
  /** A query sees keys up to its own position. */
  readonly causal: boolean;
  /** The symbol that counts the tokens before this step; query t stands at position + t (without: at t). */
  readonly position?: string;
  /** A query at p sees keys above p - window (and, unless causal, below p + window). */
  readonly window?: number;
  /** Scores become softcap * tanh(score / softcap) before the mask is added. */
  readonly softcap?: number;
  /** Slots of the cache are positions modulo its capacity; needs a window. */
  readonly ring?: boolean;
  /** The operands after v, in this order. */
  readonly extras?: readonly SdpaExtra[];
  /** exp(score - max) * scale is rounded to this codec before it meets v; row sums use the unrounded values. */
  readonly probabilities?: { readonly codec: Codec; readonly scale: number };
}

/** What an op takes and makes. `infer` is the shape rule; `flops` counts multiply-adds as two, by concrete shapes. */
export interface OpSpec<Op extends OpName> {
  readonly operands: readonly string[];
  /** How many trailing operands may be left out. */
  readonly optional?: number;
  /** The last operand may be given any number of times. */
  readonly variadic?: boolean;
  /** Output `i` is input `aliases[i]`, updated in place. */
  readonly aliases?: Readonly<Record<number, number>>;
  infer(types: readonly TensorType[], attrs: OpAttrs[Op], where: string): TensorType[];
  flops(shapes: readonly (readonly number[])[], attrs: OpAttrs[Op]): number;
}

const f32 = (shape: readonly Dim[]): TensorType => ({ kind: "dense", dtype: "f32", shape });
const at = <T>(list: readonly T[], index: number): T => list[index] as T;
const elements = (shape: readonly number[] | undefined): number => (shape ?? []).reduce((a, b) => a * b, 1);

/** Throws `graph/invalid` unless the operand is one that `fastAccum` speaks of. */
function requireShortSums(type: TensorType, k: Dim, where: string): void {
  const format = type.kind === "format" ? type.format : null;
  if (format !== null && takesShortSums(format, k)) return;
  const reason = `fastAccum is for float8 operands whose scales do not change along K: one is ${format?.name ?? "dense"}`;
  throw new FewbitError("graph/invalid", { where, reason });
}

/** Whether a linear of K features may declare `fastAccum` for an operand in this format. */
export const takesShortSums = ({ element, scales, zero }: Format, k: Dim): boolean =>
  element.kind === "float" &&
  1 + element.exponent + element.mantissa === 8 &&
  zero.domain === "none" &&
  scales.every(({ block }) => block[1] === "all" || block[1] === k);

const elementwise = (arity: number) => (types: readonly TensorType[], _: unknown, where: string) => {
  const shape = requireDense(at(types, 0), "f32", `${where}.a`);
  if (arity === 2) requireShape(requireDense(at(types, 1), "f32", `${where}.b`), shape, `${where}.b`);
  return [f32(shape)];
};

/**
 * THE OPS. Shapes: T tokens, H features, K/N the input/output features of a linear, V the vocabulary, D the head dimension,
 * C the capacity of the cache. What each op computes is `evaluate.ts`.
 */
export const OPS: { readonly [Op in OpName]: OpSpec<Op> } = {
  /** ids i32 [T], table format [V, H], learned positions f32 [P, H] (token t stands at `position` + t) -> f32 [T, H]. */
  embedding: {
    operands: ["ids", "table", "positions"],
    optional: 1,
    infer: (types, { position }, where) => {
      const ids = requireDense(at(types, 0), "i32", `${where}.ids`);
      requireShape(ids, [undefined], `${where}.ids`);
      const table = requireFormat(at(types, 1), `${where}.table`);
      requireShape(table.shape, [undefined, undefined], `${where}.table`);
      requireBlocks(table.format, at(table.shape, 1), `${where}.table`);
      const positions = types[2];
      if (positions !== undefined) {
        const shape = [undefined, at(table.shape, 1)];
        requireShape(requireDense(positions, "f32", `${where}.positions`), shape, `${where}.positions`);
      }
      if ((positions === undefined) !== (position === undefined))
        throw new FewbitError("graph/invalid", { where, reason: "learned positions and `position` go together" });
      return [f32([at(ids, 0), at(table.shape, 1)])];
    },
    flops: (shapes) => elements(shapes[0]) * (shapes[1]?.[1] ?? 0),
  },
  /** x f32 [T, H], weight f32 [H / groups] -> f32 [T, H]. */
  rmsnorm: {
    operands: ["x", "weight"],
    infer: (types, { groups = 1 }, where) => {
      const x = requireDense(at(types, 0), "f32", `${where}.x`);
      const width = at(x, x.length - 1) as number;
      if (width % groups !== 0)
        throw new FewbitError("shape/mismatch", { what: `${where}.x`, got: x, expected: `rows of ${groups} groups` });
      requireShape(requireDense(at(types, 1), "f32", `${where}.weight`), [width / groups], `${where}.weight`);
      return [f32(x)];
    },
    flops: (shapes) => 4 * elements(shapes[0]),
  },
  /** x f32 [T, H], weight f32 [H], bias f32 [H] -> f32 [T, H]. */
  layernorm: {
    operands: ["x", "weight", "bias"],
    optional: 1,
    infer: (types, _attrs, where) => {
      const x = requireDense(at(types, 0), "f32", `${where}.x`);
      for (const [i, type] of types.slice(1).entries())
        requireShape(requireDense(type, "f32", `${where}.${i}`), [at(x, x.length - 1)], `${where}.${i}`);
      return [f32(x)];
    },
    flops: (shapes) => 8 * elements(shapes[0]),
  },
  /** x f32 or format [..., K], weight format [N, K], bias f32 [N] -> f32 [..., N]: x W^T + b over the exact stored values. */
  linear: {
    operands: ["x", "weight", "bias"],
    optional: 1,
    infer: (types, { fastAccum }, where) => {
      const x = at(types, 0);
      if (x.kind === "dense") requireDense(x, "f32", `${where}.x`);
      else requireBlocks(x.format, at(x.shape, x.shape.length - 1), `${where}.x`);
      const weight = requireFormat(at(types, 1), `${where}.weight`);
      const k = at(x.shape, x.shape.length - 1);
      if (fastAccum) for (const type of [x, at(types, 1)]) requireShortSums(type, k, where);
      requireShape(weight.shape, [undefined, k], `${where}.weight`);
      requireBlocks(weight.format, k, `${where}.weight`);
      const n = at(weight.shape, 0);
      const bias = types[2];
      if (bias !== undefined) requireShape(requireDense(bias, "f32", `${where}.bias`), [n], `${where}.bias`);
      return [f32([...x.shape.slice(0, -1), n])];
    },
    flops: (shapes) => 2 * elements(shapes[0]) * (shapes[1]?.[0] ?? 0),
  },
  /** See `conv.ts`. */
  conv2d: {
    operands: ["x", "weight", "bias"],
    optional: 1,
    infer: inferConv,
    flops: ([x, weight], attrs) => {
      const [h, w] = convSize(attrs, x?.[2] ?? 0, x?.[3] ?? 0);
      return 2 * (x?.[0] ?? 0) * h * w * elements(weight);
    },
  },
  /** x f32 [T, heads * D], table f32 [positions, R]: cosines then sines of R/2 pairs -> f32 [T, heads * D]. */
  rope: {
    operands: ["x", "table"],
    infer: (types, attrs, where) => {
      const x = requireDense(at(types, 0), "f32", `${where}.x`);
      const table = requireDense(at(types, 1), "f32", `${where}.table`);
      const width = at(x, 1);
      if (typeof width !== "number" || width % attrs.heads !== 0 || (width / attrs.heads) % 2 !== 0) {
        throw new FewbitError("shape/mismatch", {
          what: `${where}.x`,
          got: x,
          expected: `[T, ${attrs.heads} heads of an even size]`,
        });
      }
      const { rotary = width / attrs.heads } = attrs;
      if (rotary % 2 !== 0 || rotary > width / attrs.heads)
        throw new FewbitError("graph/invalid", { where, reason: `it cannot rotate ${rotary} elements of a head` });
      requireShape(table, [undefined, rotary], `${where}.table`);
      return [f32(x)];
    },
    flops: (shapes) => 3 * elements(shapes[0]),
  },
  /** x f32 [T, heads * D] -> x H / sqrt(D) of every head: D a power of two up to 256; its own inverse (specification 20.2). */
  hadamard: {
    operands: ["x"],
    infer: (types, { heads }, where) => {
      const x = requireDense(at(types, 0), "f32", `${where}.x`);
      const size = (at(x, 1) as number) / heads;
      if (x.length !== 2 || !(Math.log2(size) % 1 === 0 && size <= 256)) {
        const expected = `[T, ${heads} heads of a power of two up to 256]`;
        throw new FewbitError("shape/mismatch", { what: `${where}.x`, got: x, expected });
      }
      return [f32(x)];
    },
    flops: (shapes, { heads }) => elements(shapes[0]) * Math.log2((shapes[0]?.[1] ?? heads) / heads),
  },
  /**
   * cache format [kvHeads, C, D], or a pool of blocks [blocks, kvHeads, P, D] with pages u32 [n] that name the sequence's blocks;
   * x f32 [T, kvHeads * D] -> the cache with T tokens written from `position` on.
   */
  kv_write: {
    operands: ["cache", "x", "pages"],
    optional: 1,
    aliases: { 0: 0 },
    infer: inferKvWrite,
    flops: () => 0,
  },
  /**
   * q f32 [T, heads * D], or f32 or format [T, heads, D] or [B, heads, T, D]; k and v format or f32: caches [kvHeads, C, D] or
   * pools of blocks [blocks, kvHeads, P, D], without a position [kvHeads, S, D] or [B, kvHeads, S, D];
   * mask f32 [T, S] or [1 or B, 1 or heads, T, S], sinks f32 [heads], pages u32 [n] -> f32 [T, heads * D] or [B, heads, T, D].
   */
  sdpa: {
    operands: ["q", "k", "v", "mask", "sinks", "pages"],
    optional: 3,
    infer: inferSdpa,
    flops: (shapes, { window, kvHeads }) => {
      const rows = elements(shapes[1]) / (kvHeads * (shapes[1]?.at(-1) ?? 1));
      return 4 * elements(shapes[0]) * Math.min(rows, window ?? rows);
    },
  },
  /** See `moe.ts`. */
  moe_route: { operands: ["logits"], infer: inferMoeRoute, flops: (shapes) => 8 * elements(shapes[0]) },
  moe_linear: {
    operands: ["x", "ids", "weights"],
    variadic: true,
    infer: inferMoeLinear,
    flops: (shapes) => 2 * elements(shapes[1]) * elements(shapes[2]),
  },
  moe_combine: { operands: ["x", "gates"], infer: inferMoeCombine, flops: (shapes) => 2 * elements(shapes[0]) },
  unary: {
    operands: ["a"],
    infer: (types, { fn, cap }, where) => {
      if ((fn === "softcap") !== (cap !== undefined) || !((cap ?? 1) > 0))
        throw new FewbitError("graph/invalid", {
          where,
          reason: "a positive `cap` belongs to softcap, and to it alone",
        });
      return elementwise(1)(types, null, where);
    },
    flops: (shapes) => 8 * elements(shapes[0]),
  },
  binary: { operands: ["a", "b"], infer: elementwise(2), flops: (shapes) => elements(shapes[0]) },
  /**
   * x f32 [..., K] -> the same values in a format, scales and zero points chosen by the format's rule, or given (static
   * quantization): scale and zero f32 [R, C], one for every block of the first level; R is 1 where a block takes all rows.
   */
  quantize: {
    operands: ["x", "scale", "zero"],
    optional: 2,
    infer: (types, attrs, where) => {
      const x = requireDense(at(types, 0), "f32", `${where}.x`);
      const { format, heads } = attrs;
      const width = at(x, x.length - 1) as number;
      const shape = heads === undefined ? x : [...x.slice(0, -1), heads, width / heads];
      if (heads !== undefined && (x.length !== 2 || width % heads !== 0)) {
        throw new FewbitError("shape/mismatch", {
          what: `${where}.x`,
          got: x,
          expected: `[T, a multiple of ${heads} heads]`,
        });
      }
      requireBlocks(format, at(shape, shape.length - 1), `${where}.x`);
      for (const [i, name] of (["scale", "zero"] as const).entries()) {
        const given = types[i + 1];
        if (given !== undefined)
          requireGiven(format, shape, requireDense(given, "f32", `${where}.${name}`), `${where}.${name}`);
      }
      return [{ kind: "format", format, shape }];
    },
    flops: (shapes) => 4 * elements(shapes[0]),
  },
  dequantize: {
    operands: ["x"],
    infer: (types, _attrs, where) => [f32(requireFormat(at(types, 0), `${where}.x`).shape)],
    flops: (shapes) => 2 * elements(shapes[0]),
  },
  /** x f32 [T, H] -> f32 [1, H]. */
  last_row: {
    operands: ["x"],
    infer: (types, _attrs, where) => {
      const x = requireDense(at(types, 0), "f32", `${where}.x`);
      requireShape(x, [undefined, undefined], `${where}.x`);
      return [f32([1, at(x, 1)])];
    },
    flops: () => 0,
  },
  /**
   * logits f32 [1, V], settings u32 [5] = temperature bits, top-k, top-p bits, seed, step; ids i32 [T]
   * -> sampled u32 [2] = token id, log-probability bits; and ids with its first entry replaced by the token.
   */
  sample: {
    operands: ["logits", "settings", "ids"],
    aliases: { 1: 2 },
    infer: (types, _attrs, where) => {
      requireShape(requireDense(at(types, 0), "f32", `${where}.logits`), [1, undefined], `${where}.logits`);
      requireShape(requireDense(at(types, 1), "u32", `${where}.settings`), [5], `${where}.settings`);
      requireDense(at(types, 2), "i32", `${where}.ids`);
      return [{ kind: "dense", dtype: "u32", shape: [2] }, at(types, 2)];
    },
    flops: (shapes) => 12 * elements(shapes[0]),
  },
};

/** Throws `quantize/unsupported` or `shape/mismatch` unless scales (or zero points) of this shape can be given for x. */
function requireGiven(format: Format, x: readonly Dim[], given: readonly Dim[], what: string): void {
  const [level] = format.scales;
  if (level === undefined || format.scales.length > 1)
    throw new FewbitError("quantize/unsupported", {
      config: format.name,
      reason: `${what}: only a format with one level of scales can be given them`,
    });
  const [height, width] = level.block;
  const columns = width === "all" ? 1 : (at(x, x.length - 1) as number) / width;
  const leading = x.slice(0, -1);
  const rows = leading.every((dim) => typeof dim === "number")
    ? elements(leading as number[])
    : leading.length === 1
      ? at(leading, 0)
      : undefined;
  const blocks =
    height === "all" ? 1 : height === 1 ? rows : typeof rows === "number" ? Math.ceil(rows / height) : undefined;
  if (blocks === undefined)
    throw new FewbitError("quantize/unsupported", {
      config: format.name,
      reason: `${what}: the number of blocks is not known when ${showDims(leading)} rows are cut into ${height}s`,
    });
  requireShape(given, [blocks, columns], what);
}

const showDims = (dims: readonly Dim[]): string => `[${dims.join(", ")}]`;

/** A shape as the [rows, k] matrix that formats store. */
export function shapeRows(shape: readonly number[]): [rows: number, k: number] {
  const k = shape[shape.length - 1] ?? 1;
  return [shape.slice(0, -1).reduce((a, b) => a * b, 1), k];
}
