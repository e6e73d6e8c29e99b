import type { Format } from "../formats/format.js";
import { type QuantizedTensor, tensorBytes } from "../formats/tensor.js";
import { dense, GraphBuilder, stored } from "../ir/graph.js";
import type { Device } from "../runtime/device.js";

/** Seconds that a burst of runs should take at least: far above what a clock and a readback vary by. */
const BURST = 0.01;
const MAX_RUNS = 4096;
const SAMPLES = 3;

/** Bytes of weights that one run should read: more than a cache holds, as a model's layers do between two tokens. */
const COLD_BYTES = 2 ** 27;

/**
 * Seconds of one linear [N, K] for one token on a device, its activation quantized when a format is given. One run is several equal
 * linears with weights of their own, so that neither enqueueing it nor a cache that holds one of them is what is timed. Bursts
 * are doubled until they are long enough; the result is the median of the differences between long and short ones, which have
 * their readback in common.
 */
export async function timeLinear(device: Device, weight: QuantizedTensor, activation: Format | null): Promise<number> {
  const [n, k] = weight.shape as readonly [number, number];
  const copies = Math.min(16, Math.max(4, Math.ceil(COLD_BYTES / tensorBytes(weight))));
  const indices = Array.from({ length: copies }, (_, i) => i);
  const g = new GraphBuilder({ T: 1 });
  for (const i of indices) {
    // Each has an input of its own: linears of one input may be run as one.
    const x = g.input(`x${i}`, dense("f32", ["T", k]));
    const input = activation === null ? x : g.one("quantize", [x], { format: activation }, `quantized${i}`);
    g.output(`y${i}`, g.one("linear", [input, g.weight(`w${i}`, stored(weight.format, [n, k]))], {}, `linear${i}`));
  }
  using program = await device.compile(g.build(), { weights: () => weight, buckets: [{ T: 1 }] });
  const { executable } = program;
  const data = Float32Array.from({ length: k }, (_, i) => Math.sin(i));
  for (const i of indices) executable.write(`x${i}`, { dtype: "f32", shape: [1, k], data });
  const burst = async (runs: number): Promise<number> => {
    const start = performance.now();
    for (let i = 0; i < runs; i++) executable.submit({ T: 1 });
    await executable.read("y0");
    return (performance.now() - start) / 1000;
  };
  let runs = 1;
  while ((await burst(runs)) < BURST && runs < MAX_RUNS) runs *= 2;
  const seconds: number[] = [];
  for (let i = 0; i < SAMPLES; i++) seconds.push((await burst(2 * runs)) - (await burst(runs)));
  const median = seconds.sort((a, b) => a - b)[SAMPLES >> 1] as number;
  return Math.max(median, 0) / (runs * copies);
}
