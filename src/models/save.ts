import { type FloatType, fromFloat32 } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { formatKey } from "../formats/format.js";
import type { StoredClass } from "../formats/stored-class.js";
import type { QuantizedTensor } from "../formats/tensor.js";
import { torchaoPartName } from "../formats/torchao.js";
import { torchaoClass } from "../formats/torchao-write.js";
import { fewbitClass } from "../io/fewbit-metadata.js";
import { type ModelFolder, type ModelFolderOptions, openModelFolder } from "../io/model-folder.js";
import { openWeights } from "../io/quantized.js";
import { layOut, type SafetensorsDtype, type TensorInfo, type TensorStore } from "../io/safetensors.js";
import { type FileSink, nodeModule, readJson, readText, type SourceDirectory } from "../io/source.js";
import { isDense } from "../ir/tensor.js";
import { parseQuantizeName } from "../quantize/names.js";
import { parseConfig, type TensorSpec, tensorSpecs } from "./config.js";
import { isLinearRole, planWeights, type Replacement, replaceWeights, type WeightPlan } from "./weights.js";

export interface SaveOptions {
  /** A short name such as `int4wo-64`. */
  readonly quantize: string;
  /** Tensors in place of the checkpoint's, from `calibrate` with the same `quantize`. */
  readonly replace?: Replacement;
  /** A file holds at most this many bytes of tensors (and at least one parameter); default 5,000,000,000. */
  readonly shardBytes?: number;
  /** Where the model is and how it is downloaded. */
  readonly source?: ModelFolderOptions;
  readonly signal?: AbortSignal;
  readonly onProgress?: (progress: SaveProgress) => void;
}

/** Bytes of tensors written so far, of all. */
export interface SaveProgress {
  readonly done: number;
  readonly total: number;
  readonly what: string;
}

export interface SaveReport {
  readonly files: readonly string[];
  /** Files that an earlier, interrupted run had finished. */
  readonly kept: readonly string[];
  readonly bytes: number;
  readonly sourceBytes: number;
  readonly quantized: number;
  /** Why torchao cannot read the checkpoint, or null: the format that none of its classes holds. */
  readonly foreign: string | null;
}

/** Files that go with a model unchanged, where there are any. */
const COMPANIONS = [
  "tokenizer.json",
  "tokenizer_config.json",
  "generation_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "LICENSE",
] as const;

const FLOATS: Readonly<Record<string, FloatType>> = { F32: "f32", F16: "f16", BF16: "bf16" };

/** A parameter as it will lie in a file. */
interface Entry {
  readonly name: string;
  readonly bytes: number;
  readonly spec?: TensorSpec;
  readonly as?: StoredClass;
  readonly info: TensorInfo;
}

/**
 * Quantizes a model folder and writes it to the folder `out` (Node): safetensors in torchao's layout (specification 25), in
 * several files when it is large, with config.json and the tokenizer. One matrix is in memory at a time. Files appear when they are
 * complete and config.json last, so that an interrupted run leaves no half model; run again, it keeps the files that are done.
 *
 * Throws as `loadModel`, and `quantize/unsupported` for a checkpoint that is quantized already or whose linears do not lie in
 * matrices, `io/failed`, `operation/aborted`.
 */
export async function saveQuantized(folder: ModelFolder, out: string, options: SaveOptions): Promise<SaveReport> {
  const { signal, quantize } = options;
  const open = signal === undefined ? {} : { signal };
  const directory = await openModelFolder(folder, { ...open, ...options.source });
  const json = await readJson(directory, "config.json", open);
  const specs = mergeSources(tensorSpecs(parseConfig(json)));
  await using store = await openWeights(directory, json.quantization_config, open);
  const { replace = new Map() } = options;
  const plan = replaceWeights(planWeights(store, specs, parseQuantizeName(quantize)), replace);
  const entries = describeEntries(store, specs, plan, quantize);
  const total = entries.reduce((sum, entry) => sum + entry.bytes, 0);
  const node = await nodeModule(out);
  const target = await node.makeFolder(out);
  // A finished model is written anew: its files may be of another checkpoint. So are calibrated ones, which headers do not tell apart.
  const finished = await node.removeFile(node.join(target, "config.json"));
  const resume = !finished && replace.size === 0;
  const shards = splitShards(entries, options.shardBytes ?? 5e9);
  const names = shards.map((_, i) => shardName(i, shards.length));
  let done = 0;
  const kept: string[] = [];
  for (const [i, shard] of shards.entries()) {
    const file = names[i] as string;
    const begun = done;
    const wrote = await writeShard(
      node,
      node.join(target, file),
      shard,
      { store, plan, replace, resume, ...open },
      (what, bytes) => {
        done += bytes;
        options.onProgress?.({ done, total, what });
      },
    );
    if (!wrote) kept.push(file);
    done = begun + shard.reduce((sum, entry) => sum + entry.bytes, 0);
  }
  if (shards.length > 1) {
    const weightMap = Object.fromEntries(
      shards.flatMap((shard, i) => shard.flatMap((entry) => partsOf(entry).map((part) => [part.name, names[i]]))),
    );
    const index = { metadata: { total_size: total }, weight_map: weightMap };
    await writeText(node, node.join(target, "model.safetensors.index.json"), JSON.stringify(index, null, 1));
  }
  for (const companion of COMPANIONS) await copyText(node, directory, companion, node.join(target, companion), signal);
  throwIfAborted(signal, "saving a model");
  const config = { ...json, quantization_config: { quant_method: "fewbit", version: 1, quantize } };
  await writeText(node, node.join(target, "config.json"), `${JSON.stringify(config, null, 2)}\n`);
  const foreign = entries.find((entry) => entry.as?.type === "FewbitTensor");
  return {
    files: names,
    kept,
    bytes: total,
    sourceBytes: entries.reduce((sum, { info }) => sum + info.byteLength, 0),
    quantized: entries.filter((entry) => entry.as !== undefined).length,
    foreign: foreign?.spec === undefined ? null : formatKey(plan.weightFormat(foreign.spec)),
  };
}

