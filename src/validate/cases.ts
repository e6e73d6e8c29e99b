import { FewbitError } from "../core/errors.js";
import { type Block, type Format, formatKey, withScale } from "../formats/format.js";
import { FORMATS, VARIANTS } from "../formats/table.js";
import type { Symbols } from "../ir/evaluate.js";
import type { Graph } from "../ir/graph.js";
import type { OpName, UnaryFn } from "../ir/ops.js";
import type { HostTensor } from "../ir/tensor.js";
import { expertRows } from "./cases-experts.js";
import { dynamicPairs, everyBlock, FEW, fits, linearRows, REPRESENTATIVES } from "./cases-linear.js";
import { seedOf } from "./cases-random.js";
import * as recipes from "./cases-recipes.js";

/** The seed that the table's random numbers come from unless a caller gives another. */
export const DEFAULT_SEED = 20250;

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
  // Rows that blocks of threads share.
  const scaled = (format: Format, ...block: Block) => withScale(format, { block });
  const float8 = FORMATS.float8_e4m3;
  for (const format of [
    FORMATS.bf16,
    scaled(float8, 1, "all"),
    scaled(FORMATS.int8, 1, "all"),
    scaled(float8, "all", "all"),
  ])
    for (const [variant, options] of Object.entries({ wide: {}, wide_norm: { norm: true } }))
      add("quantize", variant, format, { k: 8192 }, { options, quick: false });
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
    // What matrix units take: long prompts of bf16 queries, from nothing and after other tokens.
    const long = [
      { T: 1, P: 300 },
      { T: 140, P: 0 },
      { T: 140, P: 170 },
    ];
    for (const [variant, options] of Object.entries({
      bf16: { bf16: true },
      bf16_rounds: { bf16: true, rounds: true },
    }))
      for (const size of [64, 128])
        add(
          "sdpa",
          `${variant}_h${size}`,
          format,
          { heads: 4, kvHeads: 2, size, capacity: 320 },
          { runs: long, quick: false, options },
        );
    add(
      "sdpa",
      "rounds",
      format,
      { heads: 4, kvHeads: 2, size: 32, capacity: 96 },
      { runs, quick: format === bf16, options: { rounds: true } },
    );
  }
  // 0 * NaN: what a query does not see must not reach it.
  for (const format of [f32, f16, bf16, float8_e4m3, int8, VARIANTS.int4_kv])
    for (const size of [32, 128]) {
      const shape = { heads: 4, kvHeads: 2, size, capacity: 320 };
      const addOdd = (variant: string, tokens: readonly Symbols[], quick: boolean, bf16 = false) =>
        add("sdpa", `${variant}_h${size}`, format, shape, { runs: tokens, quick, options: { odd: true, bf16 } });
      const long = [
        { T: 140, P: 0 },
        { T: 140, P: 170 },
      ];
      const few = [
        { T: 1, P: 300 },
        { T: 5, P: 66 },
      ];
      addOdd("odd", few, size === 128);
      addOdd("odd_long", long, false);
      addOdd("odd_long_bf16", long, false, true);
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
  /** Of what the rest selects, every `count`th program from the `index`th on (from 1), so that several processes share a table. */
  readonly shard?: { readonly index: number; readonly count: number };
}

/**
 * The programs of a table that a selection asks for, with only the runs it asks for.
 * Throws `argument/unknown-name` for an id that the table does not have.
 */
export function selectCases(
  table: readonly CaseProgram[],
  { quick, formats, ops, ids, shard }: Selection,
): CaseProgram[] {
  for (const id of ids ?? []) {
    if (table.some((program) => program.id === id || program.runs.some((run) => run.id === id))) continue;
    const nearest = table
      .flatMap(({ runs }) => runs.map((run) => run.id))
      .filter((name) => name.startsWith(id.split("/")[0] as string))
      .slice(0, 5);
    throw new FewbitError("argument/unknown-name", { kind: "case", name: id, nearest });
  }
  const selected = table.flatMap((program) => {
    if (formats !== undefined && !formats.includes(program.format)) return [];
    if (ops !== undefined && !ops.includes(program.op)) return [];
    const runs = program.runs.filter(
      (run) => (!quick || run.quick) && (ids === undefined || ids.includes(program.id) || ids.includes(run.id)),
    );
    return runs.length === 0 ? [] : [{ ...program, runs }];
  });
  return shard === undefined ? selected : selected.filter((_, i) => i % shard.count === shard.index - 1);
}
