import type { ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { type BuildContext, type Dispatch, read, shaderHead, value, write } from "../kernel.js";
import {
  hidesWgsl,
  keyExtent,
  NONE,
  queryRows,
  REAL,
  type SdpaText,
  sdpaStep,
  sdpaText,
  weighedWgsl,
} from "./sdpa-step.js";

/** Keys of a block: one a thread. */
const BLOCK = 64;
/** Query rows of a workgroup at most: with more, several workgroups read the same keys. */
const MAX_ROWS = 8;
/** A split takes this many keys at least, and there are at most so many splits. */
const SPLIT_KEYS = 256;
const MAX_SPLITS = 64;

export const decodeMemory = (bound: BoundStep): number => {
  const rows = rowsOf(bound).count;
  return rows * sdpaStep(bound).shape.size * 4 + rows * BLOCK * 4 + BLOCK * 4 + 2 * rows * 4 + BLOCK * 16;
};

/** Query rows of a workgroup, and how many workgroups share a KV head. */
function rowsOf(bound: BoundStep): { count: number; blocks: number } {
  const rows = Math.max(queryRows(bound), 1);
  const blocks = Math.ceil(rows / MAX_ROWS);
  return { count: Math.ceil(rows / blocks), blocks };
}

/** Splits of so many keys; the same in WGSL. */
const splitsOf = (keys: number) => Math.min(Math.max(Math.ceil(keys / SPLIT_KEYS), 1), MAX_SPLITS);
const splitsWgsl = (keys: string) => `clamp((${keys} + ${SPLIT_KEYS - 1}u) / ${SPLIT_KEYS}u, 1u, ${MAX_SPLITS}u)`;

/** Bytes of the partial results: maximum and sum, then the unfinished output, of each split of each query row. */
export function splitScratch(bound: BoundStep): number {
  const { batch, kvHeads, size } = sdpaStep(bound).shape;
  const { count, blocks } = rowsOf(bound);
  return batch * kvHeads * blocks * splitsOf(keyExtent(bound)) * count * (size / 4 + 1) * 16;
}

/**
 * Few query rows against many keys (flash decoding; Dao et al. 2023): a workgroup takes the query rows that share a KV head, so
 * that each key is read once for the whole group, and walks its keys 64 at a time. With `split` the keys are divided among
 * workgroups, whose partial results a second pass joins.
 */
export function buildDecode(context: BuildContext, split: boolean): Dispatch[] {
  const { bound } = context;
  const out = bound.step.nodes[0]?.outputs[0] as ValueId;
  const target = split ? ({ kind: "scratch" } as const) : value(out);
  const text = sdpaText(context, write(target), "vec4<f32>", !split);
  const { attrs, shape } = text;
  const { batch, kvHeads } = shape;
  const rows = rowsOf(bound);
  const extent = (dim: string | number, symbols: Readonly<Record<string, number>>) =>
    typeof dim === "number" ? dim : (symbols[dim] ?? 0);
  /** Keys that some query of the step sees, at most. */
  const keys = (symbols: Readonly<Record<string, number>>) => {
    const tokens = extent(shape.tokens, symbols);
    const seen = attrs.position === undefined ? extent(shape.keys, symbols) : (symbols[attrs.position] ?? 0) + tokens;
    return Math.min(seen, attrs.window ?? seen);
  };
  const label = bound.describe();
  const walk: Dispatch = {
    label,
    wgsl: decodeSource(text, rows, split),
    bindings: text.operands.map((operand) => operand.binding),
    workgroups: (symbols) => {
      const empty = extent(shape.tokens, symbols) === 0;
      return [empty ? 0 : split ? splitsOf(keys(symbols)) : 1, batch * kvHeads, rows.blocks];
    },
  };
  if (!split) return [walk];
  const sinks = text.extra("sinks");
  const operands = [
    { name: "parts", type: "vec4<f32>", binding: read({ kind: "scratch" }) },
    ...(sinks === undefined ? [] : [{ name: "sinks", type: "f32", binding: read(value(sinks)) }]),
    { name: "out", type: "vec4<f32>", binding: write(value(out)) },
  ];
  const tokens = context.dimWgsl(shape.tokens);
  const seen =
    attrs.position === undefined ? context.dimWgsl(shape.keys) : `${context.symbolWgsl(attrs.position)} + ${tokens}`;
  const most = attrs.window === undefined ? `(${seen})` : `min(${seen}, ${attrs.window}u)`;
  return [
    walk,
    {
      label: `${label} (join the splits)`,
      wgsl: joinSource(text, rows, shaderHead(operands), splitsWgsl(most), sinks !== undefined),
      bindings: operands.map((operand) => operand.binding),
      workgroups: (symbols) => [extent(shape.tokens, symbols) * text.group, batch * kvHeads, 1],
    },
  ];
}

type Rows = ReturnType<typeof rowsOf>;

function decodeSource(text: SdpaText, { count, blocks }: Rows, split: boolean): string {
  const { group, vectors } = text;
  const { kvHeads } = text.shape;
  const each = (f: (r: number) => string, glue = "\n    ") => Array.from({ length: count }, (_, r) => f(r)).join(glue);
  /** Threads that share a query row's maximum and sum, and parts of a block's keys that are summed side by side. */
  const lanes = BLOCK / 2 ** Math.ceil(Math.log2(count));
  const parts = Math.floor(BLOCK / vectors);
  // Loads in flight at once, of a key and of a column of values; weights past the last key are zero.
  const ahead = [8, 4, 2, 1].find((n) => vectors % n === 0) as number;
  const among = [4, 2, 1].find((n) => BLOCK % (n * parts) === 0) ?? 1;
  const steps = (n: number, f: (i: number) => string) => Array.from({ length: n }, (_, i) => f(i)).join(" ");
  const sink = text.sink("head_of(r0 + mine, h)");
  const base = `((wid.y * ${blocks}u + wid.z) * groups.x + wid.x) * ${count}u`;
  const store = (r: number) =>
    split
      ? `let at = (${base} + ${r}u) * ${vectors + 1}u;
      if (column == 0u) { out[at] = vec4<f32>(tops[${r}], totals[${r}], 0.0, 0.0); }
      out[at + 1u + column] = sum;`
      : `if (r0 + ${r}u < rows) { out[${text.outAt("b", `head_of(r0 + ${r}u, h)`, `((r0 + ${r}u) / ${group}u)`)} + column] = select(vec4<f32>(), sum / totals[${r}], totals[${r}] > 0.0); }`;
  /** A tree over the threads that share a row; `combine` joins two values of `side`. */
  const tree = (combine: (a: string, b: string) => string) => `workgroupBarrier();
    for (var half = ${lanes / 2}u; half > 0u; half /= 2u) {
      if (lane < half) { side[lid] = ${combine("side[lid]", "side[lid + half]")}; }
      workgroupBarrier();
    }`;
  return `${shaderHead(text.operands)}
${text.functions}
fn head_of(r: u32, h: u32) -> u32 { return h * ${group}u + r % ${group}u; }
var<workgroup> query: array<vec4<f32>, ${count * vectors}>;
var<workgroup> weight: array<f32, ${count * BLOCK}>;
var<workgroup> side: array<f32, ${BLOCK}>;
var<workgroup> sums: array<vec4<f32>, ${BLOCK}>;
var<workgroup> tops: array<f32, ${count}>;
var<workgroup> totals: array<f32, ${count}>;
@compute @workgroup_size(${BLOCK})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let b = wid.y / ${kvHeads}u;
  let h = wid.y % ${kvHeads}u;
  let rows = ${text.rows};
  let r0 = wid.z * ${count}u;
  let mine = lid / ${lanes}u;
  let lane = lid % ${lanes}u;
  let column = lid % ${vectors}u;
  let part = lid / ${vectors}u;
  for (var n = lid; n < ${count * vectors}u; n += ${BLOCK}u) {
    let r = min(r0 + n / ${vectors}u, rows - 1u);
    query[n] = query_vec(b, head_of(r, h), r / ${group}u, n % ${vectors}u);
  }
  if (lane == 0u && mine < ${count}u) { tops[mine] = ${sink === null ? NONE : `select(${NONE}, ${sink}, r0 + mine < rows)`}; }
  var first = first_key(min(r0, rows - 1u) / ${group}u);
  var last = end_key((min(r0 + ${count}u, rows) - 1u) / ${group}u);
  ${
    split
      ? `let share = ((last - min(first, last) + ${BLOCK - 1}u) / ${BLOCK}u + groups.x - 1u) / groups.x * ${BLOCK}u;
  first += wid.x * share;
  last = min(last, first + share);`
      : ""
  }
  ${each((r) => `var acc${r} = vec4<f32>(); var total${r} = 0.0;`)}
  ${sink === null ? "" : `if (lid == 0u) { ${each((r) => `total${r} = 1.0;`, " ")} }`}
  workgroupBarrier();
  for (var begin = first; begin < last; begin += ${BLOCK}u) {
    let j = begin + lid;
    let hides = ${hidesWgsl("begin", BLOCK, `min(r0, rows - 1u) / ${group}u`, `(min(r0 + ${count}u, rows) - 1u) / ${group}u`)};
    ${each((r) => `var score${r} = 0.0;`, " ")}
    if (j < last) {
      let row = key_row(b, h, j);
      for (var i = 0u; i < ${vectors}u; i += ${ahead}u) {
        ${steps(ahead, (n) => `let k${n} = kr_raw(row, (i + ${n}u) * 4u);`)}
        ${each((r) => steps(ahead, (n) => `score${r} += dot(query[${r * vectors}u + i + ${n}u], k${n});`), " ")}
      }
      let gain = kr_gain(row);
      ${each((r) => `score${r} *= gain;`, " ")}
    }
    ${each((r) => `{ let r = r0 + ${r}u; var score = ${NONE}; if (j < last && r < rows) { score = score_of(score${r}, b, head_of(r, h), r / ${group}u, j); } weight[${r * BLOCK}u + lid] = score; }`)}
    workgroupBarrier();
    var most = ${NONE};
    if (mine < ${count}u) { for (var x = lane; x < ${BLOCK}u; x += ${lanes}u) { most = max(most, weight[mine * ${BLOCK}u + x]); } }
    side[lid] = most;
    ${tree((a, c) => `max(${a}, ${c})`)}
    ${each((r) => `let top${r} = tops[${r}]; let next${r} = max(top${r}, side[${r * lanes}u]);`)}
    // The scale of a value's row goes into its weight, once a key.
    let gain = vr_gain(key_row(b, h, min(j, last - 1u)));
    ${each(
      (r) => `{
      let score = weight[${r * BLOCK}u + lid];
      let p = select(0.0, exp(score - next${r}), score > ${REAL});
      let factor = select(exp(top${r} - next${r}), 1.0, top${r} == next${r});
      weight[${r * BLOCK}u + lid] = rounded(p) * gain;
      if (hides) { if (hidden((r0 + ${r}u) / ${group}u, j)) { weight[${r * BLOCK}u + lid] = ${NONE}; } }
      total${r} = total${r} * factor + p;
      acc${r} *= factor;
    }`,
    )}
    workgroupBarrier();
    if (lane == 0u && mine < ${count}u) { tops[mine] = max(tops[mine], side[lid]); }
    if (part < ${parts}u) {
      for (var x = part; x < min(${BLOCK}u, last - begin); x += ${parts * among}u) {
        ${steps(among, (n) => `let v${n} = vr_raw(key_row(b, h, min(begin + x + ${n * parts}u, last - 1u)), column * 4u);`)}
        if (hides) {
          ${each((r) => steps(among, (n) => `acc${r} += ${weighedWgsl(`weight[${r * BLOCK}u + x + ${n * parts}u]`, `v${n}`)};`), " ")}
        } else {
          ${each((r) => steps(among, (n) => `acc${r} += weight[${r * BLOCK}u + x + ${n * parts}u] * v${n};`), " ")}
        }
      }
    }
    workgroupBarrier();
  }
  ${each((r) => `weight[${r * BLOCK}u + lid] = total${r};`)}
  workgroupBarrier();
  var sum_here = 0.0;
  if (mine < ${count}u) { for (var x = lane; x < ${BLOCK}u; x += ${lanes}u) { sum_here += weight[mine * ${BLOCK}u + x]; } }
  side[lid] = sum_here;
  ${tree((a, c) => `${a} + ${c}`)}
  if (lane == 0u && mine < ${count}u) { totals[mine] = side[lid]; }
  workgroupBarrier();
  ${each(
    (r) => `sums[lid] = acc${r};
  workgroupBarrier();
  if (part == 0u) {
    var sum = vec4<f32>();
    for (var x = column; x < ${parts * vectors}u; x += ${vectors}u) { sum += sums[x]; }
    ${store(r)}
  }
  workgroupBarrier();`,
  )}
}`;
}

/** Joins the splits of one query row: the largest maximum, then sums weighed by exp(maximum - largest). */
function joinSource(text: SdpaText, { count, blocks }: Rows, head: string, splits: string, sinks: boolean): string {
  const { group, vectors } = text;
  const { kvHeads } = text.shape;
  const [tokenB, headB] = [`wid.y / ${kvHeads}u`, `(wid.y % ${kvHeads}u * ${group}u + r % ${group}u)`];
  return `${head}
@compute @workgroup_size(${BLOCK})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let r = wid.x;
  let splits = ${splits};
  let from_block = (wid.y * ${blocks}u + r / ${count}u) * splits;
  let column = min(lid, ${vectors - 1}u);
  var top = ${sinks ? `sinks[${headB}]` : NONE};
  for (var s = 0u; s < splits; s++) { top = max(top, parts[((from_block + s) * ${count}u + r % ${count}u) * ${vectors + 1}u].x); }
  var total = ${sinks ? `exp(sinks[${headB}] - top)` : "0.0"};
  var sum = vec4<f32>();
  for (var s = 0u; s < splits; s++) {
    let at = ((from_block + s) * ${count}u + r % ${count}u) * ${vectors + 1}u;
    let share = exp(parts[at].x - top);
    total += parts[at].y * share;
    sum += parts[at + 1u + column] * share;
  }
  if (lid < ${vectors}u) { out[${text.outAt(tokenB, headB, `(r / ${group}u)`)} + lid] = select(vec4<f32>(), sum / total, total > 0.0); }
}`;
}
