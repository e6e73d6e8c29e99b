import { f32Bits } from "../../../core/dtype.js";
import { formatKey } from "../../../formats/format.js";
import type { Node } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { type Stream, streams } from "../../rope-step.js";
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
import { EXACT } from "../wgsl/exact.js";
import { keyRowFunction, rowFunctions, rowObstacle, storeRow } from "./kv.js";

/** A head has at most this many elements: one a thread. */
const MOST = 256;

const sizeOfHead = (bound: BoundStep, { source, heads }: Stream) => (bound.shape(source).at(-1) as number) / heads;

/** Rotates heads and writes caches of any format whose rows are quantized by themselves. A workgroup takes one head of a token. */
export const ROPE_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/rope_kv",
    kind: "rope_kv",
    requires: [
      {
        unmet: (bound) => {
          const all = streams(bound);
          const sizes = new Set(all.map((stream) => sizeOfHead(bound, stream)));
          if (sizes.size > 1) return `its heads differ in size: ${[...sizes].join(", ")}`;
          const [size] = sizes as unknown as [number];
          if (size > MOST) return `the head dimension must be at most ${MOST}: it is ${size}`;
          for (const { format } of all) {
            const obstacle = format === null ? null : rowObstacle(format, size);
            if (obstacle !== null) return obstacle;
          }
          const formats = new Set(all.flatMap(({ format }) => (format === null ? [] : [formatKey(format)])));
          const rows = new Set(all.flatMap(({ cache }) => (cache === null ? [] : [JSON.stringify(cache)])));
          return formats.size > 1 || rows.size > 1 ? "its caches differ in format or extents" : null;
        },
      },
    ],
    efficiency: { bandwidth: 0.4, compute: 0.1 },
    build: buildRope,
  },
];

function buildRope(context: BuildContext): Dispatch[] {
  const all = streams(context.bound);
  const first = all[0] as Stream;
  const rope = all.find((stream) => stream.rope !== undefined)?.rope;
  const table = rope?.inputs[1];
  const cache = all.find((stream) => stream.cache !== null)?.cache;
  const format = all.find((stream) => stream.format !== null)?.format;
  const sources = [...new Set(all.map(({ source }) => context.placement(source).root))];
  const operands = [
    ...sources.map((root, i) => ({ name: `x${i}`, type: "u32", binding: read(value(root)) })),
    ...(table === undefined
      ? []
      : [{ name: "angles", type: "u32", binding: read({ kind: "dense", ids: [table] } as const) }]),
    ...(cache?.pages === undefined ? [] : [{ name: "pages", type: "u32", binding: read(value(cache.pages)) }]),
    ...all.map((stream, i) => ({
      name: `out${i}`,
      type: stream.format === null ? "u32" : "atomic<u32>",
      binding: write(value(stream.target)),
    })),
  ];
  const size = sizeOfHead(context.bound, first);
  const position = rope?.attrs.position ?? cache?.position;
  const threads = Math.max(32, 2 ** Math.ceil(Math.log2(size)));
  const units = all.reduce((sum, { heads }) => sum + heads, 0);
  let begin = 0;
  const branches = all.map((stream, i) => {
    const { stride, column, root } = context.placement(stream.source);
    const condition = `unit >= ${begin}u && unit < ${begin + stream.heads}u`;
    const head = `let head = unit - ${begin}u;`;
    begin += stream.heads;
    const x = `x${sources.indexOf(root)}`;
    const start = `let start = t * ${stride}u + ${column}u + head * ${size}u;`;
    const load = stream.rope === undefined ? `bits = ${x}[start + e];` : rotation(x, stream.rope, size);
    const transform = stream.hadamard ? transformation(size) : "";
    const out = context.placement(stream.target);
    const row = stream.cache === null ? `t * ${stream.heads}u + head` : "key_row(0u, head, position + t)";
    const store =
      stream.format === null
        ? `if (lid < ${size}u) { out${i}[t * ${out.stride}u + ${out.column}u + head * ${size}u + lid] = bits; }`
        : `let row = ${row};\n    ${storeRow(context.layout(stream.target), `out${i}`, threads)}`;
    return `if (${condition}) {
    ${head} ${start}
    ${load}
    ${transform}
    ${store}
  }`;
  });
  const wgsl = `${shaderHead(operands)}
${EXACT}
${cache ? keyRowFunction(cache.rows, `${cache.rows.keys}u`) : ""}
${format ? rowFunctions(format, size, threads) : ""}
${all.some(({ hadamard }) => hadamard) ? `var<workgroup> turned_bits: array<u32, ${threads}>;` : ""}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let index = ${FLAT_WORKGROUP};
  let t = index / ${units}u;
  let unit = index % ${units}u;
  ${position === undefined ? "" : `let position = ${context.symbolWgsl(position)};`}
  if (t >= ${context.rowsWgsl(first.source)}) { return; }
  let e = min(lid, ${size - 1}u);
  var bits = 0u;
  ${branches.join("\n  ")}
}`;
  return [
    {
      label: context.bound.describe(),
      wgsl,
      bindings: operands.map((operand) => operand.binding),
      workgroups: (symbols) =>
        flatGrid(context.rows(first.source, symbols) * units, context.device.maxWorkgroupsPerDimension),
    },
  ];
}

/** Element e of a rotated head: products and their sum, each rounded to float32 as the reference rounds them. */
function rotation(x: string, { attrs }: Node<"rope">, size: number): string {
  const { rotary = size } = attrs;
  const half = rotary / 2;
  const [upper, pair] = attrs.interleaved ? ["e % 2u == 1u", "(e / 2u)"] : [`e >= ${half}u`, `e % ${half}u`];
  const other = attrs.interleaved ? "e ^ 1u" : `(e + ${half}u) % ${rotary}u`;
  // What lies behind the rotated elements of a head stays.
  const keep = rotary === size ? "" : `\n    bits = select(bits, ${x}[start + e], e >= ${rotary}u);`;
  const within = attrs.interleaved && rotary < size ? `${pair} % ${half}u` : pair;
  return `let angle = (position + t) * ${rotary}u + ${within};
    let turned = exact_mul(${x}[start + (${other})], angles[angle + ${half}u]);
    // The lower element loses the upper one times the sine, the upper one gains.
    bits = exact_add(exact_mul(${x}[start + e], angles[angle]), select(turned ^ 0x80000000u, turned, ${upper}));${keep}`;
}

/** Butterflies of stride 1, 2, 4, ... over a head, then a product: `hadamard` of `quantize/attention.ts`, bit for bit. */
function transformation(size: number): string {
  const factor = f32Bits(Math.fround(1 / Math.sqrt(size)));
  return `for (var stride = 1u; stride < ${size}u; stride *= 2u) {
      turned_bits[lid] = bits;
      workgroupBarrier();
      let other = turned_bits[lid ^ stride];
      workgroupBarrier();
      bits = exact_add(select(bits, bits ^ 0x80000000u, (lid & stride) != 0u), other);
    }
    bits = exact_mul(bits, ${factor}u);`;
}
