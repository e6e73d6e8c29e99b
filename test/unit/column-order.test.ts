import { describe, expect, test } from "vitest";
import { dense, GraphBuilder, stored } from "../../src/ir/graph.js";
import type { DenseTensor } from "../../src/ir/tensor.js";
import { PERMUTATION, permutation } from "../../src/models/column-order.js";
import { open } from "../../src/runtime/device.js";
import { randomWords } from "../support/codecs.js";

const K = 160;

/** Every float32 that WGSL may not flush, of any exponent that leaves products finite. */
function anyFloats(count: number): Float32Array {
  const next = randomWords(3);
  const bits = Uint32Array.from({ length: count }, () => {
    const word = next();
    return (word & 0x807fffff) | ((1 + ((word >>> 23) % 253)) << 23);
  });
  return new Float32Array(bits.buffer);
}

describe("a permutation gives its input in another order, bit for bit", () => {
  for (const backend of ["reference", "webgpu"] as const)
    test(backend, async () => {
      await using device = await open({ prefer: [backend], tier: "default" });
      const next = randomWords(5);
      const keys = Array.from({ length: K }, () => next());
      const order = Uint32Array.from({ length: K }, (_, i) => i).sort(
        (a, b) => (keys[a] as number) - (keys[b] as number),
      );
      for (const rows of [1, 33]) {
        const g = new GraphBuilder({});
        const x = g.input("x", dense("f32", [rows, K]));
        g.output("y", g.one("linear", [x, g.weight("p", stored(PERMUTATION, [K, K]))], {}, "p"));
        using program = await device.compile(g.build(), { weights: () => permutation(order) });
        const data = anyFloats(rows * K);
        program.executable.write("x", { dtype: "f32", shape: [rows, K], data });
        program.executable.submit({});
        const y = ((await program.executable.read("y")) as DenseTensor).data as Float32Array;
        const wanted = data.map((_, at) => data[at - (at % K) + (order[at % K] as number)] as number);
        expect([...y].findIndex((value, i) => value !== wanted[i])).toBe(-1);
      }
    });
});
