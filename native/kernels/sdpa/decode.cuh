// Attention of few query rows over many keys (flash decoding; Dao et al. 2023). Keys and values are read once for the query heads that
// share them. Tiles of them are on their way before the kernels before this one have ended, where those do not write them.
#pragma once
#include "decode_halves.cuh"
#include "decode_join.cuh"
#include "decode_parts.cuh"
#include "fewbit/overlap.cuh"
#include "hopper.cuh"

namespace fewbit::sdpa {
namespace {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FEWBIT_CLUSTER __cluster_dims__(kCluster, 1, 1)
#else
#define FEWBIT_CLUSTER
#endif

template <class C, int Size, int Rows, class Shape>
using Worker = std::conditional_t<C::kHalves, HalvesWorker<C, Size, Rows, Shape>, PartsWorker<C, Size, Rows, Shape>>;

template <int Bytes>
__device__ __forceinline__ void copy(void* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(Bytes));
}

/** Copies the tile of keys from `key0` into a stage, by a warp; not all of it has come when this returns. */
template <class C, int Size, bool Joined>
__device__ __forceinline__ void fetch(const Params& p, const Seen& seen, const Cut& cut, int plane, const Stage& stage, int key0) {
  using G = Ring<C, Size, Joined>;
  using R = Row<C, Size>;
  constexpr int kTile = G::kKeys, kChunks = R::kBytes / 16;
  const int lane = threadIdx.x & 31;
  auto rowOf = [&](int key) -> int64_t {
    key = min(key, cut.end - 1);
    const int slot = p.ring ? key % seen.capacity : key;
    if (p.page == 0) return static_cast<int64_t>(plane) * seen.capacity + slot;
    return (static_cast<int64_t>(p.pages[slot / p.page]) * p.kvHeads + plane % p.kvHeads) * p.page + slot % p.page;
  };
  auto row = [&](int n, int64_t from) {
    const int at = n / kChunks, chunk = n % kChunks * 16;
    copy<16>(stage.keys + at * G::kKeyStride + chunk, p.k.rows + from);
    copy<16>(stage.values + at * G::kValueStride + chunk, p.v.rows + from);
  };
  auto grid = [&](int n, int64_t key) {
    if constexpr (R::kScales > 0) {
      const Operand& operand = n < kTile ? p.k : p.v;
      // Those of values lie behind those of keys.
      copy<R::kScales>(stage.keyScales + n * R::kScales, operand.scales + key * R::kScales);
      if constexpr (R::kZeros >= 4) copy<4>(stage.keyZeros + n * R::kZeros, operand.zeros + key * R::kZeros);
      else if constexpr (R::kZeros > 0)
        for (int i = 0; i < R::kZeros; i++) stage.keyZeros[n * R::kZeros + i] = operand.zeros[key * R::kZeros + i];
    }
  };
  // The rows of a tile mostly lie one after another.
  if (p.page == 0 && p.ring == 0 && key0 + kTile <= cut.end) {
    const int64_t first = static_cast<int64_t>(plane) * seen.capacity + key0;
#pragma unroll
    for (int i = 0; i < kTile * kChunks / 32; i++) row(i * 32 + lane, first * R::kBytes + i * 512 + lane * 16);
#pragma unroll
    for (int i = 0; i < kTile / 16; i++) grid(i * 32 + lane, first + (i * 32 + lane) % kTile);
  } else {
#pragma unroll 1
    for (int n = lane; n < kTile * kChunks; n += 32) row(n, rowOf(key0 + n / kChunks) * R::kBytes + n % kChunks * 16);
#pragma unroll 1
    for (int n = lane; n < 2 * kTile; n += 32) grid(n, rowOf(key0 + n % kTile));
  }
}

/** Each warp copies its own tiles. Grid: splits or blocks of a cluster, batch * KV heads, blocks of rows. */
template <class C, int Size, int Rows, bool Joined>
__device__ __forceinline__ void decodeRing(const Params& p) {
  using G = Ring<C, Size, Joined>;
  constexpr int kTile = G::kKeys, kWarps = G::kWarps;
  extern __shared__ __align__(1024) uint8_t raw[];
  releaseSuccessor();
  __shared__ uint64_t came;
  if constexpr (Joined) {
    cluster::open(&came, kGiven<Size>);
    cluster::arrive();
  }
  const Seen seen(p);
  const int warp = threadIdx.x / 32, plane = blockIdx.y, block = blockIdx.z, rows = seen.tokens * p.group;
  const bool any = block * Rows < rows;
  const Cut cut(seen, any ? block : 0, Rows, kTile, gridDim.x, Joined ? 1 : kLeastKeys / kTile);
  if (!any || (!Joined && static_cast<int>(blockIdx.x) >= cut.used)) {
    awaitPredecessor();
    return;
  }
  const int firstTile = blockIdx.x * cut.each, endTile = min(firstTile + cut.each, cut.tiles);
  auto stageOf = [&](int tile) {
    return G::stage(raw + (warp * G::kStages + (tile - firstTile) / kWarps % G::kStages) * G::kBytes);
  };
  auto start = [&](int tile) {
    if (tile < endTile) fetch<C, Size, Joined>(p, seen, cut, plane, stageOf(tile), cut.first + tile * kTile);
    asm volatile("cp.async.commit_group;");
  };
  // Earlier runs wrote the keys before this run's.
  const int early = p.early && p.position >= 0 ? seen.position : 0;
  bool waited = false;
  for (int i = 0; i < G::kStages - 1; i++) {
    const int tile = firstTile + warp + i * kWarps;
    if (!waited && tile < endTile && cut.first + (tile + 1) * kTile > early) {
      awaitPredecessor();
      waited = true;
    }
    start(tile);
  }
  awaitPredecessor();

  Worker<C, Size, Rows, G> worker(p, seen, plane, block);
  for (int tile = firstTile + warp; tile < endTile; tile += kWarps) {
    asm volatile("cp.async.wait_group %0;" ::"n"(G::kStages - 2));
    __syncwarp();
    // The stage that is filled now was read in the step before.
    start(tile + (G::kStages - 1) * kWarps);
    worker.take(p, stageOf(tile), 0, cut.first + tile * kTile, [] {});
  }
  asm volatile("cp.async.wait_group 0;");
  __syncthreads();
  float* join = reinterpret_cast<float*>(raw);
  worker.finish(join + warp * Rows * kLine<Size>);
  __syncthreads();
  const Held held{p, seen, plane, block * Rows, min(Rows, rows - block * Rows)};
  if constexpr (Joined) {
    cluster::meet();
    joinCluster<Size, Rows, kWarps>(held, join, reinterpret_cast<float*>(raw + G::kGivenAt), &came);
  } else {
    joinSplits<Size, Rows, kWarps>(held, join, cut.used);
  }
}

template <class C, int Size, int Rows>
__global__ void __launch_bounds__(Ring<C, Size, false>::kWarps * 32, Ring<C, Size, false>::kWarps == 4 ? 2 : 1)
    decodeSplits(const Params p) {
  decodeRing<C, Size, Rows, false>(p);
}

template <class C, int Size, int Rows>
__global__ void FEWBIT_CLUSTER __launch_bounds__(Ring<C, Size, true>::kWarps * 32, 2) decodeCluster(const Params p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  decodeRing<C, Size, Rows, true>(p);
#endif
}

/** The copy unit fetches tiles for all warps of a block, on behalf of a warp of it. Grid as above; keys lie one after another in their planes. */
template <class C, int Size, int Rows>
__global__ void __launch_bounds__(Stream<C, Size, Rows>::kWarps * 32, 1)
    decodeStream(const Params p, const __grid_constant__ CUtensorMap kMap, const __grid_constant__ CUtensorMap vMap) {
#ifdef FEWBIT_HOPPER
  using namespace hopper;
  using G = Stream<C, Size, Rows>;
  using R = Row<C, Size>;
  extern __shared__ __align__(1024) uint8_t raw[];
  __shared__ uint64_t full[G::kStages][2], empty[G::kStages];  // full: of keys, of values
  uint8_t* stages = raw + (1024 - (shared(raw) & 1023) & 1023);
  releaseSuccessor();
  const Seen seen(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, plane = blockIdx.y, block = blockIdx.z, rows = seen.tokens * p.group;
  const bool any = block * Rows < rows;
  const Cut cut(seen, any ? block : 0, Rows, G::kAll, gridDim.x, (kLeastKeys + G::kAll - 1) / G::kAll);
  if (!any || static_cast<int>(blockIdx.x) >= cut.used) {
    awaitPredecessor();
    return;
  }
  const int firstTile = blockIdx.x * cut.each, count = min(firstTile + cut.each, cut.tiles) - firstTile;
  /** Has tile i copied, by one thread. */
  auto start = [&](int i) {
    const int at = i % G::kStages, key0 = cut.first + (firstTile + i) * G::kAll;
    const Stage stage = G::stage(stages + at * G::kBytes);
    // Past the last key of the cache, rows come as zeros and scales not at all.
    const int keys = min(G::kAll, seen.capacity - key0);
    const int line = R::kBytes < 128 ? key0 * R::kBytes / 128 : key0;
    const int64_t key = static_cast<int64_t>(plane) * seen.capacity + key0;
    auto copyAll = [&](uint64_t* barrier, const CUtensorMap* map, const Operand& from, uint8_t* to, uint8_t* scales, uint8_t* zeros) {
      barrierExpect(barrier, G::kRows + keys * (R::kScales + R::kZeros));
      for (int c = 0; c < G::kBoxes; c++)
        for (int n = 0; n < G::kLines; n += G::kBoxRows) load(to + (c * G::kLines + n) * 128, map, barrier, 128 * c, line + n, plane);
      if constexpr (R::kScales > 0) loadBytes(scales, from.scales + key * R::kScales, barrier, keys * R::kScales);
      if constexpr (R::kZeros > 0) loadBytes(zeros, from.zeros + key * R::kZeros, barrier, keys * R::kZeros);
    };
    copyAll(&full[at][0], &kMap, p.k, stage.keys, stage.keyScales, stage.keyZeros);
    copyAll(&full[at][1], &vMap, p.v, stage.values, stage.valueScales, stage.valueZeros);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::kStages; i++) {
      barrierInit(&full[i][0], 1);
      barrierInit(&full[i][1], 1);
      barrierInit(&empty[i], G::kWarps);
    }
    fenceShared();
    // Earlier runs wrote the keys before this run's.
    const int early = p.early && p.position >= 0 ? seen.position : 0;
    for (int i = 0; i < min(count, G::kStages); i++) {
      if (cut.first + (firstTile + i + 1) * G::kAll > early) awaitPredecessor();
      start(i);
    }
  }
  __syncthreads();
  awaitPredecessor();

  Worker<C, Size, Rows, G> worker(p, seen, plane, block);
  for (int i = 0; i < count; i++) {
    const int at = i % G::kStages, key0 = cut.first + (firstTile + i) * G::kAll + warp * G::kKeys;
    // Warps take turns to have the stage filled again that all of them have read.
    const int next = i - 1 + G::kStages;
    if (i > 0 && next < count && warp == i % G::kWarps) {
      if (lane == 0) {
        barrierWait(&empty[next % G::kStages], (i - 1) / G::kStages & 1);
        start(next);
      }
      __syncwarp();
    }
    const int parity = i / G::kStages & 1;
    barrierWait(&full[at][0], parity);
    const Stage stage = G::stage(stages + at * G::kBytes);
    if (key0 < cut.end) worker.take(p, stage, warp * G::kKeys, key0, [&] { barrierWait(&full[at][1], parity); });
    else barrierWait(&full[at][1], parity);
    if (lane == 0) barrierArrive(&empty[at]);
  }
  __syncthreads();
  float* join = reinterpret_cast<float*>(stages);
  worker.finish(join + warp * Rows * kLine<Size>);
  __syncthreads();
  joinSplits<Size, Rows, G::kWarps>({p, seen, plane, block * Rows, min(Rows, rows - block * Rows)}, join, cut.used);
#endif
}

template <class Kernel, class... Args>
cudaError_t startKernel(const Launch& launch, Kernel kernel, dim3 grid, int threads, int shared, const Args&... args) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  return error == cudaSuccess ? launchOverlapped(launch, kernel, grid, threads, shared, args...) : error;
}

