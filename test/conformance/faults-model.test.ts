import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { BackendDevice } from "../../src/backends/backend.js";
import { openReference } from "../../src/backends/reference/device.js";
import { openWebGpu } from "../../src/backends/webgpu/device.js";
import { withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import type { HostTensor } from "../../src/ir/tensor.js";
import { parseConfig, type TensorSpec, tensorSpecs } from "../../src/models/config.js";
import { buildDecoder, ROPE_TABLE, ropeTable } from "../../src/models/decoder.js";
import { makePlan } from "../../src/plan/plan.js";
import { normals, random, randomTensor, seedOf } from "../../src/validate/cases-random.js";
import { faultyStep, MODEL_FAULTS, tapFaults } from "../../src/validate/faults-model.js";
import { disposeTap, type TapFaults, tap } from "../../src/validate/trace.js";
import { decoderRuns, type Trace, traceBoth } from "../../src/validate/trace-model.js";

const config = parseConfig({
  architectures: ["LlamaForCausalLM"],
  vocab_size: 258,
  hidden_size: 64,
  intermediate_size: 128,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  max_position_embeddings: 32,
  rms_norm_eps: 1e-5,
  hidden_act: "silu",
  tie_word_embeddings: true,
});
const int4 = withScale(FORMATS.int4_tinygemm, { block: [1, 32] });
const formatOf = (spec: TensorSpec) => (spec.layer === null ? FORMATS.f32 : int4);
const graph = buildDecoder(config, {
  weightFormat: formatOf,
  activationFormat: () => null,
  kvFormat: FORMATS.f32,
  maxTokens: 16,
  capacity: 32,
  logits: "last",
});
const specs = new Map(tensorSpecs(config).map((spec) => [spec.name, spec]));
const runs = decoderRuns([5, 17, 200, 33, 5, 90], [41]);

function weight(name: string): HostTensor {
  if (name === ROPE_TABLE) return { dtype: "f32", shape: [32, config.headDim], data: ropeTable(config, 32) };
  const spec = specs.get(name) as TensorSpec;
  const seed = seedOf(7, name);
  if (spec.shape.length === 2) return randomTensor(formatOf(spec), spec.shape as [number, number], seed);
  return {
    dtype: "f32",
    shape: spec.shape,
    data: normals(random(seed), spec.shape[0] as number, 0.1).map((x) => 1 + x),
  };
}

let reference: BackendDevice;
let webgpu: BackendDevice;
beforeAll(async () => {
  reference = openReference();
  webgpu = await openWebGpu({ tier: "default" });
});
afterAll(async () => {
  await webgpu?.[Symbol.asyncDispose]();
  await reference?.[Symbol.asyncDispose]();
});

const planOn = (device: BackendDevice) => makePlan(graph, device, { buckets: [{ T: 1 }] });

async function trace(faults?: TapFaults): Promise<Trace> {
  const a = await tap(webgpu, planOn(webgpu), weight, {}, faults);
  const b = await tap(reference, planOn(reference), weight);
  try {
    return await traceBoth([a, b], runs);
  } finally {
    disposeTap(a);
    disposeTap(b);
  }
}

test("a model without faults has no divergence", { timeout: 60_000 }, async () => {
  const { steps, first } = await trace();
  expect(first && { ...first, tensors: undefined }).toBeNull();
  expect(steps.length).toBeGreaterThan(50);
  expect(steps.some((step) => step.worst > 0.001)).toBe(true);
  expect(steps.flatMap((step) => step.outputs).every((range) => range.nonFinite === 0)).toBe(true);
});

test("there are at least 20 model faults", () => {
  expect(MODEL_FAULTS.length).toBeGreaterThanOrEqual(20);
  expect(new Set(MODEL_FAULTS.map(({ id }) => id)).size).toBe(MODEL_FAULTS.length);
});

describe("trace names the step that a fault is in", () => {
  test.each(MODEL_FAULTS.map((fault) => [fault.id, fault] as const))("%s", async (_, fault) => {
    const plan = planOn(webgpu);
    const step = faultyStep(fault, plan.steps, (id) => graph.values[id]?.name ?? "");
    expect(step).toBeGreaterThanOrEqual(0);
    const faults = tapFaults(fault, step);
    const { first } = await trace(faults);
    expect(faults.changes()).toBeGreaterThan(0);
    expect(first).toMatchObject({ backend: "webgpu", step });
    expect(first?.tensors?.size).toBeGreaterThan(1);
  });
});
