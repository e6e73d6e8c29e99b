import { FewbitError, throwIfAborted } from "../core/errors.js";
import { Staging } from "../core/staging.js";
import { browserStore } from "./cache-browser.js";
import { displayName, openUrl, type UrlOptions } from "./http.js";
import { sha256 } from "./sha256.js";
import { type ByteSource, createSource, isNode, nodeModule } from "./source.js";

/** Where pieces of downloads are kept: a folder (Node), the Cache API or private files (browsers), or anything else. */
export interface ChunkStore {
  /** The bytes under a key (of letters, digits and `/`), or null. They may be put into `into`, where they fit. */
  get(key: string, into?: Uint8Array): Promise<Uint8Array | null>;
  /** Appears whole or not at all. Rejects when there is no room. */
  put(key: string, bytes: Uint8Array): Promise<void>;
  remove(key: string): Promise<void>;
}

/** How far a file is here. */
export interface DownloadProgress {
  readonly name: string;
  /** Bytes that are here, from the cache or the network, of all. */
  readonly done: number;
  readonly total: number;
  /** Bytes that came over the network so far, and how many a second. */
  readonly received: number;
  readonly rate: number;
}

export interface DownloadOptions extends UrlOptions {
  readonly store: ChunkStore;
  /** The digest that the server states. The file is then downloaded and verified before anything of it is used. */
  readonly sha256?: string;
  /** Bytes of a piece; default 4 MiB. */
  readonly chunkBytes?: number;
  readonly onProgress?: (progress: DownloadProgress) => void;
  /** What does not stop the run and should be known: a damaged piece, a full cache. */
  readonly onNotice?: (text: string) => void;
}

const DIGEST = 32;

/**
 * Opens a URL through a cache of pieces. Each piece is stored with its SHA-256 and checked whenever it is read: a damaged one is
 * fetched again, and an interrupted download goes on where it stopped. The key has the URL, the size and the ETag, so that a
 * changed file is another one. A cache that takes no more pieces is left alone.
 * @throws FewbitError as `openUrl`; `io/failed` when the file has another SHA-256 than `options.sha256`
 */
export async function openCached(url: URL, options: DownloadOptions): Promise<ByteSource> {
  const { store, chunkBytes = 4 * 2 ** 20, signal } = options;
  const remote = await openUrl(url, options);
  const { name, size } = remote;
  const key = await digestHex(
    new TextEncoder().encode(`${displayName(url)}\n${size}\n${remote.etag ?? ""}\n${chunkBytes}`),
  );
  const count = Math.ceil(size / chunkBytes);
  const here = new Set<number>();
  const begun = performance.now();
  let received = 0;
  let full = false;
  let last: { index: number; bytes: Uint8Array } | undefined;
  const memory = new Staging();
  let turn: Promise<unknown> = Promise.resolve();

  const report = () => {
    const rate = received / Math.max(1e-3, (performance.now() - begun) / 1000);
    options.onProgress?.({ name, done: Math.min(size, here.size * chunkBytes), total: size, received, rate });
  };

  async function cached(index: number): Promise<Uint8Array | null> {
    const length = Math.min(chunkBytes, size - index * chunkBytes);
    const record = await store.get(`${key}/${index}`, memory.take(DIGEST + length)).catch(() => null);
    if (record === null) return null;
    const bytes = record.subarray(DIGEST);
    const sound = bytes.byteLength === length && sameBytes(await digest(bytes), record.subarray(0, DIGEST));
    if (sound) return bytes;
    options.onNotice?.(`piece ${index} of ${name} was damaged in the cache and is fetched again`);
    return null;
  }

  async function keep(path: string, bytes: Uint8Array): Promise<void> {
    if (full) return;
    try {
      await store.put(`${key}/${path}`, bytes);
    } catch (error) {
      full = true;
      options.onNotice?.(
        `the cache takes no more of ${name} (${(error as Error).message}): it is read from the network`,
      );
    }
  }

  async function fetchPiece(index: number, stop: AbortSignal | undefined): Promise<Uint8Array> {
    const offset = index * chunkBytes;
    const bytes = await remote.read(offset, Math.min(chunkBytes, size - offset), stop, memory);
    received += bytes.byteLength;
    const record = new Uint8Array(DIGEST + bytes.byteLength);
    record.set(await digest(bytes));
    record.set(bytes, DIGEST);
    await keep(String(index), record);
    return bytes;
  }

  /** One piece, good until the next; it stays in memory, because headers are read a few bytes at a time. */
  async function piece(index: number, stop: AbortSignal | undefined): Promise<Uint8Array> {
    if (last?.index === index) return last.bytes;
    last = undefined;
    memory.release();
    const bytes = (await cached(index)) ?? (await fetchPiece(index, stop));
    last = { index, bytes };
    here.add(index);
    report();
    return bytes;
  }

  /** One read after another: all pieces are in the same memory. */
  function inTurn<T>(body: () => Promise<T>): Promise<T> {
    const mine = turn.then(body);
    turn = mine.catch(() => {});
    return mine;
  }

  async function verify(expected: string): Promise<void> {
    const known = await store.get(`${key}/sha256`).catch(() => null);
    if (known !== null && new TextDecoder().decode(known) === expected) return;
    const hash = isNode() ? (await nodeModule(name)).nativeSha256() : sha256();
    for (let index = 0; index < count; index++) {
      throwIfAborted(signal, `downloading ${name}`);
      hash.update(await piece(index, signal));
      if (full) {
        options.onNotice?.(`${name} is not checked against the server's SHA-256, for which it would have to be kept`);
        return;
      }
    }
    const got = hash.hex();
    if (got !== expected) {
      for (let index = 0; index < count; index++) await store.remove(`${key}/${index}`).catch(() => {});
      throw new FewbitError(
        "io/failed",
        { path: name, reason: `its SHA-256 is ${got}, the server states ${expected}` },
        { hint: "what was downloaded is thrown away: try again" },
      );
    }
    await keep("sha256", new TextEncoder().encode(expected));
  }

  try {
    if (options.sha256 !== undefined) await verify(options.sha256.toLowerCase());
  } catch (error) {
    await remote.close();
    throw error;
  }
  return createSource({
    name,
    size,
    close: () => remote.close(),
    read: (offset, length, stop, into) =>
      inTurn(async () => {
        const end = offset + length;
        const out = into?.take(length) ?? new Uint8Array(length);
        for (let index = Math.floor(offset / chunkBytes); index * chunkBytes < end; index++) {
          const from = Math.max(offset, index * chunkBytes);
          const bytes = await piece(index, stop);
          out.set(bytes.subarray(from - index * chunkBytes, end - index * chunkBytes), from - offset);
        }
        return out;
      }),
  });
}

/** The store of this platform: a folder of the user's caches, or what the browser keeps; null where there is neither. */
export async function defaultStore(): Promise<ChunkStore | null> {
  return isNode() ? (await nodeModule("the cache")).folderStore() : browserStore();
}

async function digest(bytes: Uint8Array): Promise<Uint8Array> {
  // WebCrypto copies what it hashes.
  if (isNode()) {
    const hash = (await nodeModule("the cache")).nativeSha256();
    hash.update(bytes);
    return Uint8Array.from(hash.hex().match(/../g) ?? [], (pair) => Number.parseInt(pair, 16));
  }
  return new Uint8Array(await globalThis.crypto.subtle.digest("SHA-256", bytes as Uint8Array<ArrayBuffer>));
}

async function digestHex(bytes: Uint8Array): Promise<string> {
  return [...(await digest(bytes))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return a.byteLength === b.byteLength && a.every((byte, i) => byte === b[i]);
}
