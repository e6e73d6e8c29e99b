import type { Codec } from "../../../formats/format.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import {
  type BuildContext,
  type Dispatch,
  flatGrid,
  read,
  shaderHead,
  value,
  type WebGpuKernel,
  write,
} from "../kernel.js";
import { CHUNK, type StoredReader } from "../wgsl/stored.js";
import { activationRows } from "./gemv.js";
import { chunked, type LinearParts, type LinearStep, linearParts, linearStep } from "./linear.js";

/** A workgroup of four subgroups makes TILE x TILE outputs, a subgroup a quarter of them in UNIT x UNIT matrices. */
const TILE = 64;
export const UNIT = 16;
export const SUBGROUP = 32;
const THREADS = 4 * SUBGROUP;
/** f16 elements of a tile row in workgroup memory: a chunk and padding against bank conflicts. */
const PITCH = CHUNK + 8;
/** Elements of K whose int8 products sum exactly in f32: 2^24 / 2^14. */
const EXACT_RUN = 1024;

/** Whether every value of a codec is a float16, so that tensor cores multiply it exactly. */
export function exactInF16(codec: Codec): boolean {
  if (codec.kind === "int") return codec.bits <= 11;
  if (codec.kind !== "float") return false;
  const largest = 2 ** codec.exponent - 1 - codec.bias;
  return codec.mantissa <= 10 && largest <= 15 && 1 - codec.bias - codec.mantissa >= -24;
}

/** The matrix unit multiplies f16 and adds in f32; a kernel may use it only where that changes no product. */
const exactOperands: Requirement = {
  unmet: (bound) => {
    const { x, parts, k } = linearStep(bound);
    if (k % CHUNK !== 0) return `K must be a multiple of ${CHUNK}: K is ${k}`;
    for (const id of [x, ...parts.flat()]) {
      const type = bound.type(id);
      if (type.kind === "dense") continue;
      const { format } = type;
      if (!exactInF16(format.element))
        return `${bound.name(id)}: ${format.name} holds values that are not exact in f16`;
      if (format.zero.domain === "int" && format.zero.codec.kind !== "int")
        return `${bound.name(id)}: its zero point is not an integer`;
      if (format.zero.domain === "float")
        return `${bound.name(id)}: a float zero point cannot be folded into f16 exactly`;
      if (format.scales.some(({ block }) => block[1] !== "all" && block[1] < k)) {
        return `${bound.name(id)}: its scale changes along K, and the scaled values are not exact in f16`;
      }
    }
    return null;
  },
};

const manyRows: Requirement = {
  unmet: (bound) => {
    const rows = activationRows(bound);
    return rows >= UNIT ? null : `M must be at least ${UNIT}: M is ${rows}`;
  },
};

export const matrixUnit: Requirement = {
  unmet: (_, device) => {
    for (const feature of ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix"]) {
      if (!device.features.has(feature)) return `the device has no ${feature}`;
    }
    if (!device.features.has("subgroup-matrix-f16-f32-16x16x16")) return "its matrix unit has no f16 to f32 16x16x16";
    const [min, max] = device.subgroupSize;
    return min === SUBGROUP && max === SUBGROUP
      ? null
      : `its subgroups must have ${SUBGROUP} invocations: ${min} to ${max}`;
  },
};

/**
 * Tensor cores through Dawn's experimental subgroup matrices. A float32 activation is split into two f16 parts after its row
 * was scaled by a power of two: hi + lo keeps 22 bits, far below the f32 bound of a long sum (docs/numerics.md).
 */
export const MATRIX_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/linear/subgroup_matrix",
    kind: "linear",
    requires: [matrixUnit, manyRows, chunked, exactOperands],
    rowTile: TILE,
    efficiency: { bandwidth: 0.3, compute: 2 },
    scratch: (bound) => (isSplit(bound) ? activationRows(bound) * 4 : 0),
    build: buildMatrix,
  },
];

/** Whether x is dense float32, to be split. */
function isSplit(bound: BoundStep): boolean {
  return bound.type(linearStep(bound).x).kind === "dense";
}

function buildMatrix(context: BuildContext): Dispatch[] {
  const step = linearStep(context.bound);
  const groups = step.parts.map((ids) => context.weights(ids));
  const split = isSplit(context.bound);
  const products = (groups[0]?.slices ?? []).map(({ begin, end }, slice): Dispatch => {
    const parts = linearParts(context, step, groups, slice);
    const operands = [
      ...parts.operands,
      ...(split ? [{ name: "row_scale", type: "f32", binding: read({ kind: "scratch" }) }] : []),
    ];
    return {
      label: context.bound.describe(),
      wgsl: matrixSource(context, step, parts, operands, end - begin, split),
      bindings: operands.map((operand) => operand.binding),
      workgroups: (symbols) => [Math.ceil((end - begin) / TILE), Math.ceil(context.rows(step.x, symbols) / TILE), 1],
    };
  });
  return split ? [rowScales(context, step), ...products] : products;
}

