import type { Node, ValueId } from "../../../ir/graph.js";
import { type BuildContext, type Dispatch, read, shaderHead, value, type WebGpuKernel, write } from "../kernel.js";
import { CHUNK, chunkObstacle, storedReader } from "../wgsl/stored.js";
import { floatText } from "./rows.js";

const THREADS = 64;

/** Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022): a workgroup takes one query row of one head, 64 keys at a time. */
export const SDPA_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/sdpa/online",
    kind: "sdpa",
    requires: [
      {
        unmet: (bound) => {
          const node = bound.step.nodes[0] as Node<"sdpa">;
          for (const id of node.inputs.slice(1)) {
            const size = bound.shape(id)[2] as number;
            const type = bound.type(id);
            if (size % 4 !== 0 || size > 256) return `the head dimension must be a multiple of 4 up to 256: it is ${size}`;
            const obstacle = type.kind === "format" ? chunkObstacle(type.format, size) : "its cache is dense";
            if (obstacle !== null) return obstacle;
          }
          return null;
        },
      },
    ],
    efficiency: { bandwidth: 0.3, compute: 0.1 },
    build: buildSdpa,
  },
];

function buildSdpa(context: BuildContext): Dispatch[] {
  const node = context.bound.step.nodes[0] as Node<"sdpa">;
  const [q, k, v] = node.inputs as [ValueId, ValueId, ValueId];
  const out = node.outputs[0] as ValueId;
  const { heads, kvHeads, scale, causal, position } = node.attrs;
  const [, capacity, size] = context.bound.shape(k) as [number, number, number];
  // The cache may come from a kv_write: its storage is the state's.
  const [kRoot, vRoot] = [context.placement(k).root, context.placement(v).root];
  const operands = [
    { name: "q", type: "vec4<f32>", binding: read(value(q)) },
    { name: "keys", type: "u32", binding: read(value(kRoot)) },
    { name: "keys4", type: "vec4<u32>", binding: read(value(kRoot)) },
    { name: "values", type: "u32", binding: read(value(vRoot)) },
    { name: "out", type: "f32", binding: write(value(out)) },
  ];
  const keys = storedReader("kr", context.layout(kRoot), { buffer: "keys", buffer4: "keys4" });
  const values = storedReader("vr", context.layout(vRoot), { buffer: "values" });
  const place = context.placement(q);
  const chunks = Math.ceil(size / CHUNK);
  const per = Math.ceil(size / THREADS);
  const zeroOf = (at: string) => keys.zero("row", at);
  const dots = Array.from({ length: 8 }, (_, i) => {
    const at = `c * ${CHUNK}u + ${i * 4}u`;
    const zero = zeroOf(at);
    const key = keys.constantAlongK && zero === null ? `kc${i}` : `(kc${i} * (${keys.scale("row", at)})${zero === null ? "" : ` + ${zero}`})`;
    const guard = size % CHUNK === 0 ? "" : `if (${at} < ${size}u) `;
    return `${guard}{ score += dot(query[c * 8u + ${i}u], ${key}); }`;
  });
  const after = keys.constantAlongK && zeroOf("0u") === null ? ` * (${keys.scale("row", "0u")})` : "";
  const wgsl = `${shaderHead(operands)}
${keys.functions}
${values.functions}
var<workgroup> query: array<vec4<f32>, ${chunks * 8}>;
var<workgroup> weight: array<f32, ${THREADS}>;
var<workgroup> reduce: array<f32, ${THREADS}>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let head = wid.x;
  let t = wid.y;
  let first = (head / ${heads / kvHeads}u) * ${capacity}u;
  let seen = ${context.symbolWgsl(position)} + ${causal ? "t + 1u" : context.rowsWgsl(q)};
  for (var i = lid; i < ${chunks * 8}u; i += ${THREADS}u) {
    if (i < ${size / 4}u) { query[i] = q[(t * ${place.stride}u + ${place.column}u + head * ${size}u) / 4u + i] * ${floatText(scale)}; }
  }
  workgroupBarrier();
  var top = -3.0e38;
  var total = 0.0;
  var sum: array<f32, ${per}>;
  for (var begin = 0u; begin < seen; begin += ${THREADS}u) {
    let count = min(${THREADS}u, seen - begin);
    var score = -3.0e38;
    if (lid < count) {
      let row = first + begin + lid;
      score = 0.0;
      for (var c = 0u; c < ${chunks}u; c++) {
        ${keys.chunk("kc", "row", "c")}
        ${dots.join("\n        ")}
      }
      score = score${after};
    }
    reduce[lid] = score;
    workgroupBarrier();
    for (var half = ${THREADS / 2}u; half > 0u; half /= 2u) {
      if (lid < half) { reduce[lid] = max(reduce[lid], reduce[lid + half]); }
      workgroupBarrier();
    }
    let next = max(top, reduce[0]);
    let shrink = exp(top - next);
    weight[lid] = select(0.0, exp(score - next), lid < count);
    workgroupBarrier();
    total *= shrink;
    for (var i = 0u; i < ${per}u; i++) { sum[i] *= shrink; }
    for (var j = 0u; j < count; j++) {
      let p = weight[j];
      let row = first + begin + j;
      total += p;
      for (var i = 0u; i < ${per}u; i++) {
        let d = lid + i * ${THREADS}u;
        if (d < ${size}u) { sum[i] += p * ${values.element("row", "d")}; }
      }
    }
    top = next;
    workgroupBarrier();
  }
  for (var i = 0u; i < ${per}u; i++) {
    let d = lid + i * ${THREADS}u;
    if (d < ${size}u) { out[t * ${heads * size}u + head * ${size}u + d] = sum[i] / total; }
  }
}`;
  return [
    {
      label: context.bound.describe(),
      wgsl,
      bindings: operands.map((operand) => operand.binding),
      workgroups: (symbols) => [heads, context.rows(q, symbols), 1],
    },
  ];
}
