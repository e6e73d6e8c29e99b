import { dense, GraphBuilder } from "../ir/graph.js";
import type { DenseTensor } from "../ir/tensor.js";
import type { Device } from "../runtime/device.js";
import type { GoldenPrimitives } from "./golden-case.js";

/** The golden harness's `sdpa` as a graph of one op on a device: operands [batch, heads, tokens, size] in float32. */
export function sdpaPrimitive(device: Device): GoldenPrimitives["sdpa"] {
  return async (q, k, v, { batch, heads, kvHeads, tokens, keys, size, causal }) => {
    const g = new GraphBuilder();
    const shapes = {
      q: [batch, heads, tokens, size],
      k: [batch, kvHeads, keys, size],
      v: [batch, kvHeads, keys, size],
    };
    const operands = Object.entries(shapes).map(([name, shape]) => g.input(name, dense("f32", shape)));
    g.output("y", g.one("sdpa", operands, { heads, kvHeads, scale: 1 / Math.sqrt(size), causal }));
    using program = await device.compile(g.build());
    const tensor = (data: Float32Array, shape: readonly number[]): DenseTensor => ({ dtype: "f32", shape, data });
    const { y } = await program.run({
      inputs: { q: tensor(q, shapes.q), k: tensor(k, shapes.k), v: tensor(v, shapes.v) },
    });
    return (y as DenseTensor).data as Float32Array;
  };
}
