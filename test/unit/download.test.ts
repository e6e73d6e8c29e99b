import { createHash } from "node:crypto";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type ChunkStore, type DownloadOptions, openCached } from "../../src/io/cache.js";
import {
  browserStore,
  cacheApiStore,
  type DirectoryHandle,
  eitherStore,
  privateFileStore,
} from "../../src/io/cache-browser.js";
import { parseHubName } from "../../src/io/hub.js";
import { openModelFolder } from "../../src/io/model-folder.js";
import { folderStore } from "../../src/io/node.js";
import { openWeights } from "../../src/io/quantized.js";
import { sha256 } from "../../src/io/sha256.js";
import { readJson } from "../../src/io/source.js";
import { failure } from "../setup/safetensors.js";
import { type GgufEntry, writeGguf } from "../support/gguf.js";
import { tinyModel } from "../support/tiny-model.js";

const DATA = Uint8Array.from({ length: 1_000_000 }, (_, i) => (i * 7 + (i >> 8)) & 255);
const SHA = createHash("sha256").update(DATA).digest("hex");
const CHUNK = 100_000;

/** A server of ranges. `budget` bytes of bodies go out before connections are cut. */
let files = new Map<string, Uint8Array>();
let budget = Number.POSITIVE_INFINITY;
let sent = 0;
let paths: string[] = [];

