import type { Format } from "../../../formats/format.js";
import { scaleGranularity } from "../../../formats/tensor.js";
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
import { isIntegerFormat, type StoredReader, storedReader } from "../wgsl/stored.js";
import { UNARY_WGSL } from "./elementwise.js";
import { linearStep } from "./linear.js";

const THREADS = 64;

/** A thread an output, an element at a time: runs every format, K and table shape, and is what the other kernels are read beside. */
export const PLAIN_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/linear/plain",
    kind: "linear",
    requires: [],
    efficiency: { bandwidth: 0.01, compute: 0.005 },
    build: buildPlain,
  },
];

function buildPlain(context: BuildContext): Dispatch[] {
  const step = linearStep(context.bound);
  const groups = step.parts.map((ids) => context.weights(ids));
  const xType = context.type(step.x);
  return (groups[0]?.slices ?? []).map(({ begin, end }, slice) => {
    const operands = [
      { name: "x", type: xType.kind === "format" ? "u32" : "f32", binding: read(value(step.x)) },
      ...groups.map((group, i) => ({
        name: `w${i}`,
        type: "u32",
        binding: read({ kind: "weights", ids: group.ids, slice }),
      })),
      ...step.biases.map((ids, i) => ({ name: `bias${i}`, type: "f32", binding: read({ kind: "dense", ids }) })),
      ...(step.epilogue.kind === "residual"
        ? [{ name: "residual", type: "f32", binding: read(value(step.epilogue.other)) }]
        : []),
      { name: "out", type: "f32", binding: write(value(step.out)) },
    ];
    const readers = groups.map((group, i) =>
      storedReader(`wr${i}`, (group.slices[slice] as (typeof group.slices)[number]).layout, { buffer: `w${i}` }),
    );
    const xReader = xType.kind === "format" ? storedReader("xr", context.layout(step.x), { buffer: "x" }) : null;
    const place = context.placement(step.x);
    const out = context.placement(step.out);
    const xAt = xReader === null ? `x[m * ${place.stride}u + ${place.column}u + k]` : xReader.element("m", "k");
    const sums = readers.map((reader, i) => {
      const bias = step.biases[i] === undefined ? "" : ` + bias${i}[${begin}u + n]`;
      const weight = (groups[i] as (typeof groups)[number]).format;
      const source = { reader: xReader, format: xType.kind === "format" ? xType.format : null, at: xAt };
      return plainSum(`y${i}`, source, reader, weight, step.k, bias);
    });
    const { epilogue } = step;
    let last = "";
    if (epilogue.kind === "residual") {
      const other = context.placement(epilogue.other);
      last = `y0 += residual[m * ${other.stride}u + ${other.column + begin}u + n];`;
    } else if (epilogue.kind === "unary") last = `y0 = ${epilogue.fn}(y0);`;
    else if (epilogue.kind === "gated") last = `y0 = ${epilogue.fn}(y0) * y1;`;
    const wgsl = `${shaderHead(operands)}
${xReader?.functions ?? ""}
${readers.map((reader) => reader.functions).join("\n")}
${UNARY_WGSL}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let index = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  let m = index / ${end - begin}u;
  let n = index % ${end - begin}u;
  if (m >= ${context.rowsWgsl(step.x)}) { return; }
  ${sums.join("\n  ")}
  ${last}
  out[m * ${out.stride}u + ${out.column + begin}u + n] = y0;
}`;
    return {
      label: context.bound.describe(),
      wgsl,
      bindings: operands.map((operand) => operand.binding),
      workgroups: (symbols) =>
        flatGrid(
          Math.ceil((context.rows(step.x, symbols) * (end - begin)) / THREADS),
          context.device.maxWorkgroupsPerDimension,
        ),
    };
  });
}

/** Statements that declare `y`, the sum over k of row m of x times row n of a weight. */
export function plainSum(
  y: string,
  x: { readonly reader: StoredReader | null; readonly format: Format | null; readonly at: string },
  weight: StoredReader,
  weightFormat: Format,
  k: number,
  bias = "",
): string {
  const formats = x.format === null ? [] : [x.format, weightFormat];
  if (x.reader !== null && formats.every(isIntegerFormat)) {
    // Products of integers are summed exactly over the elements that share their scales.
    const run = Math.min(...formats.map((format) => scaleGranularity(format, k)));
    return `var ${y} = 0.0;
  for (var g = 0u; g < ${k}u; g += ${run}u) {
    var part = 0;
    for (var k = g; k < g + ${run}u; k++) { part += i32(${x.reader.code("m", "k")}) * i32(${weight.code("n", "k")}); }
    ${y} += f32(part) * (${weight.scale("n", "g")} * (${x.reader.scale("m", "g")}));
  }
  ${y} = ${y}${bias};`;
  }
  return `var ${y} = 0.0;
  for (var k = 0u; k < ${k}u; k++) { ${y} += ${x.at} * ${weight.element("n", "k")}; }
  ${y} = ${y}${bias};`;
}
