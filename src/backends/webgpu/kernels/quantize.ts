import { FewbitError } from "../../../core/errors.js";
import { codecBits, extentOf, type Format, formatKey } from "../../../formats/format.js";
import { requireBlocks } from "../../../quantize/quantize.js";
import { storedLayout } from "../../stored-layout.js";
import { FLAT_WORKGROUP, flatGrid } from "../kernel.js";
import { type RuleOptions, ruleObstacle, ruleText } from "../wgsl/rules.js";
import {
  head,
  type Job,
  type KernelPass,
  type KernelText,
  loadScratch,
  loadX,
  type PassBinding,
  reduction,
  STORE_EXTREMES,
  THREADS,
} from "./reduce.js";
import { scalerPasses } from "./scalers.js";

export type { KernelPass, KernelText, PassBinding } from "./reduce.js";

export interface QuantizeKernelOptions extends RuleOptions {
  /** Parameters of blocks that are read from bindings of these names, float32 [blocks], instead of chosen. */
  readonly given?: Job["given"];
  /** The rows of this run, a WGSL expression of type u32; `params` is `struct Params { v: array<vec4<u32>, 4> }`. */
  readonly rowsExpression?: string;
  /** Where x lies in the rows of a wider matrix: floats from row to row, and the first column. Default k and 0. */
  readonly x?: { readonly stride: number; readonly column: number };
}

/** Why no kernel here quantizes to a format, or null. */
export function quantizeObstacle(format: Format, given = false): string | null {
  const { rule } = format;
  const [first, second, ...more] = format.scales;
  const obstacle = ruleObstacle(format, given);
  if (obstacle !== null) return obstacle;
  if (first === undefined) return rule.kind === "cast" ? null : `rule ${rule.kind} needs a scale`;
  if (second === undefined) return null;
  const made = { nvfp4: "allxall", mslk_int4: "1xall" }[rule.kind as string];
  if (second.block.join("x") === made && more.length === 0 && codecBits(second.codec) === 32) return null;
  return `rule ${rule.kind} does not make second scales of ${codecBits(second.codec)} bits per ${second.block.join("x")}`;
}

/**
 * Kernels that quantize x, float32 [rows, k] with values of `options.dtype`, as `format.rule` says, into one buffer in
 * `storedLayout(format, [capacityRows, k])`: codes, scales and zero points are bit for bit those of `quantizeTensor`, and the
 * padding of each row of codes is zero. They work within WebGPU's default limits.
 * Throws `format/block` when a block does not divide k and `quantize/unsupported` where `quantizeObstacle` is not null.
 */
export function quantizeKernel(
  format: Format,
  k: number,
  capacityRows: number,
  options: QuantizeKernelOptions = {},
): KernelText {
  const { given = [] } = options;
  const reason = quantizeObstacle(format, given.length > 0);
  if (reason !== null) throw new FewbitError("quantize/unsupported", { config: formatKey(format), reason });
  requireBlocks(format, [capacityRows, k]);
  const block = format.scales[0]?.block ?? ([1, "all"] as const);
  const width = Math.max(extentOf(block[1], k), 1);
  const job: Job = {
    layout: storedLayout(format, [capacityRows, k]),
    rule: ruleText(format, options, given.length > 0),
    given,
    rows: `(${options.rowsExpression ?? "params.v[0].x"})`,
    x: options.x ?? { stride: k, column: 0 },
    bits: codecBits(format.element),
    width,
    columns: k / width,
    height: block[0] === "all" ? null : block[0],
  };
  if (format.scales.length === 0) return { passes: [encodePass(job)], scratchWords: 0 };
  // Where blocks lie in one row and start on whole words, the threads that choose for a block can also encode it.
  const fused = job.height === 1 && (job.columns === 1 || (width * job.bits) % 32 === 0);
  const outer = outerPasses(job);
  const extremes = fused ? (outer.length > 1 ? 2 * capacityRows : 0) : parametersAt(job);
  return {
    passes: [
      ...outer,
      ...(fused
        ? [fusedPass(job)]
        : [...(given.length > 0 ? [] : [extremesPass(job)]), choosePass(job), encodePass(job)]),
      ...scalerPasses(job, blockTotal(job), (rows) => blockCount(job, rows)),
    ],
    scratchWords: Math.max(extremes + (fused ? 0 : 2 * blockCount(job, capacityRows)), job.rule.scalers ? 4 : 0),
  };
}

function blockCount({ columns, height }: Job, rows: number): number {
  return (height === null ? Math.min(rows, 1) : Math.ceil(rows / height)) * columns;
}

/** The same in WGSL. */
function blockTotal({ columns, height, rows }: Job): string {
  return `${height === null ? `min(${rows}, 1u)` : `((${rows} + ${height - 1}u) / ${height}u)`} * ${columns}u`;
}