function serve(request: IncomingMessage, response: ServerResponse): void {
  const path = new URL(request.url ?? "/", "http://x").pathname;
  paths.push(path);
  if (path.startsWith("/api/")) {
    hub(path, request, response);
    return;
  }
  const data = files.get(path.slice(1)) ?? files.get(path.replace(/^\/o\/m\/resolve\/[0-9a-f]+\//, ""));
  if (data === undefined) return void response.writeHead(404).end();
  const [first = 0, last = 0] = (/bytes=(\d+)-(\d+)/.exec(request.headers.range ?? "") ?? []).slice(1).map(Number);
  const body = data.subarray(first, last + 1);
  response.writeHead(206, { "Content-Range": `bytes ${first}-${last}/${data.length}`, ETag: '"1"' });
  const most = Math.max(0, budget - sent);
  sent += Math.min(most, body.length);
  if (most >= body.length) return void response.end(body);
  response.write(body.subarray(0, most), () => response.destroy());
}

/** What is used of the Hub's API. */
function hub(path: string, request: IncomingMessage, response: ServerResponse): void {
  const json = (value: unknown) =>
    response.writeHead(200, { "Content-Type": "application/json" }).end(JSON.stringify(value));
  if (request.headers.authorization !== "Bearer hf_secret") return void response.writeHead(401).end();
  if (path.startsWith("/api/models/o/m/paths-info/")) {
    let text = "";
    request.on("data", (piece) => {
      text += piece;
    });
    request.on("end", () => {
      const wanted = (JSON.parse(text) as { paths: string[] }).paths.filter((file) => files.has(file));
      json(
        wanted.map((file) => {
          const data = files.get(file) as Uint8Array;
          const oid = createHash("sha256").update(data).digest("hex");
          return {
            type: "file",
            path: file,
            size: data.length,
            oid: "0",
            ...(file.endsWith(".json") ? {} : { lfs: { oid, size: data.length, pointerSize: 1 } }),
          };
        }),
      );
    });
    return;
  }
  if (path === "/api/models/o/m/revision/v1")
    return void json({
      _id: "1",
      id: "o/m",
      private: false,
      gated: false,
      downloads: 0,
      likes: 0,
      lastModified: "2026-01-01T00:00:00Z",
      sha: "c0ffee".padEnd(40, "0"),
    });
  response.writeHead(404).end();
}

const server = createServer(serve);
let base: URL;
let folder: string;
beforeAll(async () => {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  base = new URL(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`);
});
afterAll(() => {
  server.closeAllConnections();
  server.close();
});
beforeEach(async () => {
  [files, budget, sent, paths] = [new Map([["data.bin", DATA]]), Number.POSITIVE_INFINITY, 0, []];
  folder = await mkdtemp(join(tmpdir(), "fewbit-"));
  return () => rm(folder, { recursive: true });
});

const open = (options: Partial<DownloadOptions> = {}) =>
  openCached(new URL("data.bin", base), { store: folderStore(folder), chunkBytes: CHUNK, retries: 0, ...options });
/** toEqual takes seconds for a megabyte. */
const expectBytes = (got: Uint8Array, want: Uint8Array) => expect(Buffer.compare(got, want)).toBe(0);
const records = async () => (await readdir(folder, { recursive: true })).filter((name) => /[/\\]\d+$/.test(name));

test("SHA-256 of pieces is SHA-256 (FIPS 180-4)", () => {
  for (const length of [0, 1, 55, 56, 63, 64, 65, 1000, 100_001]) {
    const data = DATA.subarray(0, length);
    const hash = sha256();
    for (let at = 0; at < length; at += 777) hash.update(data.subarray(at, Math.min(at + 777, length)));
    expect([length, hash.hex()]).toEqual([length, createHash("sha256").update(data).digest("hex")]);
  }
});

describe("a download", () => {
  test("read again comes from the cache, byte for byte", async () => {
    for (const fromCache of [false, true]) {
      await using source = await open();
      sent = 0;
      expectBytes(await source.read(0, DATA.length), DATA);
      expectBytes(await source.read(CHUNK - 1, 2 * CHUNK), DATA.subarray(CHUNK - 1, 3 * CHUNK - 1));
      expect(sent).toBe(fromCache ? 0 : DATA.length);
    }
  });

  test("cut at half resumes where it stopped, and is verified", async () => {
    budget = DATA.length / 2 + 1234;
    const cut = await failure(open({ sha256: SHA }));
    expect(cut.code).toBe("io/failed");
    // The one byte that asks for the size counts too.
    expect(await records()).toHaveLength(5);
    [budget, sent] = [Number.POSITIVE_INFINITY, 0];
    const progress: number[] = [];
    await using source = await open({ sha256: SHA, onProgress: ({ done, received }) => progress.push(done, received) });
    expect(sent).toBe(DATA.length / 2 + 1);
    expect(progress.slice(-2)).toEqual([DATA.length, DATA.length / 2]);
    expectBytes(await source.read(0, DATA.length), DATA);
  });

  test("with another SHA-256 than the server states is refused, and nothing of it is kept", async () => {
    files.set("data.bin", DATA.with(500_000, 1 + (DATA[500_000] as number)));
    const error = await failure(open({ sha256: SHA }));
    expect(error.code).toBe("io/failed");
    expect(error.message).toContain(`the server states ${SHA}`);
    expect(await records()).toHaveLength(0);
  });

  test("damaged in the cache is found and fetched again, that piece alone", async () => {
    await (await open({ sha256: SHA })).read(0, DATA.length);
    const [record] = (await records()).filter((name) => name.endsWith("7"));
    const path = join(folder, record as string);
    const bytes = await readFile(path);
    bytes[1000] = (bytes[1000] as number) ^ 1;
    await writeFile(path, bytes);
    sent = 0;
    const notices: string[] = [];
    await using source = await open({ sha256: SHA, onNotice: (text) => notices.push(text) });
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(sent).toBe(CHUNK + 1);
    expect(notices).toEqual([expect.stringContaining("piece 7")]);
  });

  test("goes on when the cache is full", async () => {
    let room = 3;
    const store: ChunkStore = folderStore(folder);
    const small: ChunkStore = {
      ...store,
      put: (key, bytes) =>
        room-- > 0 ? store.put(key, bytes) : Promise.reject(new Error("ENOSPC: no space left on device")),
    };
    const notices: string[] = [];
    await using source = await open({ store: small, sha256: SHA, onNotice: (text) => notices.push(text) });
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(notices).toEqual([expect.stringContaining("ENOSPC"), expect.stringContaining("is not checked")]);
    expect(await records()).toHaveLength(3);
  });

  test("stops when its signal fires, and leaves no half piece", async () => {
    const stop = new AbortController();
    const error = await failure(open({ sha256: SHA, signal: stop.signal, onProgress: () => stop.abort() }));
    expect(error.code).toBe("operation/aborted");
    expect((await readdir(folder, { recursive: true })).filter((name) => name.endsWith(".partial"))).toEqual([]);
  });

  test("of a file that changed on the server is another file", async () => {
    await (await open()).read(0, DATA.length);
    files.set("data.bin", DATA.subarray(0, 900_000));
    await using source = await open();
    expectBytes(await source.read(0, 900_000), DATA.subarray(0, 900_000));
  });
});

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
    sent = 0;
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(sent).toBe(expected);
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
    budget = sent + 1 + DATA.length / 2;
    expect(await failure(open({ store, sha256: SHA }))).toMatchObject({ code: "io/failed" });
    budget = Number.POSITIVE_INFINITY;
    sent = 0;
    await using source = await open({ store, sha256: SHA });
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(sent).toBe(1 + DATA.length / 2);
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
    sent = 0;
    expectBytes(await second.read(0, DATA.length), DATA);
    expect(sent).toBe(2 * CHUNK);
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
      sent = 0;
      expectBytes(await source.read(0, DATA.length), DATA);
      expect(sent).toBe(expected);
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

describe("a model that is not on this machine", () => {
  const options = () => ({
    cache: folderStore(folder),
    hubUrl: base.href.slice(0, -1),
    accessToken: "hf_secret",
    revision: "v1",
  });

  test("opens from a URL of its folder and from a name of the Hub, with the same tensors", async () => {
    files = tinyModel();
    for (const name of [base.href, "hf:o/m", "o/m"]) {
      const directory = await openModelFolder(name, options());
      expect(await readJson(directory, "config.json")).toMatchObject({ hidden_size: 32 });
      await using weights = await openWeights(directory, undefined);
      expect(weights.tensors.size).toBe(21);
      expect((await weights.read("model.norm.weight")).byteLength).toBe(64);
    }
    const resolved = paths.filter((path) => path.includes("/resolve/"));
    expect(resolved.length).toBeGreaterThan(0);
    for (const path of resolved) expect(path).toContain(`/resolve/${"c0ffee".padEnd(40, "0")}/`);
  });

  test("in several GGUF files opens from the first, under a URL, by a name of the Hub and in a folder", async () => {
    const metadata = {
      "general.architecture": [8, "qwen2"],
      "qwen2.block_count": [4, 1],
      "qwen2.context_length": [4, 64],
      "qwen2.embedding_length": [4, 32],
      "qwen2.feed_forward_length": [4, 64],
      "qwen2.attention.head_count": [4, 2],
      "qwen2.attention.layer_norm_rms_epsilon": [6, 1e-6],
    } as const satisfies Record<string, GgufEntry>;
    const tensor = (name: string, fill: number) => {
      const data = new Uint8Array(new Float32Array(64).fill(fill).buffer);
      return { name, type: 0, shape: [2, 32], data };
    };
    const split = (no: number) => ({ "split.no": [2, no], "split.count": [2, 2] }) as const;
    files = new Map([
      ["m-00001-of-00002.gguf", writeGguf({ ...metadata, ...split(0) }, [tensor("token_embd.weight", 1)])],
      ["m-00002-of-00002.gguf", writeGguf(split(1), [tensor("output.weight", 2)])],
    ]);
    const local = await mkdtemp(join(tmpdir(), "fewbit-parts-"));
    try {
      for (const [name, bytes] of files) await writeFile(join(local, name), bytes);
      const first = "m-00001-of-00002.gguf";
      for (const [name, bytes] of [...files]) files.set(`sub/${name}`, bytes);
      for (const name of [new URL(first, base).href, `o/m/${first}`, `o/m/sub/${first}`, join(local, first)]) {
        await using weights = await openWeights(await openModelFolder(name, options()), undefined);
        const head = await weights.read("lm_head.weight");
        expect([...new Float32Array(head.slice().buffer)]).toEqual(Array(64).fill(2));
      }
    } finally {
      await rm(local, { recursive: true });
    }
  });

  test("is not found by name without access, at another revision, or without the file", async () => {
    const denied = await failure(openModelFolder("o/m", { ...options(), accessToken: "hf_other" }));
    expect(denied.code).toBe("io/not-found");
    expect(await failure(openModelFolder("o/m", { ...options(), revision: "v2" }))).toMatchObject({
      code: "io/not-found",
    });
    const directory = await openModelFolder("o/m", options());
    expect(await failure(directory.open("config.json"))).toMatchObject({ code: "io/not-found" });
  });

  test("has a name of two parts", () => {
    expect(parseHubName("owner/name")).toEqual({ repo: "owner/name", file: null });
    expect(parseHubName("hf:owner/name/x-Q4_K_M.gguf")).toEqual({ repo: "owner/name", file: "x-Q4_K_M.gguf" });
    expect(parseHubName("owner/name/Q4_K_M/x.gguf")).toEqual({ repo: "owner/name", file: "Q4_K_M/x.gguf" });
    for (const other of ["name", "./a/b", "a/b/c", "../a", "/a/b", "C:\\a", "a/b/../d.gguf", "a/b//d.gguf"])
      expect(parseHubName(other)).toBeNull();
  });
});
