// quantize of what most activations are, by little code.
#pragma once
#include "values.cuh"

namespace fewbit::rows {

/**
 * Rows that have one scale each, a float32 chosen here from the largest magnitude, of values as they lie, behind relu or a norm; or behind a norm
 * rows without a scale.
 */
struct RowsJob {
  Extent rows;
  const float *a, *weight;
  Columns aAt;
  u32* out;
  float* scales;
  int k, rowStride;
  float eps;
  bool relu;
  int passes;            // of threads with one four; 2: with a rehearsal
  float floor;           // magnitudes are no less
  float steps, inverse;  // magnitude over scale
  float least;           // scales are no less
  float min, max;        // integer codes
};

/** Whether a job is one of those; the scales are those of the rules amax and affine. */
inline bool fits(const QuantizeJob& job, Grain grain, bool aligned) {
  const Rule& rule = job.rule;
  const InputKind kind = job.in.kind;
  if (!aligned) return false;
  if (grain == Grain::none) return !job.scaled && kind == InputKind::norm;
  if (grain != Grain::row || job.given != nullptr || job.height != 1) return false;
  if (kind != InputKind::plain && kind != InputKind::norm && (kind != InputKind::unary || job.in.fn != Unary::relu)) return false;
  if (rule.dtype != Type::f32 || rule.scale.kind != CodecKind::real || rule.scale.bits != 32 || rule.outerKind != 0) return false;
  if (rule.kind == RuleKind::amax) return rule.guarded && !rule.power && rule.ceiling == bitcast<float>(kInfinity);
  return rule.kind == RuleKind::affine && rule.zeroKind == ZeroKind::none && rule.mapping == Mapping::symmetric && rule.oneSided == 0 &&
         rule.element.bits == 8 && rule.eps >= 0x1p-100f;
}

inline RowsJob rowsJob(const QuantizeJob& job, int passes) {
  const Input& in = job.in;
  const Rule& rule = job.rule;
  const bool amax = rule.kind == RuleKind::amax;
  const float steps = amax ? rule.top : rule.span;
  return {job.rows, in.a, in.weight, in.aAt, job.out, reinterpret_cast<float*>(job.out + job.scaleAt), job.k, job.rowStride, in.eps,
          in.kind == InputKind::unary, passes, amax ? rule.floor : 0.0f, steps, 1.0f / steps, amax ? kLeastNormal : rule.eps,
          rule.min, rule.max};
}

/**
 * `quantize` of those alone. Few rows are a matter of latency, most of it that of code that no multiprocessor has read: where blocks wait for
 * a predecessor anyway, they first go through all of it with ones for input, and store nothing.
 */
template <Coder CODER, int FOURS, bool NORM, bool CLUSTER>
__global__ void __launch_bounds__(kMostThreads) quantizeRows(const __grid_constant__ RowsJob job, const __grid_constant__ Share share,
                                                             const u32* symbols) {
  constexpr bool kScaled = CODER == Coder::e4m3 || CODER == Coder::integers;
  constexpr int kBits = kScaled ? 8 : 16;
  __shared__ u32 found[2][kWarp];  // of each pass
  __shared__ Sums sums[2];
  __shared__ Exchange<kWarp> exchanges[2];
  releaseSuccessor();
  if (CLUSTER) {
    for (int pass = 0; pass < 2; pass++) {
      if (NORM) sums[pass].blocks.open(1);
      if (kScaled) exchanges[pass].open(share.threads / kWarp);
    }
    cluster::arrive();
    cluster::meet();
  }
  const Place place(share, job.k);
  Values<FOURS> values;
  float4(&x)[FOURS] = values.x;
  if (NORM) values.prefetch(job.weight, place);
  const bool inside = place.row < job.rows.at(symbols);
  i64 from = job.aAt.at(place.row, place.element(0));
  u32* out = job.out + place.row * job.rowStride;
  asm volatile("" : "+l"(from));  // it is known before the wait
#pragma unroll 1
  for (int pass = FOURS == 1 ? job.passes : 1; pass > 0; pass--) {
    const bool real = pass == 1;
    if (real) awaitPredecessor();
    if (!inside) continue;
    const float other = real ? 0.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      x[i] = real && place.holds(i) ? loadFour(job.a + from + 4 * i * place.lanes, true) : make_float4(other, other, other, other);
    if (NORM) {
      values.norm(job.weight, place, CLUSTER, job.k, job.eps, sums[pass - 1]);
    } else if (job.relu) {
#pragma unroll
      for (int i = 0; i < FOURS; i++) x[i] = relu(x[i]);
    }
    float scale = 1.0f;
    if (kScaled) {
      u32 most = 0u;
#pragma unroll
      for (int i = 0; i < FOURS; i++) most = ::max(most, largestOf(x[i]));
      const float largest = bitcast<float>(CLUSTER ? clusterMost(most, place, exchanges[pass - 1]) : teamMost(most, place, found[pass - 1]));
      scale = rowScale(largest < job.floor ? job.floor : largest, job.steps, job.inverse, job.least);
      if (real && place.element(0) == 0) job.scales[place.row] = isNan(scale) ? bitcast<float>(kNan) : scale;
    }
    const auto store = [&](auto code) {
#pragma unroll
      for (int i = 0; i < FOURS; i++) {
        const u64 codes = code(x[i]);
        if (real && place.holds(i)) storeCodes(out, place.element(i) / 4, kBits, codes);
      }
    };
    if constexpr (!kScaled) {
      store([&](float4 v) { return halfCodes<CODER>(v); });
    } else if constexpr (CODER == Coder::e4m3) {
      const RowDivisor by(scale);
      store([&](float4 v) { return e4m3Codes(make_float4(by.under(v.x), by.under(v.y), by.under(v.z), by.under(v.w))); });
    } else {
      const float inverse = __frcp_rn(scale);
      const auto code = [&](float value) { return integerCode(value, inverse, 0.0f, job.min, job.max); };
      store([&](float4 v) { return packBytes(code(v.x), code(v.y), code(v.z), code(v.w)); });
    }
    if (real && place.first + share.width >= job.k) endRow(out, job.k, job.rowStride, kBits, place);
  }
}

}  // namespace fewbit::rows
