import { codecBits, withRule } from "../formats/format.js";
import { packNibbles } from "../formats/layouts.js";
import { packRows } from "../formats/pack.js";
import { CODECS, FORMATS } from "../formats/table.js";
import type { QuantizedTensor } from "../formats/tensor.js";
import {
  float8Attention,
  float8Values,
  type Hadamard,
  hadamard,
  quantizeFloat8Operand,
} from "../quantize/attention.js";
import {
  dequantizeState,
  LowBitAdam,
  type OptimState,
  quantizeState,
  type StateKind,
  stateMap,
} from "../quantize/optim.js";
import type { AttentionShape, GoldenContext, GoldenHandler } from "./golden-case.js";

function attentionShape(context: GoldenContext): AttentionShape {
  const [batch, heads, tokens, size] = context.shape("q") as [number, number, number, number];
  const [, kvHeads, keys] = context.shape("k") as [number, number, number];
  return { batch, heads, kvHeads, tokens, keys, size, causal: context.golden.args.is_causal === true };
}

async function sdpa(context: GoldenContext): Promise<void> {
  const shape = attentionShape(context);
  const y = await context.backend.sdpa(context.floats("q"), context.floats("k"), context.floats("v"), shape);
  context.put("y.ref", y);
  context.put("y.torch", y);
}

/** 20.2. Operands are quantized on the host; the backend attends over what they mean. */
async function float8(context: GoldenContext): Promise<void> {
  const shape = attentionShape(context);
  const groups = shape.batch * shape.kvHeads;
  const mode = context.golden.args.hadamard as Hadamard;
  const operand = (name: "q" | "k" | "v") => {
    const rotate = mode === "QKV" || (mode === "V_ONLY" && name === "v");
    const made = quantizeFloat8Operand(context.floats(name), groups, { size: shape.size, rotate, dtype: "bf16" });
    context.put(`${name}.codes`, made.codes);
    context.put(`${name}.descale`, made.descale);
    return made;
  };
  const [q, k, v] = [operand("q"), operand("k"), operand("v")];
  const back = (y: Float32Array) => (mode === "NONE" ? y : hadamard(y, shape.size));
  context.put("y.ref", back(await context.backend.sdpa(float8Values(q), float8Values(k), float8Values(v), shape)));
  context.put("y.p_e4m3", back(float8Attention(q, k, v, shape)));
}

async function maps(context: GoldenContext): Promise<void> {
  for (const { name } of context.golden.tensors) {
    const entries = [...stateMap(name as Exclude<StateKind, "fp8">)];
    const codes = Uint32Array.from(entries, (_, code) => code);
    const codec = { kind: "lut", bits: Math.log2(entries.length), entries, vector: [1, 1] } as const;
    context.put(name, await context.backend.decode(codec, codes));
  }
}

/** A state as a stored tensor: one row a block. */
function stateTensor({ codes, scale }: OptimState, kind: StateKind): QuantizedTensor {
  const size = codes.length / scale.length;
  const entries = kind === "fp8" ? [] : [...stateMap(kind)];
  const element =
    kind === "fp8" ? CODECS.e4m3 : ({ kind: "lut", bits: Math.log2(entries.length), entries, vector: [1, 1] } as const);
  const format = withRule(FORMATS.float8_e4m3, kind, { element, rule: { kind: "cast" } });
  const qdata = packRows(codes, scale.length, size, codecBits(element));
  return { format, shape: [scale.length, size], qdata, scales: [new Uint32Array(scale.buffer)] };
}

async function optimState(context: GoldenContext): Promise<void> {
  const { args } = context.golden;
  const kind = (args.map ?? "fp8") as StateKind;
  const state = quantizeState(context.floats("x"), kind, args.block_size as number);
  context.put("codes", state.codes);
  context.put("scale", state.scale);
  context.put("packed", packNibbles(state.codes, "second"));
  context.put("dequant", dequantizeState(state, kind));
  context.put("dequant", await context.backend.dequantize(stateTensor(state, kind), "f32"));
}

const BITS: Record<string, { bits: 8 | 4 | "fp8"; decoupled: boolean }> = {
  AdamW8bit: { bits: 8, decoupled: true },
  AdamW4bit: { bits: 4, decoupled: true },
  AdamWFp8: { bits: "fp8", decoupled: true },
  Adam8bit: { bits: 8, decoupled: false },
};

async function optimizer(context: GoldenContext): Promise<void> {
  const { args, config } = context.golden;
  const kind = BITS[config] as { bits: 8 | 4 | "fp8"; decoupled: boolean };
  const parameters = context.floats("p0").slice();
  const adam = new LowBitAdam(parameters.length, {
    ...kind,
    lr: args.lr as number,
    betas: args.betas as [number, number],
    eps: args.eps as number,
    weightDecay: args.weight_decay as number,
    blockSize: args.block_size as number,
  });
  for (let step = 1; context.has(`grad${step}`); step++) adam.step(parameters, context.floats(`grad${step}`));
  context.put("p3", parameters);
  for (const [i, name] of ["m", "v"].entries()) {
    const state = adam.moments[i] as OptimState;
    context.put(`${name}.codes`, kind.bits === 4 ? packNibbles(state.codes, "second") : state.codes);
    context.put(`${name}.scale`, state.scale);
  }
}

const STATES = "optimizer states, which fewbit keeps on the host";

export const ATTENTION_AND_TRAINING: Readonly<Record<string, GoldenHandler>> = {
  scaled_dot_product_attention: { needs: ["sdpa"], run: sdpa },
  "apply_low_precision_attention FP8_FA3": {
    needs: ["sdpa"],
    host: "scales of queries, keys and values, over whole heads",
    run: float8,
  },
  "low-bit optimizer maps": { needs: ["decode"], run: maps },
  OptimState: { needs: ["dequantize"], host: STATES, run: optimState },
  OptimStateFp8: { needs: ["dequantize"], host: STATES, run: optimState },
  ...Object.fromEntries(
    Object.keys(BITS).map((name) => [name, { needs: [], host: STATES, run: optimizer } as GoldenHandler]),
  ),
};
