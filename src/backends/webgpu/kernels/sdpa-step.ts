import { FORMATS } from "../../../formats/table.js";
import { type AttentionShape, attentionShape } from "../../../ir/attention-shape.js";
import type { Dim, Node, ValueId } from "../../../ir/graph.js";
import type { SdpaAttrs, SdpaExtra } from "../../../ir/ops.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import type { Capabilities } from "../../backend.js";
import { type StoredLayout, storedLayout } from "../../stored-layout.js";
import { type Binding, type BuildContext, read, value } from "../kernel.js";
import { decodeFunction, encodeFunction } from "../wgsl/codec.js";
import { storedReader } from "../wgsl/stored.js";
import { vectorFunction } from "../wgsl/vector.js";
import { keyRowFunction } from "./kv.js";
import { floatText } from "./rows.js";

/** Scores of keys that are not seen, and what tells them from real ones; differences of scores stay finite. */
export const NONE = "-2.0e30";
export const REAL = "-1.5e30";

interface Operand {
  readonly name: string;
  readonly type: string;
  readonly binding: Binding;
}

/** An sdpa step, taken apart. */
export interface SdpaStep {
  readonly node: Node<"sdpa">;
  readonly attrs: SdpaAttrs;
  readonly shape: AttentionShape;
  /** Query heads that share a KV head: rows of q are numbered t * group + (head within the group). */
  readonly group: number;
  extra(name: SdpaExtra): ValueId | undefined;
}

export function sdpaStep(bound: BoundStep): SdpaStep {
  const node = bound.step.nodes[0] as Node<"sdpa">;
  const shape = attentionShape(
    node.inputs.map((id) => bound.type(id)),
    node.attrs,
    bound.describe(),
  );
  const { attrs } = node;
  return { node, attrs, shape, group: attrs.heads / attrs.kvHeads, extra: (name) => node.inputs[shape.extra[name]] };
}

/** Query rows of one KV head under the step's symbols. */
export function queryRows(bound: BoundStep): number {
  const { shape, group } = sdpaStep(bound);
  return group * (typeof shape.tokens === "number" ? shape.tokens : (bound.symbols[shape.tokens] ?? 0));
}

/** Keys that a query can see at most under the step's symbols. */
export function keyExtent(bound: BoundStep): number {
  const { shape, attrs } = sdpaStep(bound);
  const extent = (dim: Dim) => (typeof dim === "number" ? dim : (bound.symbols[dim] ?? 0));
  const keys = extent(shape.keys);
  const seen = attrs.position === undefined ? keys : extent(attrs.position) + extent(shape.tokens);
  return Math.min(keys, seen, attrs.window ?? keys);
}

/** What every kernel here asks for. */
export const sdpaRequirements: readonly Requirement[] = [
  {
    unmet: (bound) => {
      const { size } = sdpaStep(bound).shape;
      return size % 4 === 0 && size <= 256
        ? null
        : `the head dimension must be a multiple of 4 up to 256: it is ${size}`;
    },
  },
  {
    unmet: (bound, device) => {
      const needed = bound.step.inputs.length + 1;
      return needed <= device.maxStorageBuffers
        ? null
        : `it binds ${needed} buffers: ${device.maxStorageBuffers} are allowed`;
    },
  },
];

/** The text that the attention kernels share. */
export interface SdpaText extends SdpaStep {
  readonly operands: readonly Operand[];
  /**
   * `query_vec(b, head, t, i)` is vec4 number i of a query times the softmax scale, `kr_vec(row, k)` and `vr_vec(row, k)` those of
   * a key's and a value's row, `key_row(b, h, j)` the row of the key at position j, `score_of(dot, b, head, t, j)` its score or
   * NONE, `first_key(t)` and `end_key(t)` the keys that query t sees but for its mask, `hidden(t, j)` whether j is none of them,
   * `rounded(p)` a probability as it meets v.
   */
  readonly functions: string;
  /** The index of a query row's vec4 0 in the output. */
  outAt(b: string, head: string, t: string): string;
  /** Query rows of a KV head, vec4s of a head, and a head's sink (null without sinks). */
  readonly rows: string;
  readonly vectors: number;
  sink(head: string): string | null;
}

