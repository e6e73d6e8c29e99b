import { type Block, extentOf, type Format, formatKey, withScale } from "../formats/format.js";
import { FORMATS } from "../formats/table.js";
import type { Symbols } from "../ir/evaluate.js";
import type { UnaryFn } from "../ir/ops.js";
import { listQuantizeNames, parseQuantizeName } from "../quantize/names.js";
import type { Row } from "./cases.js";
import type { Options } from "./cases-sketch.js";

/** Formats that between them use every way of decoding. */
export const REPRESENTATIVES: readonly string[] = [
  "f32",
  "int8",
  "int4_tinygemm",
  "int5",
  "float8_e4m3",
  "mxfp4",
  "codebook4_1x2",
];

const f32 = FORMATS.f32;
/** Tokens that select the three kinds of kernels: one row, a few, many. A few rows share one row's text, repeated. */
const ROWS: readonly Symbols[] = [{ T: 1 }, { T: 5 }, { T: 33 }];
const ENDS: readonly Symbols[] = [{ T: 1 }, { T: 33 }];
export const FEW: readonly Symbols[] = [{ T: 1 }, { T: 5 }];
const AT_3: readonly Symbols[] = ENDS.map(({ T }) => ({ T: T as number, P: 3 }));
const ROW: Block = [1, "all"];

/** Every format with every block it is used with, each once; those with their own block first. */
export function everyBlock(formats: readonly Format[]): { format: Format; own: boolean }[] {
  const found = new Map<string, { format: Format; own: boolean }>();
  for (const format of formats) found.set(formatKey(format), { format, own: true });
  for (const format of formats) {
    for (const block of format.blocks) {
      const other = withScale(format, { block });
      if (!found.has(formatKey(other))) found.set(formatKey(other), { format: other, own: false });
    }
  }
  return [...found.values()];
}

interface Pair {
  readonly name: string;
  readonly weight: Format;
  readonly activation: Format;
  /** Whether weights in float32 get it, rather than only those in bfloat16. */
  readonly single: boolean;
}

/** Pairs of weight and activation that some config makes, by the config's short name. */
export function dynamicPairs(n: number, k: number): Pair[] {
  const found = new Map<string, Pair>();
  for (const name of listQuantizeNames()) {
    const config = parseQuantizeName(name);
    if (config === null || config.activation === null) continue;
    for (const dtype of ["f32", "bf16"] as const) {
      const weight = config.weight({ shape: [n, k], dtype });
      if ("refused" in weight) continue;
      const key = `${formatKey(weight)} ${formatKey(config.activation)}`;
      if (!found.has(key)) found.set(key, { name, weight, activation: config.activation, single: dtype === "f32" });
    }
  }
  return [...found.values()];
}

export const fits = (format: Format, k: number): boolean =>
  format.scales.every(({ block }) => k % Math.max(1, extentOf(block[1], k)) === 0) &&
  (format.element.kind !== "lut" || k % format.element.vector[1] === 0);

/** The format with one scale a row, where it is used that way; else the format itself. */
function byRow(format: Format): Format {
  return format.blocks.some(([rows, k]) => rows === 1 && k === "all") ? withScale(format, { block: ROW }) : format;
}

