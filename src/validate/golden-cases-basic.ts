import { type FloatType, roundTo } from "../core/dtype.js";
import { type Codec, codecBits, type Format, withRule, withScale } from "../formats/format.js";
import { packFlat } from "../formats/pack.js";
import { CODECS, FORMATS } from "../formats/table.js";
import { scaleValues, zeroValues } from "../formats/tensor.js";
import {
  chooseQParams,
  chooseQParamsWithMinMax,
  dequantizeAffine,
  fakeQuantizeAffine,
  type Mapping,
  quantizeAffine,
} from "../quantize/affine.js";
import {
  floatTypeOf,
  type GoldenContext,
  type GoldenHandler,
  putParts,
  scaleBits,
  storedCodes,
} from "./golden-case.js";

/** The codec of a number format by its golden name. */
export function codecByName(name: string): Codec {
  const known: Record<string, Codec> = {
    float8_e4m3fn: CODECS.e4m3,
    float8_e5m2: CODECS.e5m2,
    float8_e8m0fnu: CODECS.e8m0,
    bfloat16: CODECS.bf16,
    float16: CODECS.f16,
  };
  const finite = /^fp_e(\d)m(\d)$/.exec(name);
  if (finite === null) return known[name] as Codec;
  const [exponent, mantissa] = [Number(finite[1]), Number(finite[2])];
  return { kind: "float", exponent, mantissa, bias: 2 ** (exponent - 1) - 1, signed: true, specials: "none" };
}

async function numberFormats(context: GoldenContext): Promise<void> {
  const { backend, golden } = context;
  const decoding = golden.name === "formats_decode";
  for (const { name } of golden.tensors) {
    if (name === "x" || name === "codes") continue;
    const codec = codecByName(name);
    if (decoding) {
      const count = context.input(name).length;
      context.put(
        name,
        await backend.decode(
          codec,
          Uint32Array.from({ length: count }, (_, code) => code),
        ),
      );
      continue;
    }
    const codes = await backend.encode(codec, context.floats("x"));
    const wide = codec === CODECS.bf16 || codec === CODECS.f16;
    context.put(name, wide ? await backend.decode(codec, codes) : codes);
  }
}

const INTEGERS: Record<string, Codec> = {
  int8: CODECS.int8,
  int32: { kind: "int", bits: 32, signed: true },
};

/** A format for one affine case: the smallest integer codec that holds the range. */
export function affineFormat(options: {
  min: number;
  max: number;
  mapping: Mapping;
  block: readonly [number, number];
  scale: FloatType;
  zero: Codec | null;
  eps?: number | null;
  preserveZero?: boolean;
  float?: boolean;
}): Format {
  const { min, max, mapping, block, scale, zero, eps, preserveZero } = options;
  const bits = Math.max(1, min < 0 ? 1 + Math.ceil(Math.log2(Math.max(-min, max + 1))) : Math.ceil(Math.log2(max + 1)));
  return withRule(FORMATS.int8, "golden", {
    element: { kind: "int", bits, signed: min < 0 },
    scales: [{ codec: CODECS[scale], block }],
    zero: zero === null ? { domain: "none" } : { domain: options.float ? "float" : "int", codec: zero },
    rule: {
      kind: "affine",
      mapping,
      min,
      max,
      eps: eps ?? "normal",
      ...(preserveZero === undefined ? {} : { preserveZero }),
    },
  });
}

/** Moves the channel axis of [o, c, h, w] last, so that channel groups are blocks of a matrix. */
export function channelsLast<T extends Float32Array | Int32Array>(data: T, shape: readonly number[]): T {
  const [o, c, h, w] = shape as [number, number, number, number];
  const out = new (data.constructor as new (length: number) => T)(data.length);
  for (let i = 0; i < o; i++) {
    for (let j = 0; j < c; j++) {
      for (let p = 0; p < h * w; p++) out[(i * h * w + p) * c + j] = data[(i * c + j) * h * w + p] as number;
    }
  }
  return out;
}

/** The inverse of `channelsLast`, for data whose channel axis has `c` entries. */
export function channelsFirst(
  data: ArrayLike<number>,
  [o, h, w]: readonly [number, number, number],
  c: number,
): Float64Array {
  const out = new Float64Array(data.length);
  for (let i = 0; i < o; i++) {
    for (let j = 0; j < c; j++) {
      for (let p = 0; p < h * w; p++) out[(i * c + j) * h * w + p] = data[(i * h * w + p) * c + j] as number;
    }
  }
  return out;
}

