import type { Node, ValueId } from "../../../ir/graph.js";
import {
  type BuildContext,
  type Dispatch,
  FLAT_WORKGROUP,
  flatGrid,
  read,
  shaderHead,
  value,
  type WebGpuKernel,
  write,
} from "../kernel.js";
import { CHUNK, chunkObstacle, storedReader } from "../wgsl/stored.js";

const THREADS = 64;
const BUILTINS =
  "@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32";

/** Kernels that work on whole rows: norm, last row, embedding. */
export const ROW_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/rmsnorm",
    kind: "rmsnorm",
    requires: [],
    efficiency: { bandwidth: 0.5, compute: 0.1 },
    build: (context) => {
      const node = context.bound.step.nodes[0] as Node<"rmsnorm">;
      const [x, weight] = node.inputs as [ValueId, ValueId];
      const out = node.outputs[0] as ValueId;
      const { eps, groups = 1 } = node.attrs;
      const width = context.lastExtent(x) / groups;
      const { stride, column } = context.placement(x);
      const start =
        groups === 1
          ? `row * ${stride}u + ${column}u`
          : `(row / ${groups}u) * ${stride}u + ${column}u + (row % ${groups}u) * ${width}u`;
      const operands = [
        { name: "x", type: "f32", binding: read(value(x)) },
        { name: "weight", type: "f32", binding: read({ kind: "dense", ids: [weight] }) },
        { name: "out", type: "f32", binding: write(value(out)) },
      ];
      const wgsl = `${shaderHead(operands)}
var<workgroup> partial: array<f32, ${THREADS}>;
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let row = min(${FLAT_WORKGROUP}, ${context.rowsWgsl(x)}${groups === 1 ? "" : ` * ${groups}u`} - 1u);
  let start = ${start};
  var sum = 0.0;
  for (var k = lid; k < ${width}u; k += ${THREADS}u) { let v = x[start + k]; sum += v * v; }
  partial[lid] = sum;
  workgroupBarrier();
  for (var half = ${THREADS / 2}u; half > 0u; half /= 2u) {
    if (lid < half) { partial[lid] += partial[lid + half]; }
    workgroupBarrier();
  }
  // sqrt and division round better than WGSL's inverseSqrt (2 ulp).
  let factor = 1.0 / sqrt(partial[0] / ${width}.0 + ${eps});
  for (var k = lid; k < ${width}u; k += ${THREADS}u) { out[row * ${width}u + k] = x[start + k] * factor * weight[k]; }
}`;
      return [dispatch(context, wgsl, operands, (symbols) => context.rows(x, symbols) * groups)];
    },
  },
  {
    id: "webgpu/layernorm",
    kind: "layernorm",
    requires: [],
    efficiency: { bandwidth: 0.4, compute: 0.1 },
    build: (context) => {
      const node = context.bound.step.nodes[0] as Node<"layernorm">;
      const [x, weight, bias] = node.inputs as [ValueId, ValueId, ValueId | undefined];
      const out = node.outputs[0] as ValueId;
      const width = context.lastExtent(x);
      const { stride, column } = context.placement(x);
      const operands = [
        { name: "x", type: "f32", binding: read(value(x)) },
        { name: "weight", type: "f32", binding: read({ kind: "dense", ids: [weight] }) },
        ...(bias === undefined
          ? []
          : [{ name: "bias", type: "f32", binding: read({ kind: "dense", ids: [bias] } as const) }]),
        { name: "out", type: "f32", binding: write(value(out)) },
      ];
      const wgsl = `${shaderHead(operands)}
var<workgroup> partial: array<f32, ${THREADS}>;
fn total(lid: u32, own: f32) -> f32 {
  partial[lid] = own;
  workgroupBarrier();
  for (var half = ${THREADS / 2}u; half > 0u; half /= 2u) {
    if (lid < half) { partial[lid] += partial[lid + half]; }
    workgroupBarrier();
  }
  let sum = partial[0];
  workgroupBarrier();
  return sum;
}
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let row = min(${FLAT_WORKGROUP}, ${context.rowsWgsl(x)} - 1u);
  let start = row * ${stride}u + ${column}u;
  var sum = 0.0;
  for (var k = lid; k < ${width}u; k += ${THREADS}u) { sum += x[start + k]; }
  let mean = total(lid, sum) / ${width}.0;
  // The squares of differences: the mean of squares less the squared mean would cancel.
  var square = 0.0;
  for (var k = lid; k < ${width}u; k += ${THREADS}u) { let d = x[start + k] - mean; square += d * d; }
  let factor = 1.0 / sqrt(total(lid, square) / ${width}.0 + ${node.attrs.eps});
  for (var k = lid; k < ${width}u; k += ${THREADS}u) {
    out[row * ${width}u + k] = (x[start + k] - mean) * factor * weight[k]${bias === undefined ? "" : " + bias[k]"};
  }
}`;
      return [dispatch(context, wgsl, operands, (symbols) => context.rows(x, symbols))];
    },
  },
  {
    id: "webgpu/last_row",
    kind: "last_row",
    requires: [],
    efficiency: { bandwidth: 0.5, compute: 0.1 },
    build: (context) => {
      const node = context.bound.step.nodes[0] as Node<"last_row">;
      const x = node.inputs[0] as ValueId;
      const out = node.outputs[0] as ValueId;
      const width = context.lastExtent(x);
      const { stride, column } = context.placement(x);
      const operands = [
        { name: "x", type: "f32", binding: read(value(x)) },
        { name: "out", type: "f32", binding: write(value(out)) },
      ];
      const wgsl = `${shaderHead(operands)}
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let k = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  if (k < ${width}u) { out[k] = x[(${context.rowsWgsl(x)} - 1u) * ${stride}u + ${column}u + k]; }
}`;
      return [dispatch(context, wgsl, operands, () => Math.ceil(width / THREADS))];
    },
  },
  {
    id: "webgpu/embedding",
    kind: "embedding",
    requires: [
      {
        unmet: (bound) => {
          const table = (bound.step.nodes[0] as Node<"embedding">).inputs[1] as ValueId;
          const type = bound.type(table);
          return type.kind === "format"
            ? chunkObstacle(type.format, bound.shape(table)[1] as number)
            : "its table is dense";
        },
      },
    ],
    efficiency: { bandwidth: 0.3, compute: 0.1 },
    build: buildEmbedding,
  },
];

