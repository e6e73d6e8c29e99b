import { viewAs } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { assembleTensor } from "./assemble.js";
import { type Block, type Format, withScale } from "./format.js";
import { cropMatrix, fromBlocked, transpose, unpackNibbles, unpackTiles4d } from "./layouts.js";
import { CODECS, FORMATS, type FormatName, VARIANTS } from "./table.js";
import type { QuantizedTensor } from "./tensor.js";

/** One stored part of a torchao parameter, little-endian. */
export interface TorchaoPart {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

/** A quantized parameter of a checkpoint written by torchao (specification 25). */
export interface TorchaoWeight {
  readonly tensor: QuantizedTensor;
  /** The format that the activation is dynamically quantized to; null for weight-only tensors. */
  readonly activation: Format | null;
  /** Multiplies the activation before anything else (SmoothQuant, AWQ). */
  readonly preScale?: TorchaoPart;
}

/** The name under which a part of parameter `M.w` is stored: `M._w_part`. */
export function torchaoPartName(parameter: string, part: string): string {
  const dot = parameter.lastIndexOf(".");
  return `${parameter.slice(0, dot + 1)}_${parameter.slice(dot + 1)}_${part}`;
}

type Attributes = Readonly<Record<string, unknown>>;

/** A stored parameter at hand: its name (for messages), class, attributes and parts. */
class Stored {
  readonly name: string;
  readonly className: string;
  readonly attributes: Attributes;
  readonly parts: ReadonlyMap<string, TorchaoPart>;

  constructor(name: string, className: string, attributes: Attributes, parts: ReadonlyMap<string, TorchaoPart>) {
    this.name = name;
    this.className = className;
    this.attributes = attributes;
    this.parts = parts;
  }

  part(name: string): TorchaoPart {
    const part = this.parts.get(name);
    if (part === undefined) throw this.malformed(`its part ${torchaoPartName(this.name, name)} is missing`);
    return part;
  }

  /** The codes of a part: raw bits, one number per element. */
  codes(name: string): Uint32Array {
    const { dtype, bytes } = this.part(name);
    switch (dtype) {
      case "F32":
      case "I32":
        return Uint32Array.from(viewAs("u32", bytes));
      case "BF16":
      case "F16":
        return Uint32Array.from(viewAs("bf16", bytes));
      default:
        return Uint32Array.from(bytes);
    }
  }

  /** The codec of a scale part's dtype. */
  codec(name: string) {
    const codecs = {
      F32: CODECS.f32,
      F16: CODECS.f16,
      BF16: CODECS.bf16,
      F8_E4M3: CODECS.e4m3,
      F8_E8M0: CODECS.e8m0,
    } as const;
    const codec = codecs[this.part(name).dtype as keyof typeof codecs];
    if (codec === undefined) throw this.malformed(`its ${name} has dtype ${this.part(name).dtype}`);
    return codec;
  }

  attribute(name: string): unknown {
    const value = this.attributes[name];
    // Nested values are objects with the Python type and the value; enums and dtypes are names.
    return typeof value === "object" && value !== null && "_data" in value ? value._data : value;
  }

  matrix(name: string): [number, number] {
    const { shape } = this.part(name);
    if (shape.length !== 2) throw this.malformed(`its ${name} has shape [${shape.join(", ")}]: only matrices are read`);
    return [shape[0] as number, shape[1] as number];
  }

  /** The scale block of a weight of `shape`. */
  block(shape: readonly [number, number]): Block {
    const size = this.attribute("block_size") as readonly number[];
    return [
      size[0] === shape[0] && shape[0] > 1 ? "all" : (size[0] as number),
      size[1] === shape[1] ? "all" : (size[1] as number),
    ];
  }