async function affine(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const blockSize = args.block_size as number[];
  const shape = context.shape("x");
  const data = context.floats("x");
  const dtype = floatTypeOf(args.input_dtype);
  const [min, max] = [args.quant_min as number, args.quant_max as number];
  const mapping = String(args.mapping_type).toLowerCase() as Mapping;
  const scaleDtype = floatTypeOf(args.scale_dtype);
  const eps = args.eps as number | null;
  const outputs = context.golden.tensors.map((t) => t.name).filter((name) => name.startsWith("dequant_"));

  // The same case as a matrix in a made-up format: what devices run.
  const convolution = shape.length === 4;
  const [n, k] = convolution ? [shape[0] as number, shape[1] as number] : context.matrix("x");
  const matrix = convolution ? ([data.length / k, k] as const) : ([n, k] as const);
  const block = convolution
    ? ([1, blockSize[1] as number] as const)
    : ([blockSize.at(-2) as number, blockSize.at(-1) as number] as const);
  const zero = INTEGERS[String(args.zero_point_dtype)] as Codec;
  const format = affineFormat({ min, max, mapping, block, scale: scaleDtype, zero, eps });
  const tensor = await context.backend.quantize(convolution ? channelsLast(data, shape) : data, matrix, dtype, format, {
    numerics: "torchao",
  });
  const spread = [shape[0], shape[2], shape[3]] as [number, number, number];
  const back = (values: ArrayLike<number>, channels: number) =>
    convolution ? channelsFirst(values, spread, channels) : values;
  const groups = k / block[1];
  context.put("scale", back(scaleValues(tensor, 0), groups));
  context.put("scale.bits", back(scaleBits(tensor), groups));
  context.put("zero_point", back(zeroValues(tensor), groups));
  context.put("codes", back(storedCodes(tensor), k));
  for (const name of outputs) {
    context.put(name, back(await context.backend.dequantize(tensor, floatTypeOf(name.slice("dequant_".length))), k));
  }

  // And the primitives themselves, which take any rank.
  const chosen = chooseQParams(data, shape, {
    mapping,
    blockSize,
    min,
    max,
    dtype,
    scaleDtype,
    keepdim: true,
    ...(eps === null ? {} : { eps }),
  });
  const codes = quantizeAffine(data, shape, dtype, chosen, { blockSize, min, max });
  context.put("scale", chosen.scale);
  context.put("zero_point", chosen.zero);
  context.put("codes", codes);
  for (const name of outputs) {
    const out = floatTypeOf(name.slice("dequant_".length));
    context.put(name, dequantizeAffine(codes, shape, out, chosen, { blockSize, min, max }));
  }
}

async function affineMinMax(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const [lo, hi] = [context.floats("min_val"), context.floats("max_val")];
  const mapping = String(args.mapping_type).toLowerCase() as Mapping;
  const [min, max] = [args.quant_min as number, args.quant_max as number];
  // A row of two numbers has just these extremes.
  const pairs = Float32Array.from({ length: lo.length * 2 }, (_, i) => (i % 2 === 0 ? lo : hi)[i >> 1] as number);
  const format = affineFormat({ min, max, mapping, block: [1, 2], scale: "f32", zero: INTEGERS.int32 as Codec });
  putParts(context, "", await context.backend.quantize(pairs, [lo.length, 2], "f32", format, { numerics: "torchao" }));
  const chosen = chooseQParamsWithMinMax(lo, hi, { mapping, min, max, dtype: "f32" });
  context.put("scale", chosen.scale);
  context.put("zero_point", chosen.zero);
}

async function affineVariant(context: GoldenContext, zero: Codec | null): Promise<void> {
  const { args } = context.golden;
  const dtype = context.dtype("x");
  const format = affineFormat({
    min: args.quant_min as number,
    max: args.quant_max as number,
    mapping: zero === null ? "symmetric" : "asymmetric",
    block: args.block_size as [number, number],
    scale: dtype,
    zero,
    ...(zero === null ? {} : { preserveZero: false }),
  });
  const given = zero === null ? { given: { scale: context.floats("scale") } } : {};
  putParts(context, "", await context.quantize("x", format, given));
}

async function fakeQuant(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const blockSize = args.block_size as [number, number];
  const [min, max] = [args.quant_min as number, args.quant_max as number];
  const [scale, zero] = [context.floats("scale"), Float32Array.from(context.input("zero_point"))];
  const codec = INTEGERS.int32 as Codec;
  const format = affineFormat({ min, max, mapping: "asymmetric", block: blockSize, scale: "f32", zero: codec });
  const tensor = await context.quantize("x", format, { given: { scale, zero } });
  context.put("fake_quant", await context.backend.dequantize(tensor, "f32"));
  context.put(
    "mask",
    Uint8Array.from(storedCodes(tensor), (code) => (code >= min && code <= max ? 1 : 0)),
  );
  const qparams = { scale, zero, scaleDtype: "f32" } as const;
  context.put(
    "fake_quant",
    fakeQuantizeAffine(context.floats("x"), context.shape("x"), "f32", qparams, { blockSize, min, max }),
  );
}

