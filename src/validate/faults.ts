import { type HostTensor, isDense } from "../ir/tensor.js";
import type { Device } from "../runtime/device.js";
import { type CaseProgram, selectCases } from "./cases.js";
import { LAYER_FAULTS } from "./faults-layer.js";
import { makeOracle, runCases } from "./run.js";

/** A deliberate mistake in a kernel or in what is uploaded, and the cases that must notice. */
export interface Fault {
  readonly id: string;
  /** Ids of the programs of its family. */
  readonly programs: readonly string[];
  /** Kernels that it concerns, by a part of their id. */
  readonly kernel?: string;
  /** Replaces text of their shaders; with `g` everywhere, else the first match. */
  readonly rewrite?: readonly [RegExp, string];
  /** Changes host tensors before they are uploaded. */
  readonly tamper?: Tamper;
}

export type Tamper = (name: string, tensor: HostTensor) => HostTensor;
const at = (words: Uint32Array, index: number): number => words[index] as number;

const TINYGEMM = "linear/int4_tinygemm[1x32:bf16;zfloat:bf16]/bias";
const INT8 = "linear/int8[1xall:f32]/n37_k256";
const DYNAMIC = "linear/int8[1xall:f32]*int8[1xall:f32]/gated";
const ASYMMETRIC = "linear/int8_asymmetric[1xall:f32;zint:int8]*int8[1xall:f32]/residual";
const RAGGED = "linear/f32/k36";
const ODD = "linear/int8[1xall:f32]/k37_odd";
const MX6 = "linear/mxfp6_e3m2[1x32:e8m0]/n37_k256";
const NVFP4 = "linear/nvfp4[1x16:e4m3;allxall:f32]/n37_k256";
const CODEBOOK = "linear/codebook4_1x2[1xall:f32]/n37_k256";
const RESIDUAL = "linear/bf16/residual";
const GATED = "linear/bf16/gated";
const ROPE = "rope/f32/qkv_cache";
const SDPA = "sdpa/f32/causal";
const EMBEDDING = "embedding/int4_tinygemm[1x64:bf16;zfloat:bf16]/table";
const SAMPLE = "sample/f32/both";

type Part = "qdata" | "scales" | "zero";

/** Word `index` of a part of the stored tensor `wanted`, made of all its words; other tensors are left alone. */
const word =
  (wanted: string, part: Part, index: number, change: (words: Uint32Array) => number): Tamper =>
  (name, tensor) => {
    if (name !== wanted || isDense(tensor)) return tensor;
    const words = (part === "scales" ? tensor.scales[0] : tensor[part]) as Uint32Array;
    const copy = words.slice();
    copy[index] = change(words);
    return { ...tensor, [part]: part === "scales" ? [copy, ...tensor.scales.slice(1)] : copy };
  };

