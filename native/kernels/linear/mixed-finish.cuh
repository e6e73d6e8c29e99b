// From the sums of a mixed kernel's blocks to outputs.
#pragma once
#include "mixed-params.cuh"
#include "sdpa/hopper.cuh"
#include "skinny-finish.cuh"
#include "skinny-ring.cuh"

namespace fewbit::linear {

#ifdef FEWBIT_HOPPER

/** Where a place of shared memory is in a block of the cluster, and a float32 there. */
__device__ __forceinline__ uint32_t addressOfBlock(uint32_t at, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
__device__ __forceinline__ float loadOfBlock(uint32_t at) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
}

/** Meets all threads of the cluster, which is the block where there is no other. `Stored`: what this thread stored is seen by them. */
template <bool Stored>
__device__ __forceinline__ void clusterMeet() {
  if constexpr (Stored) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/** Adds what the blocks of a cluster found, and finishes: each block its share of the outputs, each thread those of one row of W. */
template <bool Integer>
__device__ __forceinline__ void finishMixed(const MixedParams& p, const float* sheet, int tile, int m0, int rows, int rank) {
  constexpr int together = 8;
  const int perTile = kMixedRows / p.parts;
  const int o = threadIdx.x % perTile, n = tile * perTile + o;
  const int step = kMixedWorkers * 32 / perTile * p.slices;
  const int row = p.parts == 2 ? o / 8 * 16 + o % 8 : o;
  int m = threadIdx.x / perTile * p.slices + rank;
  if (n >= p.n || m >= rows) return;
  // What does not change from one row of x to the next.
  Finish fixed;
  fixed.fetch(p, m0 + m, n);
  float factor[2] = {1.0f, 1.0f};
#pragma unroll
  for (int part = 0; part < 2; part++) {
    if (part >= p.parts) continue;
    factor[part] = fixed.outer[part].value(p.weights[part].outer);
    if (p.promote != Promote::scaled && !p.fold) factor[part] *= fixed.inner[part].value(p.weights[part].scale);
  }
  const Epilogue& e = p.epilogue;
#pragma unroll 1
  for (; m < rows; m += together * step) {
    float ofX[together], residual[together], y[2][together];
#pragma unroll
    for (int i = 0; i < together; i++) {
      const int of = m0 + min(m + i * step, rows - 1);
      ofX[i] = __ldcg(p.factors + of);
      residual[i] = e.residual.at != nullptr ? e.residual(of, n) : 0.0f;
      y[0][i] = y[1][i] = 0.0f;
    }
    const int last = (rows - 1 - m) / step;  // what is beyond it reads it again
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (part >= p.parts) continue;
      // The smallest parts of x first.
#pragma unroll 1
      for (int piece = p.parts3 - 1; piece >= 0; piece--) {
        const uint32_t at = sharedAddress(sheet + (piece * p.columnsOfX + m) * kMixedPitch + row + part * 8);
        float sum[together] = {};
#pragma unroll 1
        for (int slice = 0; slice < p.slices; slice++) {
          const uint32_t there = addressOfBlock(at, slice);
#pragma unroll
          for (int i = 0; i < together; i++) {
            const float found = loadOfBlock(there + min(i, last) * step * (kMixedPitch * 4));
            sum[i] = Integer ? __int_as_float(__float_as_int(sum[i]) + __float_as_int(found)) : sum[i] + found;
          }
        }
#pragma unroll
        for (int i = 0; i < together; i++) y[part][i] += Integer ? static_cast<float>(__float_as_int(sum[i])) : sum[i];
      }
    }
#pragma unroll
    for (int i = 0; i < together; i++) {
      if (i > last) break;
      float first = y[0][i] * (ofX[i] * factor[0]) + fixed.bias[0] + residual[i];
      if (e.fn != Activation::none) first = activateCall(e.fn, first);
      if (p.parts == 2) first *= y[1][i] * (ofX[i] * factor[1]) + fixed.bias[1];
      e.store(m0 + m + i * step, n, first);
    }
  }
}

#endif

}  // namespace fewbit::linear
