import type { Scope } from "../../core/dispose.js";
import { FewbitError, throwIfAborted } from "../../core/errors.js";
import type { Symbols } from "../../ir/evaluate.js";
import type { Graph } from "../../ir/graph.js";
import type { HostTensor } from "../../ir/tensor.js";
import { bucketFor, type Plan } from "../../plan/plan.js";
import { BoundStep } from "../../plan/step.js";
import { type Executable, GUARD_WORD, type LoadOptions, type ShaderText, type WeightSource } from "../backend.js";
import { decodeRead, encodeWrite, partlyUsedOutputs } from "../transfer.js";
import { loadWeights } from "../weights.js";
import { ProgramBuffers } from "./buffers.js";
import type { WebGpuDevice } from "./device.js";
import { BuildContext, type Dispatch, type WebGpuKernel } from "./kernel.js";
import { pipelineOf } from "./pipeline.js";
import { USAGE } from "./usage.js";

interface Ready {
  readonly step: number;
  readonly dispatch: Dispatch;
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly workgroups: Dispatch["workgroups"];
}

/** Bytes of weights that may wait, in the implementation's own memory, for the device to take them. */
const PENDING_WRITES = 32 * 2 ** 20;

/** A plan on a WebGPU device: prebuilt pipelines and bind groups, replayed in one compute pass a run. */
export class WebGpuExecutable implements Executable {
  readonly graph: Graph;
  readonly overlaps = true;
  readonly #device: WebGpuDevice;
  readonly #scope: Scope;
  readonly #plan: Plan;
  readonly #buffers: ProgramBuffers;
  readonly #params: GPUBuffer;
  readonly #words = new Uint32Array(16);
  readonly #buckets: Ready[][] = [];
  readonly #options: LoadOptions;
  #scratchBytes = 0;
  #last: Symbols | null = null;
  #submits = 0;
  #dispatches = 0;
  #seconds = 0;

  private constructor(device: WebGpuDevice, scope: Scope, plan: Plan, options: LoadOptions) {
    this.#device = device;
    this.#options = options;
    this.#scope = scope;
    this.#plan = plan;
    this.graph = plan.graph;
    if (Object.keys(plan.graph.symbols).length > 16) {
      throw new FewbitError("graph/invalid", {
        where: "symbols",
        reason: "more than 16 symbols do not fit the uniform block",
      });
    }
    this.#params = device.buffer(scope, "params", 64, USAGE.uniform | USAGE.copyDst);
    this.#buffers = new ProgramBuffers(device, scope, plan, options.guard ?? false);
  }

