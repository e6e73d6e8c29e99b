import type { BoundStep } from "../../../plan/step.js";
import type { Capabilities } from "../../backend.js";
import {
  type BuildContext,
  type Dispatch,
  FLAT_WORKGROUP,
  flatGrid,
  shaderHead,
  type WebGpuKernel,
} from "../kernel.js";
import { CHUNK, type StoredReader } from "../wgsl/stored.js";
import {
  accumulate,
  chunked,
  finish,
  hasFloatZero,
  type LinearParts,
  type LinearStep,
  linearParts,
  linearStep,
  type Sums,
} from "./linear.js";

/** Activation rows that one GEMV dispatch takes. */
const MAX_ROWS = 8;

const fewRows = {
  unmet: (bound: BoundStep) => {
    const rows = activationRows(bound);
    return rows <= MAX_ROWS ? null : `M must be at most ${MAX_ROWS}: M is ${rows}`;
  },
};

const uniformSubgroups = {
  unmet: (_: BoundStep, device: Capabilities) => {
    if (!device.features.has("subgroups")) return "the device has no subgroups";
    const [min, max] = device.subgroupSize;
    return min === max && max >= 4 && max <= 64 ? null : `its subgroup size is not fixed: ${min} to ${max}`;
  },
};

export function activationRows(bound: BoundStep): number {
  const { x } = linearStep(bound);
  return bound
    .shape(x)
    .slice(0, -1)
    .reduce((a, b) => a * b, 1);
}

/** Threads of a subgroup or of a part of the workgroup share an output feature and walk its chunks of K side by side. */
export const GEMV_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/linear/gemv_subgroup",
    kind: "linear",
    requires: [fewRows, chunked, uniformSubgroups],
    efficiency: { bandwidth: 0.6, compute: 0.1 },
    build: (context) => buildGemv(context, true),
  },
  {
    id: "webgpu/linear/gemv",
    kind: "linear",
    requires: [fewRows, chunked],
    efficiency: { bandwidth: 0.5, compute: 0.1 },
    build: (context) => buildGemv(context, false),
  },
];

/** Workgroup memory that staged activations may take; more would leave too few workgroups on a processor. */
const STAGE_BYTES = 16384;
/** Rows of weights that one subgroup walks together: each reuses the activations the others loaded. */
const MAX_FEATURES_PER_SUBGROUP = 4;
/** Workgroups that keep a large GPU busy; smaller outputs give up reuse for them. */
const BUSY_WORKGROUPS = 512;

function buildGemv(context: BuildContext, subgroups: boolean): Dispatch[] {
  const step = linearStep(context.bound);
  const groups = step.parts.map((ids) => context.weights(ids));
  const rows = activationRows(context.bound);
  const chunks = Math.ceil(step.k / CHUNK);
  const size = context.device.subgroupSize[1];
  const wide = subgroups && size >= 16;
  const threads = wide ? 128 : subgroups ? Math.max(64, size) : 64;
  const perRow = subgroups ? size : Math.min(32, 2 ** Math.ceil(Math.log2(chunks)));
  return (groups[0]?.slices ?? []).map(({ begin, end }, slice) => {
    const parts = linearParts(context, step, groups, slice);
    const n = end - begin;
    const room = Math.floor((n * perRow) / (threads * BUSY_WORKGROUPS));
    const features =
      wide && rows === 1 ? Math.max(1, Math.min(MAX_FEATURES_PER_SUBGROUP / parts.weights.length, room)) : 1;
    const perLane = 2 ** Math.floor(Math.log2(Math.max(1, features)));
    const stage = wide && parts.xStored === null ? stageChunks(chunks, rows, perRow) : 0;
    const workgroups = Math.ceil(n / ((threads / perRow) * perLane));
    return {
      label: context.bound.describe(),
      wgsl: gemvSource(context, parts, { rows, chunks, threads, perRow, perLane, n, subgroups, stage, step }),
      bindings: parts.operands.map((operand) => operand.binding),
      workgroups: () => flatGrid(workgroups, context.device.maxWorkgroupsPerDimension),
    };
  });
}

/** Chunks of K that are staged at a time: as many as fit, in whole strides of the subgroup. */
function stageChunks(chunks: number, rows: number, stride: number): number {
  const fit = Math.floor(STAGE_BYTES / (CHUNK * 4 * rows)) - 1;
  return Math.min(chunks, Math.max(stride, Math.floor(fit / stride) * stride));
}

interface Shape {
  readonly rows: number;
  readonly chunks: number;
  readonly threads: number;
  /** Invocations that share an output feature. */
  readonly perRow: number;
  /** Output features of each of these groups. */
  readonly perLane: number;
  readonly n: number;
  readonly subgroups: boolean;
  /** Chunks of x kept in workgroup memory at a time; 0 reads x where it lies. */
  readonly stage: number;
  readonly step: LinearStep;
}

