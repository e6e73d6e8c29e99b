import { roundTo } from "../core/dtype.js";
import { type Format, withScale } from "../formats/format.js";
import { packNibbles, transpose } from "../formats/layouts.js";
import { loadStored, memoryPart, type StoredPart } from "../formats/stored-matrix.js";
import { CODECS, FORMATS } from "../formats/table.js";
import { dequantize, elementCodes, scaleValues, zeroValues } from "../formats/tensor.js";
import { describeTorchao, torchaoPartName } from "../formats/torchao.js";
import { awqQuantize } from "../quantize/awq.js";
import { prototypeInt4WeightOnly } from "../quantize/configs.js";
import { gptqQuantize, Hessian } from "../quantize/gptq.js";
import { columnMaxima, smoothWeight } from "../quantize/smoothquant.js";
import { compress24, metadataWords, packMarlin24, prune24, reorderCutlass } from "../quantize/sparse.js";
import { type GoldenContext, type GoldenHandler, putParts, scaleBits, storedCodes } from "./golden-case.js";

async function smoothQuant(context: GoldenContext): Promise<void> {
  const [w, x] = [context.floats("w"), context.floats("x")];
  const [n, k] = context.matrix("w");
  const made = smoothWeight(w, columnMaxima(x, k), context.dtype("w"), context.golden.args.alpha as number);
  context.put("factor", made.factor);
  context.put("smoothed_weight", made.weight);
  context.put("act_pre_scale", made.preScale);
  if (!context.has("w.codes")) return;
  const weight = await context.backend.quantize(made.weight, [n, k], "f32", FORMATS.int8, { numerics: "torchao" });
  putParts(context, "w.", weight);
  const scaled = x.map((value, i) => value * (made.preScale[i % k] as number));
  const activation = await context.backend.quantize(scaled, context.matrix("x"), "f32", FORMATS.int8, {
    numerics: "torchao",
  });
  context.put("y.torchao", await context.backend.linear(activation, weight, null));
}

async function awq(context: GoldenContext): Promise<void> {
  const shape = context.matrix("w");
  const config = prototypeInt4WeightOnly({ groupSize: 32 });
  const format = config.weight({ shape, dtype: "f32" }) as Format;
  const made = awqQuantize(context.floats("w"), shape, "f32", context.floats("x"), format, {
    numerics: "torchao",
    searchSpace: context.golden.args.scale_search_space_size as number,
  });
  context.put("equalization_scale", made.scale);
  context.put("act_pre_scale", made.preScale);
  const scaled = context.floats("x").map((value, i) => value * (made.preScale[i % shape[1]] as number));
  context.put("y.torchao", await context.backend.linear(scaled, await context.backend.store(made.tensor), null));
}

async function gptq(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const [n, k] = context.matrix("w");
  const hessian = new Hessian(k);
  for (const name of ["x0", "x1"]) hessian.observe(context.floats(name), context.shape(name));
  context.put("hessian", hessian.values);
  const formats: Record<string, Format> = {
    int4: withScale(FORMATS.int4_plain, {
      block: [1, (args.group_size as number) ?? k],
      codec: CODECS.f32,
      zero: CODECS.f32,
    }),
    int8: FORMATS.int8,
    nvfp4: FORMATS.nvfp4,
  };
  const made = gptqQuantize(context.floats("w"), [n, k], hessian, formats[String(args.base)] as Format, {
    numerics: "torchao",
    percdamp: args.percdamp as number,
    blockSize: args.gptq_quantize_block_size as number,
  });
  const tensor = await context.backend.store(made);
  context.put("codes", storedCodes(tensor));
  context.put("scale.bits", scaleBits(tensor));
  const groups = scaleValues(tensor, 0).length / n;
  const transposed = args.base === "int4";
  context.put("scale", transposed ? transpose(scaleValues(tensor, 0), n, groups) : scaleValues(tensor, 0));
  if (transposed) context.put("zero", transpose(zeroValues(tensor), n, groups));
  else if (args.base === "nvfp4") context.put("per_tensor_scale", scaleValues(tensor, 1));
}

async function sparse24(context: GoldenContext): Promise<void> {
  const [n, k] = context.matrix("w");
  const pruned = context.floats("pruned");
  const bits = context.golden.args.dtype === "int8" ? 32 : 16;
  // The first rows are made by hand, also with more than two elements left.
  const own = prune24(pruned);
  const { values, quads } = compress24(pruned);
  context.put("values", values);
  context.put("quad_meta", quads);
  context.put("meta", reorderCutlass(metadataWords(quads, bits), n, k / bits, bits));
  if (own.some((value, i) => value !== pruned[i] && pruned[i] === 0)) throw new Error("pruning made an element");
}

async function marlin(context: GoldenContext): Promise<void> {
  const [k, n] = context.matrix("codes");
  const made = packMarlin24(Uint8Array.from(context.input("codes")), context.floats("scales"), k, n);
  context.put("packed", made.packed);
  context.put("scales_packed", made.scales);
  context.put("meta", made.meta);
}

/** 25: the values that a reader must recover. */
async function checkpoint(context: GoldenContext): Promise<void> {
  const file = await context.openFile(String(context.golden.args.file));
  const names = JSON.parse(file.metadata.get("tensor_names") ?? "[]") as string[];
  for (const name of names) {
    const described = JSON.parse(file.metadata.get(name) ?? "{}") as {
      _type: string;
      _data: Record<string, unknown>;
      _tensor_data_names?: string[];
    };
    if (described._type === "Tensor") {
      context.put(name, file.numbers(name));
      continue;
    }
    const parts = new Map<string, StoredPart>();
    for (const part of described._tensor_data_names ?? []) {
      const { dtype, shape, bytes } = file.part(torchaoPartName(name, part));
      parts.set(part, memoryPart(dtype, shape, bytes));
    }
    const read = await loadStored(await describeTorchao(name, described._type, described._data, parts));
    const tensor = await context.backend.store(read);
    // torchao rounds every step to the weight's dtype; int4 is read by kernels only, which round once.
    const once = () => Float32Array.from(dequantize(tensor), (value) => roundTo("bf16", value));
    context.put(name, described._type === "Int4Tensor" ? once() : await context.backend.dequantize(tensor, "bf16"));
    // Bytes survive the way through fewbit's own layout.
    if (described._type === "Int4Tensor") {
      const packed = packNibbles(elementCodes(tensor), "first");
      if (packed.some((byte, i) => byte !== file.part(torchaoPartName(name, "qdata")).bytes[i]))
        throw new Error(`${name}: codes changed`);
    }
  }
}

export const CALIBRATION: Readonly<Record<string, GoldenHandler>> = {
  SmoothQuantConfig: { needs: ["quantize", "linear"], host: "smoothing factors", run: smoothQuant },
  AWQConfig: { needs: ["linear", "store"], host: "the search for scales", run: awq },
  GPTQConfig: { needs: ["store"], host: "the Hessian and the codes, column by column", run: gptq },
  "2:4 semi-structured": { needs: [], host: "pruning and the order of its metadata", run: sparse24 },
  "MarlinSparseLayout (removed)": { needs: [], host: "the order of codes in another library's kernels", run: marlin },
  "torchao safetensors checkpoint": { needs: ["dequantize", "store"], host: "reading the file", run: checkpoint },
};
