import type { Capabilities } from "../../backend.js";
import type { BoundStep } from "../../../plan/step.js";
import { type BuildContext, type Dispatch, FLAT_WORKGROUP, flatGrid, shaderHead, type WebGpuKernel } from "../kernel.js";
import { CHUNK } from "../wgsl/stored.js";
import { accumulate, chunked, finish, hasFloatZero, type LinearParts, linearParts, linearStep } from "./linear.js";

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
  return bound.shape(x).slice(0, -1).reduce((a, b) => a * b, 1);
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

function buildGemv(context: BuildContext, subgroups: boolean): Dispatch[] {
  const step = linearStep(context.bound);
  const groups = step.parts.map((ids) => context.weights(ids));
  const rows = activationRows(context.bound);
  const chunks = Math.ceil(step.k / CHUNK);
  const threads = subgroups ? Math.max(64, context.device.subgroupSize[1]) : 64;
  const perRow = subgroups ? context.device.subgroupSize[1] : Math.min(32, 2 ** Math.ceil(Math.log2(chunks)));
  const features = threads / perRow;
  return (groups[0]?.slices ?? []).map(({ begin, end }, slice) => {
    const parts = linearParts(context, step, groups, slice);
    const workgroups = Math.ceil((end - begin) / features);
    return {
      label: context.bound.describe(),
      wgsl: gemvSource(context, parts, { rows, chunks, threads, perRow, n: end - begin, subgroups, x: step.x }),
      bindings: parts.operands.map((operand) => operand.binding),
      workgroups: () => flatGrid(workgroups, context.device.maxWorkgroupsPerDimension),
    };
  });
}

interface Shape {
  readonly rows: number;
  readonly chunks: number;
  readonly threads: number;
  readonly perRow: number;
  readonly n: number;
  readonly subgroups: boolean;
  readonly x: number;
}

function gemvSource(context: BuildContext, parts: LinearParts, shape: Shape): string {
  const { rows, chunks, threads, perRow, n, subgroups } = shape;
  const accumulator = parts.integer && parts.scaleAfter ? "i32" : "f32";
  const zero = hasFloatZero(parts);
  const units = parts.weights.flatMap((_, part) => Array.from({ length: rows }, (_, m) => ({ part, m, sum: `sum${part}_${m}` })));
  const declare = units.map(({ sum }) => `var ${sum}: ${accumulator} = 0;${zero ? ` var ${sum}_z: f32 = 0;` : ""}`);
  const row = (m: number) => (rows === 1 ? "0u" : `min(${m}u, rows - 1u)`);
  const loadWeights = parts.weights.map((reader, part) =>
    parts.packedBytes ? reader.chunkWords(`w${part}_`, "feature", "c") : reader.chunk(`w${part}_`, "feature", "c"),
  );
  const body = Array.from({ length: rows }, (_, m) => {
    const adds = parts.weights.map((_, part) => accumulate(parts, part, `sum${part}_${m}`, "xc", `w${part}_`, row(m), "feature", "c"));
    return `{\n${parts.loadX("xc", row(m), "c")}\n${adds.join("\n")}\n}`;
  });
  const values = units.flatMap(({ sum }) => (zero ? [{ name: sum, type: accumulator }, { name: `${sum}_z`, type: "f32" }] : [{ name: sum, type: accumulator }]));
  const reduce = subgroups
    ? values.map(({ name }) => `${name} = subgroupAdd(${name});`).join("\n")
    : values
        .map(({ name, type }) => {
          const shared = type === "i32" ? "shared_i" : "shared_f";
          return `${shared}[lid] = ${name};
workgroupBarrier();
if (lane == 0u) { for (var i = 1u; i < ${perRow}u; i++) { ${name} += ${shared}[lid + i]; } }
workgroupBarrier();`;
        })
        .join("\n");
  const stores = Array.from({ length: rows }, (_, m) => {
    const sums = parts.weights.map((_, part) => finish(parts, part, `sum${part}_${m}`, `${m}u`, "feature"));
    const store = parts.store(`${m}u`, "feature", sums);
    return rows === 1 ? `{ ${store} }` : `if (${m}u < rows) { ${store} }`;
  });
  const shared = subgroups
    ? ""
    : `var<workgroup> shared_f: array<f32, ${threads}>;\n${accumulator === "i32" ? `var<workgroup> shared_i: array<i32, ${threads}>;` : ""}`;
  const builtins = subgroups
    ? ", @builtin(subgroup_invocation_id) lane: u32, @builtin(subgroup_id) group: u32"
    : ", @builtin(local_invocation_index) lid: u32";
  return `${shaderHead(parts.operands, subgroups ? ["subgroups"] : [])}
${parts.functions}
${shared}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>${builtins}) {
${subgroups ? "" : `let lane = lid % ${perRow}u;\nlet group = lid / ${perRow}u;`}
let index = ${FLAT_WORKGROUP} * ${threads / perRow}u + group;
let feature = min(index, ${n - 1}u);
${rows === 1 ? "" : `let rows = ${context.rowsWgsl(shape.x)};`}
${declare.join("\n")}
for (var c = lane; c < ${chunks}u; c += ${perRow}u) {
${loadWeights.join("\n")}
${body.join("\n")}
}
${reduce}
if (lane == 0u && index < ${n}u) {
${stores.join("\n")}
}
}`;
}
