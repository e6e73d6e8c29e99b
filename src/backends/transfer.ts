import { BYTES, viewAs } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { sizeOf } from "../core/shape.js";
import type { Symbols } from "../ir/evaluate.js";
import { concreteShape, type Graph, type Value, type ValueId } from "../ir/graph.js";
import { shapeRows } from "../ir/ops.js";
import { type HostTensor, isDense } from "../ir/tensor.js";
import type { Plan } from "../plan/plan.js";
import { layoutWords, type StoredLayout, storedLayout, tensorFromWords } from "./stored-layout.js";
import { wholeWords } from "./weights.js";

/** Bytes that an input or a state takes on a device, every symbol at its largest. */
export function residentBytes({ type }: Value, graph: Graph): number {
  const shape = concreteShape(type.shape, graph.symbols);
  return type.kind === "format" ? storedLayout(type.format, shapeRows(shape)).bytes : sizeOf(shape) * BYTES[type.dtype];
}

/** What to write where for an input or a state. Throws `graph/invalid`, `dtype/mismatch`, `shape/mismatch`. */
export function encodeWrite(
  graph: Graph,
  name: string,
  tensor: HostTensor,
): { readonly id: ValueId; readonly bytes: Uint8Array<ArrayBuffer> | Uint32Array<ArrayBuffer> } {
  const value = graph.values.find(({ name: own, role }) => own === name && (role === "input" || role === "state"));
  if (value === undefined)
    throw new FewbitError("graph/invalid", { where: name, reason: "it is neither an input nor a state" });
  const { type, id } = value;
  const dense = isDense(tensor);
  if (dense !== (type.kind === "dense") || (dense && type.kind === "dense" && tensor.dtype !== type.dtype)) {
    throw new FewbitError("dtype/mismatch", {
      what: name,
      got: dense ? tensor.dtype : tensor.format.name,
      expected: type.kind === "dense" ? type.dtype : type.format.name,
    });
  }
  const capacity = sizeOf(concreteShape(type.shape, graph.symbols));
  if (sizeOf(tensor.shape) > capacity) {
    throw new FewbitError("shape/mismatch", {
      what: name,
      got: tensor.shape,
      expected: `at most ${capacity} elements`,
    });
  }
  return { id, bytes: dense ? wholeWords(tensor.data) : layoutWords(tensor, layoutOf(value, graph.symbols)).words };
}

/** How to read an output or a state: whose buffer, how many bytes, and what they mean. */
export interface Reading {
  readonly id: ValueId;
  readonly bytes: number;
  decode(data: Uint8Array<ArrayBuffer>): HostTensor;
}

/** `symbols` are those of the last run; without one, the largest. Throws `graph/invalid`. */
export function decodeRead({ graph, memory }: Plan, name: string, symbols: Symbols = graph.symbols): Reading {
  const id = graph.outputs[name] ?? graph.values.find((value) => value.role === "state" && value.name === name)?.id;
  if (id === undefined)
    throw new FewbitError("graph/invalid", { where: name, reason: "it is neither an output nor a state" });
  const place = memory.placement.get(id);
  const value = graph.values[id] as Value;
  const { type } = value;
  // States are whole; what a run made has the shape of that run.
  const shape = concreteShape(type.shape, value.role === "value" ? symbols : graph.symbols);
  const [rows, width] = shapeRows(shape);
  if (type.kind === "format") {
    const layout = layoutOf(value, graph.symbols);
    return {
      id,
      bytes: layout.bytes,
      decode: (data) => tensorFromWords(layout, new Uint32Array(data.buffer), rows),
    };
  }
  const { dtype } = type;
  const size = BYTES[dtype];
  // A value may be columns of a wider one. The stride of a one-dimensional value updated in place is a symbol's name.
  const stride = Number.isInteger(place?.stride) ? (place?.stride as number) : width;
  return {
    id,
    bytes: Math.ceil((rows * stride * size) / 4) * 4,
    decode: (data) => {
      if (stride === width) return { dtype, shape, data: viewAs(dtype, data.subarray(0, rows * width * size)) };
      const part = new Uint8Array(rows * width * size);
      for (let row = 0; row < rows; row++) {
        const begin = (row * stride + (place?.column ?? 0)) * size;
        part.set(data.subarray(begin, begin + width * size), row * width * size);
      }
      return { dtype, shape, data: viewAs(dtype, part) };
    },
  };
}

/** An output whose memory is its own and of which the last run used only the first `used` of `all` words. */
export interface PartlyUsed {
  readonly name: string;
  readonly id: ValueId;
  readonly used: number;
  readonly all: number;
}

/** The outputs in which a run must leave words beyond its own rows alone; for validation. */
export function partlyUsedOutputs({ graph, memory }: Plan, symbols: Symbols = graph.symbols): PartlyUsed[] {
  const { slotOf, placement } = memory;
  return Object.entries(graph.outputs).flatMap(([name, id]) => {
    const { type, role } = graph.values[id] as Value;
    const alone = [...slotOf.values()].filter((slot) => slot === slotOf.get(id)).length === 1;
    if (type.kind !== "dense" || role !== "value" || !alone || placement.has(id)) return [];
    const [all, used] = [graph.symbols, symbols].map((values) =>
      Math.ceil((sizeOf(concreteShape(type.shape, values)) * BYTES[type.dtype]) / 4),
    ) as [number, number];
    return used === all ? [] : [{ name, id, used, all }];
  });
}

function layoutOf({ type, name }: Value, symbols: Symbols): StoredLayout {
  if (type.kind !== "format") throw new FewbitError("graph/invalid", { where: name, reason: "it is dense" });
  return storedLayout(type.format, shapeRows(concreteShape(type.shape, symbols)));
}