function describeEntries(
  store: TensorStore,
  specs: readonly TensorSpec[],
  plan: WeightPlan,
  quantize: string,
): Entry[] {
  const refuse = (reason: string) => new FewbitError("quantize/unsupported", { config: quantize, reason });
  const [already] = store.stored ?? [];
  if (already !== undefined)
    throw refuse(`${already[0]} is stored as ${already[1].kind} already: quantize the original checkpoint`);
  const linears = new Map<string, TensorSpec>();
  for (const spec of specs.filter(({ role }) => isLinearRole(role))) {
    const { name, alternatives, shape, transposed } = spec.source;
    const tensor = [name, ...alternatives].find((candidate) => store.tensors.has(candidate));
    if (tensor === undefined || transposed || shape.length !== 2)
      throw refuse(`${spec.name} does not lie in a matrix [out, in]`);
    linears.set(tensor, spec);
  }
  return [...store.tensors.values()].map((info): Entry => {
    const spec = linears.get(info.name);
    if (spec === undefined || spec.shape.length !== 2) return { name: info.name, info, bytes: info.byteLength };
    const dtype = FLOATS[info.dtype] as FloatType;
    const shape = spec.shape as [number, number];
    const format = plan.weightFormat(spec);
    if (format.scales.length === 0) return { name: info.name, info, bytes: info.byteLength };
    const as =
      torchaoClass({
        format,
        shape,
        dtype,
        activation: plan.activationFormat(spec),
        fastAccum: plan.fastAccum(spec),
      }) ?? fewbitClass(quantize, format, shape, dtype);
    const described = { name: info.name, info, spec, as };
    return {
      ...described,
      bytes: partsOf({ ...described, bytes: 0 }).reduce((sum, part) => sum + byteLength(part), 0),
    };
  });
}

/** One spec for each tensor: weights that lie in one tensor are quantized as one, as torchao does to one module. */
function mergeSources(specs: readonly TensorSpec[]): TensorSpec[] {
  const whole = new Map<string, TensorSpec>();
  for (const spec of specs) {
    const { source } = spec;
    const alone = source.shape.every((extent, i) => extent === spec.shape[i]);
    if (!whole.has(source.name))
      whole.set(source.name, alone ? spec : { ...spec, shape: source.shape, source: { ...source, first: 0 } });
  }
  return [...whole.values()];
}

interface FilePart {
  readonly name: string;
  readonly part: string | null;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
}

function partsOf({ name, as, info }: Entry): FilePart[] {
  if (as === undefined) return [{ name, part: null, dtype: info.dtype, shape: info.shape }];
  return as.parts.map((part) => ({
    name: torchaoPartName(name, part.name),
    part: part.name,
    dtype: part.dtype as SafetensorsDtype,
    shape: part.shape,
  }));
}

function byteLength(part: FilePart): number {
  return layOut([part], {}).ordered[0]?.byteLength ?? 0;
}

/** Parameters in order, as many a file as fit. */
function splitShards(entries: readonly Entry[], limit: number): Entry[][] {
  const shards: Entry[][] = [[]];
  let size = 0;
  for (const entry of entries) {
    if (size > 0 && size + entry.bytes > limit) {
      shards.push([]);
      size = 0;
    }
    (shards.at(-1) as Entry[]).push(entry);
    size += entry.bytes;
  }
  return shards;
}

