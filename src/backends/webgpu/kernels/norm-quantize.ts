import { codecBits, extentOf, type Format } from "../../../formats/format.js";
import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
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
import { ruleText } from "../wgsl/rules.js";
import { quantizeObstacle, storeScales, wordFunction } from "./quantize.js";
import { type Job, KEYS, THREADS } from "./reduce.js";

/** Blocks whose parameters a workgroup keeps. */
const MOST_BLOCKS = 512;

interface NormQuantize {
  readonly norm: Node<"rmsnorm">;
  readonly quantize: Node<"quantize">;
  readonly format: Format;
  readonly k: number;
  /** Elements of a block, and blocks of a row. */
  readonly width: number;
  readonly columns: number;
  /** Rows of a workgroup: so many that codes of their scales and zero points fill whole words. */
  readonly rows: number;
}

function normQuantize(bound: BoundStep): NormQuantize {
  const [norm, quantize] = bound.step.nodes as [Node<"rmsnorm">, Node<"quantize">];
  const { format } = quantize.attrs;
  const k = bound.shape(quantize.outputs[0] as ValueId).at(-1) as number;
  const width = extentOf(format.scales[0]?.block[1] ?? "all", k);
  const columns = k / width;
  const codecs = [
    ...format.scales.map(({ codec }) => codec),
    ...(format.zero.domain === "none" ? [] : [format.zero.codec]),
  ];
  let rows = 1;
  while (codecs.some((codec) => (rows * columns * codecBits(codec)) % 32 !== 0)) rows++;
  return { norm, quantize, format, k, width, columns, rows };
}

/** A row is normalised and quantized by one workgroup, so that its values never leave it as float32. */
export const NORM_QUANTIZE_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/rmsnorm_quantize",
    kind: "quantize",
    fusions: ["rmsnorm+quantize"],
    requires: [
      { unmet: (bound) => (bound.step.nodes.length === 2 ? null : "it is not an rmsnorm that is quantized") },
      { unmet: (bound) => quantizeObstacle(normQuantize(bound).format) },
      {
        unmet: (bound) => {
          const { format, quantize, rows, columns } = normQuantize(bound);
          if (quantize.inputs.length > 1) return "its scales are given";
          if (format.scales.length !== 1)
            return `${format.name} has ${format.scales.length} scale levels: it makes one`;
          if (format.scales[0]?.block[0] !== 1) return `a block of ${format.name} spans several rows`;
          return rows * columns <= MOST_BLOCKS
            ? null
            : `a workgroup would keep ${rows * columns} blocks: ${MOST_BLOCKS} fit its memory`;
        },
      },
    ],
    efficiency: { bandwidth: 0.4, compute: 0.1 },
    build: (context) => [build(context)],
  },
];

function build(context: BuildContext): Dispatch {
  const { norm, quantize, format, k, width, columns, rows } = normQuantize(context.bound);
  const [x, weight] = norm.inputs as [ValueId, ValueId];
  const out = quantize.outputs[0] as ValueId;
  const { format: _, heads: __, ...options } = quantize.attrs;
  const job: Job = {
    layout: context.layout(out),
    rule: ruleText(format, options),
    rows: context.rowsWgsl(out),
    x: context.placement(x),
    bits: codecBits(format.element),
    width,
    columns,
    height: 1,
    given: [],
  };
  const operands = [
    { name: "x", type: "f32", binding: read(value(x)) },
    { name: "weight", type: "f32", binding: read({ kind: "dense", ids: [weight] }) },
    { name: "out", type: "u32", binding: write(value(out)) },
  ];
  const chunk = rows * columns;
  const stride = job.layout.rowStride;
  // Threads that share a block: four elements to each, where that fits.
  const lanes = Math.min(2 ** Math.floor(Math.log2(Math.max(width / 4, 1))), THREADS);
  const extremes = `for (var first_block = 0u; first_block < ${columns}u; first_block += ${THREADS / lanes}u) {
      let block = first_block + thread / ${lanes}u;
      let lane = thread % ${lanes}u;
      var low = 0xffffffffu;
      var high = 0u;
      if (block < ${columns}u) {
        for (var i = lane; i < ${width}u; i += ${lanes}u) {
          let bits = x_at(row, block * ${width}u + i);
          low = min(low, low_key(bits));
          high = max(high, high_key(bits));
        }
      }
      lows[thread] = low;
      highs[thread] = high;
      workgroupBarrier();
      for (var half = ${lanes >> 1}u; half > 0u; half >>= 1u) {
        if (lane < half) {
          lows[thread] = min(lows[thread], lows[thread + half]);
          highs[thread] = max(highs[thread], highs[thread + half]);
        }
        workgroupBarrier();
      }
      if (lane == 0u && block < ${columns}u) {
        chosen[slot * ${columns}u + block] = choose(exact_from_key(lows[thread]), exact_from_key(highs[thread]), 0u);
      }
      workgroupBarrier();
    }`;
  const wgsl = `${shaderHead(operands)}
${EXACT}${job.rule.functions}${KEYS}
var<workgroup> partial: array<f32, ${THREADS}>;
var<workgroup> lows: array<u32, ${THREADS}>;
var<workgroup> highs: array<u32, ${THREADS}>;
var<workgroup> chosen: array<Chosen, ${chunk}>;
var<workgroup> factors: array<f32, ${rows}>;
fn x_at(row: u32, column: u32) -> u32 {
  return bitcast<u32>(x[row * ${job.x.stride}u + ${job.x.column}u + column] * factors[row % ${rows}u] * weight[column]);
}
fn parameters(row: u32, column: u32, slot: u32) -> vec2<u32> {
  let own = (row % ${rows}u) * ${columns}u + column / ${width}u;
  return vec2<u32>(chosen[own].a, chosen[own].b);
}
${wordFunction(job)}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let first_row = ${FLAT_WORKGROUP} * ${rows}u;
  let first = first_row * ${columns}u;
  let total = ${job.rows} * ${columns}u;
  for (var slot = 0u; slot < ${rows}u; slot++) {
    // A row that the run does not have is computed from the last one and stored nowhere: barriers need every thread.
    let row = min(first_row + slot, ${job.rows} - 1u);
    var sum = 0.0;
    for (var i = thread; i < ${k}u; i += ${THREADS}u) {
      let v = x[row * ${job.x.stride}u + ${job.x.column}u + i];
      sum += v * v;
    }
    partial[thread] = sum;
    workgroupBarrier();
    for (var half = ${THREADS / 2}u; half > 0u; half >>= 1u) {
      if (thread < half) { partial[thread] += partial[thread + half]; }
      workgroupBarrier();
    }
    if (thread == 0u) { factors[row % ${rows}u] = 1.0 / sqrt(partial[0] / ${k}.0 + ${norm.attrs.eps}); }
    workgroupBarrier();
    ${extremes}
  }
  ${storeScales(job, chunk)}
  for (var i = thread; i < ${rows * stride}u; i += ${THREADS}u) {
    let row = first_row + i / ${stride}u;
    if (row < ${job.rows}) { out[row * ${stride}u + i % ${stride}u] = word_of(row, i % ${stride}u, 0u); }
  }
}`;
  return {
    label: context.bound.describe(),
    wgsl,
    bindings: operands.map(({ binding }) => binding),
    workgroups: (symbols) =>
      flatGrid(Math.ceil(context.rows(out, symbols) / rows), context.device.maxWorkgroupsPerDimension),
  };
}
