import type { FloatType } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { type Block, type Format, type Rule, withRule, withScale } from "../formats/format.js";
import { CODECS, FORMATS, type FormatName, VARIANTS } from "../formats/table.js";
import type { Mapping } from "./affine.js";
import { type CommonArgs, codecOf, dtypes, make, multiples, oneOf, type QuantizeConfig, weightRule } from "./config.js";
import { blockOf, type Granularity, perAxis, perGroup, perRow, perTensor } from "./granularity.js";

export * from "./config.js";
export * from "./configs-micro.js";
export * from "./granularity.js";

type Affine = Extract<Rule, { kind: "affine" }>;
const GROUPS = [32, 64, 128, 256] as const;
const FLOAT8 = { float8_e4m3fn: FORMATS.float8_e4m3, float8_e5m2: FORMATS.float8_e5m2 } as const;
type Float8Type = keyof typeof FLOAT8;
type IntType = `int${1 | 2 | 3 | 4 | 5 | 6 | 7 | 8}`;

const refuse = (config: string, reason: string): never => {
  throw new FewbitError("quantize/unsupported", { config, reason });
};
/** The affine rule of a row with other arguments. */
const changed = (format: Format, variant: string, change: Partial<Affine>): Format =>
  withRule(format, variant, { rule: { ...(format.rule as Affine), ...change } });

/** Float8WeightOnlyConfig (5.3): per row, per tensor or per group; any shape. */
export function float8WeightOnly(
  args: CommonArgs & { weightDtype?: Float8Type; granularity?: Granularity } = {},
): QuantizeConfig {
  const { weightDtype = "float8_e4m3fn", granularity = perRow() } = args;
  const name = "Float8WeightOnlyConfig";
  oneOf(name, "granularity", granularity.kind, ["row", "tensor", "group"]);
  oneOf(name, "weightDtype", weightDtype, Object.keys(FLOAT8) as Float8Type[]);
  const format = withScale(FLOAT8[weightDtype], { block: blockOf(granularity) });
  return make(
    name,
    { ...args, weightDtype, granularity },
    weightRule([], () => format),
  );
}

/**
 * Float8DynamicActivationFloat8WeightConfig (5.4): per tensor (default), per row (bf16 weights), or activation blocks
 * 1x128 with weight blocks 128x128. N and K must be multiples of 16. The bounds clamp the activation's amax.
 * `useFastAccum` (torchao's `mm_config.use_fast_accum`, default true but for blocks) lets float8 tensor cores keep short sums.
 */
export function float8DynamicActivationFloat8Weight(
  args: CommonArgs & {
    activationDtype?: Float8Type;
    weightDtype?: Float8Type;
    granularity?: Granularity | readonly [activation: Granularity, weight: Granularity];
    activationValueLb?: number;
    activationValueUb?: number;
    useFastAccum?: boolean;
  } = {},
): QuantizeConfig {
  const name = "Float8DynamicActivationFloat8WeightConfig";
  const { activationDtype = "float8_e4m3fn", weightDtype = "float8_e4m3fn", granularity = perTensor() } = args;
  const [forX, forW] = "kind" in granularity ? [granularity, granularity] : granularity;
  const pair = `${blockOf(forX).join("x")} with ${blockOf(forW).join("x")}`;
  const legal = ["allxall with allxall", "1xall with 1xall", "1x128 with 128x128"];
  oneOf(name, "granularity", pair, legal);
  oneOf(name, "weightDtype", weightDtype, ["float8_e4m3fn"]);
  const { activationValueLb: floor = 0, activationValueUb: ceiling } = args;
  const plain = withScale(FLOAT8[activationDtype], { block: blockOf(forX) });
  const bounded = floor !== 0 || ceiling !== undefined;
  const rule = { kind: "amax", floor, round: "before", ...(ceiling === undefined ? {} : { ceiling }) } as const;
  const activation = bounded ? withRule(plain, `${floor}..${ceiling}`, { rule }) : plain;
  const perRowOnly = pair === legal[1] ? [dtypes("bf16")] : [];
  const format = withScale(FLOAT8[weightDtype], { block: blockOf(forW) });
  const inBlocks = pair === legal[2];
  const { useFastAccum = !inBlocks } = args;
  if (inBlocks && useFastAccum) oneOf(name, "useFastAccum", "true with blocks", ["false with blocks"]);
  const config = make(
    name,
    { ...args, activationDtype, weightDtype, granularity, useFastAccum },
    weightRule([multiples(16, inBlocks ? 128 : 16), ...perRowOnly], () => format),
    activation,
  );
  return { ...config, fastAccum: useFastAccum };
}

