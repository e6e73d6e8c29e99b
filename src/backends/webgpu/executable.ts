import { BYTES, type DType, viewAs } from "../../core/dtype.js";
import type { Scope } from "../../core/dispose.js";
import { FewbitError, throwIfAborted } from "../../core/errors.js";
import { sizeOf } from "../../core/shape.js";
import { concatRows, type QuantizedTensor, sliceRows } from "../../formats/tensor.js";
import type { Symbols } from "../../ir/evaluate.js";
import { concreteShape, type Graph, type Value, type ValueId } from "../../ir/graph.js";
import { shapeRows } from "../../ir/ops.js";
import { type HostTensor, isDense } from "../../ir/tensor.js";
import { bucketFor, type Plan } from "../../plan/plan.js";
import { BoundStep } from "../../plan/step.js";
import type { Executable, LoadOptions, WeightSource } from "../backend.js";
import type { WebGpuDevice } from "./device.js";
import { type Binding, BuildContext, type Dispatch, type Source, type WebGpuKernel, weightGroup } from "./kernel.js";
import { layoutWords, storedLayout, tensorFromWords, USAGE } from "./layout.js";

interface Ready {
  readonly step: number;
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly workgroups: Dispatch["workgroups"];
}

const STORAGE = USAGE.storage | USAGE.copyDst | USAGE.copySrc;

/** A plan on a WebGPU device: prebuilt pipelines and bind groups, replayed in one compute pass a run. */
export class WebGpuExecutable implements Executable {
  readonly graph: Graph;
  readonly #device: WebGpuDevice;
  readonly #scope: Scope;
  readonly #plan: Plan;
  readonly #buffers = new Map<string, GPUBuffer>();
  readonly #params: GPUBuffer;
  readonly #words = new Uint32Array(16);
  readonly #buckets: Ready[][] = [];
  readonly #staging = new Map<number, GPUBuffer[]>();
  #submits = 0;
  #dispatches = 0;
  #seconds = 0;

  private constructor(device: WebGpuDevice, scope: Scope, plan: Plan) {
    this.#device = device;
    this.#scope = scope;
    this.#plan = plan;
    this.graph = plan.graph;
    if (Object.keys(plan.graph.symbols).length > 16) {
      throw new FewbitError("graph/invalid", { where: "symbols", reason: "more than 16 symbols do not fit the uniform block" });
    }
    this.#params = device.buffer(scope, "params", 64, USAGE.uniform | USAGE.copyDst);
  }

