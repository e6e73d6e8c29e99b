import type { ChunkStore } from "./cache.js";

/*
 * Where a browser keeps pieces of downloads: the Cache API, or the origin's private file system where that is missing or refuses
 * them. Node has no types for either; what is used of them is declared here.
 */

export interface CacheStorage {
  open(name: string): Promise<{
    match(url: string): Promise<Response | undefined>;
    put(url: string, response: Response): Promise<void>;
    delete(url: string): Promise<boolean>;
  }>;
}

export interface DirectoryHandle {
  getDirectoryHandle(name: string, options?: { create?: boolean }): Promise<DirectoryHandle>;
  getFileHandle(name: string, options?: { create?: boolean }): Promise<FileHandle>;
  removeEntry(name: string): Promise<void>;
}

export interface FileHandle {
  getFile(): Promise<Blob>;
  /** What is written appears when it is closed. */
  createWritable(): Promise<{
    write(bytes: Uint8Array<ArrayBuffer>): Promise<void>;
    close(): Promise<void>;
    abort(): Promise<void>;
  }>;
}

/** The Cache API wants requests: keys are paths of a host that cannot exist. */
const ORIGIN = "https://fewbit.invalid/";

/** Pieces as responses of the Cache API. */
export function cacheApiStore(caches: CacheStorage): ChunkStore {
  let opened: ReturnType<CacheStorage["open"]> | undefined;
  const open = () => (opened ??= caches.open("fewbit"));
  return {
    async get(key) {
      const found = await (await open()).match(ORIGIN + key);
      return found === undefined ? null : new Uint8Array(await found.arrayBuffer());
    },
    put: async (key, bytes) => (await open()).put(ORIGIN + key, new Response(bytes as Uint8Array<ArrayBuffer>)),
    remove: async (key) => void (await (await open()).delete(ORIGIN + key)),
  };
}

/** Pieces as files of the origin's private file system, in a folder `fewbit` and one for each file that is downloaded. */
export function privateFileStore(root: () => Promise<DirectoryHandle>): ChunkStore {
  const folderOf = async (key: string, create: boolean) => {
    const parts = key.split("/");
    const file = parts.pop() as string;
    let folder = await (await root()).getDirectoryHandle("fewbit", { create });
    for (const part of parts) folder = await folder.getDirectoryHandle(part, { create });
    return { folder, file };
  };
  return {
    async get(key) {
      try {
        const { folder, file } = await folderOf(key, false);
        const blob = await (await folder.getFileHandle(file)).getFile();
        // A file whose writing was cut off is there and empty.
        return blob.size === 0 ? null : new Uint8Array(await blob.arrayBuffer());
      } catch (error) {
        if ((error as Error).name === "NotFoundError") return null;
        throw error;
      }
    },
    async put(key, bytes) {
      const { folder, file } = await folderOf(key, true);
      try {
        const writable = await (await folder.getFileHandle(file, { create: true })).createWritable();
        try {
          await writable.write(bytes as Uint8Array<ArrayBuffer>);
          await writable.close();
        } catch (error) {
          await writable.abort().catch(() => {});
          throw error;
        }
      } catch (error) {
        await folder.removeEntry(file).catch(() => {});
        throw error;
      }
    },
    async remove(key) {
      const { folder, file } = await folderOf(key, false);
      await folder.removeEntry(file);
    },
  };
}

/** Two stores as one: what the first refuses goes to the second, and so does everything after it. */
export function eitherStore(first: ChunkStore, second: ChunkStore): ChunkStore {
  let refused = false;
  const both = [first, second] as const;
  return {
    async get(key) {
      for (const store of both) {
        const found = await store.get(key).catch(() => null);
        if (found !== null) return found;
      }
      return null;
    },
    async put(key, bytes) {
      try {
        if (!refused) return await first.put(key, bytes);
      } catch {
        refused = true;
      }
      await second.put(key, bytes);
      // An older piece of the same key would be found before this one.
      await first.remove(key).catch(() => {});
    },
    remove: async (key) => void (await Promise.allSettled(both.map((store) => store.remove(key)))),
  };
}

/** The store of this browser; null where it keeps nothing (a page that is not served over HTTPS). */
export function browserStore(scope: unknown = globalThis): ChunkStore | null {
  const { caches, navigator } = scope as {
    caches?: CacheStorage;
    navigator?: { storage?: { getDirectory?: () => Promise<DirectoryHandle> } };
  };
  const storage = navigator?.storage;
  const first = caches === undefined ? null : cacheApiStore(caches);
  if (storage?.getDirectory === undefined) return first;
  const second = privateFileStore(() => (storage.getDirectory as () => Promise<DirectoryHandle>)());
  return first === null ? second : eitherStore(first, second);
}