/** 19: symmetric [-127, 127] per token; the cache keeps its scale in the model's dtype. */
async function kvCache(context: GoldenContext): Promise<void> {
  const dtype = context.dtype("k");
  const [, k] = context.matrix("k");
  const scale = dtype === "f16" ? "f32" : dtype;
  const format = affineFormat({
    min: -127,
    max: 127,
    mapping: "symmetric",
    block: [1, k],
    scale,
    zero: null,
    eps: 1e-5,
  });
  const tensor = await context.quantize("k", format);
  putParts(context, "", tensor);
  const cached = scaleValues(tensor, 0).map((value) => roundTo(dtype, value));
  const stored = withScale(format, { codec: CODECS[dtype] });
  const bits = await context.backend.encode(CODECS[dtype], cached);
  const cache = { ...tensor, format: stored, scales: [packFlat(bits, codecBits(CODECS[dtype]))] };
  context.put("dequant", await context.backend.dequantize(cache, dtype));
}

/** 22: fake quantizers are quantize and dequantize. */
async function qat(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const { backend } = context;
  const dtype = context.dtype("x");
  const [n, k] = context.matrix("x");
  const group = (args.group_size as number | null) ?? k;
  const through = async (format: Format, out: FloatType = dtype) =>
    backend.dequantize(await context.quantize("x", format), out);
  switch (args.kind) {
    case "int8_per_token_asym":
      return context.put(
        "fake_quant",
        await through(
          affineFormat({ min: -128, max: 127, mapping: "asymmetric", block: [1, k], scale: "f32", zero: CODECS.int8 }),
        ),
      );
    case "int8_per_channel_sym":
      return context.put(
        "fake_quant",
        await through(
          affineFormat({ min: -128, max: 127, mapping: "symmetric", block: [1, k], scale: "f32", zero: null }),
        ),
      );
    case "int4_group32_sym":
      return context.put(
        "fake_quant",
        await through(
          affineFormat({ min: -8, max: 7, mapping: "symmetric", block: [1, group], scale: "f32", zero: null }),
        ),
      );
    case "uint4_group32_asym_float_zp":
      return context.put(
        "fake_quant",
        await through(
          affineFormat({
            min: 0,
            max: 15,
            mapping: "asymmetric",
            block: [1, group],
            scale: "f32",
            zero: CODECS.f32,
            eps: 1e-6,
            float: true,
          }),
        ),
      );
    case "float8_perrow":
      return context.put("fake_quant", await through(FORMATS.float8_e4m3));
    case "float8_pertensor":
      return context.put("fake_quant", await through(withScale(FORMATS.float8_e4m3, { block: ["all", "all"] })));
    case "int4_bf16act": {
      const format = withScale(FORMATS.int4_plain, { block: [1, group], codec: CODECS.f32, zero: CODECS.f32 });
      const values = await backend.dequantize(await context.quantize("x", format), "f32");
      return context.put(
        "fake_quant",
        values.map((value) => roundTo(dtype, value)),
      );
    }
    case "int4_fp8act": {
      const rows = withRule(FORMATS.float8_e4m3, "qat", { rule: { kind: "amax", floor: 1e-12, round: "before" } });
      const first = await backend.dequantize(await context.quantize("x", rows), dtype);
      const scales = largestMagnitudes(first, group).map((m) =>
        roundTo(dtype, Math.max(roundTo(dtype, m / 8), roundTo(dtype, 1e-6))),
      );
      const format = affineFormat({
        min: -8,
        max: 7,
        mapping: "symmetric",
        block: [1, group],
        scale: dtype,
        zero: null,
      });
      const tensor = await backend.quantize(first, [n, k], dtype, format, {
        numerics: "torchao",
        given: { scale: scales },
      });
      return context.put("fake_quant", await backend.dequantize(tensor, dtype));
    }
  }
}

function largestMagnitudes(data: Float32Array, group: number): Float32Array {
  return Float32Array.from({ length: data.length / group }, (_, g) =>
    data.subarray(g * group, (g + 1) * group).reduce((a, v) => Math.max(a, Math.abs(v)), 0),
  );
}

export const BASIC: Readonly<Record<string, GoldenHandler>> = {
  "number formats": {
    needs: ({ name }) => (name === "formats_decode" ? ["decode"] : ["encode", "decode"]),
    run: numberFormats,
  },
  "choose_qparams_affine/quantize_affine/dequantize_affine": { needs: ["quantize", "dequantize"], run: affine },
  choose_qparams_affine_with_min_max: { needs: ["quantize"], run: affineMinMax },
  _choose_qparams_affine_dont_preserve_zero: {
    needs: ["quantize"],
    run: (context) => affineVariant(context, INTEGERS.int32 as Codec),
  },
  _quantize_affine_no_zero_point: { needs: ["quantize"], run: (context) => affineVariant(context, null) },
  _fake_quantize_affine_cachemask: { needs: ["quantize", "dequantize"], run: fakeQuant },
  "AffineQuantizedKVCache (removed example)": { needs: ["quantize", "dequantize", "encode"], run: kvCache },
  "QAT fake quantizer": { needs: ["quantize", "dequantize"], run: qat },
};
