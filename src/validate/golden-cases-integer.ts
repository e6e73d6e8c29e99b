import { roundTo } from "../core/dtype.js";
import { type Block, type Format, withRule, withScale } from "../formats/format.js";
import {
  cropMatrix,
  packGemlite,
  packNibbles,
  packShards,
  packTiles4d,
  padMatrix,
  transpose,
} from "../formats/layouts.js";
import { CODECS, FORMATS, VARIANTS } from "../formats/table.js";
import { dequantize, elementCodes, type QuantizedTensor, scaleValues, zeroValues } from "../formats/tensor.js";
import type { Mapping } from "../quantize/affine.js";
import {
  float8DynamicActivationInt4Weight,
  int4WeightOnly,
  int8DynamicActivationInt4Weight,
  int8DynamicActivationInt8Weight,
  intxWeightOnly,
  type LayerWeight,
  perAxis,
  perGroup,
  perRow,
  perTensor,
  prototypeInt4WeightOnly,
  type QuantizeConfig,
  uintxWeightOnly,
} from "../quantize/configs.js";
import {
  floatTypeOf,
  type GoldenContext,
  type GoldenHandler,
  putParts,
  scaleBits,
  storedCodes,
} from "./golden-case.js";
import { affineFormat, channelsFirst, channelsLast } from "./golden-cases-basic.js";
import { granularityBlock, putLinear } from "./golden-cases-float.js";

/** The weight format of a config, which must take the layer. */
function weightFormat(config: QuantizeConfig, layer: LayerWeight): Format {
  const format = config.weight(layer);
  if ("refused" in format) throw new Error(`${config.name} refused a golden layer: ${format.refused}`);
  return format;
}

const layerOf = (context: GoldenContext, name = "w"): LayerWeight => ({
  shape: context.matrix(name),
  dtype: context.dtype(name),
});

/** 6: weight-only, dynamic and static int8. */
async function int8(context: GoldenContext): Promise<void> {
  const { args, config } = context.golden;
  const { granularity } = args;
  const texts = Array.isArray(granularity) ? (granularity as string[]) : [String(granularity), String(granularity)];
  const [forX, forW] = texts.map(granularityBlock) as [Block, Block];
  const dynamic = int8DynamicActivationInt8Weight({
    actMappingType: args.act_mapping_type === "ASYMMETRIC" ? "asymmetric" : "symmetric",
    reduceRange: args.reduce_range === true,
    granularity: [forX[1] === "all" && forX[0] === "all" ? perTensor() : perRow(), perRow()],
  });
  const weight = await context.quantize("w", withScale(weightFormat(dynamic, layerOf(context)), { block: forW }));
  putParts(context, "w.", weight);
  context.put("w.dequant", await context.backend.dequantize(weight, context.dtype("w")));
  if (!context.has("x")) return;
  if (config === "Int8WeightOnlyConfig") return putLinear(context, context.floats("x"), weight);
  const activation = dynamic.activation as Format;
  const given = config.startsWith("Int8Static")
    ? { given: { scale: context.floats("x.scale"), zero: Float32Array.from(context.input("x.zero_point")) } }
    : {};
  const x = await context.quantize("x", activation, given);
  putParts(context, "x.", x);
  context.put("acc", await context.backend.linear(unscaled(x), unscaled(weight), null));
  await putLinear(context, x, weight);
}

/** The codes alone, as whole numbers. */
function unscaled(tensor: QuantizedTensor): QuantizedTensor {
  const { zero: _zero, ...rest } = tensor;
  const format = withRule(tensor.format, "codes", { scales: [], zero: { domain: "none" }, rule: { kind: "cast" } });
  return { ...rest, format, scales: [] };
}

/** Hands over scales (and zero points) as [K/g, N], the order of Int4Tensor. */
function putTransposed(context: GoldenContext, tensor: QuantizedTensor, scale: string, zero: string | null): void {
  const n = tensor.shape[0];
  const values = scaleValues(tensor, 0);
  const groups = values.length / n;
  context.put(scale, transpose(values, n, groups));
  context.put(`${scale}.bits`, transpose(scaleBits(tensor), n, groups));
  if (zero === null) return;
  const zeros = zeroValues(tensor);
  context.put(zero, transpose(zeros, n, groups));
  if (tensor.format.zero.domain === "none") return;
  context.put(`${zero}.bits`, transpose(scaleBits({ ...tensor, scales: [tensor.zero as Uint32Array] }), n, groups));
}

async function int4(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const groupSize = args.group_size as number;
  switch (args.int4_packing_format) {
    case "plain":
      return int4Plain(context, groupSize);
    case "preshuffled": {
      const weight = await context.quantize(
        "w",
        weightFormat(int4WeightOnly({ groupSize, int4PackingFormat: "preshuffled" }), layerOf(context)),
      );
      context.put("codes", storedCodes(weight));
      return putTransposed(context, weight, "group_scale", "group_zero");
    }
    case "plain_int32":
      return int4Int32(context, groupSize);
    default:
      return int4Tiled(context, groupSize, args.int4_choose_qparams_algorithm === "hqq");
  }
}

