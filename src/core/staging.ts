import { roundUp } from "./shape.js";

/** Sizes are rounded up to this, so that tiles of nearly one size share memory. */
const STEP = 2 ** 12;

/**
 * Memory that is taken again and again: what is read piece by piece leaves nothing behind for the garbage collector, which would
 * let tens of megabytes gather. It is a stack: what was taken last is released first.
 */
export class Staging {
  readonly #free: ArrayBuffer[] = [];
  readonly #taken: ArrayBuffer[] = [];

  /** Bytes held, taken or free. */
  get bytes(): number {
    return [...this.#free, ...this.#taken].reduce((sum, { byteLength }) => sum + byteLength, 0);
  }

  /** Where the stack stands, for `release`. */
  get mark(): number {
    return this.#taken.length;
  }

  /** `length` bytes, aligned for every typed array and with whatever was in them before. */
  take(length: number): Uint8Array<ArrayBuffer> {
    const size = roundUp(Math.max(length, 1), STEP);
    let best = -1;
    for (const [i, { byteLength }] of this.#free.entries())
      if (byteLength >= size && (best < 0 || byteLength < (this.#free[best] as ArrayBuffer).byteLength)) best = i;
    // One that is too small is never waited for: it makes room for one that is not.
    const [found] = this.#free.splice(best < 0 ? this.#largest() : best, 1);
    const buffer = best < 0 || found === undefined ? new ArrayBuffer(size) : found;
    this.#taken.push(buffer);
    return new Uint8Array(buffer, 0, length);
  }

  /** `count` words. */
  words(count: number): Uint32Array<ArrayBuffer> {
    return new Uint32Array(this.take(count * 4).buffer, 0, count);
  }

  /** As many numbers of the kind that `codes` has. */
  like<T extends Uint8Array | Int8Array | Uint16Array | Uint32Array | Int32Array>(codes: T, count = codes.length): T {
    const { buffer } = this.take(count * codes.BYTES_PER_ELEMENT);
    return new (codes.constructor as new (buffer: ArrayBuffer, at: number, length: number) => T)(buffer, 0, count);
  }

  /** Gives back what was taken since `mark` was read. */
  release(mark = 0): void {
    this.#free.push(...this.#taken.splice(mark));
  }

  #largest(): number {
    return this.#free.reduce((at, { byteLength }, i, all) => (byteLength > (all[at]?.byteLength ?? 0) ? i : at), 0);
  }
}
