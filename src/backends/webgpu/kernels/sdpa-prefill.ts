import type { ValueId } from "../../../ir/graph.js";
import { type BuildContext, type Dispatch, shaderHead, value, write } from "../kernel.js";
import { hidesWgsl, NONE, queryRows, REAL, type SdpaText, sdpaText, weighedWgsl } from "./sdpa-step.js";

/** Query rows and keys of a tile. A thread makes MICRO x MICRO scores, and MICRO rows of a vec4 of outputs per chunk. */
const TILE = 32;
const MICRO = 4;
const THREADS = (TILE / MICRO) ** 2;
/** Vec4s that a thread's step along the head dimension covers, and a tile row's pitch: rows fall in different banks. */
const VECTORS = 8;
const PITCH = VECTORS + 1;

export const PREFILL_TILE = TILE;
export const PREFILL_MEMORY = 2 * TILE * PITCH * 16 + TILE * (TILE + 1) * 4 + 2 * THREADS * 4 + TILE * 4;

/**
 * Online softmax in tiles (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022): a workgroup takes 32 query rows of
 * one KV head, the rows of all query heads that share it, and walks the keys 32 at a time.
 */
export function buildPrefill(context: BuildContext): Dispatch[] {
  const out = context.bound.step.nodes[0]?.outputs[0] as ValueId;
  const text = sdpaText(context, write(value(out)), "vec4<f32>");
  const { batch, kvHeads } = text.shape;
  const capacity = queryRows(context.bound);
  return [
    {
      label: context.bound.describe(),
      wgsl: prefillSource(text),
      bindings: text.operands.map((operand) => operand.binding),
      workgroups: (symbols) => {
        const { tokens } = text.shape;
        const rows = typeof tokens === "number" ? capacity : (symbols[tokens] ?? 0) * text.group;
        return [Math.ceil(rows / TILE), batch * kvHeads, 1];
      },
    },
  ];
}

