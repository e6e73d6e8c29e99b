import { type BuildContext, type Dispatch, shaderHead, type WebGpuKernel } from "../kernel.js";
import { CHUNK, type StoredReader } from "../wgsl/stored.js";
import { chunked, type LinearParts, type LinearStep, linearParts, linearStep } from "./linear.js";

/** Outputs of a workgroup: TILE x TILE; a thread makes MICRO x MICRO of them. */
const TILE = 32;
const MICRO = 4;
const THREADS = (TILE / MICRO) ** 2;
/** Vec4s of a row of the tile in workgroup memory; one more than a chunk's eight, so that rows fall in different banks. */
const PITCH = CHUNK / 4 + 1;

/** Tiled matrix product: both operands are decoded into workgroup memory chunk by chunk. */
export const TILE_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/linear/tile",
    kind: "linear",
    requires: [
      chunked,
      {
        unmet: (_, device) => {
          const needed = 3 * TILE * PITCH * 16;
          return needed <= device.workgroupMemory
            ? null
            : `it needs ${needed} bytes of workgroup memory: ${device.workgroupMemory} are allowed`;
        },
      },
    ],
    rowTile: TILE,
    efficiency: { bandwidth: 0.3, compute: 0.4 },
    build: buildTile,
  },
];

function buildTile(context: BuildContext): Dispatch[] {
  const step = linearStep(context.bound);
  const groups = step.parts.map((ids) => context.weights(ids));
  return (groups[0]?.slices ?? []).map(({ begin, end }, slice) => {
    const parts = linearParts(context, step, groups, slice);
    return {
      label: context.bound.describe(),
      wgsl: tileSource(context, step, parts, end - begin),
      bindings: parts.operands.map((operand) => operand.binding),
      workgroups: (symbols) => [Math.ceil((end - begin) / TILE), Math.ceil(context.rows(step.x, symbols) / TILE), 1],
    };
  });
}

/**
 * Integer operands keep integer tiles and i32 partial sums per segment, so that products stay exact; all others put finished
 * real values into the tiles.
 */
