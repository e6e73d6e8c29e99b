import { FewbitError, throwIfAborted } from "../../core/errors.js";

/** Which adapter a caller wants. `auto` takes a hardware GPU and says so when it had to take a software one. */
export type AdapterPreference = "auto" | "hardware" | "software";

export interface AdapterOptions {
  /** The caller's own GPU object (`navigator.gpu`, or a Dawn instance): nothing else is looked at. */
  gpu?: GPU;
  adapter?: AdapterPreference;
  /** Features the adapter must have; one without them is passed over, with the reason in `tried`. */
  features?: readonly GPUFeatureName[];
  signal?: AbortSignal;
}

export interface AdapterChoice {
  readonly gpu: GPU;
  /** A fresh adapter. WebGPU lets an adapter make one device: ask again for a second device. */
  readonly adapter: GPUAdapter;
  readonly name: string;
  readonly kind: "hardware" | "software" | "injected";
  /** One sentence: what was chosen and why. */
  readonly reason: string;
  readonly info: {
    readonly vendor: string;
    readonly architecture: string;
    readonly device: string;
    readonly description: string;
  };
  /** What was looked at before and given up, in words. */
  readonly tried: readonly string[];
}

/** A place adapters come from: a GPU object, or the reason there is none. */
export type GpuSource =
  | { readonly label: string; readonly gpu: GPU }
  | { readonly label: string; readonly gpu: null; readonly reason: string };

interface Found {
  readonly source: { readonly label: string; readonly gpu: GPU };
  readonly adapter: GPUAdapter;
  readonly software: boolean;
}

/**
 * Chooses a WebGPU adapter: the injected GPU's, else the browser's, else in Node Dawn's (a real GPU first; then, unless
 * hardware is demanded, SwiftShader from the npm package `@sparticuz/chromium`).
 * @throws FewbitError `device/unavailable`, `operation/aborted`
 */
export async function requestGpu(options: AdapterOptions = {}): Promise<AdapterChoice> {
  const preference = options.adapter ?? "auto";
  const tried: string[] = [];
  for (const open of sources(options.gpu, preference)) {
    throwIfAborted(options.signal, "requesting a GPU adapter");
    const source = await open();
    throwIfAborted(options.signal, "requesting a GPU adapter");
    if (source.gpu === null) {
      tried.push(`${source.label}: ${source.reason}`);
      continue;
    }
    const found = await findAdapter(source, preference, options.features ?? [], tried);
    if (found) return describe(found, preference, options.gpu !== undefined, tried);
  }
  throw new FewbitError(
    "device/unavailable",
    { backend: "webgpu", reason: tried.join("; ") },
    { hint: hintFor(preference, options) },
  );
}

/**
 * The right end for a device that fewbit made. A browser needs only `destroy()`; in Node, waiting for `lost` lets Dawn
 * reject what is still pending before the process goes on to exit.
 */
export async function destroyDevice(device: GPUDevice): Promise<void> {
  device.destroy();
  await device.lost;
}

/** The sources in the order they are looked at; a later one is opened only when an earlier one gave no adapter. */
function sources(injected: GPU | undefined, preference: AdapterPreference): (() => Promise<GpuSource>)[] {
  if (injected) return [async () => ({ label: "injected GPU", gpu: injected })];
  const gpu = (globalThis as { navigator?: { gpu?: GPU } }).navigator?.gpu;
  if (gpu) return [async () => ({ label: "navigator.gpu", gpu })];
  if (!inNode()) {
    return [
      async () => ({
        label: "navigator.gpu",
        gpu: null,
        reason: "this browser or page has no WebGPU (it needs a secure context)",
      }),
    ];
  }
  const system = async () => (await import("./node.js")).systemGpu();
  const swiftShader = async () => (await import("./node.js")).swiftShaderGpu();
  return preference === "hardware" ? [system] : [system, swiftShader];
}

async function findAdapter(
  source: Found["source"],
  preference: AdapterPreference,
  features: readonly GPUFeatureName[],
  tried: string[],
): Promise<Found | null> {
  let seen = false;
  for (const request of requests(preference)) {
    const adapter = await source.gpu.requestAdapter(request);
    if (!adapter) continue;
    seen = true;
    const software = isSoftware(adapter);
    const missing = features.filter((feature) => !adapter.features.has(feature));
    if (software && preference === "hardware") tried.push(`${source.label}: ${nameOf(adapter)} runs on the CPU`);
    else if (!software && preference === "software") tried.push(`${source.label}: ${nameOf(adapter)} is hardware`);
    else if (missing.length > 0) tried.push(`${source.label}: ${nameOf(adapter)} lacks ${missing.join(", ")}`);
    else return { source, adapter, software };
  }
  if (!seen) tried.push(`${source.label}: it offers no ${preference === "auto" ? "" : `${preference} `}adapter`);
  return null;
}

function requests(preference: AdapterPreference): GPURequestAdapterOptions[] {
  const fast: GPURequestAdapterOptions = { powerPreference: "high-performance" };
  const fallback: GPURequestAdapterOptions = { forceFallbackAdapter: true };
  if (preference === "hardware") return [fast];
  return preference === "software" ? [fallback] : [fast, fallback];
}

function isSoftware(adapter: GPUAdapter): boolean {
  return adapter.info.isFallbackAdapter || adapter.info.architecture === "swiftshader";
}

function nameOf({ info }: GPUAdapter): string {
  const device = info.device.replace(/[^a-z0-9)]+$/i, "") || [info.vendor, info.architecture].filter(Boolean).join(" ");
  if (!device) return info.description || "unnamed adapter";
  return info.description ? `${device} (${info.description})` : device;
}

function describe(
  { source, adapter, software }: Found,
  preference: AdapterPreference,
  injected: boolean,
  tried: readonly string[],
): AdapterChoice {
  const { vendor, architecture, device, description } = adapter.info;
  const name = nameOf(adapter);
  const what = `${name} from ${source.label}`;
  const kind = injected ? "injected" : software ? "software" : "hardware";
  const reason = {
    injected: `${name} comes from the GPU object that the caller gave.`,
    hardware: `${what} is a hardware GPU.`,
    software:
      preference === "software"
        ? `${what} runs on the CPU, as was asked.`
        : `${what} runs on the CPU because no hardware GPU was found${tried.length > 0 ? ` (${tried.join("; ")})` : ""}.`,
  }[kind];
  return {
    gpu: source.gpu,
    adapter,
    name,
    kind,
    reason,
    info: { vendor, architecture, device, description },
    tried: [...tried],
  };
}

function inNode(): boolean {
  const { process } = globalThis as { process?: { versions?: { node?: string } } };
  return process?.versions?.node !== undefined;
}

function hintFor(preference: AdapterPreference, options: AdapterOptions): string {
  if (options.features?.length) return "ask for fewer features, or use another GPU";
  if (options.gpu) return "check that the GPU object given has an adapter of the kind asked for";
  if (!inNode()) return "use a browser that has WebGPU switched on, and a page from https or localhost";
  if (preference === "hardware") {
    return 'install the GPU\'s driver (on Linux its Vulkan driver file, named by VK_DRIVER_FILES), or ask for adapter "auto"';
  }
  return "install a GPU driver, or on Linux x64 the software adapter: npm install --save-dev @sparticuz/chromium@143.0.4";
}