/** A first pass over a dense x: the power of two that brings each row's largest magnitude into [2^13, 2^14). */
function rowScales(context: BuildContext, step: LinearStep): Dispatch {
  const { stride, column } = context.placement(step.x);
  const operands = [
    { name: "x", type: "f32", binding: read(value(step.x)) },
    { name: "row_scale", type: "f32", binding: write({ kind: "scratch" }) },
  ];
  return {
    label: `row scales of ${context.bound.describe()}`,
    wgsl: `${shaderHead(operands)}
var<workgroup> most: array<u32, 64>;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let row = min(wid.y * groups.x + wid.x, ${context.rowsWgsl(step.x)} - 1u);
  var top = 0u;
  for (var k = lid; k < ${step.k}u; k += 64u) { top = max(top, bitcast<u32>(x[row * ${stride}u + ${column}u + k]) & 0x7fffffffu); }
  most[lid] = top;
  workgroupBarrier();
  for (var half = 32u; half > 0u; half /= 2u) {
    if (lid < half) { most[lid] = max(most[lid], most[lid + half]); }
    workgroupBarrier();
  }
  // Exponent 127 + 13 for the largest; clamped so that the scale and its inverse are normal numbers.
  let exponent = clamp(i32(most[0] >> 23u), 14, 253);
  if (lid == 0u) { row_scale[row] = bitcast<f32>(u32(clamp(267 - exponent, 1, 253)) << 23u); }
}`,
    bindings: operands.map((operand) => operand.binding),
    workgroups: (symbols) => flatGrid(context.rows(step.x, symbols), context.device.maxWorkgroupsPerDimension),
  };
}

/** Rounds to 11 significant bits by integer arithmetic: drivers take a conversion to f16 and back for the identity. */
export const elevenBits = (vector: string): string =>
  `bitcast<vec4<f32>>((bitcast<vec4<u32>>(${vector}) + vec4<u32>(0x1000u)) & vec4<u32>(0xffffe000u))`;

