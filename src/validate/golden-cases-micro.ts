import { roundTo } from "../core/dtype.js";
import { decodeTable } from "../formats/codec.js";
import { defineFormat, type Format, withRule, withScale } from "../formats/format.js";
import { packNibbles, toBlocked } from "../formats/layouts.js";
import { packRows } from "../formats/pack.js";
import { CODECS, FORMATS } from "../formats/table.js";
import { elementCodes, type QuantizedTensor, scaleValues } from "../formats/tensor.js";
import { codebookWeightOnly, type MxMode, type MxType, mxFormat, nf4Format } from "../quantize/configs.js";
import { quantizeGgufQ4K } from "../quantize/gguf.js";
import { quantizeScalers, scalersOf } from "../quantize/nf4.js";
import { type GoldenContext, type GoldenHandler, putParts, scaleBits } from "./golden-case.js";
import { putLinear } from "./golden-cases-float.js";
import { denseTensor } from "./golden-reference.js";

const is4Bit = (format: Format) =>
  format.element.kind === "float" && format.element.exponent + format.element.mantissa === 3;

/** Codes, packed codes, block scales. */
function putMicro(context: GoldenContext, prefix: string, tensor: QuantizedTensor): void {
  putParts(context, prefix, tensor);
  if (is4Bit(tensor.format)) context.put(`${prefix}packed`, packNibbles(elementCodes(tensor), "first"));
}

async function toMx(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const type = args.elem_dtype as MxType;
  if (context.has("amax")) return mxSweep(context, type);
  const tensor = await context.quantize("x", mxFormat(type, args.scaling_mode as MxMode));
  putMicro(context, "", tensor);
  context.put("dequant", await context.backend.dequantize(tensor, "f32"));
}

/** Blocks that hold one number each, in position 5. */
async function mxSweep(context: GoldenContext, type: MxType): Promise<void> {
  const amax = context.floats("amax");
  const data = new Float32Array(amax.length * 32);
  for (let i = 0; i < amax.length; i++) data[i * 32 + 5] = amax[i] as number;
  for (const mode of ["floor", "rceil", "ceil", "even"] as const) {
    const tensor = await context.backend.quantize(data, [amax.length, 32], "f32", mxFormat(type, mode), {
      numerics: "torchao",
    });
    context.put(`scale_${mode}`, scaleBits(tensor));
    const codes = elementCodes(tensor);
    context.put(
      `code_${mode}`,
      Uint32Array.from(amax, (_, i) => codes[i * 32 + 5] as number),
    );
  }
}

async function mxLinear(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const format = mxFormat(args.weight_dtype as MxType, args.scaling_mode as MxMode);
  const [weight, x] = [await context.quantize("w", format), await context.quantize("x", format)];
  putMicro(context, "w.", weight);
  putMicro(context, "x.", x);
  const [n, k] = weight.shape;
  context.put("w.scale_swizzled", toBlocked(scaleBits(weight), n, k / 32));
  await putLinear(context, x, weight);
}

async function blocked(context: GoldenContext): Promise<void> {
  const [rows, columns] = context.matrix("scales");
  const scales = await context.backend.decode(CODECS.uint8, Uint32Array.from(context.input("scales")));
  context.put("blocked", toBlocked(Uint32Array.from(scales), rows, columns));
}

const perTensor = (context: GoldenContext, name: string) => ({ perTensorScale: context.floats(name)[0] as number });

async function nvfp4(context: GoldenContext): Promise<void> {
  const { scaling } = context.golden.args;
  if (scaling === "dynamic per expert") return nvfp4Experts(context);
  const format = scaling === "single" ? FORMATS.nvfp4_single : FORMATS.nvfp4;
  const tensor = await context.quantize(
    "x",
    format,
    scaling === "static" ? perTensor(context, "per_tensor_scale") : {},
  );
  putMicro(context, "", tensor);
  if (scaling !== "single") context.put("per_tensor_scale", scaleValues(tensor, 1));
  context.put("dequant", await context.backend.dequantize(tensor, "f32"));
}

