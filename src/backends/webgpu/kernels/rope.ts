import { codecBits } from "../../../formats/format.js";
import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { type BuildContext, type Dispatch, FLAT_WORKGROUP, flatGrid, read, shaderHead, value, type WebGpuKernel, write } from "../kernel.js";
import { encodeFunction } from "../wgsl/codec.js";

const THREADS = 64;
/** Neighbouring elements that a thread handles in each half of a head: whole words of 8-bit and wider caches. */
const VECTOR = 4;

/** One stream of heads through the step: rotated or not, into a dense value or into a cache. */
interface Stream {
  readonly source: ValueId;
  readonly heads: number;
  readonly rotated: boolean;
  readonly target: ValueId;
  readonly cache: boolean;
  readonly position: string;
}

/** Follows each rope's or cache write's operand back to where it enters the step. */
function streams(bound: BoundStep): Stream[] {
  const { nodes, outputs } = bound.step;
  const ropes = new Map(nodes.filter((node): node is Node<"rope"> => node.op === "rope").map((node) => [node.outputs[0], node]));
  const found: Stream[] = [];
  for (const node of nodes) {
    const out = node.outputs[0] as ValueId;
    if (node.op === "kv_write") {
      const x = node.inputs[1] as ValueId;
      const rope = ropes.get(x);
      const [heads] = bound.shape(node.inputs[0] as ValueId) as [number, number, number];
      const source = rope === undefined ? x : (rope.inputs[0] as ValueId);
      found.push({ source, heads, rotated: rope !== undefined, target: node.inputs[0] as ValueId, cache: true, position: node.attrs.position });
    }
    if (node.op === "rope" && outputs.includes(out)) {
      found.push({ source: node.inputs[0] as ValueId, heads: node.attrs.heads, rotated: true, target: out, cache: false, position: node.attrs.position });
    }
  }
  return found;
}

/** Rotates heads (NeoX half-split pairs) and writes caches whose format only rounds each element. */
export const ROPE_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/rope_kv",
    kind: "rope_kv",
    requires: [
      {
        unmet: (bound) => {
          for (const { target, cache, source, heads } of streams(bound)) {
            const size = (bound.shape(source).at(-1) as number) / heads;
            if (size % (2 * VECTOR) !== 0) return `the head dimension must be a multiple of ${2 * VECTOR}: it is ${size}`;
            const type = bound.type(target);
            if (!cache || type.kind !== "format") continue;
            if (type.format.rule.kind !== "cast" || codecBits(type.format.element) < 8) {
              return `the cache's format ${type.format.name} needs a scale a row: this kernel only rounds`;
            }
          }
          return null;
        },
      },
    ],
    efficiency: { bandwidth: 0.4, compute: 0.1 },
    build: buildRope,
  },
];

function buildRope(context: BuildContext): Dispatch[] {
  const all = streams(context.bound);
  const table = context.bound.step.nodes.find((node) => node.op === "rope")?.inputs[1];
  const first = all[0] as Stream;
  const sources = [...new Set(all.map(({ source }) => context.placement(source).root))];
  const operands = [
    ...sources.map((root, i) => ({ name: `x${i}`, type: "vec4<f32>", binding: read(value(root)) })),
    ...(table === undefined ? [] : [{ name: "angles", type: "vec4<f32>", binding: read({ kind: "dense", ids: [table] }) }]),
    ...all.map(({ target, cache }, i) => ({ name: `out${i}`, type: cache ? "u32" : "vec4<f32>", binding: write(value(target)) })),
  ];
  const size = context.lastExtent(first.source) / first.heads;
  const half = size / 2;
  const units = half / VECTOR;
  const functions: string[] = [];
  let begin = 0;
  const branches = all.map((stream, i) => {
    const count = stream.heads * units;
    const { stride, column, root } = context.placement(stream.source);
    const buffer = `x${sources.indexOf(root)}`;
    const condition = `unit >= ${begin}u && unit < ${begin + count}u`;
    const local = `(unit - ${begin}u)`;
    begin += count;
    const rotate = stream.rotated
      ? `let cos = angles[(position + t) * ${size / 4}u + e / 4u]; let sin = angles[(position + t) * ${size / 4}u + (e + ${half}u) / 4u];
    let lo = a * cos - b * sin; let hi = b * cos + a * sin;`
      : "let lo = a; let hi = b;";
    let store = `let to = (t * ${context.placement(stream.target).stride}u + head * ${size}u + e) / 4u; out${i}[to] = lo; out${i}[to + ${half / 4}u] = hi;`;
    if (stream.cache) {
      const type = context.type(stream.target);
      if (type.kind !== "format") throw new Error("a cache is stored in a format");
      const bits = codecBits(type.format.element);
      const layout = context.layout(stream.target);
      const capacity = context.bound.shape(stream.target)[1] as number;
      functions.push(encodeFunction(type.format.element, `encode${i}`));
      const words = (VECTOR * bits) / 32;
      const pack = (vector: string, w: number) =>
        Array.from({ length: 32 / bits }, (_, lane) => {
          const code = `encode${i}(${vector}.${"xyzw"[w * (32 / bits) + lane]})`;
          return lane === 0 ? code : `(${code} << ${lane * bits}u)`;
        }).join(" | ");
      const lines = Array.from({ length: words }, (_, w) => `out${i}[to + ${w}u] = ${pack("lo", w)}; out${i}[to + ${(half * bits) / 32 + w}u] = ${pack("hi", w)};`);
      store = `let to = (head * ${capacity}u + position + t) * ${layout.rowStride}u + e * ${bits}u / 32u; ${lines.join(" ")}`;
    }
    return `if (${condition}) {
    let head = ${local} / ${units}u; let e = (${local} % ${units}u) * ${VECTOR}u;
    let begin = (t * ${stride}u + ${column}u + head * ${size}u + e) / 4u;
    let a = ${buffer}[begin]; let b = ${buffer}[begin + ${half / 4}u];
    ${rotate}
    ${store}
  }`;
  });
  const wgsl = `${shaderHead(operands)}
${functions.join("\n")}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let index = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  let t = index / ${begin}u;
  let unit = index % ${begin}u;
  let position = ${context.symbolWgsl(first.position)};
  if (t >= ${context.rowsWgsl(first.source)}) { return; }
  ${branches.join("\n  ")}
}`;
  return [
    {
      label: context.bound.describe(),
      wgsl,
      bindings: operands.map((operand) => operand.binding),
      workgroups: (symbols) =>
        flatGrid(Math.ceil((context.rows(first.source, symbols) * begin) / THREADS), context.device.maxWorkgroupsPerDimension),
    },
  ];
}
