import { roundTo } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { type Codec, defineFormat, type Format, withRule, withScale } from "../formats/format.js";
import { FORMATS, type FormatName } from "../formats/table.js";
import {
  type CommonArgs,
  codecOf,
  dtypes,
  type LayerWeight,
  make,
  multiples,
  oneOf,
  type QuantizeConfig,
  weightRule,
} from "./config.js";

const MX = {
  float8_e4m3fn: FORMATS.mxfp8_e4m3,
  float8_e5m2: FORMATS.mxfp8_e5m2,
  fp6_e2m3: FORMATS.mxfp6_e2m3,
  fp6_e3m2: FORMATS.mxfp6_e3m2,
  float4_e2m1fn_x2: FORMATS.mxfp4,
} as const;
export type MxType = keyof typeof MX;
export type MxMode = "floor" | "ceil" | "even" | "rceil";

/** The MX row of an element type and scaling mode. */
export function mxFormat(elementType: MxType, scalingMode: MxMode): Format {
  const row = MX[elementType];
  return scalingMode === "rceil" ? row : withRule(row, scalingMode, { rule: { kind: "mx", mode: scalingMode } });
}

interface MxArgs extends CommonArgs {
  blockSize?: number;
  scalingMode?: MxMode;
}

/** MXDynamicActivationMXWeightConfig (12.1): blocks of 32 along K, bf16 weights; both operands in one element type. */
export function mxDynamicActivationMxWeight(
  args: MxArgs & { activationDtype?: MxType; weightDtype?: MxType } = {},
): QuantizeConfig {
  const { weightDtype = "float8_e4m3fn", activationDtype = "float8_e4m3fn" } = args;
  const name = "MXDynamicActivationMXWeightConfig";
  oneOf(name, "activationDtype", activationDtype, [weightDtype]);
  const format = checkedMx(name, args, weightDtype);
  return make(
    name,
    { blockSize: 32, scalingMode: "rceil", ...args, weightDtype, activationDtype },
    mxWeight(format),
    format,
  );
}

/**
 * MX weights, activations left alone. torchao has no class of its own for it; arguments are those of the dynamic
 * config.
 */
export function mxWeightOnly(args: MxArgs & { weightDtype?: MxType } = {}): QuantizeConfig {
  const { weightDtype = "float8_e4m3fn" } = args;
  const name = "MXWeightOnlyConfig";
  const format = checkedMx(name, args, weightDtype);
  return make(name, { blockSize: 32, scalingMode: "rceil", ...args, weightDtype }, mxWeight(format));
}

function checkedMx(name: string, { blockSize = 32, scalingMode = "rceil" }: MxArgs, type: MxType): Format {
  oneOf(name, "weightDtype", type, Object.keys(MX) as MxType[]);
  oneOf(name, "blockSize", blockSize, [32]);
  oneOf(name, "scalingMode", scalingMode, ["floor", "ceil", "even", "rceil"]);
  return mxFormat(type, scalingMode);
}

const mxWeight = (format: Format) => weightRule([multiples(1, 32), dtypes("bf16")], () => format);

const nvfp4Row = (twoLevel: boolean) => (twoLevel ? FORMATS.nvfp4 : FORMATS.nvfp4_single);

/** NVFP4WeightOnlyConfig (13.4): blocks of 16 with a per-tensor second level; N and K multiples of 16. */
export function nvfp4WeightOnly(args: CommonArgs & { useDynamicPerTensorScale?: boolean } = {}): QuantizeConfig {
  const { useDynamicPerTensorScale = true } = args;
  const weight = weightRule([multiples(16, 16), dtypes("bf16", "f32")], () => nvfp4Row(useDynamicPerTensorScale));
  return make("NVFP4WeightOnlyConfig", { ...args, useDynamicPerTensorScale }, weight);
}

/**
 * NVFP4DynamicActivationNVFP4WeightConfig (13.4): `useTritonKernel` selects the arithmetic of MSLK's activation kernel
 * (13.2). For static activations quantize them with `perTensorScale`.
 */
export function nvfp4DynamicActivationNvfp4Weight(
  args: CommonArgs & { useTritonKernel?: boolean; useDynamicPerTensorScale?: boolean } = {},
): QuantizeConfig {
  const { useTritonKernel = true, useDynamicPerTensorScale = true } = args;
  const row = nvfp4Row(useDynamicPerTensorScale);
  const weight = weightRule([multiples(16, 16), dtypes("bf16", "f32")], () => row);
  const activation = useTritonKernel ? withRule(row, "mslk", { rule: { kind: "nvfp4", variant: "multiply" } }) : row;
  const name = "NVFP4DynamicActivationNVFP4WeightConfig";
  return make(name, { ...args, useTritonKernel, useDynamicPerTensorScale }, weight, activation);
}

