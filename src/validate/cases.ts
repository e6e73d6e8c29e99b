import { FewbitError } from "../core/errors.js";
import { type Block, extentOf, type Format, formatKey, withScale } from "../formats/format.js";
import { FORMATS } from "../formats/table.js";
import type { Symbols } from "../ir/evaluate.js";
import type { Graph } from "../ir/graph.js";
import type { OpName, UnaryFn } from "../ir/ops.js";
import type { HostTensor } from "../ir/tensor.js";
import { listQuantizeNames, parseQuantizeName } from "../quantize/names.js";
import { expertRows } from "./cases-experts.js";
import { seedOf } from "./cases-random.js";
import * as recipes from "./cases-recipes.js";

/** The seed that the table's random numbers come from unless a caller gives another. */
export const DEFAULT_SEED = 20250;

/** Formats that between them use every way of decoding. */
const REPRESENTATIVES: readonly string[] = [
  "f32",
  "int8",
  "int4_tinygemm",
  "int5",
  "float8_e4m3",
  "mxfp4",
  "codebook4_1x2",
];

/** One run of a program: the table's cases are these. */
export interface CaseRun {
  /** Unique, and enough to run the case again: `fewbit validate --case ID`. */
  readonly id: string;
  readonly quick: boolean;
  readonly symbols: Symbols;
  /** Inputs and first states by name, made when asked for. */
  readonly inputs: () => Readonly<Record<string, HostTensor>>;
}

/** A graph of one op (and what fuses with it) with seeded weights, and the runs that share its kernels. */
export interface CaseProgram {
  readonly id: string;
  readonly op: OpName;
  /** The format that the program is about, as reports group by it. */
  readonly format: string;
  readonly seed: number;
  /** Part of what a quick run tries on every tier: its kernels differ between them. */
  readonly tiered: boolean;
  readonly buckets: readonly Symbols[];
  readonly build: () => { readonly graph: Graph; readonly weights: ReadonlyMap<string, HostTensor> };
  readonly runs: readonly CaseRun[];
}

/** What a row of the table says; `cases-recipes.ts` makes graphs of it. */
export interface Row {
  readonly op: OpName;
  /** Tells apart rows of one op and format. */
  readonly variant: string;
  readonly format: Format;
  /** The format that x is quantized to before a linear. */
  readonly activation?: Format;
  readonly shape: Readonly<Record<string, number>>;
  readonly options?: recipes.Options;
  /** The symbol values of the runs; those listed in `quick` belong to the quick table. */
  readonly runs: readonly Symbols[];
  readonly quick: boolean;
  readonly tiered?: boolean;
}

const f32 = FORMATS.f32;
/** Tokens that select the three kinds of kernels: one row, a few, many. A few rows share one row's text, repeated. */
const ROWS: readonly Symbols[] = [{ T: 1 }, { T: 5 }, { T: 33 }];
const ENDS: readonly Symbols[] = [{ T: 1 }, { T: 33 }];
const FEW: readonly Symbols[] = [{ T: 1 }, { T: 5 }];
const AT_3: readonly Symbols[] = ENDS.map(({ T }) => ({ T: T as number, P: 3 }));
const ROW: Block = [1, "all"];

