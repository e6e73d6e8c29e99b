import { BYTES } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { roundUp, sizeOf } from "../core/shape.js";
import { type Codec, codecBits, type Format, formatKey } from "../formats/format.js";
import { type QuantizedTensor, rowwise, rowwiseTensor, sliceRows } from "../formats/tensor.js";
import { blockCount } from "../formats/window.js";
import type { TensorType, Value, ValueId } from "../ir/graph.js";
import { asRows, type DenseTensor, type HostTensor, isDense, type TensorRows } from "../ir/tensor.js";
import type { Plan } from "../plan/plan.js";
import type { LoadOptions, WeightSource } from "./backend.js";
import { type StoredLayout, storedLayout } from "./stored-layout.js";

/** A buffer that a dispatch binds: a value's storage, one row slice of (concatenated) weights,
 * dense weights one after another, or the step's scratch. */
export type Source =
  | { readonly kind: "value"; readonly id: ValueId }
  | { readonly kind: "weights"; readonly ids: readonly ValueId[]; readonly slice: number }
  | { readonly kind: "dense"; readonly ids: readonly ValueId[] }
  | { readonly kind: "scratch" };

/** Names the buffer of a source within a program: values that lie inside another one share its buffer. */
export function sourceKey(source: Source, { memory }: Plan): string {
  if (source.kind === "value") return `value ${memory.placement.get(source.id)?.root ?? source.id}`;
  if (source.kind === "weights") return `weights ${source.ids.join(",")} ${source.slice}`;
  return source.kind === "dense" ? `dense ${source.ids.join(",")}` : "scratch";
}

/** Rows [begin, end) of weights that fit one binding. */
export interface WeightSlice {
  readonly begin: number;
  readonly end: number;
  readonly layout: StoredLayout;
}

/** Weights as they lie on the device: the rows of all `ids` one after another, in slices that fit a binding. */
export interface WeightGroup {
  readonly ids: readonly ValueId[];
  readonly format: Format;
  readonly rows: number;
  readonly k: number;
  readonly slices: readonly WeightSlice[];
}

/** Lays weights out in row slices of at most `maxBinding` bytes. Throws `plan/memory` when one row block is larger. */
export function weightGroup(weights: readonly (readonly [ValueId, TensorType])[], maxBinding: number): WeightGroup {
  const types = weights.map(([, type]) => type);
  const first = types[0];
  if (first?.kind !== "format")
    throw new FewbitError("graph/invalid", { where: "weights", reason: "they are not stored in a format" });
  const format = types.length > 1 ? rowwise(first.format) : first.format;
  const k = first.shape[1] as number;
  const rows = types.reduce((sum, type) => sum + (type.shape[0] as number), 0);
  const step = format.scales.reduce(
    (most, { block }) => (typeof block[0] === "number" ? Math.max(most, block[0]) : most),
    4,
  );
  let count = Math.max(rows, 1);
  while (count > step && storedLayout(format, [count, k]).bytes > maxBinding)
    count = Math.ceil(count / 2 / step) * step;
  const slices: WeightSlice[] = [];
  for (let begin = 0; begin < rows; begin += count) {
    const end = Math.min(begin + count, rows);
    slices.push({ begin, end, layout: storedLayout(format, [end - begin, k]) });
  }
  const needed = slices[0]?.layout.bytes ?? 0;
  if (needed > maxBinding)
    throw new FewbitError("plan/memory", { what: "a block of weight rows", needed, limit: maxBinding });
  return { ids: weights.map(([id]) => id), format, rows, k, slices };
}

/**
 * Some of what one buffer of weights holds: `parts` are placed at byte offsets, the rest stays as allocated. The first upload of
 * a source makes its buffer of `bytes`.
 */
export interface WeightUpload {
  readonly source: Source;
  readonly label: string;
  readonly bytes: number;
  readonly parts: readonly Part[];
}

/**
 * Fetches every weight that `sources` name, one tensor after another, and hands it to `upload` as its rows come: the host holds a
 * tile of a tensor, and never the device's layout beside it. `upload` has taken the bytes of a part when it is done.
 */
export async function loadWeights(
  plan: Plan,
  maxBinding: number,
  sources: Iterable<Source>,
  weights: WeightSource,
  options: LoadOptions,
  upload: (part: WeightUpload) => void | Promise<void>,
): Promise<void> {
  const { values } = plan.graph;
  const groups = new Map<string, Extract<Source, { kind: "weights" | "dense" }>>();
  for (const source of sources) {
    if (source.kind === "weights" || source.kind === "dense")
      groups.set(`${source.kind} ${source.ids.join(",")}`, source);
  }
  let done = 0;
  const total = plan.bytes.weights;
  const send = async (part: WeightUpload) => {
    await upload(part);
    for (const [, data] of part.parts) done += data.byteLength;
  };
  for (const { kind, ids } of groups.values()) {
    const label = ids.map((id) => values[id]?.name).join("+");
    const types = ids.map((id) => [id, (values[id] as Value).type] as const);
    const placed: Placed =
      kind === "dense" ? denseUploads(types, label) : groupUploads(weightGroup(types, maxBinding), label);
    for (const id of ids) {
      throwIfAborted(options.signal, "uploading weights");
      for await (const tile of checkedTiles(asRows(await weights((values[id] as Value).name)), values[id] as Value)) {
        throwIfAborted(options.signal, "uploading weights");
        for (const part of placed(tile)) await send(part);
      }
    }
    options.onProgress?.(Math.min(done, total), total);
  }
}

/** Where the next rows of a group go. */
type Placed = (tile: HostTensor) => Iterable<WeightUpload>;