function gemvSource(context: BuildContext, parts: LinearParts, shape: Shape): string {
  const { rows, chunks, threads, perRow, perLane, n, subgroups, stage, step } = shape;
  const accumulator = parts.integer && parts.scaleAfter ? "i32" : "f32";
  const zero = hasFloatZero(parts);
  const single = rows === 1;
  /** A sum for every part and output feature; with several rows of x it is an array over them, so that the text stays short. */
  const cells = parts.weights.flatMap((_, part) =>
    Array.from({ length: perLane }, (_, r) => ({ part, r, name: `sum${part}_${r}` })),
  );
  const sums = (name: string, m: string): Sums =>
    single ? { sum: name, zero: `${name}_z` } : { sum: `${name}[${m}]`, zero: `${name}_z[${m}]` };
  const typeOf = (type: string) => (single ? type : `array<${type}, ${rows}>`);
  const declare = cells.map(
    ({ name }) => `var ${name}: ${typeOf(accumulator)};${zero ? ` var ${name}_z: ${typeOf("f32")};` : ""}`,
  );
  const overRows = (text: string) => (single ? text : `for (var m = 0u; m < ${rows}u; m++) {\n${text}\n}`);
  const [m, row] = single ? ["0u", "0u"] : ["m", "min(m, rows - 1u)"];
  const pitch = stage + 1;
  const loadX =
    stage === 0
      ? parts.loadX("x_", row, "c")
      : Array.from({ length: 8 }, (_, i) => `let x_${i} = staged[(${m} * 8u + ${i}u) * ${pitch}u + c - c0];`).join(
          "\n",
        );
  const loadW = ({ part, r, name }: (typeof cells)[number]) => {
    const reader = parts.weights[part] as StoredReader;
    return parts.packedBytes
      ? reader.chunkWords(`${name}_`, `feature${r}`, "c")
      : reader.chunk(`${name}_`, `feature${r}`, "c");
  };
  const add = ({ part, r, name }: (typeof cells)[number]) =>
    accumulate(parts, part, sums(name, m), "x_", `${name}_`, row, `feature${r}`, "c");
  // One row of x stays in registers while the weights of each feature pass by; several rows pass by one feature's weights.
  const body = single
    ? [loadX, ...cells.map((cell) => `{\n${loadW(cell)}\n${add(cell)}\n}`)].join("\n")
    : [...cells.map(loadW), overRows([loadX, ...cells.map(add)].join("\n"))].join("\n");
  const walk =
    stage === 0
      ? `for (var c = lane; c < ${chunks}u; c += ${perRow}u) {\n${body}\n}`
      : `for (var c0 = 0u; c0 < ${chunks}u; c0 += ${stage}u) {
workgroupBarrier();
for (var i = lid; i < ${rows * stage * 8}u; i += ${threads}u) {
let m = i / ${stage * 8}u;
let at = c0 * 8u + i % ${stage * 8}u;
// Lanes of a subgroup read neighbouring vec4s: element j of every chunk lies side by side.
staged[(m * 8u + at % 8u) * ${pitch}u + at / 8u - c0] = ${parts.xVector(row, "at")};
}
workgroupBarrier();
for (var c = c0 + lane; c < min(c0 + ${stage}u, ${chunks}u); c += ${perRow}u) {\n${body}\n}
}`;
  const values = cells.flatMap(({ name }) => {
    const { sum, zero: zeroSum } = sums(name, "m");
    return zero
      ? [
          { sum, type: accumulator },
          { sum: zeroSum, type: "f32" },
        ]
      : [{ sum, type: accumulator }];
  });
  const slot = (v: number) =>
    `${single ? "" : `(m * ${values.length}u + ${v}u) * ${threads}u + `}${single ? v * threads : 0}u + lid`;
  const shared = (type: string) => (type === "i32" ? "shared_i" : "shared_f");
  const reduce = subgroups
    ? overRows(values.map(({ sum }) => `${sum} = subgroupAdd(${sum});`).join("\n"))
    : // One barrier for all sums: SwiftShader's compiler takes a tenth of a second for each.
      [
        overRows(values.map(({ sum, type }, v) => `${shared(type)}[${slot(v)}] = ${sum};`).join("\n")),
        "workgroupBarrier();",
        `if (lane == 0u) { ${overRows(`for (var i = 1u; i < ${perRow}u; i++) {
${values.map(({ sum, type }, v) => `${sum} += ${shared(type)}[${slot(v)} + i];`).join("\n")}
}`)} }`,
      ].join("\n");
  const stores = Array.from({ length: perLane }, (_, r) => {
    const finished = parts.weights.map((_, part) =>
      finish(parts, part, sums(`sum${part}_${r}`, "m"), m, `feature${r}`),
    );
    const guards = [...(single ? [] : ["m < rows"]), `index + ${r}u < ${n}u`];
    return overRows(`if (${guards.join(" && ")}) { ${parts.store(m, `feature${r}`, finished)} }`);
  });
  const memory = [
    stage > 0 ? `var<workgroup> staged: array<vec4<f32>, ${rows * 8 * pitch}>;` : "",
    subgroups ? "" : `var<workgroup> shared_f: array<f32, ${rows * values.length * threads}>;`,
    !subgroups && accumulator === "i32"
      ? `var<workgroup> shared_i: array<i32, ${rows * values.length * threads}>;`
      : "",
  ];
  const builtins = subgroups ? ", @builtin(subgroup_invocation_id) lane: u32, @builtin(subgroup_id) group: u32" : "";
  return `${shaderHead(parts.operands, subgroups ? ["subgroups"] : [])}
${parts.functions}
${memory.join("\n")}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32${builtins}) {
${subgroups ? "" : `let lane = lid % ${perRow}u;\nlet group = lid / ${perRow}u;`}
let index = (${FLAT_WORKGROUP} * ${threads / perRow}u + group) * ${perLane}u;
${Array.from({ length: perLane }, (_, r) => `let feature${r} = min(index + ${r}u, ${n - 1}u);`).join("\n")}
${rows === 1 ? "" : `let rows = ${context.rowsWgsl(step.x)};`}
${declare.join("\n")}
${walk}
${reduce}
if (lane == 0u) {
${stores.join("\n")}
}
}`;
}