function prefillSource(text: SdpaText): string {
  const { group, vectors, rows } = text;
  const { kvHeads } = text.shape;
  const chunks = Math.ceil(vectors / VECTORS);
  const ragged = vectors % VECTORS !== 0;
  const each = <T>(f: (i: number) => T): T[] => Array.from({ length: MICRO }, (_, i) => f(i));
  const accumulators = Array.from({ length: chunks }, (_, c) => each((i) => `acc${c}_${i}`));
  const sink = text.sink("head_of(r0 + lid / 2u, h)");
  const guard = (load: string, ok: string) => `tile[slot] = vec4<f32>(); if (${ok}) { tile[slot] = ${load}; }`;
  const inside = (i: string) => (ragged ? ` && ${i} < ${vectors}u` : "");
  const fill = (
    tile: string,
    ok: string,
    load: string,
  ) => `for (var n = lid; n < ${TILE * VECTORS}u; n += ${THREADS}u) {
      let line = n / ${VECTORS}u; let i = c * ${VECTORS}u + n % ${VECTORS}u; let slot = line * ${PITCH}u + n % ${VECTORS}u;
      ${guard(load, `${ok}${inside("i")}`).replaceAll("tile[", `${tile}[`)}
    }`;
  const key = "key_row(b, h, begin + line)";
  const weight = (i: number) => `tile_p[(tm * ${MICRO}u + ${i}u) * ${TILE + 1}u + j]`;
  const product = (c: number) => `{
    let c = ${c}u;
    ${fill("tile_k", "begin + line < last", `vr_vec(${key}, i * 4u)`)}
    workgroupBarrier();
    if (hides) {
      for (var j = 0u; j < ${TILE}u; j++) {
        let v = tile_k[j * ${PITCH}u + tn];
        ${each((i) => `acc${c}_${i} += ${weighedWgsl(weight(i), "v")};`).join("\n        ")}
      }
    } else {
      for (var j = 0u; j < ${TILE}u; j++) {
        let v = tile_k[j * ${PITCH}u + tn];
        ${each((i) => `acc${c}_${i} += ${weight(i)} * v;`).join("\n        ")}
      }
    }
    workgroupBarrier();
  }`;
  const scores = each((i) => {
    const row = `tm * ${MICRO}u + ${i}u`;
    return `{ let r = r0 + ${row}; let t = r / ${group}u;
    for (var j = 0u; j < ${MICRO}u; j++) {
      let at = tn * ${MICRO}u + j;
      var score = ${NONE};
      if (r < rows && begin + at < last) { score = score_of(sum${i}[j], b, head_of(r, h), t, begin + at); }
      tile_p[(${row}) * ${TILE + 1}u + at] = score;
    } }`;
  });
  const stores = accumulators.flatMap((list, c) =>
    list.map((name, i) => {
      const row = `tm * ${MICRO}u + ${i}u`;
      const ok = ragged ? `r0 + ${row} < rows && ${c * VECTORS}u + tn < ${vectors}u` : `r0 + ${row} < rows`;
      return `if (${ok}) { let r = r0 + ${row};
    let total = pair[(${row}) * 2u] + pair[(${row}) * 2u + 1u];
    out[${text.outAt("b", "head_of(r, h)", `(r / ${group}u)`)} + ${c * VECTORS}u + tn] = select(vec4<f32>(), ${name} / total, total > 0.0); }`;
    }),
  );
  return `${shaderHead(text.operands)}
${text.functions}
fn head_of(r: u32, h: u32) -> u32 { return h * ${group}u + r % ${group}u; }
var<workgroup> tile_q: array<vec4<f32>, ${TILE * PITCH}>;
var<workgroup> tile_k: array<vec4<f32>, ${TILE * PITCH}>;
var<workgroup> tile_p: array<f32, ${TILE * (TILE + 1)}>;
var<workgroup> pair: array<f32, ${THREADS}>;
var<workgroup> shrink: array<f32, ${TILE}>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let b = wid.y / ${kvHeads}u;
  let h = wid.y % ${kvHeads}u;
  let rows = ${rows};
  let r0 = wid.x * ${TILE}u;
  let tm = lid / ${TILE / MICRO}u;
  let tn = lid % ${TILE / MICRO}u;
  let first = first_key(r0 / ${group}u);
  let last = end_key((min(r0 + ${TILE}u, rows) - 1u) / ${group}u);
  // Two threads keep a row's softmax: its running maximum in both, its sum in halves.
  var top = ${NONE};
  var total = 0.0;
  ${sink === null ? "" : `if (r0 + lid / 2u < rows) { top = ${sink}; total = f32(1u - lid % 2u); }`}
  ${accumulators
    .flat()
    .map((name) => `var ${name} = vec4<f32>();`)
    .join(" ")}
  for (var begin = first; begin < last; begin += ${TILE}u) {
    let hides = ${hidesWgsl("begin", TILE, `r0 / ${group}u`, `(min(r0 + ${TILE}u, rows) - 1u) / ${group}u`)};
    ${each((i) => `var sum${i} = vec4<f32>();`).join(" ")}
    for (var c = 0u; c < ${chunks}u; c++) {
    ${fill("tile_q", "r0 + line < rows", `query_vec(b, head_of(r0 + line, h), (r0 + line) / ${group}u, i)`)}
    ${fill("tile_k", "begin + line < last", `kr_vec(${key}, i * 4u)`)}
    workgroupBarrier();
    for (var v = 0u; v < ${VECTORS}u; v++) {
      ${each((j) => `let k${j} = tile_k[(tn * ${MICRO}u + ${j}u) * ${PITCH}u + v];`).join(" ")}
      ${each((i) => `{ let x = tile_q[(tm * ${MICRO}u + ${i}u) * ${PITCH}u + v]; sum${i} += vec4<f32>(${each((j) => `dot(x, k${j})`).join(", ")}); }`).join("\n      ")}
    }
    workgroupBarrier();
    }
    ${scores.join("\n    ")}
    workgroupBarrier();
    let half = (lid / 2u) * ${TILE + 1}u + (lid % 2u) * ${TILE / 2}u;
    var most = top;
    for (var j = 0u; j < ${TILE / 2}u; j++) { most = max(most, tile_p[half + j]); }
    pair[lid] = most;
    workgroupBarrier();
    let next = max(most, pair[lid ^ 1u]);
    let factor = select(exp(top - next), 1.0, top == next);
    var sum = 0.0;
    for (var j = 0u; j < ${TILE / 2}u; j++) {
      let score = tile_p[half + j];
      let p = select(0.0, exp(score - next), score > ${REAL});
      sum += p;
      tile_p[half + j] = rounded(p);
      if (hides) { if (hidden((r0 + lid / 2u) / ${group}u, begin + (lid % 2u) * ${TILE / 2}u + j)) { tile_p[half + j] = ${NONE}; } }
    }
    total = total * factor + sum;
    top = next;
    if (lid % 2u == 0u) { shrink[lid / 2u] = factor; }
    workgroupBarrier();
    ${each((i) => `{ let factor = shrink[tm * ${MICRO}u + ${i}u]; ${accumulators.map((list) => `${list[i]} *= factor;`).join(" ")} }`).join("\n    ")}
    ${accumulators.map((_, c) => product(c)).join("\n    ")}
  }
  pair[lid] = total;
  workgroupBarrier();
  ${stores.join("\n  ")}
}`;
}
