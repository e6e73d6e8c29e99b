import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { Staging } from "../core/staging.js";
import type { StoredMatrix } from "../formats/stored-matrix.js";
import { JsonCursor, label } from "./json.js";
import { type ByteSink, type ByteSource, decodeUtf8, nodeModule } from "./source.js";

/**
 * The safetensors container: an 8-byte little-endian header length, a JSON header, then the data of all tensors without
 * gaps. Format: https://github.com/huggingface/safetensors (README, "Format"), version 0.4 and later.
 */

/** Bytes of one element, in increasing order of the reference implementation's `Dtype`, which the writer sorts by. */
const ELEMENT_BYTES = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E5M2: 1,
  F8_E4M3: 1,
  F8_E8M0: 1,
  I16: 2,
  U16: 2,
  F16: 2,
  BF16: 2,
  I32: 4,
  U32: 4,
  F32: 4,
  F64: 8,
  I64: 8,
  U64: 8,
} as const;

/** Names of the format that fewbit does not read, and why. */
const REFUSED: Readonly<Record<string, string>> = {
  F4: "elements smaller than a byte are not supported",
  F6_E2M3: "elements smaller than a byte are not supported",
  F6_E3M2: "elements smaller than a byte are not supported",
  F8_E4M3FNUZ: "FNUZ floats are not supported",
  F8_E5M2FNUZ: "FNUZ floats are not supported",
  C64: "complex numbers are not supported",
};

/** An element type by its name in the file. */
export type SafetensorsDtype = keyof typeof ELEMENT_BYTES;

/** Where one tensor lies. `byteOffset` counts from the start of its file; data is little-endian, row-major. */
export interface TensorInfo {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  readonly byteOffset: number;
  readonly byteLength: number;
}

export interface ReadOptions {
  signal?: AbortSignal;
  /** Only these rows, `[begin, end)` of the first dimension; no other byte is read. */
  rows?: readonly [begin: number, end: number];
  /** Memory that the bytes may be put into: they are good until it is released. */
  memory?: Staging;
}

/** Named tensors that are read one at a time: one file or a sharded checkpoint. */
export interface TensorStore extends AsyncDisposable {
  readonly name: string;
  /** Parameters that are held in a format already, by the name of the weight; their parts need not be in `tensors`. */
  readonly stored?: ReadonlyMap<string, StoredMatrix>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /**
   * The bytes of a tensor, or of some of its rows. Do not write to them: they may be a view of the source.
   * @throws FewbitError `model/missing-tensor`, `argument/invalid` (rows), `io/failed`, `operation/aborted`
   */
  read(name: string, options?: ReadOptions): Promise<Uint8Array>;
  close(): Promise<void>;
}

export interface SafetensorsFile extends TensorStore {
  /** The `__metadata__` of the header; empty when there is none. */
  readonly metadata: ReadonlyMap<string, string>;
}

/**
 * Bytes of a header at most: over 100,000 tensors. The reference implementation takes 100,000,000; a claim of that size would be
 * read and parsed before anything of it is known to be true.
 */
const MAX_HEADER = 30_000_000;
/** PyTorch's limit on dimensions. */
const MAX_RANK = 64;

/**
 * Reads and checks the header; tensor data is read later, on demand. The file owns `source` from now on: it is closed with
 * the file, or at once when the header is refused.
 * @throws FewbitError `io/malformed` with the exact reason; `io/failed`; `operation/aborted`
 */
export async function openSafetensors(
  source: ByteSource,
  options: { signal?: AbortSignal } = {},
): Promise<SafetensorsFile> {
  try {
    const header = await readHeader(source, options.signal);
    const close = () => source.close();
    return {
      name: source.name,
      ...header,
      close,
      [Symbol.asyncDispose]: close,
      async read(name, { signal, rows, memory } = {}) {
        const info = header.tensors.get(name);
        if (!info) throw new FewbitError("model/missing-tensor", { name, path: source.name });
        const [offset, length] = rows ? rowRange(info, rows) : [0, info.byteLength];
        return source.read(info.byteOffset + offset, length, signal, memory);
      },
    };
  } catch (error) {
    await source.close();
    throw error;
  }
}