  malformed(reason: string): FewbitError {
    return new FewbitError("io/malformed", { path: this.name, reason: `${this.className}: ${reason}` });
  }
}

type Reader = (stored: Stored) => { tensor: QuantizedTensor; activation: Format | null };

const READERS: Readonly<Record<string, Reader>> = {
  Float8Tensor: (stored) => {
    const shape = stored.matrix("qdata");
    const row = stored.part("qdata").dtype === "F8_E5M2" ? FORMATS.float8_e5m2 : FORMATS.float8_e4m3;
    const format = withScale(row, { block: stored.block(shape) });
    const tensor = assembleTensor(format, shape, { elements: stored.codes("qdata"), scales: [stored.codes("scale")] });
    return { tensor, activation: activationOf(stored) };
  },
  Int8Tensor: (stored) => {
    const shape = stored.matrix("qdata");
    const zeros = stored.parts.has("zero_point") ? stored.codes("zero_point") : new Uint32Array(0);
    const asymmetric = zeros.some((zero) => zero !== 0);
    const format = withScale(asymmetric ? FORMATS.int8_asymmetric : FORMATS.int8, {
      block: stored.block(shape),
      codec: stored.codec("scale"),
    });
    const parts = {
      elements: stored.codes("qdata"),
      scales: [stored.codes("scale")],
      ...(asymmetric ? { zero: zeros } : {}),
    };
    return { tensor: assembleTensor(format, shape, parts), activation: activationOf(stored) };
  },
  IntxUnpackedToInt8Tensor: (stored) => {
    const shape = stored.matrix("qdata");
    const bits = Number(/^int([1-8])$/.exec(String(stored.attribute("target_dtype")))?.[1]);
    if (Number.isNaN(bits)) throw stored.malformed(`its target_dtype is ${String(stored.attribute("target_dtype"))}`);
    const zeros = stored.parts.has("zero_point") ? stored.codes("zero_point") : new Uint32Array(0);
    const asymmetric = bits === 1 || zeros.some((zero) => zero !== 0);
    const name = `int${bits === 8 ? "x8" : bits}${asymmetric && bits > 1 ? "_asymmetric" : ""}` as FormatName;
    const format = withScale(FORMATS[name], { block: stored.block(shape), codec: stored.codec("scale") });
    const parts = {
      elements: stored.codes("qdata"),
      scales: [stored.codes("scale")],
      ...(asymmetric ? { zero: zeros } : {}),
    };
    const dynamic = stored.attribute("activation_quantization") === "int8_asym_per_token";
    return { tensor: assembleTensor(format, shape, parts), activation: dynamic ? VARIANTS.int8_intx : null };
  },
  Int4Tensor: (stored) => {
    const [n, k] = stored.attribute("shape") as [number, number];
    const codec = stored.codec("scale");
    const format = withScale(FORMATS.int4_plain, { block: stored.block([n, k]), codec, zero: codec });
    const [groups] = stored.matrix("scale");
    const tensor = assembleTensor(format, [n, k], {
      elements: unpackNibbles(stored.codes("qdata"), "first"),
      scales: [transpose(stored.codes("scale"), groups, n)],
      zero: transpose(stored.codes("zero_point"), groups, n),
    });
    const float8 = String(stored.attribute("activation_dtype")).startsWith("float8");
    return { tensor, activation: float8 ? VARIANTS.float8_mslk : null };
  },
  Int4TilePackedTo4dTensor: (stored) => {
    const [n, k] = stored.attribute("shape") as [number, number];
    const tiles = stored.part("qdata").shape;
    const [paddedN, paddedK] = [(tiles[0] as number) * 8, (tiles[1] as number) * 128];
    const groupSize = (stored.attribute("block_size") as number[]).at(-1) as number;
    const pairs = stored.codes("scale_and_zero");
    const groups = pairs.length / (2 * paddedN);
    const plane = (offset: number) => {
      const values = Uint32Array.from({ length: pairs.length / 2 }, (_, i) => pairs[2 * i + offset] as number);
      return cropMatrix(transpose(values, groups, paddedN), [n, k / groupSize], groups);
    };
    const codec = stored.codec("scale_and_zero");
    const format = withScale(FORMATS.int4_tinygemm, { block: [1, groupSize], codec, zero: codec });
    const elements = cropMatrix(unpackTiles4d(stored.codes("qdata"), paddedN, paddedK), [n, k], paddedK);
    return {
      tensor: assembleTensor(format, [n, k], { elements, scales: [plane(0)], zero: plane(1) }),
      activation: null,
    };
  },
  MXTensor: (stored) => {
    const type = String(stored.attribute("elem_dtype"));
    const rows: Record<string, Format> = {
      float8_e4m3fn: FORMATS.mxfp8_e4m3,
      float8_e5m2: FORMATS.mxfp8_e5m2,
      fp6_e2m3: FORMATS.mxfp6_e2m3,
      fp6_e3m2: FORMATS.mxfp6_e3m2,
      float4_e2m1fn_x2: FORMATS.mxfp4,
    };
    const format = rows[type];
    if (format === undefined) throw stored.malformed(`its elem_dtype is ${type}`);
    const [n, bytes] = stored.matrix("qdata");
    const packed = type === "float4_e2m1fn_x2";
    const shape = [n, packed ? bytes * 2 : bytes] as const;
    const elements = packed ? unpackNibbles(stored.codes("qdata"), "first") : stored.codes("qdata");
    const tensor = assembleTensor(format, shape, { elements, scales: [plainScales(stored, n, shape[1] / 32)] });
    return { tensor, activation: stored.attributes.act_quant_kwargs ? format : null };
  },
  NVFP4Tensor: (stored) => {
    const [n, bytes] = stored.matrix("qdata");
    const k = bytes * 2;
    const two = stored.parts.has("per_tensor_scale");
    const format = two ? FORMATS.nvfp4 : FORMATS.nvfp4_single;
    const scales = [plainScales(stored, n, k / 16), ...(two ? [stored.codes("per_tensor_scale")] : [])];
    const tensor = assembleTensor(format, [n, k], { elements: unpackNibbles(stored.codes("qdata"), "first"), scales });
    return { tensor, activation: stored.attributes.act_quant_kwargs ? format : null };
  },
};

/** Block scales in row-major order, whatever way they are stored (14). */
function plainScales(stored: Stored, rows: number, columns: number): ArrayLike<number> {
  const codes = stored.codes("scale");
  return stored.attribute("is_swizzled_scales") === true ? fromBlocked(codes, rows, columns) : codes;
}

/** The activation format of float8 and int8 tensors. */
function activationOf(stored: Stored): Format | null {
  const kwargs = stored.attribute("act_quant_kwargs") as Attributes | null | undefined;
  if (kwargs === null || kwargs === undefined) return null;
  const granularity = (kwargs.granularity as { _type?: string } | undefined)?._type;
  const block: Block = granularity === "PerTensor" ? ["all", "all"] : [1, "all"];
  if (stored.className === "Float8Tensor") {
    const dtype = (kwargs.float8_dtype as { _data?: string } | undefined)?._data;
    return withScale(dtype === "float8_e5m2" ? FORMATS.float8_e5m2 : FORMATS.float8_e4m3, { block });
  }
  const mapping = (kwargs.mapping_type as { _data?: string } | undefined)?._data;
  return withScale(mapping === "ASYMMETRIC" ? FORMATS.int8_asymmetric : FORMATS.int8, { block });
}

/**
 * The tensor that the parts of one checkpoint parameter mean (specification 25). `className` and `attributes` are the
 * metadata's `_type` and `_data`. Throws `model/unsupported` for another class, `io/malformed` for missing or
 * impossible parts.
 */
export function readTorchaoTensor(
  parameter: string,
  className: string,
  attributes: Attributes,
  parts: ReadonlyMap<string, TorchaoPart>,
): TorchaoWeight {
  const reader = READERS[className];
  if (reader === undefined) {
    throw new FewbitError("model/unsupported", {
      what: "torchao tensor class",
      value: className,
      supported: Object.keys(READERS),
    });
  }
  const made = reader(new Stored(parameter, className, attributes, parts));
  const preScale = parts.get("act_pre_scale");
  return preScale === undefined ? made : { ...made, preScale };
}
