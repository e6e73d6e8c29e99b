import { type FloatType, roundTo, toFloat32 } from "../core/dtype.js";
import { FewbitError, nearestNames } from "../core/errors.js";
import { asMatrix, sizeOf } from "../core/shape.js";
import type { Format } from "../formats/format.js";
import { FORMATS, type FormatName } from "../formats/table.js";
import { dequantize as exactValues, type QuantizedTensor } from "../formats/tensor.js";
import { configFor, type QuantizeConfig } from "../quantize/configs.js";
import { listQuantizeNames, parseQuantizeName } from "../quantize/names.js";
import { type QuantizeOptions, quantizeTensor } from "../quantize/quantize.js";

export interface QuantizeTensorOptions extends QuantizeOptions {
  /** The dtype that the numbers are of: they are rounded to it first, and some formats store their scales in it. Default f32. */
  readonly dtype?: FloatType;
}

/**
 * Quantizes numbers of a `shape` [..., k] (leading dimensions fold into rows). `format` is a format, the name of a row of the
 * format table (`int4_tinygemm`, with that row's own block), or a short name as `--quantize` takes it (`int4wo-64`: what that
 * config does to a weight). Raw f16 or bf16 bits come as a Uint16Array with their `dtype`.
 *
 * Throws `argument/unknown-name`, `argument/invalid`, `shape/mismatch`, `format/block`, and `quantize/unsupported` for a shape or
 * dtype that the config cannot take.
 */
export function quantize(
  data: Float32Array | Uint16Array,
  shape: readonly number[],
  format: Format | string,
  options: QuantizeTensorOptions = {},
): QuantizedTensor {
  const dtype = options.dtype ?? "f32";
  if (shape.length === 0 || !shape.every((extent) => Number.isSafeInteger(extent) && extent >= 0)) {
    throw new FewbitError("shape/mismatch", {
      what: "shape",
      got: shape,
      expected: "at least one non-negative integer",
    });
  }
  if (sizeOf(shape) !== data.length) {
    throw new FewbitError("shape/mismatch", { what: "data", got: [data.length], expected: `[${shape.join(" * ")}]` });
  }
  const matrix = asMatrix(shape);
  const { row, numerics } = typeof format === "string" ? resolve(format, matrix, dtype) : { row: format };
  return quantizeTensor(asFloats(data, dtype), matrix, dtype, row, { ...(numerics && { numerics }), ...options });
}

/** The values of a quantized tensor [rows, k], each rounded once to float32. */
export function dequantize(tensor: QuantizedTensor): Float32Array {
  return Float32Array.from(exactValues(tensor));
}

/** One parameter of a model on the host: raw bits for f16 and bf16. */
export interface Parameter {
  readonly dtype: FloatType;
  readonly shape: readonly number[];
  readonly data: Float32Array | Uint16Array;
}

export interface QuantizedModel {
  /** Quantized weights by parameter name; parameters that no config takes are not in it. */
  readonly weights: ReadonlyMap<string, QuantizedTensor>;
  /** The format that the input of a layer is quantized to on every call, for layers with a dynamic config. */
  readonly activations: ReadonlyMap<string, Format>;
}

/**
 * Quantizes every linear of a model, torchao's `quantize_` (specification, section 4): parameters named `<layer>.weight` with two
 * dimensions. `config` is one config, a short name, or a map of layer patterns to configs (see `configFor`); `filter` chooses layers
 * by name and goes with a single config only.
 *
 * Throws `quantize/layer` naming the first layer that its config cannot take, with the reason: nothing is skipped in silence; and
 * `argument/invalid`, `argument/unknown-name`.
 */
export function quantizeModel(
  parameters: ReadonlyMap<string, Parameter>,
  config: QuantizeConfig | string | ReadonlyMap<string, QuantizeConfig | null> | null,
  filter?: (layer: string) => boolean,
): QuantizedModel {
  const selection = typeof config === "string" ? parseName(config) : config;
  const weights = new Map<string, QuantizedTensor>();
  const activations = new Map<string, Format>();
  for (const [name, { dtype, shape, data }] of parameters) {
    if (!name.endsWith(".weight") || shape.length !== 2) continue;
    const layer = name.slice(0, -".weight".length);
    const chosen = configFor(layer, selection, filter);
    if (chosen === null) continue;
    const matrix = [shape[0] as number, shape[1] as number] as const;
    const format = chosen.weight({ shape: matrix, dtype });
    if ("refused" in format) {
      throw new FewbitError("quantize/layer", { layer, config: chosen.name, reason: format.refused });
    }
    weights.set(name, quantize(data, matrix, format, { dtype, numerics: chosen.numerics }));
    if (chosen.activation !== null) activations.set(layer, chosen.activation);
  }
  return { weights, activations };
}

function resolve(
  name: string,
  shape: readonly [rows: number, k: number],
  dtype: FloatType,
): { row: Format; numerics?: "guarded" | "torchao" } {
  if (Object.hasOwn(FORMATS, name)) return { row: FORMATS[name as FormatName] };
  const config = parseName(name);
  if (config === null) return { row: FORMATS[dtype] };
  const row = config.weight({ shape, dtype });
  if ("refused" in row) throw new FewbitError("quantize/unsupported", { config: name, reason: row.refused });
  return { row, numerics: config.numerics };
}

function parseName(name: string) {
  try {
    return parseQuantizeName(name);
  } catch (error) {
    if (!(error instanceof FewbitError) || error.code !== "argument/unknown-name") throw error;
    const nearest = nearestNames(name, [...Object.keys(FORMATS), ...listQuantizeNames()]);
    throw new FewbitError("argument/unknown-name", { kind: "format", name, nearest });
  }
}

function asFloats(data: Float32Array | Uint16Array, dtype: FloatType): Float32Array {
  if (data instanceof Float32Array) return dtype === "f32" ? data : data.map((value) => roundTo(dtype, value));
  if (dtype !== "f32") return toFloat32(dtype, data);
  throw new FewbitError("dtype/mismatch", {
    what: "data",
    got: "a Uint16Array",
    expected: "f32 numbers in a Float32Array",
  });
}
