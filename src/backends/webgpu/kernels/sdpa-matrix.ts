import type { Codec } from "../../../formats/format.js";
import { FORMATS } from "../../../formats/table.js";
import type { TensorType, ValueId } from "../../../ir/graph.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import type { Capabilities } from "../../backend.js";
import { type BuildContext, type Dispatch, shaderHead, value, write } from "../kernel.js";
import { elevenBits, matrixUnit, SUBGROUP, UNIT } from "./matrix.js";
import { memoryUnmet, NONE, queryRows, REAL, type SdpaText, sdpaStep, sdpaText } from "./sdpa-step.js";

/** Subgroups take 16 query rows each and walk the keys 32 at a time; eight share a tile of keys where memory allows it. */
const FEW = 4;
const MANY = 8;
const KEYS = 32;
const LARGEST_HEAD = 128;
const MOST_BITS = 20;
/** Scaled probabilities from 2^-4 to 2^15 keep 21 bits in two f16 parts; smaller ones are taken times 2^19 in another round. */
const SMALL = "0.0625";
const ROUND = "524288.0";
/** Pitches of rows in workgroup memory: rows fall in different banks, and begin at multiples of 16 bytes. */
const P_PITCH = KEYS + 8;
const STAGE_PITCH = 2 * UNIT + 4;

export const MATRIX_ROWS = FEW * UNIT;

/** f16 parts of k's or v's elements (of their codes, where one scale a row can wait): one where 11 bits hold them, else two. */
export function matrixParts(type: TensorType): 1 | 2 {
  const format = type.kind === "format" ? type.format : FORMATS.f32;
  const { element, scales, zero } = format;
  if (zero.domain !== "none" || scales.some(({ block }) => block[1] !== "all")) return 2;
  if (element.kind === "int") return element.bits <= 11 ? 1 : 2;
  return element.kind === "float" && element.mantissa <= 10 ? 1 : 2;
}

/** Significant bits that an element of k or v may need, scales that change along its row among them; infinite where parts are added. */
function significantBits(type: TensorType): number {
  const { element, scales, zero } = type.kind === "format" ? type.format : FORMATS.f32;
  const of = (codec: Codec) =>
    codec.kind === "float" ? codec.mantissa + 1 : codec.kind === "int" ? codec.bits : codec.kind === "lut" ? 24 : 0;
  if (zero.domain === "float") return Number.POSITIVE_INFINITY;
  const changing = scales.filter(({ block }) => block[1] !== "all");
  return changing.reduce((sum, { codec }) => sum + of(codec), of(element) + (zero.domain === "int" ? 1 : 0));
}

function partsOf(bound: BoundStep): readonly [k: 1 | 2, v: 1 | 2] {
  const [, k, v] = sdpaStep(bound).node.inputs as readonly [ValueId, ValueId, ValueId];
  return [matrixParts(bound.type(k)), matrixParts(bound.type(v))];
}

/** Bytes of workgroup memory that a workgroup of so many subgroups takes. */
export function matrixMemory(bound: BoundStep, subgroups = FEW): number {
  const pitch = sdpaStep(bound).shape.size + 8;
  const rows = subgroups * UNIT;
  const tile = Math.max(...partsOf(bound)) * KEYS * pitch * 2;
  return tile + 2 * rows * P_PITCH * 2 + rows * STAGE_PITCH * 4 + (2 * KEYS + rows + subgroups) * 4;
}

function subgroupsOf(bound: BoundStep, device: Capabilities): number {
  const many =
    queryRows(bound) >= MANY * UNIT &&
    sdpaStep(bound).shape.size % (4 * MANY) === 0 &&
    matrixMemory(bound, MANY) <= device.workgroupMemory &&
    MANY * SUBGROUP <= device.maxInvocations;
  return many ? MANY : FEW;
}

