// X W^T on Hopper: a warp copies tiles of 128 bytes of K into a ring, two warpgroups multiply 64 rows of x each and finish them.
//
// Two neighbouring blocks (a cluster) may share their rows of W: each copies half of them to both. Blocks stay and walk over tiles in
// an order that keeps a wave's rows of x and W in the L2 cache. A gated product has rows of gate in the first half of a tile of W and the
// same rows of up in the second, so that one thread holds both.
#pragma once
#include <algorithm>

#include "wgmma-finish.cuh"
#include "wgmma-units.cuh"
#include "wgmma.hpp"

namespace fewbit::linear {
namespace {

constexpr int kTileRows = 128;
constexpr int kProductThreads = 384;
constexpr int kGroupRows = 2048;  // of x, that are walked over before the next rows of W

template <int N>
struct ProductMemory {
  static constexpr int stages = N == 256 ? 4 : 6;
  uint8_t x[stages][kTileRows][128];
  uint8_t w[stages][N][128];
  float staged[8][16][kStagedPitch];
  float2 columns[2][N];  // a factor and a bias each
  uint64_t full[stages], empty[stages];
};

#ifdef FEWBIT_HOPPER

__device__ __forceinline__ uint32_t clusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void clusterSync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/**
 * Arrives at the same barrier of a block of the cluster. No memory but what the matrix unit has read is ordered by it, so that a
 * fence for the cluster, which would wait for all stores, is left out.
 */
__device__ __forceinline__ void barrierArriveAt(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
          hopper::shared(barrier)),
      "r"(rank)
      : "memory");
}
/** A tile to the same place of every block in `mask`, and its bytes to their barriers. */
__device__ __forceinline__ void loadShared(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int row, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5, %6}], "
      "[%2], %3;" ::"r"(hopper::shared(to)),
      "l"(map), "r"(hopper::shared(barrier)), "h"(mask), "r"(column), "r"(row), "r"(0)
      : "memory");
}

/** Tiles in the order in which clusters take them. */
struct TileWalk {
  int perTile, tilesM, tilesN, group;
  __device__ TileWalk(const ProductParams& p, int rows, int width) {
    perTile = kTileRows * p.cluster;
    tilesM = (rows + perTile - 1) / perTile;
    tilesN = (p.n + width - 1) / width;
    group = kGroupRows / perTile;
  }
  __device__ int count() const { return tilesM * tilesN; }
  __device__ int2 at(int tile) const {
    const int first = tile / (group * tilesN) * group;
    const int height = min(group, tilesM - first);
    const int within = tile - first * tilesN;
    return make_int2(first + within % height, within / height);
  }
};

#endif

/** The second map is that of up; W's boxes are of N / 2 rows. One block a multiprocessor. */
template <class Unit, int N>
__global__ void __launch_bounds__(kProductThreads, 1)
    wgmmaProduct(const __grid_constant__ CUtensorMap xMap, const __grid_constant__ CUtensorMap wMap,
                 const __grid_constant__ CUtensorMap upMap, const __grid_constant__ ProductParams p) {
#ifdef FEWBIT_HOPPER
  using namespace hopper;
  using Value = typename Unit::Value;
  using Memory = ProductMemory<N>;
  constexpr int kStages = Memory::stages;
  constexpr int kElements = 128 / Unit::elementBytes;  // of K in a stage
  extern __shared__ uint8_t raw[];
  auto& mem = *reinterpret_cast<Memory*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  releaseSuccessor();
  const int cluster = p.cluster;
  const uint32_t rank = clusterRank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      barrierInit(&mem.full[i], 1);
      barrierInit(&mem.empty[i], 8 * cluster);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  clusterSync();
  awaitPredecessor();

  const bool gated = p.parts == 2;
  const int width = gated ? N / 2 : N;  // outputs of a tile
  const int rows = static_cast<int>(p.rows.at(p.symbols));
  const TileWalk walk(p, rows, width);
  const int first = blockIdx.x / cluster, step = gridDim.x / cluster;
  int stageOf = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stageOf == kStages) {
      stageOf = 0;
      phase ^= 1;
    }
  };
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      const uint16_t mask = static_cast<uint16_t>((1 << cluster) - 1);
      for (int tile = first; tile < walk.count(); tile += step) {
        const int2 place = walk.at(tile);
        const int m0 = place.x * walk.perTile + rank * kTileRows, n0 = place.y * width;
        for (int k = 0; k < p.steps; k++) {
          uint64_t* full = &mem.full[stageOf];
          barrierWait(&mem.empty[stageOf], phase ^ 1);
          barrierExpect(full, (kTileRows + N) * 128);
          load(mem.x[stageOf], &xMap, full, k * kElements, m0, 0);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            if (cluster == 2 && half != static_cast<int>(rank)) continue;
            const CUtensorMap* map = gated && half == 1 ? &upMap : &wMap;
            const int row = gated ? n0 : n0 + half * (N / 2);
            if (cluster == 1) load(mem.w[stageOf][half * (N / 2)], map, full, k * kElements, row, 0);
            else loadShared(mem.w[stageOf][half * (N / 2)], map, full, k * kElements, row, mask);
          }
          advance();
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int turn = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
    const auto release = [&](int stage) {
      if (lane < cluster) barrierArriveAt(&mem.empty[stage], lane);
    };
    Value d[N / 2];
    for (int tile = first; tile < walk.count(); tile += step) {
      const int2 place = walk.at(tile);
      const int m0 = place.x * walk.perTile + rank * kTileRows + turn * 64 + warp * 16, n0 = place.y * width;
      Factor ofX, ofW[N / 128];
      if (m0 + lane % 16 < rows) ofX.fetch(p.scaleX, nullptr, m0 + lane % 16);
#pragma unroll
      for (int i = 0; i < N / 128; i++) {
        const int column = thread + 128 * i, part = column / width;
        const int n = n0 + column - part * width;
        if (n < p.n) ofW[i].fetch(p.scaleW[part], p.epilogue.bias[part], n);
      }
      int before = 0;
      for (int k = 0; k < p.steps; k++) {
        barrierWait(&mem.full[stageOf], phase);
        pin(d);
        productFence();
        const uint64_t a = hopper::tile(mem.x[stageOf][turn * 64]), b = hopper::tile(mem.w[stageOf]);
#pragma unroll
        for (int i = 0; i < 4; i++) Unit::product(d, a + 2 * i, b + 2 * i, k | i);
        productCommit();
        productWait<1>();
        if (k > 0) release(before);
        before = stageOf;
        advance();
      }
      productWait<0>();
      pin(d);
      release(before);

      turnWait(1 + turn, 128);  // the columns of the last tile were read
#pragma unroll
      for (int i = 0; i < N / 128; i++) {
        const int column = thread + 128 * i;
        mem.columns[turn][column] = make_float2(ofW[i].value(p.scaleW[column / width]), ofW[i].bias);
      }
      turnWait(1 + turn, 128);
      const float2(&columns)[N] = mem.columns[turn];
      const float factor = ofX.value(p.scaleX);
      const bool rounded = p.epilogue.rounding != Rounding::none;
      if (!p.direct) finishTile<N>(p, d, mem.staged[turn * 4 + warp], columns, factor, m0, n0, rows);
      else if (gated && rounded) finishDirect<N, true, true>(p, d, columns, factor, m0, n0, rows);
      else if (gated) finishDirect<N, true, false>(p, d, columns, factor, m0, n0, rows);
      else if (rounded) finishDirect<N, false, true>(p, d, columns, factor, m0, n0, rows);
      else finishDirect<N, false, false>(p, d, columns, factor, m0, n0, rows);
    }
  }
  __syncthreads();
  clusterSync();  // no block leaves before the other has copied to it and arrived at its barriers for the last time