async function int4Plain(context: GoldenContext, groupSize: number): Promise<void> {
  const format = weightFormat(int4WeightOnly({ groupSize }), layerOf(context));
  const weight = await context.quantize("w", format);
  context.put("codes", storedCodes(weight));
  context.put("packed", signedBytes(packNibbles(elementCodes(weight), "first")));
  putTransposed(context, weight, "scale", "zero");
  const wide = await context.quantize("w", withScale(format, { codec: CODECS.f32, zero: CODECS.f32 }));
  putTransposed(context, wide, "scale_f32", "zero_f32");
  await putLinear(context, context.floats("x"), weight);
}

const signedBytes = (bytes: Uint8Array) => Int32Array.from(bytes, (byte) => (byte << 24) >> 24);

/** 7.4: XPU's unsigned codes with integer zero points; NPU's signed ones. */
async function int4Int32(context: GoldenContext, groupSize: number): Promise<void> {
  const npu = context.golden.args.device === "npu";
  const format = npu
    ? affineFormat({
        min: -8,
        max: 7,
        mapping: "asymmetric",
        block: [1, groupSize],
        scale: context.dtype("w"),
        zero: CODECS.int8,
        eps: 1e-6,
      })
    : weightFormat(int4WeightOnly({ groupSize, int4PackingFormat: "plain_int32" }), layerOf(context));
  const weight = await context.quantize("w", format);
  context.put("codes", storedCodes(weight));
  context.put("packed_pairs", packNibbles(elementCodes(weight), "first"));
  putTransposed(context, weight, "scale", "zero_point");
}

async function int4Tiled(context: GoldenContext, groupSize: number, hqq: boolean): Promise<void> {
  const [n, k] = context.matrix("w");
  const padded = (context.golden.shapes.padded ?? [n, k]) as [number, number];
  const dtype = context.dtype("w");
  const config = hqq
    ? prototypeInt4WeightOnly({ groupSize, int4ChooseQparamsAlgorithm: "hqq" })
    : int4WeightOnly({ groupSize, int4PackingFormat: "tile_packed_to_4d" });
  const format = weightFormat(config, { shape: padded, dtype });
  const data = padMatrix(context.floats("w"), [n, k], padded);
  await putTiled(context, format, data, padded);
}

async function putTiled(
  context: GoldenContext,
  format: Format,
  data: Float32Array,
  padded: readonly [number, number],
): Promise<void> {
  const [n, k] = context.matrix("w");
  const dtype = context.dtype("w");
  const weight = await context.backend.quantize(data, padded, dtype, format, { numerics: "torchao" });
  const codes = elementCodes(weight);
  const allGroups = scaleValues(weight, 0).length / padded[0];
  const groups = (allGroups * k) / padded[1];
  const crop = <T extends Float32Array | Uint32Array>(values: T) => cropMatrix(values, [n, groups], allGroups);
  context.put("codes", cropMatrix(codes, [n, k], padded[1]));
  context.put("scale", crop(scaleValues(weight, 0)));
  context.put("scale.bits", crop(scaleBits(weight)));
  context.put("zero", crop(zeroValues(weight)));
  if (context.has("dequant")) {
    context.put("dequant", cropMatrix(await context.backend.dequantize(weight, dtype), [n, k], padded[1]));
    const once = Float32Array.from(dequantize(weight), (value) => roundTo(dtype, value));
    context.put("dequant_fma", cropMatrix(once, [n, k], padded[1]));
  }
  if (context.has("packed")) {
    context.put("packed", packTiles4d(codes, padded[0], padded[1]));
    const [scales, zeros] = [
      transpose(scaleValues(weight, 0), padded[0], allGroups),
      transpose(zeroValues(weight), padded[0], allGroups),
    ];
    context.put(
      "scale_and_zero",
      Float32Array.from({ length: scales.length * 2 }, (_, i) => (i % 2 === 0 ? scales : zeros)[i >> 1] as number),
    );
  }
  if (!context.has("x")) return;
  const x = padMatrix(context.floats("x"), context.matrix("x"), [context.matrix("x")[0], padded[1]]);
  const y = await context.backend.linear(x, weight, null);
  context.put("y.ref", cropMatrix(y, [context.matrix("x")[0], n], padded[0]));
}