/** The second scale level, which the blocks need before they are looked at. */
function outerPasses(job: Job): KernelPass[] {
  const { outer } = job.rule;
  if (outer === undefined) return [];
  const k = job.layout.shape[1];
  const at = `${job.layout.scales[1]}u`;
  const row = { lanes: THREADS, chunk: 1, total: job.rows, count: (rows: number) => rows };
  const load = loadX("block", "0u", k, THREADS, false);
  if (outer.per === "row") {
    const finish = `out[${at} + block] = outer_code_of(lo, hi);`;
    return [reduction(job, { ...row, bindings: ["params", "x", "out"], load, finish })];
  }
  const tensor = { lanes: THREADS, chunk: 1, total: "1u", count: (rows: number) => Math.min(rows, 1) };
  const finish = `out[${at}] = outer_code_of(lo, hi);`;
  if (!outer.dynamic) return [reduction(job, { ...tensor, bindings: ["params", "out"], load: "", finish })];
  return [
    reduction(job, { ...row, bindings: ["params", "x", "scratch"], load, finish: STORE_EXTREMES }),
    reduction(job, {
      ...tensor,
      bindings: ["params", "out", "scratch"],
      load: loadScratch(job.rows, "i", THREADS),
      finish,
    }),
  ];
}

/** The runs of every row that lie in one block: four elements to a thread, where that fits. */
function rowRuns(job: Job) {
  const lanes = Math.min(2 ** Math.floor(Math.log2(Math.max(job.width / 4, 1))), THREADS);
  const start = `(block % ${job.columns}u) * ${job.width}u`;
  return {
    lanes,
    total: `${job.rows} * ${job.columns}u`,
    count: (rows: number) => rows * job.columns,
    load:
      job.given.length > 0
        ? ""
        : loadX(`block / ${job.columns}u`, start, job.width, lanes, job.rule.outer?.prepares === true),
  };
}

/** The first two arguments of `choose` for run `block`. */
function chooseFrom({ given }: Job): string {
  if (given.length === 0) return "lo, hi";
  return `given_scale[block], ${given.includes("given_zero") ? "given_zero[block]" : "0u"}`;
}

/** Blocks whose codes of scales and zero points fill whole words. */
function blocksPerWord({ layout }: Job): number {
  const { scales, zero } = layout.format;
  const bits = scales.slice(0, 1).map((level) => codecBits(level.codec));
  if (zero.domain !== "none") bits.push(codecBits(zero.codec));
  return 32 / Math.min(...bits);
}

/** One pass for everything: choose for a chunk of blocks, then encode them. */
function fusedPass(job: Job): KernelPass {
  const { layout, columns, width, bits } = job;
  const runs = rowRuns(job);
  const chunk = Math.max(THREADS / runs.lanes, blocksPerWord(job));
  const words = columns === 1 ? layout.rowStride : (width * bits) / 32;
  const padding = layout.rowStride - columns * words;
  return reduction(job, {
    ...runs,
    bindings: ["params", "x", ...job.given, "out"],
    chunk,
    functions: `var<workgroup> chosen: array<Chosen, ${chunk}>;
fn parameters(row: u32, column: u32, slot: u32) -> vec2<u32> { return vec2<u32>(chosen[slot].a, chosen[slot].b); }
${wordFunction(job)}`,
    finish: `chosen[slot] = choose(${chooseFrom(job)}, outer_at(block / ${columns}u));`,
    after: `${storeScales(job, chunk)}
  for (var i = thread; i < ${chunk * words}u && first + i / ${words}u < total; i += ${THREADS}u) {
    let slot = i / ${words}u;
    let row = (first + slot) / ${columns}u;
    let word = ((first + slot) % ${columns}u) * ${words}u + i % ${words}u;
    out[row * ${layout.rowStride}u + word] = word_of(row, word, slot);
  }
  ${
    padding === 0
      ? ""
      : `for (var slot = thread; slot < ${chunk}u && first + slot < total; slot += ${THREADS}u) {
    let row = (first + slot) / ${columns}u;
    if ((first + slot) % ${columns}u == 0u) {
      for (var i = 1u; i <= ${padding}u; i++) { out[(row + 1u) * ${layout.rowStride}u - i] = 0u; }
    }
  }`
  }`,
  });
}

