import type { Node, ValueId } from "../../../ir/graph.js";
import type { Requirement } from "../../../plan/select.js";
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
import { CHUNK, storedReader } from "../wgsl/stored.js";
import { accumulate, chunkedUnmet, finish, hasFloatZero, type LinearStep, linearParts } from "./linear.js";
import { plainSum } from "./plain.js";

const THREADS = 64;
const BUILTINS =
  "@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32";

/** A step of kind `moe_linear`, taken apart. Slot i of the T * S slots reads row `shared ? i / S : i` of x. */
interface MoeStep {
  readonly x: ValueId;
  readonly ids: ValueId;
  readonly experts: readonly ValueId[];
  readonly out: ValueId;
  readonly k: number;
  readonly n: number;
  readonly slots: number;
  readonly shared: boolean;
}

function moeStep(bound: BoundStep): MoeStep {
  const node = bound.step.nodes[0] as Node<"moe_linear">;
  const [x, ids, ...experts] = node.inputs as readonly [ValueId, ValueId, ...ValueId[]];
  const [n, k] = bound.type(experts[0] as ValueId).shape as [number, number];
  const shared = bound.type(x).shape.length === 2;
  return { x, ids, experts, out: node.outputs[0] as ValueId, n, k, slots: bound.type(ids).shape[1] as number, shared };
}

/** The experts' rows lie one after another on the device: no block or learned table may span two of them. */
const stacked: Requirement = {
  unmet: (bound) => {
    const type = bound.type(moeStep(bound).experts[0] as ValueId);
    if (type.kind !== "format") return "its weights are dense";
    const { element, scales } = type.format;
    if (element.kind === "lut" && element.entries === "learned") return "each expert has a table of its own";
    const rows = type.shape[0] as number;
    const apart = scales.every(({ block }) => block[0] === "all" || rows % block[0] === 0);
    return apart ? null : `blocks of several rows do not divide the ${rows} rows of an expert`;
  },
};

const chunked: Requirement = {
  unmet: (bound) => {
    const { x, experts, k } = moeStep(bound);
    return chunkedUnmet(bound, [x, experts[0] as ValueId], k);
  },
};

export const MOE_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/moe_route",
    kind: "moe_route",
    requires: [],
    efficiency: { bandwidth: 0.1, compute: 0.01 },
    build: buildRoute,
  },
  {
    id: "webgpu/moe_linear/gemv",
    kind: "moe_linear",
    requires: [stacked, chunked],
    efficiency: { bandwidth: 0.5, compute: 0.1 },
    build: buildGemv,
  },
  {
    id: "webgpu/moe_linear/plain",
    kind: "moe_linear",
    requires: [stacked],
    efficiency: { bandwidth: 0.01, compute: 0.005 },
    build: buildPlain,
  },
  {
    id: "webgpu/moe_combine",
    kind: "moe_combine",
    requires: [],
    efficiency: { bandwidth: 0.8, compute: 0.1 },
    build: buildCombine,
  },
];