/** The primitives behind int4: tinygemm parameters with either eps, and HQQ. */
async function int4Primitive(context: GoldenContext): Promise<void> {
  const { args, config } = context.golden;
  const [groupSize, hqq] = [args.group_size as number, config.includes("hqq")];
  const tiny = args.eps === null ? FORMATS.int4_tinygemm : undefined;
  const dtype = context.dtype("w");
  const made = weightFormat(
    prototypeInt4WeightOnly({ groupSize, int4ChooseQparamsAlgorithm: hqq ? "hqq" : "tinygemm" }),
    layerOf(context),
  );
  const format =
    tiny === undefined ? made : withScale(tiny, { block: [1, groupSize], codec: CODECS[dtype], zero: CODECS[dtype] });
  await putTiled(context, format, context.floats("w"), context.matrix("w"));
}

/** 7.6, weight only on CPU. */
async function int4Cpu(context: GoldenContext): Promise<void> {
  const format = weightFormat(
    prototypeInt4WeightOnly({ groupSize: context.golden.args.group_size as number }),
    layerOf(context),
  );
  const weight = await context.quantize("w", format);
  putParts(context, "", weight);
  context.put("zero", zeroValues(weight));
  context.put("zero.bits", scaleBits({ ...weight, scales: [weight.zero as Uint32Array] }));
  await putLinear(context, context.floats("x"), weight);
}

/** 7.6, int8 activation. */
async function da8w4(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const config = int8DynamicActivationInt4Weight({
    groupSize: args.group_size as number,
    actMappingType: args.act_mapping_type === "SYMMETRIC" ? "symmetric" : "asymmetric",
  });
  const weight = await context.quantize("w", weightFormat(config, layerOf(context)));
  const x = await context.quantize("x", config.activation as Format);
  putParts(context, "w.", weight);
  putParts(context, "x.", x);
  await putLinear(context, x, weight);
}

/** 7.5. */
async function fp8Int4(context: GoldenContext): Promise<void> {
  const plain = context.golden.args.int4_packing_format === "plain";
  const config = float8DynamicActivationInt4Weight({ int4PackingFormat: plain ? "plain" : "preshuffled" });
  const weight = await context.quantize("w", weightFormat(config, layerOf(context)));
  const x = await context.quantize("x", config.activation as Format);
  putParts(context, "x.", x);
  context.put("codes", storedCodes(weight));
  if (plain) {
    context.put("packed", signedBytes(packNibbles(elementCodes(weight), "first")));
    putTransposed(context, weight, "scale", null);
  } else {
    context.put("w.fp8_codes", storedCodes(await context.quantize("w", VARIANTS.float8_mslk)));
    context.put("row_scale", scaleValues(weight, 1));
    putTransposed(context, weight, "group_scale", null);
  }
  await putLinear(context, x, weight);
}

function granularity(text: string) {
  const group = /^PerGroup\((?:group_size=)?(\d+)\)$/.exec(text);
  return group === null ? perAxis(0) : perGroup(Number(group[1]));
}

/** 9.1, linear and conv2d. */
async function intx(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const config = intxWeightOnly({
    weightDtype: args.weight_dtype as "int4",
    granularity: granularity(String(args.granularity)),
    mappingType: String(args.mapping_type ?? "symmetric").toLowerCase() as Mapping,
    scaleDtype: args.scale_dtype === null || args.scale_dtype === undefined ? null : floatTypeOf(args.scale_dtype),
    numerics: "torchao",
  });
  if (args.module === "Conv2d 3x3") return intxConv(context, config);
  const weight = await context.quantize("w", weightFormat(config, layerOf(context)));
  putParts(context, "w.", weight);
  context.put("w.dequant", await context.backend.dequantize(weight, context.dtype("w")));
  await putLinear(context, context.floats("x"), weight);
}

/** A convolution is a linear over patches whose elements lie as the weight's do: [kh, kw, channels]. */
async function intxConv(context: GoldenContext, config: QuantizeConfig): Promise<void> {
  const shape = context.shape("w") as [number, number, number, number];
  const [o, c, h, w] = shape;
  const dtype = context.dtype("w");
  const matrix = [o, h * w * c] as const;
  const format = weightFormat(config, { shape: matrix, dtype });
  const weight = await context.backend.quantize(channelsLast(context.floats("w"), shape), matrix, dtype, format, {
    numerics: "torchao",
  });
  const groups = scaleValues(weight, 0).length / (o * h * w);
  context.put("w.codes", channelsFirst(storedCodes(weight), [o, h, w], c));
  context.put("w.scale", channelsFirst(scaleValues(weight, 0), [o, h, w], groups));
  context.put("w.scale.bits", channelsFirst(scaleBits(weight), [o, h, w], groups));
  context.put("w.dequant", channelsFirst(await context.backend.dequantize(weight, dtype), [o, h, w], c));
  const [, , height, width] = context.shape("x") as [number, number, number, number];
  const [outH, outW] = [height - h + 1, width - w + 1];
  const x = context.floats("x");
  const patches = new Float32Array(outH * outW * h * w * c);
  let at = 0;
  for (let i = 0; i < outH; i++) {
    for (let j = 0; j < outW; j++) {
      for (let p = 0; p < h; p++) {
        for (let q = 0; q < w; q++) {
          for (let channel = 0; channel < c; channel++) {
            patches[at++] = x[(channel * height + i + p) * width + j + q] as number;
          }
        }
      }
    }
  }
  const y = transpose(await context.backend.linear(patches, weight, null), outH * outW, o);
  for (const name of ["y.ref", "y.torchao"]) context.put(name, y);
}

