import { FewbitError } from "../../core/errors.js";
import type { KernelRow } from "../../plan/select.js";
import type { BackendDevice, Capabilities } from "../backend.js";

export interface TraceOptions {
  /** What the imagined device can do. */
  readonly capabilities: Capabilities;
  /** The kernel rows of the backend that it stands for. */
  readonly kernels: readonly KernelRow[];
  /** What it stands for, in words. */
  readonly name: string;
}

/** A device that plans and never runs: what a graph would do on a device that is not here. `load` throws `device/unavailable`. */
export function openTrace({ capabilities, kernels, name }: TraceOptions): BackendDevice {
  return {
    info: { backend: "trace", name, kind: "trace", reason: "asked for: plans are made without a device", detail: {} },
    capabilities,
    kernels,
    bytes: 0,
    lost: new Promise<string>(() => {}),
    load: async () => {
      throw new FewbitError("device/unavailable", { backend: "trace", reason: "it makes plans and runs nothing" });
    },
    [Symbol.asyncDispose]: async () => {},
  };
}