/** `word_of(row, word, slot)`: one word of codes; a code that straddles two words is made for both. */
export function wordFunction({ bits, layout, rule }: Job): string {
  const k = layout.shape[1];
  const per = 32 / bits;
  const loop = Number.isInteger(per)
    ? `for (var i = 0u; i < ${per}u; i++) {
    let column = word * ${per}u + i;
    if (column < ${k}u) { packed |= code_at(row, column, slot, outer) << (i * ${bits}u); }
  }`
    : `for (var column = word * 32u / ${bits}u; column * ${bits}u < word * 32u + 32u && column < ${k}u; column++) {
    let code = code_at(row, column, slot, outer);
    let bit = i32(column * ${bits}u) - i32(word * 32u);
    packed |= select(code << u32(bit), code >> u32(-bit), bit < 0);
  }`;
  const value = rule.outer?.prepares === true ? "prepare(x_at(row, column), outer)" : "x_at(row, column)";
  return `fn code_at(row: u32, column: u32, slot: u32, outer: u32) -> u32 {
  let p = parameters(row, column, slot);
  return code_of(${value}, p.x, p.y);
}
fn word_of(row: u32, word: u32, slot: u32) -> u32 {
  let outer = ${rule.outer?.prepares === true ? "outer_at(row)" : "0u"};
  var packed = 0u;
  ${loop}
  return packed;
}`;
}

/** Writes the words of scales and zero points that a workgroup's blocks fill, from `chosen`. */
export function storeScales({ layout }: Job, chunk: number): string {
  const { scales, zero } = layout.format;
  const store = (field: "scale" | "zero", bits: number, offset: number): string => {
    const per = 32 / bits;
    return `for (var i = thread; i < ${chunk / per}u && first + i * ${per}u < total; i += ${THREADS}u) {
    var packed = 0u;
    for (var j = 0u; j < ${per}u; j++) {
      let slot = i * ${per}u + j;
      if (first + slot < total) { packed |= chosen[slot].${field} << (j * ${bits % 32}u); }
    }
    out[${offset}u + first / ${per}u + i] = packed;
  }
  `;
  };
  const first = scales[0];
  const scale = first === undefined ? "" : store("scale", codecBits(first.codec), layout.scales[0] as number);
  return zero.domain === "none" ? scale : `${scale}${store("zero", codecBits(zero.codec), layout.zero)}`;
}

/** The first of three passes: the extremes of each block's part of each row, to scratch. */
function extremesPass(job: Job): KernelPass {
  const runs = rowRuns(job);
  const bindings: PassBinding[] = job.rule.outer?.prepares
    ? ["params", "x", "out", "scratch"]
    : ["params", "x", "scratch"];
  return reduction(job, { ...runs, bindings, chunk: THREADS / runs.lanes, finish: STORE_EXTREMES });
}

/** The second: scales and zero points, and to scratch what encoding needs. */
function choosePass(job: Job): KernelPass {
  const { columns, height, rows } = job;
  const lanes = 64;
  const chunk = Math.max(THREADS / lanes, blocksPerWord(job));
  const top = height === null ? "0u" : `(block / ${columns}u * ${height}u)`;
  const tall = height === null ? rows : `min(${height}u, ${rows} - ${top})`;
  return reduction(job, {
    bindings: ["params", ...job.given, "out", "scratch"],
    lanes,
    chunk,
    functions: `var<workgroup> chosen: array<Chosen, ${chunk}>;`,
    total: blockTotal(job),
    count: (n) => blockCount(job, n),
    load: job.given.length > 0 ? "" : loadScratch(tall, `(${top} + i) * ${columns}u + block % ${columns}u`, lanes),
    finish: `chosen[slot] = choose(${chooseFrom(job)}, outer_at(${top}));
      scratch[${parametersAt(job)}u + 2u * block] = chosen[slot].a;
      scratch[${parametersAt(job)}u + 2u * block + 1u] = chosen[slot].b;`,
    after: storeScales(job, chunk),
  });
}

/** Where the parameters of blocks lie in scratch: after the extremes. */
function parametersAt({ layout, columns }: Job): number {
  return 2 * layout.shape[0] * columns;
}

/** The third: codes, a word to a thread. Also all there is to do for a format without scales. */
function encodePass(job: Job): KernelPass {
  const { layout, columns, width, height } = job;
  const scaled = layout.format.scales.length > 0;
  const bindings: PassBinding[] = scaled ? ["params", "x", "out", "scratch"] : ["params", "x", "out"];
  const block = `${height === null ? "0u" : `row / ${height}u * ${columns}u`} + column / ${width}u`;
  const wgsl = `${head(job, bindings)}
fn parameters(row: u32, column: u32, slot: u32) -> vec2<u32> {
  ${
    scaled
      ? `let at = ${parametersAt(job)}u + 2u * (${block});
  return vec2<u32>(scratch[at], scratch[at + 1u]);`
      : "return vec2<u32>(0u);"
  }
}
${wordFunction(job)}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let at = ${FLAT_WORKGROUP} * ${THREADS}u + thread;
  if (at < ${job.rows} * ${layout.rowStride}u) { out[at] = word_of(at / ${layout.rowStride}u, at % ${layout.rowStride}u, 0u); }
}
`;
  const workgroups = (rows: number) => flatGrid(Math.ceil((rows * layout.rowStride) / THREADS));
  return { wgsl, entryPoint: "main", workgroups, bindings };
}