/** What the matrix tier asks for beyond every attention kernel's requirements. */
export const sdpaMatrixRequirements: readonly Requirement[] = [
  matrixUnit,
  {
    unmet: (bound) => {
      const rows = queryRows(bound);
      return rows >= UNIT ? null : `a KV head must have at least ${UNIT} query rows (tokens x heads): it has ${rows}`;
    },
  },
  {
    unmet: (bound) => {
      const { size } = sdpaStep(bound).shape;
      return size % UNIT === 0 && size <= LARGEST_HEAD
        ? null
        : `the head dimension must be a multiple of ${UNIT} up to ${LARGEST_HEAD}: it is ${size}`;
    },
  },
  {
    // Two f16 parts hold this many bits of an element 2^-18 of its row's largest; wider ones would lose bits there.
    unmet: (bound) => {
      const [, k, v] = sdpaStep(bound).node.inputs as readonly [ValueId, ValueId, ValueId];
      const bits = Math.max(...[k, v].map((id) => significantBits(bound.type(id))));
      return bits <= MOST_BITS
        ? null
        : `keys and values must have at most ${MOST_BITS} significant bits, for f16 parts: theirs may have ${Number.isFinite(bits) ? bits : "any number of them"}`;
    },
  },
  { unmet: (bound, device) => memoryUnmet(matrixMemory(bound), device) },
];

/**
 * The tiles of `sdpa-prefill.ts` on matrix units (f16 to f32). No operand loses more than a float32 sum does: rows of q, k and v
 * are scaled by powers of two and split into f16 parts of 11 bits, and so are probabilities, tile by tile (docs/numerics.md).
 */
export function buildMatrixPrefill(context: BuildContext): Dispatch[] {
  const { bound } = context;
  const out = bound.step.nodes[0]?.outputs[0] as ValueId;
  const text = sdpaText(context, write(value(out)), "f32");
  const { batch, kvHeads, tokens } = text.shape;
  const capacity = queryRows(bound);
  const subgroups = subgroupsOf(bound, context.device);
  return [
    {
      label: bound.describe(),
      wgsl: matrixPrefillSource(text, partsOf(bound), subgroups),
      bindings: text.operands.map((operand) => operand.binding),
      workgroups: (symbols) => {
        const rows = typeof tokens === "number" ? capacity : (symbols[tokens] ?? 0) * text.group;
        return [Math.ceil(rows / (subgroups * UNIT)), batch * kvHeads, 1];
      },
    },
  ];
}

const list = <T>(n: number, f: (i: number) => T): T[] => Array.from({ length: n }, (_, i) => f(i));

/** Statements that put a vec4 into one or two f16 tiles at `slot`. */
function put(hi: string, lo: string | null, vector: string, slot: string): string {
  const each = (tile: string, half: string) =>
    list(4, (lane) => `${tile}[${slot} + ${lane}u] = ${half}.${"xyzw"[lane]};`).join(" ");
  if (lo === null) return `{ let h = vec4<f16>(${vector}); ${each(hi, "h")} }`;
  return `{ let s = ${vector}; let top = ${elevenBits("s")}; let h = vec4<f16>(top); let l = vec4<f16>(s - top);
      ${each(hi, "h")} ${each(lo, "l")} }`;
}