  static async load(
    device: WebGpuDevice,
    scope: Scope,
    plan: Plan,
    weights: WeightSource,
    options: LoadOptions = {},
  ): Promise<WebGpuExecutable> {
    try {
      const executable = new WebGpuExecutable(device, scope, plan);
      device.gpu.pushErrorScope("out-of-memory");
      executable.#allocate();
      const dispatches = plan.buckets.map((bucket) => executable.#build(bucket.symbols, bucket.choices));
      const all = dispatches.flat(2);
      await executable.#upload(all, weights, options);
      for (const steps of dispatches) executable.#buckets.push(await executable.#prepare(steps));
      const error = await device.gpu.popErrorScope();
      if (error !== null) {
        throw new FewbitError("plan/memory", { what: `the program (${error.message})`, needed: plan.bytes.weights, limit: device.capabilities.maxBuffer });
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
    if (isDense(tensor) !== (type.kind === "dense") || (isDense(tensor) && type.kind === "dense" && tensor.dtype !== type.dtype)) {
      throw new FewbitError("dtype/mismatch", {
        what: name,
        got: isDense(tensor) ? tensor.dtype : tensor.format.name,
        expected: type.kind === "dense" ? type.dtype : type.format.name,
      });
    }
    if (sizeOf(tensor.shape) > capacity) {
      throw new FewbitError("shape/mismatch", { what: name, got: tensor.shape, expected: `at most ${capacity} elements` });
    }
    const bytes = isDense(tensor) ? padded(tensor.data) : layoutWords(tensor).words;
    this.#device.gpu.queue.writeBuffer(this.#buffer({ kind: "value", id: value.id }), 0, bytes);
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
    const times = new BigUint64Array((await this.#readBuffer(resolved, bytes)).buffer);
    querySet.destroy();
    resolved.destroy();
    const seconds = this.#plan.steps.map(() => 0);
    for (const [i, { step }] of bucket.entries()) {
      seconds[step] = (seconds[step] as number) + Number((times[2 * i + 1] as bigint) - (times[2 * i] as bigint)) * 1e-9;
    }
    return seconds;
  }

  async read(name: string): Promise<HostTensor> {
    this.#check();
    const id = this.graph.outputs[name] ?? this.graph.values.find((value) => value.role === "state" && value.name === name)?.id;
    if (id === undefined) throw new FewbitError("graph/invalid", { where: name, reason: "it is neither an output nor a state" });
    const root = this.#plan.memory.placement.get(id)?.root ?? id;
    const { type } = this.graph.values[root] as Value;
    const shape = concreteShape(type.shape, this.graph.symbols);
    const layout = type.kind === "format" ? storedLayout(type.format, shapeRows(shape)) : null;
    const bytes = layout?.bytes ?? Math.ceil((sizeOf(shape) * BYTES[type.kind === "dense" ? type.dtype : "u32"]) / 4) * 4;
    const data = await this.#readBuffer(this.#buffer({ kind: "value", id: root }), bytes);
    this.#device.check();
    if (layout !== null) return tensorFromWords(layout, new Uint32Array(data.buffer), layout.shape[0]);
    const dtype = (type as { dtype: DType }).dtype;
    return { dtype, shape, data: viewAs(dtype, data.subarray(0, sizeOf(shape) * BYTES[dtype])) };
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

  #named(name: string): Value {
    const value = this.graph.values.find((candidate) => candidate.name === name && (candidate.role === "input" || candidate.role === "state"));
    if (value === undefined) throw new FewbitError("graph/invalid", { where: name, reason: "it is neither an input nor a state" });
    return value;
  }

  /** Staging buffers are kept by size, so that reading the same output again makes none. */
  async #readBuffer(source: GPUBuffer, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
    const pool = this.#staging.get(bytes) ?? [];
    this.#staging.set(bytes, pool);
    const staging = pool.pop() ?? this.#device.buffer(this.#scope, "staging", bytes, USAGE.mapRead | USAGE.copyDst);
    const { gpu } = this.#device;
    const encoder = gpu.createCommandEncoder();
    encoder.copyBufferToBuffer(source, 0, staging, 0, bytes);
    gpu.queue.submit([encoder.finish()]);
    try {
      await staging.mapAsync(1, 0, bytes);
    } catch (cause) {
      this.#check();
      throw new FewbitError("device/error", { operation: "reading a buffer", reason: String(cause) }, { cause });
    }
    const data = new Uint8Array(staging.getMappedRange(0, bytes).slice(0));
    staging.unmap();
    pool.push(staging);
    return data;
  }

  #allocate(): void {
    const { slots, slotOf } = this.#plan.memory;
    const made = slots.map((bytes, i) => this.#device.buffer(this.#scope, `slot ${i}`, bytes, STORAGE));
    for (const [id, slot] of slotOf) this.#buffers.set(`value ${id}`, made[slot] as GPUBuffer);
    for (const value of this.graph.values) {
      if (value.role !== "input" && value.role !== "state") continue;
      const shape = concreteShape(value.type.shape, this.graph.symbols);
      const bytes = value.type.kind === "format" ? storedLayout(value.type.format, shapeRows(shape)).bytes : sizeOf(shape) * BYTES[value.type.dtype];
      this.#buffers.set(`value ${value.id}`, this.#device.buffer(this.#scope, value.name, bytes, STORAGE));
    }
  }

  #build(symbols: Symbols, choices: Plan["buckets"][number]["choices"]): Dispatch[][] {
    return choices.map((choice, i) => {
      const step = this.#plan.steps[i] as Plan["steps"][number];
      const bound = new BoundStep(this.graph, step, symbols);
      const kernel = choice.kernel as WebGpuKernel;
      const context = new BuildContext(bound, this.#plan.memory, this.#device.capabilities, this.graph.symbols);
      const scratch = kernel.scratch?.(bound, this.#device.capabilities) ?? 0;
      if (scratch > 0) this.#scratch(scratch);
      return kernel.build(context);
    });
  }

  /** Steps run one after another, so one scratch buffer of the largest size serves them all. */
  #scratchBytes = 0;
  #scratch(bytes: number): void {
    this.#scratchBytes = Math.max(this.#scratchBytes, bytes);
  }

  /** Uploads every weight that a dispatch binds, one at a time, so that the host holds one group at most. */
  async #upload(dispatches: readonly Dispatch[], weights: WeightSource, options: LoadOptions): Promise<void> {
    if (this.#scratchBytes > 0) this.#buffers.set("scratch", this.#device.buffer(this.#scope, "scratch", this.#scratchBytes, STORAGE));
    const sources = new Map<string, Extract<Source, { kind: "weights" | "dense" }>>();
    for (const { source } of dispatches.flatMap((dispatch) => dispatch.bindings)) {
      if (source.kind === "weights" || source.kind === "dense") sources.set(`${source.kind} ${source.ids.join(",")}`, source);
    }
    let done = 0;
    const total = this.#plan.bytes.weights;
    for (const source of sources.values()) {
      throwIfAborted(options.signal, "uploading weights");
      const tensors: HostTensor[] = [];
      for (const id of source.ids) {
        const value = this.graph.values[id] as Value;
        const tensor = await weights(value.name);
        checkWeight(tensor, value);
        tensors.push(tensor);
      }
      done += source.kind === "weights" ? this.#uploadStored(source.ids, tensors) : this.#uploadDense(source.ids, tensors);
      options.onProgress?.(Math.min(done, total), total);
    }
  }

  #uploadStored(ids: readonly ValueId[], tensors: readonly HostTensor[]): number {
    const group = weightGroup(ids.map((id) => [id, (this.graph.values[id] as Value).type]), this.#device.capabilities.maxBinding);
    const whole = concatRows(tensors as QuantizedTensor[]);
    let bytes = 0;
    for (const [slice, { begin, end }] of group.slices.entries()) {
      const { words } = layoutWords(sliceRows(whole, begin, end));
      const buffer = this.#device.buffer(this.#scope, `${ids.map((id) => this.graph.values[id]?.name).join("+")}`, words.byteLength, STORAGE);
      this.#device.gpu.queue.writeBuffer(buffer, 0, words);
      this.#buffers.set(bufferKey({ kind: "weights", ids, slice }), buffer);
      bytes += words.byteLength;
    }
    return bytes;
  }

  #uploadDense(ids: readonly ValueId[], tensors: readonly HostTensor[]): number {
    const parts = tensors.filter(isDense).map((tensor) => padded(tensor.data));
    const bytes = parts.reduce((sum, part) => sum + part.byteLength, 0);
    const buffer = this.#device.buffer(this.#scope, ids.map((id) => this.graph.values[id]?.name).join("+"), bytes, STORAGE);
    let at = 0;
    for (const part of parts) {
      this.#device.gpu.queue.writeBuffer(buffer, at, part);
      at += part.byteLength;
    }
    this.#buffers.set(bufferKey({ kind: "dense", ids }), buffer);
    return bytes;
  }

  async #prepare(steps: readonly (readonly Dispatch[])[]): Promise<Ready[]> {
    const { gpu } = this.#device;
    const dispatches = steps.flat();
    const stepOf = steps.flatMap((list, step) => list.map(() => step));
    const pipelines = await Promise.all(dispatches.map((dispatch) => this.#pipeline(dispatch)));
    return dispatches.map((dispatch, i) => {
      const pipeline = pipelines[i] as GPUComputePipeline;
      const entries = [this.#params, ...dispatch.bindings.map(({ source }) => this.#buffer(source))].map((buffer, binding) => ({
        binding,
        resource: { buffer },
      }));
      const group = gpu.createBindGroup({ label: dispatch.label, layout: pipeline.getBindGroupLayout(0), entries });
      return { step: stepOf[i] as number, pipeline, group, workgroups: dispatch.workgroups };
    });
  }

  #pipeline(dispatch: Dispatch): Promise<GPUComputePipeline> {
    const key = `${dispatch.bindings.map((binding) => binding.access).join()}\n${dispatch.wgsl}`;
    const { pipelines } = this.#device;
    let pipeline = pipelines.get(key);
    if (pipeline === undefined) {
      pipeline = compile(this.#device.gpu, dispatch);
      pipelines.set(key, pipeline);
      pipeline.catch(() => pipelines.delete(key));
    }
    return pipeline;
  }

  #buffer(source: Source): GPUBuffer {
    const root = source.kind === "value" ? (this.#plan.memory.placement.get(source.id)?.root ?? source.id) : 0;
    const buffer = this.#buffers.get(source.kind === "value" ? `value ${root}` : bufferKey(source));
    if (buffer === undefined) throw new FewbitError("graph/invalid", { where: bufferKey(source), reason: "it has no buffer" });
    return buffer;
  }
}

function bufferKey(source: Source): string {
  if (source.kind === "value") return `value ${source.id}`;
  if (source.kind === "weights") return `weights ${source.ids.join(",")} ${source.slice}`;
  return source.kind === "dense" ? `dense ${source.ids.join(",")}` : "scratch";
}

/** Bytes in whole words, as buffer writes need them. */
function padded(data: ArrayBufferView): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
  if (bytes.byteLength % 4 === 0) return bytes;
  const out = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
  out.set(bytes);
  return out;
}

function checkWeight(tensor: HostTensor, value: Value): void {
  const { type, name } = value;
  const got = isDense(tensor) ? tensor.dtype : tensor.format.name;
  const expected = type.kind === "dense" ? type.dtype : type.format.name;
  if (isDense(tensor) !== (type.kind === "dense") || got !== expected) throw new FewbitError("dtype/mismatch", { what: name, got, expected });
  if (tensor.shape.length !== type.shape.length || tensor.shape.some((extent, i) => extent !== type.shape[i])) {
    throw new FewbitError("shape/mismatch", { what: name, got: tensor.shape, expected: `[${type.shape.join(", ")}]` });
  }
}

async function compile(gpu: GPUDevice, { wgsl, bindings, label }: Dispatch): Promise<GPUComputePipeline> {
  const entry = (binding: number, type: GPUBufferBindingType) => ({ binding, visibility: 4, buffer: { type } });
  const storage = ({ access }: Binding): GPUBufferBindingType => (access === "read" ? "read-only-storage" : "storage");
  const layout = gpu.createBindGroupLayout({ entries: [entry(0, "uniform"), ...bindings.map((binding, i) => entry(i + 1, storage(binding)))] });
  gpu.pushErrorScope("validation");
  const module = gpu.createShaderModule({ code: wgsl });
  const pipeline = gpu
    .createComputePipelineAsync({ layout: gpu.createPipelineLayout({ bindGroupLayouts: [layout] }), label, compute: { module, entryPoint: "main" } })
    .catch((cause: unknown) => cause as Error);
  const error = await gpu.popErrorScope();
  const made = await pipeline;
  if (made instanceof Error || error !== null) {
    const { messages } = await module.getCompilationInfo();
    const text = messages.map((message) => `${message.lineNum}:${message.linePos} ${message.message}`).join("\n");
    const reason = text || error?.message || String(made);
    throw new FewbitError("shader/compile", { kernel: label, messages: `${reason}\n${wgsl}` }, { cause: made });
  }
  return made;
}
