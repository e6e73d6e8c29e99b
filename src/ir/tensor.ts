import { allocate, BYTES, type DType, type TypedArray } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { sizeOf } from "../core/shape.js";
import type { Format } from "../formats/format.js";
import { type QuantizedTensor, tensorBytes, tensorWords } from "../formats/tensor.js";
import { RowWindow } from "../formats/window.js";
import { concreteShape, type TensorType } from "./graph.js";
import { shapeRows } from "./ops.js";

/** A dense array on the host. f16 and bf16 are raw bits. */
export interface DenseTensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: TypedArray;
}
/** A value on the host: dense, or stored in a format (leading dimensions folded into rows). */
export type HostTensor = DenseTensor | QuantizedTensor;

/** A tensor that comes a few rows at a time. */
export interface TensorRows {
  /** What it is stored in: the format of a matrix, or the dtype of a dense tensor. */
  readonly storage: Format | DType;
  readonly shape: readonly number[];
  /**
   * The rows (of a dense tensor: of its first dimension) in order, as tensors of their own. A tile is good until the next is asked for.
   * No block is cut, and what spans every row (a scale of the tensor, a table) is in every tile.
   */
  tiles(): AsyncIterable<HostTensor> | Iterable<HostTensor>;
}

/** A tensor as rows: one that is whole is one tile. */
export function asRows(tensor: HostTensor | TensorRows): TensorRows {
  if ("tiles" in tensor) return tensor;
  return {
    storage: isDense(tensor) ? tensor.dtype : tensor.format,
    shape: tensor.shape,
    tiles: () => [tensor],
  };
}

/** All rows as one tensor in memory of its own. Throws `shape/mismatch` when they are not those of the shape. */
export async function joinRows(tensor: HostTensor | TensorRows): Promise<HostTensor> {
  if (!("tiles" in tensor)) return tensor;
  const { storage, shape } = tensor;
  const count = shape[0] ?? 1;
  let row = 0;
  if (typeof storage === "string") {
    const data = allocate(storage, sizeOf(shape));
    const width = data.length / Math.max(count, 1);
    for await (const tile of tensor.tiles()) {
      if (!isDense(tile) || row + (tile.shape[0] ?? 1) > count) throw misfit(tensor, tile);
      data.set(tile.data, row * width);
      row += tile.shape[0] ?? 1;
    }
    if (row !== count) throw misfit(tensor, row);
    return { dtype: storage, shape, data };
  }
  const window = new RowWindow(storage, shape as [number, number]);
  for await (const tile of tensor.tiles()) {
    if (isDense(tile) || row + tile.shape[0] > count) throw misfit(tensor, tile);
    window.put(row, tile);
    row += tile.shape[0];
  }
  if (row !== count) throw misfit(tensor, row);
  return window.buffers;
}

function misfit({ shape }: TensorRows, got: HostTensor | number): FewbitError {
  return new FewbitError("shape/mismatch", {
    what: "rows of a tensor",
    got: typeof got === "number" ? [got] : got.shape,
    expected: `[${shape.join(", ")}]`,
  });
}

export function isDense(tensor: HostTensor): tensor is DenseTensor {
  return "data" in tensor;
}

export function hostBytes(tensor: HostTensor): number {
  return isDense(tensor) ? tensor.data.byteLength : tensorBytes(tensor);
}

/** The same tensor in buffers of its own. */
export function copyTensor(tensor: HostTensor): HostTensor {
  if (isDense(tensor)) return { ...tensor, data: tensor.data.slice() };
  return {
    ...tensor,
    qdata: tensor.qdata.slice(),
    scales: tensor.scales.map((codes) => codes.slice()),
    ...(tensor.zero && { zero: tensor.zero.slice() }),
    ...(tensor.table && { table: tensor.table.slice() }),
  };
}

/** A zero-filled host tensor of a type, its symbols at the given values. */
export function zeros(type: TensorType, symbols: Readonly<Record<string, number>>): HostTensor {
  const shape = concreteShape(type.shape, symbols);
  if (type.kind === "dense") return { dtype: type.dtype, shape, data: allocate(type.dtype, sizeOf(shape)) };
  const matrix = shapeRows(shape);
  const words = tensorWords(type.format, matrix);
  return {
    format: type.format,
    shape: matrix,
    qdata: new Uint32Array(words.qdata),
    scales: words.scales.map((count) => new Uint32Array(count)),
    ...(words.zero > 0 ? { zero: new Uint32Array(words.zero) } : {}),
  };
}

/** Bytes that a value of a type takes on a device, its symbols at the given values. */
export function typeBytes(type: TensorType, symbols: Readonly<Record<string, number>>): number {
  const shape = concreteShape(type.shape, symbols);
  if (type.kind === "dense") return sizeOf(shape) * BYTES[type.dtype];
  const words = tensorWords(type.format, shapeRows(shape));
  return 4 * (words.qdata + words.zero + words.scales.reduce((a, b) => a + b, 0));
}
