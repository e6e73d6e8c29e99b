// x as the columns of bf16 that the mixed kernels multiply, prepared once for all blocks.
#pragma once
#include "mixed-params.cuh"
#include "skinny-x.cuh"

namespace fewbit::linear {

/** A pass's columns of x lie in N rows of 64 elements, each in 128 bytes swizzled as the matrix unit reads them. */
struct ColumnPlace {
  uint8_t* at;
  int swizzle;
  /** `octet` counts along a stage's K: its four pairs are the ones that lane octet % 4 of a quad of the left operand decodes. */
  __device__ __forceinline__ ColumnPlace(uint8_t* stage, int n, int column, int octet)
      : at(stage + (octet / 8 * n + column) * 128 + octet % 4 * 4), swizzle(column % 8 ^ octet / 4 % 2 * 4) {}
  __device__ __forceinline__ void store(const uint4& pairs) const {
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 4; i++) *reinterpret_cast<uint32_t*>(at + (i ^ swizzle) * 16) = words[i];
  }
};

/** Eight elements of a row of x to the place of each of their parts; returns their sum. */
template <class Order, int Width>
__device__ __forceinline__ float storeOctet(const MixedParams& p, const Octet<Order, Width>& octet, uint8_t* stage, int n, int m,
                                            int at, bool stores) {
  uint4 pairs[3];
  const float sum = octet.store(p.x.table, reinterpret_cast<uint8_t*>(pairs), 16, true);
#pragma unroll
  for (int part = 0; part < Octet<Order, Width>::parts; part++)
    if (stores && part < p.parts3) ColumnPlace(stage, n, part * p.columnsOfX + m, at).store(pairs[part]);
  return sum;
}

/**
 * Stores sums of x over what is promoted together, from those of octets: `stage` counts on from pass to pass, `at` is the octet's place
 * in it. Columns of other parts than the first have none, because zero points multiply x once.
 */
__device__ __forceinline__ void storeSums(const MixedParams& p, float sum, int64_t stage, int n, int m, int at, bool stores) {
  const int octets = 4 * p.unit;  // of a promotion, side by side in a warp
  for (int apart = octets / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
  if (p.multipliesSums) {
    const float next = __shfl_down_sync(~0u, sum, octets % 16);
    if (!stores || at != 0) return;
    uint32_t first[3], second[3] = {0, 0, 0};
    splitBf16(sum, first);
    if (octets < 16) splitBf16(next, second);
    uint4* sums = reinterpret_cast<uint4*>(p.sums) + stage * n + m;
    *sums = make_uint4(first[0] | second[0] << 16, first[1] | second[1] << 16, first[2] | second[2] << 16, 0);
    for (int part = 1; part < p.parts3; part++) sums[part * p.columnsOfX] = make_uint4(0, 0, 0, 0);
  } else if (stores && at % octets == 0) {
    float* sums = reinterpret_cast<float*>(p.sums) + (stage * promotionsOf(p) + at / octets) * n + m;
    *sums = sum;
    for (int part = 1; part < p.parts3; part++) sums[part * p.columnsOfX] = 0.0f;
  }
}

/** One thread for eight elements of a row of x; grid (octets of K, rows of x). `n` columns a pass. */
template <class Order>
__global__ void __launch_bounds__(256) prepareColumns(const __grid_constant__ MixedParams p, int n) {
  awaitPredecessor();
  const int row = blockIdx.y;
  if (row >= p.x.rows.at(p.symbols)) return;
  const int octet = blockIdx.x * 256 + threadIdx.x, k = octet * 8;
  if (octet == 0) p.factors[row] = p.separable ? p.x.scaleAt(row, 0) : p.parts3 == 1 ? p.x.outerScale(row) : 1.0f;
  const int stages = mixedStages(p.k), stage = k / kMixedK;
  const int pass = row / p.columnsOfX, m = row % p.columnsOfX;
  const bool stores = stage < stages;
  uint8_t* to = p.columns + (int64_t(pass) * stages + stage) * n * kMixedK * 2;
  const uint8_t* from = p.x.at + row * p.x.stride;
  const int at = octet % (kMixedK / 8);
  const bool aligned = ((reinterpret_cast<uintptr_t>(p.x.at) | p.x.stride) & 15) == 0 && p.k % 8 == 0;
  const bool exact = aligned && p.separable && p.x.zero.codec == ScaleCodec::none;
  float sum;
  if (exact && p.x.bits == 16 && !p.x.half) {
    Octet<Order, 16> values;
    values.clear();
    if (k < p.k) values.load(from + int64_t(k) * 2);
    sum = storeOctet(p, values, to, n, m, at, stores);
  } else if (exact && p.x.bits == 8) {
    Octet<Order, 8> values;
    values.clear();
    if (k < p.k) values.load(from + k);
    sum = storeOctet(p, values, to, n, m, at, stores);
  } else {
    Octet<Order, 32> values;
    values.clear();
    if (aligned && p.x.bits == 0) {
      if (k < p.k) values.load(from + int64_t(k) * 4);
    } else {
      uint32_t bits[8];
#pragma unroll 1
      for (int i = 0; i < 8; i++) {
        float value = 0.0f;
        if (k + i < p.k) {
          value = p.x.code(row, k + i);
          if (!p.separable && p.x.bits != 0) value *= p.parts3 == 1 ? p.x.innerScale(row, k + i) : p.x.scaleAt(row, k + i);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) bits[j] = j == i ? __float_as_uint(value) : bits[j];
      }
      values.raw[0] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
      values.raw[1] = make_uint4(bits[4], bits[5], bits[6], bits[7]);
    }
    sum = storeOctet(p, values, to, n, m, at, stores);
  }
  if (p.floatZero) storeSums(p, sum, int64_t(pass) * stages + stage, n, m, at, stores);
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");  // the unit for copies reads what was stored here
#endif
}

}  // namespace fewbit::linear
