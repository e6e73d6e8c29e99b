import type { Scope } from "../../core/dispose.js";
import { BYTES, viewAs } from "../../core/dtype.js";
import { FewbitError, throwIfAborted } from "../../core/errors.js";
import { sizeOf } from "../../core/shape.js";
import type { Symbols } from "../../ir/evaluate.js";
import { concreteShape, type Graph, type Value } from "../../ir/graph.js";
import { shapeRows } from "../../ir/ops.js";
import { type HostTensor, isDense } from "../../ir/tensor.js";
import { bucketFor, type Plan } from "../../plan/plan.js";
import { BoundStep } from "../../plan/step.js";
import { type Executable, GUARD_WORD, type LoadOptions, type ShaderText, type WeightSource } from "../backend.js";
import { ProgramBuffers } from "./buffers.js";
import type { WebGpuDevice } from "./device.js";
import { BuildContext, type Dispatch, type WebGpuKernel } from "./kernel.js";
import { layoutWords, type StoredLayout, storedLayout, tensorFromWords, USAGE } from "./layout.js";
import { pipelineOf } from "./pipeline.js";
import { uploadWeights, wholeWords } from "./upload.js";

interface Ready {
  readonly step: number;
  readonly dispatch: Dispatch;
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly workgroups: Dispatch["workgroups"];
}

/** A plan on a WebGPU device: prebuilt pipelines and bind groups, replayed in one compute pass a run. */
export class WebGpuExecutable implements Executable {
  readonly graph: Graph;
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
      await uploadWeights(executable.#buffers, plan, dispatches.flat(2), weights, options);
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
    const value = this.#named(name);
    const { type } = value;
    const capacity = sizeOf(concreteShape(type.shape, this.graph.symbols));
    if (
      isDense(tensor) !== (type.kind === "dense") ||
      (isDense(tensor) && type.kind === "dense" && tensor.dtype !== type.dtype)
    ) {
      throw new FewbitError("dtype/mismatch", {
        what: name,
        got: isDense(tensor) ? tensor.dtype : tensor.format.name,
        expected: type.kind === "dense" ? type.dtype : type.format.name,
      });
    }
    if (sizeOf(tensor.shape) > capacity) {
      throw new FewbitError("shape/mismatch", {
        what: name,
        got: tensor.shape,
        expected: `at most ${capacity} elements`,
      });
    }
    const bytes = isDense(tensor)
      ? wholeWords(tensor.data)
      : layoutWords(tensor, this.#layout(value, this.graph.symbols)).words;
    this.#device.gpu.queue.writeBuffer(this.#buffers.get({ kind: "value", id: value.id }), 0, bytes);
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
    const id =
      this.graph.outputs[name] ?? this.graph.values.find((value) => value.role === "state" && value.name === name)?.id;
    if (id === undefined)
      throw new FewbitError("graph/invalid", { where: name, reason: "it is neither an output nor a state" });
    const place = this.#plan.memory.placement.get(id);
    const value = this.graph.values[id] as Value;
    const { type } = value;
    // States are whole; what a run made has the shape of that run.
    const shape = concreteShape(
      type.shape,
      value.role === "value" ? (this.#last ?? this.graph.symbols) : this.graph.symbols,
    );
    const buffer = this.#buffers.get({ kind: "value", id });
    if (type.kind === "format") {
      const layout = this.#layout(value, this.graph.symbols);
      const words = new Uint32Array((await this.#buffers.read(buffer, layout.bytes)).buffer);
      this.#device.check();
      return tensorFromWords(layout, words, shapeRows(shape)[0]);
    }
    // A value may be columns of a wider one.
    const { dtype } = type;
    const [rows, width] = shapeRows(shape);
    // The stride of a one-dimensional value updated in place is a symbol's name.
    const stride = Number.isInteger(place?.stride) ? (place?.stride as number) : width;
    const bytes = Math.ceil((rows * stride * BYTES[dtype]) / 4) * 4;
    const data = await this.#buffers.read(buffer, bytes);
    this.#device.check();
    if (stride === width) return { dtype, shape, data: viewAs(dtype, data.subarray(0, rows * width * BYTES[dtype])) };
    const part = new Uint8Array(rows * width * BYTES[dtype]);
    for (let row = 0; row < rows; row++) {
      const begin = (row * stride + (place?.column ?? 0)) * BYTES[dtype];
      part.set(data.subarray(begin, begin + width * BYTES[dtype]), row * width * BYTES[dtype]);
    }
    return { dtype, shape, data: viewAs(dtype, part) };
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
    const { slotOf, placement } = this.#plan.memory;
    const found: string[] = [];
    for (const [name, id] of Object.entries(this.graph.outputs)) {
      const { type, role } = this.graph.values[id] as Value;
      const alone = [...slotOf.values()].filter((slot) => slot === slotOf.get(id)).length === 1;
      if (type.kind !== "dense" || role !== "value" || !alone || placement.has(id)) continue;
      const [all, used] = [this.graph.symbols, this.#last ?? this.graph.symbols].map((symbols) =>
        Math.ceil((sizeOf(concreteShape(type.shape, symbols)) * BYTES[type.dtype]) / 4),
      ) as [number, number];
      if (used === all) continue;
      const bytes = await this.#buffers.read(this.#buffers.get({ kind: "value", id }), all * 4);
      const rest = new Uint32Array(bytes.buffer, used * 4, all - used);
      if (rest.some((word) => word !== GUARD_WORD)) found.push(`the rows of ${name} that this run has`);
    }
    return found;
  }

  [Symbol.dispose](): void {
    this.#scope.dispose();
  }

  #layout({ type, name }: Value, symbols: Symbols): StoredLayout {
    if (type.kind !== "format") throw new FewbitError("graph/invalid", { where: name, reason: "it is dense" });
    return storedLayout(type.format, shapeRows(concreteShape(type.shape, symbols)));
  }

  #writeSymbols(symbols: Symbols): void {
    for (const [i, name] of Object.keys(this.graph.symbols).entries()) this.#words[i] = symbols[name] as number;
    this.#device.gpu.queue.writeBuffer(this.#params, 0, this.#words);
  }

  #check(): void {
    this.#scope.assertLive();
    this.#device.check();
  }

  #named(name: string): Value {
    const value = this.graph.values.find(
      (candidate) => candidate.name === name && (candidate.role === "input" || candidate.role === "state"),
    );
    if (value === undefined)
      throw new FewbitError("graph/invalid", { where: name, reason: "it is neither an input nor a state" });
    return value;
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
