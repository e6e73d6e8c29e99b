import { FewbitError } from "../core/errors.js";
import { JsonCursor, label } from "./json.js";
import { openSafetensors, type SafetensorsFile, type TensorInfo, type TensorStore } from "./safetensors.js";
import { isPlainFileName, readText, type SourceDirectory } from "./source.js";

const SINGLE = "model.safetensors";
const INDEX = "model.safetensors.index.json";
/** Shards whose headers are read at the same time. */
const CONCURRENT = 8;

/** A checkpoint folder as one store of tensors. Each tensor's `byteOffset` counts from the start of its own file. */
export interface Checkpoint extends TensorStore {
  /** The files in order of name; each has its own `metadata`. */
  readonly files: readonly SafetensorsFile[];
}

/**
 * Opens `model.safetensors`, or else the shards that `model.safetensors.index.json` lists. Every header is read and checked
 * now, and every entry of the index is compared with them.
 * @throws FewbitError `io/not-found` (neither file, or a shard), `io/malformed`, `io/failed`, `operation/aborted`
 */
export async function openCheckpoint(
  directory: SourceDirectory,
  options: { signal?: AbortSignal } = {},
): Promise<Checkpoint> {
  const { signal } = options;
  const single = await openIfPresent(directory, SINGLE, signal);
  if (single) {
    const file = await openSafetensors(single, options);
    return combine(directory.name, [file], file.tensors, () => file);
  }
  const index = await openIfPresent(directory, INDEX, signal);
  if (!index)
    throw new FewbitError("io/not-found", { path: directory.name, reason: `it has no ${SINGLE} and no ${INDEX}` });
  await using closing = index;
  const json = new JsonCursor(await readText(closing, options), index.name);
  return openShards(directory, json, parseIndex(json), signal);
}

async function openIfPresent(directory: SourceDirectory, file: string, signal: AbortSignal | undefined) {
  try {
    return await directory.open(file, signal);
  } catch (error) {
    if (error instanceof FewbitError && error.code === "io/not-found") return undefined;
    throw error;
  }
}

/** The file of each tensor. Other members of an index (total sizes) say nothing that the headers do not. */
function parseIndex(json: JsonCursor): ReadonlyMap<string, string> {
  const weightMap = new Map<string, string>();
  let present = false;
  json.object("the index", (key) => {
    if (key !== "weight_map") return json.skip(`${label(key)} of the index`, 16);
    present = true;
    return json.object("weight_map", (tensor) => {
      const file = json.string(`the file of ${label(tensor)}`);
      if (!isPlainFileName(file))
        throw json.error(`tensor ${label(tensor)} is in ${label(file)}, not a plain file name`);
      weightMap.set(tensor, file);
    });
  });
  json.end();
  if (!present) throw json.error("the index has no weight_map");
  return weightMap;
}

async function openShards(
  directory: SourceDirectory,
  json: JsonCursor,
  weightMap: ReadonlyMap<string, string>,
  signal: AbortSignal | undefined,
): Promise<Checkpoint> {
  const shards = new Map<string, SafetensorsFile>();
  try {
    const names = [...new Set(weightMap.values())].sort();
    for (let i = 0; i < names.length; i += CONCURRENT) {
      const opening = names.slice(i, i + CONCURRENT).map(async (name) => {
        const source = await directory.open(name, signal);
        shards.set(name, await openSafetensors(source, signal ? { signal } : {}));
      });
      // All must have ended before one failure may close what the others opened.
      const failed = (await Promise.allSettled(opening)).find((result) => result.status === "rejected");
      if (failed) throw failed.reason;
    }
    const tensors = new Map<string, TensorInfo>();
    for (const [tensor, file] of weightMap) {
      const info = shards.get(file)?.tensors.get(tensor);
      if (!info) throw json.error(`${label(file)} has no tensor ${label(tensor)}`);
      tensors.set(tensor, info);
    }
    const files = names.map((name) => shards.get(name) as SafetensorsFile);
    return combine(directory.name, files, tensors, (tensor) => shards.get(weightMap.get(tensor) as string));
  } catch (error) {
    await Promise.all([...shards.values()].map((shard) => shard.close()));
    throw error;
  }
}

function combine(
  name: string,
  files: readonly SafetensorsFile[],
  tensors: ReadonlyMap<string, TensorInfo>,
  fileOf: (tensor: string) => SafetensorsFile | undefined,
): Checkpoint {
  const close = async () => void (await Promise.all(files.map((file) => file.close())));
  return {
    name,
    files,
    tensors,
    close,
    [Symbol.asyncDispose]: close,
    async read(tensor, options) {
      const file = tensors.has(tensor) ? fileOf(tensor) : undefined;
      if (!file) throw new FewbitError("model/missing-tensor", { name: tensor, path: name });
      return file.read(tensor, options);
    },
  };
}