export function sdpaText(context: BuildContext, out: Binding, outType: string, withSinks = true): SdpaText {
  const step = sdpaStep(context.bound);
  const { attrs, shape, node, group } = step;
  const { size, tokenMajor } = shape;
  const { heads } = attrs;
  const [q, k, v] = node.inputs as readonly [ValueId, ValueId, ValueId];
  const operands: Operand[] = [];
  const bind = (name: string, type: string, id: ValueId) =>
    void operands.push({ name, type, binding: read(value(id)) });

  const extras: Readonly<Record<SdpaExtra, string>> = { mask: "u32", sinks: withSinks ? "f32" : "", pages: "u32" };
  const functions: string[] = [];
  const tokens = context.dimWgsl(shape.tokens);
  const rowAt = (b: string, head: string, t: string) =>
    tokenMajor ? `(${t} * ${heads}u + ${head})` : `((${b} * ${heads}u + ${head}) * ${tokens} + ${t})`;
  const signature = "fn query_vec(b: u32, head: u32, t: u32, i: u32) -> vec4<f32>";
  if (context.type(q).kind === "format") {
    bind("q", "u32", q);
    functions.push(reader("qr", context.layout(q), { buffer: "q" }));
    functions.push(`${signature} { return qr_vec(${rowAt("b", "head", "t")}, i * 4u) * ${floatText(attrs.scale)}; }`);
  } else {
    bind("q", "vec4<f32>", q);
    const { stride, column } = context.placement(q);
    const flat = context.type(q).shape.length === 2;
    const at = flat
      ? `(t * ${stride}u + ${column}u + head * ${size}u) / 4u`
      : `${rowAt("b", "head", "t")} * ${size / 4}u`;
    functions.push(`${signature} { return q[${at} + i] * ${floatText(attrs.scale)}; }`);
  }

  // The same buffer is bound a second time as vectors where that leaves room for everything else.
  const used = Object.entries(shape.extra).filter(([name, at]) => at >= 0 && extras[name as SdpaExtra] !== "");
  const wide = 6 + used.length <= context.device.maxStorageBuffers;
  for (const [prefix, name, id] of [
    ["kr", "keys", k],
    ["vr", "values", v],
  ] as const) {
    const { root } = context.placement(id);
    bind(name, "u32", root);
    if (wide) bind(`${name}4`, "vec4<u32>", root);
    functions.push(
      reader(prefix, layoutOf(context, root, size), { buffer: name, ...(wide ? { buffer4: `${name}4` } : {}) }),
    );
  }
  for (const [name] of used) bind(name, extras[name as SdpaExtra], step.extra(name as SdpaExtra) as ValueId);
  operands.push({ name: "out", type: outType, binding: out });

  const keys = context.dimWgsl(shape.keys);
  const position = attrs.position === undefined ? "0u" : context.symbolWgsl(attrs.position);
  const seen = attrs.position === undefined ? keys : `${position} + ${tokens}`;
  functions.push(
    keyRowFunction(shape, keys),
    scoreFunctions(attrs, shape, { position, seen, tokens, keys }),
    roundedFunction(attrs),
  );
  return {
    ...step,
    operands,
    functions: functions.join("\n"),
    outAt: (b, head, t) => `${rowAt(b, head, t)} * ${size / 4}u`,
    rows: `(${tokens} * ${group}u)`,
    vectors: size / 4,
    sink: (head) => (shape.extra.sinks >= 0 && withSinks ? `sinks[${head}]` : null),
  };
}

/** The storage of k or v: float32 rows of whole vec4s lie as the format f32 does. */
function layoutOf(context: BuildContext, id: ValueId, size: number): StoredLayout {
  return context.type(id).kind === "format"
    ? context.layout(id)
    : storedLayout(FORMATS.f32, [context.rows(id, context.capacity), size]);
}

