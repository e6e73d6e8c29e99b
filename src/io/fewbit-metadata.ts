import type { FloatType } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import type { Staging } from "../core/staging.js";
import { blockGrid, codecBits, codecVector, type Format } from "../formats/format.js";
import { flatBytes, type PartShape, packedRows, partDtype, type StoredClass } from "../formats/stored-class.js";
import { codesOf, type StoredMatrix, type StoredPart } from "../formats/stored-matrix.js";
import type { QuantizedTensor } from "../formats/tensor.js";
import { parseQuantizeName } from "../quantize/names.js";
import type { Json } from "./scheme.js";

/*
 * Parameters in formats that torchao's checkpoints have no class for. They are named and described as torchao's are, with the
 * class FewbitTensor: `quantize` is a name of `--quantize`, which says format and activation for a weight of `shape` and `dtype`;
 * the parts are `qdata` (codes side by side, least significant bit first, every row starting on a byte), `scale_<level>`,
 * `zero_point` (both one code a block, row-major) and `table`.
 */

const TYPE = "FewbitTensor";
const FLOATS: readonly string[] = ["f32", "f16", "bf16"] satisfies FloatType[];

export const isFewbit = (type: string): boolean => type === TYPE;

/** How a parameter is written that torchao cannot hold. */
export function fewbitClass(
  quantize: string,
  format: Format,
  shape: readonly [n: number, k: number],
  dtype: FloatType,
): StoredClass {
  return {
    type: TYPE,
    attributes: { version: 1, quantize, shape, dtype },
    parts: partsOf(format, shape),
    encode: (tensor, part) => encodePart(tensor, part),
  };
}

function partsOf(format: Format, shape: readonly [number, number]): PartShape[] {
  const { element, scales, zero } = format;
  const [patchRows, patchK] = codecVector(element);
  const rowBytes = Math.ceil(((shape[1] / patchK) * codecBits(element)) / 8);
  const parts: PartShape[] = [{ name: "qdata", dtype: "U8", shape: [shape[0] / patchRows, rowBytes] }];
  for (const [i, { codec, block }] of scales.entries())
    parts.push({ name: `scale_${i}`, dtype: partDtype(codec), shape: blockGrid(block, shape) });
  const first = scales[0];
  if (zero.domain !== "none" && first !== undefined)
    parts.push({ name: "zero_point", dtype: partDtype(zero.codec), shape: blockGrid(first.block, shape) });
  if (element.kind === "lut" && element.entries === "learned")
    parts.push({ name: "table", dtype: "F32", shape: [2 ** element.bits, patchRows * patchK] });
  return parts;
}

function encodePart(tensor: QuantizedTensor, part: string): Uint8Array {
  if (part === "qdata") return packedRows(tensor);
  const described = partsOf(tensor.format, tensor.shape).find(({ name }) => name === part) as PartShape;
  const count = described.shape.reduce((a, b) => a * b, 1);
  if (part === "table") {
    const table = tensor.table as Float32Array;
    return new Uint8Array(table.buffer, table.byteOffset, table.byteLength);
  }
  const { format } = tensor;
  if (part === "zero_point" && format.zero.domain !== "none")
    return flatBytes(tensor.zero as Uint32Array, count, codecBits(format.zero.codec));
  const level = Number(part.slice("scale_".length));
  const { codec } = format.scales[level] as Format["scales"][number];
  return flatBytes(tensor.scales[level] as Uint32Array, count, codecBits(codec));
}

/**
 * What the parts of a parameter of this class mean.
 * @throws FewbitError `io/malformed`, `model/unsupported` (a name that this version does not know)
 */
export function describeFewbit(
  parameter: string,
  attributes: Json,
  parts: ReadonlyMap<string, StoredPart>,
): StoredMatrix {
  const malformed = (reason: string) =>
    new FewbitError("io/malformed", { path: parameter, reason: `${TYPE}: ${reason}` });
  const { version, quantize, shape, dtype } = attributes;
  if (version !== 1)
    throw new FewbitError("model/unsupported", { what: `${TYPE} version`, value: String(version), supported: ["1"] });
  const legal = Array.isArray(shape) && shape.length === 2 && shape.every((n) => Number.isInteger(n) && n > 0);
  if (!legal || typeof quantize !== "string" || !FLOATS.includes(String(dtype)))
    throw malformed("its quantize, shape or dtype is missing");
  const matrix = shape as [number, number];
  const config = parseQuantizeName(quantize);
  const format = config?.weight({ shape: matrix, dtype: dtype as FloatType });
  if (format === undefined || "refused" in format) throw malformed(`${quantize} does not take [${matrix.join(", ")}]`);
  for (const { name, dtype: type, shape: expected } of partsOf(format, matrix)) {
    const part = parts.get(name);
    if (part === undefined) throw malformed(`its part ${name} is missing`);
    if (part.dtype !== type || part.shape.join() !== expected.join())
      throw malformed(
        `its ${name} is ${part.dtype} [${part.shape.join(", ")}]: expected ${type} [${expected.join(", ")}]`,
      );
  }
  const part = (name: string) => parts.get(name) as StoredPart;
  const codes = async (name: string, signal?: AbortSignal, memory?: Staging) =>
    codesOf(part(name).dtype, await part(name).read(undefined, signal, memory));
  const [patchRows] = codecVector(format.element);
  return {
    format,
    shape: matrix,
    activation: config?.activation ?? null,
    kind: `fewbit ${quantize}`,
    cut: "rows",
    step: patchRows,
    bytesPerLine: (part("qdata").shape[1] ?? 1) / patchRows,
    read: async (begin, end, signal, memory) => ({
      packed: await part("qdata").read([begin / patchRows, end / patchRows], signal, memory),
    }),
    blocks: async (signal, memory) => ({
      scales: await Promise.all(format.scales.map((_, i) => codes(`scale_${i}`, signal, memory))),
      ...(parts.has("zero_point") ? { zero: await codes("zero_point", signal, memory) } : {}),
      ...(parts.has("table")
        ? { table: new Float32Array((await part("table").read(undefined, signal)).slice().buffer) }
        : {}),
    }),
  };
}