/** 9.2. */
async function intxDynamic(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const dtype = context.dtype("w");
  const config = intxWeightOnly({
    weightDtype: args.weight_dtype as "int4",
    granularity: granularity(String(args.weight_granularity)),
  });
  const weight = await context.quantize("w", weightFormat(config, layerOf(context)));
  // The activation's scale is kept in the activation's dtype.
  const x = await context.quantize("x", withScale(VARIANTS.int8_intx, { codec: CODECS[dtype] }));
  for (const [prefix, tensor] of [
    ["w.", weight],
    ["x.", x],
  ] as const) {
    putParts(context, prefix, tensor);
    context.put(`${prefix}dequant`, await context.backend.dequantize(tensor, dtype));
  }
  await putLinear(context, x, weight);
}

async function hqqScaleOnly(context: GoldenContext): Promise<void> {
  const config = intxWeightOnly({
    weightDtype: "int4",
    granularity: perGroup(context.golden.args.group_size as number),
    intxChooseQparamsAlgorithm: "hqq_scale_only",
  });
  putParts(context, "", await context.quantize("w", weightFormat(config, layerOf(context))));
}

async function sinq(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const format = withScale(FORMATS.int4_sinq, { block: [1, args.group_size as number] });
  const weight = await context.quantize("w", format);
  context.put("codes", storedCodes(weight));
  context.put("scale_row", scaleValues(weight, 0));
  context.put("scale_col", scaleValues(weight, 1));
}

/** The codes are read from a stored tensor; the order of shards is the file's. */
async function shards(context: GoldenContext): Promise<void> {
  const [n, k] = context.matrix("codes");
  const bits = context.golden.args.bits as number;
  const codes = await context.backend.decode(
    { kind: "int", bits, signed: false },
    Uint32Array.from(context.input("codes")),
  );
  const packed = packShards(Uint32Array.from(codes), n, k, bits);
  for (const [i, shard] of packed.entries()) context.put(`shard${i}`, shard);
}

/** 10.1. */
async function gemlite(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const config = uintxWeightOnly({ bitWidth: args.bit_width as number, groupSize: args.group_size as number | null });
  const weight = await context.quantize("w", weightFormat(config, layerOf(context)));
  putParts(context, "", weight);
  context.put("zero", zeroValues(weight));
  const [n, k] = weight.shape;
  if (args.bit_width === 4) context.put("packed8", packGemlite(elementCodes(weight), n, k, 8));
}

const PACKING = "the order of bits in another library's files";

export const INTEGER: Readonly<Record<string, GoldenHandler>> = {
  Int8WeightOnlyConfig: { needs: ["quantize", "dequantize", "linear"], run: int8 },
  Int8DynamicActivationInt8WeightConfig: { needs: ["quantize", "dequantize", "linear"], run: int8 },
  Int8StaticActivationInt8WeightConfig: { needs: ["quantize", "dequantize", "linear"], run: int8 },
  Int4WeightOnlyConfig: { needs: ["quantize", "dequantize", "linear"], run: int4 },
  _choose_qparams_affine_tinygemm: { needs: ["quantize", "dequantize"], run: int4Primitive },
  _choose_qparams_and_quantize_affine_hqq: { needs: ["quantize"], run: int4Primitive },
  PrototypeInt4WeightOnlyConfig: { needs: ["quantize", "linear"], run: int4Cpu },
  Int8DynamicActivationInt4WeightConfig: { needs: ["quantize", "linear"], run: da8w4 },
  Float8DynamicActivationInt4WeightConfig: { needs: ["quantize", "linear"], run: fp8Int4 },
  IntxWeightOnlyConfig: { needs: ["quantize", "dequantize", "linear"], run: intx },
  Int8DynamicActivationIntxWeightConfig: { needs: ["quantize", "dequantize", "linear"], run: intxDynamic },
  "IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY": { needs: ["quantize"], run: hqqScaleOnly },
  _choose_qparams_and_quantize_scale_only_sinq: { needs: ["quantize"], run: sinq },
  UintxTensor: { needs: ["decode"], host: PACKING, run: shards },
  UIntxWeightOnlyConfig: { needs: ["quantize"], run: gemlite },
};