/** The rows of linear: every format and block, every pair that a config makes, and what is fused. */
export function linearRows(formats: readonly Format[]): Row[] {
  const rows: Row[] = [];
  const add = (
    variant: string,
    format: Format,
    shape: { n: number; k: number; size?: number },
    more: Partial<Row> = {},
  ) => {
    if (fits(format, shape.k)) rows.push({ op: "linear", variant, format, shape, runs: ENDS, quick: false, ...more });
  };
  // 37 features are no multiple of a tile or a workgroup; 256 is a multiple of every block.
  for (const { format, own } of everyBlock(formats))
    add("n37_k256", format, { n: 37, k: 256 }, { quick: own, tiered: own && REPRESENTATIVES.includes(format.name) });
  for (const { name, weight, activation, single } of dynamicPairs(64, 256)) {
    const quick = (single || /^uint/.test(name)) && !/^8da[2-7]w|-(32|128|256)$/.test(name);
    add(`dynamic_${name}`, weight, { n: 64, k: 256 }, { activation, quick, tiered: name === "int8dq" });
  }
  for (const format of formats.map(byRow)) {
    if (!fits(format, 37)) continue;
    add("k36", format, { n: 5, k: 36 });
    add("k37_odd", format, { n: 5, k: 37 }, { runs: FEW });
  }
  for (const [i, format] of [f32, FORMATS.int4_tinygemm, FORMATS.mxfp6_e3m2, FORMATS.codebook4_1x2].entries()) {
    add("few", format, { n: 37, k: 256 }, { runs: ROWS.slice(1, 2), quick: i < 2 });
  }
  add("few", FORMATS.int8, { n: 37, k: 256 }, { activation: FORMATS.int8, runs: ROWS.slice(1, 2), quick: true });
  const { int8, int4_tinygemm, float8_e4m3, mxfp4, bf16, int8_asymmetric } = FORMATS;
  add("k36", int8, { n: 5, k: 36 }, { activation: int8 });
  add("k37_odd", int8, { n: 5, k: 37 }, { activation: int8_asymmetric, runs: FEW });
  add("n1", int8, { n: 1, k: 64 }, { runs: FEW });
  add("large", int4_tinygemm, { n: 130, k: 1024 }, { runs: [{ T: 1 }, { T: 70 }] });
  add("large", int8, { n: 130, k: 2048 }, { activation: int8, runs: [{ T: 1 }, { T: 70 }] });
  // Steps one after another, which a backend may overlap.
  const layer = { options: { chain: true }, runs: FEW };
  for (const [i, format] of [
    bf16,
    byRow(int8),
    byRow(float8_e4m3),
    withScale(int4_tinygemm, { block: [1, 64] }),
    withScale(int4_tinygemm, { block: [1, 128] }),
    FORMATS.nvfp4,
    mxfp4,
    FORMATS.mxfp8_e4m3,
  ].entries())
    add("chain", format, { n: 1280, k: 512 }, { ...layer, quick: i < 4 });
  add("chain", byRow(float8_e4m3), { n: 1280, k: 512 }, { ...layer, activation: byRow(float8_e4m3), quick: true });
  add(
    "chain_fast",
    byRow(float8_e4m3),
    { n: 1280, k: 512 },
    {
      options: { chain: true, fastAccum: true },
      runs: FEW,
      activation: byRow(float8_e4m3),
    },
  );
  // One row's heads, which a backend may store where it multiplies them.
  const stores = {
    options: { heads: true, rounds: true },
    runs: [
      { T: 1, P: 3 },
      { T: 5, P: 3 },
      { T: 1, P: 23 },
    ],
  };
  for (const [i, [format, activation]] of (
    [
      [bf16, bf16],
      [byRow(int8), bf16],
      [byRow(int8), byRow(int8)],
      [byRow(float8_e4m3), bf16],
      [byRow(float8_e4m3), byRow(float8_e4m3)],
      [withScale(int4_tinygemm, { block: [1, 64] }), bf16],
      [withScale(int4_tinygemm, { block: [1, 32] }), bf16],
      [withScale(float8_e4m3, { block: [128, 128] }), bf16],
      [FORMATS.int5, bf16],
      [FORMATS.nvfp4, bf16],
      [FORMATS.mxfp8_e4m3, FORMATS.mxfp8_e4m3],
    ] as const
  ).entries())
    add("heads", format, { n: 256, k: 256, size: 64 }, { ...stores, activation, quick: i === 1 });
  const biased = { heads: true, rounds: true, bias: true };
  add("heads_bias", int8, { n: 96, k: 1024, size: 16 }, { ...stores, options: biased, activation: bf16 });
  add("heads_f32", bf16, { n: 64, k: 72, size: 32 }, { ...stores, options: { heads: true } });
  // What does not fit a number of fewer bits, where a backend multiplies those.
  const wide = { options: { wide: true }, activation: bf16, runs: FEW };
  for (const [i, format] of [
    byRow(int8),
    byRow(float8_e4m3),
    withScale(int4_tinygemm, { block: [1, 64] }),
    mxfp4,
  ].entries())
    add("wide", format, { n: 37, k: 1024 }, { ...wide, quick: i === 0 });
  // A row that fills much of a block's memory.
  for (const format of [
    withScale(int4_tinygemm, { block: [1, 64] }),
    withScale(int4_tinygemm, { block: [1, 128] }),
    byRow(int8),
    byRow(float8_e4m3),
  ])
    add("long_row", format, { n: 37, k: 14336 }, { activation: bf16, runs: FEW });
  // Some tens of rows, along a K that blocks share between them and walk over in several turns.
  for (const format of [withScale(int4_tinygemm, { block: [1, 64] }), byRow(int8), FORMATS.nvfp4])
    add("long", format, { n: 40, k: 8192 }, { activation: bf16, runs: [{ T: 16 }, { T: 32 }, { T: 100 }] });
  const shape = { n: 37, k: 96 };
  for (const [i, base] of [
    bf16,
    byRow(int8),
    mxfp4,
    withScale(int4_tinygemm, { block: [1, 32] }),
    float8_e4m3,
  ].entries()) {
    const quick = i < 2;
    add("bias", base, shape, { options: { bias: true }, quick: i === 3 });
    add("residual", base, shape, { options: { residual: true }, quick });
    add("bias_residual", base, shape, { options: { bias: true, residual: true } });
    for (const fn of ["relu", "silu", "gelu", "gelu_tanh"] satisfies UnaryFn[]) {
      add(fn, base, shape, { options: { unary: fn, bias: fn === "gelu" }, quick: i === 1 && fn !== "relu" });
    }
    add("gated", base, shape, { options: { gated: "silu" }, quick: i === 0 || i === 3 });
    add("gated_bias", base, shape, { options: { gated: "gelu_tanh", bias: true } });
    add("qkv", base, { n: 32, k: 96 }, { options: { qkv: true }, runs: AT_3, quick: i === 0 || i === 3 });
    add("qkv_bias", base, { n: 32, k: 96 }, { options: { qkv: true, bias: true }, runs: AT_3 });
  }
  // Results that are rounded as they are stored, and shapes that whole tiles of matrix units take.
  const int4 = withScale(int4_tinygemm, { block: [1, 64] });
  const e4m3 = byRow(float8_e4m3);
  for (const [i, [weight, activation, fastAccum]] of (
    [
      [bf16, bf16],
      [int8, int8],
      [int4, bf16],
      [e4m3, e4m3, true],
      [e4m3, e4m3, false],
    ] as const
  ).entries()) {
    const variant = (name: string) => (fastAccum ? `${name}_fast` : name);
    const more = (options: Options): Partial<Row> => ({
      activation,
      options: { ...options, fastAccum: fastAccum ?? false },
    });
    const small = { n: 48, k: 128 };
    add(variant("gated_rounds"), weight, small, { ...more({ gated: "silu", rounds: true }), quick: i < 2 });
    add(variant("relu_rounds"), weight, small, {
      ...more({ unary: "relu", rounds: true, bias: true }),
      quick: i === 3,
    });
    const tiles = { n: 272, k: 512 };
    const runs = [{ T: 1 }, { T: 24 }, { T: 150 }];
    add(variant("tiles"), weight, tiles, { ...more({ bias: true }), runs });
    add(variant("tiles_residual"), weight, tiles, { ...more({ residual: true }), runs });
    add(variant("tiles_gated"), weight, tiles, { ...more({ gated: "silu" }), runs });
    add(variant("tiles_gated_rounds"), weight, tiles, { ...more({ gated: "gelu_tanh", rounds: true }), runs });
  }
  // Tall weights with little else: devices with small bindings split them.
  const tall = { n: 600, k: 128 };
  const short = [{ T: 1 }, { T: 9 }];
  for (const format of [f32, byRow(int8), int4_tinygemm, mxfp4, FORMATS.codebook8])
    add("tall", format, tall, { runs: short });
  add("tall", int8, tall, { activation: int8, runs: short });
  add("tall_gated", int8, tall, { options: { gated: "silu", bias: true }, runs: short });
  add("tall_residual", bf16, tall, { options: { residual: true, bias: true }, runs: short });
  add("gated", int8, shape, { activation: int8, options: { gated: "silu" }, quick: true });
  // More buffers than devices with default limits bind: kernels that bind them twice step back.
  add("gated_bias", int8, shape, { activation: int8, options: { gated: "silu", bias: true }, quick: true });
  add("residual", int8, shape, { activation: int8_asymmetric, options: { residual: true } });
  add(
    "qkv",
    FORMATS.int4_int_zero,
    { n: 32, k: 128 },
    { activation: int8_asymmetric, options: { qkv: true }, runs: AT_3 },
  );
  return rows;
}
