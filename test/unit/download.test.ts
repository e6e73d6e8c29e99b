import { createHash } from "node:crypto";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type ChunkStore, type DownloadOptions, openCached } from "../../src/io/cache.js";
import { parseHubName } from "../../src/io/hub.js";
import { openModelFolder } from "../../src/io/model-folder.js";
import { folderStore } from "../../src/io/node.js";
import { openWeights } from "../../src/io/quantized.js";
import { sha256 } from "../../src/io/sha256.js";
import { readJson } from "../../src/io/source.js";
import { failure } from "../support/failure.js";
import { type GgufEntry, writeGguf } from "../support/gguf.js";
import { RangeServer } from "../support/range-server.js";
import { tinyModel } from "../support/tiny-model.js";

const DATA = Uint8Array.from({ length: 1_000_000 }, (_, i) => (i * 7 + (i >> 8)) & 255);
const SHA = createHash("sha256").update(DATA).digest("hex");
const CHUNK = 100_000;
const server = new RangeServer();
let folder: string;
beforeAll(() => server.start());
afterAll(() => server.close());
beforeEach(async () => {
  server.reset(new Map([["data.bin", DATA]]));
  folder = await mkdtemp(join(tmpdir(), "fewbit-"));
  return () => rm(folder, { recursive: true });
});

const open = (options: Partial<DownloadOptions> = {}) =>
  openCached(new URL("data.bin", server.base), {
    store: folderStore(folder),
    chunkBytes: CHUNK,
    retries: 0,
    ...options,
  });
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
      server.sent = 0;
      expectBytes(await source.read(0, DATA.length), DATA);
      expectBytes(await source.read(CHUNK - 1, 2 * CHUNK), DATA.subarray(CHUNK - 1, 3 * CHUNK - 1));
      expect(server.sent).toBe(fromCache ? 0 : DATA.length);
    }
  });

  test("cut at half resumes where it stopped, and is verified", async () => {
    server.budget = DATA.length / 2 + 1234;
    const cut = await failure(open({ sha256: SHA }));
    expect(cut.code).toBe("io/failed");
    // The one byte that asks for the size counts too.
    expect(await records()).toHaveLength(5);
    [server.budget, server.sent] = [Number.POSITIVE_INFINITY, 0];
    const progress: number[] = [];
    await using source = await open({ sha256: SHA, onProgress: ({ done, received }) => progress.push(done, received) });
    expect(server.sent).toBe(DATA.length / 2 + 1);
    expect(progress.slice(-2)).toEqual([DATA.length, DATA.length / 2]);
    expectBytes(await source.read(0, DATA.length), DATA);
  });

  test("with another SHA-256 than the server states is refused, and nothing of it is kept", async () => {
    server.files.set("data.bin", DATA.with(500_000, 1 + (DATA[500_000] as number)));
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
    server.sent = 0;
    const notices: string[] = [];
    await using source = await open({ sha256: SHA, onNotice: (text) => notices.push(text) });
    expectBytes(await source.read(0, DATA.length), DATA);
    expect(server.sent).toBe(CHUNK + 1);
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
    server.files.set("data.bin", DATA.subarray(0, 900_000));
    await using source = await open();
    expectBytes(await source.read(0, 900_000), DATA.subarray(0, 900_000));
  });
});

describe("a model that is not on this machine", () => {
  const options = () => ({
    cache: folderStore(folder),
    hubUrl: server.base.href.slice(0, -1),
    accessToken: "hf_secret",
    revision: "v1",
  });

  test("opens from a URL of its folder and from a name of the Hub, with the same tensors", async () => {
    server.files = tinyModel();
    for (const name of [server.base.href, "hf:o/m", "o/m"]) {
      const directory = await openModelFolder(name, options());
      expect(await readJson(directory, "config.json")).toMatchObject({ hidden_size: 32 });
      await using weights = await openWeights(directory, undefined);
      expect(weights.tensors.size).toBe(21);
      expect((await weights.read("model.norm.weight")).byteLength).toBe(64);
    }
    const resolved = server.paths.filter((path) => path.includes("/resolve/"));
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
    server.files = new Map([
      ["m-00001-of-00002.gguf", writeGguf({ ...metadata, ...split(0) }, [tensor("token_embd.weight", 1)])],
      ["m-00002-of-00002.gguf", writeGguf(split(1), [tensor("output.weight", 2)])],
    ]);
    const local = await mkdtemp(join(tmpdir(), "fewbit-parts-"));
    try {
      for (const [name, bytes] of server.files) await writeFile(join(local, name), bytes);
      const first = "m-00001-of-00002.gguf";
      for (const [name, bytes] of [...server.files]) server.files.set(`sub/${name}`, bytes);
      for (const name of [new URL(first, server.base).href, `o/m/${first}`, `o/m/sub/${first}`, join(local, first)]) {
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
