import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { Staging } from "../core/staging.js";
import type { TensorStore } from "./safetensors.js";

/** A file that is read by ranges: a disk file, memory, a browser Blob, or an HTTP(S) URL. */
export interface ByteSource extends AsyncDisposable {
  /** What messages call it: a path, or a URL without its query (which may hold a secret). */
  readonly name: string;
  /** Bytes in the file. */
  readonly size: number;
  /**
   * Exactly the `length` bytes from byte `offset`. The array may be a view of the source's own memory: do not write to it. Or it lies
   * in `memory`, until that is released.
   * @throws FewbitError `argument/invalid` (range outside the file), `io/failed`, `operation/aborted`, `object/disposed`
   */
  read(offset: number, length: number, signal?: AbortSignal, memory?: Staging): Promise<Uint8Array>;
  /** Frees the file; safe to call twice. Later reads throw `object/disposed`. */
  close(): Promise<void>;
}

/** Where bytes are written in order. Nothing exists under the final name until `close`; `abort` leaves nothing behind. */
export interface ByteSink {
  write(bytes: Uint8Array): Promise<void>;
  close(): Promise<void>;
  abort(): Promise<void>;
}

/** A file whose size is known from the start, written in any order. As `ByteSink`, it appears when it is closed. */
export interface FileSink extends ByteSink {
  writeAt(position: number, bytes: Uint8Array): Promise<void>;
}

/** A flat folder of files, wherever it is. */
export interface SourceDirectory {
  readonly name: string;
  /**
   * Opens one file of the folder by its plain name.
   * @throws FewbitError `argument/invalid` (not a plain file name), `io/not-found`, `io/failed`
   */
  open(file: string, signal?: AbortSignal): Promise<ByteSource>;
  /** The weights, where they do not lie in safetensors files of the folder. */
  readonly weights?: (options: { signal?: AbortSignal }) => Promise<TensorStore>;
}

/** Bytes that are already here. */
export type MemoryInput = Blob | Uint8Array;

export interface OpenOptions {
  signal?: AbortSignal;
  /** HTTP(S) only: request headers, such as an access token. */
  headers?: Readonly<Record<string, string>>;
}

/** What one kind of source has to provide; `createSource` adds every check that is common to all kinds. */
export interface RawSource {
  readonly name: string;
  readonly size: number;
  /** `offset` and `length` lie inside the file and `length` is positive. */
  read(offset: number, length: number, signal: AbortSignal | undefined, memory?: Staging): Promise<Uint8Array>;
  close?(): Promise<void>;
}

/** Completes a raw source: ranges, abort and use after close are checked here, once for every kind. */
export function createSource(raw: RawSource): ByteSource {
  let closing: Promise<void> | undefined;
  const close = () => (closing ??= raw.close?.() ?? Promise.resolve());
  return {
    name: raw.name,
    size: raw.size,
    close,
    [Symbol.asyncDispose]: close,
    async read(offset, length, signal, memory) {
      if (closing) throw new FewbitError("object/disposed", { object: raw.name });
      throwIfAborted(signal, `reading ${raw.name}`);
      const legal = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
      if (!legal || offset + length > raw.size)
        throw new FewbitError("argument/invalid", {
          name: "range",
          value: `[${offset}, ${offset + length})`,
          expected: `a range inside the ${raw.size} bytes of ${raw.name}`,
        });
      if (length === 0) return new Uint8Array(0);
      const bytes = await raw.read(offset, length, signal, memory);
      throwIfAborted(signal, `reading ${raw.name}`);
      return bytes;
    },
  };
}

/**
 * Opens a file for ranged reads. A string is a URL when it starts with `http://` or `https://`, otherwise a path (Node).
 * @throws FewbitError `io/not-found`, `io/failed`, `operation/aborted`
 */
export async function openSource(input: string | URL | MemoryInput, options: OpenOptions = {}): Promise<ByteSource> {
  throwIfAborted(options.signal, "opening a file");
  if (typeof input !== "string" && !(input instanceof URL)) return memorySource(input);
  if (isHttp(input)) return (await import("./http.js")).openUrl(new URL(input), options);
  return (await nodeModule(String(input))).openFile(input);
}

/** A source over bytes or a Blob; reading bytes gives views of them, reading a Blob reads only the range. */
export function memorySource(input: MemoryInput, name = "memory"): ByteSource {
  if (input instanceof Uint8Array)
    return createSource({
      name,
      size: input.byteLength,
      read: async (offset, length) => input.subarray(offset, offset + length),
    });
  return createSource({
    name: "name" in input && typeof input.name === "string" ? input.name : name,
    size: input.size,
    async read(offset, length) {
      try {
        return new Uint8Array(await input.slice(offset, offset + length).arrayBuffer());
      } catch (cause) {
        throw new FewbitError("io/failed", { path: name, reason: "the Blob cannot be read any more" }, { cause });
      }
    },
  });
}