function matrixPrefillSource(text: SdpaText, [kParts, vParts]: readonly [1 | 2, 1 | 2], subgroups: number): string {
  const { group, vectors, rows } = text;
  const { kvHeads, size } = text.shape;
  const pitch = size + 8;
  const steps = size / UNIT;
  const threads = subgroups * SUBGROUP;
  const tileRows = subgroups * UNIT;
  /** Threads that fill a key's row, and vec4s that each of them brings. */
  const team = threads / KEYS;
  const share = vectors / team;
  const two = Math.max(kParts, vParts) === 2;
  const sink = text.sink("head_of(r, h)");
  const load = (side: "left" | "right", order: string, tile: string, at: string, stride: number) =>
    `subgroupMatrixLoad<subgroup_matrix_${side}<f16, ${UNIT}, ${UNIT}>, ${order}_major>(&${tile}, ${at}, ${stride}u)`;
  const zero = `subgroup_matrix_result<f32, ${UNIT}, ${UNIT}>()`;
  const add = (acc: string, left: string, right: string) =>
    `${acc} = subgroupMatrixMultiplyAccumulate(${left}, ${right}, ${acc});`;
  const keep = (acc: string, column: number) =>
    `subgroupMatrixStore<row_major>(&stage, sg * ${UNIT * STAGE_PITCH}u + ${column}u, ${acc}, ${STAGE_PITCH}u);`;

  // Queries pass through the tiles of probabilities, 32 columns at a time, into registers.
  const queries = list(Math.ceil(steps / 2), (c) => {
    const units = [2 * c, 2 * c + 1].filter((s) => s < steps);
    const fill = list(4, (n) => {
      const i = `${c * 8 + n}u + half * 4u`;
      return `{ var x = vec4<f32>(); let i = ${i}; if (inside && i < ${vectors}u) { x = query_vec(b, head_of(r, h), r / ${group}u, i) * scale; }
      ${put("p_hi", "p_lo", "x", `line * ${P_PITCH}u + half * 16u + ${n * 4}u`)} }`;
    });
    return `${fill.join("\n  ")}
  workgroupBarrier();
  ${units
    .flatMap((s) =>
      ["hi", "lo"].map(
        (part) =>
          `let q_${part}${s} = ${load("left", "row", `p_${part}`, `sg * ${UNIT * P_PITCH}u + ${(s % 2) * UNIT}u`, P_PITCH)};`,
      ),
    )
    .join("\n  ")}
  workgroupBarrier();`;
  });

  /** Puts a tile of keys' rows into workgroup memory: a team of threads a row. */
  const tile = (prefix: "kr" | "vr", parts: 1 | 2, gains: string) => `{
    let line = lid / ${team}u;
    let present = begin + line < last;
    var row = 0u;
    if (present) { row = key_row(b, h, begin + line); }
    var most = 0u;
    ${list(share, (n) => `var x${n} = vec4<f32>();`).join(" ")}
    if (present) {
      ${list(share, (n) => `x${n} = ${prefix}_raw(row, ${n * team * 4}u + lid % ${team}u * 4u);`).join("\n      ")}
      ${list(share, (n) => `most = max(most, largest(x${n}));`).join("\n      ")}
    }
    ${list(Math.log2(team), (n) => `most = max(most, subgroupShuffleXor(most, ${2 ** n}u));`).join("\n    ")}
    let exponent = scale_exponent(most);
    let scale = bitcast<f32>(exponent << 23u);
    if (lid % ${team}u == 0u) {
      var gain = 0.0;
      if (present) { gain = ${prefix}_gain(row) * bitcast<f32>((254u - exponent) << 23u); }
      ${gains}[line] = gain;
    }
    ${list(share, (n) => put("tile_hi", parts === 2 ? "tile_lo" : null, `x${n} * scale`, `line * ${pitch}u + ${n * team * 4}u + lid % ${team}u * 4u`)).join("\n    ")}
  }`;

  // Small products first: the sum is small while they join it.
  const scores = list(KEYS / UNIT, (j) => {
    const at = (s: number) => `${j * UNIT * pitch + s * UNIT}u`;
    return `{ var acc = ${zero};
    ${list(steps, (s) => `let k${s} = ${load("right", "col", "tile_hi", at(s), pitch)}; ${add("acc", `q_lo${s}`, `k${s}`)}`).join("\n    ")}
    ${kParts === 2 ? list(steps, (s) => `{ let lo = ${load("right", "col", "tile_lo", at(s), pitch)}; ${add("acc", `q_hi${s}`, "lo")} }`).join("\n    ") : ""}
    ${list(steps, (s) => add("acc", `q_hi${s}`, `k${s}`)).join("\n    ")}
    ${keep("acc", j * UNIT)} }`;
  });

  // A lane keeps columns (lane % 4) + 4 i of rows lane / 4 and lane / 4 + 8 of its subgroup's 16.
  const column = (i: number) => `lane % 4u + ${4 * i}u`;
  const staged = (e: number, at: string) => `stage[(row${e}) * ${STAGE_PITCH}u + ${at}]`;
  const softmax = list(2, (e) => {
    const n = KEYS / 4;
    return `{
    ${list(
      n,
      (i) =>
        `var s${i} = ${NONE}; { let j = ${column(i)}; if (ok${e} && begin + j < last) { s${i} = score_of(${staged(e, "j")} * q_gain${e} * k_gain[j], b, head${e}, t${e}, begin + j); } }`,
    ).join("\n    ")}
    var most = ${list(n, (i) => `s${i}`).reduce((a, b) => `max(${a}, ${b})`)};
    most = max(most, subgroupShuffleXor(most, 1u));
    most = max(most, subgroupShuffleXor(most, 2u));
    let next = max(top${e}, most);
    old${e} = select(exp(top${e} - next), 1.0, top${e} == next);
    let now = select(exp(most - next), 1.0, most == next);
    var sum = 0.0;
    ${list(
      n,
      (i) => `{ let p = select(0.0, exp(s${i} - most), s${i} > ${REAL}); sum += p;
      x${e}_${i} = rounded(p) * (v_gain[${column(i)}] * shrink); }`,
    ).join("\n    ")}
    total${e} = total${e} * old${e} + sum * now;
    top${e} = next;
    new${e} = now;
    }`;
  });
  // What is too small for the parts of this round is scaled up and waits for the next one.
  const round = list(2, (e) =>
    list(
      KEYS / 4,
      (i) => `{ let at = (row${e}) * ${P_PITCH}u + ${column(i)}; let now = abs(x${e}_${i}) >= ${SMALL};
      let x = select(0.0, x${e}_${i}, now); x${e}_${i} = select(x${e}_${i} * ${ROUND}, 0.0, now);
      let hi = bitcast<f32>((bitcast<u32>(x) + 0x1000u) & 0xffffe000u);
      p_hi[at] = f16(hi); p_lo[at] = f16(x - hi); }`,
    ).join("\n      "),
  ).join("\n      ");
  const rest = list(2, (e) => list(KEYS / 4, (i) => `abs(x${e}_${i})`))
    .flat()
    .reduce((a, b) => `max(${a}, ${b})`);

  const products = list(Math.ceil(steps / 2), (c) => {
    const units = [2 * c, 2 * c + 1].filter((u) => u < steps);
    const make = units.map((u) => {
      const at = (s: number) => `${s * UNIT * pitch + u * UNIT}u`;
      return `{ var acc = ${zero};
      ${list(2, (s) => `let v${s} = ${load("right", "row", "tile_hi", at(s), pitch)}; ${add("acc", `p_lo${s}`, `v${s}`)}`).join("\n      ")}
      ${vParts === 2 ? list(2, (s) => `{ let lo = ${load("right", "row", "tile_lo", at(s), pitch)}; ${add("acc", `p_hi${s}`, "lo")} }`).join("\n      ") : ""}
      ${list(2, (s) => add("acc", `p_hi${s}`, `v${s}`)).join(" ")}
      ${keep("acc", (u % 2) * UNIT)} }`;
    });
    const take = units.flatMap((u) =>
      list(
        2,
        (e) =>
          `o${u}_${e} = o${u}_${e} * old${e} + vec4<f32>(${list(4, (i) => staged(e, `${(u % 2) * UNIT}u + ${column(i)}`)).join(", ")}) * grow * new${e};`,
      ),
    );
    return `${make.join("\n    ")}
    workgroupBarrier();
    ${take.join("\n    ")}
    workgroupBarrier();`;
  });

  const stores = list(
    2,
    (
      e,
    ) => `{ let whole = total${e} + subgroupShuffleXor(total${e}, 1u); let sum = whole + subgroupShuffleXor(whole, 2u);
  if (ok${e}) {
    let at = ${text.outAt("b", `head${e}`, `t${e}`)} * 4u + lane % 4u;
    let factor = select(0.0, 1.0 / sum, sum > 0.0);
    ${list(steps, (u) => list(4, (i) => `out[at + ${u * UNIT + 4 * i}u] = o${u}_${e}.${"xyzw"[i]} * factor;`).join(" ")).join("\n    ")}
  } }`,
  );

  return `${shaderHead(text.operands, ["f16", "subgroups", "chromium_experimental_subgroup_matrix"])}
${text.functions}
fn head_of(r: u32, h: u32) -> u32 { return h * ${group}u + r % ${group}u; }
fn largest(x: vec4<f32>) -> u32 {
  let bits = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
  return max(max(bits.x, bits.y), max(bits.z, bits.w));
}
// The exponent of the power of two that takes a magnitude into [2^14, 2^15); the power and its inverse are normal numbers.
fn scale_exponent(most: u32) -> u32 { return u32(clamp(268 - i32(most >> 23u), 1, 253)); }
var<workgroup> tile_hi: array<f16, ${KEYS * pitch}>;
${two ? `var<workgroup> tile_lo: array<f16, ${KEYS * pitch}>;` : ""}
var<workgroup> p_hi: array<f16, ${tileRows * P_PITCH}>;
var<workgroup> p_lo: array<f16, ${tileRows * P_PITCH}>;
var<workgroup> stage: array<f32, ${tileRows * STAGE_PITCH}>;
var<workgroup> k_gain: array<f32, ${KEYS}>;
var<workgroup> v_gain: array<f32, ${KEYS}>;
var<workgroup> waiting: array<f32, ${subgroups}>;
var<workgroup> q_gain: array<f32, ${tileRows}>;
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32,
  @builtin(subgroup_id) sg: u32, @builtin(subgroup_invocation_id) lane: u32) {
  let b = wid.y / ${kvHeads}u;
  let h = wid.y % ${kvHeads}u;
  let rows = ${rows};
  let r0 = wid.x * ${tileRows}u;
  let first = first_key(r0 / ${group}u);
  let last = end_key((min(r0 + ${tileRows}u, rows) - 1u) / ${group}u);
  let line = lid / 2u;
  let half = lid % 2u;
  let r = r0 + line;
  let inside = r < rows;
  var most_q = 0u;
  if (inside) { for (var i = half; i < ${vectors}u; i += 2u) { most_q = max(most_q, largest(query_vec(b, head_of(r, h), r / ${group}u, i))); } }
  most_q = max(most_q, subgroupShuffleXor(most_q, 1u));
  let exponent = scale_exponent(most_q);
  let scale = bitcast<f32>(exponent << 23u);
  if (half == 0u) { q_gain[line] = bitcast<f32>((254u - exponent) << 23u); }
  ${queries.join("\n  ")}
  ${list(2, (e) => {
    const made = `let row${e} = sg * ${UNIT}u + lane / 4u + ${8 * e}u; let ok${e} = r0 + row${e} < rows; let head${e} = head_of(r0 + row${e}, h);
  let t${e} = (r0 + row${e}) / ${group}u; let q_gain${e} = q_gain[row${e}];
  var top${e} = ${NONE}; var total${e} = 0.0; var old${e} = 1.0; var new${e} = 0.0;`;
    return sink === null
      ? made
      : `${made}\n  if (ok${e}) { top${e} = ${text.sink(`head${e}`)}; total${e} = select(0.0, 1.0, lane % 4u == 0u); }`;
  }).join("\n  ")}
  ${list(steps, (u) => `var o${u}_0 = vec4<f32>(); var o${u}_1 = vec4<f32>();`).join("\n  ")}
  for (var begin = first; begin < last; begin += ${KEYS}u) {
    ${tile("kr", kParts, "k_gain")}
    workgroupBarrier();
    ${scores.join("\n    ")}
    workgroupBarrier();
    ${tile("vr", vParts, "v_gain")}
    workgroupBarrier();
    // Probabilities carry the scales of v's rows; a power of two brings the largest of these to 2^14 or more.
    let widest = subgroupMax(bitcast<u32>(v_gain[lane]) & 0x7fffffffu);
    let lift = scale_exponent(widest);
    let shrink = bitcast<f32>(lift << 23u);
    let grow = bitcast<f32>((254u - lift) << 23u);
    ${list(2, (e) => list(KEYS / 4, (i) => `var x${e}_${i} = 0.0;`).join(" ")).join("\n    ")}
    ${softmax.join("\n    ")}
    loop {
      ${round}
      let rest = subgroupMax(${rest});
      if (lane == 0u) { waiting[sg] = rest; }
      let waits = workgroupUniformLoad(&waiting);
      ${list(2, (s) => ["hi", "lo"].map((part) => `let p_${part}${s} = ${load("left", "row", `p_${part}`, `sg * ${UNIT * P_PITCH}u + ${s * UNIT}u`, P_PITCH)};`).join("\n      ")).join("\n      ")}
      ${products.join("\n      ")}
      if (!(${list(subgroups, (i) => `waits[${i}]`).reduce((a, b) => `max(${a}, ${b})`)} > 0.0)) { break; }
      old0 = 1.0; old1 = 1.0; new0 /= ${ROUND}; new1 /= ${ROUND};
    }
  }
  ${stores.join("\n  ")}
}`;
}
