import type { Node, ValueId } from "../../../ir/graph.js";
import { read, shaderHead, value, type WebGpuKernel, write } from "../kernel.js";

const THREADS = 256;

/**
 * One workgroup draws a token by the rule of `ir/sample.ts`. Thresholds for top-k and top-p are found by bisection over the
 * order-preserving bits of the logits, so nothing is sorted; each thread owns a run of neighbouring ids for the final walk.
 */
export const SAMPLE_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/sample",
    kind: "sample",
    requires: [],
    efficiency: { bandwidth: 0.05, compute: 0.05 },
    build: (context) => {
      const node = context.bound.step.nodes[0] as Node<"sample">;
      const [logits, settings, ids] = node.inputs as [ValueId, ValueId, ValueId];
      const vocabulary = context.lastExtent(logits);
      const operands = [
        { name: "logits", type: "f32", binding: read(value(logits)) },
        { name: "settings", type: "u32", binding: read(value(settings)) },
        { name: "ids", type: "i32", binding: write(value(context.placement(ids).root)) },
        { name: "sampled", type: "u32", binding: write(value(node.outputs[0] as ValueId)) },
      ];
      return [
        {
          label: context.bound.describe(),
          wgsl: `${shaderHead(operands)}\n${source(vocabulary)}`,
          bindings: operands.map((operand) => operand.binding),
          workgroups: () => [1, 1, 1],
        },
      ];
    },
  },
];

function source(vocabulary: number): string {
  const run = Math.ceil(vocabulary / THREADS);
  return `
var<workgroup> floats: array<f32, ${THREADS}>;
var<workgroup> words: array<u32, ${THREADS}>;
// Bits that order as the floats do: equal logits give equal keys.
fn key(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}
fn pcg(x: u32) -> u32 {
  let state = x * 747796405u + 2891336453u;
  let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
  return (word >> 22u) ^ word;
}
fn sum_f(lid: u32, x: f32) -> f32 {
  floats[lid] = x;
  workgroupBarrier();
  for (var half = ${THREADS / 2}u; half > 0u; half /= 2u) {
    if (lid < half) { floats[lid] += floats[lid + half]; }
    workgroupBarrier();
  }
  let total = workgroupUniformLoad(&floats[0]);
  return total;
}
fn sum_u(lid: u32, x: u32) -> u32 {
  words[lid] = x;
  workgroupBarrier();
  for (var half = ${THREADS / 2}u; half > 0u; half /= 2u) {
    if (lid < half) { words[lid] += words[lid + half]; }
    workgroupBarrier();
  }
  let total = workgroupUniformLoad(&words[0]);
  return total;
}
fn mass(i: u32, top: f32, temperature: f32) -> f32 { return exp((logits[i] - top) / temperature); }

@compute @workgroup_size(${THREADS})
fn main(@builtin(local_invocation_index) lid: u32) {
  let begin = min(lid * ${run}u, ${vocabulary}u);
  let end = min(begin + ${run}u, ${vocabulary}u);
  // The lowest id with the largest logit.
  var best = begin;
  for (var i = begin; i < end; i++) { if (logits[i] > logits[min(best, ${vocabulary - 1}u)]) { best = i; } }
  words[lid] = best;
  workgroupBarrier();
  if (lid == 0u) {
    for (var i = 1u; i < ${THREADS}u; i++) {
      if (words[i] < ${vocabulary}u && logits[words[i]] > logits[words[0]]) { words[0] = words[i]; }
    }
  }
  let argmax = workgroupUniformLoad(&words[0]);
  let top = logits[argmax];
  var partial = 0.0;
  for (var i = begin; i < end; i++) { partial += exp(logits[i] - top); }
  let log_total = log(sum_f(lid, partial));

  let temperature = bitcast<f32>(settings[0]);
  let top_k = settings[1];
  let top_p = bitcast<f32>(settings[2]);
  var chosen = argmax;
  if (workgroupUniformLoad(&words[0]) == argmax && temperature > 0.0) {
    var least = 0u;
    if (top_k > 0u && top_k < ${vocabulary}u) {
      for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
        var count = 0u;
        for (var i = begin; i < end; i++) { count += select(0u, 1u, key(logits[i]) >= (least | bit)); }
        if (sum_u(lid, count) >= top_k) { least |= bit; }
      }
    }
    if (top_p < 1.0) {
      partial = 0.0;
      for (var i = begin; i < end; i++) { if (key(logits[i]) >= least) { partial += mass(i, top, temperature); } }
      let wanted = top_p * sum_f(lid, partial);
      // The largest key whose tokens, with all above it, hold the wanted mass.
      var threshold = 0u;
      for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
        partial = 0.0;
        for (var i = begin; i < end; i++) { if (key(logits[i]) >= (threshold | bit)) { partial += mass(i, top, temperature); } }
        if (sum_f(lid, partial) >= wanted) { threshold |= bit; }
      }
      least = max(least, threshold);
    }
    partial = 0.0;
    for (var i = begin; i < end; i++) { if (key(logits[i]) >= least) { partial += mass(i, top, temperature); } }
    let kept = sum_f(lid, partial);
    floats[lid] = partial;
    words[lid] = ${vocabulary}u;
    workgroupBarrier();
    let target_mass = f32(pcg(pcg(settings[3]) + settings[4]) >> 8u) * 5.9604644775390625e-8 * kept;
    var before = 0.0;
    for (var i = 0u; i < lid; i++) { before += floats[i]; }
    if (partial > 0.0) {
      // The last kept id of a run that ends above the target, or of any run: sums may fall short by rounding.
      var sum = before;
      for (var i = begin; i < end; i++) {
        if (key(logits[i]) < least) { continue; }
        sum += mass(i, top, temperature);
        words[lid] = i;
        if (sum > target_mass) { break; }
      }
      if (sum <= target_mass) { words[lid] |= 0x80000000u; }
    }
    workgroupBarrier();
    if (lid == 0u) {
      var fallback = argmax;
      var found = false;
      for (var i = 0u; i < ${THREADS}u; i++) {
        let word = words[i];
        if (word == ${vocabulary}u) { continue; }
        fallback = word & 0x7fffffffu;
        if (word < 0x80000000u) { found = true; break; }
      }
      words[0] = fallback;
    }
    chosen = workgroupUniformLoad(&words[0]);
  }
  if (lid == 0u) {
    sampled[0] = chosen;
    sampled[1] = bitcast<u32>(logits[chosen] - top - log_total);
    ids[0] = i32(chosen);
  }
}`;
}
