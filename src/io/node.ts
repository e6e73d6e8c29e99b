import { createHash } from "node:crypto";
import type { FileHandle } from "node:fs/promises";
import { mkdir, open, rename, rm, stat, unlink } from "node:fs/promises";
import { homedir } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { ChunkStore } from "./cache.js";
import type { Sha256 } from "./sha256.js";
import { type ByteSource, createSource, type FileSink } from "./source.js";

export { basename, dirname, join };

/** One read call asks for at most this much, so that an abort is noticed soon. */
const CHUNK = 16 * 2 ** 20;

/**
 * Opens a disk file for ranged reads.
 * @throws FewbitError `io/not-found`, `io/failed`
 */
export async function openFile(location: string | URL): Promise<ByteSource> {
  const path = toPath(location);
  // Opening a pipe would wait for a writer, so what it is comes first.
  if (!(await found(stat(path), path)).isFile())
    throw new FewbitError("io/not-found", { path, reason: "it is not a regular file" });
  const handle = await found(open(path, "r"), path);
  const size = await handle.stat().then(
    (opened) => opened.size,
    async (cause) => {
      await handle.close();
      throw new FewbitError("io/failed", { path, reason: (cause as Error).message }, { cause });
    },
  );
  return createSource({
    name: path,
    size,
    read: (offset, length, signal, memory) =>
      readRange(handle, path, offset, memory?.take(length) ?? new Uint8Array(length), signal),
    close: () => handle.close(),
  });
}

async function readRange(
  handle: FileHandle,
  path: string,
  offset: number,
  bytes: Uint8Array,
  signal: AbortSignal | undefined,
): Promise<Uint8Array> {
  const length = bytes.byteLength;
  for (let done = 0; done < length; ) {
    throwIfAborted(signal, `reading ${path}`);
    const { bytesRead } = await found(handle.read(bytes, done, Math.min(CHUNK, length - done), offset + done), path);
    if (bytesRead === 0) throw new FewbitError("io/failed", { path, reason: `it was cut at byte ${offset + done}` });
    done += bytesRead;
  }
  return bytes;
}

/**
 * The absolute path of an existing folder.
 * @throws FewbitError `io/not-found`
 */
export async function resolveFolder(location: string | URL): Promise<string> {
  const path = resolve(toPath(location));
  if (!(await found(stat(path), path)).isDirectory())
    throw new FewbitError("io/not-found", { path, reason: "it is not a folder" });
  return path;
}

/** Writes a file beside its final name and renames it on `close`: a reader never sees half of it. */
export async function createFile(location: string | URL): Promise<FileSink> {
  const path = toPath(location);
  const partial = `${path}.${globalThis.crypto.randomUUID().slice(0, 8)}.partial`;
  const handle = await found(open(partial, "wx"), path);
  const write = async (bytes: Uint8Array, position: number | null) => {
    for (let done = 0; done < bytes.byteLength; ) {
      const at = position === null ? null : position + done;
      const { bytesWritten } = await found(handle.write(bytes, done, bytes.byteLength - done, at), path);
      done += bytesWritten;
    }
  };
  return {
    write: (bytes) => write(bytes, null),
    writeAt: (position, bytes) => write(bytes, position),
    async close() {
      await found(handle.sync(), path);
      await handle.close();
      await found(rename(partial, path), path);
    },
    async abort() {
      await handle.close();
      await unlink(partial);
    },
  };
}

/** Removes a file; false when there is none. */
export async function removeFile(path: string): Promise<boolean> {
  try {
    await found(unlink(path), path);
    return true;
  } catch (error) {
    if (error instanceof FewbitError && error.code === "io/not-found") return false;
    throw error;
  }
}

/** Makes a folder and those above it. */
export async function makeFolder(path: string): Promise<string> {
  const folder = resolve(path);
  await found(mkdir(folder, { recursive: true }), folder);
  return folder;
}

/** The folder of downloads: FEWBIT_CACHE, or `fewbit` in the user's caches. */
export function cacheFolder(): string {
  const { FEWBIT_CACHE, XDG_CACHE_HOME } = process.env;
  return FEWBIT_CACHE || join(XDG_CACHE_HOME || join(homedir(), ".cache"), "fewbit");
}

/** Pieces of downloads as files of a folder. */
export function folderStore(folder = cacheFolder()): ChunkStore {
  return {
    async get(key, into) {
      try {
        const path = join(folder, key);
        const handle = await found(open(path, "r"), path);
        try {
          const { size } = await found(handle.stat(), path);
          const fits = into !== undefined && into.length >= size;
          return await readRange(handle, path, 0, fits ? into.subarray(0, size) : new Uint8Array(size), undefined);
        } finally {
          await handle.close();
        }
      } catch (error) {
        if (error instanceof FewbitError && error.code === "io/not-found") return null;
        throw error;
      }
    },
    async put(key, bytes) {
      const path = join(folder, key);
      await found(mkdir(dirname(path), { recursive: true }), path);
      const file = await createFile(path);
      try {
        await file.write(bytes);
        await file.close();
      } catch (error) {
        await file.abort().catch(() => {});
        throw error;
      }
    },
    remove: (key) => found(rm(join(folder, key), { force: true }), key),
  };
}

/** Node's own SHA-256, several times as fast as one in JavaScript. */
export function nativeSha256(): Sha256 {
  const hash = createHash("sha256");
  return { update: (bytes) => void hash.update(bytes), hex: () => hash.digest("hex") };
}

/** Whether a local path exists. */
export async function kindOf(path: string): Promise<"file" | "folder" | null> {
  try {
    const found = await stat(path);
    return found.isDirectory() ? "folder" : "file";
  } catch {
    return null;
  }
}

/** A path, or that of a `file:` URL. */
export function toPath(location: string | URL): string {
  if (typeof location === "string" && !location.startsWith("file:")) return location;
  try {
    return fileURLToPath(location);
  } catch (cause) {
    throw new FewbitError("io/not-found", { path: String(location), reason: (cause as Error).message }, { cause });
  }
}

/** Turns the file system's errors into ours. */
async function found<T>(operation: Promise<T>, path: string): Promise<T> {
  try {
    return await operation;
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const absent = code === "ENOENT" || code === "ENOTDIR";
    if (absent) throw new FewbitError("io/not-found", { path, reason: "it does not exist" }, { cause });
    throw new FewbitError("io/failed", { path, reason: code ? `${code}: ${message}` : message }, { cause });
  }
}