/** Matrices in slices of the device's layout. */
function groupUploads({ ids, slices }: WeightGroup, label: string): Placed {
  const placed = slices.map((slice) => ({
    ...slice,
    runs: [...slice.layout.scales, slice.layout.zero].map((at) => new WordRun(at * 4)),
  }));
  let row = 0;
  return function* (tensor) {
    const tile = ids.length > 1 ? rowwiseTensor(tensor as QuantizedTensor) : (tensor as QuantizedTensor);
    const [first, last] = [row, row + tile.shape[0]];
    row = last;
    for (const [slice, { begin, end, layout, runs }] of placed.entries()) {
      const [from, to] = [Math.max(begin, first), Math.min(end, last)];
      if (from >= to) continue;
      const part = sliceRows(tile, from - first, to - first);
      const parts: Part[] = [[(from - begin) * (part.qdata.byteLength / (to - from)), part.qdata]];
      const append = (at: number, codes: Uint32Array | undefined, level: number, codec: Codec) => {
        const tall = part.format.scales[level]?.block[0] === "all";
        if (codes === undefined || (tall && from > begin)) return;
        const bytes = (blockCount(part.format, level, part.shape, to - from) * codecBits(codec)) / 8;
        parts.push(...(runs[at] as WordRun).append(new Uint8Array(codes.buffer, codes.byteOffset, bytes)));
      };
      const { scales, zero } = part.format;
      for (const [level, { codec }] of scales.entries()) append(level, part.scales[level], level, codec);
      if (zero.domain !== "none") append(scales.length, part.zero, 0, zero.codec);
      if (part.table !== undefined && from === begin) parts.push([layout.table * 4, part.table]);
      if (to === end) for (const run of runs) parts.push(...run.end());
      yield { source: { kind: "weights", ids, slice }, label, bytes: layout.bytes, parts: parts.filter(hasBytes) };
    }
  };
}

/** Dense weights one after another, each from a word on. */
function denseUploads(types: readonly (readonly [ValueId, TensorType])[], label: string): Placed {
  const sizes = types.map(
    ([, type]) => sizeOf(type.shape as number[]) * (type.kind === "dense" ? BYTES[type.dtype] : 0),
  );
  const starts = sizes.map((_, i) => sizes.slice(0, i).reduce((sum, size) => sum + roundUp(size, 4), 0));
  const bytes = (starts.at(-1) ?? 0) + roundUp(sizes.at(-1) ?? 0, 4);
  const source = { kind: "dense", ids: types.map(([id]) => id) } as const;
  let [which, done] = [0, 0];
  let run = new WordRun(0);
  return function* (tile) {
    const { data } = tile as DenseTensor;
    const parts = [...run.append(new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength))];
    done += data.byteLength;
    if (done === sizes[which]) {
      parts.push(...run.end());
      which++;
      done = 0;
      run = new WordRun(starts[which] ?? 0);
    }
    yield { source, label, bytes, parts: parts.filter(hasBytes) };
  };
}

type Part = readonly [at: number, data: ArrayBufferView];
const hasBytes = ([, { byteLength }]: Part): boolean => byteLength > 0;

/** Bytes of a buffer that come one after another, in pieces of any length, and are written in whole words. */
class WordRun {
  #at: number;
  /** What does not fill a word yet. */
  #rest = new Uint8Array(0);

  constructor(at: number) {
    this.#at = at;
  }

  append(bytes: Uint8Array): Part[] {
    let all = bytes;
    if (this.#rest.length > 0) {
      all = new Uint8Array(this.#rest.length + bytes.length);
      all.set(this.#rest);
      all.set(bytes, this.#rest.length);
    }
    const whole = all.length - (all.length % 4);
    const at = this.#at;
    this.#at += whole;
    this.#rest = all.slice(whole);
    return [[at, all.subarray(0, whole)]];
  }

  /** The last word, filled with zeros. */
  end(): Part[] {
    if (this.#rest.length === 0) return [];
    const word = new Uint8Array(4);
    word.set(this.#rest);
    this.#rest = new Uint8Array(0);
    return [[this.#at, word]];
  }
}

/** Bytes in whole words, as buffer writes need them. */
export function wholeWords(data: ArrayBufferView): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
  if (bytes.byteLength % 4 === 0) return bytes;
  const out = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
  out.set(bytes);
  return out;
}

/** The tiles of a weight. Throws `dtype/mismatch` and `shape/mismatch` when it is not of the value's type, or lacks rows. */
async function* checkedTiles(weight: TensorRows, { type, name }: Value): AsyncGenerator<HostTensor, void> {
  checkStorage(weight.storage, type, name);
  const extents = type.shape as readonly number[];
  const mismatch = (got: readonly number[]) =>
    new FewbitError("shape/mismatch", { what: name, got, expected: `[${extents.join(", ")}]` });
  if (weight.shape.join() !== extents.join()) throw mismatch(weight.shape);
  let rows = 0;
  for await (const tile of weight.tiles()) {
    checkStorage(isDense(tile) ? tile.dtype : tile.format, type, name);
    if (tile.shape.slice(1).join() !== extents.slice(1).join()) throw mismatch(tile.shape);
    rows += tile.shape[0] ?? 1;
    if (rows > (extents[0] ?? 1)) throw mismatch([rows, ...extents.slice(1)]);
    yield tile;
  }
  if (rows !== (extents[0] ?? 1)) throw mismatch([rows, ...extents.slice(1)]);
}

function checkStorage(storage: TensorRows["storage"], type: TensorType, what: string): void {
  const got = typeof storage === "string" ? storage : formatKey(storage);
  const expected = type.kind === "dense" ? type.dtype : formatKey(type.format);
  if (got !== expected) throw new FewbitError("dtype/mismatch", { what, got, expected });
}
