import type { Scope } from "../../core/dispose.js";
import { FewbitError } from "../../core/errors.js";
import type { Plan } from "../../plan/plan.js";
import { GUARD_WORD } from "../backend.js";
import { residentBytes } from "../transfer.js";
import { sourceKey } from "../weights.js";
import type { CudaDevice } from "./device.js";
import type { Source } from "./kernel.js";

/** Bytes of guard words after a buffer. */
const GUARD_BYTES = 256;

interface Guarded {
  readonly label: string;
  readonly buffer: number;
  /** Its own bytes end here. */
  readonly end: number;
  readonly activation: boolean;
}

/** The device buffers of one program, by the addon's numbers: slots, inputs, states, weights, constants, scratch. */
export class ProgramBuffers {
  readonly #device: CudaDevice;
  readonly #scope: Scope;
  readonly #plan: Plan;
  readonly #guard: boolean;
  readonly #named = new Map<string, number>();
  readonly #guarded: Guarded[] = [];

  /** Allocates slots, inputs and states. With `guard`, guard words stand behind every buffer. */
  constructor(device: CudaDevice, scope: Scope, plan: Plan, guard: boolean) {
    this.#device = device;
    this.#scope = scope;
    this.#plan = plan;
    this.#guard = guard;
    const slots = plan.memory.slots.map((bytes, i) => this.#storage(`slot ${i}`, bytes, true));
    for (const [id, slot] of plan.memory.slotOf) this.#named.set(`value ${id}`, slots[slot] as number);
    for (const value of plan.graph.values) {
      if (value.role !== "input" && value.role !== "state") continue;
      this.#named.set(`value ${value.id}`, this.#storage(value.name, residentBytes(value, plan.graph), false));
    }
  }

  /** Makes the buffer of a source that is not made yet. */
  add(source: Source, label: string, bytes: number): number {
    const buffer = this.#storage(label, bytes, false);
    this.#named.set(this.#key(source), buffer);
    return buffer;
  }

  has(source: Source): boolean {
    return this.#named.has(this.#key(source));
  }

  get(source: Source): number {
    const key = this.#key(source);
    const buffer = this.#named.get(key);
    if (buffer === undefined) throw new FewbitError("graph/invalid", { where: key, reason: "it has no buffer" });
    return buffer;
  }

  write(buffer: number, at: number, data: ArrayBufferView): void {
    this.#device.call((handle) => handle.write(buffer, at, data));
  }

  /** Bytes of buffers, one after another, as everything submitted so far leaves them. */
  async read(
    pieces: readonly { readonly buffer: number; readonly at: number; readonly bytes: number }[],
  ): Promise<Uint8Array<ArrayBuffer>> {
    const data = await this.#device.wait((handle) =>
      handle.read(
        pieces.map(({ buffer }) => buffer),
        pieces.map(({ at }) => at),
        pieces.map(({ bytes }) => bytes),
      ),
    );
    return new Uint8Array(data);
  }

  /** The labels of buffers whose guard words were overwritten since the last call; guards are armed anew. */
  async damage(): Promise<string[]> {
    const words = GUARD_BYTES / 4;
    const pieces = this.#guarded.map(({ buffer, end }) => ({ buffer, at: end, bytes: GUARD_BYTES }));
    const found = new Uint32Array((await this.read(pieces)).buffer);
    const changed = this.#guarded.filter((_, i) =>
      found.subarray(i * words, (i + 1) * words).some((word) => word !== GUARD_WORD),
    );
    for (const guarded of this.#guarded) if (guarded.activation || changed.includes(guarded)) this.#arm(guarded);
    return changed.map(({ label }) => label);
  }

  #storage(label: string, bytes: number, activation: boolean): number {
    if (!this.#guard) return this.#device.buffer(this.#scope, bytes);
    const end = Math.max(16, Math.ceil(bytes / 16) * 16);
    const buffer = this.#device.buffer(this.#scope, end + GUARD_BYTES);
    const guarded = { label, buffer, end, activation };
    this.#guarded.push(guarded);
    this.#arm(guarded);
    return buffer;
  }

  #arm({ buffer, end, activation }: Guarded): void {
    const begin = activation ? 0 : end;
    this.#device.call((handle) => handle.fill(buffer, begin, (end + GUARD_BYTES - begin) / 4, GUARD_WORD));
  }

  #key(source: Source): string {
    return source.kind === "constant" ? `constant ${source.key}` : sourceKey(source, this.#plan);
  }
}
