import { Scope } from "../../core/dispose.js";
import { FewbitError } from "../../core/errors.js";
import type { BackendDevice, Capabilities, DeviceInfo } from "../backend.js";
import { type AdapterOptions, destroyDevice, requestGpu } from "./adapter.js";
import { WebGpuExecutable } from "./executable.js";
import { WEBGPU_KERNELS } from "./kernels/table.js";

/** Features that kernels can use; each is asked for when the adapter has it and the tier allows it. */
const OPTIONAL_FEATURES = [
  "shader-f16",
  "subgroups",
  "timestamp-query",
  "chromium-experimental-subgroup-matrix",
] as const satisfies readonly string[];

/** How much of an adapter to use: `default` takes WebGPU's default limits and no optional feature, `portable` all limits. */
export type Tier = "default" | "portable" | "subgroups" | "f16";

const TIER_FEATURES: Readonly<Record<Tier, readonly string[]>> = {
  default: [],
  portable: [],
  subgroups: ["subgroups", "timestamp-query"],
  f16: OPTIONAL_FEATURES,
};

export interface WebGpuOptions extends AdapterOptions {
  /** The caller's own device. It is used as it is and never destroyed here. */
  readonly device?: GPUDevice;
  /** Default: everything the adapter has. */
  readonly tier?: Tier;
  /** Optional features to leave out all the same, e.g. to find the one that breaks a kernel. */
  readonly without?: readonly string[];
}

/**
 * Opens a WebGPU device. Throws `device/unavailable` when there is none of the kind asked for.
 */
export async function openWebGpu(options: WebGpuOptions = {}): Promise<WebGpuDevice> {
  if (options.device !== undefined) {
    const { adapterInfo } = options.device;
    const info: DeviceInfo = {
      backend: "webgpu",
      name: adapterInfo?.device || adapterInfo?.description || "injected device",
      kind: "injected",
      reason: "the caller gave this GPUDevice",
      detail: {},
    };
    return new WebGpuDevice(options.device, info, [options.device], false, options.device.adapterInfo);
  }
  const choice = await requestGpu(options);
  const tier = options.tier ?? "f16";
  const features = TIER_FEATURES[tier].filter(
    (feature) => choice.adapter.features.has(feature) && !options.without?.includes(feature),
  );
  let device: GPUDevice;
  try {
    device = await choice.adapter.requestDevice({
      requiredFeatures: features as GPUFeatureName[],
      requiredLimits: tier === "default" ? {} : usefulLimits(choice.adapter.limits),
    });
  } catch (cause) {
    throw new FewbitError(
      "device/unavailable",
      { backend: "webgpu", reason: `${choice.name} gave no device` },
      { cause },
    );
  }
  const detail = { ...choice.info, tier, features: features.join(" ") || "none" };
  const info: DeviceInfo = { backend: "webgpu", name: choice.name, kind: choice.kind, reason: choice.reason, detail };
  return new WebGpuDevice(device, info, [choice.gpu, choice.adapter], true, choice.adapter.info);
}

/** The limits kernels profit from, at the adapter's largest. */
function usefulLimits(limits: GPUSupportedLimits): Record<string, number> {
  const names = [
    "maxBufferSize",
    "maxStorageBufferBindingSize",
    "maxComputeWorkgroupStorageSize",
    "maxComputeInvocationsPerWorkgroup",
    "maxComputeWorkgroupSizeX",
    "maxStorageBuffersPerShaderStage",
  ] as const;
  return Object.fromEntries(names.map((name) => [name, limits[name]]));
}

export class WebGpuDevice implements BackendDevice {
  readonly info: DeviceInfo;
  readonly capabilities: Capabilities;
  readonly kernels = WEBGPU_KERNELS;
  readonly lost: Promise<string>;
  readonly gpu: GPUDevice;
  readonly #scope = new Scope("webgpu device");
  readonly #counter = { bytes: 0 };
  readonly #owned: boolean;
  /** Dawn's objects must outlive what is pending on them. */
  readonly keep: readonly unknown[];
  readonly pipelines = new Map<string, Promise<GPUComputePipeline>>();
  #error: FewbitError | null = null;
  #lost: string | null = null;

  constructor(
    gpu: GPUDevice,
    info: DeviceInfo,
    keep: readonly unknown[],
    owned: boolean,
    adapter: GPUAdapterInfo | undefined,
  ) {
    this.gpu = gpu;
    this.info = info;
    this.keep = keep;
    this.#owned = owned;
    this.capabilities = capabilitiesOf(gpu, adapter, info.kind === "software");
    this.lost = gpu.lost.then((lost) => {
      this.#lost = lost.message || lost.reason || "unknown reason";
      return this.#lost;
    });
    gpu.addEventListener("uncapturederror", (event) => {
      this.#error ??= new FewbitError("device/error", { operation: "a queued command", reason: event.error.message });
    });
  }

