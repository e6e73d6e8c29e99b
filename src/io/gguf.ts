import { FewbitError } from "../core/errors.js";
import { GGML_TYPES, ggmlType } from "../formats/ggml.js";
import { label } from "./json.js";
import { type ByteSource, decodeUtf8 } from "./source.js";

/**
 * The GGUF container, versions 2 and 3 (little-endian): metadata of typed values, then the places of tensors, then their data at
 * multiples of an alignment. Format: docs/gguf.md of the ggml project.
 */

export type GgufValue = number | bigint | boolean | string | readonly GgufValue[];

export interface GgufTensor {
  readonly name: string;
  /** Row-major, slowest first: the reverse of the file's order. */
  readonly shape: readonly number[];
  /** ggml's number of the type. */
  readonly type: number;
  /** From the start of the file. */
  readonly byteOffset: number;
  readonly byteLength: number;
}

export interface GgufHeader {
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: ReadonlyMap<string, GgufTensor>;
}

/** Types whose elements stand alone, and their bytes. */
const PLAIN: Readonly<Record<number, { name: string; bytes: number }>> = {
  0: { name: "F32", bytes: 4 },
  1: { name: "F16", bytes: 2 },
  30: { name: "BF16", bytes: 2 },
};

/** Names of the types that this reader refuses, for messages. */
const REFUSED: Readonly<Record<number, string>> = {
  9: "Q8_1",
  15: "Q8_K",
  16: "IQ2_XXS",
  17: "IQ2_XS",
  18: "IQ3_XXS",
  19: "IQ1_S",
  21: "IQ3_S",
  22: "IQ2_S",
  24: "I8",
  25: "I16",
  26: "I32",
  27: "I64",
  28: "F64",
  29: "IQ1_M",
  34: "TQ1_0",
  35: "TQ2_0",
};

/** The name of a tensor type. */
export function ggufTypeName(type: number): string {
  return PLAIN[type]?.name ?? ggmlType(type)?.name ?? REFUSED[type] ?? `number ${type}`;
}

const MAGIC = 0x46554747;
/** Bytes that are read ahead. */
const WINDOW = 2 ** 18;
/** Longer strings and arrays and deeper nesting than any model's vocabulary needs. */
const MAX_STRING = 2 ** 24;
const MAX_ELEMENTS = 2 ** 23;
const MAX_DEPTH = 4;
const MAX_HEADER = 2 ** 28;
const MAX_RANK = 4;

/**
 * Reads and checks everything before the data. Every count is checked against what is left of the file before anything is
 * allocated for it.
 * @throws FewbitError `io/malformed` with the reason; `model/unsupported` (version, byte order, tensor type); `io/failed`
 */
export async function readGguf(source: ByteSource, signal?: AbortSignal): Promise<GgufHeader> {
  const reader = new Reader(source, signal);
  if ((await reader.u32("the magic")) !== MAGIC) throw reader.error('it does not start with "GGUF"');
  const version = await reader.u32("the version");
  if (version !== 2 && version !== 3) {
    const swapped = version === 0x02000000 || version === 0x03000000;
    const value = swapped ? "big-endian" : String(version);
    throw new FewbitError("model/unsupported", { what: "GGUF version", value, supported: ["2", "3"] });
  }
  const tensorCount = await reader.count("the number of tensors", 24);
  const pairs = await reader.count("the number of metadata values", 13);
  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < pairs; i++) {
    const key = await reader.string("a metadata key");
    if (metadata.has(key)) throw reader.error(`it has the key ${label(key)} twice`);
    metadata.set(key, await reader.value(await reader.u32(`the type of ${label(key)}`), label(key), MAX_DEPTH));
  }
  const alignment = metadata.get("general.alignment") ?? 32;
  if (typeof alignment !== "number" || alignment < 8 || alignment > 2 ** 20 || alignment % 8 !== 0)
    throw reader.error(`general.alignment is ${String(alignment)}`);
  const described: { name: string; shape: number[]; type: number; offset: number }[] = [];
  const names = new Set<string>();
  for (let i = 0; i < tensorCount; i++) {
    const name = await reader.string("a tensor's name");
    if (names.size === names.add(name).size) throw reader.error(`it has the tensor ${label(name)} twice`);
    const rank = await reader.u32(`the rank of ${label(name)}`);
    if (rank < 1 || rank > MAX_RANK) throw reader.error(`tensor ${label(name)} has ${rank} dimensions`);
    const extents: number[] = [];
    for (let d = 0; d < rank; d++) extents.push(await reader.u64(`an extent of ${label(name)}`));
    const type = await reader.u32(`the type of ${label(name)}`);
    described.push({ name, shape: extents.reverse(), type, offset: await reader.u64(`the offset of ${label(name)}`) });
  }
  const start = Math.ceil(reader.position / alignment) * alignment;
  const tensors = described.map(({ offset, ...tensor }): GgufTensor => {
    if (offset % alignment !== 0) throw reader.error(`tensor ${label(tensor.name)} is not aligned to ${alignment}`);
    const byteLength = bytesOf(reader, tensor);
    const byteOffset = start + offset;
    if (byteOffset + byteLength > source.size)
      throw reader.error(`tensor ${label(tensor.name)} ends at byte ${byteOffset + byteLength} of ${source.size}`);
    return { ...tensor, byteOffset, byteLength };
  });
  let end = start;
  for (const tensor of [...tensors].sort((a, b) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength)) {
    if (tensor.byteOffset < end) throw reader.error(`tensor ${label(tensor.name)} overlaps another`);
    end = tensor.byteOffset + tensor.byteLength;
  }
  return { metadata, tensors: new Map(tensors.map((tensor) => [tensor.name, tensor])) };
}