/** Every expert is a tensor of its own. */
async function nvfp4Experts(context: GoldenContext): Promise<void> {
  const [experts, n, k] = context.shape("x") as [number, number, number];
  const tensors: QuantizedTensor[] = [];
  for (let e = 0; e < experts; e++) {
    const data = context.floats("x").subarray(e * n * k, (e + 1) * n * k);
    tensors.push(
      await context.backend.quantize(data, [n, k], context.dtype("x"), FORMATS.nvfp4, { numerics: "torchao" }),
    );
  }
  context.put(
    "per_tensor_scale",
    tensors.flatMap((tensor) => [...scaleValues(tensor, 1)]),
  );
  context.put(
    "scale.bits",
    tensors.flatMap((tensor) => [...scaleBits(tensor)]),
  );
  context.put(
    "packed",
    tensors.flatMap((tensor) => [...packNibbles(elementCodes(tensor), "first")]),
  );
}

async function nvfp4Swizzled(context: GoldenContext): Promise<void> {
  const tensor = await context.quantize("x", FORMATS.nvfp4);
  const [n, k] = tensor.shape;
  context.put("per_tensor_scale", scaleValues(tensor, 1));
  context.put("packed", packNibbles(elementCodes(tensor), "first"));
  context.put("scale_swizzled", toBlocked(scaleBits(tensor), n, k / 16));
}

async function nvfp4Linear(context: GoldenContext): Promise<void> {
  const fixed = context.golden.args.activation_scale === "static";
  const weight = await context.quantize("w", FORMATS.nvfp4);
  const x = await context.quantize("x", FORMATS.nvfp4, fixed ? perTensor(context, "x.per_tensor_scale") : {});
  for (const [prefix, tensor] of [
    ["w.", weight],
    ["x.", x],
  ] as const) {
    putMicro(context, prefix, tensor);
    context.put(`${prefix}per_tensor_scale`, scaleValues(tensor, 1));
    context.put(`${prefix}dequant`, await context.backend.dequantize(tensor, "f32"));
  }
  await putLinear(context, x, weight, ["y.ref", "y.rounding"]);
  await putLinear(context, context.floats("x"), weight, ["y.weight_only"]);
}

async function nvfp4Kernel(context: GoldenContext): Promise<void> {
  const format = withRule(FORMATS.nvfp4, "mslk", { rule: { kind: "nvfp4", variant: "multiply" } });
  const tensor = await context.quantize("x", format, perTensor(context, "per_tensor_scale"));
  putMicro(context, "", tensor);
  context.put("per_tensor_scale", scaleValues(tensor, 1));
}

/** Blocks run through the flat tensor, across rows: it is quantized as one row per block. */
async function nf4(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const [block, scalers] = [args.block_size as number, args.scaler_block_size as number];
  const dtype = context.dtype("w");
  const data = context.floats("w");
  const flat = [data.length / block, block] as const;
  const format = nf4Format(dtype, block, scalers);
  const tensor = await context.backend.quantize(data, flat, dtype, format, { numerics: "torchao" });
  const codes = elementCodes(tensor);
  context.put("codes", codes);
  context.put("packed", packNibbles(codes, "second"));
  const absmax = Float32Array.from({ length: flat[0] }, (_, b) =>
    data.subarray(b * block, (b + 1) * block).reduce((a, v) => Math.max(a, Math.abs(v)), 0),
  );
  const parts = quantizeScalers(absmax, dtype, scalers);
  context.put("quantized_scalers", parts.quantized);
  context.put("quantization_factor", parts.factor);
  context.put("scaler_mean", [parts.mean]);
  const table = decodeTable(format.element);
  context.put("table", table);
  // The summation order of the mean is not defined in float32; what the stored parts mean is.
  const stored = scalersOf(
    {
      quantized: Int8Array.from(context.input("quantized_scalers")),
      factor: context.floats("quantization_factor"),
      mean: context.floats("scaler_mean")[0] as number,
    },
    dtype,
    scalers,
  );
  const values = Float32Array.from(codes, (code, i) =>
    roundTo(dtype, (table[code] as number) * (stored[Math.floor(i / block)] as number)),
  );
  context.put("dequant", values);
  if (!context.has("x")) return;
  await putLinear(context, context.floats("x"), denseTensor(values, context.matrix("w")), ["y.ref"]);
}

