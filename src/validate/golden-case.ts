import type { FloatType } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { type Codec, codecBits, type Format } from "../formats/format.js";
import { signExtend } from "../formats/layouts.js";
import { unpackFlat } from "../formats/pack.js";
import { elementCodes, type QuantizedTensor, scaleValues, zeroValues } from "../formats/tensor.js";
import type { QuantizeOptions } from "../quantize/quantize.js";
import type { GoldenCase, GoldenFile, GoldenTensorInfo, Numbers } from "./golden-tensors.js";

type Maybe<T> = T | Promise<T>;

/** What attention is asked for: [batch, heads, tokens, size] row-major operands. */
export interface AttentionShape {
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly tokens: number;
  readonly keys: number;
  readonly size: number;
  readonly causal: boolean;
}

/**
 * What a backend can do; every case is made of these. A backend leaves out what it lacks, and the cases that need it
 * are reported as unsupported, by name. Matrices are row-major; `f32` numbers only.
 */
export interface GoldenPrimitives {
  /** Codes of float32 values. */
  encode(codec: Codec, values: Float32Array): Maybe<Uint32Array>;
  /** Values of all given codes. */
  decode(codec: Codec, codes: Uint32Array): Maybe<Float32Array>;
  /** As `quantizeTensor`: values of `dtype`, bit-equal codes and scales. */
  quantize(
    data: Float32Array,
    shape: readonly [n: number, k: number],
    dtype: FloatType,
    format: Format,
    options: QuantizeOptions,
  ): Maybe<QuantizedTensor>;
  /** Values in `dtype`, rounded after every operation as torchao does. */
  dequantize(tensor: QuantizedTensor, dtype: FloatType): Maybe<Float32Array>;
  /** x [m, k] W^T + bias over the stored values: [m, n]. */
  linear(x: Float32Array | QuantizedTensor, weight: QuantizedTensor, bias: Float32Array | null): Maybe<Float32Array>;
  /** softmax(q k^T / sqrt(size)) v; causal row i sees keys 0..i. */
  sdpa(q: Float32Array, k: Float32Array, v: Float32Array, shape: AttentionShape): Maybe<Float32Array>;
  /** A tensor as it comes back from the backend's memory: what host algorithms make goes through it. */
  store(tensor: QuantizedTensor): Maybe<QuantizedTensor>;
}
export type GoldenPrimitive = keyof GoldenPrimitives;

export interface GoldenBackend {
  readonly name: string;
  readonly primitives: Partial<GoldenPrimitives>;
  /** Why a primitive is left out, for reports. */
  readonly lacks?: Partial<Record<GoldenPrimitive, string>>;
  /** Why the backend's `quantize` makes this format on the host and stores what comes out, or null where it does not. */
  quantizesOnHost?(format: Format, options: QuantizeOptions): string | null;
}

/** Cases of one config of the manifest: what they need and how their tensors are made. */
export interface GoldenHandler {
  readonly needs: readonly GoldenPrimitive[] | ((golden: GoldenCase) => readonly GoldenPrimitive[]);
  /** What of these cases fewbit does on the host, whatever the backend: preparation that no device takes part in. */
  readonly host?: string;
  run(context: GoldenContext): Promise<void>;
}

/** One case at work. */
export interface GoldenContext {
  readonly golden: GoldenCase;
  readonly backend: GoldenPrimitives;
  /** Numbers of a stored tensor. */
  input(name: string): Numbers;
  /** Numbers of a stored float tensor. */
  floats(name: string): Float32Array;
  has(name: string): boolean;
  /** Another file of the golden directory. */
  openFile(name: string): Promise<GoldenFile>;
  shape(name: string): readonly number[];
  /** Leading dimensions folded into rows. */
  matrix(name: string): readonly [n: number, k: number];
  dtype(name: string): FloatType;
  /**
   * Hands over the result for a tensor; a name may be given more than once, and names that a case lacks are ignored.
   */
  put(name: string, values: ArrayLike<number>): void;
  /** Quantizes a stored tensor with torchao's literal numerics. */
  quantize(name: string, format: Format, options?: QuantizeOptions): Promise<QuantizedTensor>;
}

/** The context of one case; results are appended to `results`. */
export function contextOf(
  golden: GoldenCase,
  file: GoldenFile,
  backend: GoldenPrimitives,
  results: [string, ArrayLike<number>][],
  openFile: (name: string) => Promise<GoldenFile>,
): GoldenContext {
  const info = (name: string): GoldenTensorInfo => {
    const found = golden.tensors.find((tensor) => tensor.name === name);
    if (found === undefined) throw new FewbitError("model/missing-tensor", { name, path: golden.file });
    return found;
  };
  const context: GoldenContext = {
    golden,
    backend,
    openFile,
    input: (name) => file.numbers(name),
    floats: (name) => file.numbers(name) as Float32Array,
    has: (name) => file.has(name),
    shape: (name) => info(name).shape,
    matrix: (name) => {
      const { shape } = info(name);
      const k = shape.at(-1) ?? 1;
      return [shape.reduce((a, b) => a * b, 1) / k, k];
    },
    dtype: (name) => floatTypeOf(info(name).dtype),
    put: (name, values) => void results.push([name, values]),
    quantize: async (name, format, options = {}) =>
      backend.quantize(context.floats(name), context.matrix(name), context.dtype(name), format, {
        numerics: "torchao",
        ...options,
      }),
  };
  return context;
}

/** torch dtype names, and safetensors ones, as fewbit's. */
export function floatTypeOf(name: unknown): FloatType {
  const types: Record<string, FloatType> = {
    float32: "f32",
    F32: "f32",
    bfloat16: "bf16",
    BF16: "bf16",
    float16: "f16",
    F16: "f16",
  };
  const type = types[String(name)];
  if (type === undefined) {
    throw new FewbitError("dtype/mismatch", {
      what: "a golden tensor",
      got: String(name),
      expected: Object.keys(types).join(", "),
    });
  }
  return type;
}

/** Element codes as a golden file stores them: signed integers as numbers, everything else as unsigned codes. */
export function storedCodes(tensor: QuantizedTensor): ArrayLike<number> {
  const { element } = tensor.format;
  const codes = elementCodes(tensor);
  return element.kind === "int" && element.signed ? signExtend(codes, codecBits(element)) : codes;
}

/** Raw codes of a scale level, one per block. */
export function scaleBits(tensor: QuantizedTensor, level = 0): Uint32Array {
  const codec = tensor.format.scales[level]?.codec as Codec;
  return unpackFlat(tensor.scales[level] as Uint32Array, scaleValues(tensor, level).length, codecBits(codec));
}

/** Hands over codes, scales (values and bits) and zero points of a tensor under the usual names. */
export function putParts(context: GoldenContext, prefix: string, tensor: QuantizedTensor): void {
  context.put(`${prefix}codes`, storedCodes(tensor));
  if (tensor.format.scales.length === 0) return;
  context.put(`${prefix}scale`, scaleValues(tensor, 0));
  context.put(`${prefix}scale.bits`, scaleBits(tensor));
  const zeros = zeroValues(tensor);
  context.put(`${prefix}zero_point`, zeros.length > 0 ? zeros : new Float32Array(scaleValues(tensor, 0).length));
}
