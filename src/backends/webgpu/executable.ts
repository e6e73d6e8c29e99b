import { Scope } from "../../core/dispose.js";
import { BYTES, viewAs } from "../../core/dtype.js";
import { FewbitError, throwIfAborted } from "../../core/errors.js";
import { sizeOf } from "../../core/shape.js";
import { concatRows, type QuantizedTensor, sliceRows } from "../../formats/tensor.js";
import type { Symbols } from "../../ir/evaluate.js";
import { concreteShape, type Graph, type Value, type ValueId } from "../../ir/graph.js";
import { shapeRows } from "../../ir/ops.js";
import { type HostTensor, isDense } from "../../ir/tensor.js";
import { bucketFor, type Plan } from "../../plan/plan.js";
import { BoundStep } from "../../plan/step.js";
import { type Executable, GUARD_WORD, type LoadOptions, type ShaderText, type WeightSource } from "../backend.js";
import type { WebGpuDevice } from "./device.js";
import { type Binding, BuildContext, type Dispatch, type Source, type WebGpuKernel, weightGroup } from "./kernel.js";
import { layoutWords, storedLayout, tensorFromWords, USAGE } from "./layout.js";

interface Ready {
  readonly step: number;
  readonly dispatch: Dispatch;
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly workgroups: Dispatch["workgroups"];
}

/** Bytes of guard words after a buffer. */
const GUARD_BYTES = 256;