/** Every format with every block it is used with, each once; those with their own block first. */
function everyBlock(formats: readonly Format[]): { format: Format; own: boolean }[] {
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
function dynamicPairs(n: number, k: number): Pair[] {
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

const fits = (format: Format, k: number): boolean =>
  format.scales.every(({ block }) => k % Math.max(1, extentOf(block[1], k)) === 0) &&
  (format.element.kind !== "lut" || k % format.element.vector[1] === 0);

/** The format with one scale a row, where it is used that way; else the format itself. */
function byRow(format: Format): Format {
  return format.blocks.some(([rows, k]) => rows === 1 && k === "all") ? withScale(format, { block: ROW }) : format;
}

function linearRows(formats: readonly Format[]): Row[] {
  const rows: Row[] = [];
  const add = (variant: string, format: Format, shape: { n: number; k: number }, more: Partial<Row> = {}) => {
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

function otherRows(formats: readonly Format[]): Row[] {
  const rows: Row[] = [];
  const add = (op: OpName, variant: string, format: Format, shape: Row["shape"], more: Partial<Row> = {}) =>
    void rows.push({ op, variant, format, shape, runs: FEW, quick: true, ...more });
  for (const { format, own } of everyBlock(formats)) {
    if (!fits(format, 256)) continue;
    // Decoding is that of a linear's weights: the quick table takes one format of each kind.
    const kind = own && REPRESENTATIVES.includes(format.name);
    add("embedding", "table", format, { rows: 67, k: 256 }, { quick: kind, runs: [{ T: 5 }] });
    add("quantize", "values", format, { k: 256 }, { quick: own, runs: [{ T: 5 }] });
    add("dequantize", "values", format, { rows: 6, k: 256 }, { quick: own, runs: [{}] });
  }
  // What activations are quantized to on the fly, made by what usually makes them.
  for (const format of new Map(
    dynamicPairs(64, 256).map(({ activation }) => [formatKey(activation), activation]),
  ).values()) {
    if (!formats.some(({ name }) => name === format.name) || !fits(format, 256)) continue;
    add("quantize", "norm", format, { k: 256 }, { options: { norm: true } });
    add("quantize", "relu", format, { k: 256 }, { options: { unary: "relu" } });
    add("quantize", "silu*mul", format, { k: 256 }, { options: { gated: "silu" } });
  }
  add("embedding", "scaled_k36", f32, { rows: 9, k: 36 }, { options: { scale: 16 } });
  for (const width of [256, 64, 37, 1000]) add("rmsnorm", `h${width}`, f32, { width }, { quick: width !== 64 });
  add("rmsnorm", "heads", f32, { width: 48, groups: 4 });
  for (const width of [256, 37]) add("layernorm", `h${width}`, f32, { width }, { options: { bias: width === 256 } });
  for (const fn of ["relu", "silu", "gelu", "gelu_tanh", "sigmoid"] satisfies UnaryFn[])
    add("unary", fn, f32, { width: 333 }, { options: { unary: fn }, runs: [{ T: 5 }] });
  add("unary", "softcap", f32, { width: 333 }, { options: { unary: "softcap", cap: 5 }, runs: [{ T: 5 }] });
  for (const fn of ["add", "mul"] as const) {
    add("binary", fn, f32, { width: 37 }, { options: { binary: fn }, runs: [{ T: 5 }] });
    add(
      "binary",
      `${fn}_self`,
      f32,
      { width: 37 },
      { options: { binary: fn, same: true }, runs: [{ T: 5 }], quick: false },
    );
  }
  rows.push(...expertRows());
  const image = { channels: 32, out: 5, size: 6, groups: 1, stride: 1 };
  const { int4, int8_asymmetric } = FORMATS;
  for (const format of [f32, withScale(int4, { block: [1, 32] }), int8_asymmetric, FORMATS.mxfp8_e4m3]) {
    add("conv2d", "3x3", format, image, { runs: [{}], options: { bias: true } });
    add(
      "conv2d",
      "grouped_stride2",
      format,
      { ...image, out: 6, groups: 2, channels: 64, stride: 2 },
      { runs: [{}], quick: false },
    );
  }
  add("last_row", "rows", f32, { width: 77 });
  const positions = [
    { T: 1, P: 0 },
    { T: 5, P: 7 },
  ];
  add("rope", "heads", f32, { heads: 3, size: 16 }, { runs: positions });
  add("rope", "partial", f32, { heads: 3, size: 16, rotary: 12 }, { runs: positions });
  add("embedding", "learned_positions", f32, { rows: 67, k: 36 }, { runs: positions });
  add("hadamard", "heads", f32, { heads: 3, size: 64 }, { runs: positions });
  add("rope", "wide", f32, { heads: 2, size: 64 }, { runs: positions, quick: false });
  const { f16, bf16, int8, float8_e4m3 } = FORMATS;
  for (const format of [f32, f16, bf16, float8_e4m3, int8]) {
    add("kv_write", "cache", format, { heads: 2, size: 16, capacity: 24 }, { runs: positions });
    add("rope", "qkv_cache", format, { heads: 4, kvHeads: 2, size: 16, capacity: 24 }, { runs: positions });
    const runs = [
      { T: 1, P: 0 },
      { T: 1, P: 90 },
      { T: 5, P: 66 },
      { T: 5, P: 0 },
    ];
    add("sdpa", "causal", format, { heads: 4, kvHeads: 2, size: 32, capacity: 96 }, { runs, tiered: format === f32 });
    add(
      "sdpa",
      "full",
      format,
      { heads: 3, kvHeads: 3, size: 64, capacity: 96 },
      { runs, quick: false, options: { causal: false } },
    );
  }
  for (const [variant, settings] of Object.entries(SETTINGS)) {
    add(
      "sample",
      variant,
      f32,
      { vocabulary: 2048 },
      { options: { settings }, runs: [{ seed: 1 }, { seed: 2 }, { seed: 3 }] },
    );
  }
  add(
    "sample",
    "small",
    f32,
    { vocabulary: 37 },
    { options: { settings: { temperature: 0.7, topK: 5, topP: 0.9 } }, runs: [{ seed: 1 }, { seed: 2 }], quick: false },
  );
  return rows;
}

const SETTINGS: Readonly<Record<string, recipes.Settings>> = {
  greedy: { temperature: 0, topK: 0, topP: 1 },
  plain: { temperature: 1, topK: 0, topP: 1 },
  top_k: { temperature: 0.8, topK: 40, topP: 1 },
  top_p: { temperature: 0.8, topK: 0, topP: 0.9 },
  both: { temperature: 1.3, topK: 100, topP: 0.8 },
};

export interface TableOptions {
  /** Default: every row of the format table. */
  readonly formats?: readonly Format[];
  readonly seed?: number;
}

/** THE CASE TABLE: every op x format x shape, each case a run of a program. Tiers are devices that it is run on. */
export function caseTable({ formats = Object.values(FORMATS), seed = DEFAULT_SEED }: TableOptions = {}): CaseProgram[] {
  const programs = new Map<string, CaseProgram>();
  for (const row of [...otherRows(formats), ...linearRows(formats)]) {
    const program = programOf(row, seed);
    if (!programs.has(program.id)) programs.set(program.id, program);
  }
  return [...programs.values()];
}

function programOf(row: Row, base: number): CaseProgram {
  const { op, variant, format, activation } = row;
  const key = formatKey(format);
  const id = `${op}/${activation === undefined ? key : `${formatKey(activation)}*${key}`}/${variant}`;
  const seed = seedOf(base, id);
  const recipe = recipes.RECIPES[op];
  const runs = row.runs.map((symbols): CaseRun => {
    const text = Object.entries(symbols).map(([name, value]) => `${name}${value}`);
    const runId = [id, ...(text.length > 0 ? [text.join("_")] : [])].join("/");
    return {
      id: runId,
      quick: row.quick,
      symbols: recipe.symbols(symbols),
      inputs: () => recipe.inputs(row, symbols, seedOf(base, runId)),
    };
  });
  const largest = (name: string) => Math.max(...row.runs.map((symbols) => symbols[name] ?? 0));
  const max = Object.fromEntries(Object.keys(row.runs[0] ?? {}).map((name) => [name, largest(name)]));
  // Runs of few rows get kernels of their own, as a model's decoding does.
  const all = row.runs.map((symbols) => symbols.T ?? 0);
  const buckets = [1, 8].filter((T) => T < Math.max(...all) && all.some((t) => t <= T && t > (T === 1 ? 0 : 1)));
  return {
    id,
    op,
    format: format.name,
    seed,
    tiered: row.tiered === true,
    buckets: buckets.map((T) => ({ T })),
    build: () => recipe.build(row, recipe.symbols(max), seed),
    runs,
  };
}

export interface Selection {
  /** Only the quick table. */
  readonly quick?: boolean;
  readonly formats?: readonly string[];
  readonly ops?: readonly string[];
  /** Ids of programs or of single cases. */
  readonly ids?: readonly string[];
}

/**
 * The programs of a table that a selection asks for, with only the runs it asks for.
 * Throws `argument/unknown-name` for an id that the table does not have.
 */
export function selectCases(table: readonly CaseProgram[], { quick, formats, ops, ids }: Selection): CaseProgram[] {
  for (const id of ids ?? []) {
    if (table.some((program) => program.id === id || program.runs.some((run) => run.id === id))) continue;
    const nearest = table
      .flatMap(({ runs }) => runs.map((run) => run.id))
      .filter((name) => name.startsWith(id.split("/")[0] as string))
      .slice(0, 5);
    throw new FewbitError("argument/unknown-name", { kind: "case", name: id, nearest });
  }
  return table.flatMap((program) => {
    if (formats !== undefined && !formats.includes(program.format)) return [];
    if (ops !== undefined && !ops.includes(program.op)) return [];
    const runs = program.runs.filter(
      (run) => (!quick || run.quick) && (ids === undefined || ids.includes(program.id) || ids.includes(run.id)),
    );
    return runs.length === 0 ? [] : [{ ...program, runs }];
  });
}