/** A learned table's format: float32 scales, one per `scaleBlock` elements of a row. */
function codebookFormat(block: readonly [number, number], scaleBlock: number, iterations: number): Format {
  const config = codebookWeightOnly({ dtype: "uint4", blockSize: block, scaleBlockSize: scaleBlock });
  const format = config.weight({ shape: [block[0] * 64, block[1] * scaleBlock * 64], dtype: "f32" }) as Format;
  return withRule(withScale(format, { block: [1, scaleBlock] }), "golden", { rule: { kind: "codebook", iterations } });
}

async function codebookGiven(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const format = codebookFormat(args.block_size as [number, number], args.scale_block_size as number, 0);
  const tensor = await context.quantize("x", format, {
    table: context.floats("codebook"),
    given: { scale: context.floats("scales") },
  });
  context.put("codes", elementCodes(tensor));
  context.put("dequant", await context.backend.dequantize(tensor, "f32"));
}

async function codebookLearned(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const format = codebookFormat(
    args.block_size as [number, number],
    args.scale_block_size as number,
    args.max_iter as number,
  );
  const tensor = await context.quantize("x", format);
  context.put("scales", scaleValues(tensor, 0));
  context.put("codebook", tensor.table as Float32Array);
  context.put("codes", elementCodes(tensor));
}

/** Tables per group of rows or columns, table[i / b0][j / b1][code]: each group is a tensor with a table of its own. */
async function codebookGroups(context: GoldenContext): Promise<void> {
  const [n, k] = context.matrix("codes");
  const [rows, columns] = context.shape("codebook") as [number, number];
  const bits = context.golden.args.nbits as number;
  const [height, width] = [n / rows, k / columns];
  const [tables, codes] = [context.floats("codebook"), context.input("codes")];
  const format = defineFormat("codebook group", {
    element: { kind: "lut", bits, entries: "learned", vector: [1, 1] },
    rule: { kind: "cast" },
    source: "golden",
    use: "one group of a grouped codebook",
  });
  const out = new Float32Array(n * k);
  for (let group = 0; group < rows * columns; group++) {
    const [top, left] = [Math.floor(group / columns) * height, (group % columns) * width];
    const at = (i: number) => (top + Math.floor(i / width)) * k + left + (i % width);
    const part = Uint32Array.from({ length: height * width }, (_, i) => codes[at(i)] as number);
    const table = tables.slice(group * 2 ** bits, (group + 1) * 2 ** bits);
    const qdata = packRows(part, height, width, bits);
    const tensor = { format, shape: [height, width], qdata, scales: [], table } as const;
    for (const [i, value] of (await context.backend.dequantize(tensor, "f32")).entries()) out[at(i)] = value;
  }
  context.put("dequant", out);
}

async function gguf(context: GoldenContext): Promise<void> {
  const made = quantizeGgufQ4K(context.floats("x"), context.matrix("x"), { numerics: "torchao" });
  context.put("super_scale", made.superScale);
  context.put("super_min", made.superMin);
  context.put("block_scale", made.blockScale);
  context.put("block_min", made.blockMin);
  context.put("codes", made.codes);
  context.put("dequant", made.values);
}

export const MICRO: Readonly<Record<string, GoldenHandler>> = {
  to_mx: { needs: ["quantize", "dequantize"], run: toMx },
  MXDynamicActivationMXWeightConfig: { needs: ["quantize", "linear"], run: mxLinear },
  to_blocked: { needs: ["decode"], host: "the order of scales in another library's kernels", run: blocked },
  nvfp4_quantize: { needs: ["quantize", "dequantize"], run: nvfp4 },
  NVFP4Tensor: { needs: ["quantize"], run: nvfp4Swizzled },
  NVFP4DynamicActivationNVFP4WeightConfig: { needs: ["quantize", "dequantize", "linear"], run: nvfp4Linear },
  "mslk triton_quantize_nvfp4": { needs: ["quantize"], run: nvfp4Kernel },
  to_nf4: { needs: ["quantize", "linear"], run: nf4 },
  "quantize_codebook/dequantize_codebook": { needs: ["quantize", "dequantize"], run: codebookGiven },
  CodebookWeightOnlyConfig: { needs: ["quantize"], run: codebookLearned },
  "codebook_coreml.dequantize_codebook": { needs: ["dequantize"], run: codebookGroups },
  GGUFWeightOnlyConfig: {
    needs: [],
    host: "the search for scales and minima of torchao's Q4_K",
    run: gguf,
  },
};
