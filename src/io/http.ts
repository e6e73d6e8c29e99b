import { FewbitError, throwIfAborted } from "../core/errors.js";
import { type ByteSource, createSource, type OpenOptions } from "./source.js";

export interface UrlOptions extends OpenOptions {
  /** How often one read may be repeated after a cut connection or a busy server; default 4. */
  retries?: number;
  /** The wait before the first repetition in milliseconds, doubled for each further one; default 250. */
  retryDelay?: number;
}

export interface UrlSource extends ByteSource {
  /** What the server calls this version of the file: its ETag, or else the time of its last change. */
  readonly etag: string | null;
}

interface Range {
  start: number;
  end: number;
  size: number;
}

/** Answers that a server takes back by itself. */
const TRANSIENT: ReadonlySet<number> = new Set([408, 425, 429, 500, 502, 503, 504]);

/** A failure worth repeating; never leaves this file. */
class Transient extends Error {}

/**
 * Opens an HTTP(S) URL for ranged reads. Every answer must be `206` with the `Content-Range` that was asked for, the size
 * and version of the first answer. A cut connection is taken up again where it stopped.
 * @throws FewbitError `io/not-found` (404, 410), `io/failed`, `operation/aborted`
 */
export async function openUrl(url: URL, options: UrlOptions = {}): Promise<UrlSource> {
  const name = displayName(url);
  const { headers = {}, retries = 4, retryDelay = 250 } = options;

  async function request(first: number, last: number, signal: AbortSignal | undefined): Promise<Response> {
    // No If-Range: a page would have to ask the server for permission to send it. The ETag is compared here instead.
    const response = await fetch(url, {
      headers: { ...headers, Range: `bytes=${first}-${last}` },
      ...(signal && { signal }),
    });
    if (response.status === 206 || response.status === 416) return response;
    await response.body?.cancel();
    if (response.status === 200) throw failure("the server does not answer Range requests");
    const reason = `HTTP ${response.status} ${response.statusText}`.trim();
    if (TRANSIENT.has(response.status)) throw new Transient(reason);
    if (response.status === 404 || response.status === 410)
      throw new FewbitError("io/not-found", { path: name, reason });
    throw failure(reason);
  }

  function failure(reason: string, cause?: unknown): FewbitError {
    return new FewbitError("io/failed", { path: name, reason }, { cause });
  }

  /** Runs `attempt` until it succeeds, fails for good, or `retries` are used up. */
  async function persist<T>(signal: AbortSignal | undefined, attempt: () => Promise<T>): Promise<T> {
    for (let tries = 0; ; tries++) {
      throwIfAborted(signal, `reading ${name}`);
      try {
        return await attempt();
      } catch (cause) {
        throwIfAborted(signal, `reading ${name}`);
        if (cause instanceof FewbitError) throw cause;
        if (tries >= retries) throw failure(`gave up after ${tries + 1} attempts: ${describe(cause)}`, cause);
        await sleep(retryDelay * 2 ** tries, signal);
      }
    }
  }

  const opened = await persist(options.signal, async () => {
    const response = await request(0, 0, options.signal);
    const range = response.headers.get("Content-Range") ?? "";
    const etag = versionOf(response);
    await response.body?.cancel();
    if (response.status === 416 && /^bytes \*\/0$/.test(range)) return { size: 0, etag };
    const parsed = parseRange(range);
    if (response.status !== 206 || parsed?.start !== 0 || parsed.end !== 0)
      throw failure(`the server answered bytes=0-0 with HTTP ${response.status}, Content-Range "${range}"`);
    return { size: parsed.size, etag };
  });

  /** Fills `bytes` from `done` on and returns how far it came; a cut connection is `Transient`. */
  async function fill(bytes: Uint8Array, offset: number, progress: { done: number }, signal: AbortSignal | undefined) {
    const first = offset + progress.done;
    const last = offset + bytes.byteLength - 1;
    const response = await request(first, last, signal);
    const range = response.headers.get("Content-Range") ?? "";
    const parsed = parseRange(range);
    const changed = versionOf(response) !== opened.etag || (parsed && parsed.size !== opened.size);
    const wrong = response.status !== 206 || parsed?.start !== first || parsed.end !== last;
    if (changed || wrong || !response.body) {
      await response.body?.cancel();
      if (changed) throw failure("the file changed on the server while it was read");
      throw failure(
        `the server answered bytes=${first}-${last} with HTTP ${response.status}, Content-Range "${range}"`,
      );
    }
    const reader = response.body.getReader();
    try {
      for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
        if (progress.done + chunk.value.byteLength > bytes.byteLength)
          throw failure(`the server sent more than the ${last - first + 1} bytes it announced`);
        bytes.set(chunk.value, progress.done);
        progress.done += chunk.value.byteLength;
      }
    } finally {
      // Ends the connection when the loop was left early; a body that was read to its end, or failed, is not affected.
      await reader.cancel().catch(() => {});
    }
    if (progress.done < bytes.byteLength)
      throw new Transient(`the connection was cut at byte ${offset + progress.done}`);
  }

  const source = createSource({
    name,
    size: opened.size,
    async read(offset, length, signal, memory) {
      const bytes = memory?.take(length) ?? new Uint8Array(length);
      const progress = { done: 0 };
      await persist(signal, () => fill(bytes, offset, progress, signal));
      return bytes;
    },
  });
  return Object.assign(source, { etag: opened.etag });
}

/** A URL without user, password, query and fragment: those may hold secrets. */
export function displayName(url: URL): string {
  return `${url.origin}${url.pathname}`;
}

function versionOf({ headers }: Response): string | null {
  return headers.get("ETag") ?? headers.get("Last-Modified");
}

function parseRange(text: string): Range | undefined {
  const match = /^bytes (\d{1,15})-(\d{1,15})\/(\d{1,15})$/.exec(text);
  if (!match) return undefined;
  const [start, end, size] = match.slice(1).map(Number) as [number, number, number];
  return start <= end && end < size ? { start, end, size } : undefined;
}

/** fetch says only "fetch failed"; its cause says why. */
function describe(error: unknown): string {
  const { message, cause } = error as Error;
  return cause instanceof Error ? `${message}: ${cause.message}` : message;
}

function sleep(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(wake, milliseconds);
    function wake() {
      clearTimeout(timer);
      signal?.removeEventListener("abort", wake);
      resolve();
    }
    signal?.addEventListener("abort", wake);
  });
}