/** The small float eXmY with one scale per row (11): a row of the table, or one made on the spot. */
export function fpxFormat(ebits: number, mbits: number): Format {
  const known = `fp${1 + ebits + mbits}_e${ebits}m${mbits}`;
  if (known in FORMATS) return FORMATS[known as FormatName];
  const element: Codec = {
    kind: "float",
    exponent: ebits,
    mantissa: mbits,
    bias: 2 ** (ebits - 1) - 1,
    signed: true,
    specials: "none",
  };
  const { scales, rule, source } = FORMATS.fp6_e3m2;
  return defineFormat(known, { element, scales, rule, source });
}

/** fpx_weight_only(ebits, mbits) (11): f16 or bf16 weights, N and K multiples of 64. */
export function fpxWeightOnly(ebits: number, mbits: number, args: CommonArgs = {}): QuantizeConfig {
  const name = "FPXWeightOnlyConfig";
  oneOf(name, "ebits", ebits, [1, 2, 3, 4, 5]);
  oneOf(
    name,
    "mbits",
    mbits,
    [0, 1, 2, 3, 4, 5, 6].filter((m) => 1 + ebits + m <= 8),
  );
  const format = fpxFormat(ebits, mbits);
  const weight = weightRule([multiples(64, 64), dtypes("f16", "bf16")], ({ dtype }) =>
    withScale(format, { codec: codecOf(dtype) }),
  );
  return make(name, { ...args, ebits, mbits }, weight);
}

/** to_nf4 (15): blocks of 64 along K, absmax values quantized 256 at a time; every operation in the weight's dtype. */
export function nf4WeightOnly(
  args: CommonArgs & { blockSize?: number; scalerBlockSize?: number } = {},
): QuantizeConfig {
  const { blockSize = 64, scalerBlockSize = 256 } = args;
  const name = "NF4WeightOnlyConfig";
  oneOf(name, "blockSize", blockSize, [32, 64, 128, 256]);
  const wholeScalers = ({ shape }: LayerWeight) => {
    const blocks = (shape[0] * shape[1]) / blockSize;
    return blocks % scalerBlockSize === 0
      ? null
      : `its ${blocks} blocks are not a multiple of scalerBlockSize = ${scalerBlockSize} (nearest legal scalerBlockSize: ${nearestDivisor(blocks, scalerBlockSize)})`;
  };
  const weight = weightRule([multiples(1, blockSize), wholeScalers], ({ dtype }) =>
    nf4Format(dtype, blockSize, scalerBlockSize),
  );
  return make(name, { ...args, blockSize, scalerBlockSize }, weight);
}

/** The nf4 row for weights of `dtype`: its table and scales are rounded to it. */
export function nf4Format(dtype: LayerWeight["dtype"], blockSize = 64, scalers = 256): Format {
  const { element } = FORMATS.nf4;
  const entries = ((element as Extract<Codec, { kind: "lut" }>).entries as readonly number[]).map((v) =>
    roundTo(dtype, Math.fround(v)),
  );
  const scaled = withScale(FORMATS.nf4, { block: [1, blockSize], codec: codecOf(dtype) });
  const plain = dtype === "f32" ? scaled : { ...scaled, element: { ...element, entries } as Codec };
  return scalers === 256 ? plain : withRule(plain, `scalers${scalers}`, { rule: { kind: "nf4", scalers } });
}

function nearestDivisor(value: number, wanted: number): number {
  for (let distance = 0; distance < wanted; distance++) {
    for (const candidate of [wanted - distance, wanted + distance]) if (value % candidate === 0) return candidate;
  }
  return 1;
}

/**
 * CodebookWeightOnlyConfig (16): a learned table of 2^bits patches [rows, k] and one scale per `scaleBlockSize` weights
 * of a row (null: the whole row). Weights above 2^27 elements are left alone.
 */
export function codebookWeightOnly(
  args: CommonArgs & {
    dtype?: `uint${number}`;
    blockSize?: readonly [rows: number, k: number];
    scaleBlockSize?: number | null;
  } = {},
): QuantizeConfig {
  const { dtype = "uint4", blockSize = [1, 1], scaleBlockSize = null } = args;
  const name = "CodebookWeightOnlyConfig";
  const bits = Number(dtype.slice(4));
  oneOf(name, "dtype", dtype, ["uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8"]);
  if (!blockSize.every((extent) => Number.isInteger(extent) && extent > 0)) {
    throw new FewbitError("argument/invalid", {
      name: "blockSize",
      value: blockSize,
      expected: "two positive integers",
    });
  }
  const tooLarge = ({ shape }: LayerWeight) =>
    shape[0] * shape[1] > 2 ** 27 ? `it has ${shape[0] * shape[1]} elements (at most ${2 ** 27} are clustered)` : null;
  const element: Codec = { kind: "lut", bits, entries: "learned", vector: blockSize };
  const format = {
    ...FORMATS.codebook4,
    name: `codebook${bits}${blockSize.join("x") === "1x1" ? "" : `_${blockSize.join("x")}`}`,
    element,
  };
  const weight = weightRule([multiples(blockSize[0], blockSize[1]), tooLarge], ({ dtype: of }) =>
    withScale(format, { block: [1, scaleBlockSize ?? "all"], codec: codecOf(of) }),
  );
  return make(name, { ...args, dtype, blockSize, scaleBlockSize }, weight);
}
