// How threads share rows of numbers that are loaded once and stay in registers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cluster.cuh"
#include "codes.cuh"
#include "fewbit/overlap.cuh"

namespace fewbit::rows {

/** Most fours of a row that a thread keeps, and threads that share a row. */
constexpr int kMostFours = 8;
constexpr int kMostThreads = 1024;

/** Rows, or pieces of rows, of `width` elements: how many threads share one, and how many fours each of them keeps. */
struct Share {
  int threads;  // of a block
  int lanes;    // that share a piece: a block or a warp
  int fours;    // 1, 4 or 8 of each thread
  int width;    // of a piece
  int pieces;   // of a row
  int cluster = 1;  // pieces of a row whose blocks tell each other what they found

  dim3 grid(i64 rows) const {
    const int teams = threads / lanes;
    return dim3(static_cast<unsigned>((rows + teams - 1) / teams), static_cast<unsigned>(pieces));
  }
};

/**
 * `whole`: the threads of a row need to know of each other: it is one piece of at most 4 * kMostFours * kMostThreads elements, or, with
 * `clusters`, those of a cluster.
 */
inline Share shareRows(i64 rows, int width, bool whole, const Context& context, bool clusters = false) {
  const auto up = [](int a, int b) { return (a + b - 1) / b; };
  if (width <= 512) {
    return {rows >= 4 ? 4 * kWarp : kWarp, kWarp, width <= 4 * kWarp ? 1 : 4, width, 1};
  }
  // Few rows are a matter of latency: many threads. Of many, each thread loads several fours at once.
  const bool many = rows * up(width, 4096) >= 2 * context.sms;
  if (!whole) {
    const int fours = many ? 4 : 1;
    const int threads = std::min(256, up(up(width, 4 * fours), kWarp) * kWarp);
    const int piece = 4 * threads * fours;
    return {threads, threads, fours, piece, up(width, piece)};
  }
  if (clusters && !many && width > 4096 && width % (4 * kCluster) == 0 && width / kCluster <= 4 * kMostThreads && context.overlaps) {
    const int piece = width / kCluster, threads = up(piece, 4 * kWarp) * kWarp;
    return {threads, threads, 1, piece, kCluster, kCluster};
  }
  const int most = many ? 256 : kMostThreads;
  const int fours = !many && up(width, 4) <= most ? 1 : up(width, 16) <= most ? 4 : kMostFours;
  const int threads = up(up(width, 4 * fours), kWarp) * kWarp;
  return {threads, threads, fours, width, 1};
}

/** A thread's place in the team that shares a piece. */
struct Place {
  i64 row;
  int first;  // element of the row with which the piece begins
  int fours;  // of the piece
  int lane, lanes;

  __device__ Place(const Share& share, int width)
      : row(blockIdx.x), first(static_cast<int>(blockIdx.y) * share.width), lane(threadIdx.x), lanes(share.lanes) {
    fours = ::min(share.width, width - first) / 4;
    if (lanes == kWarp) {
      row = row * (blockDim.x / kWarp) + threadIdx.x / kWarp;
      lane = threadIdx.x % kWarp;
    }
  }
  /** Which of the row's fours is the thread's number `i` of the piece. */
  __device__ int four(int i) const { return i * lanes + lane; }
  __device__ bool holds(int i) const { return four(i) < fours; }
  __device__ int element(int i) const { return first + 4 * four(i); }
};

/** What `warp` makes of a warp's values, over a team, for all its threads; `none` changes no result. `shared` is used once. */
template <class T, class Warp>
__device__ __forceinline__ T teamReduce(T x, const Place& place, T* shared, T none, Warp warp) {
  x = warp(x);
  if (place.lanes == kWarp) return x;
  const int warps = place.lanes / kWarp, lane = place.lane % kWarp;
  if (lane == 0) shared[place.lane / kWarp] = x;
  __syncthreads();
  return warp(lane < warps ? shared[lane] : none);
}
__device__ __forceinline__ float teamSum(float x, const Place& place, float* shared) {
  return teamReduce(x, place, shared, 0.0f, [](float value) { return warpSum(value); });
}
__device__ __forceinline__ Keys teamKeys(Keys keys, const Place& place, Keys* shared) {
  return teamReduce(keys, place, shared, Keys(), [](Keys value) { return warpKeys(value); });
}
/** The largest number over a team, for all its threads. `shared` is used once. */
__device__ __forceinline__ u32 warpMost(u32 x) { return __reduce_max_sync(kAll, x); }
__device__ __forceinline__ u32 teamMost(u32 x, const Place& place, u32* shared) { return teamReduce(x, place, shared, 0u, warpMost); }
/** The largest number over the blocks of a cluster: each warp sends its own to all blocks. */
__device__ __forceinline__ u32 clusterMost(u32 x, const Place& place, Exchange<kWarp>& exchange) {
  const int warps = place.lanes / kWarp, lane = place.lane % kWarp;
  x = warpMost(x);
  if (lane < kCluster) exchange.send(lane, place.lane / kWarp, x);
  exchange.await();
  if (lane < warps) {
#pragma unroll
    for (int block = 0; block < kCluster; block++) x = ::max(x, exchange.words[block][lane]);
  }
  return warpMost(x);
}

/** What the threads of a row, or the blocks of a cluster, tell each other to norm it. */
struct Sums {
  float warps[kWarp];
  Exchange<1> blocks;
};

/** 1 over the root of a row's mean square, of which a thread has `x` and zeros. */
template <int FOURS>
__device__ __forceinline__ float normFactor(const float4 (&x)[FOURS], const Place& place, bool cluster, int width, float eps, Sums& sums) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < FOURS; i++) sum += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
  sum = teamSum(sum, place, sums.warps);
  if (cluster) {
    if (threadIdx.x < kCluster) sums.blocks.send(threadIdx.x, 0, bitcast<u32>(sum));
    sums.blocks.await();
    sum = 0.0f;
    for (int block = 0; block < kCluster; block++) sum += bitcast<float>(sums.blocks.words[block][0]);
  }
  return 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
}
__device__ __forceinline__ float4 times(float4 x, float4 y) { return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w); }
__device__ __forceinline__ float4 normed(float4 x, float factor, float4 weight) {
  return times(make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor), weight);
}

/** Calls `body` with the number of fours as a constant. */
template <class Body>
cudaError_t withFours(int fours, Body body) {
  switch (fours) {
    case 1: return body(std::integral_constant<int, 1>());
    case 4: return body(std::integral_constant<int, 4>());
    default: return body(std::integral_constant<int, kMostFours>());
  }
}

}  // namespace fewbit::rows
