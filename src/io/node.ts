import type { FileHandle } from "node:fs/promises";
import { open, rename, stat, unlink } from "node:fs/promises";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { type ByteSink, type ByteSource, createSource } from "./source.js";

export { join };

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
    read: (offset, length, signal) => readRange(handle, path, offset, length, signal),
    close: () => handle.close(),
  });
}

async function readRange(
  handle: FileHandle,
  path: string,
  offset: number,
  length: number,
  signal: AbortSignal | undefined,
): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
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
export async function createFile(location: string | URL): Promise<ByteSink> {
  const path = toPath(location);
  const partial = `${path}.${globalThis.crypto.randomUUID().slice(0, 8)}.partial`;
  const handle = await found(open(partial, "wx"), path);
  return {
    async write(bytes) {
      for (let done = 0; done < bytes.byteLength; ) {
        const { bytesWritten } = await found(handle.write(bytes, done, bytes.byteLength - done), path);
        done += bytesWritten;
      }
    },
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

function toPath(location: string | URL): string {
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
