import { viewAs } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { Staging } from "../core/staging.js";
import { codecBits, type Format } from "../formats/format.js";
import { type BlockOutput, type GgmlType, ggmlType } from "../formats/ggml.js";
import type { Slab, StoredMatrix } from "../formats/stored-matrix.js";
import { blockCount } from "../formats/window.js";
import { type GgufHeader, type GgufTensor, ggufTypeName } from "./gguf.js";
import { ggufArchitecture, type NameRule } from "./gguf-architectures.js";
import { ggufConfig } from "./gguf-config.js";
import { ggufParts, type OpenFile } from "./gguf-parts.js";
import { ggufTokenizer } from "./gguf-tokenizer.js";
import type { ReadOptions, TensorInfo, TensorStore } from "./safetensors.js";
import { type ByteSource, createDirectory, memorySource, type SourceDirectory } from "./source.js";

const ROPE_FACTORS = "rope_freqs.weight";
const NORM = /norm\.weight$/;
const PAIRED = /\.self_attn\.([qk])_proj\./;

/**
 * A GGUF file as a model folder: config.json and the tokenizer's files made from its metadata, and its tensors under Hugging
 * Face's names, quantized ones as they are stored. `open` is called for every reading and must open the same files: the given one, and
 * the others where the model is split into several.
 * @throws FewbitError as `ggufParts`, `ggufConfig` and `ggufTokenizer`; `model/unsupported` for a tensor without a name in the table
 */
export async function ggufDirectory(
  file: string,
  open: OpenFile,
  options: { signal?: AbortSignal } = {},
): Promise<SourceDirectory> {
  const { header, open: openAll } = await ggufParts(file, open, options.signal);
  await using source = await openAll(options.signal);
  const { name } = source;
  const architecture = ggufArchitecture(header.metadata);
  const tensors = renamed(header, architecture.names);
  const factors = header.tensors.get(ROPE_FACTORS);
  const config = ggufConfig(header.metadata, {
    path: name,
    hasHead: tensors.has("lm_head.weight"),
    vocabSize: tensors.get("model.embed_tokens.weight")?.shape[0] ?? 0,
    ropeFactors: factors === undefined ? null : await floats(source, factors, options.signal),
    rowsOf: (tensor) => tensors.get(tensor)?.shape[0],
  });
  const made: Readonly<Record<string, () => unknown>> = {
    "config.json": () => config,
    "tokenizer.json": () => ggufTokenizer(header.metadata, name).tokenizer,
    "tokenizer_config.json": () => ggufTokenizer(header.metadata, name).config,
  };
  const directory = createDirectory(name, async (file) => {
    if (!Object.hasOwn(made, file))
      throw new FewbitError("io/not-found", { path: file, reason: `${name} holds nothing of that name` });
    const json = (made[file] as () => unknown)();
    return memorySource(new TextEncoder().encode(JSON.stringify(json)), `${name}: ${file}`);
  });
  const heads = { q: Number(config.num_attention_heads), k: Number(config.num_key_value_heads) };
  const layout = { heads: architecture.pairedRope ? heads : null, normOffset: architecture.normOffset };
  return { ...directory, weights: async ({ signal }) => ggufStore(await openAll(signal), tensors, layout) };
}

/** The tensors by Hugging Face's names; a stack of matrices [experts, n, k] is as many of them. */
function renamed(header: GgufHeader, names: readonly NameRule[]): Map<string, GgufTensor> {
  const found = new Map<string, GgufTensor>();
  for (const tensor of header.tensors.values()) {
    if (tensor.name === ROPE_FACTORS) continue;
    const rule = names.find(([pattern]) => pattern.test(tensor.name));
    if (rule === undefined)
      throw new FewbitError("model/unsupported", {
        what: "GGUF tensor",
        value: tensor.name,
        supported: names.map(([pattern]) => pattern.source),
      });
    const name = tensor.name.replace(...(rule as [RegExp, string]));
    if (!name.includes("{expert}")) {
      // The gate of a shared expert is a vector in some files.
      const alone = name.endsWith("expert_gate.weight") && tensor.shape.length === 1;
      found.set(name, alone ? { ...tensor, shape: [1, ...tensor.shape] } : tensor);
      continue;
    }
    const [count = 0, ...shape] = tensor.shape;
    const byteLength = tensor.byteLength / Math.max(1, count);
    for (let expert = 0; expert < count; expert++) {
      const byteOffset = tensor.byteOffset + expert * byteLength;
      found.set(name.replace("{expert}", String(expert)), { ...tensor, shape, byteOffset, byteLength });
    }
  }
  return found;
}

async function floats(source: ByteSource, tensor: GgufTensor, signal: AbortSignal | undefined): Promise<Float32Array> {
  if (tensor.type !== 0 || tensor.byteLength > 2 ** 20)
    throw new FewbitError("io/malformed", { path: source.name, reason: `${tensor.name} is no short list of F32` });
  return viewAs("f32", await source.read(tensor.byteOffset, tensor.byteLength, signal)).slice();
}

interface Layout {
  /** How many heads q and k have when their rows are stored in pairs of neighbours; null when they are not. */
  readonly heads: { readonly q: number; readonly k: number } | null;
  /** What was added to the weights of norms. */
  readonly normOffset: 0 | 1;
}

