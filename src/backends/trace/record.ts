/** How often each method of a device and of what it makes was called, by `object.method`. */
export interface Recording {
  /** The same device: every call goes through and is counted. */
  readonly device: GPUDevice;
  readonly counts: ReadonlyMap<string, number>;
  count(call: string): number;
  /** The largest binding of any bind group, in bytes. */
  largestBinding(): number;
  reset(): void;
}

/** Methods whose results are recorded too, with the name that their own calls are counted under. */
const MADE: Readonly<Record<string, string>> = {
  "device.createCommandEncoder": "encoder",
  "encoder.beginComputePass": "pass",
};

/**
 * Wraps a GPUDevice so that calls are counted. `limits` replaces limits that the wrapped device tells of (WebGPU itself never
 * grants less than its defaults), so that code for small devices can be run.
 */
export function recordDevice(target: GPUDevice, limits: Readonly<Record<string, number>> = {}): Recording {
  const counts = new Map<string, number>();
  let largest = 0;
  const note = (call: string, args: readonly unknown[]) => {
    counts.set(call, (counts.get(call) ?? 0) + 1);
    if (call !== "device.createBindGroup") return;
    for (const { resource } of (args[0] as GPUBindGroupDescriptor).entries) {
      const { buffer, size } = resource as GPUBufferBinding;
      largest = Math.max(largest, size ?? buffer.size);
    }
  };
  const wrap = <T extends object>(object: T, name: string): T =>
    new Proxy(object, {
      get: (_, property) => {
        const value: unknown = Reflect.get(object, property, object);
        if (name === "device" && property === "queue") return wrap(value as object, "queue");
        if (name === "device" && property === "limits") return override(value as GPUSupportedLimits, limits);
        if (typeof value !== "function") return value;
        return (...args: unknown[]) => {
          const call = `${name}.${String(property)}`;
          note(call, args);
          const made: unknown = Reflect.apply(value, object, args);
          const inner = MADE[call];
          return inner === undefined ? made : wrap(made as object, inner);
        };
      },
    });
  return {
    device: wrap(target, "device"),
    counts,
    count: (call) => counts.get(call) ?? 0,
    largestBinding: () => largest,
    reset: () => counts.clear(),
  };
}

function override(limits: GPUSupportedLimits, changes: Readonly<Record<string, number>>): GPUSupportedLimits {
  return new Proxy(limits, { get: (_, name) => changes[String(name)] ?? Reflect.get(limits, name, limits) });
}
