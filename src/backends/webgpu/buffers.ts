import { Scope } from "../../core/dispose.js";
import { FewbitError } from "../../core/errors.js";
import type { Plan } from "../../plan/plan.js";
import { GUARD_WORD } from "../backend.js";
import { residentBytes } from "../transfer.js";
import { type Source, sourceKey } from "../weights.js";
import type { WebGpuDevice } from "./device.js";
import { USAGE } from "./usage.js";

/** Bytes of guard words after a buffer. */
const GUARD_BYTES = 256;
const STORAGE = USAGE.storage | USAGE.copyDst | USAGE.copySrc;

/** A guarded buffer: its own bytes end at `end`. */
interface Guarded {
  readonly label: string;
  readonly buffer: GPUBuffer;
  readonly end: number;
  readonly activation: boolean;
}

/** The device buffers of one program: slots, inputs, states, weights, scratch; and how they are read. */
export class ProgramBuffers {
  readonly device: WebGpuDevice;
  readonly #scope: Scope;
  readonly #plan: Plan;
  readonly #guard: boolean;
  readonly #named = new Map<string, GPUBuffer>();
  readonly #guarded: Guarded[] = [];
  readonly #staging = new Map<number, GPUBuffer[]>();

  /** Allocates everything but weights and scratch. With `guard`, guard words stand behind every buffer. */
  constructor(device: WebGpuDevice, scope: Scope, plan: Plan, guard: boolean) {
    this.device = device;
    this.#scope = scope;
    this.#plan = plan;
    this.#guard = guard;
    const { slots, slotOf } = plan.memory;
    const made = slots.map((bytes, i) => this.#storage(`slot ${i}`, bytes, true));
    for (const [id, slot] of slotOf) this.#named.set(`value ${id}`, made[slot] as GPUBuffer);
    for (const value of plan.graph.values) {
      if (value.role !== "input" && value.role !== "state") continue;
      this.#named.set(`value ${value.id}`, this.#storage(value.name, residentBytes(value, plan.graph), false));
    }
  }

  /** Makes the buffer of a source that is not made yet: weights, dense weights or scratch. */
  add(source: Source, label: string, bytes: number): GPUBuffer {
    const buffer = this.#storage(label, bytes, false);
    this.#named.set(sourceKey(source, this.#plan), buffer);
    return buffer;
  }

  /** The buffer of a source, made if it is not. */
  obtain(source: Source, label: string, bytes: number): GPUBuffer {
    return this.#named.get(sourceKey(source, this.#plan)) ?? this.add(source, label, bytes);
  }

  get(source: Source): GPUBuffer {
    const buffer = this.#named.get(sourceKey(source, this.#plan));
    if (buffer === undefined)
      throw new FewbitError("graph/invalid", { where: sourceKey(source, this.#plan), reason: "it has no buffer" });
    return buffer;
  }

  /** The first `bytes` of a buffer. Staging buffers are kept by size, so that reading the same output again makes none. */
  async read(source: GPUBuffer, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
    const size = source.size;
    const pool = this.#staging.get(size) ?? [];
    this.#staging.set(size, pool);
    const staging = pool.pop() ?? this.device.buffer(this.#scope, "staging", size, USAGE.mapRead | USAGE.copyDst);
    const { gpu } = this.device;
    const encoder = gpu.createCommandEncoder();
    encoder.copyBufferToBuffer(source, 0, staging, 0, bytes);
    gpu.queue.submit([encoder.finish()]);
    try {
      await staging.mapAsync(1, 0, bytes);
    } catch (cause) {
      this.#scope.assertLive();
      this.device.check();
      const error = new FewbitError(
        "device/error",
        { operation: "reading a buffer", reason: String(cause) },
        { cause },
      );
      throw await this.device.reasonOf(error);
    }
    const data = new Uint8Array(staging.getMappedRange(0, bytes).slice(0));
    staging.unmap();
    pool.push(staging);
    return data;
  }

  /** The labels of buffers whose guard words were overwritten since the last call; guards are armed anew. */
  async damage(): Promise<string[]> {
    const { gpu } = this.device;
    const words = GUARD_BYTES / 4;
    using scope = new Scope("guards", this.#scope);
    const all = this.device.buffer(scope, "guards", this.#guarded.length * GUARD_BYTES, STORAGE);
    const encoder = gpu.createCommandEncoder();
    for (const [i, { buffer, end }] of this.#guarded.entries())
      encoder.copyBufferToBuffer(buffer, end, all, i * GUARD_BYTES, GUARD_BYTES);
    gpu.queue.submit([encoder.finish()]);
    const found = new Uint32Array((await this.read(all, this.#guarded.length * GUARD_BYTES)).buffer);
    const changed = this.#guarded.filter((_, i) =>
      found.subarray(i * words, (i + 1) * words).some((word) => word !== GUARD_WORD),
    );
    for (const guarded of this.#guarded) if (guarded.activation || changed.includes(guarded)) this.#arm(guarded);
    this.device.check();
    return changed.map(({ label }) => label);
  }

  #storage(label: string, bytes: number, activation: boolean): GPUBuffer {
    if (!this.#guard) return this.device.buffer(this.#scope, label, bytes, STORAGE);
    const end = Math.max(16, Math.ceil(bytes / 16) * 16);
    const buffer = this.device.buffer(this.#scope, label, end + GUARD_BYTES, STORAGE);
    const guarded = { label, buffer, end, activation };
    this.#guarded.push(guarded);
    this.#arm(guarded);
    return buffer;
  }

  #arm({ buffer, end, activation }: Guarded): void {
    const begin = activation ? 0 : end;
    const words = new Uint32Array((end + GUARD_BYTES - begin) / 4).fill(GUARD_WORD);
    this.device.gpu.queue.writeBuffer(buffer, begin, words);
  }
}