  get bytes(): number {
    return this.#counter.bytes;
  }

  /** Throws `object/disposed`, `device/lost`, or the first error the device reported since the last check. */
  check(): void {
    this.#scope.assertLive();
    if (this.#lost !== null) throw new FewbitError("device/lost", { reason: this.#lost });
    const error = this.#error;
    this.#error = null;
    if (error !== null) throw error;
  }

  /**
   * Why something on the device failed: the loss of the device where it comes to be known, else `error`. A browser rejects what
   * is pending on a device before it says that the device is lost.
   */
  async reasonOf(error: unknown): Promise<unknown> {
    if (this.#lost === null) await Promise.race([this.lost, new Promise((resolve) => setTimeout(resolve, LOSS_MS))]);
    return this.#lost === null ? error : new FewbitError("device/lost", { reason: this.#lost }, { cause: error });
  }

  /** A buffer whose bytes are counted until it is disposed with `owner`. */
  buffer(owner: Scope, label: string, bytes: number, usage: number): GPUBuffer {
    const size = Math.max(16, Math.ceil(bytes / 16) * 16);
    const buffer = this.gpu.createBuffer({ label, size, usage });
    this.#counter.bytes += size;
    owner.add({
      [Symbol.dispose]: () => {
        buffer.destroy();
        this.#counter.bytes -= size;
      },
    });
    return buffer;
  }

  async load(...[plan, weights, options]: Parameters<BackendDevice["load"]>): Promise<WebGpuExecutable> {
    this.check();
    try {
      return await WebGpuExecutable.load(this, new Scope("program", this.#scope), plan, weights, options);
    } catch (error) {
      // A build that fails on a device that is gone is not the fault of its shaders.
      throw fromDevice(error) ? await this.reasonOf(error) : error;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#scope.disposed) return;
    this.#scope.dispose();
    await Promise.allSettled(this.pipelines.values());
    if (this.#owned) await destroyDevice(this.gpu);
  }
}

/** How long the loss of a device may come after what it caused. */
const LOSS_MS = 1000;

/** Whether the device, rather than the caller, may be the cause. */
function fromDevice(error: unknown): boolean {
  return !(error instanceof FewbitError) || error.code === "device/error" || error.code === "shader/compile";
}

/** The matrix unit's shapes as feature names, e.g. `subgroup-matrix-f16-f32-16x16x16` (component, result, MxNxK). */
function matrixShapes(gpu: GPUDevice, adapter: GPUAdapterInfo | undefined): string[] {
  type Shape = { componentType: string; resultComponentType: string; M: number; N: number; K: number };
  const configs = (adapter as { subgroupMatrixConfigs?: Iterable<Shape> } | undefined)?.subgroupMatrixConfigs ?? [];
  if (!gpu.features.has("chromium-experimental-subgroup-matrix" as GPUFeatureName)) return [];
  return [...configs].map((c) => `subgroup-matrix-${c.componentType}-${c.resultComponentType}-${c.M}x${c.N}x${c.K}`);
}

function capabilitiesOf(gpu: GPUDevice, adapter: GPUAdapterInfo | undefined, software: boolean): Capabilities {
  const { limits } = gpu;
  const info = adapter as { subgroupMinSize?: number; subgroupMaxSize?: number } | undefined;
  const subgroups = gpu.features.has("subgroups");
  return {
    features: new Set([...gpu.features, ...matrixShapes(gpu, adapter)]),
    maxBinding: limits.maxStorageBufferBindingSize,
    maxBuffer: limits.maxBufferSize,
    workgroupMemory: limits.maxComputeWorkgroupStorageSize,
    maxInvocations: limits.maxComputeInvocationsPerWorkgroup,
    maxWorkgroupsPerDimension: limits.maxComputeWorkgroupsPerDimension,
    maxStorageBuffers: limits.maxStorageBuffersPerShaderStage,
    subgroupSize: subgroups ? [info?.subgroupMinSize ?? 4, info?.subgroupMaxSize ?? 128] : [0, 0],
    // WebGPU tells no speeds. These rank kernels against each other; the ratio matters, not the figures.
    bandwidth: software ? 8e9 : 1e12,
    flops: software ? 2e10 : 2e13,
    dispatchSeconds: software ? 2e-5 : 2e-6,
  };
}