function rowRange(info: TensorInfo, [begin, end]: readonly [number, number]): [offset: number, length: number] {
  const count = info.shape[0] ?? 0;
  const legal = Number.isInteger(begin) && Number.isInteger(end) && 0 <= begin && begin <= end && end <= count;
  if (!legal || info.shape.length === 0)
    throw new FewbitError("argument/invalid", {
      name: "rows",
      value: `[${begin}, ${end})`,
      expected: `a range of the ${count} rows of ${info.name}`,
    });
  const rowBytes = count === 0 ? 0 : info.byteLength / count;
  return [begin * rowBytes, (end - begin) * rowBytes];
}

interface Header {
  tensors: ReadonlyMap<string, TensorInfo>;
  metadata: ReadonlyMap<string, string>;
}

async function readHeader(source: ByteSource, signal: AbortSignal | undefined): Promise<Header> {
  const malformed = (reason: string) => new FewbitError("io/malformed", { path: source.name, reason });
  if (source.size < 8) throw malformed(`it has ${source.size} bytes, a header length needs 8`);
  const start = await source.read(0, 8, signal);
  const length = new DataView(start.buffer, start.byteOffset, 8).getBigUint64(0, true);
  if (length > MAX_HEADER) throw malformed(`the header claims ${length} bytes, the limit is ${MAX_HEADER}`);
  const dataStart = 8 + Number(length);
  if (dataStart > source.size) throw malformed(`the header claims ${length} bytes, ${source.size - 8} follow`);
  const text = decodeUtf8(await source.read(8, Number(length), signal), source.name);
  if (!text.startsWith("{")) throw malformed('the header does not start with "{"');
  const header = parseHeader(new JsonCursor(text, source.name), dataStart);
  checkLayout([...header.tensors.values()], dataStart, source.size, malformed);
  return header;
}

function parseHeader(json: JsonCursor, dataStart: number): Header {
  const tensors = new Map<string, TensorInfo>();
  const metadata = new Map<string, string>();
  json.object("the header", (name) => {
    if (name === "__metadata__")
      json.object("__metadata__", (key) => metadata.set(key, json.string(`__metadata__ ${label(key)}`)));
    else tensors.set(name, parseTensor(json, name, dataStart));
  });
  json.end();
  return { tensors, metadata };
}

function parseTensor(json: JsonCursor, name: string, dataStart: number): TensorInfo {
  const what = `tensor ${label(name)}`;
  let dtype: SafetensorsDtype | undefined;
  let shape: number[] | undefined;
  let offsets: number[] | undefined;
  json.object(what, (field) => {
    if (field === "dtype") dtype = checkDtype(json.string(`the dtype of ${what}`), what, json);
    else if (field === "shape") shape = integers(json, `the shape of ${what}`, MAX_RANK);
    else if (field === "data_offsets") offsets = integers(json, `data_offsets of ${what}`, 2);
    else throw json.error(`${what} has the unknown field ${label(field)}`);
  });
  if (!dtype || !shape || !offsets)
    throw json.error(`${what} has no ${!dtype ? "dtype" : !shape ? "shape" : "data_offsets"}`);
  const [begin, end] = offsets;
  if (begin === undefined || end === undefined || begin > end)
    throw json.error(`${what} has data_offsets [${offsets.join(", ")}]: expected [begin, end] with begin <= end`);
  const expected = byteLengthOf(dtype, shape);
  if (expected === undefined) throw json.error(`${what} of shape [${shape.join(", ")}] overflows 2^53 bytes`);
  if (end - begin !== expected)
    throw json.error(`${what} has ${end - begin} bytes, ${dtype} [${shape.join(", ")}] needs ${expected}`);
  return { name, dtype, shape, byteOffset: dataStart + begin, byteLength: expected };
}

