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
      const width = context.lastExtent(x);
      const { stride, column } = context.placement(x);
      const operands = [
        { name: "x", type: "f32", binding: read(value(x)) },
        { name: "weight", type: "f32", binding: read({ kind: "dense", ids: [weight] }) },
        { name: "out", type: "f32", binding: write(value(out)) },
      ];
      const wgsl = `${shaderHead(operands)}
var<workgroup> partial: array<f32, ${THREADS}>;
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let row = min(${FLAT_WORKGROUP}, ${context.rowsWgsl(x)} - 1u);
  let start = row * ${stride}u + ${column}u;
  var sum = 0.0;
  for (var k = lid; k < ${width}u; k += ${THREADS}u) { let v = x[start + k]; sum += v * v; }
  partial[lid] = sum;
  workgroupBarrier();
  for (var half = ${THREADS / 2}u; half > 0u; half /= 2u) {
    if (lid < half) { partial[lid] += partial[lid + half]; }
    workgroupBarrier();
  }
  // sqrt and division round better than WGSL's inverseSqrt (2 ulp).
  let factor = 1.0 / sqrt(partial[0] / ${width}.0 + ${node.attrs.eps});
  for (var k = lid; k < ${width}u; k += ${THREADS}u) { out[row * ${width}u + k] = x[start + k] * factor * weight[k]; }
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
  const [ids, table] = node.inputs as [ValueId, ValueId];
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
      { name: "out", type: "f32", binding: write(value(out)) },
    ];
    const reader = storedReader("wr", layout, { buffer: "w", buffer4: "wq" });
    const vectors = Array.from({ length: 8 }, (_, i) => {
      const k = `c * ${CHUNK}u + ${i * 4}u`;
      const zero = reader.zero("row", `min(${k}, ${width - 1}u)`);
      return `{ let v = (c${i} * (${reader.scale("row", `min(${k}, ${width - 1}u)`)})${zero === null ? "" : ` + ${zero}`}) * ${floatText(scale)};
    for (var i = 0u; i < 4u && ${k} + i < ${width}u; i++) { out[t * ${width}u + ${k} + i] = v[i]; } }`;
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
