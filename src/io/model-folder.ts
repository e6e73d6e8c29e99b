import { FewbitError, throwIfAborted } from "../core/errors.js";
import { type ChunkStore, type DownloadProgress, defaultStore, openCached } from "./cache.js";
import { ggufDirectory } from "./gguf-model.js";
import { displayName, openUrl } from "./http.js";
import { type HubOptions, openHub, parseHubName } from "./hub.js";
import {
  type ByteSource,
  createDirectory,
  isHttp,
  isNode,
  type MemoryInput,
  nodeModule,
  type OpenOptions,
  openDirectory,
  type SourceDirectory,
} from "./source.js";

/** A path, a URL, a name of the Hugging Face Hub (`owner/name`), or files by name. */
export type ModelFolder = string | URL | ReadonlyMap<string, MemoryInput>;

export interface ModelFolderOptions extends OpenOptions, HubOptions {
  /** Where downloads are kept; default: the user's cache folder (Node) or the Cache API. Null keeps nothing. */
  readonly cache?: ChunkStore | null;
  readonly onDownload?: (progress: DownloadProgress) => void;
  /** What does not stop the run and should be known. */
  readonly onNotice?: (text: string) => void;
}

type Open = (signal?: AbortSignal) => Promise<ByteSource>;

/**
 * Opens a model wherever it lies: a folder, a `.safetensors` file (with the files beside it) or a `.gguf` file, each on disk or
 * under an HTTP(S) URL, or a repository of the Hugging Face Hub. What comes over the network goes through a cache of checked pieces.
 * A string is a URL when it starts with `http://` or `https://`, a Hub name when it starts with `hf:` or is `owner/name` without
 * being a path that exists, otherwise a path (Node).
 * @throws FewbitError `io/not-found`, `io/failed`, `io/malformed`, `model/unsupported` (a GGUF file), `operation/aborted`
 */
export async function openModelFolder(input: ModelFolder, options: ModelFolderOptions = {}): Promise<SourceDirectory> {
  throwIfAborted(options.signal, "opening a model");
  if (input instanceof Map) {
    // Parts of a split model come in the order of their names.
    const gguf = input.has("config.json") ? undefined : [...input.keys()].sort().find((file) => isGguf(file));
    if (gguf === undefined) return openDirectory(input, options);
    const files = await openDirectory(input, options);
    return ggufDirectory(gguf, files.open, options);
  }
  const location = input as string | URL;
  if (isHttp(location)) return openRemoteFolder(new URL(location), options);
  const text = String(location);
  if (text.startsWith("hf:") || !isNode()) return openRepository(text, options);
  const node = await nodeModule(text);
  const path = node.toPath(location);
  const kind = await node.kindOf(path);
  if (kind === "folder") return openDirectory(path, options);
  if (kind === null) return parseHubName(text) === null ? openDirectory(path, options) : openRepository(text, options);
  const beside = (file: string) => node.openFile(node.join(node.dirname(path), file));
  if (isGguf(path)) return ggufDirectory(node.basename(path), beside, options);
  return singleFile(path, () => node.openFile(path), beside);
}

const fileOf = (url: URL) => url.pathname.slice(url.pathname.lastIndexOf("/") + 1);
const isGguf = (path: string) => /\.gguf$/i.test(path);

/** A folder where `model.safetensors` is one given file. */
function singleFile(name: string, weights: Open, beside: (file: string, signal?: AbortSignal) => Promise<ByteSource>) {
  if (!/\.safetensors$/i.test(name))
    throw new FewbitError("model/unsupported", {
      what: "model file",
      value: name,
      supported: [".safetensors", ".gguf", "a folder"],
    });
  return createDirectory(name, (file, signal) =>
    file === "model.safetensors" ? weights(signal) : beside(file, signal),
  );
}

async function openRemoteFolder(url: URL, options: ModelFolderOptions): Promise<SourceDirectory> {
  const download = await downloader(options);
  const open: Open = (signal) => download(url, {}, signal);
  const base = new URL(url);
  const file = /\.(safetensors|gguf)$/i.test(base.pathname);
  if (!file && !base.pathname.endsWith("/")) base.pathname += "/";
  const beside = (name: string, signal?: AbortSignal) => {
    const at = new URL(encodeURIComponent(name), base);
    at.search = base.search;
    return download(at, {}, signal);
  };
  if (isGguf(url.pathname)) return ggufDirectory(decodeURIComponent(fileOf(url)), beside, options);
  return file ? singleFile(displayName(url), open, beside) : createDirectory(displayName(base), beside);
}

async function openRepository(text: string, options: ModelFolderOptions): Promise<SourceDirectory> {
  const name = parseHubName(text);
  if (name === null)
    throw new FewbitError("io/not-found", { path: text, reason: "it is no URL and no name of the Hub (owner/name)" });
  const [repo, download] = await Promise.all([openHub(name.repo, options), downloader(options)]);
  const open = async (file: string, signal?: AbortSignal) => {
    const { url, ...rest } = await repo.locate(file);
    return download(url, rest, signal);
  };
  const { file } = name;
  if (file !== null) return ggufDirectory(file, open, options);
  return createDirectory(repo.name, open);
}

/** Opens URLs through the cache, or without one. */
async function downloader(options: ModelFolderOptions) {
  const { headers = {}, onDownload, onNotice } = options;
  const store = options.cache === undefined ? await defaultStore() : options.cache;
  return (
    url: URL,
    file: { sha256?: string; headers?: Readonly<Record<string, string>> },
    signal = options.signal,
  ): Promise<ByteSource> => {
    const common = { headers: { ...headers, ...file.headers }, ...(signal ? { signal } : {}) };
    if (store === null) return openUrl(url, common);
    return openCached(url, {
      ...common,
      store,
      ...(file.sha256 === undefined ? {} : { sha256: file.sha256 }),
      ...(onDownload ? { onProgress: onDownload } : {}),
      ...(onNotice ? { onNotice } : {}),
    });
  };
}