/** A thread a token. Each round takes the expert that follows the last one: a smaller logit, or the next id of an equal one. */
function buildRoute(context: BuildContext): Dispatch[] {
  const node = context.bound.step.nodes[0] as Node<"moe_route">;
  const logits = node.inputs[0] as ValueId;
  const [ids, gates] = node.outputs as [ValueId, ValueId];
  const { top, normalize } = node.attrs;
  const experts = context.lastExtent(logits);
  const { stride, column } = context.placement(logits);
  const operands = [
    { name: "logits", type: "f32", binding: read(value(logits)) },
    { name: "ids", type: "i32", binding: write(value(ids)) },
    { name: "gates", type: "f32", binding: write(value(gates)) },
  ];
  const among = normalize
    ? `for (var s = 0u; s < ${top}u; s++) { sum += exp(logits[row + u32(ids[t * ${top}u + s])] - most); }`
    : `for (var e = 0u; e < ${experts}u; e++) { sum += exp(logits[row + e] - most); }`;
  const wgsl = `${shaderHead(operands)}
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let t = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  if (t >= ${context.rowsWgsl(logits)}) { return; }
  let row = t * ${stride}u + ${column}u;
  var last = 0.0;
  var last_id = 0u;
  var most = 0.0;
  for (var s = 0u; s < ${top}u; s++) {
    var best = 0.0;
    var id = 0u;
    var found = false;
    for (var e = 0u; e < ${experts}u; e++) {
      let logit = logits[row + e];
      let left = (s == 0u) | (logit < last) | ((logit == last) & (e > last_id));
      if (left & (!found | (logit > best))) { best = logit; id = e; found = true; }
    }
    last = best;
    last_id = id;
    most = select(most, best, s == 0u);
    ids[t * ${top}u + s] = i32(id);
  }
  var sum = 0.0;
  ${among}
  for (var s = 0u; s < ${top}u; s++) {
    gates[t * ${top}u + s] = exp(logits[row + u32(ids[t * ${top}u + s])] - most) / sum;
  }
}`;
  return [dispatch(context, wgsl, operands, (symbols) => Math.ceil(context.rows(logits, symbols) / THREADS))];
}

/** A part of a workgroup shares an output of a slot and walks its expert's row in chunks, as the GEMV kernels do. */
function buildGemv(context: BuildContext): Dispatch[] {
  const step = moeStep(context.bound);
  const { n, k, out, experts } = step;
  const epilogue = { kind: "none" } as const;
  const linear: LinearStep = {
    x: step.x,
    parts: [experts],
    biases: [],
    epilogue,
    out,
    rounds: null,
    k,
    fastAccum: false,
  };
  const group = context.weights(experts);
  const chunks = Math.ceil(k / CHUNK);
  const perRow = Math.min(32, 2 ** Math.ceil(Math.log2(chunks)));
  const features = THREADS / perRow;
  const tiles = Math.ceil(n / features);
  return group.slices.map(({ begin, end }, slice) => {
    const parts = linearParts(context, linear, [group], slice);
    const operands = [{ name: "ids", type: "i32", binding: read(value(step.ids)) }, ...parts.operands];
    const accumulator = parts.integer && parts.scaleAfter ? "i32" : "f32";
    const zero = hasFloatZero(parts);
    const sums = { sum: "sum", zero: "zero_sum" };
    const shared = [
      `var<workgroup> partial: array<${accumulator}, ${THREADS}>;`,
      ...(zero ? [`var<workgroup> partial_zero: array<f32, ${THREADS}>;`] : []),
    ];
    const each = (text: (name: string, memory: string) => string) =>
      [text("sum", "partial"), ...(zero ? [text("zero_sum", "partial_zero")] : [])].join("\n    ");
    const wgsl = `${shaderHead(operands)}
${parts.functions}
${shared.join("\n")}
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let index = ${FLAT_WORKGROUP};
  let slot = min(index / ${tiles}u, ${context.rowsWgsl(out)} - 1u);
  let lane = lid % ${perRow}u;
  let n = (index % ${tiles}u) * ${features}u + lid / ${perRow}u;
  let expert = u32(clamp(ids[slot], 0, ${experts.length - 1}));
  let row = expert * ${n}u + min(n, ${n - 1}u);
  let feature = clamp(row, ${begin}u, ${end - 1}u) - ${begin}u;
  let m = ${step.shared ? `slot / ${step.slots}u` : "slot"};
  var sum: ${accumulator};
  ${zero ? "var zero_sum: f32;" : ""}
  for (var c = lane; c < ${chunks}u; c += ${perRow}u) {
    ${parts.loadX("x_", "m", "c")}
    ${parts.packedBytes ? (parts.weights[0]?.chunkWords("w_", "feature", "c") ?? "") : parts.weights[0]?.chunk("w_", "feature", "c")}
    ${accumulate(parts, 0, sums, "x_", "w_", "m", "feature", "c")}
  }
  ${each((name, memory) => `${memory}[lid] = ${name};`)}
  workgroupBarrier();
  if (lane == 0u) {
    for (var i = 1u; i < ${perRow}u; i++) { ${each((name, memory) => `${name} += ${memory}[lid + i];`)} }
    if ((n < ${n}u) & (row >= ${begin}u) & (row < ${end}u)) {
      out[slot * ${n}u + n] = ${finish(parts, 0, sums, "m", "feature")};
    }
  }
}`;
    return dispatch(context, wgsl, operands, (symbols) => context.rows(out, symbols) * tiles);
  });
}

