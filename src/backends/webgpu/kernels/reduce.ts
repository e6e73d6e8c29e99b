import type { StoredLayout } from "../../stored-layout.js";
import { FLAT_WORKGROUP, flatGrid } from "../kernel.js";
import { EXACT } from "../wgsl/exact.js";
import type { RuleText } from "../wgsl/rules.js";

/** What a generated pass binds: binding i is `bindings[i]`. `params` is the uniform block, the others are words. */
export type PassBinding = "params" | "x" | "given_scale" | "given_zero" | "out" | "scratch";

const READ_ONLY: readonly PassBinding[] = ["x", "given_scale", "given_zero"];

/** One dispatch of a generated kernel. `workgroups` maps the actual number of rows to a grid. */
export interface KernelPass {
  readonly wgsl: string;
  readonly entryPoint: "main";
  readonly workgroups: (rows: number) => [number, number, number];
  readonly bindings: readonly PassBinding[];
}

/** Passes that run one after another, and the words of scratch memory they share. */
export interface KernelText {
  readonly passes: readonly KernelPass[];
  readonly scratchWords: number;
}

/** What the passes of one quantize kernel share. */
export interface Job {
  readonly layout: StoredLayout;
  readonly rule: RuleText;
  readonly rows: string;
  readonly x: { readonly stride: number; readonly column: number };
  /** Which of a block's parameters are given. */
  readonly given: readonly ("given_scale" | "given_zero")[];
  /** Bits of an element code. */
  readonly bits: number;
  /** Elements of a block along k, blocks along k, and rows of a block (null is all). */
  readonly width: number;
  readonly columns: number;
  readonly height: number | null;
}

/** Threads of a workgroup. */
export const THREADS = 256;

/** A kernel that reduces runs of values to their extremes and does something with each run. */
export interface Reduction {
  readonly bindings: readonly PassBinding[];
  readonly functions?: string;
  /** Threads that share a run: a power of two. */
  readonly lanes: number;
  /** Runs of a workgroup: a multiple of THREADS / lanes. */
  readonly chunk: number;
  /** The number of runs, in WGSL and here. */
  readonly total: string;
  readonly count: (rows: number) => number;
  /** Statements that widen the keys `low` and `high` by the part of run `block` that falls to thread `lane`. */
  readonly load: string;
  /** What one thread does with run `block`, number `slot` of the workgroup, whose extremes are the bits `lo` and `hi`. */
  readonly finish: string;
  /** What all threads do after that; `first` is the workgroup's first run. */
  readonly after?: string;
}

export function reduction(job: Job, spec: Reduction): KernelPass {
  const { lanes, chunk } = spec;
  const slots = THREADS / lanes;
  const wgsl = `${head(job, spec.bindings)}
var<workgroup> lows: array<u32, ${THREADS}>;
var<workgroup> highs: array<u32, ${THREADS}>;
${spec.functions ?? ""}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let first = ${FLAT_WORKGROUP} * ${chunk}u;
  let total = ${spec.total};
  if (first >= total) { return; }
  let lane = thread % ${lanes}u;
  for (var round = 0u; round < ${chunk / slots}u; round++) {
    let slot = round * ${slots}u + thread / ${lanes}u;
    let block = first + slot;
    var low = 0xffffffffu;
    var high = 0u;
    if (block < total) {
      ${spec.load}
    }
    lows[thread] = low;
    highs[thread] = high;
    workgroupBarrier();
    for (var half = ${lanes >> 1}u; half > 0u; half >>= 1u) {
      if (lane < half) {
        lows[thread] = min(lows[thread], lows[thread + half]);
        highs[thread] = max(highs[thread], highs[thread + half]);
      }
      workgroupBarrier();
    }
    if (lane == 0u && block < total) {
      let lo = exact_from_key(lows[thread]);
      let hi = exact_from_key(highs[thread]);
      ${spec.finish}
    }
    workgroupBarrier();
  }
  ${spec.after ?? ""}
}
`;
  const workgroups = (rows: number) => flatGrid(Math.ceil(spec.count(rows) / chunk));
  return { wgsl, entryPoint: "main", workgroups, bindings: spec.bindings };
}

/** Keys of extremes: a NaN is both the least and the greatest of its run. */
export const KEYS = /* wgsl */ `
fn low_key(bits: u32) -> u32 { return select(exact_key(bits), 0u, exact_is_nan(bits)); }
fn high_key(bits: u32) -> u32 { return select(exact_key(bits), 0xffffffffu, exact_is_nan(bits)); }
`;

export function head({ rule, x, layout }: Job, bindings: readonly PassBinding[]): string {
  const { outer } = rule;
  const declarations = bindings.map((name, i) => {
    if (name === "params") return `@group(0) @binding(${i}) var<uniform> params: Params;`;
    return `@group(0) @binding(${i}) var<storage, ${READ_ONLY.includes(name) ? "read" : "read_write"}> ${name}: array<u32>;`;
  });
  const outerValue = (): string => {
    if (outer === undefined || !bindings.includes("out")) return "0u";
    return `outer_value(out[${layout.scales[1]}u${outer.per === "row" ? " + row" : ""}])`;
  };
  return `struct Params { v: array<vec4<u32>, 4> }
${declarations.join("\n")}
${EXACT}${rule.functions}${outer?.functions ?? ""}
${KEYS}fn outer_at(row: u32) -> u32 { return ${outerValue()}; }
${bindings.includes("x") ? `fn x_at(row: u32, column: u32) -> u32 { return x[row * ${x.stride}u + column + ${x.column}u]; }` : ""}`;
}

/** Widens by `length` values of x from column `start` of `row`; `prepare` replaces them first. */
export function loadX(row: string, start: string, length: number, lanes: number, prepare: boolean): string {
  return `let row = ${row};
      ${prepare ? "let outer = outer_at(row);" : ""}
      for (var i = lane; i < ${length}u; i += ${lanes}u) {
        let bits = x_at(row, ${start} + i);
        let value = ${prepare ? "prepare(bits, outer)" : "bits"};
        low = min(low, low_key(value));
        high = max(high, high_key(value));
      }`;
}

/** Widens by extremes in scratch that an earlier pass left: `count` pairs, `index` of `i` says which. */
export function loadScratch(count: string, index: string, lanes: number): string {
  return `for (var i = lane; i < ${count}; i += ${lanes}u) {
        low = min(low, scratch[2u * (${index})]);
        high = max(high, scratch[2u * (${index}) + 1u]);
      }`;
}

/** Leaves a run's extremes in scratch. */
export const STORE_EXTREMES = `scratch[2u * block] = lows[thread];
      scratch[2u * block + 1u] = highs[thread];`;
