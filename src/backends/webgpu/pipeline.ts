import { FewbitError } from "../../core/errors.js";
import type { WebGpuDevice } from "./device.js";
import type { Binding, Dispatch } from "./kernel.js";

/** The pipeline of a dispatch; a device builds each text once. Throws `shader/compile` with the compiler's messages. */
export function pipelineOf({ gpu, pipelines }: WebGpuDevice, dispatch: Dispatch): Promise<GPUComputePipeline> {
  const key = `${dispatch.bindings.map((binding) => binding.access).join()}\n${dispatch.wgsl}`;
  let pipeline = pipelines.get(key);
  if (pipeline === undefined) {
    pipeline = compile(gpu, dispatch);
    pipelines.set(key, pipeline);
    pipeline.catch(() => pipelines.delete(key));
  }
  return pipeline;
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