function checkDtype(dtype: string, what: string, json: JsonCursor): SafetensorsDtype {
  if (Object.hasOwn(ELEMENT_BYTES, dtype)) return dtype as SafetensorsDtype;
  const refusal = Object.hasOwn(REFUSED, dtype) ? `: ${REFUSED[dtype]}` : ", which is unknown";
  throw json.error(`${what} has dtype ${label(dtype)}${refusal}`);
}

function integers(json: JsonCursor, what: string, limit: number): number[] {
  const values: number[] = [];
  json.array(what, () => {
    if (values.length === limit) throw json.error(`${what} has more than ${limit} numbers`);
    values.push(json.integer(what));
  });
  return values;
}

/** Bytes of a tensor; undefined once a product leaves the safe integers, even if a later extent is zero. */
function byteLengthOf(dtype: SafetensorsDtype, shape: readonly number[]): number | undefined {
  let bytes: number = ELEMENT_BYTES[dtype];
  for (const extent of shape) {
    bytes *= extent;
    if (!Number.isSafeInteger(bytes)) return undefined;
  }
  return bytes;
}

/** The data must be indexed completely: no byte twice, none out of range, none left over. */
function checkLayout(
  tensors: TensorInfo[],
  dataStart: number,
  fileSize: number,
  malformed: (reason: string) => FewbitError,
): void {
  tensors.sort((a, b) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength);
  let position = dataStart;
  let previous = "the header";
  for (const { name, byteOffset, byteLength } of tensors) {
    const what = `tensor ${label(name)}`;
    const end = byteOffset + byteLength;
    if (end > fileSize)
      throw malformed(`${what} ends at byte ${end - dataStart} of the data, which has ${fileSize - dataStart}`);
    if (byteOffset < position) throw malformed(`${what} overlaps ${previous}`);
    if (byteOffset > position)
      throw malformed(`${byteOffset - position} bytes between ${previous} and ${what} are not indexed`);
    position = end;
    previous = what;
  }
  if (position < fileSize) throw malformed(`${fileSize - position} bytes after ${previous} are not indexed`);
}

/** A tensor to write; `data` holds exactly its bytes, little-endian, row-major. */
export interface TensorEntry {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  readonly data: Uint8Array;
}

/** A tensor that is produced when its turn comes, whole or in pieces. */
export interface LazyTensorEntry extends Omit<TensorEntry, "data"> {
  data(): Promise<Uint8Array> | AsyncIterable<Uint8Array>;
}

/** The `__metadata__` to write. */
export type Metadata = ReadonlyMap<string, string> | Readonly<Record<string, string>>;

/**
 * The whole file in memory. Tensors are ordered by dtype (widest first), then name, and the header is padded to 8 bytes:
 * byte for byte what the reference implementation writes.
 * @throws FewbitError `argument/invalid` (name, shape or data that cannot be written)
 */
export function writeSafetensors(tensors: readonly TensorEntry[], metadata: Metadata = {}): Uint8Array {
  const { header, ordered, size } = layOut(tensors, metadata);
  const file = new Uint8Array(size);
  file.set(header);
  let position = header.byteLength;
  for (const { name, data, byteLength } of ordered) {
    checkLength(name, data.byteLength, byteLength);
    file.set(data, position);
    position += byteLength;
  }
  return file;
}

/**
 * The same bytes as {@link writeSafetensors}, one tensor in memory at a time. Whatever fails, the sink is aborted.
 * @throws FewbitError `argument/invalid`, `io/failed`, `operation/aborted`
 */
export async function streamSafetensors(
  sink: ByteSink,
  tensors: readonly LazyTensorEntry[],
  metadata: Metadata = {},
  options: { signal?: AbortSignal } = {},
): Promise<void> {
  try {
    const { header, ordered } = layOut(tensors, metadata);
    await sink.write(header);
    for (const { name, byteLength, data } of ordered) {
      let written = 0;
      const produced = data();
      for await (const piece of Symbol.asyncIterator in produced ? produced : [produced]) {
        throwIfAborted(options.signal, "writing a safetensors file");
        written += piece.byteLength;
        if (written > byteLength) checkLength(name, written, byteLength);
        await sink.write(piece);
      }
      checkLength(name, written, byteLength);
    }
    throwIfAborted(options.signal, "writing a safetensors file");
    await sink.close();
  } catch (error) {
    await sink.abort();
    throw error;
  }
}