function matrixSource(
  context: BuildContext,
  step: LinearStep,
  parts: LinearParts,
  operands: Parameters<typeof shaderHead>[0],
  n: number,
  split: boolean,
): string {
  const { integer } = parts;
  const tiles = ["x_hi", ...(split ? ["x_lo"] : []), ...parts.weights.map((_, part) => `w${part}_tile`)];
  const half = (vector: string) => `vec4<f16>(${vector})`;
  const put = (tile: string, i: number, vector: string) =>
    `{ let h = ${half(vector)}; ${[0, 1, 2, 3].map((lane) => `${tile}[slot + ${i * 4 + lane}u] = h.${"xyzw"[lane]};`).join(" ")} }`;
  const eight = (f: (i: number) => string) => Array.from({ length: 8 }, (_, i) => f(i)).join("\n");
  const loadX =
    parts.packedBytes && parts.xStored !== null ? parts.xStored.chunk("v", "row", "c") : parts.loadX("v", "row", "c");
  const fillX = split
    ? eight(
        (i) =>
          `{ let s = v${i} * scale; let hi = ${elevenBits("s")};\n${put("x_hi", i, "hi")}\n${put("x_lo", i, "s - hi")} }`,
      )
    : eight((i) => put("x_hi", i, `vec4<f32>(v${i})`));
  const fillW = (part: number) => {
    const reader = parts.weights[part] as StoredReader;
    return `${reader.chunk("v", "feature", "c")}\n${eight((i) => put(`w${part}_tile`, i, `vec4<f32>(v${i})`))}`;
  };
  const quarter = TILE / 2 / UNIT;
  const pairs = Array.from({ length: quarter * quarter }, (_, i) => [Math.floor(i / quarter), i % quarter] as const);
  const result = `subgroup_matrix_result<f32, ${UNIT}, ${UNIT}>`;
  const clear = parts.weights
    .flatMap((_, part) => pairs.map(([i, j]) => `acc${part}_${i}${j} = ${result}();`))
    .join("\n");
  const multiply = Array.from({ length: CHUNK / UNIT }, (_, s) => {
    const at = (tile: string, base: string) => `&${tile}, (${base}) * ${PITCH}u + ${s * UNIT}u, ${PITCH}u`;
    const lefts = ["hi", ...(split ? ["lo"] : [])].flatMap((which) =>
      Array.from(
        { length: quarter },
        (_, i) =>
          `let ${which}${i} = subgroupMatrixLoad<subgroup_matrix_left<f16, ${UNIT}, ${UNIT}>, row_major>(${at(`x_${which}`, `sm + ${i * UNIT}u`)});`,
      ),
    );
    const products = parts.weights.flatMap((_, part) =>
      Array.from({ length: quarter }, (_, j) => {
        const load = `let right${part}_${j} = subgroupMatrixLoad<subgroup_matrix_right<f16, ${UNIT}, ${UNIT}>, col_major>(${at(`w${part}_tile`, `sn + ${j * UNIT}u`)});`;
        const adds = Array.from({ length: quarter }, (_, i) =>
          ["hi", ...(split ? ["lo"] : [])]
            .map(
              (which) =>
                `acc${part}_${i}${j} = subgroupMatrixMultiplyAccumulate(${which}${i}, right${part}_${j}, acc${part}_${i}${j});`,
            )
            .join("\n"),
        );
        return [load, ...adds].join("\n");
      }),
    );
    return `{\n${[...lefts, ...products].join("\n")}\n}`;
  }).join("\n");

  const perLane = (UNIT * UNIT) / SUBGROUP;
  const stage = (part: number, i: number, j: number) =>
    `subgroupMatrixStore<row_major>(&stage${part}, sg * ${UNIT * UNIT}u, acc${part}_${i}${j}, ${UNIT}u);`;
  /** Moves the exact f32 integer sums of a run into i32 before they can round. */
  const flush = pairs
    .map(([i, j], pair) => {
      const adds = parts.weights.map(
        (_, part) =>
          `total${part}[${pair * perLane}u + e] += i32(stage${part}[sg * ${UNIT * UNIT}u + e * ${SUBGROUP}u + lane]);`,
      );
      return `${parts.weights.map((_, part) => stage(part, i, j)).join("\n")}
workgroupBarrier();
for (var e = 0u; e < ${perLane}u; e++) { ${adds.join(" ")} }
workgroupBarrier();`;
    })
    .join("\n");
  const drain = pairs
    .map(([i, j], pair) => {
      const sums = parts.weights.map((reader, part) => {
        const sum = integer
          ? `f32(total${part}[${pair * perLane}u + e])`
          : `stage${part}[sg * ${UNIT * UNIT}u + e * ${SUBGROUP}u + lane]`;
        const xScale = split ? `(1.0 / row_scale[m])` : parts.xScale("m", "0u");
        return `(${sum} * (${reader.scale("f", "0u")}) * (${xScale}))`;
      });
      return `${integer ? "" : `${parts.weights.map((_, part) => stage(part, i, j)).join("\n")}\nworkgroupBarrier();`}
for (var e = 0u; e < ${perLane}u; e++) {
let cell = e * ${SUBGROUP}u + lane;
let m = m0 + sm + ${i * UNIT}u + cell / ${UNIT}u;
let f = n0 + sn + ${j * UNIT}u + cell % ${UNIT}u;
if (m < rows && f <= feature_last) { ${parts.store("m", "f", sums)} }
}
${integer ? "" : "workgroupBarrier();"}`;
    })
    .join("\n");

  return `${shaderHead(operands, ["f16", "subgroups", "chromium_experimental_subgroup_matrix"])}
${parts.functions}
${tiles.map((tile) => `var<workgroup> ${tile}: array<f16, ${TILE * PITCH}>;`).join("\n")}
${parts.weights.map((_, part) => `var<workgroup> stage${part}: array<f32, ${4 * UNIT * UNIT}>;`).join("\n")}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32,
  @builtin(subgroup_id) sg: u32, @builtin(subgroup_invocation_id) lane: u32) {
let rows = ${context.rowsWgsl(step.x)};
let feature_last = ${n - 1}u;
let m0 = wid.y * ${TILE}u;
let n0 = wid.x * ${TILE}u;
let sm = (sg / 2u) * ${TILE / 2}u;
let sn = (sg % 2u) * ${TILE / 2}u;
${parts.weights.flatMap((_, part) => pairs.map(([i, j]) => `var acc${part}_${i}${j}: ${result};`)).join("\n")}
${integer ? parts.weights.map((_, part) => `var total${part}: array<i32, ${pairs.length * perLane}>;`).join("\n") : ""}
${split ? `let scale = row_scale[min(m0 + lid % ${TILE}u, rows - 1u)];` : ""}
for (var c = 0u; c < ${step.k / CHUNK}u; c++) {
let slot = (lid % ${TILE}u) * ${PITCH}u;
if (lid < ${TILE}u) { let row = min(m0 + lid, rows - 1u);
${loadX}
${fillX}
} else { let feature = min(n0 + lid - ${TILE}u, feature_last);
${parts.weights.map((_, part) => `{ ${fillW(part)} }`).join("\n")}
}
workgroupBarrier();
${multiply}
workgroupBarrier();
${integer ? `if (c % ${EXACT_RUN / CHUNK}u == ${EXACT_RUN / CHUNK - 1}u || c == ${step.k / CHUNK - 1}u) {\n${flush}\n${clear}\n}` : ""}
}
${drain}
}`;
}