/** Int8WeightOnlyConfig (6.2): symmetric, per row (default), per tensor or per group; float32 scales. */
export function int8WeightOnly(args: CommonArgs & { granularity?: Granularity } = {}): QuantizeConfig {
  const { granularity = perRow() } = args;
  const name = "Int8WeightOnlyConfig";
  oneOf(name, "granularity", granularity.kind, ["row", "tensor", "group"]);
  const format = withScale(FORMATS.int8, { block: blockOf(granularity) });
  return make(
    name,
    { ...args, granularity },
    weightRule([], () => format),
  );
}

/**
 * Int8DynamicActivationInt8WeightConfig (6.3): weight symmetric; activation per token or per tensor, float32 scales.
 */
export function int8DynamicActivationInt8Weight(
  args: CommonArgs & {
    actMappingType?: "symmetric" | "asymmetric";
    granularity?: Granularity | readonly [activation: Granularity, weight: Granularity];
    reduceRange?: boolean;
  } = {},
): QuantizeConfig {
  const { actMappingType = "symmetric", granularity = perRow(), reduceRange = false } = args;
  const name = "Int8DynamicActivationInt8WeightConfig";
  oneOf(name, "actMappingType", actMappingType, ["symmetric", "asymmetric"]);
  const [forX, forW] = "kind" in granularity ? [granularity, granularity] : granularity;
  for (const { kind } of [forX, forW]) oneOf(name, "granularity", kind, ["row", "tensor"]);
  const reduced = (format: Format) => (reduceRange ? changed(format, "reduced", { min: -64, max: 63 }) : format);
  const row = actMappingType === "symmetric" ? FORMATS.int8 : FORMATS.int8_asymmetric;
  const weight = reduced(withScale(FORMATS.int8, { block: blockOf(forW) }));
  return make(
    name,
    { ...args, actMappingType, granularity, reduceRange },
    weightRule([], () => weight),
    reduced(withScale(row, { block: blockOf(forX) })),
  );
}

/**
 * Int4WeightOnlyConfig (7.1 to 7.4). `plain` and `preshuffled`: float zero point, MSLK's float32 rule.
 * `tile_packed_to_4d`: tinygemm or HQQ parameters, bf16 weights. `plain_int32`: integer zero point. Packings name rules
 * here: where bits lie is up to a device.
 */
