import type { Node, ValueId } from "../../../ir/graph.js";
import { FLAT_WORKGROUP, flatGrid, read, shaderHead, value, type WebGpuKernel, write } from "../kernel.js";
import { floatText } from "./rows.js";

const THREADS = 64;

/** The activation functions, as in `ir/evaluate.ts`. tanh is clamped where WGSL's may overflow; erf is Cody's three ranges. */
export const UNARY_WGSL = `
fn relu(x: f32) -> f32 { return max(x, 0.0); }
fn silu(x: f32) -> f32 { return x / (1.0 + exp(-x)); }
fn sigmoid(x: f32) -> f32 { return 1.0 / (1.0 + exp(-x)); }
fn gelu_tanh(x: f32) -> f32 { return 0.5 * x * (1.0 + tanh(clamp(0.7978845608 * (x + 0.044715 * x * x * x), -15.0, 15.0))); }
fn gelu(x: f32) -> f32 { return 0.5 * x * erfc_neg(x * 0.7071067811865476); }
// 1 + erf(x), accurate in the tail because it is erfc(-x): rational approximation of Numerical Recipes' erfcc form, with
// its Chebyshev coefficients (relative error below 1.2e-7 everywhere).
fn erfc_neg(x: f32) -> f32 {
  let z = abs(x);
  let t = 1.0 / (1.0 + 0.5 * z);
  let p = -1.26551223 + t * (1.00002368 + t * (0.37409196 + t * (0.09678418 + t * (-0.18628806 + t * (0.27886807
    + t * (-1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277))))))));
  let tail = t * exp(-z * z + p);
  return select(tail, 2.0 - tail, x >= 0.0);
}`;

/** cap tanh(x / cap), within 16u of cap; beyond 2^43 the quotient no longer shows. */
const SOFTCAP_WGSL = `
fn softcap(x: f32, cap: f32) -> f32 {
  let e = exp(2.0 * min(abs(x / cap), 15.0));
  return sign(x) * cap * (1.0 - 2.0 / (e + 1.0));
}`;

export const ELEMENTWISE_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/elementwise",
    kind: "elementwise",
    requires: [],
    efficiency: { bandwidth: 0.8, compute: 0.1 },
    build: (context) => {
      const node = context.bound.step.nodes[0] as Node<"unary" | "binary">;
      const out = node.outputs[0] as ValueId;
      const [a, b] = node.inputs as [ValueId, ValueId | undefined];
      const width = context.lastExtent(out);
      const operands = [
        { name: "a", type: "f32", binding: read(value(a)) },
        ...(b === undefined || b === a ? [] : [{ name: "b", type: "f32", binding: read(value(b)) }]),
        { name: "out", type: "f32", binding: write(value(out)) },
      ];
      const at = (id: ValueId) => {
        const { stride, column } = context.placement(id);
        return stride === width ? "i" : `(i / ${width}u) * ${stride}u + ${column}u + i % ${width}u`;
      };
      const left = `a[${at(a)}]`;
      const right = b === undefined ? "" : b === a ? left : `b[${at(b)}]`;
      const cap = node.op === "unary" ? node.attrs.cap : undefined;
      const result =
        node.op === "unary"
          ? `${node.attrs.fn}(${left}${cap === undefined ? "" : `, ${floatText(cap)}`})`
          : `${left} ${node.attrs.fn === "add" ? "+" : "*"} ${right}`;
      const wgsl = `${shaderHead(operands)}
${UNARY_WGSL}${cap === undefined ? "" : SOFTCAP_WGSL}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let i = ${FLAT_WORKGROUP} * ${THREADS}u + lid;
  if (i < ${context.rowsWgsl(out)} * ${width}u) { out[i] = ${result}; }
}`;
      const bindings = operands.map((operand) => operand.binding);
      const workgroups = (symbols: Readonly<Record<string, number>>) =>
        flatGrid(Math.ceil((context.rows(out, symbols) * width) / THREADS), context.device.maxWorkgroupsPerDimension);
      return [{ label: context.bound.describe(), wgsl, bindings, workgroups }];
    },
  },
];
