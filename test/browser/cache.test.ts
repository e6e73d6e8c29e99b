import type { Browser, Page } from "playwright";
import { build } from "vite";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import type { ChunkStore } from "../../src/io/cache.js";
import type { DirectoryHandle, privateFileStore } from "../../src/io/cache-browser.js";
import { launchChromium } from "../setup/chromium.js";

/* The stores of src/io/cache-browser.ts over what Chromium really has: its Cache API and its private file system. */

vi.setConfig({ testTimeout: 60_000, hookTimeout: 300_000 });

/** The module as the page imports it. */
async function bundled(): Promise<string> {
  const entry = "src/io/cache-browser.ts";
  const built = await build({
    configFile: false,
    logLevel: "error",
    build: { write: false, minify: false, lib: { entry, formats: ["es"], fileName: "cache" } },
  });
  const outputs = (Array.isArray(built) ? built : [built]).flatMap((one) => ("output" in one ? one.output : []));
  const chunk = outputs.find((output) => output.type === "chunk");
  if (chunk === undefined) throw new Error("nothing was built");
  return chunk.code;
}

/** What the page's globals are. */
interface Scope {
  readonly browserStore: () => ChunkStore;
  readonly privateFileStore: typeof privateFileStore;
  readonly navigator: { storage: { getDirectory(): Promise<DirectoryHandle> } };
}

let browser: Browser;
let page: Page;
beforeAll(async () => {
  const [code, launched] = await Promise.all([bundled(), launchChromium({ adapter: "none" })]);
  browser = launched;
  page = await (await browser.newContext({ locale: "en-US" })).newPage();
  // Pages of localhost are secure, which both stores ask for.
  await page.route("http://localhost/**", (route) => route.fulfill({ contentType: "text/html", body: "<p>cache</p>" }));
  await page.goto("http://localhost/");
  await page.addScriptTag({
    type: "module",
    content: `${code}\nObject.assign(globalThis, { browserStore, privateFileStore });`,
  });
});
afterAll(() => browser?.close());

/** What a page finds in a store: a piece of 4 MiB, written over; a piece that is not there; one that was removed. */
const roundTrip = async (kind: "private files" | "default") =>
  page.evaluate(async (kind) => {
    const { browserStore, privateFileStore, navigator } = globalThis as unknown as Scope;
    const store = kind === "default" ? browserStore() : privateFileStore(() => navigator.storage.getDirectory());
    const key = `${"0".repeat(64)}/7`;
    const missing = await store.get(key);
    await store.put(key, new Uint8Array(10));
    const piece = Uint8Array.from({ length: 4 * 2 ** 20 + 32 }, (_, i) => (i * 7) & 255);
    await store.put(key, piece);
    const found = await store.get(key);
    const same = found?.length === piece.length && found.every((byte, i) => byte === piece[i]);
    const other = await store.get(`${"1".repeat(64)}/7`);
    await store.remove(key);
    return { missing, same, other, removed: await store.get(key) };
  }, kind);

describe("pieces of downloads in a browser", () => {
  for (const kind of ["private files", "default"] as const)
    test(`${kind}: come back as they were written, and are gone when they are removed`, async () => {
      expect(await roundTrip(kind)).toEqual({ missing: null, same: true, other: null, removed: null });
    });
});