export function int4WeightOnly(
  args: CommonArgs & {
    groupSize?: number;
    int4PackingFormat?: "plain" | "preshuffled" | "tile_packed_to_4d" | "plain_int32";
    int4ChooseQparamsAlgorithm?: "tinygemm" | "hqq";
  } = {},
): QuantizeConfig {
  const { groupSize = 128, int4PackingFormat = "plain", int4ChooseQparamsAlgorithm = "tinygemm" } = args;
  const name = "Int4WeightOnlyConfig";
  oneOf(name, "groupSize", groupSize, GROUPS);
  oneOf(name, "int4PackingFormat", int4PackingFormat, ["plain", "preshuffled", "tile_packed_to_4d", "plain_int32"]);
  oneOf(name, "int4ChooseQparamsAlgorithm", int4ChooseQparamsAlgorithm, ["tinygemm", "hqq"]);
  const hqq = int4ChooseQparamsAlgorithm === "hqq";
  if (hqq && int4PackingFormat !== "tile_packed_to_4d") refuse(name, "hqq needs int4PackingFormat tile_packed_to_4d");
  const tiled = hqq ? hqqForm(FORMATS.int4_tinygemm) : FORMATS.int4_tinygemm;
  const rows = {
    plain: FORMATS.int4_plain,
    preshuffled: FORMATS.int4_plain,
    tile_packed_to_4d: tiled,
    plain_int32: FORMATS.int4_int_zero,
  };
  const legal = {
    plain: [],
    preshuffled: [],
    tile_packed_to_4d: [dtypes("bf16")],
    plain_int32: [dtypes("bf16", "f16")],
  };
  return make(
    name,
    { ...args, groupSize, int4PackingFormat, int4ChooseQparamsAlgorithm },
    weightRule([multiples(1, groupSize), ...legal[int4PackingFormat]], ({ dtype }) =>
      grouped(rows[int4PackingFormat], groupSize, dtype),
    ),
  );
}

const hqqForm = (format: Format) => withRule(format, "hqq", { rule: { kind: "hqq" } });

/** A row with groups along K whose scales (and float zero points) are of the weight's dtype. */
function grouped(format: Format, groupSize: number | null, dtype: FloatType): Format {
  const codec = codecOf(dtype);
  const block: Block = groupSize === null ? [1, "all"] : [1, groupSize];
  return withScale(format, { block, codec, ...(format.zero.domain === "float" ? { zero: codec } : {}) });
}

/** PrototypeInt4WeightOnlyConfig (7.6): tinygemm or HQQ parameters for any weight dtype; tinygemm's eps is 1e-6. */
export function prototypeInt4WeightOnly(
  args: CommonArgs & { groupSize?: number; int4ChooseQparamsAlgorithm?: "tinygemm" | "hqq" } = {},
): QuantizeConfig {
  const { groupSize = 128, int4ChooseQparamsAlgorithm = "tinygemm" } = args;
  const name = "PrototypeInt4WeightOnlyConfig";
  // torchao's CPU kernel stops at 128; 256 is legal in its CUDA layout of the same values.
  oneOf(name, "groupSize", groupSize, GROUPS);
  oneOf(name, "int4ChooseQparamsAlgorithm", int4ChooseQparamsAlgorithm, ["tinygemm", "hqq"]);
  const row =
    int4ChooseQparamsAlgorithm === "hqq"
      ? hqqForm(FORMATS.int4_tinygemm)
      : changed(FORMATS.int4_tinygemm, "eps", { eps: 1e-6 });
  return make(
    name,
    { ...args, groupSize, int4ChooseQparamsAlgorithm },
    weightRule([multiples(1, groupSize)], ({ dtype }) => grouped(row, groupSize, dtype)),
  );
}

/** Float8DynamicActivationInt4WeightConfig (7.5): groups of 128, symmetric; float8 activations by MSLK's rule. */
export function float8DynamicActivationInt4Weight(
  args: CommonArgs & { int4PackingFormat?: "preshuffled" | "plain" } = {},
): QuantizeConfig {
  const { int4PackingFormat = "preshuffled" } = args;
  const name = "Float8DynamicActivationInt4WeightConfig";
  oneOf(name, "int4PackingFormat", int4PackingFormat, ["preshuffled", "plain"]);
  const weight = weightRule([multiples(1, 128)], ({ dtype }) =>
    int4PackingFormat === "plain" ? grouped(FORMATS.int4_symmetric, 128, dtype) : FORMATS.int4_preshuffled,
  );
  return make(name, { ...args, int4PackingFormat }, weight, VARIANTS.float8_mslk);
}

