import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { ByteSource } from "./source.js";

/** A model of the Hugging Face Hub: `owner/name`, perhaps with a file of it. */
export interface HubName {
  readonly repo: string;
  readonly file: string | null;
}

export interface HubOptions {
  signal?: AbortSignal;
  /** A branch, tag or commit; default `main`. */
  revision?: string;
  accessToken?: string;
  /** Default: the Hugging Face Hub. */
  hubUrl?: string;
}

/** A repository at one commit. */
export interface HubRepo {
  readonly name: string;
  /** The commit that `revision` was when the repository was opened: all files are of it. */
  readonly commit: string;
  /** Where a file lies and the SHA-256 that the Hub states for large ones. Throws `io/not-found`. */
  locate(file: string, signal?: AbortSignal): Promise<{ url: URL; sha256?: string; headers: Record<string, string> }>;
}

export type OpenUrl = (url: URL, options: { sha256?: string; headers: Record<string, string> }) => Promise<ByteSource>;

const NAME =
  /^(?:hf:(?:\/\/)?)?([A-Za-z0-9][\w.-]{0,95}\/[A-Za-z0-9][\w.-]{0,95})(?:\/((?:(?!\.\.?\/)[^/\\]+\/)*[^/\\]+\.gguf))?$/i;

/** Reads `owner/name`, `hf:owner/name` or either with `/file.gguf` or `/folder/file.gguf`; null for anything else. */
export function parseHubName(text: string): HubName | null {
  const match = NAME.exec(text);
  return match === null ? null : { repo: match[1] as string, file: match[2] ?? null };
}

/**
 * Finds a repository's commit.
 * @throws FewbitError `io/not-found` (no such repository or revision, or no access to it), `io/failed`, `operation/aborted`
 */
export async function openHub(repo: string, options: HubOptions = {}): Promise<HubRepo> {
  const { signal, revision = "main", accessToken, hubUrl = "https://huggingface.co" } = options;
  const { modelInfo, pathsInfo } = await import("@huggingface/hub");
  const request = {
    hubUrl,
    ...(accessToken === undefined ? {} : { accessToken }),
    fetch: ((input, init) => fetch(input, { ...init, ...(signal ? { signal } : {}) })) as typeof fetch,
  };
  const asked = async <T>(what: string, answer: Promise<T>): Promise<T> => {
    try {
      return await answer;
    } catch (cause) {
      throwIfAborted(signal, `asking for ${what}`);
      const { statusCode, message } = cause as Error & { statusCode?: number };
      const absent = statusCode === 401 || statusCode === 403 || statusCode === 404;
      const reason = absent ? "the Hub has no such model and revision, or it needs an access token" : message;
      const hint = "a name of two parts that is no path here is a model of the Hugging Face Hub";
      throw new FewbitError(absent ? "io/not-found" : "io/failed", { path: what, reason }, { cause, hint });
    }
  };
  const info = await asked(repo, modelInfo({ name: repo, revision, additionalFields: ["sha"], ...request }));
  const commit = info.sha;
  const headers: Record<string, string> = accessToken === undefined ? {} : { Authorization: `Bearer ${accessToken}` };
  return {
    name: `${repo}@${commit.slice(0, 12)}`,
    commit,
    async locate(file) {
      const paths = pathsInfo({ repo: { type: "model", name: repo }, paths: [file], revision: commit, ...request });
      const [found] = await asked(`${repo}/${file}`, paths);
      if (found === undefined)
        throw new FewbitError("io/not-found", { path: `${repo}/${file}`, reason: "the repository has no such file" });
      const path = file.split("/").map(encodeURIComponent).join("/");
      const url = new URL(`${repo}/resolve/${commit}/${path}`, `${hubUrl.replace(/\/$/, "")}/`);
      return { url, headers, ...(found.lfs === undefined ? {} : { sha256: found.lfs.oid }) };
    },
  };
}
