// How what warps, blocks and splits have of a query row becomes its result. Always in the same order, so that results repeat.
#pragma once
#include "decode_tile.cuh"
#include "fewbit/cluster.cuh"

namespace fewbit::sdpa {
namespace {

/** The rows of a block: `held` of them, from row `first` of KV head `plane`. */
struct Held {
  const Params& p;
  const Seen& seen;
  int plane, first, count;
};

/**
 * Joins the lines of a block's warps into one a row, relative to the greatest of their tops, and puts each two floats of it: `put(r, i, two)`. A
 * group of `Size` / 2 threads makes one at a time.
 */
template <int Size, int Rows, int Warps, class Put>
__device__ __forceinline__ void joinWarps(const float* warps, int held, Put put) {
  constexpr int kAtOnce = Warps * 32 / (Size / 2);
  const int d = threadIdx.x % (Size / 2) * 2;
#pragma unroll
  for (int first = 0; first < Rows; first += kAtOnce) {
    const int r = first + threadIdx.x / (Size / 2);
    if (r >= held) continue;
    float most = -INFINITY, total = 0.f;
    float2 y = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < Warps; n++) most = fmaxf(most, warps[(n * Rows + r) * kLine<Size> + Size]);
#pragma unroll
    for (int n = 0; n < Warps; n++) {
      const float* from = warps + (n * Rows + r) * kLine<Size>;
      // A top of minus infinity goes with a sum of zero, or NaN.
      const float factor = from[Size] == -INFINITY ? from[Size + 1] : exp2Fast((from[Size] - most) * kLog2e);
      const float2 two = *reinterpret_cast<const float2*>(from + d);
      total = fmaf(from[Size + 1], factor, total);
      y.x = fmaf(two.x, factor, y.x);
      y.y = fmaf(two.y, factor, y.y);
    }
    put(r, d, y);
    if (d == 0) put(r, Size, make_float2(most, total));
  }
}

/** Finishes elements d and d + 1 of row r from `count` lines, of which it reads `Batch` at a time; `at(n, i)` are floats i and i + 1 of line n. */
template <int Size, int Batch, class At>
__device__ __forceinline__ void finish(const Held& rows, int r, int d, int count, At at) {
  const Params& p = rows.p;
  const int row = rows.first + r, token = row / p.group;
  const int b = rows.plane / p.kvHeads, head = rows.plane % p.kvHeads * p.group + row % p.group;
  float highest = p.sinks == nullptr ? -INFINITY : p.sinks[head];
  float sum = highest == -INFINITY ? 0.f : 1.f, y[2] = {};
  for (int first = 0; first < count; first += Batch) {
    float2 line[Batch], of[Batch];
#pragma unroll
    for (int i = 0; i < Batch; i++) {
      const int n = min(first + i, count - 1);
      line[i] = at(n, d);
      of[i] = at(n, Size);
    }
    float most = highest;
#pragma unroll
    for (int i = 0; i < Batch; i++) most = fmaxf(most, of[i].x);
    const float shrink = highest == -INFINITY ? sum : exp2Fast((highest - most) * kLog2e);
    sum *= shrink;
    y[0] *= shrink;
    y[1] *= shrink;
    highest = most;
#pragma unroll
    for (int i = 0; i < Batch; i++) {
      if (first + i >= count) continue;
      // A top of minus infinity goes with a sum of zero, or NaN.
      const float factor = of[i].x == -INFINITY ? of[i].y : exp2Fast((of[i].x - highest) * kLog2e);
      sum = fmaf(of[i].y, factor, sum);
      y[0] = fmaf(line[i].x, factor, y[0]);
      y[1] = fmaf(line[i].y, factor, y[1]);
    }
  }
  const float2 result = sum == 0.f ? make_float2(0.f, 0.f) : make_float2(y[0] / sum, y[1] / sum);
  const int64_t to = (p.tokenMajor ? static_cast<int64_t>(token) * p.heads + head
                                   : (static_cast<int64_t>(b) * p.heads + head) * rows.seen.tokens + token) *
                         Size +
                     d;
  if (p.rounds) reinterpret_cast<uint32_t*>(p.out)[to / 2] = packBf16(result.x, result.y);
  else reinterpret_cast<float2*>(p.out)[to / 2] = result;
}

/** Joins a block's warps, and gives row r to block r of its cluster, which finishes it. All blocks of the cluster have begun, and `came` is open. */
template <int Size, int Rows, int Warps>
__device__ __forceinline__ void joinCluster(const Held& rows, const float* warps, float* given, uint64_t* came) {
  joinWarps<Size, Rows, Warps>(warps, rows.count, [&](int r, int i, float2 two) {
    cluster::send(reinterpret_cast<float2*>(given + blockIdx.x * kLine<Size> + i), came, r, two);
  });
  const int r = blockIdx.x;
  if (r >= rows.count || threadIdx.x >= Size / 2) return;
  cluster::await(came);
  finish<Size, kCluster>(rows, r, 2 * threadIdx.x, kCluster, [&](int n, int i) {
    return *reinterpret_cast<const float2*>(given + n * kLine<Size> + i);
  });
}

/**
 * Joins a block's warps, and with the other `used` splits of its rows where there are some: the last block to arrive finishes them. Counts of
 * arrivals go back to zero by themselves.
 */
template <int Size, int Rows, int Warps>
__device__ __forceinline__ void joinSplits(const Held& rows, float* warps, int used) {
  constexpr int kAtOnce = Warps * 32 / (Size / 2);
  const Params& p = rows.p;
  const int d = threadIdx.x % (Size / 2) * 2, at = blockIdx.z * gridDim.y + blockIdx.y;
  float* mine = warps + Warps * Rows * kLine<Size>;
  const auto putTo = [](float* lines) {
    return [lines](int r, int i, float2 two) { *reinterpret_cast<float2*>(lines + r * kLine<Size> + i) = two; };
  };
  if (used == 1) {
    joinWarps<Size, Rows, Warps>(warps, rows.count, putTo(mine));
    __syncthreads();
    for (int r = threadIdx.x / (Size / 2); r < rows.count; r += kAtOnce)
      finish<Size, 1>(rows, r, d, 1, [&](int, int i) { return *reinterpret_cast<const float2*>(mine + r * kLine<Size> + i); });
    return;
  }
  constexpr int kPart = Rows * kLine<Size>;
  float* parts = p.parts + static_cast<int64_t>(at) * gridDim.x * kPart;
  joinWarps<Size, Rows, Warps>(warps, rows.count, putTo(parts + blockIdx.x * kPart));
  __threadfence();
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = atomicInc(p.arrivals + at, used - 1) == static_cast<unsigned>(used - 1);
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int r = threadIdx.x / (Size / 2); r < rows.count; r += kAtOnce) {
    const float* line = parts + r * kLine<Size>;
    finish<Size, 16>(rows, r, d, used, [&](int n, int i) { return __ldcg(reinterpret_cast<const float2*>(line + n * kPart + i)); });
  }
}

}  // namespace
}  // namespace fewbit::sdpa