/** One dispatch a slice of the table; each writes the rows whose ids lie in its slice. */
function buildEmbedding(context: BuildContext): Dispatch[] {
  const node = context.bound.step.nodes[0] as Node<"embedding">;
  const [ids, table, positions] = node.inputs as [ValueId, ValueId, ValueId | undefined];
  const { position } = node.attrs;
  const out = node.outputs[0] as ValueId;
  const width = context.lastExtent(out);
  const chunks = Math.ceil(width / CHUNK);
  const group = context.weights([table]);
  const scale = node.attrs.scale ?? 1;
  return group.slices.map(({ begin, end, layout }, slice) => {
    const source = { kind: "weights", ids: [table], slice } as const;
    const operands = [
      { name: "ids", type: "i32", binding: read(value(ids)) },
      { name: "w", type: "u32", binding: read(source) },
      { name: "wq", type: "vec4<u32>", binding: read(source) },
      ...(positions === undefined
        ? []
        : [{ name: "positions", type: "f32", binding: read({ kind: "dense", ids: [positions] } as const) }]),
      { name: "out", type: "f32", binding: write(value(out)) },
    ];
    const reader = storedReader("wr", layout, { buffer: "w", buffer4: "wq" });
    const learned =
      position === undefined ? "" : ` + positions[(${context.symbolWgsl(position)} + t) * ${width}u + at + i]`;
    const vectors = Array.from({ length: 8 }, (_, i) => {
      const k = `c * ${CHUNK}u + ${i * 4}u`;
      const zero = reader.zero("row", `min(${k}, ${width - 1}u)`);
      return `{ let v = (c${i} * (${reader.scale("row", `min(${k}, ${width - 1}u)`)})${zero === null ? "" : ` + ${zero}`}) * ${floatText(scale)};
    let at = ${k};
    for (var i = 0u; i < 4u && at + i < ${width}u; i++) { out[t * ${width}u + at + i] = v[i]${learned}; } }`;
    });
    const wgsl = `${shaderHead(operands)}
${reader.functions}
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let index = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  let t = index / ${chunks}u;
  let c = index % ${chunks}u;
  if (t >= ${context.rowsWgsl(out)}) { return; }
  let id = u32(clamp(ids[t], 0, ${group.rows - 1}));
  if (id < ${begin}u || id >= ${end}u) { return; }
  let row = id - ${begin}u;
  ${reader.chunk("c", "row", "c")}
  ${vectors.join("\n  ")}
}`;
    return dispatch(context, wgsl, operands, (symbols) => Math.ceil((context.rows(out, symbols) * chunks) / THREADS));
  });
}

export function floatText(value: number): string {
  const text = String(Math.fround(value));
  return /[.e]/.test(text) ? text : `${text}.0`;
}

function dispatch(
  context: BuildContext,
  wgsl: string,
  operands: readonly { readonly binding: Dispatch["bindings"][number] }[],
  count: (symbols: Readonly<Record<string, number>>) => number,
): Dispatch {
  return {
    label: context.bound.describe(),
    wgsl,
    bindings: operands.map((operand) => operand.binding),
    workgroups: (symbols) => flatGrid(count(symbols), context.device.maxWorkgroupsPerDimension),
  };
}