  static async load(
    device: WebGpuDevice,
    scope: Scope,
    plan: Plan,
    weights: WeightSource,
    options: LoadOptions = {},
  ): Promise<WebGpuExecutable> {
    try {
      const executable = new WebGpuExecutable(device, scope, plan, options);
      device.gpu.pushErrorScope("out-of-memory");
      const dispatches = plan.buckets.map((bucket) => executable.#build(bucket.symbols, bucket.choices));
      if (executable.#scratchBytes > 0)
        executable.#buffers.add({ kind: "scratch" }, "scratch", executable.#scratchBytes);
      const sources = dispatches.flat(2).flatMap(({ bindings }) => bindings.map(({ source }) => source));
      const { maxBinding } = device.capabilities;
      const { queue } = device.gpu;
      let pending = 0;
      await loadWeights(plan, maxBinding, sources, weights, options, async ({ source, label, bytes, parts }) => {
        const buffer = executable.#buffers.obtain(source, label, bytes);
        for (const [at, data] of parts) {
          queue.writeBuffer(buffer, at, data as Uint8Array<ArrayBuffer>);
          pending += data.byteLength;
        }
        if (pending < PENDING_WRITES) return;
        pending = 0;
        // Some implementations hold what is written until something is submitted.
        queue.submit([]);
        await queue.onSubmittedWorkDone();
      });
      for (const steps of dispatches) executable.#buckets.push(await executable.#prepare(steps));
      const error = await device.gpu.popErrorScope();
      if (error !== null) {
        throw new FewbitError("plan/memory", {
          what: `the program (${error.message})`,
          needed: plan.bytes.weights,
          limit: device.capabilities.maxBuffer,
        });
      }
      throwIfAborted(options.signal, "loading a program");
      device.check();
      return executable;
    } catch (error) {
      scope.dispose();
      throw error;
    }
  }

  get statistics() {
    return { submits: this.#submits, dispatches: this.#dispatches, encodeSeconds: this.#seconds };
  }

  write(name: string, tensor: HostTensor): void {
    this.#check();
    const { id, bytes } = encodeWrite(this.graph, name, tensor);
    this.#device.gpu.queue.writeBuffer(this.#buffers.get({ kind: "value", id }), 0, bytes);
  }

  submit(symbols: Symbols): void {
    this.#check();
    const start = performance.now();
    const bucket = this.#buckets[bucketFor(this.#plan, symbols)] as Ready[];
    this.#writeSymbols(symbols);
    const { gpu } = this.#device;
    const encoder = gpu.createCommandEncoder();
    const pass = encoder.beginComputePass();
    for (const { pipeline, group, workgroups } of bucket) {
      const [x, y, z] = workgroups(symbols);
      if (x * y * z === 0) continue;
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(x, y, z);
      this.#dispatches++;
    }
    pass.end();
    gpu.queue.submit([encoder.finish()]);
    this.#last = symbols;
    this.#submits++;
    this.#seconds += (performance.now() - start) / 1000;
  }

  /**
   * Runs once with a timestamp around every dispatch: seconds of each step, in order of the plan. Needs the feature
   * `timestamp-query`; throws `device/unavailable` without it.
   */
  async profile(symbols: Symbols): Promise<number[]> {
    this.#check();
    const { gpu } = this.#device;
    if (!gpu.features.has("timestamp-query")) {
      throw new FewbitError("device/unavailable", { backend: "webgpu", reason: "the device has no timestamp-query" });
    }
    const bucket = this.#buckets[bucketFor(this.#plan, symbols)] as Ready[];
    this.#writeSymbols(symbols);
    const querySet = gpu.createQuerySet({ type: "timestamp", count: 2 * bucket.length });
    const bytes = 16 * bucket.length;
    const resolved = gpu.createBuffer({ size: Math.max(bytes, 16), usage: 0x200 | USAGE.copySrc });
    const encoder = gpu.createCommandEncoder();
    for (const [i, { pipeline, group, workgroups }] of bucket.entries()) {
      const timestampWrites = { querySet, beginningOfPassWriteIndex: 2 * i, endOfPassWriteIndex: 2 * i + 1 };
      const pass = encoder.beginComputePass({ timestampWrites });
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(...workgroups(symbols));
      pass.end();
    }
    encoder.resolveQuerySet(querySet, 0, 2 * bucket.length, resolved, 0);
    gpu.queue.submit([encoder.finish()]);
    const times = new BigUint64Array((await this.#buffers.read(resolved, bytes)).buffer);
    querySet.destroy();
    resolved.destroy();
    const seconds = this.#plan.steps.map(() => 0);
    for (const [i, { step }] of bucket.entries()) {
      seconds[step] =
        (seconds[step] as number) + Number((times[2 * i + 1] as bigint) - (times[2 * i] as bigint)) * 1e-9;
    }
    return seconds;
  }

  async read(name: string): Promise<HostTensor> {
    this.#check();
    const { id, bytes, decode } = decodeRead(this.#plan, name, this.#last ?? this.graph.symbols);
    const data = await this.#buffers.read(this.#buffers.get({ kind: "value", id }), bytes);
    this.#device.check();
    return decode(data);
  }

  shaders(symbols: Symbols): ShaderText[] {
    const bucket = bucketFor(this.#plan, symbols);
    const choices = this.#plan.buckets[bucket]?.choices ?? [];
    return (this.#buckets[bucket] ?? []).map(({ step, dispatch }) => ({
      step,
      kernel: choices[step]?.kernel.id ?? "",
      source: dispatch.wgsl,
    }));
  }

  async damage(): Promise<string[]> {
    this.#check();
    const beyond = await this.#writtenBeyond();
    return [...beyond, ...(await this.#buffers.damage())];
  }

  /** Outputs whose memory is their own and in which the last run wrote to rows that it does not have. */
  async #writtenBeyond(): Promise<string[]> {
    const found: string[] = [];
    for (const { name, id, used, all } of partlyUsedOutputs(this.#plan, this.#last ?? this.graph.symbols)) {
      const bytes = await this.#buffers.read(this.#buffers.get({ kind: "value", id }), all * 4);
      const rest = new Uint32Array(bytes.buffer, used * 4, all - used);
      if (rest.some((word) => word !== GUARD_WORD)) found.push(`the rows of ${name} that this run has`);
    }
    return found;
  }

  [Symbol.dispose](): void {
    this.#scope.dispose();
  }

  #writeSymbols(symbols: Symbols): void {
    for (const [i, name] of Object.keys(this.graph.symbols).entries()) this.#words[i] = symbols[name] as number;
    this.#device.gpu.queue.writeBuffer(this.#params, 0, this.#words);
  }

  #check(): void {
    this.#scope.assertLive();
    this.#device.check();
  }

  #build(symbols: Symbols, choices: Plan["buckets"][number]["choices"]): Dispatch[][] {
    return choices.map((choice, i) => {
      const step = this.#plan.steps[i] as Plan["steps"][number];
      const bound = new BoundStep(this.graph, step, symbols);
      const kernel = choice.kernel as WebGpuKernel;
      const context = new BuildContext(bound, this.#plan.memory, this.#device.capabilities, this.graph.symbols);
      const scratch = kernel.scratch?.(bound, this.#device.capabilities) ?? 0;
      // Steps run one after another, so one scratch buffer of the largest size serves them all.
      this.#scratchBytes = Math.max(this.#scratchBytes, scratch);
      const { rewrite } = this.#options;
      const dispatches = kernel.build(context);
      return rewrite === undefined
        ? dispatches
        : dispatches.map((dispatch) => ({ ...dispatch, wgsl: rewrite(dispatch.wgsl, kernel.id, i) }));
    });
  }

  async #prepare(steps: readonly (readonly Dispatch[])[]): Promise<Ready[]> {
    const { gpu } = this.#device;
    const dispatches = steps.flat();
    const stepOf = steps.flatMap((list, step) => list.map(() => step));
    const pipelines = await Promise.all(dispatches.map((dispatch) => pipelineOf(this.#device, dispatch)));
    return dispatches.map((dispatch, i) => {
      const pipeline = pipelines[i] as GPUComputePipeline;
      const entries = [this.#params, ...dispatch.bindings.map(({ source }) => this.#buffers.get(source))].map(
        (buffer, binding) => ({
          binding,
          // Guard words may reach over the limit; everything else was planned within it.
          resource: this.#options.guard
            ? { buffer, size: Math.min(buffer.size, this.#device.capabilities.maxBinding) }
            : { buffer },
        }),
      );
      const group = gpu.createBindGroup({ label: dispatch.label, layout: pipeline.getBindGroupLayout(0), entries });
      return { step: stepOf[i] as number, dispatch, pipeline, group, workgroups: dispatch.workgroups };
    });
  }
}
