import { FewbitError, throwIfAborted } from "../core/errors.js";
import { codecVector, type Format, formatKey } from "../formats/format.js";
import { concatBlocks, type QuantizedTensor, rowwise, sliceRows } from "../formats/tensor.js";
import type { TensorType, Value, ValueId } from "../ir/graph.js";
import { type HostTensor, isDense } from "../ir/tensor.js";
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
  readonly parts: readonly (readonly [at: number, data: ArrayBufferView])[];
}

/**
 * Fetches every weight that `sources` name and hands it to `upload`, part by part: the host holds the element codes of one tensor
 * at a time, and never the device's layout beside them.
 */
export async function loadWeights(
  plan: Plan,
  maxBinding: number,
  sources: Iterable<Source>,
  weights: WeightSource,
  options: LoadOptions,
  upload: (part: WeightUpload) => void,
): Promise<void> {
  const { values } = plan.graph;
  const groups = new Map<string, Extract<Source, { kind: "weights" | "dense" }>>();
  for (const source of sources) {
    if (source.kind === "weights" || source.kind === "dense")
      groups.set(`${source.kind} ${source.ids.join(",")}`, source);
  }
  let done = 0;
  const total = plan.bytes.weights;
  for (const { kind, ids } of groups.values()) {
    throwIfAborted(options.signal, "uploading weights");
    const label = ids.map((id) => values[id]?.name).join("+");
    const send = (parts: readonly WeightUpload[]) => {
      for (const part of parts) {
        upload(part);
        for (const [, data] of part.parts) done += data.byteLength;
      }
    };
    const fetch = async (id: ValueId): Promise<HostTensor> => {
      const value = values[id] as Value;
      const tensor = await weights(value.name);
      checkWeight(tensor, value);
      return tensor;
    };
    if (kind === "dense") {
      const tensors: HostTensor[] = [];
      for (const id of ids) tensors.push(await fetch(id));
      send([denseUpload(ids, label, tensors)]);
    } else {
      const types = ids.map((id) => [id, (values[id] as Value).type] as const);
      const group = weightGroup(types, maxBinding);
      const blocks: QuantizedTensor[] = [];
      let row = 0;
      for (const id of ids) {
        const tensor = (await fetch(id)) as QuantizedTensor;
        send(codeUploads(group, label, tensor, row));
        row += tensor.shape[0];
        blocks.push({ ...tensor, qdata: new Uint32Array(0) });
      }
      send(blockUploads(group, label, concatBlocks(blocks)));
    }
    options.onProgress?.(Math.min(done, total), total);
  }
}

/** The element codes of a tensor whose first row is row `row` of the group. */
function codeUploads(
  { ids, slices }: WeightGroup,
  label: string,
  { format, shape, qdata }: QuantizedTensor,
  row: number,
): WeightUpload[] {
  const [vectorRows] = codecVector(format.element);
  const stride = (qdata.length * vectorRows) / Math.max(shape[0], 1);
  return slices.flatMap(({ begin, end, layout }, slice): WeightUpload[] => {
    const [from, to] = [Math.max(begin, row), Math.min(end, row + shape[0])];
    if (from >= to) return [];
    const codes = qdata.subarray(((from - row) / vectorRows) * stride, ((to - row) / vectorRows) * stride);
    const parts = [[((from - begin) / vectorRows) * stride * 4, codes]] as const;
    return [{ source: { kind: "weights", ids, slice }, label, bytes: layout.bytes, parts }];
  });
}

/** Scales, zero points and tables of a group. */
function blockUploads({ ids, slices }: WeightGroup, label: string, whole: QuantizedTensor): WeightUpload[] {
  return slices.map(({ begin, end, layout }, slice) => {
    const part = sliceRows(whole, begin, end);
    const parts: (readonly [number, ArrayBufferView | undefined])[] = [
      ...layout.scales.map((at, i) => [at * 4, part.scales[i]] as const),
      [layout.zero * 4, part.zero],
      [layout.table * 4, part.table],
    ];
    return {
      source: { kind: "weights", ids, slice },
      label,
      bytes: layout.bytes,
      parts: parts.filter((entry): entry is [number, ArrayBufferView] => (entry[1]?.byteLength ?? 0) > 0),
    };
  });
}

function denseUpload(ids: readonly ValueId[], label: string, tensors: readonly HostTensor[]): WeightUpload {
  let bytes = 0;
  const parts = tensors.filter(isDense).map((tensor) => {
    const data = wholeWords(tensor.data);
    const at = bytes;
    bytes += data.byteLength;
    return [at, data] as const;
  });
  return { source: { kind: "dense", ids }, label, bytes, parts };
}

/** Bytes in whole words, as buffer writes need them. */
export function wholeWords(data: ArrayBufferView): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
  if (bytes.byteLength % 4 === 0) return bytes;
  const out = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
  out.set(bytes);
  return out;
}

function checkWeight(tensor: HostTensor, { type, name }: Value): void {
  const got = isDense(tensor) ? tensor.dtype : formatKey(tensor.format);
  const expected = type.kind === "dense" ? type.dtype : formatKey(type.format);
  if (got !== expected) throw new FewbitError("dtype/mismatch", { what: name, got, expected });
  if (tensor.shape.length !== type.shape.length || tensor.shape.some((extent, i) => extent !== type.shape[i])) {
    throw new FewbitError("shape/mismatch", { what: name, got: tensor.shape, expected: `[${type.shape.join(", ")}]` });
  }
}
