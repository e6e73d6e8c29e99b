// A row of x that is made where it is multiplied: rmsnorm of a float32 row, rounded to bf16.
#pragma once
#include "skinny-x.cuh"

namespace fewbit::linear {

/** Asks for what a worker reads of the norm's weights, which are there before x is. */
template <class Codes>
__device__ __forceinline__ void prefetchNorm(const SkinnyParams& p, const Walk<Codes>& walk, int warp) {
  const Octets<Codes> octets(walk, warp);
#pragma unroll 1
  for (int octet = threadIdx.x % 32 * 4; octet < octets.count; octet += 128)
    if (octets.k(octet) < p.k) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm.weight + octets.k(octet)));
}

/**
 * Calls `use(octet, words)` for a worker's octets, all lanes together, with eight bf16 of the normed row (zeros beyond K): rows of at most
 * kMostNormed elements that no slices of K share. `sums` is room for a float of each worker.
 */
template <class Codes, class Use>
__device__ __forceinline__ void normRow(const SkinnyParams& p, float* sums, const Walk<Codes>& walk, int warp, Use use) {
  constexpr int most = kMostNormed / 8 / 32 / kWorkers;  // octets of a lane
  const int lane = threadIdx.x % 32;
  const Octets<Codes> octets(walk, warp);
  const auto holds = [&](int i) { return lane + 32 * i < octets.count && octets.k(lane + 32 * i) < p.k; };
  float4 x[most][2];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < most; i++) {
    x[i][0] = x[i][1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (!holds(i)) continue;
    const float4* at = reinterpret_cast<const float4*>(p.norm.row + octets.k(lane + 32 * i));
    x[i][0] = at[0], x[i][1] = at[1];
  }
#pragma unroll
  for (int i = 0; i < most; i++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      sum += (x[i][h].x * x[i][h].x + x[i][h].y * x[i][h].y) + (x[i][h].z * x[i][h].z + x[i][h].w * x[i][h].w);
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
  if (lane == 0) sums[warp] = sum;
  asm volatile("bar.sync 1, %0;" ::"n"(kWorkers * 32) : "memory");
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWorkers; w++) sum += sums[w];
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(p.k) + p.norm.eps);
#pragma unroll
  for (int i = 0; i < most; i++) {
    const int octet = lane + 32 * i;
    if (octet - lane >= octets.count) break;
    uint32_t words[4] = {0, 0, 0, 0};
    if (holds(i)) {
      const float4* weight = reinterpret_cast<const float4*>(p.norm.weight + octets.k(octet));
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float4 w = __ldg(weight + h);
        const __nv_bfloat162 low = __floats2bfloat162_rn(x[i][h].x * factor * w.x, x[i][h].y * factor * w.y);
        const __nv_bfloat162 high = __floats2bfloat162_rn(x[i][h].z * factor * w.z, x[i][h].w * factor * w.w);
        words[2 * h] = asWord(low), words[2 * h + 1] = asWord(high);
      }
    }
    use(octet, words);
  }
}

}  // namespace fewbit::linear
