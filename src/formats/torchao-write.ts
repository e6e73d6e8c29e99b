import type { FloatType } from "../core/dtype.js";
import { roundUp } from "../core/shape.js";
import { type Codec, codecBits, codecName, type Format, formatKey, withScale } from "./format.js";
import { packTiles4d, toBlocked, transpose } from "./layouts.js";
import { rowWords, unpackRow } from "./pack.js";
import {
  blockSize,
  byteElements,
  classOf,
  gridOf,
  packedRows,
  partDtype,
  type StoredClass,
  scaleBytes,
  zeroBytes,
} from "./stored-class.js";
import { FORMATS, VARIANTS } from "./table.js";
import type { QuantizedTensor } from "./tensor.js";

export interface ClassRequest {
  readonly format: Format;
  readonly shape: readonly [n: number, k: number];
  /** The dtype that the weight had. */
  readonly dtype: FloatType;
  readonly activation: Format | null;
  /** Whether the linear declares `fastAccum` (default: no). */
  readonly fastAccum?: boolean;
}

const TORCH: Readonly<Record<FloatType, string>> = { f32: "float32", f16: "float16", bf16: "bfloat16" };
const torchDtype = (name: string) => ({ _type: "torch.dtype", _data: name });
const enumMember = (type: string, name: string) => ({ _type: type, _data: name });
const sameFormat = (a: Format | null, b: Format | null) =>
  a === b || (a !== null && b !== null && formatKey(a) === formatKey(b));
const row = (format: Format) => withScale(format, { block: [1, "all"] });
const whole = (format: Format) => withScale(format, { block: ["all", "all"] });
const granularity = (format: Format) =>
  format.scales[0]?.block[0] === "all" ? { _type: "PerTensor", _data: {} } : { _type: "PerRow", _data: { dim: -1 } };

type Writer = (request: ClassRequest) => StoredClass | null;

/** By name of the format's row. A writer answers null for what its class cannot say. */
const WRITERS: Readonly<Record<string, Writer>> = {
  int8: int8Class,
  float8_e4m3: float8Class,
  float8_e5m2: float8Class,
  int4_plain: int4Class,
  int4_symmetric: int4Class,
  int4_tinygemm: tiledClass,
  ...Object.fromEntries(
    Object.keys(FORMATS)
      .filter((name) => /^int(x8|\d)(_asymmetric)?$/.test(name) && name !== "int8" && name !== "int8_asymmetric")
      .map((name) => [name, intxClass]),
  ),
  ...Object.fromEntries(
    ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"].map((name) => [name, mxClass]),
  ),
  nvfp4: nvfp4Class,
  nvfp4_single: nvfp4Class,
};

/** The torchao class that holds a weight of a format (specification 25), or null when torchao has none for it. */
export function torchaoClass(request: ClassRequest): StoredClass | null {
  const writer = Object.hasOwn(WRITERS, request.format.name) ? WRITERS[request.format.name] : undefined;
  return writer?.(request) ?? null;
}

function int8Class({ format, shape, dtype, activation }: ClassRequest): StoredClass | null {
  const kinds = [FORMATS.int8, FORMATS.int8_asymmetric].flatMap((f) => [row(f), whole(f)]);
  const known = kinds.find((kind) => sameFormat(kind, activation));
  if (codecName((format.scales[0] as { codec: Codec }).codec) !== "f32" || (activation !== null && known === undefined))
    return null;
  const kwargs = known && {
    _type: "QuantizeTensorToInt8Kwargs",
    _data: {
      granularity: granularity(known),
      mapping_type: enumMember("MappingType", known.zero.domain === "none" ? "SYMMETRIC" : "ASYMMETRIC"),
      reduce_range: false,
    },
  };
  const grid = gridOf(format, shape);
  return classOf(
    "Int8Tensor",
    {
      act_quant_kwargs: kwargs ?? null,
      reduce_range: false,
      block_size: blockSize(format, shape),
      dtype: torchDtype(TORCH[dtype]),
    },
    { qdata: ["I8", shape, packedRows], scale: ["F32", grid, scaleBytes], zero_point: ["I8", grid, zeroBytes] },
  );
}

