import { FewbitError, throwIfAborted } from "../../core/errors.js";
import { formatKey } from "../../formats/format.js";
import { concatRows, type QuantizedTensor, sliceRows } from "../../formats/tensor.js";
import type { Graph, Value, ValueId } from "../../ir/graph.js";
import { type HostTensor, isDense } from "../../ir/tensor.js";
import type { Plan } from "../../plan/plan.js";
import type { LoadOptions, WeightSource } from "../backend.js";
import type { ProgramBuffers } from "./buffers.js";
import { type Dispatch, type Source, weightGroup } from "./kernel.js";
import { storedLayout } from "./layout.js";

type WeightsSource = Extract<Source, { kind: "weights" | "dense" }>;

/** Uploads every weight that a dispatch binds, one group at a time, so that the host holds one group at most. */
export async function uploadWeights(
  buffers: ProgramBuffers,
  plan: Plan,
  dispatches: readonly Dispatch[],
  weights: WeightSource,
  options: LoadOptions,
): Promise<void> {
  const sources = new Map<string, WeightsSource>();
  for (const { source } of dispatches.flatMap((dispatch) => dispatch.bindings)) {
    if (source.kind === "weights" || source.kind === "dense")
      sources.set(`${source.kind} ${source.ids.join(",")}`, source);
  }
  let done = 0;
  const total = plan.bytes.weights;
  for (const source of sources.values()) {
    throwIfAborted(options.signal, "uploading weights");
    const tensors: HostTensor[] = [];
    for (const id of source.ids) {
      const value = plan.graph.values[id] as Value;
      const tensor = await weights(value.name);
      checkWeight(tensor, value);
      tensors.push(tensor);
    }
    const upload = source.kind === "weights" ? uploadStored : uploadDense;
    done += upload(buffers, plan.graph, source.ids, tensors);
    options.onProgress?.(Math.min(done, total), total);
  }
}

function uploadStored(
  buffers: ProgramBuffers,
  graph: Graph,
  ids: readonly ValueId[],
  tensors: readonly HostTensor[],
): number {
  const group = weightGroup(
    ids.map((id) => [id, (graph.values[id] as Value).type]),
    buffers.device.capabilities.maxBinding,
  );
  const whole = concatRows(tensors as QuantizedTensor[]);
  let bytes = 0;
  for (const [slice, { begin, end }] of group.slices.entries()) {
    const part = sliceRows(whole, begin, end);
    const layout = storedLayout(part.format, part.shape);
    const buffer = buffers.add({ kind: "weights", ids, slice }, label(graph, ids), layout.bytes);
    // Part by part, so that the host never holds the device's layout beside the tensor itself.
    const write = (at: number, words: Uint32Array | Float32Array | undefined) => {
      if (words !== undefined && words.length > 0) {
        buffers.device.gpu.queue.writeBuffer(buffer, at * 4, words as Uint32Array<ArrayBuffer>);
      }
    };
    write(0, part.qdata);
    for (const [i, at] of layout.scales.entries()) write(at, part.scales[i]);
    write(layout.zero, part.zero);
    write(layout.table, part.table);
    bytes += layout.bytes;
  }
  return bytes;
}

function uploadDense(
  buffers: ProgramBuffers,
  graph: Graph,
  ids: readonly ValueId[],
  tensors: readonly HostTensor[],
): number {
  const parts = tensors.filter(isDense).map((tensor) => wholeWords(tensor.data));
  const bytes = parts.reduce((sum, part) => sum + part.byteLength, 0);
  const buffer = buffers.add({ kind: "dense", ids }, label(graph, ids), bytes);
  let at = 0;
  for (const part of parts) {
    buffers.device.gpu.queue.writeBuffer(buffer, at, part);
    at += part.byteLength;
  }
  return bytes;
}

const label = (graph: Graph, ids: readonly ValueId[]): string => ids.map((id) => graph.values[id]?.name).join("+");

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
