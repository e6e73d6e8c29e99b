import { FewbitError, nearestNames } from "../core/errors.js";
import { codecBits, codecVector, type Format } from "../formats/format.js";
import { rowWords } from "../formats/pack.js";
import { FORMATS, VARIANTS } from "../formats/table.js";
import { type QuantizedTensor, tensorWords } from "../formats/tensor.js";
import type { DecoderConfig } from "./config.js";

/**
 * How cached keys and values may be stored, by the names of `--kv`. int8 (specification 19) and float8 have a float32 scale a
 * token and head; int4 has a bf16 scale and a byte of zero point for every 32 elements of a head.
 */
export const KV_FORMATS: Readonly<Record<string, Format>> = {
  none: FORMATS.f32,
  f32: FORMATS.f32,
  f16: FORMATS.f16,
  bf16: FORMATS.bf16,
  int8: VARIANTS.int8_kv,
  float8: FORMATS.float8_e4m3,
  int4: VARIANTS.int4_kv,
};

/** The format of a cache by its name. Throws `argument/unknown-name`. */
export function kvFormat(name: string): Format {
  const format = Object.hasOwn(KV_FORMATS, name) ? KV_FORMATS[name] : undefined;
  if (format !== undefined) return format;
  throw new FewbitError("argument/unknown-name", {
    kind: "KV format",
    name,
    nearest: nearestNames(name, Object.keys(KV_FORMATS)),
  });
}

/** Bytes that a model's cache of `tokens` tokens takes: keys and values of every layer. */
export function kvBytes(
  config: Pick<DecoderConfig, "layers" | "kvHeads" | "headDim">,
  format: Format,
  tokens: number,
): number {
  const words = tensorWords(format, [config.kvHeads * tokens, config.headDim]);
  return 8 * config.layers * (words.qdata + words.zero + words.scales.reduce((a, b) => a + b, 0));
}

/**
 * Slots of a ring that serves a sliding window: the first of `maxTokens` new tokens still sees window - 1 older ones when the
 * last has been written. Never more than the whole context.
 */
export function ringCapacity(window: number, maxTokens: number, context: number): number {
  return Math.min(context, window + maxTokens - 1);
}

/** A block that a sequence must copy before it writes: `from` stays with the others that read it. */
export interface BlockCopy {
  readonly from: number;
  readonly to: number;
}

/**
 * The blocks of a paged cache, [blocks, kvHeads, slots, D], and who holds them: sequences of one pool share blocks until they
 * write (Kwon et al., PagedAttention, 2023). It keeps count only; the cache itself lives with the program.
 */
export class KvPool {
  /** Tokens of one block. */
  readonly slots: number;
  readonly #holders: Uint32Array;
  readonly #free: number[];

  constructor(blocks: number, slots: number) {
    for (const [name, value] of Object.entries({ blocks, slots })) {
      if (!Number.isInteger(value) || value < 1) {
        throw new FewbitError("argument/invalid", { name, value, expected: "a positive integer" });
      }
    }
    this.slots = slots;
    this.#holders = new Uint32Array(blocks);
    this.#free = Array.from({ length: blocks }, (_, i) => blocks - 1 - i);
  }

  get blocks(): number {
    return this.#holders.length;
  }

  /** Blocks that nobody holds. */
  get free(): number {
    return this.#free.length;
  }

  /** An empty sequence. */
  open(): KvSequence {
    return new KvSequence(this, [], 0);
  }

  /** How many sequences hold a block. */
  holders(block: number): number {
    return this.#holders[block] as number;
  }

  /** @internal Takes a free block; the caller has asked `free` first. */
  take(): number {
    const block = this.#free.pop() as number;
    this.#holders[block] = 1;
    return block;
  }

  /** @internal */
  share(block: number): void {
    this.#holders[block] = this.holders(block) + 1;
  }

  /** @internal */
  release(block: number): void {
    this.#holders[block] = this.holders(block) - 1;
    if (this.holders(block) === 0) this.#free.push(block);
  }
}

/** One sequence of a pool: its tokens in order, block after block. */
export class KvSequence implements Disposable {
  readonly #pool: KvPool;
  #blocks: number[];
  #length: number;
  #disposed = false;

  /** @internal Made by `KvPool.open` and `fork`. */
  constructor(pool: KvPool, blocks: number[], length: number) {
    this.#pool = pool;
    this.#blocks = blocks;
    this.#length = length;
  }

  /** Tokens in the cache. */
  get length(): number {
    return this.#length;
  }

