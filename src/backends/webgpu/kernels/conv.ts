import { convSize } from "../../../ir/conv.js";
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
import { storedReader } from "../wgsl/stored.js";

const THREADS = 64;

/** A thread an output pixel; weights of any format are decoded where they are used. */
export const CONV_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/conv2d/plain",
    kind: "conv2d",
    requires: [],
    efficiency: { bandwidth: 0.05, compute: 0.02 },
    build: buildConv,
  },
];

function buildConv(context: BuildContext): Dispatch[] {
  const node = context.bound.step.nodes[0] as Node<"conv2d">;
  const [x, weight, bias] = node.inputs as [ValueId, ValueId, ValueId | undefined];
  const out = node.outputs[0] as ValueId;
  const { kernel, stride, padding, dilation, groups } = node.attrs;
  const [, channels, height, width] = context.bound.shape(x) as [number, number, number, number];
  const group = context.weights([weight]);
  const [h, w] = convSize(node.attrs, height, width);
  const inner = channels / groups;
  const [kh, kw] = kernel;
  return group.slices.map(({ begin, end, layout }, slice) => {
    const operands = [
      { name: "image", type: "f32", binding: read(value(x)) },
      { name: "w", type: "u32", binding: read({ kind: "weights", ids: [weight], slice }) },
      ...(bias === undefined ? [] : [{ name: "bias", type: "f32", binding: read({ kind: "dense", ids: [bias] }) }]),
      { name: "out", type: "f32", binding: write(value(out)) },
    ];
    const reader = storedReader("wr", layout, { buffer: "w" });
    const n = end - begin;
    const wgsl = `${shaderHead(operands)}
${reader.functions}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let index = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  let column = index % ${w}u;
  let row = (index / ${w}u) % ${h}u;
  let feature = (index / ${w * h}u) % ${n}u;
  let batch = index / ${w * h * n}u;
  if (batch >= ${context.dimWgsl(context.type(x).shape[0] as number)}) { return; }
  let first = ((feature + ${begin}u) / ${group.rows / groups}u) * ${inner}u;
  var sum = ${bias === undefined ? "0.0" : `bias[feature + ${begin}u]`};
  for (var tap = 0u; tap < ${kh * kw}u; tap++) {
    let y = i32(row * ${stride[0]}u + (tap / ${kw}u) * ${dilation[0]}u) - ${padding[0]};
    let z = i32(column * ${stride[1]}u + (tap % ${kw}u) * ${dilation[1]}u) - ${padding[1]};
    if (y < 0 || y >= ${height} || z < 0 || z >= ${width}) { continue; }
    for (var c = 0u; c < ${inner}u; c++) {
      let pixel = image[((batch * ${channels}u + first + c) * ${height}u + u32(y)) * ${width}u + u32(z)];
      sum += pixel * ${reader.element("feature", `tap * ${inner}u + c`)};
    }
  }
  out[((batch * ${group.rows}u + feature + ${begin}u) * ${h}u + row) * ${w}u + column] = sum;
}`;
    return {
      label: context.bound.describe(),
      wgsl,
      bindings: operands.map((operand) => operand.binding),
      workgroups: (symbols) => {
        const batch = context.type(x).shape[0] as number | string;
        const images = typeof batch === "number" ? batch : (symbols[batch] ?? 0);
        return flatGrid(Math.ceil((images * n * h * w) / THREADS), context.device.maxWorkgroupsPerDimension);
      },
    };
  });
}
