import { globals } from "webgpu";
import { destroyDevice, requestGpu } from "../../src/backends/webgpu/adapter.js";

// Browsers define the flag namespaces; in Node they come from Dawn's package.
Object.assign(globalThis, globals);

/** One dispatch of an entry point `main`: the uniform block at binding 0, then the buffers named, from binding 1 on. */
export interface TestDispatch {
  readonly wgsl: string;
  readonly buffers: readonly string[];
  readonly workgroups: readonly [x: number, y: number, z: number];
}

export interface TestGpu {
  readonly name: string;
  readonly device: GPUDevice;
  /**
   * Runs dispatches one after another over the named buffers (their initial words), with `params` in the uniform
   * `struct Params { v: array<vec4<u32>, 4> }`, and returns the words of buffer `read` afterwards.
   * Throws the shader compiler's messages and validation errors.
   */
  run(
    dispatches: readonly TestDispatch[],
    buffers: Readonly<Record<string, Uint32Array>>,
    read: string,
    params?: readonly number[],
  ): Promise<Uint32Array>;
  destroy(): Promise<void>;
}

/** A device with WebGPU's default limits. A test file opens one and destroys it at its end. */
export async function openTestGpu(): Promise<TestGpu> {
  const { adapter, name } = await requestGpu();
  const device = await adapter.requestDevice();
  const pipelines = new Map<string, GPUComputePipeline>();

  const pipelineOf = async (code: string): Promise<GPUComputePipeline> => {
    const known = pipelines.get(code);
    if (known !== undefined) return known;
    const module = device.createShaderModule({ code });
    const errors = (await module.getCompilationInfo()).messages.filter((message) => message.type === "error");
    if (errors.length > 0) throw new Error(errors.map((e) => `${e.lineNum}:${e.linePos} ${e.message}`).join("\n"));
    const entries = [...code.matchAll(/@binding\((\d+)\) var<(uniform|storage, read_write|storage, read)>/g)];
    const types = {
      uniform: "uniform",
      "storage, read": "read-only-storage",
      "storage, read_write": "storage",
    } as const;
    const layout = device.createBindGroupLayout({
      entries: entries.map(([, binding, type]) => ({
        binding: Number(binding),
        visibility: GPUShaderStage.COMPUTE,
        buffer: { type: types[type as keyof typeof types] },
      })),
    });
    const pipeline = await device.createComputePipelineAsync({
      layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
      compute: { module, entryPoint: "main" },
    });
    pipelines.set(code, pipeline);
    return pipeline;
  };

  const upload = (words: Uint32Array, usage: number): GPUBuffer => {
    const buffer = device.createBuffer({ size: Math.max(words.byteLength, 16), usage, mappedAtCreation: true });
    new Uint32Array(buffer.getMappedRange()).set(words);
    buffer.unmap();
    return buffer;
  };

  return {
    name,
    device,
    async run(dispatches, buffers, read, params = []) {
      const compiled = await Promise.all(dispatches.map(({ wgsl }) => pipelineOf(wgsl)));
      device.pushErrorScope("validation");
      const uniform = upload(
        Uint32Array.from({ length: 16 }, (_, i) => params[i] ?? 0),
        GPUBufferUsage.UNIFORM,
      );
      const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC;
      const storage = Object.fromEntries(Object.entries(buffers).map(([key, words]) => [key, upload(words, usage)]));
      const result = storage[read] as GPUBuffer;
      const staging = device.createBuffer({
        size: result.size,
        usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST,
      });
      const encoder = device.createCommandEncoder();
      for (const [i, dispatch] of dispatches.entries()) {
        const pipeline = compiled[i] as GPUComputePipeline;
        const pass = encoder.beginComputePass();
        pass.setPipeline(pipeline);
        const bound = [uniform, ...dispatch.buffers.map((key) => storage[key] as GPUBuffer)];
        const entries = bound.map((buffer, binding) => ({ binding, resource: { buffer } }));
        pass.setBindGroup(0, device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }));
        pass.dispatchWorkgroups(...dispatch.workgroups);
        pass.end();
      }
      encoder.copyBufferToBuffer(result, 0, staging, 0, result.size);
      device.queue.submit([encoder.finish()]);
      const error = await device.popErrorScope();
      if (error !== null) throw new Error(error.message);
      await staging.mapAsync(GPUMapMode.READ);
      const words = new Uint32Array(staging.getMappedRange()).slice(0, (buffers[read] as Uint32Array).length);
      for (const buffer of [uniform, staging, ...Object.values(storage)]) buffer.destroy();
      return words;
    },
    destroy: () => destroyDevice(device),
  };
}

/** Applies the WGSL function `name`, from words to a word, to columns of words of one length. */
export async function mapWords(
  gpu: TestGpu,
  functions: string,
  name: string,
  ...columns: readonly Uint32Array[]
): Promise<Uint32Array> {
  const length = (columns[0] as Uint32Array).length;
  const names = columns.map((_, i) => `in${i}`);
  const wgsl = `${functions}
struct Params { v: array<vec4<u32>, 4> }
@group(0) @binding(0) var<uniform> params: Params;
${names.map((n, i) => `@group(0) @binding(${i + 1}) var<storage, read> ${n}: array<u32>;`).join("\n")}
@group(0) @binding(${names.length + 1}) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let i = id.y * groups.x * 64u + id.x;
  if (i < params.v[0].x) { out[i] = ${name}(${names.map((n) => `${n}[i]`).join(", ")}); }
}`;
  const groups = Math.ceil(length / 64);
  const workgroups: [number, number, number] = groups <= 65535 ? [groups, 1, 1] : [65535, Math.ceil(groups / 65535), 1];
  const buffers = Object.fromEntries(columns.map((words, i) => [`in${i}`, words]));
  const dispatch = { wgsl, buffers: [...names, "out"], workgroups };
  return gpu.run([dispatch], { ...buffers, out: new Uint32Array(length) }, "out", [length]);
}
