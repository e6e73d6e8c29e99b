import { type FloatType, f32Bits } from "../../../core/dtype.js";
import { u } from "../wgsl/codec.js";
import { head, type Job, type KernelPass, reduction, THREADS } from "./reduce.js";

/**
 * Passes that quantize the scales of all blocks, float32 numbers where the scales are stored, in place: `quantizeScalers` of
 * `quantize/nf4.ts` bit for bit (specification 15). `total` is the number of blocks in WGSL, `count` here. None without a rule
 * that asks for it. Scratch word 0 holds the mean.
 */
export function scalerPasses(job: Job, total: string, count: (rows: number) => number): KernelPass[] {
  const { scalers } = job.rule;
  if (scalers === undefined) return [];
  return [meanPass(job, total, scalers.dtype), scalesPass(job, total, count, scalers)];
}

const rounded = (dtype: FloatType, text: string): string => (dtype === "f32" ? text : `exact_${dtype}(${text})`);

/**
 * The definition adds up in float64, block after block, so one thread does the same while the others fetch. A float64 that is
 * not negative is its 53-bit significand in 64 bits, bit 62 leading, and the exponent field that float32 would have.
 */
export const LONG = /* wgsl */ `
struct Long { high: u32, low: u32, exponent: i32 }

fn long_of(bits: u32) -> Long {
  let parts = exact_parts(bits);
  return Long(parts.y << 7u, 0u, bitcast<i32>(parts.x));
}

// The lowest bit left stands for all that was lost.
fn long_shifted(high: u32, low: u32, by: u32) -> vec2<u32> {
  if (by == 0u) { return vec2<u32>(high, low); }
  if (by < 32u) {
    let lost = (low & ((1u << by) - 1u)) != 0u;
    return vec2<u32>(high >> by, (low >> by) | (high << (32u - by)) | select(0u, 1u, lost));
  }
  let rest = min(by - 32u, 31u);
  let lost = low != 0u || (high & ((1u << rest) - 1u)) != 0u;
  return vec2<u32>(0u, (high >> rest) | select(0u, 1u, lost));
}

fn long_add(a: Long, b: Long) -> Long {
  if (a.high == 0u) { return b; }
  if (b.high == 0u) { return a; }
  var large = a;
  var small = b;
  if (a.exponent < b.exponent) {
    large = b;
    small = a;
  }
  let shifted = long_shifted(small.high, small.low, u32(large.exponent - small.exponent));
  var low = large.low + shifted.y;
  var high = large.high + shifted.x + select(0u, 1u, low < shifted.y);
  var exponent = large.exponent;
  if (high >= 0x80000000u) {
    let halved = long_shifted(high, low, 1u);
    high = halved.x;
    low = halved.y;
    exponent += 1;
  }
  // Ten bits too many.
  let tail = low & 1023u;
  low &= ~1023u;
  if (tail > 512u || (tail == 512u && (low & 1024u) != 0u)) {
    low += 1024u;
    high += select(0u, 1u, low == 0u);
  }
  let carried = high >= 0x80000000u;
  return Long(select(high, high >> 1u, carried), low, exponent + select(0, 1, carried));
}

// The float64 quotient, rounded to float32; count is below 2^31.
fn long_mean(sum: Long, count: u32) -> u32 {
  if (sum.high == 0u) { return 0u; }
  var remainder = 0u;
  var high = 0u;
  var low = 0u;
  var taken = 0;
  // 56 quotient bits from the first one on; the sum has 63, and then zeros.
  while (high < 0x800000u) {
    let place = 62 - taken;
    let bit = select(select(0u, (sum.low >> u32(place & 31)) & 1u, place >= 0), (sum.high >> u32((place - 32) & 31)) & 1u, place >= 32);
    taken += 1;
    remainder = (remainder << 1u) | bit;
    let one = remainder >= count;
    remainder -= select(0u, count, one);
    high = (high << 1u) | (low >> 31u);
    low = (low << 1u) | select(0u, 1u, one);
  }
  // To 53 bits (a quotient of such short numbers is never so close below a power of two that it becomes it), then to 27.
  let tail = low & 7u;
  let up = tail > 4u || (tail == 4u && (remainder != 0u || (low & 8u) != 0u));
  low &= ~7u;
  if (up) {
    low += 8u;
    high += select(0u, 1u, low == 0u);
  }
  return exact_pack(0u, sum.exponent + 56 - taken, long_shifted(high, low, 29u).y);
}
`;

function meanPass(job: Job, total: string, dtype: FloatType): KernelPass {
  const bindings = ["params", "out", "scratch"] as const;
  const wgsl = `${head(job, bindings)}${LONG}
var<workgroup> fetched: array<u32, ${THREADS}>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(local_invocation_index) thread: u32) {
  let total = ${total};
  var sum = Long(0u, 0u, 0);
  // Infinity and NaN, the larger of which wins, as no summand is negative.
  var special = 0u;
  for (var first = 0u; first < total; first += ${THREADS}u) {
    if (first + thread < total) { fetched[thread] = out[${job.layout.scales[0]}u + first + thread]; }
    workgroupBarrier();
    if (thread == 0u) {
      for (var i = 0u; i < min(${THREADS}u, total - first); i++) {
        if (fetched[i] < ${u(0x7f800000)}) { sum = long_add(sum, long_of(fetched[i])); } else { special = max(special, fetched[i]); }
      }
    }
    workgroupBarrier();
  }
  if (thread == 0u) { scratch[0] = select(${rounded(dtype, "long_mean(sum, max(total, 1u))")}, special, special != 0u); }
}
`;
  return { wgsl, entryPoint: "main", workgroups: () => [1, 1, 1], bindings };
}

function scalesPass(
  job: Job,
  total: string,
  count: (rows: number) => number,
  scalers: { readonly count: number; readonly dtype: FloatType },
): KernelPass {
  const rnd = (text: string) => rounded(scalers.dtype, text);
  const at = `${job.layout.scales[0]}u`;
  const mine = `var i = lane; i < min(${scalers.count}u, total_blocks - first_block); i += ${THREADS}u`;
  return reduction(job, {
    bindings: ["params", "out", "scratch"],
    lanes: THREADS,
    chunk: 1,
    total: `((${total}) + ${scalers.count - 1}u) / ${scalers.count}u`,
    count: (rows) => Math.ceil(count(rows) / scalers.count),
    functions: `
fn offset_of(scale: u32) -> u32 { return ${rnd("exact_sub(scale, scratch[0])")}; }
fn quantized(scale: u32, factor: u32) -> u32 {
  let code = clamp(exact_to_int(${rnd("exact_mul(offset_of(scale), factor)")}), -128, 127);
  return ${rnd(`exact_add(${rnd("exact_div(bitcast<u32>(f32(code)), factor)")}, scratch[0])`)};
}`,
    load: `let total_blocks = ${total};
      let first_block = block * ${scalers.count}u;
      for (${mine}) { high = max(high, high_key(offset_of(out[${at} + first_block + i]) & 0x7fffffffu)); }`,
    finish: "",
    after: `let total_blocks = ${total};
  let first_block = first * ${scalers.count}u;
  let largest = exact_from_key(highs[0]);
  let factor = ${rnd(`exact_mul(${rnd(`exact_div(${u(f32Bits(0.5))}, largest)`)}, ${u(f32Bits(256))})`)};
  for (${mine}) { out[${at} + first_block + i] = quantized(out[${at} + first_block + i], factor); }`,
  });
}
