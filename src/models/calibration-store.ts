import type { Format } from "../formats/format.js";
import { openSafetensors, type TensorEntry, writeSafetensors } from "../io/safetensors.js";
import { memorySource } from "../io/source.js";
import { type HostTensor, isDense } from "../ir/tensor.js";

/** Where finished tensors are kept as files, so that an interrupted calibration goes on. One store is for one calibration only. */
export interface CalibrationStore {
  get(name: string): Promise<Uint8Array | undefined>;
  set(name: string, bytes: Uint8Array): Promise<void>;
}

/** A tensor as a safetensors file: its parts as stored. */
export function packTensor(tensor: HostTensor): Uint8Array {
  const entry = (name: string, dtype: "U32" | "F32", data: Uint32Array | Float32Array, shape = [data.length]) =>
    ({ name, dtype, shape, data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength) }) satisfies TensorEntry;
  if (isDense(tensor)) return writeSafetensors([entry("dense", "F32", tensor.data as Float32Array, [...tensor.shape])]);
  const { qdata, scales, zero, table, shape } = tensor;
  return writeSafetensors([
    entry("shape", "U32", Uint32Array.from(shape)),
    entry("qdata", "U32", qdata),
    ...scales.map((codes, i) => entry(`scales.${i}`, "U32", codes)),
    ...(zero === undefined ? [] : [entry("zero", "U32", zero)]),
    ...(table === undefined ? [] : [entry("table", "F32", table)]),
  ]);
}

/** The tensor of `packTensor`; a stored one is in `format`. Throws `io/malformed`. */
export async function unpackTensor(bytes: Uint8Array, name: string, format: Format | null): Promise<HostTensor> {
  await using file = await openSafetensors(memorySource(bytes, name));
  // Copies start on a word of their own.
  const words = async (part: string) => new Uint32Array((await file.read(part)).slice().buffer);
  const floats = async (part: string) => new Float32Array((await file.read(part)).slice().buffer);
  if (format === null) {
    const shape = file.tensors.get("dense")?.shape ?? [];
    return { dtype: "f32", shape: [...shape], data: await floats("dense") };
  }
  const [n, k] = (await words("shape")) as unknown as [number, number];
  return {
    format,
    shape: [n, k],
    qdata: await words("qdata"),
    scales: await Promise.all(format.scales.map((_, i) => words(`scales.${i}`))),
    ...(file.tensors.has("zero") ? { zero: await words("zero") } : {}),
    ...(file.tensors.has("table") ? { table: await floats("table") } : {}),
  };
}
