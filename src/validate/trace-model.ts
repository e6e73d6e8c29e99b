import type { BackendDevice } from "../backends/backend.js";
import { packSettings } from "../ir/sample.js";
import type { HostTensor } from "../ir/tensor.js";
import { PAST, TOKENS } from "../models/decoder.js";
import type { LoadModelOptions } from "../models/load.js";
import { loadModel, type Model } from "../models/model.js";
import { type BackendName, Device, openBackend } from "../runtime/device.js";
import { disposeTap, type Tap, type TapFaults, type TracedStep, type TraceRun, tap, traceSteps } from "./trace.js";

/** A model on one backend with its steps tapped. */
export interface TappedModel extends AsyncDisposable {
  readonly model: Model;
  readonly tap: Tap;
}

/** Loads a model as `loadModel` does, with taps. */
export async function loadTapped(
  backend: BackendName,
  folder: Parameters<typeof loadModel>[0],
  options: Omit<LoadModelOptions, "device">,
  faults: TapFaults = {},
): Promise<TappedModel> {
  const inner = await openBackend(backend, options.signal && { signal: options.signal });
  let tapped: Tap | null = null;
  const { info, capabilities, kernels, lost } = inner;
  const outer: BackendDevice = {
    info,
    capabilities,
    kernels,
    lost,
    get bytes() {
      return inner.bytes;
    },
    load: async (plan, weights, load) => {
      tapped = await tap(inner, plan, weights, load, faults);
      return tapped.tapped;
    },
    [Symbol.asyncDispose]: () => inner[Symbol.asyncDispose](),
  };
  try {
    const model = await loadModel(folder, { ...options, device: new Device(outer) });
    const made = tapped as unknown as Tap;
    return {
      model,
      tap: made,
      [Symbol.asyncDispose]: async () => {
        disposeTap(made);
        await inner[Symbol.asyncDispose]();
      },
    };
  } catch (error) {
    await inner[Symbol.asyncDispose]();
    throw error;
  }
}

/** The prompt in runs of at most `chunk` tokens (default: in one), then one run for each given token. */
export function decoderRuns(prompt: readonly number[], tokens: readonly number[], chunk = prompt.length): TraceRun[] {
  const settings = (step: number): HostTensor => ({
    dtype: "u32",
    shape: [5],
    data: packSettings({ temperature: 0, topK: 0, topP: 1, seed: 0, step }),
  });
  const ids = (list: readonly number[]): HostTensor => ({
    dtype: "i32",
    shape: [list.length],
    data: Int32Array.from(list),
  });
  const run = (list: readonly number[], past: number, step: number): TraceRun => ({
    symbols: { [TOKENS]: list.length, [PAST]: past },
    inputs: { ids: ids(list), settings: settings(step) },
  });
  const starts = Array.from({ length: Math.ceil(prompt.length / chunk) }, (_, i) => i * chunk);
  return [
    ...starts.map((start) => run(prompt.slice(start, start + chunk), start, 0)),
    ...tokens.map((token, i) => run([token], prompt.length + i, i + 1)),
  ];
}

/** The greedy tokens after a prompt, by the first model: both are traced over these. */
export async function greedyTokens(
  model: Model,
  prompt: readonly number[],
  count: number,
  signal?: AbortSignal,
): Promise<number[]> {
  const tokens: number[] = [];
  if (count === 0) return tokens;
  for await (const { id } of model.generate(prompt, { maxTokens: count, ignoreEos: true, ...(signal && { signal }) }))
    tokens.push(id);
  return tokens;
}

export interface Trace {
  /** Every step of every run on A and B, in order of execution. */
  readonly steps: readonly TracedStep[];
  /** The first step beyond its bound, on either backend. */
  readonly first: TracedStep | null;
}

/** Traces both taps over the same runs. Stops after the first run that has a divergence. */
export async function traceBoth(taps: readonly Tap[], runs: readonly TraceRun[], signal?: AbortSignal): Promise<Trace> {
  const steps: TracedStep[] = [];
  for (const run of runs.keys()) {
    for (const each of taps) {
      for await (const step of traceSteps(each, [runs[run] as TraceRun], signal)) steps.push({ ...step, run });
    }
    const beyond = steps.filter((step) => step.worst > 1);
    const first = beyond.find((step) => step.step >= 0) ?? beyond[0];
    if (first !== undefined) return { steps, first };
  }
  return { steps, first: null };
}
