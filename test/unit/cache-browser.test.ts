import { createHash } from "node:crypto";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type ChunkStore, type DownloadOptions, openCached } from "../../src/io/cache.js";
import {
  browserStore,
  cacheApiStore,
  type DirectoryHandle,
  eitherStore,
  privateFileStore,
} from "../../src/io/cache-browser.js";
import { failure } from "../support/failure.js";
import { RangeServer } from "../support/range-server.js";

const DATA = Uint8Array.from({ length: 1_000_000 }, (_, i) => (i * 7 + (i >> 8)) & 255);
const SHA = createHash("sha256").update(DATA).digest("hex");
const CHUNK = 100_000;
const server = new RangeServer();
beforeAll(() => server.start());
afterAll(() => server.close());
beforeEach(() => server.reset(new Map([["data.bin", DATA]])));

const open = (options: Pick<DownloadOptions, "store"> & Partial<DownloadOptions>) =>
  openCached(new URL("data.bin", server.base), { chunkBytes: CHUNK, retries: 0, ...options });
/** toEqual takes seconds for a megabyte. */
const expectBytes = (got: Uint8Array, want: Uint8Array) => expect(Buffer.compare(got, want)).toBe(0);

test("the Cache API keeps pieces, and its quota does not stop a download", async () => {
  const kept = new Map<string, ArrayBuffer>();
  let quota = 5;
  const caches = {
    open: async () => ({
      match: async (url: string) => (kept.has(url) ? new Response(kept.get(url)) : undefined),
      put: async (url: string, response: Response) => {
        if (quota-- <= 0) throw new DOMException("Quota exceeded", "QuotaExceededError");
        kept.set(url, await response.arrayBuffer());
      },
      delete: async (url: string) => kept.delete(url),
    }),
  };
  const store = cacheApiStore(caches);
  for (const expected of [DATA.length, DATA.length / 2]) {
    const notices: string[] = [];
    await using source = await open({ store, onNotice: (text) => notices.push(text) });
    server.sent = 0;
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(server.sent).toBe(expected);
    expect(notices).toEqual([expect.stringContaining("Quota exceeded")]);
  }
  for (const url of kept.keys()) expect(url).toMatch(/^https:\/\/fewbit\.invalid\/[0-9a-f]{64}\/\d+$/);
});

/** A private file system that takes `quota` bytes, as browsers have it: an entry is there before anything is written to it. */
class PrivateFiles {
  readonly files = new Map<string, Uint8Array<ArrayBuffer>>();
  quota = Number.POSITIVE_INFINITY;
  readonly root = async () => this.#folder("");

  #folder(path: string): DirectoryHandle {
    const { files } = this;
    const missing = () => Object.assign(new Error("not found"), { name: "NotFoundError" });
    const open = async (name: string, { create = false } = {}) => {
      const key = path + name;
      if (!files.has(key) && !create) throw missing();
      if (!files.has(key)) files.set(key, new Uint8Array(0));
      let pending = new Uint8Array(0);
      return {
        getFile: async () => new Blob([files.get(key) as Uint8Array<ArrayBuffer>]),
        createWritable: async () => ({
          write: async (bytes: Uint8Array<ArrayBuffer>) => {
            const used = [...files.values()].reduce((sum, file) => sum + file.length, bytes.length);
            if (used > this.quota) throw Object.assign(new Error("Quota exceeded"), { name: "QuotaExceededError" });
            pending = bytes;
          },
          close: async () => void files.set(key, pending),
          abort: async () => {},
        }),
      };
    };
    return {
      getDirectoryHandle: async (name: string) => this.#folder(`${path}${name}/`),
      getFileHandle: open,
      removeEntry: async (name: string) => {
        if (!files.delete(path + name)) throw missing();
      },
    };
  }
}

describe("the private file system of a browser", () => {
  test("keeps pieces; cut in half, a download goes on there and is verified", async () => {
    const system = new PrivateFiles();
    const store = privateFileStore(system.root);
    // A byte tells the size of the file.
    server.budget = server.sent + 1 + DATA.length / 2;
    expect(await failure(open({ store, sha256: SHA }))).toMatchObject({ code: "io/failed" });
    server.budget = Number.POSITIVE_INFINITY;
    server.sent = 0;
    await using source = await open({ store, sha256: SHA });
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(server.sent).toBe(1 + DATA.length / 2);
    for (const name of system.files.keys()) expect(name).toMatch(/^fewbit\/[0-9a-f]{64}\/(\d+|sha256)$/);
  });

  test("finds a damaged piece, and takes one whose writing was cut off for none", async () => {
    const system = new PrivateFiles();
    const store = privateFileStore(system.root);
    await using first = await open({ store });
    await first.read(0, DATA.length);
    const named = (piece: number) => [...system.files.keys()].find((name) => name.endsWith(`/${piece}`)) as string;
    const piece = system.files.get(named(3)) as Uint8Array;
    piece[500] = (piece[500] as number) ^ 1;
    system.files.set(named(5), new Uint8Array(0));
    const notices: string[] = [];
    await using second = await open({ store, onNotice: (text) => notices.push(text) });
    server.sent = 0;
    expectBytes(await second.read(0, DATA.length), DATA);
    expect(server.sent).toBe(2 * CHUNK);
    expect(notices).toEqual([expect.stringContaining("piece 3")]);
  });

  test("does not stop a download by its quota, and keeps nothing half", async () => {
    const system = new PrivateFiles();
    system.quota = DATA.length / 2 + 32 * 10;
    const notices: string[] = [];
    await using source = await open({ store: privateFileStore(system.root), onNotice: (text) => notices.push(text) });
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(notices).toEqual([expect.stringContaining("Quota exceeded")]);
    expect([...system.files.values()].map((file) => file.length)).toEqual(Array(5).fill(CHUNK + 32));
  });

  test("takes what the Cache API refuses, which then is left alone", async () => {
    const system = new PrivateFiles();
    let tried = 0;
    const kept = new Map<string, Uint8Array>();
    const narrow: ChunkStore = {
      get: async (key) => kept.get(key) ?? null,
      put: async (key, bytes) => {
        tried++;
        if (kept.size === 4) throw new Error("too large");
        kept.set(key, bytes);
      },
      remove: async (key) => void kept.delete(key),
    };
    const store = eitherStore(narrow, privateFileStore(system.root));
    const notices: string[] = [];
    for (const expected of [DATA.length, 0]) {
      await using source = await open({ store, onNotice: (text) => notices.push(text) });
      server.sent = 0;
      expectBytes(await source.read(0, DATA.length), DATA);
      expect(server.sent).toBe(expected);
    }
    expect([kept.size, tried, system.files.size]).toEqual([4, 5, 6]);
    expect(notices).toEqual([]);
  });

  test("stands in for a Cache API that is not there or cannot be opened", async () => {
    const system = new PrivateFiles();
    const navigator = { storage: { getDirectory: system.root } };
    const denied = { open: () => Promise.reject(new Error("SecurityError")) };
    for (const scope of [{ navigator }, { navigator, caches: denied }]) {
      system.files.clear();
      const store = browserStore(scope) as ChunkStore;
      await store.put("a/1", Uint8Array.of(1, 2));
      expect(await store.get("a/1")).toEqual(Uint8Array.of(1, 2));
      expect([...system.files.keys()]).toEqual(["fewbit/a/1"]);
      await store.remove("a/1");
      expect(await store.get("a/1")).toBe(null);
    }
    expect(browserStore({})).toBe(null);
  });
});