/** Whether a tensor map can describe rows of keys, and bulk copies their scales. */
template <class C, int Size>
bool canStream(const Launch& launch, const Params& p) {
  if constexpr (!kStreams<C>) return false;
  const Context& device = *launch.context;
  if (device.major != 9 || device.minor != 0 || !device.overlaps || p.page != 0 || p.ring != 0 || p.keys.symbol >= 0) return false;
  using R = Row<C, Size>;
  const int64_t keys = p.keys.at(launch.symbols);
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return keys * R::kBytes % 128 == 0 && keys * R::kScales % 16 == 0 && keys * R::kZeros % 16 == 0 && aligned(p.k.rows) &&
         aligned(p.v.rows) && aligned(p.k.scales) && aligned(p.v.scales) && aligned(p.k.zeros) && aligned(p.v.zeros);
}

template <class C, int Size, int Rows>
cudaError_t start(const Launch& launch, const Params& p, int splits, int planes, int rows) {
  const unsigned blocks = (rows + Rows - 1) / Rows;
  if (splits == 0) {
    using G = Ring<C, Size, true>;
    return startKernel(launch, decodeCluster<C, Size, Rows>, dim3(kCluster, planes, blocks), G::kWarps * 32, G::kShared, p);
  }
  const dim3 grid(splits, planes, blocks);
  if constexpr (kStreams<C>) {
    if (canStream<C, Size>(launch, p)) {
      using G = Stream<C, Size, Rows>;
      const uint64_t rowBytes = std::max(Row<C, Size>::kBytes, 128), plane = p.keys.at(launch.symbols) * Row<C, Size>::kBytes;
      CUtensorMap k, v;
      cudaError_t error = hopper::tensorMap(&k, p.k.rows, 1, rowBytes, plane / rowBytes, rowBytes, planes, plane, G::kBoxRows);
      if (error == cudaSuccess)
        error = hopper::tensorMap(&v, p.v.rows, 1, rowBytes, plane / rowBytes, rowBytes, planes, plane, G::kBoxRows);
      if (error != cudaSuccess) return error;
      return startKernel(launch, decodeStream<C, Size, Rows>, grid, G::kWarps * 32, G::kShared, p, k, v);
    }
  }
  using G = Ring<C, Size, false>;
  return startKernel(launch, decodeSplits<C, Size, Rows>, grid, G::kWarps * 32, G::kShared, p);
}

}  // namespace

template <class C>
cudaError_t startDecode(const Launch& launch, const DecodeParams& p, int splits, int planes, int rows, int size) {
  if (size == 128) return rows <= 4 ? start<C, 128, 4>(launch, p, splits, planes, rows) : start<C, 128, 8>(launch, p, splits, planes, rows);
  if (size == 64) return rows <= 4 ? start<C, 64, 4>(launch, p, splits, planes, rows) : start<C, 64, 8>(launch, p, splits, planes, rows);
  return cudaErrorInvalidValue;
}

}  // namespace fewbit::sdpa
