import { maxValue } from "../formats/codec.js";
import { type Block, type Format, withRule, withScale } from "../formats/format.js";
import { packFpx } from "../formats/layouts.js";
import { CODECS, FORMATS, VARIANTS } from "../formats/table.js";
import { elementCodes, type QuantizedTensor } from "../formats/tensor.js";
import { fpxFormat } from "../quantize/configs.js";
import { compress24 } from "../quantize/sparse.js";
import { castFloat8Training } from "../quantize/training.js";
import { floatTypeOf, type GoldenContext, type GoldenHandler, putParts } from "./golden-case.js";

const FLOAT8: Record<string, Format> = { float8_e4m3fn: FORMATS.float8_e4m3, float8_e5m2: FORMATS.float8_e5m2 };

/** The block of a granularity as the manifest writes it. */
export function granularityBlock(text: string): Block {
  if (text === "pertensor") return ["all", "all"];
  if (text === "perrow") return [1, "all"];
  const group = /^pergroup(\d+)$/.exec(text);
  if (group !== null) return [1, Number(group[1])];
  const block = /^PerBlock\((\d+),(\d+)\)$/.exec(text);
  return [Number(block?.[1]), Number(block?.[2])];
}

/** Hands over a linear's result for every output the case defines. */
export async function putLinear(
  context: GoldenContext,
  x: Float32Array | QuantizedTensor,
  weight: QuantizedTensor,
  names: readonly string[] = ["y.ref", "y.torchao"],
): Promise<void> {
  if (!names.some((name) => context.has(name))) return;
  const bias = context.has("bias") ? context.floats("bias") : null;
  const y = await context.backend.linear(x, weight, bias);
  for (const name of names) context.put(name, y);
}

/** 5.1 to 5.4: weight only, or with a dynamic activation. */
async function float8(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const { granularity } = args;
  const [forX, forW] = Array.isArray(granularity) ? (granularity as string[]) : [granularity, granularity];
  const row = FLOAT8[String(args.weight_dtype ?? args.float8_dtype ?? "float8_e4m3fn")] as Format;
  const weight = await context.quantize("w", withScale(row, { block: granularityBlock(String(forW)) }));
  putParts(context, "w.", weight);
  context.put("w.dequant", await context.backend.dequantize(weight, context.dtype("w")));
  if (!context.has("x")) return;
  if (!context.has("x.codes")) return putLinear(context, context.floats("x"), weight);
  const [floor, ceiling] = [
    args.activation_value_lb as number | undefined,
    args.activation_value_ub as number | undefined,
  ];
  const plain = withScale(FLOAT8[String(args.activation_dtype ?? "float8_e4m3fn")] as Format, {
    block: granularityBlock(String(forX)),
  });
  const bounds = { floor: floor ?? 0, ...(ceiling === undefined ? {} : { ceiling }) };
  const activation = withRule(plain, "golden", { rule: { kind: "amax", round: "before", ...bounds } });
  const x = await context.quantize("x", activation);
  putParts(context, "x.", x);
  await putLinear(context, x, weight);
}

/** 5.2 and 5.5: scales in float32. */
const rowKernel = (format: Format, prefix: string) => async (context: GoldenContext) => {
  putParts(context, prefix, await context.quantize("x", format));
};

const BLOCKWISE_ACTIVATION = withScale(
  withRule(FORMATS.float8_e4m3, "blockwise", { rule: { kind: "amax", floor: 0, round: "after" } }),
  { block: [1, 128] },
);

async function powerScale(context: GoldenContext): Promise<void> {
  const format = withScale(
    withRule(FORMATS.float8_e4m3, "power", { rule: { kind: "amax", floor: 0, round: "before", power: true } }),
    { block: context.golden.args.block_size as [number, number] },
  );
  putParts(context, "", await context.quantize("x", format));
}

async function staticActivation(context: GoldenContext): Promise<void> {
  const format = withScale(FORMATS.float8_e4m3, { block: ["all", "all"] });
  putParts(context, "x.", await context.quantize("x", format, { given: { scale: context.floats("act_scale") } }));
}

async function training(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const rowwise = args.recipe === "rowwise";
  const power = args.round_scales_to_power_of_2 === true;
  const cast = castFloat8Training(context.floats("x"), context.matrix("x"), { rowwise, powerOfTwo: power });
  context.put("scale", cast.scale);
  context.put("codes", cast.codes);
  const perRow = context.matrix("x")[1];
  const top = maxValue(CODECS.e4m3);
  const scaled = context.floats("x").map((value, i) => {
    const product = Math.fround(value * (cast.scale[rowwise ? Math.floor(i / perRow) : 0] as number));
    return Math.min(Math.max(product, -top), top);
  });
  context.put("codes", await context.backend.encode(CODECS.e4m3, scaled));
}

/** 18: the fp8 path quantizes a weight that is already 2:4 sparse. */
async function sparseFloat8(context: GoldenContext): Promise<void> {
  const weight = await context.quantize("w", FORMATS.float8_e4m3);
  putParts(context, "", weight);
  // Both zeros of a float code are zero.
  const { values, quads } = compress24(elementCodes(weight), (code) => (code & 0x7f) === 0);
  context.put("values", values);
  context.put("quad_meta", quads);
}

async function fpx(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const [ebits, mbits] = [args.ebits as number, args.mbits as number];
  const [n, k] = context.matrix("w");
  const format = withScale(fpxFormat(ebits, mbits), { codec: FORMATS[floatTypeOf(args.dtype)].element });
  const weight = await context.quantize("w", format);
  putParts(context, "", weight);
  context.put("packed", packFpx(elementCodes(weight), n, k, 1 + ebits + mbits));
  context.put("dequant", await context.backend.dequantize(weight, "f32"));
}

export const FLOAT: Readonly<Record<string, GoldenHandler>> = {
  Float8WeightOnlyConfig: { needs: ["quantize", "dequantize", "linear"], run: float8 },
  Float8DynamicActivationFloat8WeightConfig: { needs: ["quantize", "dequantize", "linear"], run: float8 },
  "Float8Tensor.from_hp": { needs: ["quantize", "dequantize"], run: float8 },
  "blockwise_fp8_inference.fp8_blockwise_act_quant": {
    needs: ["quantize"],
    run: rowKernel(BLOCKWISE_ACTIVATION, "x."),
  },
  "mslk quantize_fp8_row": { needs: ["quantize"], run: rowKernel(VARIANTS.float8_mslk, "") },
  _choose_scale_float8: { needs: ["quantize"], run: powerScale },
  Float8StaticActivationFloat8WeightConfig: { needs: ["quantize"], run: staticActivation },
  "float8 training cast": { needs: ["encode"], host: "scales of the cast of a training step", run: training },
  "Float8DynamicActivationFloat8WeightConfig (sparse packing)": { needs: ["quantize"], run: sparseFloat8 },
  "FPXWeightOnlyConfig (removed)": { needs: ["quantize", "dequantize"], run: fpx },
};
