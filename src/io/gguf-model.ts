import { viewAs } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { type Block, blockGrid, codecBits, type Format } from "../formats/format.js";
import { type BlockOutput, type GgmlType, ggmlType } from "../formats/ggml.js";
import type { Slab, StoredMatrix } from "../formats/stored-matrix.js";
import { type GgufHeader, type GgufTensor, ggufTypeName, readGguf } from "./gguf.js";
import { ggufArchitecture, ggufConfig } from "./gguf-config.js";
import { ggufTokenizer } from "./gguf-tokenizer.js";
import type { ReadOptions, TensorInfo, TensorStore } from "./safetensors.js";
import { type ByteSource, createDirectory, memorySource, type SourceDirectory } from "./source.js";

/** Tensors outside the layers, and those of a layer, in GGUF's and in Hugging Face's names. */
const NAMES: readonly (readonly [gguf: RegExp, huggingFace: string])[] = [
  [/^token_embd\.weight$/, "model.embed_tokens.weight"],
  [/^output_norm\.weight$/, "model.norm.weight"],
  [/^output\.weight$/, "lm_head.weight"],
  [/^blk\.(\d+)\.attn_norm\.weight$/, "model.layers.$1.input_layernorm.weight"],
  [/^blk\.(\d+)\.attn_([qkv])\.(weight|bias)$/, "model.layers.$1.self_attn.$2_proj.$3"],
  [/^blk\.(\d+)\.attn_output\.(weight|bias)$/, "model.layers.$1.self_attn.o_proj.$2"],
  [/^blk\.(\d+)\.attn_([qk])_norm\.weight$/, "model.layers.$1.self_attn.$2_norm.weight"],
  [/^blk\.(\d+)\.ffn_norm\.weight$/, "model.layers.$1.post_attention_layernorm.weight"],
  [/^blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)$/, "model.layers.$1.mlp.$2_proj.$3"],
];
const ROPE_FACTORS = "rope_freqs.weight";
const PAIRED = /\.self_attn\.([qk])_proj\./;

/**
 * A GGUF file as a model folder: config.json and the tokenizer's files made from its metadata, and its tensors under Hugging
 * Face's names, quantized ones as they are stored. `open` is called for every reading and must open the same file.
 * @throws FewbitError as `readGguf`, `ggufConfig` and `ggufTokenizer`; `model/unsupported` for a tensor without a name in the table
 */
export async function ggufDirectory(
  open: (signal?: AbortSignal) => Promise<ByteSource>,
  options: { signal?: AbortSignal } = {},
): Promise<SourceDirectory> {
  await using source = await open(options.signal);
  const header = await readGguf(source, options.signal);
  const { name } = source;
  const parts = header.metadata.get("split.count") ?? 1;
  if (parts !== 1 && parts !== 0)
    throw new FewbitError("model/unsupported", { what: "GGUF split.count", value: String(parts), supported: ["1"] });
  const tensors = renamed(header);
  const factors = header.tensors.get(ROPE_FACTORS);
  const config = ggufConfig(header.metadata, {
    path: name,
    hasHead: tensors.has("lm_head.weight"),
    vocabSize: tensors.get("model.embed_tokens.weight")?.shape[0] ?? 0,
    ropeFactors: factors === undefined ? null : await floats(source, factors, options.signal),
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
  const paired = ggufArchitecture(header.metadata).pairedRope ? heads : null;
  return { ...directory, weights: async ({ signal }) => ggufStore(await open(signal), tensors, paired) };
}

function renamed(header: GgufHeader): Map<string, GgufTensor> {
  const found = new Map<string, GgufTensor>();
  for (const tensor of header.tensors.values()) {
    if (tensor.name === ROPE_FACTORS) continue;
    const rule = NAMES.find(([pattern]) => pattern.test(tensor.name));
    if (rule === undefined)
      throw new FewbitError("model/unsupported", {
        what: "GGUF tensor",
        value: tensor.name,
        supported: ["token_embd", "output", "output_norm", "blk.N.attn_*", "blk.N.ffn_*"],
      });
    found.set(tensor.name.replace(...(rule as [RegExp, string])), tensor);
  }
  return found;
}

async function floats(source: ByteSource, tensor: GgufTensor, signal: AbortSignal | undefined): Promise<Float32Array> {
  if (tensor.type !== 0 || tensor.byteLength > 2 ** 20)
    throw new FewbitError("io/malformed", { path: source.name, reason: `${tensor.name} is no short list of F32` });
  return viewAs("f32", await source.read(tensor.byteOffset, tensor.byteLength, signal)).slice();
}

/** Rows of one head when they are stored in pairs of neighbours; null for every other tensor. */
type Heads = { readonly q: number; readonly k: number } | null;

function ggufStore(source: ByteSource, named: ReadonlyMap<string, GgufTensor>, heads: Heads): TensorStore {
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
    async read(name: string, { signal, rows }: ReadOptions = {}) {
      const info = tensors.get(name);
      if (info === undefined) throw new FewbitError("model/missing-tensor", { name, path: source.name });
      const count = info.shape[0] ?? 1;
      const rowBytes = info.byteLength / Math.max(1, count);
      const [begin, end] = rows ?? [0, count];
      const size = perHead(name, named.get(name) as GgufTensor);
      if (size === null) return source.read(info.byteOffset + begin * rowBytes, (end - begin) * rowBytes, signal);
      const [from, to] = [Math.floor(begin / size) * size, Math.min(Math.ceil(end / size) * size, count)];
      const bytes = await source.read(info.byteOffset + from * rowBytes, (to - from) * rowBytes, signal);
      const out = new Uint8Array((end - begin) * rowBytes);
      for (let row = begin; row < end; row++) {
        const at = (unpairedRow(row, size) - from) * rowBytes;
        out.set(bytes.subarray(at, at + rowBytes), (row - begin) * rowBytes);
      }
      return out;
    },
  };
  return store;
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
    read: async (begin, end, signal) => {
      const bytes = await source.read(byteOffset + begin * rowBytes, (end - begin) * rowBytes, signal);
      const order = perHead === null ? null : (row: number) => unpairedRow(begin + row, perHead) - begin;
      return unpackBlocks(bytes, type, end - begin, k, order);
    },
  };
}

/** The codes of whole rows of blocks; `order` says where in `bytes` each row lies. */
export function unpackBlocks(
  bytes: Uint8Array,
  type: GgmlType,
  rows: number,
  k: number,
  order: ((row: number) => number) | null = null,
): Slab {
  const { format } = type;
  const [first, second] = format.scales as [Format["scales"][number], Format["scales"][number] | undefined];
  const count = (block: Block) => {
    const grid = blockGrid(block, [rows, k]);
    return grid[0] * grid[1];
  };
  const groups = count(first.block);
  const blocks = (rows * k) / type.elements;
  const narrow = codecBits(first.codec) === 8;
  const zeroBits = format.zero.domain === "none" ? 0 : codecBits(format.zero.codec);
  const zeros = zeroBits === 0 ? null : zeroBits === 16 ? new Uint16Array(groups) : new Uint32Array(groups);
  const out: BlockOutput = {
    elements: new Uint8Array(rows * k),
    element: 0,
    scales: narrow ? new Uint8Array(groups) : new Uint16Array(groups),
    zeros,
    group: 0,
    supers: second === undefined ? null : new Uint16Array(blocks),
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