function bytesOf(
  reader: Reader,
  { name, shape, type }: { name: string; shape: readonly number[]; type: number },
): number {
  const block = ggmlType(type);
  const plain = PLAIN[type];
  if (block === undefined && plain === undefined) {
    const supported = [...Object.keys(PLAIN).map(Number), ...GGML_TYPES].map(ggufTypeName);
    throw new FewbitError("model/unsupported", {
      what: `type of tensor ${label(name)}`,
      value: ggufTypeName(type),
      supported,
    });
  }
  const size = shape.reduce((a, b) => a * b, 1);
  const columns = shape.at(-1) ?? 1;
  if (!Number.isSafeInteger(size * 4))
    throw reader.error(`tensor ${label(name)} of shape [${shape.join(", ")}] is too large`);
  if (plain !== undefined) return size * plain.bytes;
  const { elements, bytes } = block as NonNullable<typeof block>;
  if (columns % elements !== 0)
    throw reader.error(`tensor ${label(name)} has rows of ${columns}, which ${ggufTypeName(type)} does not divide`);
  return (size / elements) * bytes;
}

/** Reads numbers and strings one after another through a window. */
class Reader {
  readonly #source: ByteSource;
  readonly #signal: AbortSignal | undefined;
  #window: DataView = new DataView(new ArrayBuffer(0));
  #begin = 0;
  #elements = 0;
  position = 0;

  constructor(source: ByteSource, signal: AbortSignal | undefined) {
    this.#source = source;
    this.#signal = signal;
  }

  error(reason: string): FewbitError {
    return new FewbitError("io/malformed", { path: this.#source.name, reason });
  }

  /** The next `length` bytes, as a place in the window. */
  async #need(length: number, what: string): Promise<number> {
    const left = Math.min(this.#source.size, MAX_HEADER) - this.position;
    if (length > left) throw this.error(`${what} needs ${length} bytes at byte ${this.position}, ${left} follow`);
    const at = this.position - this.#begin;
    if (at + length <= this.#window.byteLength) {
      this.position += length;
      return at;
    }
    const bytes = await this.#source.read(this.position, Math.min(left, Math.max(length, WINDOW)), this.#signal);
    this.#window = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#begin = this.position;
    this.position += length;
    return 0;
  }

  async u32(what: string): Promise<number> {
    const at = await this.#need(4, what);
    return this.#window.getUint32(at, true);
  }

  /** A 64-bit count or size, which must be a safe integer. */
  async u64(what: string): Promise<number> {
    const at = await this.#need(8, what);
    const value = this.#window.getBigUint64(at, true);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw this.error(`${what} is ${value}, which is above 2^53 - 1`);
    return Number(value);
  }

  /** A count of things that take at least `size` bytes each. */
  async count(what: string, size: number): Promise<number> {
    const count = await this.u64(what);
    const left = this.#source.size - this.position;
    if (count * size > left) throw this.error(`${what} is ${count}, for which ${left} bytes are too few`);
    return count;
  }

  async string(what: string): Promise<string> {
    const length = await this.u64(`the length of ${what}`);
    if (length > MAX_STRING) throw this.error(`${what} is a string of ${length} bytes, the limit is ${MAX_STRING}`);
    const at = await this.#need(length, what);
    return decodeUtf8(new Uint8Array(this.#window.buffer, this.#window.byteOffset + at, length), this.#source.name);
  }

  async value(type: number, what: string, depth: number): Promise<GgufValue> {
    if (type === 8) return this.string(what);
    if (type === 9) {
      if (depth === 0) throw this.error(`${what} is nested too deeply`);
      const inner = await this.u32(`the element type of ${what}`);
      const count = await this.count(`the length of ${what}`, inner === 9 ? 12 : (SCALARS[inner]?.bytes ?? 8));
      this.#elements += count;
      if (this.#elements > MAX_ELEMENTS) throw this.error(`${what} takes its arrays past ${MAX_ELEMENTS} elements`);
      const values: GgufValue[] = [];
      for (let i = 0; i < count; i++) values.push(await this.value(inner, what, depth - 1));
      return values;
    }
    const scalar = SCALARS[type];
    if (scalar === undefined) throw this.error(`${what} has the unknown type ${type}`);
    const at = await this.#need(scalar.bytes, what);
    return scalar.read(this.#window, at);
  }
}

const SCALARS: Readonly<Record<number, { bytes: number; read: (view: DataView, at: number) => GgufValue }>> = {
  0: { bytes: 1, read: (view, at) => view.getUint8(at) },
  1: { bytes: 1, read: (view, at) => view.getInt8(at) },
  2: { bytes: 2, read: (view, at) => view.getUint16(at, true) },
  3: { bytes: 2, read: (view, at) => view.getInt16(at, true) },
  4: { bytes: 4, read: (view, at) => view.getUint32(at, true) },
  5: { bytes: 4, read: (view, at) => view.getInt32(at, true) },
  6: { bytes: 4, read: (view, at) => view.getFloat32(at, true) },
  7: { bytes: 1, read: (view, at) => view.getUint8(at) !== 0 },
  10: { bytes: 8, read: (view, at) => view.getBigUint64(at, true) },
  11: { bytes: 8, read: (view, at) => view.getBigInt64(at, true) },
  12: { bytes: 8, read: (view, at) => view.getFloat64(at, true) },
};