function ggufStore(
  source: ByteSource,
  named: ReadonlyMap<string, GgufTensor>,
  { heads, normOffset }: Layout,
): TensorStore {
  const tensors = new Map<string, TensorInfo>();
  const stored = new Map<string, StoredMatrix>();
  const perHead = (name: string, tensor: GgufTensor): number | null => {
    const role = PAIRED.exec(name)?.[1] as "q" | "k" | undefined;
    return heads === null || role === undefined ? null : (tensor.shape[0] as number) / heads[role];
  };
  for (const [name, tensor] of named) {
    const type = ggmlType(tensor.type);
    const dtype = ggufTypeName(tensor.type) as TensorInfo["dtype"];
    if (type === undefined)
      tensors.set(name, {
        name,
        dtype,
        shape: tensor.shape,
        byteOffset: tensor.byteOffset,
        byteLength: tensor.byteLength,
      });
    else stored.set(name, ggmlMatrix(source, tensor, type, perHead(name, tensor)));
  }
  const close = () => source.close();
  const store: TensorStore = {
    name: source.name,
    tensors,
    stored,
    close,
    [Symbol.asyncDispose]: close,
    async read(name: string, { signal, rows, memory }: ReadOptions = {}) {
      const info = tensors.get(name);
      if (info === undefined) throw new FewbitError("model/missing-tensor", { name, path: source.name });
      const count = info.shape[0] ?? 1;
      const rowBytes = info.byteLength / Math.max(1, count);
      const [begin, end] = rows ?? [0, count];
      const size = perHead(name, named.get(name) as GgufTensor);
      if (size === null) {
        const bytes = await source.read(info.byteOffset + begin * rowBytes, (end - begin) * rowBytes, signal, memory);
        return normOffset !== 0 && NORM.test(name) ? without(bytes, info, normOffset, source.name) : bytes;
      }
      const [from, to] = [Math.floor(begin / size) * size, Math.min(Math.ceil(end / size) * size, count)];
      const [all, wanted] = [(to - from) * rowBytes, (end - begin) * rowBytes];
      const bytes = await source.read(info.byteOffset + from * rowBytes, all, signal, memory);
      const out = memory?.take(wanted) ?? new Uint8Array(wanted);
      for (let row = begin; row < end; row++) {
        const at = (unpairedRow(row, size) - from) * rowBytes;
        out.set(bytes.subarray(at, at + rowBytes), (row - begin) * rowBytes);
      }
      return out;
    },
  };
  return store;
}

/**
 * The weights of a norm before the converter added to them. What the loader adds again gives the file's number bit for bit where the
 * converter computed it in float32: a sum is a multiple of the smaller ulp of its operands, so that the difference is exact.
 */
function without(bytes: Uint8Array, { name, dtype }: TensorInfo, offset: number, path: string): Uint8Array {
  if (dtype !== "F32")
    throw new FewbitError("dtype/mismatch", { what: `${path}: ${name}`, got: dtype, expected: "F32" });
  const values = viewAs("f32", bytes.slice()).map((value) => value - offset);
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

/** Where the file has row `row` of a matrix whose heads of `size` rows are stored in pairs: 0, size / 2, 1, size / 2 + 1, ... */
function unpairedRow(row: number, size: number): number {
  const within = row % size;
  const half = size / 2;
  return row - within + (within < half ? 2 * within : 2 * (within - half) + 1);
}

/** A tensor of blocks as a stored matrix. */
export function ggmlMatrix(
  source: ByteSource,
  tensor: GgufTensor,
  type: GgmlType,
  perHead: number | null,
): StoredMatrix {
  const { shape, byteOffset } = tensor;
  const [n, k] = shape as [number, number];
  if (shape.length !== 2)
    throw new FewbitError("model/unsupported", {
      what: `rank of ${tensor.name} in ${type.name}`,
      value: String(shape.length),
      supported: ["2"],
    });
  const rowBytes = (k / type.elements) * type.bytes;
  return {
    format: type.format,
    shape: [n, k],
    activation: null,
    kind: `GGUF ${type.name}`,
    cut: "rows",
    step: perHead ?? 1,
    bytesPerLine: rowBytes,
    read: async (begin, end, signal, memory = new Staging()) => {
      const bytes = await source.read(byteOffset + begin * rowBytes, (end - begin) * rowBytes, signal, memory);
      const order = perHead === null ? null : (row: number) => unpairedRow(begin + row, perHead) - begin;
      return unpackBlocks(bytes, type, [end - begin, k], order, memory);
    },
  };
}

/** The codes of whole rows of blocks, in `memory`; `order` says where in `bytes` each row lies. */
function unpackBlocks(
  bytes: Uint8Array,
  type: GgmlType,
  [rows, k]: readonly [number, number],
  order: ((row: number) => number) | null,
  memory: Staging,
): Slab {
  const { format } = type;
  const [first, second] = format.scales as [Format["scales"][number], Format["scales"][number] | undefined];
  const groups = blockCount(format, 0, [rows, k], rows);
  const blocks = (rows * k) / type.elements;
  const halves = (count: number) => new Uint16Array(memory.take(count * 2).buffer, 0, count);
  const zeroBits = format.zero.domain === "none" ? 0 : codecBits(format.zero.codec);
  const zeros = zeroBits === 0 ? null : zeroBits === 16 ? halves(groups) : memory.words(groups);
  const out: BlockOutput = {
    elements: memory.take(rows * k),
    element: 0,
    scales: codecBits(first.codec) === 8 ? memory.take(groups) : halves(groups),
    zeros,
    group: 0,
    supers: second === undefined ? null : halves(blocks),
    block: 0,
  };
  const perRow = k / type.elements;
  for (let row = 0; row < rows; row++) {
    const from = order === null ? row : order(row);
    for (let b = 0; b < perRow; b++) {
      out.block = row * perRow + b;
      out.element = out.block * type.elements;
      out.group = (out.block * groups) / blocks;
      type.unpack(bytes, (from * perRow + b) * type.bytes, out);
    }
  }
  return {
    elements: out.elements,
    scales: out.supers === null ? [out.scales] : [out.scales, out.supers],
    ...(zeros === null ? {} : { zero: zeros }),
  };
}