/** {@link streamSafetensors} to a disk file (Node), which appears under `path` only when it is complete. */
export async function saveSafetensors(
  path: string | URL,
  tensors: readonly LazyTensorEntry[],
  metadata: Metadata = {},
  options: { signal?: AbortSignal } = {},
): Promise<void> {
  const { createFile } = await nodeModule(String(path));
  await streamSafetensors(await createFile(path), tensors, metadata, options);
}

interface Described {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
}

/** Where everything of a file lies: its header, the tensors in the order of their bytes, and its size. */
export function layOut<T extends Described>(tensors: readonly T[], metadata: Metadata) {
  const rank = Object.keys(ELEMENT_BYTES);
  const ordered = tensors
    .map((tensor) => ({ ...tensor, byteLength: checkShape(tensor) }))
    .sort((a, b) => rank.indexOf(b.dtype) - rank.indexOf(a.dtype) || compareCodePoints(a.name, b.name));
  const entries: string[] = [];
  const pairs = [...(metadata instanceof Map ? metadata : Object.entries(metadata))];
  if (pairs.length > 0) entries.push(`"__metadata__":{${pairs.map((pair) => pair.map(quote).join(":")).join(",")}}`);
  const names = new Set(["__metadata__"]);
  let position = 0;
  for (const { name, dtype, shape, byteLength } of ordered) {
    if (names.size === names.add(name).size)
      throw new FewbitError("argument/invalid", {
        name: "tensor name",
        value: name,
        expected: "a name used only once",
      });
    const offsets = `${position},${position + byteLength}`;
    entries.push(`${quote(name)}:{"dtype":"${dtype}","shape":[${shape.join(",")}],"data_offsets":[${offsets}]}`);
    position += byteLength;
  }
  const text = new TextEncoder().encode(`{${entries.join(",")}}`);
  const header = new Uint8Array(8 + Math.ceil(text.byteLength / 8) * 8).fill(0x20);
  if (header.byteLength - 8 > MAX_HEADER)
    throw new FewbitError("argument/invalid", {
      name: "the header's size",
      value: header.byteLength - 8,
      expected: `at most ${MAX_HEADER} bytes`,
    });
  new DataView(header.buffer).setBigUint64(0, BigInt(header.byteLength - 8), true);
  header.set(text, 8);
  return { header, ordered, size: header.byteLength + position };
}

function checkShape({ name, dtype, shape }: Described): number {
  const legal = shape.length <= MAX_RANK && shape.every((extent) => Number.isSafeInteger(extent) && extent >= 0);
  const bytes = legal ? byteLengthOf(dtype, shape) : undefined;
  if (bytes === undefined)
    throw new FewbitError("argument/invalid", {
      name: `the shape of ${name}`,
      value: `[${shape.join(", ")}]`,
      expected: `at most ${MAX_RANK} nonnegative integers whose product fits 2^53 - 1 bytes`,
    });
  return bytes;
}

function checkLength(name: string, got: number, expected: number): void {
  if (got !== expected)
    throw new FewbitError("argument/invalid", {
      name: `the data of ${name}`,
      value: `${got} bytes`,
      expected: `${expected} bytes`,
    });
}

function quote(text: string): string {
  if (/\p{Surrogate}/u.test(text))
    throw new FewbitError("argument/invalid", { name: "text", value: text, expected: "well-formed Unicode" });
  return JSON.stringify(text);
}

/** Rust compares strings by UTF-8 bytes, which is the order of code points and not of UTF-16 units. */
function compareCodePoints(a: string, b: string): number {
  const left = [...a];
  const right = [...b];
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    const difference = (left[i]?.codePointAt(0) as number) - (right[i]?.codePointAt(0) as number);
    if (difference !== 0) return difference;
  }
  return left.length - right.length;
}