function shardName(index: number, count: number): string {
  if (count === 1) return "model.safetensors";
  const digits = (n: number) => String(n).padStart(5, "0");
  return `model-${digits(index + 1)}-of-${digits(count)}.safetensors`;
}

/** torchao's metadata: what every parameter of the file is. */
function metadataOf(shard: readonly Entry[]): Map<string, string> {
  const metadata = new Map([
    ["format", "pt"],
    ["tensor_names", JSON.stringify(shard.map((entry) => entry.name))],
  ]);
  for (const { name, as } of shard) {
    const names = as?.parts.map((part) => part.name);
    const entry =
      as === undefined ? { _type: "Tensor" } : { _type: as.type, _data: as.attributes, _tensor_data_names: names };
    metadata.set(name, JSON.stringify(entry));
  }
  return metadata;
}

type Node = Awaited<ReturnType<typeof nodeModule>>;

/** Writes one file, or finds that it is there with the same header and size; false then. */
async function writeShard(
  node: Node,
  path: string,
  shard: readonly Entry[],
  from: { store: TensorStore; plan: WeightPlan; replace: Replacement; resume: boolean; signal?: AbortSignal },
  onBytes: (what: string, bytes: number) => void,
): Promise<boolean> {
  const parts = shard.flatMap((entry) => partsOf(entry));
  const { header, ordered, size } = layOut(parts, metadataOf(shard));
  if (from.resume && (await isFinished(node, path, header, size))) return false;
  const positions = new Map<string, number>();
  let position = header.byteLength;
  for (const part of ordered) {
    positions.set(part.name, position);
    position += part.byteLength;
  }
  const file = await node.createFile(path);
  try {
    await file.writeAt(0, header);
    for (const entry of shard) {
      throwIfAborted(from.signal, "saving a model");
      const given = from.replace.get(entry.name);
      if (given !== undefined && isDense(given)) {
        const dtype = FLOATS[entry.info.dtype] as FloatType;
        const bits = fromFloat32(dtype, given.data as Float32Array);
        await file.writeAt(positions.get(entry.name) as number, new Uint8Array(bits.buffer));
      } else if (entry.as === undefined || entry.spec === undefined) {
        await copyTensor(file, positions.get(entry.name) as number, entry.info, from);
      } else {
        const tensor = (await from.plan.load(
          entry.spec,
          from.signal ? { signal: from.signal } : {},
        )) as QuantizedTensor;
        for (const { name, part } of partsOf(entry))
          await file.writeAt(positions.get(name) as number, entry.as.encode(tensor, part as string));
      }
      onBytes(entry.name, entry.bytes);
    }
    throwIfAborted(from.signal, "saving a model");
    await file.close();
    return true;
  } catch (error) {
    await file.abort();
    throw error;
  }
}

async function isFinished(node: Node, path: string, header: Uint8Array, size: number): Promise<boolean> {
  try {
    await using file = await node.openFile(path);
    if (file.size !== size) return false;
    const got = await file.read(0, header.byteLength);
    return got.every((byte, i) => byte === header[i]);
  } catch (error) {
    if (error instanceof FewbitError && error.code === "io/not-found") return false;
    throw error;
  }
}

/** Bytes of a tensor that are copied at once. */
const COPY = 16 * 2 ** 20;

async function copyTensor(
  file: FileSink,
  position: number,
  info: TensorInfo,
  { store, signal }: { store: TensorStore; signal?: AbortSignal },
): Promise<void> {
  const open = signal === undefined ? {} : { signal };
  const [rows] = info.shape;
  if (rows === undefined || rows < 2 || info.byteLength <= COPY)
    return file.writeAt(position, await store.read(info.name, open));
  const rowBytes = info.byteLength / rows;
  const step = Math.max(1, Math.floor(COPY / rowBytes));
  for (let begin = 0; begin < rows; begin += step) {
    const bytes = await store.read(info.name, { rows: [begin, Math.min(begin + step, rows)], ...open });
    await file.writeAt(position + begin * rowBytes, bytes);
  }
}

async function copyText(
  node: Node,
  directory: SourceDirectory,
  name: string,
  path: string,
  signal: AbortSignal | undefined,
): Promise<void> {
  try {
    await using source = await directory.open(name, signal);
    await writeText(node, path, await readText(source, signal === undefined ? {} : { signal }));
  } catch (error) {
    if (!(error instanceof FewbitError) || error.code !== "io/not-found") throw error;
  }
}

async function writeText(node: Node, path: string, text: string): Promise<void> {
  const file = await node.createFile(path);
  try {
    await file.write(new TextEncoder().encode(text));
    await file.close();
  } catch (error) {
    await file.abort();
    throw error;
  }
}