/** A guarded buffer: its own bytes end at `end`. */
interface Guarded {
  readonly label: string;
  readonly buffer: GPUBuffer;
  readonly end: number;
  readonly activation: boolean;
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
  readonly #options: LoadOptions;
  readonly #guarded: Guarded[] = [];
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
      executable.#allocate();
      const dispatches = plan.buckets.map((bucket) => executable.#build(bucket.symbols, bucket.choices));
      const all = dispatches.flat(2);
      await executable.#upload(all, weights, options);
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
    const { type } = this.graph.values[id] as Value;
    const shape = concreteShape(type.shape, this.graph.symbols);
    const buffer = this.#buffer({ kind: "value", id });
    if (type.kind === "format") {
      const layout = storedLayout(type.format, shapeRows(shape));
      const words = new Uint32Array((await this.#readBuffer(buffer, layout.bytes)).buffer);
      this.#device.check();
      return tensorFromWords(layout, words, layout.shape[0]);
    }
    // A value may be columns of a wider one.
    const { dtype } = type;
    const [rows, width] = shapeRows(shape);
    const stride = place?.stride ?? width;
    const bytes = Math.ceil((rows * stride * BYTES[dtype]) / 4) * 4;
    const data = await this.#readBuffer(buffer, bytes);
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
    const { gpu } = this.#device;
    const words = GUARD_BYTES / 4;
    using scope = new Scope("guards", this.#scope);
    const all = this.#device.buffer(scope, "guards", this.#guarded.length * GUARD_BYTES, STORAGE);
    const encoder = gpu.createCommandEncoder();
    for (const [i, { buffer, end }] of this.#guarded.entries())
      encoder.copyBufferToBuffer(buffer, end, all, i * GUARD_BYTES, GUARD_BYTES);
    gpu.queue.submit([encoder.finish()]);
    const found = new Uint32Array((await this.#readBuffer(all, this.#guarded.length * GUARD_BYTES)).buffer);
    const changed = this.#guarded.filter((_, i) =>
      found.subarray(i * words, (i + 1) * words).some((word) => word !== GUARD_WORD),
    );
    for (const guarded of this.#guarded) if (guarded.activation || changed.includes(guarded)) this.#arm(guarded);
    this.#device.check();
    return changed.map(({ label }) => label);
  }

  [Symbol.dispose](): void {
    this.#scope.dispose();
  }

  /** A storage buffer of this program, guarded where asked. */
  #storage(label: string, bytes: number, activation = false): GPUBuffer {
    if (!this.#options.guard) return this.#device.buffer(this.#scope, label, bytes, STORAGE);
    const end = Math.max(16, Math.ceil(bytes / 16) * 16);
    const buffer = this.#device.buffer(this.#scope, label, end + GUARD_BYTES, STORAGE);
    const guarded = { label, buffer, end, activation };
    this.#guarded.push(guarded);
    this.#arm(guarded);
    return buffer;
  }

  #arm({ buffer, end, activation }: Guarded): void {
    const begin = activation ? 0 : end;
    const words = new Uint32Array((end + GUARD_BYTES - begin) / 4).fill(GUARD_WORD);
    this.#device.gpu.queue.writeBuffer(buffer, begin, words);
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
    const made = slots.map((bytes, i) => this.#storage(`slot ${i}`, bytes, true));
    for (const [id, slot] of slotOf) this.#buffers.set(`value ${id}`, made[slot] as GPUBuffer);
    for (const value of this.graph.values) {
      if (value.role !== "input" && value.role !== "state") continue;
      const shape = concreteShape(value.type.shape, this.graph.symbols);
      const bytes =
        value.type.kind === "format"
          ? storedLayout(value.type.format, shapeRows(shape)).bytes
          : sizeOf(shape) * BYTES[value.type.dtype];
      this.#buffers.set(`value ${value.id}`, this.#storage(value.name, bytes));
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
      const { rewrite } = this.#options;
      const dispatches = kernel.build(context);
      return rewrite === undefined
        ? dispatches
        : dispatches.map((dispatch) => ({ ...dispatch, wgsl: rewrite(dispatch.wgsl, kernel.id, i) }));
    });
  }

  /** Steps run one after another, so one scratch buffer of the largest size serves them all. */
  #scratchBytes = 0;
  #scratch(bytes: number): void {
    this.#scratchBytes = Math.max(this.#scratchBytes, bytes);
  }

  /** Uploads every weight that a dispatch binds, one at a time, so that the host holds one group at most. */
  async #upload(dispatches: readonly Dispatch[], weights: WeightSource, options: LoadOptions): Promise<void> {
    if (this.#scratchBytes > 0) this.#buffers.set("scratch", this.#storage("scratch", this.#scratchBytes));
    const sources = new Map<string, Extract<Source, { kind: "weights" | "dense" }>>();
    for (const { source } of dispatches.flatMap((dispatch) => dispatch.bindings)) {
      if (source.kind === "weights" || source.kind === "dense")
        sources.set(`${source.kind} ${source.ids.join(",")}`, source);
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
      done +=
        source.kind === "weights" ? this.#uploadStored(source.ids, tensors) : this.#uploadDense(source.ids, tensors);
      options.onProgress?.(Math.min(done, total), total);
    }
  }

  #uploadStored(ids: readonly ValueId[], tensors: readonly HostTensor[]): number {
    const group = weightGroup(
      ids.map((id) => [id, (this.graph.values[id] as Value).type]),
      this.#device.capabilities.maxBinding,
    );
    const whole = concatRows(tensors as QuantizedTensor[]);
    let bytes = 0;
    for (const [slice, { begin, end }] of group.slices.entries()) {
      const { words } = layoutWords(sliceRows(whole, begin, end));
      const buffer = this.#storage(ids.map((id) => this.graph.values[id]?.name).join("+"), words.byteLength);
      this.#device.gpu.queue.writeBuffer(buffer, 0, words);
      this.#buffers.set(bufferKey({ kind: "weights", ids, slice }), buffer);
      bytes += words.byteLength;
    }
    return bytes;
  }

  #uploadDense(ids: readonly ValueId[], tensors: readonly HostTensor[]): number {
    const parts = tensors.filter(isDense).map((tensor) => padded(tensor.data));
    const bytes = parts.reduce((sum, part) => sum + part.byteLength, 0);
    const buffer = this.#storage(ids.map((id) => this.graph.values[id]?.name).join("+"), bytes);
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
      const entries = [this.#params, ...dispatch.bindings.map(({ source }) => this.#buffer(source))].map(
        (buffer, binding) => ({
          binding,
          resource: { buffer, size: Math.min(buffer.size, this.#device.capabilities.maxBinding) },
        }),
      );
      const group = gpu.createBindGroup({ label: dispatch.label, layout: pipeline.getBindGroupLayout(0), entries });
      return { step: stepOf[i] as number, dispatch, pipeline, group, workgroups: dispatch.workgroups };
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
    if (buffer === undefined)
      throw new FewbitError("graph/invalid", { where: bufferKey(source), reason: "it has no buffer" });
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
  if (isDense(tensor) !== (type.kind === "dense") || got !== expected)
    throw new FewbitError("dtype/mismatch", { what: name, got, expected });
  if (tensor.shape.length !== type.shape.length || tensor.shape.some((extent, i) => extent !== type.shape[i])) {
    throw new FewbitError("shape/mismatch", { what: name, got: tensor.shape, expected: `[${type.shape.join(", ")}]` });
  }
}

async function compile(gpu: GPUDevice, { wgsl, bindings, label }: Dispatch): Promise<GPUComputePipeline> {
  const entry = (binding: number, type: GPUBufferBindingType) => ({ binding, visibility: 4, buffer: { type } });
  const storage = ({ access }: Binding): GPUBufferBindingType => (access === "read" ? "read-only-storage" : "storage");
  const layout = gpu.createBindGroupLayout({
    entries: [entry(0, "uniform"), ...bindings.map((binding, i) => entry(i + 1, storage(binding)))],
  });
  gpu.pushErrorScope("validation");
  const module = gpu.createShaderModule({ code: wgsl });
  const pipeline = gpu
    .createComputePipelineAsync({
      layout: gpu.createPipelineLayout({ bindGroupLayouts: [layout] }),
      label,
      compute: { module, entryPoint: "main" },
    })
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
