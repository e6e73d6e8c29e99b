// The rows that are quantized, in registers: the input, or what the fused ops before the quantize make of it.
#pragma once
#include "../general/quantize.cuh"
#include "share.cuh"

namespace fewbit::rows {

/** How the scales of a row lie. */
enum class Grain : int {
  none,    // none, or each of them known
  row,     // one for the row
  blocks,  // one for a power of two of fours, at most a warp's
  tensor,  // one for all rows, chosen before: what encoding needs of it lies in scratch
};

__device__ __forceinline__ float4 relu(float4 x) {
  const auto one = [](float value) { return value < 0.0f ? 0.0f : value; };
  return make_float4(one(x.x), one(x.y), one(x.z), one(x.w));
}

/** What the fused ops before the quantize make of four elements. */
__device__ __forceinline__ float4 activate(const Input& in, float4 x) {
  if (in.fn == Unary::relu) return relu(x);
  return make_float4(apply(in.fn, x.x, in.cap), apply(in.fn, x.y, in.cap), apply(in.fn, x.z, in.cap), apply(in.fn, x.w, in.cap));
}

/** What is left of a row's last sixteen bytes is zeros. */
__device__ __forceinline__ void endRow(u32* out, int k, int rowStride, int bits, const Place& place) {
  std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(out);
#pragma unroll 1
  for (int at = k / 4 * bits / 2 + place.lane; at < rowStride * 4; at += place.lanes) bytes[at] = 0;
}

/** The fours of a row that a thread keeps: the input, or what the fused ops before the quantize make of it. */
template <int FOURS>
struct Values {
  static constexpr bool kEarly = FOURS <= 4;  // weights wait in registers, where there are enough
  float4 weight[FOURS], x[FOURS];

  /** Before the predecessor is complete. */
  __device__ __forceinline__ void prefetch(const float* weights, const Place& place) {
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      if (kEarly && place.holds(i)) weight[i] = loadFour(weights + place.element(i), true);
  }
  __device__ __forceinline__ void norm(const float* weights, const Place& place, bool cluster, int width, float eps, Sums& sums) {
    const float factor = normFactor(x, place, cluster, width, eps, sums);
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      if (place.holds(i)) x[i] = normed(x[i], factor, kEarly ? weight[i] : loadFour(weights + place.element(i), true));
  }
  __device__ __forceinline__ void make(const Input& in, const Place& place, const Share& share, bool aligned, Sums& sums) {
    const i64 row = place.row;
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      x[i] = place.holds(i) ? loadFour(in.a + in.aAt.at(row, place.element(i)), aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (in.kind == InputKind::norm) {
      norm(in.weight, place, share.cluster > 1, in.width, in.eps, sums);
    } else if (in.kind != InputKind::plain) {
#pragma unroll
      for (int i = 0; i < FOURS; i++) {
        if (!place.holds(i)) continue;
        x[i] = activate(in, x[i]);
        if (in.kind == InputKind::gated) x[i] = times(x[i], loadFour(in.b + in.bAt.at(row, place.element(i)), aligned));
      }
    }
  }
};

}  // namespace fewbit::rows