interface IntxArgs {
  weightDtype: IntType;
  granularity: Granularity;
  mappingType: Mapping;
  scaleDtype: FloatType | null;
  algorithm: "affine" | "hqq_scale_only";
  numerics: "guarded" | "torchao";
}

function intxWeight(name: string, args: IntxArgs): QuantizeConfig["weight"] {
  oneOf(name, "weightDtype", args.weightDtype, ["int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8"]);
  oneOf(name, "granularity", args.granularity.kind, ["axis", "group"]);
  oneOf(name, "mappingType", args.mappingType, ["symmetric", "asymmetric", "symmetric_no_clipping_err"]);
  oneOf(name, "intxChooseQparamsAlgorithm", args.algorithm, ["affine", "hqq_scale_only"]);
  const bits = Number(args.weightDtype.slice(3));
  // Symmetric one-bit codes are all zero in torchao (28.13); what is meant is the asymmetric rule.
  const mapping = bits === 1 && args.numerics === "guarded" ? "asymmetric" : args.mappingType;
  const row: FormatName = mapping === "asymmetric" && bits > 1 ? intName(bits, "_asymmetric") : intName(bits, "");
  const [min, max] = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1];
  let format: Format = FORMATS[row];
  if (args.algorithm === "hqq_scale_only") {
    if (bits === 1)
      refuse(name, "hqq_scale_only has no zero point, so int1 could hold no positive value (nearest legal: int2)");
    format = withRule(FORMATS[intName(bits, "")], "hqq", { rule: { kind: "hqq_scale", min, max } });
  } else if (mapping !== "asymmetric" && (bits === 1 || mapping !== "symmetric")) {
    const rule = { kind: "affine", mapping, min, max, eps: "normal" } as const;
    format = withRule(format, mapping, { rule, zero: { domain: "none" } });
  }
  const block = blockOf(args.granularity);
  return weightRule([], ({ dtype }) => withScale(format, { block, codec: codecOf(args.scaleDtype ?? dtype) }));
}

const intName = (bits: number, suffix: "" | "_asymmetric"): FormatName =>
  `int${bits === 8 ? "x8" : bits}${suffix}` as FormatName;

/**
 * IntxWeightOnlyConfig (9.1): 1 to 8 bits, per axis 0 or per group; scales in the weight's dtype unless `scaleDtype`
 * says otherwise.
 */
export function intxWeightOnly(
  args: CommonArgs & {
    weightDtype?: IntType;
    granularity?: Granularity;
    mappingType?: Mapping;
    scaleDtype?: FloatType | null;
    intxChooseQparamsAlgorithm?: "affine" | "hqq_scale_only";
  } = {},
): QuantizeConfig {
  const { weightDtype = "int8", granularity = perAxis(0), mappingType = "symmetric", scaleDtype = null } = args;
  const { intxChooseQparamsAlgorithm = "affine", numerics = "guarded" } = args;
  const name = "IntxWeightOnlyConfig";
  const algorithm = intxChooseQparamsAlgorithm;
  return make(
    name,
    { ...args, weightDtype, granularity, mappingType, scaleDtype, intxChooseQparamsAlgorithm },
    intxWeight(name, { weightDtype, granularity, mappingType, scaleDtype, algorithm, numerics }),
  );
}