function float8Class({ format, shape, dtype, activation, fastAccum = false }: ClassRequest): StoredClass | null {
  const kinds = [FORMATS.float8_e4m3, FORMATS.float8_e5m2].flatMap((f) => [row(f), whole(f)]);
  const known = kinds.find((kind) => sameFormat(kind, activation));
  if (activation !== null && known === undefined) return null;
  const kwargs = known && {
    _type: "QuantizeTensorToFloat8Kwargs",
    _data: {
      float8_dtype: torchDtype(known.name === "float8_e5m2" ? "float8_e5m2" : "float8_e4m3fn"),
      granularity: granularity(known),
      mm_config: null,
      hp_value_lb: null,
      hp_value_ub: null,
      kernel_preference: enumMember("KernelPreference", "AUTO"),
    },
  };
  const mm = { _type: "Float8MMConfig", _data: { emulate: false, use_fast_accum: fastAccum, pad_inner_dim: false } };
  return classOf(
    "Float8Tensor",
    {
      block_size: blockSize(format, shape),
      mm_config: known ? mm : null,
      act_quant_kwargs: kwargs ?? null,
      kernel_preference: enumMember("KernelPreference", "AUTO"),
      dtype: torchDtype(TORCH[dtype]),
    },
    {
      qdata: [format.name === "float8_e5m2" ? "F8_E5M2" : "F8_E4M3", shape, packedRows],
      scale: ["F32", gridOf(format, shape), scaleBytes],
    },
  );
}

/** Scales and zero points of groups in the order [K / g, N]. */
function transposed(bytes: Uint8Array, [n, groups]: readonly [number, number], bits: number): Uint8Array {
  const values = bits === 32 ? new Uint32Array(bytes.slice().buffer) : new Uint16Array(bytes.slice().buffer);
  const out = transpose(values, n, groups);
  return new Uint8Array(out.buffer, out.byteOffset, out.byteLength);
}

function int4Class({ format, shape, activation }: ClassRequest): StoredClass | null {
  const float8 = sameFormat(activation, VARIANTS.float8_mslk);
  if (activation !== null && !float8) return null;
  const { codec } = format.scales[0] as { codec: Codec };
  const grid = gridOf(format, shape);
  const bits = codecBits(codec);
  const dtype = partDtype(codec);
  const flipped = [grid[1], grid[0]];
  const zeros = (tensor: QuantizedTensor) =>
    format.zero.domain === "none"
      ? new Uint8Array((grid[0] * grid[1] * bits) / 8)
      : transposed(zeroBytes(tensor), grid, bits);
  return classOf(
    "Int4Tensor",
    {
      activation_dtype: torchDtype(float8 ? "float8_e4m3fn" : "bfloat16"),
      block_size: blockSize(format, shape),
      shape,
    },
    {
      qdata: ["I8", [shape[0], shape[1] / 2], packedRows],
      scale: [dtype, flipped, (tensor) => transposed(scaleBytes(tensor), grid, bits)],
      zero_point: [dtype, flipped, zeros],
    },
  );
}

/** Padded as torchao does (7.2): columns to 1024, rows to 8; padding groups hold scale 2^-126 and eight times that. */
function tiledClass({ format, shape, activation }: ClassRequest): StoredClass | null {
  const { codec } = format.scales[0] as { codec: Codec };
  const [n, k] = shape;
  const g = blockSize(format, shape)[1] as number;
  const [toN, toK] = [roundUp(n, 8), roundUp(k, 1024)];
  if (codecName(codec) !== "bf16" || activation !== null || toK % g !== 0) return null;
  const groups = toK / g;
  const pairs = (tensor: QuantizedTensor) => {
    const out = new Uint16Array(groups * toN * 2);
    for (let i = 0; i < out.length; i += 2) [out[i], out[i + 1]] = [0x0080, 0x0200];
    const scales = new Uint16Array((tensor.scales[0] as Uint32Array).buffer);
    const zeros = new Uint16Array((tensor.zero as Uint32Array).buffer);
    for (let r = 0; r < n; r++) {
      for (let c = 0; c < k / g; c++) {
        const at = (c * toN + r) * 2;
        out[at] = scales[r * (k / g) + c] as number;
        out[at + 1] = zeros[r * (k / g) + c] as number;
      }
    }
    return new Uint8Array(out.buffer);
  };
  const tiles = (tensor: QuantizedTensor) => {
    const stride = rowWords(k, 4);
    const codes = new Uint32Array(k);
    const padded = new Uint8Array(8 * toK);
    const out = new Int32Array((toN * toK) / 8);
    for (let begin = 0; begin < toN; begin += 8) {
      padded.fill(0);
      for (let r = begin; r < Math.min(begin + 8, n); r++) {
        unpackRow(tensor.qdata, r * stride, codes, k, 4);
        padded.set(codes, (r - begin) * toK);
      }
      out.set(packTiles4d(padded, 8, toK), (begin * toK) / 8);
    }
    return new Uint8Array(out.buffer);
  };
  return classOf(
    "Int4TilePackedTo4dTensor",
    { block_size: [1, g], shape },
    { qdata: ["I32", [toN / 8, toK / 128, 32, 4], tiles], scale_and_zero: ["BF16", [groups, toN, 2], pairs] },
  );
}

