import { type Format, formatKey } from "../../../formats/format.js";
import { cacheRows, type KeyRows } from "../../../ir/attention-shape.js";
import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { type BuildContext, type Dispatch, FLAT_WORKGROUP, flatGrid, read, shaderHead, value, type WebGpuKernel, write } from "../kernel.js";
import { EXACT } from "../wgsl/exact.js";
import { keyRowFunction, rowFunctions, rowObstacle, storeRow } from "./kv.js";

/** A head has at most this many elements: one a thread. */
const MOST = 256;

/** One stream of heads through the step: rotated or not, into a dense value or into a cache. */
interface Stream {
  readonly source: ValueId;
  readonly heads: number;
  readonly rope: Node<"rope"> | undefined;
  readonly target: ValueId;
  /** Null for a dense target. */
  readonly cache: { readonly rows: KeyRows; readonly format: Format; readonly pages: ValueId | undefined } | null;
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
      const [target, x, pages] = node.inputs as readonly [ValueId, ValueId, ValueId | undefined];
      const rope = ropes.get(x);
      const type = bound.type(target) as Extract<ReturnType<BoundStep["type"]>, { kind: "format" }>;
      const rows = cacheRows(node.inputs.map((id) => bound.type(id)), node.attrs, bound.name(out));
      const cache = { rows, format: type.format, pages };
      found.push({ source: rope?.inputs[0] ?? x, heads: rows.kvHeads, rope, target, cache, position: node.attrs.position });
    }
    if (node.op === "rope" && outputs.includes(out)) {
      found.push({ source: node.inputs[0] as ValueId, heads: node.attrs.heads, rope: node, target: out, cache: null, position: node.attrs.position });
    }
  }
  return found;
}

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
          for (const { cache } of all) {
            const obstacle = cache === null ? null : rowObstacle(cache.format, size);
            if (obstacle !== null) return obstacle;
          }
          const caches = all.flatMap(({ cache }) => (cache === null ? [] : [`${formatKey(cache.format)} ${JSON.stringify(cache.rows)} ${cache.pages}`]));
          return new Set(caches).size > 1 ? "its caches differ in format or extents" : null;
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
  const table = all.find(({ rope }) => rope !== undefined)?.rope?.inputs[1];
  const cache = all.find((stream) => stream.cache !== null);
  const sources = [...new Set(all.map(({ source }) => context.placement(source).root))];
  const operands = [
    ...sources.map((root, i) => ({ name: `x${i}`, type: "u32", binding: read(value(root)) })),
    ...(table === undefined ? [] : [{ name: "angles", type: "u32", binding: read({ kind: "dense", ids: [table] } as const) }]),
    ...(cache?.cache?.pages === undefined ? [] : [{ name: "pages", type: "u32", binding: read(value(cache.cache.pages)) }]),
    ...all.map((stream, i) => ({ name: `out${i}`, type: stream.cache === null ? "u32" : "atomic<u32>", binding: write(value(stream.target)) })),
  ];
  const size = sizeOfHead(context.bound, first);
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
    const out = context.placement(stream.target);
    const store =
      stream.cache === null
        ? `if (lid < ${size}u) { out${i}[t * ${out.stride}u + ${out.column}u + head * ${size}u + lid] = bits; }`
        : `let row = key_row(0u, head, position + t);\n    ${storeRow(context.layout(stream.target), `out${i}`, threads)}`;
    return `if (${condition}) {
    ${head} ${start}
    ${load}
    ${store}
  }`;
  });
  const wgsl = `${shaderHead(operands)}
${EXACT}
${cache?.cache == null ? "" : `${keyRowFunction(cache.cache.rows, `${cache.cache.rows.keys}u`)}\n${rowFunctions(cache.cache.format, size, threads)}`}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let index = ${FLAT_WORKGROUP};
  let t = index / ${units}u;
  let unit = index % ${units}u;
  let position = ${context.symbolWgsl(first.position)};
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
      workgroups: (symbols) => flatGrid(context.rows(first.source, symbols) * units, context.device.maxWorkgroupsPerDimension),
    },
  ];
}

/** Element e of a rotated head: products and their sum, each rounded to float32 as the reference rounds them. */
function rotation(x: string, { attrs }: Node<"rope">, size: number): string {
  const half = size / 2;
  const [upper, pair] = attrs.interleaved ? ["e % 2u == 1u", "e / 2u"] : [`e >= ${half}u`, `e % ${half}u`];
  const other = attrs.interleaved ? "e ^ 1u" : `(e + ${half}u) % ${size}u`;
  return `let angle = (position + t) * ${size}u + ${pair};
    let turned = exact_mul(${x}[start + (${other})], angles[angle + ${half}u]);
    // The lower element loses the upper one times the sine, the upper one gains.
    bits = exact_add(exact_mul(${x}[start + e], angles[angle]), select(turned ^ 0x80000000u, turned, ${upper}));`;
}