function reader(
  prefix: string,
  layout: StoredLayout,
  names: { readonly buffer: string; readonly buffer4?: string },
): string {
  const made = storedReader(prefix, layout, names);
  return `${made.functions}\n${vectorFunction(prefix, layout, made, names)}`;
}

function scoreFunctions(
  attrs: SdpaAttrs,
  shape: AttentionShape,
  { position, seen, tokens, keys }: Readonly<Record<"position" | "seen" | "tokens" | "keys", string>>,
): string {
  const { causal, window, softcap, heads } = attrs;
  const conditions = [
    "j < seen_keys()",
    ...(causal ? ["j <= p"] : window === undefined ? [] : [`j < p + ${window}u`]),
    ...(window === undefined ? [] : [`j + ${window}u > p`]),
  ];
  const to = causal
    ? "min(p + 1u, seen_keys())"
    : window === undefined
      ? "seen_keys()"
      : `min(p + ${window}u, seen_keys())`;
  const lines: string[] = [];
  // tanh by exp: WGSL's may err by 1e-5, which a soft-cap multiplies.
  if (softcap !== undefined)
    lines.push(
      `s = ${floatText(softcap)} * sign(s) * (1.0 - 2.0 / (exp(2.0 * min(abs(s) / ${floatText(softcap)}, 15.0)) + 1.0));`,
    );
  if (shape.extra.mask >= 0) {
    const b = shape.mask.batch ? "b" : "0u";
    const head = shape.mask.heads ? `(${b} * ${heads}u + head)` : b;
    lines.push(`let added = mask[(${head} * ${tokens} + t) * ${keys} + j];`);
    // Bits from -2^100 on down to minus infinity, which WGSL may not know.
    lines.push(`if (added >= 0xf1800000u) { return ${NONE}; }`, "s += bitcast<f32>(added);");
  }
  return `fn seen_keys() -> u32 { return ${seen}; }
fn first_key(t: u32) -> u32 { ${window === undefined ? "return 0u;" : `let p = ${position} + t; return max(p + 1u, ${window}u) - ${window}u;`} }
fn end_key(t: u32) -> u32 { let p = ${position} + t; return ${to}; }
fn hidden(t: u32, j: u32) -> bool { return (j < first_key(t)) | (j >= end_key(t)); }
fn score_of(product: f32, b: u32, head: u32, t: u32, j: u32) -> f32 {
  let p = ${position} + t;
  if (!(${conditions.join(" && ")})) { return ${NONE}; }
  var s = product;
  ${lines.join("\n  ")}
  return s;
}`;
}

/**
 * Whether query `from` or `to` does not see a key that another of the queries between them does, of those from `begin` on. Where this is
 * so, weights of keys that a query does not see are NONE, and `weighedWgsl` leaves their values out: 0 * NaN is NaN.
 */
export function hidesWgsl(begin: string, keys: number, from: string, to: string): string {
  return `(${begin} < first_key(${to})) | (end_key(${from}) < min(${begin} + ${keys}u, last))`;
}

export function weighedWgsl(weight: string, vector: string): string {
  return `select(${weight} * ${vector}, vec4<f32>(), ${weight} == ${NONE})`;
}

function roundedFunction({ probabilities }: SdpaAttrs): string {
  if (probabilities === undefined) return "fn rounded(p: f32) -> f32 { return p; }";
  const { codec, scale } = probabilities;
  return `${encodeFunction(codec, "p_code")}${decodeFunction(codec, "p_value")}
fn rounded(p: f32) -> f32 { return p_value(p_code(p * ${floatText(scale)})) * ${floatText(1 / scale)}; }`;
}

/** Says why a kernel needs more workgroup memory than there is, or null. */
export function memoryUnmet(needed: number, device: Capabilities): string | null {
  return needed <= device.workgroupMemory
    ? null
    : `it needs ${needed} bytes of workgroup memory: ${device.workgroupMemory} are allowed`;
}
