import { mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openUrl } from "../../src/io/http.js";
import { type ByteSource, memorySource, openDirectory, openSource, readJson } from "../../src/io/source.js";
import { failure } from "../support/failure.js";

const DATA = Uint8Array.from({ length: 200_000 }, (_, i) => (i * 7 + (i >> 8)) & 255);

type Answer = (request: IncomingMessage, response: ServerResponse, first: number, last: number) => void;

/** An honest server: 206 with exactly the range. */
const honest: Answer = (_, response, first, last) => {
  response.writeHead(206, { "Content-Range": `bytes ${first}-${last}/${DATA.length}`, ETag: '"1"' });
  response.end(DATA.subarray(first, last + 1));
};

let answer: Answer = honest;
let requests: string[] = [];
const server = createServer((request, response) => {
  requests.push(request.headers.range ?? "none");
  const [first, last] = (/bytes=(\d+)-(\d+)/.exec(request.headers.range ?? "") ?? []).slice(1).map(Number);
  answer(request, response, first ?? 0, last ?? DATA.length - 1);
});
let base: URL;
let folder: string;

beforeAll(async () => {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  base = new URL(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`);
  folder = await mkdtemp(join(tmpdir(), "fewbit-"));
  await writeFile(join(folder, "data.bin"), DATA);
});
afterAll(async () => {
  server.closeAllConnections();
  server.close();
  await rm(folder, { recursive: true });
});

/** Serves with `next` for the duration of `body`. */
async function serving<T>(next: Answer, body: (url: URL) => Promise<T>): Promise<T> {
  answer = next;
  requests = [];
  try {
    return await body(new URL("data.bin?token=secret", base));
  } finally {
    answer = honest;
  }
}

describe("every kind of source", () => {
  const kinds: [kind: string, open: () => Promise<ByteSource>][] = [
    ["a path", () => openSource(join(folder, "data.bin"))],
    ["a file URL", () => openSource(pathToFileURL(join(folder, "data.bin")))],
    ["bytes", () => openSource(DATA)],
    ["a Blob", () => openSource(new Blob([DATA]))],
    ["an HTTP URL", () => openSource(new URL("data.bin", base).href)],
    ["a file of a local folder", async () => (await openDirectory(folder)).open("data.bin")],
    ["a file of a web folder", async () => (await openDirectory(base)).open("data.bin")],
    ["a file of given files", async () => (await openDirectory(new Map([["data.bin", DATA]]))).open("data.bin")],
  ];
  for (const [kind, open] of kinds)
    test(`${kind}: gives exactly the asked bytes, refuses others, and is dead after close`, async () => {
      const source = await open();
      expect(source.size).toBe(DATA.length);
      expect(await source.read(1000, 70_000)).toEqual(DATA.subarray(1000, 71_000));
      expect((await source.read(DATA.length, 0)).byteLength).toBe(0);
      for (const [offset, length] of [
        [-1, 2],
        [0, DATA.length + 1],
        [0.5, 1],
        [2 ** 53, 1],
        [0, Number.NaN],
      ] as const)
        expect(await failure(source.read(offset, length))).toMatchObject({ code: "argument/invalid" });
      const signal = AbortSignal.abort();
      expect(await failure(source.read(0, 1, signal))).toMatchObject({ code: "operation/aborted" });
      await source.close();
      await source.close();
      expect(await failure(source.read(0, 1))).toMatchObject({ code: "object/disposed" });
    });
});

describe("files and folders", () => {
  test("what is absent, or no file, is not found", async () => {
    for (const path of [join(folder, "absent"), folder, "file:///absent/x", join(folder, "data.bin", "x")])
      expect(await failure(openSource(path))).toMatchObject({ code: "io/not-found" });
    expect(await failure(openDirectory(join(folder, "data.bin")))).toMatchObject({ code: "io/not-found" });
  });

  test("a file that was cut after it was opened is an error, not zeros", async () => {
    const path = join(folder, "shrinks");
    await writeFile(path, DATA);
    await using source = await openSource(path);
    await truncate(path, 100);
    expect((await failure(source.read(0, 200))).message).toContain("it was cut at byte 100");
  });

  test("a name that leaves its folder is refused", async () => {
    const directory = await openDirectory(folder);
    for (const name of ["../x", "a/b", "a\\b", "..", ".", "", "C:x", "a\0"])
      expect(await failure(directory.open(name))).toMatchObject({ code: "argument/invalid" });
  });

  test("JSON files are objects of strict UTF-8 within the limit", async () => {
    const files = { ok: '{"a":1}', list: "[]", broken: "{", big: `"${"x".repeat(99)}"` };
    const entries = Object.entries(files).map(([name, text]) => [name, new TextEncoder().encode(text)] as const);
    const directory = await openDirectory(new Map([...entries, ["latin", Uint8Array.of(0x22, 0xe9, 0x22)]]));
    expect(await readJson(directory, "ok")).toEqual({ a: 1 });
    for (const name of ["list", "broken", "big", "latin"])
      expect(await failure(readJson(directory, name, { maxBytes: 50 }))).toMatchObject({ code: "io/malformed" });
    expect(memorySource(DATA).name).toBe("memory");
  });
});

describe("HTTP", () => {
  const fast = { retries: 3, retryDelay: 1 };

  test("a cut connection is taken up where it stopped", async () => {
    const cutting: Answer = (_, response, first, last) => {
      response.writeHead(206, { "Content-Range": `bytes ${first}-${last}/${DATA.length}` });
      const end = Math.min(last + 1, first + 40_000);
      response.write(DATA.subarray(first, end), () => (end > last ? response.end() : response.destroy()));
    };
    await serving(cutting, async (url) => {
      await using source = await openUrl(url, fast);
      expect(await source.read(0, 120_000)).toEqual(DATA.subarray(0, 120_000));
    });
    const starts = requests.slice(1).map((range) => Number(/=(\d+)-119999/.exec(range)?.[1]));
    expect(starts.length).toBeGreaterThan(1);
    expect(starts).toEqual([...starts].sort((a, b) => a - b));
    expect(starts[1]).toBeGreaterThan(0);
  });

  test("a server that never delivers is given up after the allowed attempts", async () => {
    const dead: Answer = (request, response, first, last) =>
      last === 0 ? honest(request, response, first, last) : response.destroy();
    const error = await serving(dead, async (url) => {
      await using source = await openUrl(url, fast);
      return failure(source.read(0, 1000));
    });
    expect(error.code).toBe("io/failed");
    expect(error.message).toContain("gave up after 4 attempts");
    expect(requests.length).toBe(1 + 4);
    expect(error.message).not.toContain("secret");
  });

  const status =
    (code: number, headers: Record<string, string> = {}): Answer =>
    (_, response) =>
      response.writeHead(code, headers).end("x");
  const refused: [law: string, answer: Answer, code: string, reason: string][] = [
    ["a missing file", status(404), "io/not-found", "HTTP 404"],
    ["a refusal", status(403), "io/failed", "HTTP 403"],
    ["a server without ranges", status(200), "io/failed", "does not answer Range requests"],
    ["a reply without Content-Range", status(206), "io/failed", 'Content-Range ""'],
    ["an unknown size", status(206, { "Content-Range": "bytes 0-0/*" }), "io/failed", "bytes 0-0/*"],
    ["a range that was not asked for", status(206, { "Content-Range": "bytes 5-5/9" }), "io/failed", "bytes 5-5/9"],
    [
      "an impossible size",
      status(206, { "Content-Range": `bytes 0-0/${"9".repeat(20)}` }),
      "io/failed",
      "Content-Range",
    ],
    ["a busy server", status(503), "io/failed", "gave up after 4 attempts: HTTP 503"],
  ];
  for (const [law, reply, code, reason] of refused)
    test(`${law} is a coded error`, async () => {
      const error = await serving(reply, (url) => failure(openUrl(url, fast)));
      expect(error.code).toBe(code);
      expect(error.message).toContain(reason);
    });

  test("an empty file has size 0", async () => {
    const empty = status(416, { "Content-Range": "bytes */0" });
    expect((await serving(empty, (url) => openUrl(url, fast))).size).toBe(0);
  });

  const changes: [law: string, headers: Record<string, string>, body: number, reason: string][] = [
    ["another ETag", { "Content-Range": `bytes 10-19/${DATA.length}`, ETag: '"2"' }, 10, "changed on the server"],
    ["another size", { "Content-Range": "bytes 10-19/99", ETag: '"1"' }, 10, "changed on the server"],
    ["another range", { "Content-Range": `bytes 11-20/${DATA.length}`, ETag: '"1"' }, 10, "bytes 11-20"],
    ["too many bytes", { "Content-Range": `bytes 10-19/${DATA.length}`, ETag: '"1"' }, 11, "more than the 10 bytes"],
  ];
  for (const [law, headers, body, reason] of changes)
    test(`${law} in a later reply is an error and is not retried`, async () => {
      await using source = await openUrl(new URL("data.bin", base), fast);
      const later: Answer = (_, response) => response.writeHead(206, headers).end(DATA.subarray(0, body));
      const error = await serving(later, () => failure(source.read(10, 10)));
      expect(error.code).toBe("io/failed");
      expect(error.message).toContain(reason);
      expect(requests.length).toBe(1);
    });

  test("an abort ends a stalled read and a pending retry", async () => {
    await using source = await openUrl(new URL("data.bin", base), { retries: 9, retryDelay: 60_000 });
    for (const reply of [() => {}, status(503)] as Answer[]) {
      const controller = new AbortController();
      setTimeout(() => controller.abort(), 30);
      const error = await serving(reply, () => failure(source.read(0, 10, controller.signal)));
      expect(error.code).toBe("operation/aborted");
    }
    expect(await source.read(3, 2)).toEqual(DATA.subarray(3, 5));
  });
});