/** SEEDED KERNEL FAULTS. Each must change what it aims at, compile, and be caught by its programs. */
export const FAULTS: readonly Fault[] = [
  ...LAYER_FAULTS,
  {
    id: "gemv: a term of every chunk dropped",
    programs: [TINYGEMM],
    kernel: "gemv",
    rewrite: [/ \+ dot\(\w+_7, \w+_7\)/, ""],
  },
  {
    id: "gemv: the scale of the next block",
    programs: [TINYGEMM],
    kernel: "gemv",
    rewrite: [/wr0_s0\((\w+), c \* 32u \+ 0u\)/, "wr0_s0($1, (c ^ 1u) * 32u)"],
  },
  {
    id: "gemv: nibbles of a byte swapped",
    programs: [TINYGEMM],
    kernel: "gemv",
    rewrite: [/(\w+\.x), \(\1 >> 4u\)/, "($1 >> 4u), $1"],
  },
  { id: "gemv: the zero point dropped", programs: [TINYGEMM], kernel: "gemv", rewrite: [/\((\w+) \+ \1_z\)/, "($1)"] },
  { id: "gemv: the middle code is off by one", programs: [TINYGEMM], kernel: "gemv", rewrite: [/- 8\.0;/, "- 7.0;"] },
  { id: "gemv: the bias is missing", programs: [TINYGEMM], kernel: "gemv", rewrite: [/ \+ bias0\[[^\]]*\]/, ""] },
  {
    id: "gemv: one partial sum is not added",
    programs: [INT8],
    kernel: "gemv",
    rewrite: [/i < (\d+)u; i\+\+/, "i < $1u - 1u; i++"],
  },
  {
    id: "gemv: the last feature is not stored",
    programs: [INT8],
    kernel: "gemv",
    rewrite: [/if \(index \+ 0u < 37u\)/, "if (index + 0u < 36u)"],
  },
  {
    id: "gemv: signed bytes read as unsigned",
    programs: [INT8],
    kernel: "gemv",
    rewrite: [/0x4b000080u\)\) - 8388736\.0/g, "0x4b000000u)) - 8388608.0"],
  },
  { id: "gemv: the K tail is one vector short", programs: [RAGGED], kernel: "gemv", rewrite: [/ < 9u\)/g, " < 8u)"] },
  {
    id: "gemv: the activation's scale is missing",
    programs: [DYNAMIC],
    kernel: "gemv",
    rewrite: [/ \* \(xr_s0\([^)]*\)\)/, ""],
  },
  {
    id: "gemv: gate and up swapped",
    programs: [DYNAMIC],
    kernel: "gemv",
    rewrite: [/silu\(y0\) \* y1/, "silu(y1) * y0"],
  },
  {
    id: "gemv: an integer product left out",
    programs: [DYNAMIC],
    kernel: "gemv",
    rewrite: [/ \+ dot4I8Packed\(\w+, \w+\)/, ""],
  },
  {
    id: "gemv: the activation's zero point dropped",
    programs: [ASYMMETRIC],
    rewrite: [/ - i32\(xr_z\([^)]*\)\)/g, ""],
  },
  {
    id: "scale block offset of the next row",
    programs: [TINYGEMM],
    rewrite: [/let index = row \* 3u \+ k \/ 32u;/, "let index = (row + 1u) * 3u + k / 32u;"],
  },
  { id: "half a scale's code", programs: [TINYGEMM], rewrite: [/\) & 65535u/, ") & 65280u"] },
  {
    id: "tile: the last vector of a chunk left out",
    programs: [TINYGEMM],
    kernel: "tile",
    rewrite: [/v < 8u; v\+\+/, "v < 7u; v++"],
  },
  {
    id: "tile: a stale row of x",
    programs: [TINYGEMM],
    kernel: "tile",
    rewrite: [/\(tm \* 4u \+ 3u\)/, "(tm * 4u + 2u)"],
  },
  {
    id: "tile: the last feature is not stored",
    programs: [TINYGEMM],
    kernel: "tile",
    rewrite: [/f <= feature_last/, "f < feature_last"],
  },
  {
    id: "tile: the last row is not stored",
    programs: [TINYGEMM],
    kernel: "tile",
    rewrite: [/m >= rows\)/, "m + 1u >= rows)"],
  },
  {
    id: "tile: rows past the last are stored",
    programs: [TINYGEMM],
    kernel: "tile",
    rewrite: [/if \(m >= rows\) \{ break; \}/, ""],
  },
  { id: "tile: the first chunk only", programs: [INT8], kernel: "tile", rewrite: [/c < 8u; c\+\+/, "c < 7u; c++"] },
  { id: "the residual is missing", programs: [RESIDUAL], rewrite: [/y0 \+= residual\[[^\]]*\];/, ""] },
  { id: "the residual of another row", programs: [RESIDUAL], rewrite: [/residual\[(\w+) \*/, "residual[($1 ^ 1u) *"] },
  { id: "relu in the place of silu", programs: [GATED], rewrite: [/silu\(y0\)/, "relu(y0)"] },
  { id: "plain: the K tail is one short", programs: [ODD], rewrite: [/k < 37u/, "k < 36u"] },
  {
    id: "the top bit of a straddling code lost",
    programs: [MX6],
    kernel: "gemv",
    rewrite: [/\) & 63u\), wr0_dec/, ") & 31u), wr0_dec"],
  },
  {
    id: "a block exponent too large by one",
    programs: [MX6],
    rewrite: [/let field = code \+ 0u;/, "let field = code + 1u;"],
  },
  { id: "the second scale level is missing", programs: [NVFP4], kernel: "gemv", rewrite: [/ \* wr0_s1\([^)]*\)/g, ""] },
  {
    id: "lanes of a codebook entry swapped",
    programs: [CODEBOOK],
    rewrite: [/code \* 2u \+ lane/, "code * 2u + (1u - lane)"],
  },
  {
    id: "embedding: the row before",
    programs: [EMBEDDING],
    rewrite: [/let row = id - 0u;/, "let row = max(id, 1u) - 1u;"],
  },
  {
    id: "embedding: the last row cannot be reached",
    programs: [EMBEDDING],
    rewrite: [/clamp\(ids\[t\], 0, 66\)/, "clamp(ids[t], 0, 65)"],
  },
  { id: "rmsnorm: the mean of one element less", programs: ["rmsnorm/f32/h256"], rewrite: [/\/ 256\.0/, "/ 255.0"] },
  {
    id: "rmsnorm: a partial sum is not added",
    programs: ["rmsnorm/f32/h256"],
    rewrite: [/half = 32u; half > 0u/, "half = 32u; half > 1u"],
  },
  {
    id: "rmsnorm: the weight of a neighbour",
    programs: ["rmsnorm/f32/h256"],
    rewrite: [/weight\[k\]/, "weight[k ^ 1u]"],
  },
  {
    id: "rope: the sine's sign",
    programs: [ROPE],
    rewrite: [/select\(turned \^ 0x80000000u, turned,/, "select(turned, turned,"],
  },
  { id: "rope: a stale position", programs: [ROPE], rewrite: [/let angle = \(position \+ t\)/, "let angle = (t)"] },
  {
    id: "kv_write: a stale cache position",
    programs: [ROPE],
    rewrite: [/key_row\(0u, head, position \+ t\)/, "key_row(0u, head, position + t + 1u)"],
  },
  {
    id: "kv_write: keys in the place of another head's",
    programs: [ROPE],
    rewrite: [/let row = key_row\(0u, head,/, "let row = key_row(0u, head ^ 1u,"],
  },
  { id: "sdpa: the mask lets one key more through", programs: [SDPA], rewrite: [/j <= p\)/, "j <= p + 1u)"] },
  {
    id: "sdpa: the last key is not seen",
    programs: [SDPA],
    rewrite: [/min\(p \+ 1u, seen_keys\(\)\)/, "min(p, seen_keys())"],
  },
  { id: "sdpa: the scale of scores is missing", programs: [SDPA], rewrite: [/ \* 0\.1767766922712326/, ""] },
  {
    id: "sdpa: a query head reads another KV head",
    programs: [SDPA],
    rewrite: [/return h \* 2u \+ r % 2u;/, "return (h ^ 1u) * 2u + r % 2u;"],
  },
  { id: "sdpa: earlier blocks are not rescaled", programs: [SDPA], rewrite: [/acc0 \*= factor;/, ""] },
  {
    id: "sample: the temperature is ignored",
    programs: [SAMPLE, "sample/f32/top_p", "sample/f32/top_k"],
    rewrite: [/\(logits\[i\] - top\) \/ temperature/, "(logits[i] - top)"],
  },
  { id: "sample: the step is not counted", programs: [SAMPLE, "sample/f32/plain"], rewrite: [/ \+ settings\[4\]/, ""] },
  {
    id: "sample: the log-probability of the likeliest",
    programs: [SAMPLE, "sample/f32/plain"],
    rewrite: [/logits\[chosen\] - top/, "logits[argmax] - top"],
  },
  { id: "last_row: one row too far", programs: ["last_row/f32/rows"], rewrite: [/ - 1u\)/, ")"] },
  { id: "binary: the wrong operand twice", programs: ["binary/f32/add"], rewrite: [/\+ b\[/, "+ a["] },
  { id: "conv2d: the padding is off by one", programs: ["conv2d/f32/3x3"], rewrite: [/\* 1u\) - 1;/, "* 1u) - 0;"] },
  {
    id: "quantize: one half of the extremes is not looked at",
    programs: ["quantize/int8[1xall:f32]/values"],
    rewrite: [/half = 32u; half > 0u/, "half = 16u; half > 0u"],
  },
  {
    id: "rmsnorm+quantize: the weight of a neighbour",
    programs: ["quantize/int8[1xall:f32]/norm"],
    rewrite: [/weight\[column\]/, "weight[column ^ 1u]"],
  },
  {
    id: "rmsnorm+quantize: a partial sum is not added",
    programs: ["quantize/int8[1xall:f32]/norm"],
    rewrite: [/partial\[thread\] \+= partial/, "partial[thread] = partial"],
  },
  {
    id: "host: the bytes of a word rotated",
    programs: [INT8],
    tamper: word("y.weight", "qdata", 9, (w) => ((at(w, 9) << 8) | (at(w, 9) >>> 24)) >>> 0),
  },
  { id: "host: one scale doubled", programs: [INT8], tamper: word("y.weight", "scales", 3, (w) => at(w, 3) + 2 ** 23) },
  { id: "host: the scale of another row", programs: [INT8], tamper: word("y.weight", "scales", 0, (w) => at(w, 1)) },
  {
    id: "host: a zero point changed",
    programs: [TINYGEMM],
    tamper: word("y.weight", "zero", 0, (w) => (at(w, 0) ^ 0x800080) >>> 0),
  },
  {
    id: "host: one code changed",
    programs: [INT8],
    tamper: word("y.weight", "qdata", 100, (w) => (at(w, 100) ^ 0x40) >>> 0),
  },
];

