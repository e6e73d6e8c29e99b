import { layoutWords } from "../../src/backends/stored-layout.js";
import type { WebGpuDevice } from "../../src/backends/webgpu/device.js";
import { BuildContext, type Dispatch, type WebGpuKernel } from "../../src/backends/webgpu/kernel.js";
import { WEBGPU_KERNELS } from "../../src/backends/webgpu/kernels/table.js";
import { sizeOf } from "../../src/core/shape.js";
import type { Format } from "../../src/formats/format.js";
import type { QuantizedTensor } from "../../src/formats/tensor.js";
import { type Dim, dense, type Graph, GraphBuilder, stored, type TensorType } from "../../src/ir/graph.js";
import type { SdpaAttrs, SdpaExtra } from "../../src/ir/ops.js";
import { type DenseTensor, type HostTensor, isDense } from "../../src/ir/tensor.js";
import { fuse } from "../../src/plan/fuse.js";
import { planMemory } from "../../src/plan/memory.js";
import { BoundStep } from "../../src/plan/step.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { randomWords } from "./codecs.js";

/** What one pipeline can run: everything but the lengths. */
export interface AttentionSetup {
  readonly name: string;
  readonly heads: number;
  readonly kvHeads: number;
  readonly size: number;
  readonly batch?: number;
  /** How q, and how k and v are stored; null: dense float32. */
  readonly q?: Format;
  readonly kv?: Format;
  readonly attrs?: Partial<SdpaAttrs>;
  /** Per batch and head, or one mask for all. */
  readonly mask?: "full" | "shared";
  readonly sinks?: boolean;
  /** Slots of a cache; without it keys are [.., S, D]. */
  readonly capacity?: number;
  /** Slots of a block of a paged cache. */
  readonly page?: number;
  /** The most tokens and keys of a run. */
  readonly most: readonly [tokens: number, keys: number];
}

export type Content = "normal" | "large" | "dominating" | "masked rows";

/** One case: `tokens` queries; `keys` keys, of which a cached case has `keys - tokens` before this step. */
export interface AttentionCase {
  readonly setup: AttentionSetup;
  readonly tokens: number;
  readonly keys: number;
  readonly content: Content;
}

/** An sdpa node alone in a graph with symbols T, and S (keys) or past. */
export function sdpaGraph(setup: AttentionSetup): Graph {
  const { heads, kvHeads, size, batch = 1, capacity, page, most } = setup;
  const cached = capacity !== undefined;
  const g = new GraphBuilder(cached ? { T: most[0], past: capacity } : { T: most[0], S: most[1] });
  const operand = (name: string, format: Format | undefined, shape: readonly Dim[]) =>
    g.input(name, format === undefined ? dense("f32", shape) : stored(format, shape));
  const tokens: Dim = setup.q !== undefined && !cached ? most[0] : "T";
  const keys: Dim = cached ? capacity : setup.kv === undefined ? "S" : most[1];
  const flat = cached && setup.q === undefined;
  const q = operand(
    "q",
    setup.q,
    flat ? [tokens, heads * size] : cached ? [tokens, heads, size] : [batch, heads, tokens, size],
  );
  const pages = page === undefined || capacity === undefined ? 0 : capacity / page;
  const kvShape =
    pages > 0
      ? [pages + 3, kvHeads, page as number, size]
      : cached
        ? [kvHeads, keys, size]
        : [batch, kvHeads, keys, size];
  const inputs = [q, operand("k", setup.kv, kvShape), operand("v", setup.kv, kvShape)];
  const extras: SdpaExtra[] = [];
  const extra = (name: SdpaExtra, type: TensorType) => {
    extras.push(name);
    inputs.push(g.input(name, type));
  };
  if (setup.mask === "shared") extra("mask", dense("f32", [tokens, keys]));
  if (setup.mask === "full") extra("mask", dense("f32", [batch, heads, tokens, keys]));
  if (setup.sinks) extra("sinks", dense("f32", [heads]));
  if (pages > 0) extra("pages", dense("u32", [pages]));
  const attrs: SdpaAttrs = {
    heads,
    kvHeads,
    scale: 1 / Math.sqrt(size),
    causal: false,
    extras,
    ...(cached ? { position: "past" } : {}),
    ...setup.attrs,
  };
  g.output("out", g.one("sdpa", inputs, attrs, "sdpa"));
  return g.build();
}

/** The symbols of a case. */
export function symbolsOf({ setup, tokens, keys }: AttentionCase): Record<string, number> {
  return setup.capacity === undefined ? { T: tokens, S: keys } : { T: tokens, past: keys - tokens };
}