#endif
}

template <class Unit, int N>
cudaError_t startProduct(const Launch& launch, const Product& product, ProductParams p, int64_t rows) {
  CUtensorMap x, w, up;
  cudaError_t error;
  const uint64_t spanX = uint64_t(rows) * product.strideX, spanW = uint64_t(product.n) * product.strideW;
  if ((error = hopper::tensorMap(&x, product.x, Unit::elementBytes, product.k, rows, product.strideX, 1, spanX, kTileRows)) !=
          cudaSuccess ||
      (error = hopper::tensorMap(&w, product.w[0], Unit::elementBytes, product.k, product.n, product.strideW, 1, spanW, N / 2)) !=
          cudaSuccess ||
      (error = hopper::tensorMap(&up, product.w[product.parts - 1], Unit::elementBytes, product.k, product.n, product.strideW, 1,
                                 spanW, N / 2)) != cudaSuccess)
    return error;
  const size_t shared = sizeof(ProductMemory<N>) + 1024;
  const auto kernel = wgmmaProduct<Unit, N>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared))) != cudaSuccess)
    return error;
  const int width = N / p.parts, perTile = kTileRows * p.cluster;
  const int64_t tiles = (rows + perTile - 1) / perTile * ((p.n + width - 1) / width);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, launch.context->sms / p.cluster)) * p.cluster);
  config.blockDim = dim3(kProductThreads);
  config.dynamicSmemBytes = shared;
  config.stream = launch.stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(p.cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, x, w, up, p);
}

/** Of equal tiles a multiprocessor's share is whole: the width that ends first. */
inline bool wideTiles(const Launch& launch, const Product& product, int64_t rows) {
  const auto waves = [&](int columns) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((int64_t(product.n) * product.parts + columns - 1) / columns);
    return (tiles + launch.context->sms - 1) / launch.context->sms;
  };
  // A tile of half the width takes somewhat more than half the time: x is read for fewer columns.
  return waves(256) * 1.0 <= waves(128) * 0.55;
}

template <class Unit>
cudaError_t runProduct(const Launch& launch, const Product& product) {
  const int64_t rows = product.rows.at(launch.symbols);
  if (rows == 0) return cudaSuccess;
  ProductParams p = {};
  p.rows = product.rows;
  p.symbols = launch.deviceSymbols;
  p.n = product.n;
  p.parts = product.parts;
  p.steps = (product.k * Unit::elementBytes + 127) / 128;
  const int64_t tilesM = (rows + kTileRows - 1) / kTileRows;
  p.cluster = tilesM % 2 == 0 || tilesM > 8 ? 2 : 1;
  const Epilogue& e = p.epilogue = product.epilogue;
  const int outBytes = e.rounding == Rounding::none ? 4 : 2;
  const auto aligned = [](const Dense& dense, int bytes) {
    return dense.at == nullptr || ((reinterpret_cast<uintptr_t>(dense.at) | (dense.stride * bytes)) & (4 * bytes - 1)) == 0;
  };
  p.vector = p.n % 4 == 0 && aligned(e.out, outBytes) && aligned(e.residual, 4);
  const Activation fast = p.parts == 2 ? Activation::silu : Activation::relu;
  p.direct = p.vector && e.residual.at == nullptr && (e.fn == fast || (p.parts == 1 && e.fn == Activation::none));
  for (int level = 0; level < 2; level++) {
    p.scaleX[level] = product.scaleX[level];
    for (int part = 0; part < 2; part++) p.scaleW[part][level] = product.scaleW[part][level];
  }
  return wideTiles(launch, product, rows) ? startProduct<Unit, 256>(launch, product, p, rows)
                                          : startProduct<Unit, 128>(launch, product, p, rows);
}

}  // namespace
}  // namespace fewbit::linear
