// What the workers of decoding share: query rows, and instructions.
#pragma once
#include "decode_shape.cuh"

namespace fewbit::sdpa {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/** Loads `Words` words of shared memory, 4, 2 or 1. */
template <int Words>
__device__ __forceinline__ void words(uint32_t* to, const uint8_t* from) {
  if constexpr (Words == 4) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  else if constexpr (Words == 2) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
  else *to = *reinterpret_cast<const uint32_t*>(from);
}

__device__ __forceinline__ bool isFinite(float x) { return fabsf(x) < INFINITY; }

/** Row `row` of the query rows of a KV head; rows past the last are the last. */
struct QueryRow {
  int from, to;  // the keys that it sees but for its mask
  const float* mask;
  const Params& p;
  int size;
  int64_t at;

  __device__ __forceinline__ QueryRow(const Params& p, const Seen& seen, int plane, int row, int size) : p(p), size(size) {
    row = min(row, seen.tokens * p.group - 1);
    const int b = plane / p.kvHeads, token = row / p.group, head = plane % p.kvHeads * p.group + row % p.group;
    at = p.tokenMajor ? token * p.queryStride + p.queryColumn + static_cast<int64_t>(head) * size
                      : ((static_cast<int64_t>(b) * p.heads + head) * seen.tokens + token) * size;
    from = seen.from(token);
    to = seen.to(token);
    const int64_t plain = static_cast<int64_t>(p.maskBatch ? b : 0) * (p.maskHeads ? p.heads : 1) + (p.maskHeads ? head : 0);
    mask = p.mask == nullptr ? nullptr : p.mask + (plain * seen.tokens + token) * seen.capacity;
  }

  /** N neighbouring elements, 4 or 2. */
  template <int N>
  __device__ __forceinline__ void load(float* x, int element) const {
    const int64_t d = at + element;
    if (p.queryBits == 16) {
      uint32_t pairs[N / 2];
      words<N / 2>(pairs, static_cast<const uint8_t*>(p.q) + d * 2);
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = i % 2 == 0 ? lowBf16(pairs[i / 2]) : highBf16(pairs[i / 2]);
    } else if (p.queryBits == 8) {
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = fromE4m3(static_cast<const uint8_t*>(p.q)[d + i]) * p.queryScales[at / size];
    } else {
      words<N>(reinterpret_cast<uint32_t*>(x), static_cast<const uint8_t*>(p.q) + d * 4);
    }
  }
};

__device__ __forceinline__ float softCapped(float x, float cap) {
  const float a = fminf(fabsf(x) / cap, 15.f);
  return copysignf(cap * (1.f - 2.f / (expf(2.f * a) + 1.f)), x);
}
/** A score with its mask's entry added. */
__device__ __forceinline__ float maskedScore(float x, float added) { return added <= -0x1p100f ? -INFINITY : x + added; }
/** A probability as e4m3 after multiplication with `by`. */
__device__ __forceinline__ float rounded(float x, float by) {
  return fromE4m3(__nv_cvt_float_to_fp8(x * by, __NV_SATFINITE, __NV_E4M3)) / by;
}

}  // namespace
}  // namespace fewbit::sdpa