/** Operands of a case, by name, always the same for the same case. */
export function operandsOf(graph: Graph, test: AttentionCase): Map<string, HostTensor> {
  const { content, setup } = test;
  const symbols = symbolsOf(test);
  const word = randomWords(test.tokens * 7919 + test.keys * 31 + setup.heads);
  const uniform = () => word() / 2 ** 32;
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  const gain = content === "large" ? 30 : 1;
  const made = new Map<string, HostTensor>();
  for (const value of graph.values) {
    if (value.role !== "input") continue;
    const { type, name } = value;
    // A stored tensor fills its storage: where its scales lie depends on its rows.
    const extents = type.kind === "format" ? graph.symbols : symbols;
    const shape = type.shape.map((dim) => (typeof dim === "number" ? dim : (extents[dim] as number)));
    const data = Float32Array.from({ length: sizeOf(shape) }, () => normal() * (name === "v" ? 1 : gain));
    if (name === "mask") {
      const keys = shape.at(-1) as number;
      const rows = data.length / keys;
      for (let row = 0; row < rows; row++) {
        const all = content === "masked rows" && row % 3 === 0;
        for (let j = 0; j < keys; j++) {
          if (all) data[row * keys + j] = j % 2 === 0 ? Number.NEGATIVE_INFINITY : -3.4028234663852886e38;
          else if (uniform() < 0.3) data[row * keys + j] = Number.NEGATIVE_INFINITY;
        }
      }
    }
    if (name === "pages") {
      // Every block once, in an order of its own; three blocks of the pool belong to others.
      const pool = shape[0] as number;
      made.set(name, {
        dtype: "u32",
        shape,
        data: Uint32Array.from({ length: pool }, (_, i) => (i * 7 + 2) % (pool + 3)),
      });
      continue;
    }
    if (name === "k" && content === "dominating") {
      const rows = data.length / setup.size;
      for (let row = 0; row < rows; row++) {
        if (row % 37 === 5)
          for (let i = 0; i < setup.size; i++) data[row * setup.size + i] = (data[row * setup.size + i] as number) * 40;
      }
    }
    if (type.kind === "dense") made.set(name, { dtype: "f32", shape, data });
    else made.set(name, quantizeTensor(data, [data.length / setup.size, setup.size], "f32", type.format));
  }
  return made;
}

const GUARD = 0xa5a5a5a5;
const GUARD_BYTES = 256;

export interface AttentionRun {
  readonly out: Float32Array;
  /** Words of guards, and of output rows past this run's, that were changed. */
  readonly damaged: number;
}

/** Runs a step by one kernel of the table, on buffers with guards around everything that it may write. */
export class KernelRunner {
  readonly #device: WebGpuDevice;
  readonly #pipelines = new Map<string, Promise<GPUComputePipeline>>();

  constructor(device: WebGpuDevice) {
    this.#device = device;
  }