function tileSource(context: BuildContext, step: LinearStep, parts: LinearParts, n: number): string {
  const { integer } = parts;
  const vec = integer ? "vec4<i32>" : "vec4<f32>";
  const chunks = Math.ceil(step.k / CHUNK);
  const count = parts.weights.length;
  /** Integer sums stay integers to the end when no scale changes along K. */
  const whole = integer && parts.scaleAfter;
  const each = <T>(f: (part: number, i: number) => T): T[] =>
    parts.weights.flatMap((_, part) => Array.from({ length: MICRO }, (_, i) => f(part, i)));

  const fillX = `{\n${unpackedX(parts, "v", "row", "c")}
${Array.from({ length: 8 }, (_, i) => `tile_x[slot + ${i}u] = ${scaledX(parts, `v${i}`, "row", i)};`).join("\n")}\n}`;
  const fillW = (part: number) => {
    const reader = parts.weights[part] as StoredReader;
    return `{\n${reader.chunk("v", "feature", "c")}
${Array.from({ length: 8 }, (_, i) => `tile_w${part}[slot + ${i}u] = ${scaledW(reader, integer, `v${i}`, i)};`).join("\n")}\n}`;
  };

  const segments = integer && !whole ? CHUNK / parts.segment : 1;
  const vectors = CHUNK / 4 / segments;
  const into = integer && !whole ? "part" : "sum";
  const products = each((part, i) => {
    const dots = Array.from({ length: MICRO }, (_, j) => `dot(x${i}, w${part}_${j})`).join(", ");
    return `${into}${part}_${i} += ${vec}(${dots});`;
  });
  const loads = [
    ...Array.from({ length: MICRO }, (_, i) => `let x${i} = tile_x[(tm * ${MICRO}u + ${i}u) * ${PITCH}u + v];`),
    ...each((part, j) => `let w${part}_${j} = tile_w${part}[(tn * ${MICRO}u + ${j}u) * ${PITCH}u + v];`),
  ];
  const compute = Array.from({ length: segments }, (_, s) => {
    const at = `c * ${CHUNK}u + ${s * parts.segment}u`;
    const declare = into === "part" ? each((part, i) => `var part${part}_${i} = vec4<i32>(0);`) : [];
    return `{\n${declare.join(" ")}
for (var v = ${s * vectors}u; v < ${(s + 1) * vectors}u; v++) {\n${[...loads, ...products].join("\n")}\n}
${into === "part" ? scaleSegment(parts, at) : ""}\n}`;
  });

  const sums = parts.weights.map((reader, part) => {
    const sum = `sums${part}[i][j]`;
    if (!whole) return sum;
    const xScale = parts.xScale("m", "0u");
    return `f32(${sum}) * (${reader.scale("f", "0u")})${xScale === "1.0" ? "" : ` * (${xScale})`}`;
  });
  const accumulators = parts.weights.map((_, part) => {
    const list = Array.from({ length: MICRO }, (_, i) => `sum${part}_${i}`).join(", ");
    return `var sums${part} = array<${whole ? vec : "vec4<f32>"}, ${MICRO}>(${list});`;
  });

  return `${shaderHead(parts.operands)}
${parts.functions}
var<workgroup> tile_x: array<${vec}, ${TILE * PITCH}>;
${parts.weights.map((_, part) => `var<workgroup> tile_w${part}: array<${vec}, ${TILE * PITCH}>;`).join("\n")}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
let rows = ${context.rowsWgsl(step.x)};
let feature_last = ${n - 1}u;
let m0 = wid.y * ${TILE}u;
let n0 = wid.x * ${TILE}u;
let tm = lid / ${TILE / MICRO}u;
let tn = lid % ${TILE / MICRO}u;
${each((part, i) => `var sum${part}_${i} = ${whole ? vec : "vec4<f32>"}();`).join("\n")}
for (var c = 0u; c < ${chunks}u; c++) {
for (var t = lid; t < ${TILE * (1 + count)}u; t += ${THREADS}u) {
let slot = (t % ${TILE}u) * ${PITCH}u;
if (t < ${TILE}u) { let row = min(m0 + t, rows - 1u); ${fillX} }
${parts.weights.map((_, part) => `else if (t < ${TILE * (2 + part)}u) { let feature = min(n0 + t % ${TILE}u, feature_last); ${fillW(part)} }`).join("\n")}
}
workgroupBarrier();
${compute.join("\n")}
workgroupBarrier();
}
${accumulators.join("\n")}
for (var i = 0u; i < ${MICRO}u; i++) {
let m = m0 + tm * ${MICRO}u + i;
if (m >= rows) { break; }
for (var j = 0u; j < ${MICRO}u; j++) {
let f = n0 + tn * ${MICRO}u + j;
if (f <= feature_last) { ${parts.store("m", "f", sums)} }
}
}
}`;
}

/** x's chunk as vec4s even where GEMV would multiply packed bytes. */
function unpackedX(parts: LinearParts, out: string, row: string, c: string): string {
  if (!parts.packedBytes || parts.xStored === null) return parts.loadX(out, row, c);
  return parts.xStored.chunk(out, row, c);
}

function scaledX(parts: LinearParts, vector: string, row: string, i: number): string {
  if (parts.integer || parts.xStored === null) return vector;
  return `${vector} * (${parts.xScale(row, `c * ${CHUNK}u + ${i * 4}u`)})`;
}

function scaledW(reader: StoredReader, integer: boolean, vector: string, i: number): string {
  if (integer) return vector;
  const at = `c * ${CHUNK}u + ${i * 4}u`;
  const zero = reader.zero("feature", at);
  return `${vector} * (${reader.scale("feature", at)})${zero === null ? "" : ` + ${zero}`}`;
}

/** Adds the integer partial sums of a segment, scaled, to the float sums. */
function scaleSegment(parts: LinearParts, at: string): string {
  const lines: string[] = [];
  for (const [part, reader] of parts.weights.entries()) {
    const scales = Array.from({ length: MICRO }, (_, j) =>
      reader.scale(`min(n0 + tn * ${MICRO}u + ${j}u, feature_last)`, at),
    );
    lines.push(`let ws${part} = vec4<f32>(${scales.join(", ")});`);
    for (let i = 0; i < MICRO; i++) {
      const xScale = parts.xScale(`min(m0 + tm * ${MICRO}u + ${i}u, rows - 1u)`, at);
      lines.push(`sum${part}_${i} += vec4<f32>(part${part}_${i}) * (ws${part} * (${xScale}));`);
    }
  }
  return lines.join("\n");
}