  /**
   * Makes room for `tokens` more and counts them in. Returns the blocks to copy (with `copyBlocks`) before the run that writes
   * them: a block that is shared and not full. Throws `cache/overflow` when the pool has too few blocks; nothing has changed then.
   */
  append(tokens: number): BlockCopy[] {
    this.#check();
    if (!Number.isInteger(tokens) || tokens < 0) {
      throw new FewbitError("argument/invalid", { name: "tokens", value: tokens, expected: "a non-negative integer" });
    }
    const pool = this.#pool;
    const length = this.#length + tokens;
    const needed = Math.ceil(length / pool.slots) - this.#blocks.length;
    const last = this.#blocks.at(-1);
    const partial = tokens > 0 && last !== undefined && this.#length % pool.slots !== 0;
    const copies = partial && pool.holders(last) > 1;
    if (needed + Number(copies) > pool.free) {
      const capacity = (this.#blocks.length + pool.free - Number(copies)) * pool.slots;
      throw new FewbitError("cache/overflow", { needed: length, capacity });
    }
    const made: BlockCopy[] = [];
    if (copies) {
      const to = pool.take();
      pool.release(last);
      this.#blocks[this.#blocks.length - 1] = to;
      made.push({ from: last, to });
    }
    for (let i = 0; i < needed; i++) this.#blocks.push(pool.take());
    this.#length = length;
    return made;
  }

  /** A sequence with the same tokens in the same blocks; nothing is copied until one of the two writes. */
  fork(): KvSequence {
    this.#check();
    for (const block of this.#blocks) this.#pool.share(block);
    return new KvSequence(this.#pool, [...this.#blocks], this.#length);
  }

  /** Forgets all tokens from `length` on. */
  truncate(length: number): void {
    this.#check();
    if (!Number.isInteger(length) || length < 0 || length > this.#length) {
      throw new FewbitError("argument/invalid", {
        name: "length",
        value: length,
        expected: `an integer from 0 to ${this.#length}`,
      });
    }
    const keep = Math.ceil(length / this.#pool.slots);
    for (const block of this.#blocks.splice(keep)) this.#pool.release(block);
    this.#length = length;
  }

  /** The `pages` operand of `kv_write` and `sdpa`, u32 [count]. Entries past the sequence's blocks are never read. */
  pages(count: number): Uint32Array {
    this.#check();
    if (this.#blocks.length > count) {
      throw new FewbitError("cache/overflow", { needed: this.#length, capacity: count * this.#pool.slots });
    }
    const pages = new Uint32Array(count);
    pages.set(this.#blocks);
    return pages;
  }

  /** Gives its blocks back. */
  [Symbol.dispose](): void {
    if (this.#disposed) return;
    this.truncate(0);
    this.#disposed = true;
  }

  #check(): void {
    if (this.#disposed) throw new FewbitError("object/disposed", { object: "sequence" });
  }
}

/** A pool's tensor (`rows` rows a block: kvHeads * slots) with blocks copied bit for bit, scales and zero points with them. */
export function copyBlocks(tensor: QuantizedTensor, rows: number, copies: readonly BlockCopy[]): QuantizedTensor {
  const { format } = tensor;
  const blocks = tensor.shape[0] / rows;
  const stride = rowWords(tensor.shape[1] / codecVector(format.element)[1], codecBits(format.element)) * rows;
  const move = (words: Uint32Array, bytesOfBlock: number): Uint32Array => {
    const bytes = new Uint8Array(words.slice().buffer);
    for (const { from, to } of copies)
      bytes.copyWithin(to * bytesOfBlock, from * bytesOfBlock, (from + 1) * bytesOfBlock);
    return new Uint32Array(bytes.buffer);
  };
  const codes = (bits: number, count: number) => (bits / 8) * (count / blocks);
  const grid = (i: number) => {
    const block = format.scales[i]?.block ?? ([1, "all"] as const);
    if (block[0] !== 1)
      throw new FewbitError("graph/invalid", {
        where: format.name,
        reason: "its scales span rows: blocks cannot be copied",
      });
    return tensor.shape[0] * (block[1] === "all" ? 1 : tensor.shape[1] / block[1]);
  };
  return {
    ...tensor,
    qdata: move(tensor.qdata, 4 * stride),
    scales: tensor.scales.map((words, i) =>
      move(words, codes(codecBits((format.scales[i] as Format["scales"][number]).codec), grid(i))),
    ),
    ...(tensor.zero && format.zero.domain !== "none"
      ? { zero: move(tensor.zero, codes(codecBits(format.zero.codec), grid(0))) }
      : {}),
  };
}