  /** Why the kernel cannot take the graph's step, or null. */
  unmet(id: string, graph: Graph, symbols: Readonly<Record<string, number>>): string | null {
    const bound = this.#bound(graph, symbols);
    for (const requirement of this.#kernel(id).requires) {
      const reason = requirement.unmet(bound, this.#device.capabilities);
      if (reason !== null) return reason;
    }
    return null;
  }

  /** `largest` are the symbols that the kernel is built for, `symbols` those of the run; `mutate` may spoil the shaders. */
  async run(
    id: string,
    graph: Graph,
    operands: ReadonlyMap<string, HostTensor>,
    symbols: Readonly<Record<string, number>>,
    largest: Readonly<Record<string, number>>,
    mutate: (wgsl: string) => string = (wgsl) => wgsl,
  ): Promise<AttentionRun> {
    const { gpu } = this.#device;
    const bound = this.#bound(graph, largest);
    const memory = planMemory(graph, [bound.step], graph.symbols);
    const context = new BuildContext(bound, memory, this.#device.capabilities, graph.symbols);
    const kernel = this.#kernel(id);
    const dispatches = kernel.build(context).map((dispatch) => ({ ...dispatch, wgsl: mutate(dispatch.wgsl) }));
    const outId = graph.outputs.out as number;
    const shape = graph.values[outId]?.type.shape as readonly Dim[];
    const elements = (of: Readonly<Record<string, number>>) =>
      sizeOf(shape.map((dim) => (typeof dim === "number" ? dim : (of[dim] as number))));

    gpu.pushErrorScope("validation");
    const owned: GPUBuffer[] = [];
    const upload = (words: Uint32Array, usage = 0x80 | 0x04): GPUBuffer => {
      const buffer = gpu.createBuffer({ size: Math.max(words.byteLength, 16), usage, mappedAtCreation: true });
      new Uint32Array(buffer.getMappedRange()).set(words);
      buffer.unmap();
      owned.push(buffer);
      return buffer;
    };
    const guarded = (bytes: number) => upload(new Uint32Array((bytes + 2 * GUARD_BYTES) / 4).fill(GUARD));
    const inputs = new Map(
      graph.values
        .filter((v) => v.role === "input")
        .map((v) => [v.id, upload(wordsOf(operands.get(v.name) as HostTensor))]),
    );
    const bytes = {
      out: elements(graph.symbols) * 4,
      scratch: kernel.scratch?.(bound, this.#device.capabilities) ?? 0,
    };
    const targets = { out: guarded(bytes.out), scratch: guarded(bytes.scratch) };
    const params = new Uint32Array(16);
    for (const [i, name] of Object.keys(graph.symbols).entries()) params[i] = symbols[name] as number;
    const uniform = upload(params, 0x40);

    const pipelines = await Promise.all(dispatches.map((dispatch) => this.#pipeline(dispatch)));
    const encoder = gpu.createCommandEncoder();
    for (const [i, { bindings, workgroups }] of dispatches.entries()) {
      const pipeline = pipelines[i] as GPUComputePipeline;
      const entries = bindings.map(({ source }, at): GPUBindGroupEntry => {
        const binding = at + 1;
        // The guard behind is bound too: WebGPU keeps writes inside a binding, so it must be there to be hit.
        const target =
          source.kind === "scratch" ? "scratch" : source.kind === "value" && source.id === outId ? "out" : null;
        if (target !== null)
          return {
            binding,
            resource: { buffer: targets[target], offset: GUARD_BYTES, size: bytes[target] + GUARD_BYTES },
          };
        return { binding, resource: { buffer: inputs.get((source as { id: number }).id) as GPUBuffer } };
      });
      const group = gpu.createBindGroup({
        layout: pipeline.getBindGroupLayout(0),
        entries: [{ binding: 0, resource: { buffer: uniform } }, ...entries],
      });
      const [x, y, z] = workgroups(symbols);
      if (x * y * z === 0) continue;
      const pass = encoder.beginComputePass();
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(x, y, z);
      pass.end();
    }
    const read = async (buffer: GPUBuffer): Promise<Uint32Array> => {
      await buffer.mapAsync(1);
      return new Uint32Array(buffer.getMappedRange().slice(0));
    };
    const staging = Object.values(targets).map((buffer) => {
      const copy = gpu.createBuffer({ size: buffer.size, usage: 1 | 8 });
      encoder.copyBufferToBuffer(buffer, 0, copy, 0, buffer.size);
      owned.push(copy);
      return copy;
    });
    gpu.queue.submit([encoder.finish()]);
    const error = await gpu.popErrorScope();
    if (error !== null) throw new Error(error.message);
    const [out, scratch] = (await Promise.all(staging.map(read))) as [Uint32Array, Uint32Array];
    for (const buffer of owned) buffer.destroy();
    const edge = GUARD_BYTES / 4;
    const used = elements(symbols);
    const changed = (words: Uint32Array) => words.filter((word) => word !== GUARD).length;
    const damaged =
      changed(out.subarray(0, edge)) +
      changed(out.subarray(edge + used)) +
      changed(scratch.subarray(0, edge)) +
      changed(scratch.subarray(edge + bytes.scratch / 4));
    return { out: new Float32Array(out.slice(edge, edge + used).buffer), damaged };
  }

  #bound(graph: Graph, symbols: Readonly<Record<string, number>>): BoundStep {
    const [step] = fuse(graph);
    return new BoundStep(graph, step as NonNullable<typeof step>, symbols);
  }

  #kernel(id: string): WebGpuKernel {
    return WEBGPU_KERNELS.find((kernel) => kernel.id === id) as WebGpuKernel;
  }

  #pipeline({ wgsl, bindings }: Dispatch): Promise<GPUComputePipeline> {
    let pipeline = this.#pipelines.get(wgsl);
    if (pipeline === undefined) {
      pipeline = this.#compile(wgsl, bindings);
      this.#pipelines.set(wgsl, pipeline);
    }
    return pipeline;
  }

  async #compile(wgsl: string, bindings: Dispatch["bindings"]): Promise<GPUComputePipeline> {
    const { gpu } = this.#device;
    const module = gpu.createShaderModule({ code: wgsl });
    const errors = (await module.getCompilationInfo()).messages.filter((message) => message.type === "error");
    if (errors.length > 0)
      throw new Error(`${errors.map((e) => `${e.lineNum}:${e.linePos} ${e.message}`).join("\n")}\n${wgsl}`);
    const entry = (binding: number, type: GPUBufferBindingType) => ({ binding, visibility: 4, buffer: { type } });
    const types = bindings.map(
      ({ access }): GPUBufferBindingType => (access === "read" ? "read-only-storage" : "storage"),
    );
    const layout = gpu.createBindGroupLayout({
      entries: [entry(0, "uniform"), ...types.map((type, i) => entry(i + 1, type))],
    });
    return gpu.createComputePipelineAsync({
      layout: gpu.createPipelineLayout({ bindGroupLayouts: [layout] }),
      compute: { module, entryPoint: "main" },
    });
  }
}

function wordsOf(tensor: HostTensor): Uint32Array {
  if (!isDense(tensor)) return layoutWords(tensor as QuantizedTensor).words;
  const { data } = tensor as DenseTensor;
  return new Uint32Array(data.buffer, data.byteOffset, data.byteLength / 4);
}
