import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Recording, recordDevice } from "../../src/backends/trace/record.js";
import { destroyDevice, requestGpu } from "../../src/backends/webgpu/adapter.js";
import { loadModel } from "../../src/models/model.js";
import { open } from "../../src/runtime/device.js";
import { failure } from "../support/failure.js";
import { collect, load } from "../support/generate.js";

let gpu: GPUDevice;
let recording: Recording;
let keep: unknown;
beforeAll(async () => {
  const { adapter } = await requestGpu();
  keep = adapter;
  gpu = await adapter.requestDevice();
  recording = recordDevice(gpu);
});
afterAll(() => keep && destroyDevice(gpu));

describe.each(["none", "int4wo-64"])("replay of the bundled model, %s", (quantize) => {
  test("a warm generation makes no bind group and no buffer, and few dispatches a layer", {
    timeout: 120_000,
  }, async () => {
    await using device = await open({ device: recording.device });
    using model = await loadModel("models/fewbit-tiny", { device, quantize, context: 64, prefillChunk: 16 });
    await collect(model, "The captain", { maxTokens: 3 });
    recording.reset();
    await collect(model, "The captain", { maxTokens: 9 });
    expect(recording.count("device.createBindGroup")).toBe(0);
    expect(recording.count("device.createBuffer")).toBe(0);
    expect(recording.count("device.createComputePipelineAsync")).toBe(0);
    // Beside its layers a token takes an embedding, the last row, a norm, the logits and a draw.
    const { decodeDispatches, tokens } = model.statistics as NonNullable<typeof model.statistics>;
    const perToken = decodeDispatches / (tokens - 1);
    expect((perToken - 5) / model.config.layers).toBeLessThanOrEqual(8);
    expect(recording.count("pass.dispatchWorkgroups")).toBeGreaterThanOrEqual(decodeDispatches);
  });
});

describe("an injected device", () => {
  test("is never destroyed, and gives every byte back", async () => {
    const device = await open({ device: recording.device });
    expect(device.info.kind).toBe("injected");
    const model = await load(device);
    await collect(model, "once");
    expect(device.bytes).toBeGreaterThan(0);
    model[Symbol.dispose]();
    expect(device.bytes).toBe(0);
    await device[Symbol.asyncDispose]();
    expect(recording.count("device.destroy")).toBe(0);
    await using again = await open({ device: recording.device });
    using other = await load(again);
    expect(await collect(other, "once")).toHaveLength(12);
  });

  test("a hundred sessions leave nothing behind", { timeout: 60_000 }, async () => {
    await using device = await open({ device: recording.device });
    let expected: string | null = null;
    for (let i = 0; i < 100; i++) {
      using model = await load(device, { context: 16 });
      const ids = (await collect(model, [3, 4, 5], { maxTokens: 2 })).map(({ id }) => id).join();
      expected ??= ids;
      expect(ids).toBe(expected);
    }
    expect(device.bytes).toBe(0);
  });

  test("an abort in the middle leaves device and model usable", async () => {
    await using device = await open({ device: recording.device });
    using model = await load(device);
    const expected = await collect(model, "abort");
    const controller = new AbortController();
    const run = async () => {
      for await (const _ of model.generate("abort", { signal: controller.signal, ignoreEos: true })) controller.abort();
    };
    expect((await failure(run())).code).toBe("operation/aborted");
    expect(await collect(model, "abort")).toEqual(expected);
    const aborted = AbortSignal.abort();
    expect((await failure(load(device, { signal: aborted }))).code).toBe("operation/aborted");
    using other = await load(device);
    expect(await collect(other, "abort")).toEqual(expected);
  });
});

test("a lost device is a typed error", async () => {
  const { adapter } = await requestGpu();
  const own = await adapter.requestDevice();
  await using device = await open({ device: own });
  using model = await load(device);
  await collect(model, "lost", { maxTokens: 2 });
  own.destroy();
  await device.lost;
  expect((await failure(collect(model, "lost"))).code).toBe("device/lost");
  expect((await failure(load(device))).code).toBe("device/lost");
});
