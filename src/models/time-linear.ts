import type { Format } from "../formats/format.js";
import { type QuantizedTensor, tensorBytes } from "../formats/tensor.js";
import { dense, GraphBuilder, stored } from "../ir/graph.js";
import type { Device } from "../runtime/device.js";

/** Seconds that a burst of runs should take at least: far above what a clock and a readback vary by. */
const BURST = 0.01;
const MAX_RUNS = 4096;

/** Runs of a long burst for each of a short one. */
const LONG = 3;

/** Bursts are repeated until the two least of a length agree to this share, and so many times at least and at most. */
const AGREE = 0.01;
const MIN_SAMPLES = 3;
const MAX_SAMPLES = 6;

/** Bytes of weights that one run should read: more than a cache holds, as a model's layers do between two tokens. */
const COLD_BYTES = 2 ** 27;

/** Linears of one run: at most so many to read those bytes, and as usual where that is not enough: such weights stay in a cache anyway. */
const COPIES = { least: 4, usual: 16, most: 64 } as const;

/**
 * Seconds of one linear [N, K] for one token on a device, its activation quantized when a format is given. One run is several equal
 * linears with weights of their own, so that neither enqueueing it nor a cache that holds one of them is what is timed. Bursts
 * are doubled until they are long enough; the result is the difference between the least long and the least short one, which have
 * their readback in common. The least, because what disturbs a burst (another process, a clock that rises) only makes it longer.
 */
export async function timeLinear(device: Device, weight: QuantizedTensor, activation: Format | null): Promise<number> {
  const [n, k] = weight.shape as readonly [number, number];
  const cold = Math.ceil(COLD_BYTES / tensorBytes(weight));
  const copies = cold > COPIES.most ? COPIES.usual : Math.max(COPIES.least, cold);
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
  const short = [await burst(runs)];
  const long = [await burst(LONG * runs)];
  const agree = (times: number[]) => {
    const [least, next] = times.sort((a, b) => a - b) as [number, number];
    return next <= least * (1 + AGREE);
  };
  for (let i = 1; i < MAX_SAMPLES && (i < MIN_SAMPLES || !agree(short) || !agree(long)); i++) {
    short.push(await burst(runs));
    long.push(await burst(LONG * runs));
  }
  return Math.max(Math.min(...long) - Math.min(...short), 0) / ((LONG - 1) * runs * copies);
}