export interface FaultOutcome {
  readonly id: string;
  /** Cases that noticed. */
  readonly caughtBy: readonly string[];
  /** Why the fault is none: it changed nothing, or the changed shader does not compile. Null when it was put in. */
  readonly invalid: string | null;
}

/** Puts one fault in and runs its programs. */
export async function runFault(
  device: Device,
  fault: Fault,
  table: readonly CaseProgram[],
  oracle = makeOracle(),
): Promise<FaultOutcome> {
  let changes = 0;
  const { rewrite, tamper, kernel } = fault;
  const caughtBy: string[] = [];
  let invalid: string | null = null;
  const programs = selectCases(table, { ids: fault.programs });
  const run = runCases(device, programs, {
    oracle,
    ...(rewrite && {
      rewrite: (source: string, id: string) => {
        if (kernel !== undefined && !id.includes(kernel)) return source;
        const text = source.replace(rewrite[0], rewrite[1]);
        if (text !== source) changes++;
        return text;
      },
    }),
    ...(tamper && {
      tamper: (name: string, tensor: HostTensor) => {
        const other = tamper(name, tensor);
        if (other !== tensor) changes++;
        return other;
      },
    }),
  });
  for await (const result of run) {
    if (result.status === "failed" && result.kernels.length === 0) invalid = result.reason;
    else if (result.status === "failed") caughtBy.push(result.id);
    else if (result.status === "unsupported") invalid = result.reason;
  }
  return { id: fault.id, caughtBy, invalid: changes === 0 ? "it changed nothing" : invalid };
}
