import { afterEach, expect, test, vi } from "vitest";
import type { QuantizedTensor } from "../../src/formats/tensor.js";
import type { Graph } from "../../src/ir/graph.js";
import { timeLinear } from "../../src/models/time-linear.js";
import type { QuantizeConfig } from "../../src/quantize/configs.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import type { Device } from "../../src/runtime/device.js";

afterEach(() => void vi.restoreAllMocks());

/** A device on a clock of its own: a linear takes `linear` seconds there, enqueueing a run `enqueue`, and a readback `readback`. */
function clockwork({ linear, enqueue, readback }: { linear: number; enqueue: number; readback: number }) {
  const time = { host: 0, device: 0 };
  vi.spyOn(performance, "now").mockImplementation(() => time.host * 1000);
  const compile = async (graph: Graph) => {
    const linears = graph.nodes.filter(({ op }) => op === "linear").length;
    const submit = () => {
      time.host += enqueue;
      time.device = Math.max(time.device, time.host) + linears * linear;
    };
    const read = async () => {
      time.host = Math.max(time.host, time.device) + readback;
    };
    return { executable: { write: () => {}, submit, read }, [Symbol.dispose]: () => {} };
  };
  return { compile } as unknown as Device;
}

function weight(name: string): [QuantizedTensor, QuantizeConfig] {
  const config = parseQuantizeName(name) as QuantizeConfig;
  const shape = [64, 64] as const;
  const format = config.weight({ shape, dtype: "f32" });
  if ("refused" in format) throw new Error(format.refused);
  return [quantizeTensor(new Float32Array(64 * 64).fill(0.5), shape, "f32", format), config];
}

test.each(["int4wo-64", "int8dq"])(
  "the time of a linear is the device's, not that of enqueueing or reading: %s",
  async (name) => {
    const [tensor, { activation }] = weight(name);
    // Enqueueing one run takes as long as several linears, reading a result as long as hundreds.
    const device = clockwork({ linear: 3e-6, enqueue: 12e-6, readback: 1e-3 });
    expect(await timeLinear(device, tensor, activation ?? null)).toBeCloseTo(3e-6, 12);
  },
);

test("a device without a queue is timed too: its runs take the host's time", async () => {
  const [tensor] = weight("int8wo");
  const device = clockwork({ linear: 0, enqueue: 0.8, readback: 0 });
  const seconds = await timeLinear(device, tensor, null);
  // One run is at least four linears and at most sixteen.
  expect(seconds).toBeGreaterThanOrEqual(0.8 / 16 - 1e-12);
  expect(seconds).toBeLessThanOrEqual(0.8 / 4 + 1e-12);
});
