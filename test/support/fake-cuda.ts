import type { Addon, AddonDevice, BucketText, Probe } from "../../src/backends/native/addon.js";
import { H100 } from "../../src/backends/native/capabilities.js";
import { CudaDevice } from "../../src/backends/native/device.js";
import { type NativeKernel, value } from "../../src/backends/native/kernel.js";

const RELU_ENTRY = { name: "fake/relu", abi: 1 };

/** A row that the fake can run: relu of whole rows. */
export const RELU: NativeKernel = {
  id: "cuda/fake/relu",
  kind: "elementwise",
  entries: [RELU_ENTRY],
  requires: [],
  efficiency: { bandwidth: 1, compute: 1 },
  build: (context) => {
    const { inputs, outputs } = context.bound.step;
    const [x, out] = [inputs[0], outputs[0]] as [number, number];
    const args = [...context.rowExtent(out), context.lastExtent(out)];
    return [{ label: context.bound.describe(), entry: RELU_ENTRY, bindings: [value(x), value(out)], args }];
  },
};

/** What was asked of a fake device, in order. */
export interface FakeRun {
  readonly program: number;
  readonly bucket: number;
  readonly symbols: readonly number[];
  readonly replay: boolean;
}

/**
 * The addon's interface over host memory, with `RELU` as its only kernel: what lies between a plan and the addon can
 * be tested without a GPU.
 */
export class FakeCuda implements AddonDevice {
  readonly memory = new Map<number, Uint8Array<ArrayBuffer>>();
  readonly programs = new Map<number, { readonly symbols: number; readonly buckets: readonly BucketText[] }>();
  readonly runs: FakeRun[] = [];
  /** Thrown by the next call that reaches the device. */
  fails: Error | null = null;
  disposed = false;
  #next = 1;

  allocate(bytes: number): number {
    this.#fail();
    const id = this.#next++;
    this.memory.set(id, new Uint8Array(Math.ceil(Math.max(bytes, 1) / 256) * 256));
    return id;
  }

  free(buffer: number): void {
    this.memory.delete(buffer);
  }

  write(buffer: number, at: number, data: ArrayBufferView): void {
    this.#fail();
    this.#buffer(buffer).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
  }

  fill(buffer: number, at: number, words: number, word: number): void {
    new Uint32Array(this.#buffer(buffer).buffer, at, words).fill(word);
  }

  async read(buffers: readonly number[], at: readonly number[], bytes: readonly number[]): Promise<ArrayBuffer> {
    const parts = buffers.map((id, i) => {
      const begin = at[i] as number;
      return this.#buffer(id).slice(begin, begin + (bytes[i] as number));
    });
    await null;
    this.#fail();
    const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let to = 0;
    for (const part of parts) {
      all.set(part, to);
      to += part.length;
    }
    return all.buffer;
  }

  load(program: { readonly symbols: number; readonly buckets: readonly BucketText[] }): number {
    const id = this.#next++;
    this.programs.set(id, program);
    return id;
  }

  run(program: number, bucket: number, symbols: Uint32Array, replay = false): number {
    this.#fail();
    this.runs.push({ program, bucket, symbols: [...symbols], replay });
    const launches = this.programs.get(program)?.buckets[bucket]?.launches ?? [];
    for (const { entry, buffers, args } of launches) {
      if (entry !== RELU_ENTRY.name) throw new Error(`the fake has no ${entry}`);
      const [coefficient, symbol, width] = args as [number, number, number];
      const count = coefficient * (symbol < 0 ? 1 : (symbols[symbol] as number)) * width;
      const [x, out] = buffers.map((id) => new Float32Array(this.#buffer(id).buffer)) as [Float32Array, Float32Array];
      for (let i = 0; i < count; i++) out[i] = Math.max(0, x[i] as number);
    }
    return launches.length;
  }

  async profile(program: number, bucket: number, symbols: Uint32Array): Promise<ArrayBuffer> {
    return new Float64Array(this.run(program, bucket, symbols)).fill(1e-6).buffer;
  }

  unload(program: number): void {
    this.programs.delete(program);
  }

  counters() {
    const sizes = [...this.memory.values()].map(({ length }) => length);
    const bytes = sizes.reduce((sum, size) => sum + size, 0);
    return {
      bytes,
      buffers: sizes.length,
      programs: this.programs.size,
      graphs: 0,
      reads: 0,
      pinnedBytes: 0,
      events: 0,
    };
  }

  blas() {
    return { version: 0, reason: "a fake has none" };
  }

  dispose(): void {
    this.disposed = true;
  }

  #buffer(id: number): Uint8Array<ArrayBuffer> {
    const buffer = this.memory.get(id);
    if (buffer === undefined) throw new Error(`buffer ${id} does not exist`);
    return buffer;
  }

  #fail(): void {
    const error = this.fails;
    this.fails = null;
    if (error !== null) throw error;
  }
}

/** An error as the addon throws them. */
export function cudaError(kind: "error" | "memory" | "lost", operation: string, reason: string): Error {
  return Object.assign(new Error(`${operation}: ${reason}`), {
    cuda: { kind, operation, reason, needed: 100, limit: 10 },
  });
}

export function openFakeCuda(): { readonly fake: FakeCuda; readonly device: CudaDevice } {
  const fake = new FakeCuda();
  const probe: Probe = { driver: 13000, runtime: 13000, status: "", devices: [H100] };
  const addon = {
    abi: 1,
    entries: [],
    architectures: "90a-real",
    probe: () => probe,
    Device: FakeCuda,
  } satisfies Addon;
  return { fake, device: new CudaDevice(fake, addon, probe, H100, false) };
}