/**
 * Opens a folder: a path or `file:` URL (Node), an HTTP(S) URL under which the files lie, or files by name.
 * @throws FewbitError `io/not-found` when a local folder does not exist
 */
export async function openDirectory(
  input: string | URL | ReadonlyMap<string, MemoryInput>,
  options: OpenOptions = {},
): Promise<SourceDirectory> {
  throwIfAborted(options.signal, "opening a folder");
  if (input instanceof Map) {
    return createDirectory("memory", async (file) => {
      const found: MemoryInput | undefined = input.get(file);
      if (!found) throw new FewbitError("io/not-found", { path: file, reason: "it is not among the given files" });
      return memorySource(found, file);
    });
  }
  const location = input as string | URL;
  if (isHttp(location)) {
    const base = new URL(location);
    if (!base.pathname.endsWith("/")) base.pathname += "/";
    const { openUrl, displayName } = await import("./http.js");
    return createDirectory(displayName(base), (file, signal) => {
      const url = new URL(encodeURIComponent(file), base);
      url.search = base.search;
      return openUrl(url, { ...options, ...(signal && { signal }) });
    });
  }
  const node = await nodeModule(String(location));
  const path = await node.resolveFolder(location);
  return createDirectory(path, (file) => node.openFile(node.join(path, file)));
}

/** A folder whose names are checked here, once for every kind. */
export function createDirectory(
  name: string,
  open: (file: string, signal: AbortSignal | undefined) => Promise<ByteSource>,
): SourceDirectory {
  return {
    name,
    async open(file, signal) {
      if (!isPlainFileName(file))
        throw new FewbitError("argument/invalid", { name: "file", value: file, expected: "a plain file name" });
      throwIfAborted(signal, `opening ${file}`);
      return open(file, signal);
    },
  };
}

/** True for a name that stays inside its folder on every platform: no separator, drive, NUL, `.` or `..`. */
export function isPlainFileName(file: string): boolean {
  return file.length > 0 && file !== "." && file !== ".." && !/[/\\:\0]/.test(file);
}

/**
 * Reads one JSON object of a folder (config.json, tokenizer.json).
 * @throws FewbitError `io/malformed` when it is larger than `maxBytes` (default 128 MiB), not UTF-8, not JSON, or no object
 */
export async function readJson(
  directory: SourceDirectory,
  file: string,
  options: { signal?: AbortSignal; maxBytes?: number } = {},
): Promise<Record<string, unknown>> {
  await using source = await directory.open(file, options.signal);
  const text = await readText(source, options);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new FewbitError("io/malformed", { path: source.name, reason: (cause as Error).message }, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new FewbitError("io/malformed", { path: source.name, reason: "it is not a JSON object" });
  return value as Record<string, unknown>;
}

/** Reads a whole UTF-8 file of at most `maxBytes` (default 128 MiB). */
export async function readText(
  source: ByteSource,
  options: { signal?: AbortSignal; maxBytes?: number } = {},
): Promise<string> {
  const limit = options.maxBytes ?? 128 * 2 ** 20;
  if (source.size > limit)
    throw new FewbitError("io/malformed", {
      path: source.name,
      reason: `it has ${source.size} bytes, the limit is ${limit}`,
    });
  return decodeUtf8(await source.read(0, source.size, options.signal), source.name);
}

/** Strict UTF-8: malformed bytes are an `io/malformed` error, never replacement characters. */
export function decodeUtf8(bytes: Uint8Array, path: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw new FewbitError("io/malformed", { path, reason: "the text is not valid UTF-8" }, { cause });
  }
}

export function isHttp(input: string | URL): boolean {
  return /^https?:\/\//i.test(String(input));
}

/** Whether this is Node and not a web page. */
export function isNode(): boolean {
  const { process } = globalThis as { process?: { versions?: { node?: string } } };
  return Boolean(process?.versions?.node);
}

/** The only way to `node:` modules, so that a web page never loads them. */
export async function nodeModule(path: string): Promise<typeof import("./node.js")> {
  if (!isNode())
    throw new FewbitError(
      "io/not-found",
      { path, reason: "a web page has no file system" },
      { hint: "pass a URL, a Blob, or bytes" },
    );
  return import("./node.js");
}