function intxClass({ format, shape, dtype, activation }: ClassRequest): StoredClass | null {
  const dynamic = sameFormat(activation, VARIANTS.int8_intx);
  if (activation !== null && !dynamic) return null;
  const { codec } = format.scales[0] as { codec: Codec };
  const grid = gridOf(format, shape);
  return classOf(
    "IntxUnpackedToInt8Tensor",
    {
      target_dtype: torchDtype(`int${codecBits(format.element)}`),
      block_size: blockSize(format, shape),
      dtype: torchDtype(TORCH[dtype]),
      activation_quantization: dynamic ? "int8_asym_per_token" : null,
    },
    {
      qdata: ["I8", shape, byteElements],
      scale: [partDtype(codec), grid, scaleBytes],
      zero_point: ["I8", grid, zeroBytes],
    },
  );
}

/** Block scales as the kernels want them (14) when activations are quantized too, as torchao's configs store them. */
function microScale(request: ClassRequest, swizzledWidth: number) {
  const { format, shape, activation } = request;
  const [rows, columns] = gridOf(format, shape);
  const swizzled = activation !== null;
  const stored = swizzled
    ? [32 * Math.ceil(shape[0] / 128), 16 * Math.ceil(shape[1] / swizzledWidth)]
    : [rows, columns];
  const encode = (tensor: QuantizedTensor) => {
    const codes = scaleBytes(tensor);
    return swizzled ? toBlocked(codes, rows, columns) : codes;
  };
  return { swizzled, stored, encode };
}

const MX_TYPES: Readonly<Record<string, readonly [elem: unknown, dtype: string]>> = {
  mxfp8_e4m3: [torchDtype("float8_e4m3fn"), "F8_E4M3"],
  mxfp8_e5m2: [torchDtype("float8_e5m2"), "F8_E5M2"],
  mxfp6_e2m3: ["fp6_e2m3", "U8"],
  mxfp6_e3m2: ["fp6_e3m2", "U8"],
  mxfp4: [torchDtype("float4_e2m1fn_x2"), "U8"],
};

function mxClass(request: ClassRequest): StoredClass | null {
  const { format, shape, dtype, activation } = request;
  if (activation !== null && !sameFormat(activation, FORMATS[format.name as keyof typeof FORMATS])) return null;
  const [elem, stored] = MX_TYPES[format.name] as (typeof MX_TYPES)[string];
  const scale = microScale(request, 128);
  const preference = enumMember("KernelPreference", "EMULATED");
  const kwargs = activation && {
    _type: "QuantizeTensorToMXKwargs",
    _data: {
      elem_dtype: elem,
      block_size: 32,
      scaling_mode: enumMember("ScaleCalculationMode", "RCEIL"),
      kernel_preference: preference,
      is_swizzled_scales: true,
    },
  };
  const packed = codecBits(format.element) === 4;
  const attributes = {
    elem_dtype: elem,
    block_size: 32,
    orig_dtype: torchDtype(TORCH[dtype]),
    kernel_preference: preference,
    act_quant_kwargs: kwargs,
    is_swizzled_scales: scale.swizzled,
  };
  const columns = packed ? shape[1] / 2 : shape[1];
  const encode = codecBits(format.element) === 6 ? byteElements : packedRows;
  return classOf("MXTensor", attributes, {
    qdata: [stored, [shape[0], columns], encode],
    scale: ["F8_E8M0", scale.stored, scale.encode],
  });
}

function nvfp4Class(request: ClassRequest): StoredClass | null {
  const { format, shape, dtype, activation } = request;
  const two = format.name === "nvfp4";
  const dynamic = activation !== null && sameFormat(activation, FORMATS.nvfp4);
  if (activation !== null && !dynamic && !sameFormat(activation, FORMATS.nvfp4_single)) return null;
  const scale = microScale(request, 64);
  const kwargs = activation && {
    _type: "QuantizeTensorToNVFP4Kwargs",
    _data: {
      block_size: 16,
      is_swizzled_scales: true,
      use_triton_kernel: false,
      use_dynamic_per_tensor_scale: dynamic,
    },
  };
  return classOf(
    "NVFP4Tensor",
    {
      is_swizzled_scales: scale.swizzled,
      use_triton_kernel: false,
      act_quant_kwargs: kwargs,
      block_size: 16,
      orig_dtype: torchDtype(TORCH[dtype]),
    },
    {
      qdata: ["U8", [shape[0], shape[1] / 2], packedRows],
      scale: ["F8_E4M3", scale.stored, scale.encode],
      ...(two ? { per_tensor_scale: ["F32", [], (tensor: QuantizedTensor) => scaleBytes(tensor, 1)] as const } : {}),
    },
  );
}