/** A thread an output, an element at a time. */
function buildPlain(context: BuildContext): Dispatch[] {
  const step = moeStep(context.bound);
  const { n: width, k, out, experts } = step;
  const group = context.weights(experts);
  const type = context.type(step.x);
  const { stride, column } = context.placement(step.x);
  return group.slices.map(({ begin, end, layout }, slice) => {
    const operands = [
      { name: "ids", type: "i32", binding: read(value(step.ids)) },
      { name: "x", type: type.kind === "format" ? "u32" : "f32", binding: read(value(step.x)) },
      { name: "w", type: "u32", binding: read({ kind: "weights", ids: experts, slice } as const) },
      { name: "out", type: "f32", binding: write(value(out)) },
    ];
    const weight = storedReader("wr", layout, { buffer: "w" });
    const reader = type.kind === "format" ? storedReader("xr", context.layout(step.x), { buffer: "x" }) : null;
    const at = reader === null ? `x[m * ${stride}u + ${column}u + k]` : reader.element("m", "k");
    const source = { reader, format: type.kind === "format" ? type.format : null, at };
    const wgsl = `${shaderHead(operands)}
${reader?.functions ?? ""}
${weight.functions}
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let index = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  let slot = index / ${width}u;
  if (slot >= ${context.rowsWgsl(out)}) { return; }
  let row = u32(clamp(ids[slot], 0, ${experts.length - 1})) * ${width}u + index % ${width}u;
  if ((row < ${begin}u) | (row >= ${end}u)) { return; }
  let n = row - ${begin}u;
  let m = ${step.shared ? `slot / ${step.slots}u` : "slot"};
  ${plainSum("y", source, weight, group.format, k)}
  out[index] = y;
}`;
    return dispatch(context, wgsl, operands, (symbols) => Math.ceil((context.rows(out, symbols) * width) / THREADS));
  });
}

function buildCombine(context: BuildContext): Dispatch[] {
  const node = context.bound.step.nodes[0] as Node<"moe_combine">;
  const [x, gates] = node.inputs as [ValueId, ValueId];
  const out = node.outputs[0] as ValueId;
  const width = context.lastExtent(out);
  const slots = context.lastExtent(gates);
  const [place, gate] = [context.placement(x), context.placement(gates)];
  const operands = [
    { name: "x", type: "f32", binding: read(value(x)) },
    { name: "gates", type: "f32", binding: read(value(gates)) },
    { name: "out", type: "f32", binding: write(value(out)) },
  ];
  const wgsl = `${shaderHead(operands)}
@compute @workgroup_size(${THREADS})
fn main(${BUILTINS}) {
  let index = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  let t = index / ${width}u;
  let k = index % ${width}u;
  if (t >= ${context.rowsWgsl(out)}) { return; }
  var sum = 0.0;
  for (var s = 0u; s < ${slots}u; s++) {
    sum += gates[t * ${gate.stride}u + ${gate.column}u + s] * x[(t * ${slots}u + s) * ${place.stride}u + ${place.column}u + k];
  }
  out[index] = sum;
}`;
  return [dispatch(context, wgsl, operands, (symbols) => Math.ceil((context.rows(out, symbols) * width) / THREADS))];
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
