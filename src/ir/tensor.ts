import { allocate, BYTES, type DType, type TypedArray } from "../core/dtype.js";
import { sizeOf } from "../core/shape.js";
import { type QuantizedTensor, tensorBytes, tensorWords } from "../formats/tensor.js";
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