/** Int8DynamicActivationIntxWeightConfig (9.2, "8daNw"). */
export function int8DynamicActivationIntxWeight(
  args: CommonArgs & {
    weightDtype?: IntType;
    weightGranularity?: Granularity;
    weightMappingType?: Mapping;
    weightScaleDtype?: FloatType | null;
    actMappingType?: "asymmetric";
    intxChooseQparamsAlgorithm?: "affine" | "hqq_scale_only";
  } = {},
): QuantizeConfig {
  const { weightDtype = "int8", weightGranularity = perGroup(32), weightMappingType = "symmetric" } = args;
  const { weightScaleDtype = null, actMappingType = "asymmetric", intxChooseQparamsAlgorithm = "affine" } = args;
  const name = "Int8DynamicActivationIntxWeightConfig";
  oneOf(name, "actMappingType", actMappingType, ["asymmetric"]);
  const weight = intxWeight(name, {
    weightDtype,
    granularity: weightGranularity,
    mappingType: weightMappingType,
    scaleDtype: weightScaleDtype,
    algorithm: intxChooseQparamsAlgorithm,
    numerics: args.numerics ?? "guarded",
  });
  const all = {
    weightDtype,
    weightGranularity,
    weightMappingType,
    weightScaleDtype,
    actMappingType,
    intxChooseQparamsAlgorithm,
  };
  return make(name, { ...args, ...all }, weight, VARIANTS.int8_intx);
}

/** Int8DynamicActivationInt4WeightConfig (7.6): uint4 groups with integer zero points, float32 scales. */
export function int8DynamicActivationInt4Weight(
  args: CommonArgs & { groupSize?: number; actMappingType?: "asymmetric" | "symmetric" } = {},
): QuantizeConfig {
  const { groupSize = 32, actMappingType = "asymmetric" } = args;
  const name = "Int8DynamicActivationInt4WeightConfig";
  oneOf(name, "groupSize", groupSize, [32, 64, 128]);
  oneOf(name, "actMappingType", actMappingType, ["asymmetric", "symmetric"]);
  const format = withScale(FORMATS.int4_int_zero, { block: [1, groupSize], codec: CODECS.f32, zero: CODECS.int8 });
  const activation =
    actMappingType === "symmetric"
      ? changed(FORMATS.int8, "127", { min: -127 })
      : withScale(changed(FORMATS.uint8, "token", { eps: 2 ** -23 }), { block: [1, "all"], codec: CODECS.f32 });
  return make(
    name,
    { ...args, groupSize, actMappingType },
    weightRule([multiples(32, groupSize)], () => format),
    activation,
  );
}

/** UIntxWeightOnlyConfig (10.1): 8 bits per row (symmetric int8), or 4 bits per group by HQQ with float16 scales. */
export function uintxWeightOnly(
  args: CommonArgs & { groupSize?: number | null; bitWidth?: number; packingBitwidth?: number | null } = {},
): QuantizeConfig {
  return uintx("UIntxWeightOnlyConfig", args, null);
}

/** Int8DynamicActivationUIntxWeightConfig (10.1): the same weights with per-token symmetric int8 activations. */
export function int8DynamicActivationUintxWeight(
  args: CommonArgs & { groupSize?: number | null; bitWidth?: number; packingBitwidth?: number | null } = {},
): QuantizeConfig {
  return uintx("Int8DynamicActivationUIntxWeightConfig", args, FORMATS.int8);
}

function uintx(
  name: string,
  args: CommonArgs & { groupSize?: number | null; bitWidth?: number; packingBitwidth?: number | null },
  activation: Format | null,
): QuantizeConfig {
  const { bitWidth = 4, groupSize = bitWidth === 8 ? null : 128, packingBitwidth = null } = args;
  oneOf(name, "bitWidth", bitWidth, [4, 8]);
  oneOf(name, "packingBitwidth", packingBitwidth, [8, 16, 32, null]);
  oneOf(name, "groupSize", groupSize, bitWidth === 8 ? [null] : [32, 64, 128, 256, 512, 1024, null]);
  const format = ({ dtype }: { dtype: FloatType }) =>
    bitWidth === 8
      ? withScale(changed(FORMATS.intx8, "gemlite", { eps: 1e-5 }), { codec: codecOf(dtype) })
      : withScale(FORMATS.int4_hqq, { block: groupSize === null ? [1, "all"] : [1, groupSize] });
  const weight = weightRule([dtypes("f16", "bf16")], format);
  return make(name, { ...args, bitWidth, groupSize, packingBitwidth }, weight, activation);
}
