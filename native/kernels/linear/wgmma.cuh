// X W^T on Hopper: a warp copies tiles of 128 bytes of K into a ring, two warpgroups multiply 64 rows of x each and finish them.
//
// Two neighbouring blocks (a cluster) may share their rows of W: each copies half of them to both. Blocks stay and walk over tiles in
// an order that keeps a wave's rows of x and W in the L2 cache. A gated product has rows of gate in the first half of a warpgroup's W and
// the same rows of up in the second, so that one thread holds both. A short tile has 64 rows of x, by which each warpgroup multiplies half
// of W: x alone has to wait for the kernel before this one, and a ring holds W for 1024 bytes of K.
#pragma once
#include <algorithm>
#include <iterator>

#include "wgmma-finish.cuh"
#include "wgmma-units.cuh"
#include "wgmma.hpp"

namespace fewbit::linear {
namespace {

constexpr int kProductThreads = 384;
constexpr int kGroupRows = 2048;  // of x, that are walked over before the next rows of W

/** Of Rows rows of x and Columns rows of W. */
template <int Rows, int Columns>
struct Tile {
  static constexpr int rows = Rows, columns = Columns;
  static constexpr bool isShort = Rows == 64;
  static constexpr int own = isShort ? Columns / 2 : Columns;  // rows of W of a warpgroup
  /** Rows of W that are copied at once: half of a tile, or what a warpgroup has of gate or of up. */
  __host__ __device__ static constexpr int piece(int parts) { return (parts == 2 ? own : Columns) / 2; }
  static constexpr int pieces = Columns / piece(2);  // at most
  static constexpr int stageBytes = (Rows + Columns) * 128, stages = 192 * 1024 / stageBytes;
};

template <class Tile>
struct ProductMemory {
  uint8_t x[Tile::stages][Tile::rows][128];
  uint8_t w[Tile::stages][Tile::columns][128];
  float staged[8][16][kStagedPitch];
  float2 columns[2][Tile::own];  // a factor and a bias each
  uint64_t full[Tile::stages], empty[Tile::stages];
};

#ifdef FEWBIT_HOPPER

__device__ __forceinline__ uint32_t clusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/** Waits for all threads of the cluster, behind `fence.mbarrier_init`. A release would wait for memory as far as the device sees it. */
__device__ __forceinline__ void clusterStart() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
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

__device__ __forceinline__ void prefetchMap(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

/** Tiles in the order in which clusters take them. */
struct TileWalk {
  int perTile, tilesM, tilesN, group;
  __device__ TileWalk(const ProductParams& p, int rows, int tileRows, int width) {
    perTile = tileRows * p.cluster;
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

/** Stages of the ring, one after another. */
template <int Stages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

/** What one thread does: it copies tiles of x and W. In a cluster of two, every second piece of W goes to both blocks. */
template <class Tile, int Elements, bool Pair>
__device__ __forceinline__ void copyTiles(const CUtensorMap* xMap, const CUtensorMap* wMap, const CUtensorMap* upMap,
                                          const ProductParams& p, ProductMemory<Tile>& mem, const TileWalk& walk, int first, int step) {
  using namespace hopper;
  const bool gated = p.parts == 2;
  const int width = Tile::columns / p.parts, piece = Tile::piece(p.parts);
  const int rank = Pair ? clusterRank() : 0;
  const CUtensorMap* second = gated ? upMap : wMap;
  const CUtensorMap* ofRank = rank == 0 ? wMap : second;
  const auto expect = [&](int stage, int k, int n0) {
    uint64_t* full = &mem.full[stage];
    barrierExpect(full, Tile::stageBytes);
#pragma unroll
    for (int i = 0; i < Tile::pieces; i += Pair ? 2 : 1) {
      if (i * piece >= Tile::columns) break;
      const int row = n0 + (gated ? i / 2 : i + rank) * piece;
      if constexpr (Pair) loadShared(mem.w[stage][(i + rank) * piece], ofRank, full, k * Elements, row, 3);
      else load(mem.w[stage][i * piece], i % 2 == 0 ? wMap : second, full, k * Elements, row, 0);
    }
  };
  prefetchMap(xMap);
  int2 place = make_int2(0, 0);
  int expected = 0;  // of the first stages, for which only x is missing
  if (first < walk.count()) {
    place = walk.at(first);
    for (; expected < min(Tile::stages, p.steps); expected++) expect(expected, expected, place.y * width);
  }
  awaitPredecessor();
  RingPlace<Tile::stages> at;
  for (int tile = first; tile < walk.count(); tile += step) {
    if (tile != first) place = walk.at(tile);
    const int m0 = place.x * walk.perTile + rank * Tile::rows, n0 = place.y * width;
    for (int k = 0; k < p.steps; k++) {
      if (expected > 0) {
        expected--;
      } else {
        barrierWait(&mem.empty[at.stage], at.phase ^ 1);
        expect(at.stage, k, n0);
      }
      load(mem.x[at.stage], xMap, &mem.full[at.stage], k * Elements, m0, 0);
      at.advance();
    }
  }
  // The block stays until the other one has used what was copied to it, and has arrived at the barriers here for the last time.
  for (int i = 0; i < Tile::stages; i++) {
    barrierWait(&mem.empty[at.stage], at.phase ^ 1);
    at.advance();
  }
}

#endif

/** The second map is that of up; W's boxes are pieces of a tile. One block a multiprocessor. */
template <class Unit, class Tile>
__global__ void __launch_bounds__(kProductThreads, 1)
    wgmmaProduct(const __grid_constant__ CUtensorMap xMap, const __grid_constant__ CUtensorMap wMap,
                 const __grid_constant__ CUtensorMap upMap, const __grid_constant__ ProductParams p) {
#ifdef FEWBIT_HOPPER
  using namespace hopper;
  using Value = typename Unit::Value;
  constexpr int kStages = Tile::stages, kOwn = Tile::own;
  constexpr int kElements = 128 / Unit::elementBytes;  // of K in a stage
  extern __shared__ uint8_t raw[];
  auto& mem = *reinterpret_cast<ProductMemory<Tile>*>(raw + (-shared(raw) & 1023));
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
  clusterStart();
  if (!p.constant) awaitPredecessor();

  const bool gated = p.parts == 2;
  const int width = Tile::columns / p.parts;  // outputs of a tile
  const int rows = static_cast<int>(p.rows.at(p.symbols));
  const TileWalk walk(p, rows, Tile::rows, width);
  const int first = blockIdx.x / cluster, step = gridDim.x / cluster;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      if (cluster == 2) copyTiles<Tile, kElements, true>(&xMap, &wMap, &upMap, p, mem, walk, first, step);
      else copyTiles<Tile, kElements, false>(&xMap, &wMap, &upMap, p, mem, walk, first, step);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int turn = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
    const auto release = [&](int stage) {
      if (lane < cluster) barrierArriveAt(&mem.empty[stage], lane);
    };
    const int below = Tile::isShort ? 0 : turn, beside = Tile::isShort ? turn : 0;
    constexpr int kFactors = (kOwn + 127) / 128;
    const auto partOf = [&](int column) { return gated ? column / (kOwn / 2) : 0; };
    RingPlace<kStages> at;
    Value d[kOwn / 2];
    for (int tile = first; tile < walk.count(); tile += step) {
      const int2 place = walk.at(tile);
      const int m0 = place.x * walk.perTile + rank * Tile::rows + below * 64 + warp * 16;
      const int n0 = place.y * width + beside * (width / 2);
      Factor ofX, ofW[kFactors];
#pragma unroll
      for (int i = 0; i < kFactors; i++) {
        const int column = thread + 128 * i, part = partOf(column);
        const int n = n0 + column - part * (kOwn / 2);
        if (column < kOwn && n < p.n) ofW[i].fetch(p.scaleW[part], p.epilogue.bias[part], n);
      }
      if (tile == first) awaitPredecessor();
      if (m0 + lane % 16 < rows) ofX.fetch(p.scaleX, nullptr, m0 + lane % 16);
      int before = 0;
      for (int k = 0; k < p.steps; k++) {
        barrierWait(&mem.full[at.stage], at.phase);
        pin(d);
        productFence();
        const uint64_t a = hopper::tile(mem.x[at.stage][below * 64]), b = hopper::tile(mem.w[at.stage][beside * kOwn]);
#pragma unroll
        for (int i = 0; i < 4; i++) Unit::product(d, a + 2 * i, b + 2 * i, k | i);
        productCommit();
        productWait<1>();
        if (k > 0) release(before);
        before = at.stage;
        at.advance();
      }
      productWait<0>();
      pin(d);
      release(before);

      turnWait(1 + turn, 128);  // the columns of the last tile were read
#pragma unroll
      for (int i = 0; i < kFactors; i++) {
        const int column = thread + 128 * i;
        if (column < kOwn) mem.columns[turn][column] = make_float2(ofW[i].value(p.scaleW[partOf(column)]), ofW[i].bias);
      }
      turnWait(1 + turn, 128);
      const float2(&columns)[kOwn] = mem.columns[turn];
      const float factor = ofX.value(p.scaleX);
      const bool rounded = p.epilogue.rounding != Rounding::none;
      if (!p.direct) finishTile<kOwn>(p, d, mem.staged[turn * 4 + warp], columns, factor, m0, n0, rows);
      else if (gated && rounded) finishDirect<kOwn, true, true>(p, d, columns, factor, m0, n0, rows);
      else if (gated) finishDirect<kOwn, true, false>(p, d, columns, factor, m0, n0, rows);
      else if (rounded) finishDirect<kOwn, false, true>(p, d, columns, factor, m0, n0, rows);
      else finishDirect<kOwn, false, false>(p, d, columns, factor, m0, n0, rows);
    }
  }
  awaitPredecessor();  // a block without a tile, too, ends after it
#endif
}

template <class Unit, class Tile>
cudaError_t startProduct(const Launch& launch, const Product& product, ProductParams p, int64_t rows) {
  const int64_t tilesM = (rows + Tile::rows - 1) / Tile::rows;
  p.cluster = tilesM % 2 == 0 || tilesM > 8 ? 2 : 1;
  CUtensorMap x, w, up;
  cudaError_t error;
  const uint64_t spanX = uint64_t(rows) * product.strideX, spanW = uint64_t(product.n) * product.strideW;
  if ((error = hopper::tensorMap(&x, product.x, Unit::elementBytes, product.k, rows, product.strideX, 1, spanX, Tile::rows)) !=
          cudaSuccess ||
      (error = hopper::tensorMap(&w, product.w[0], Unit::elementBytes, product.k, product.n, product.strideW, 1, spanW,
                                 Tile::piece(p.parts))) != cudaSuccess ||
      (error = hopper::tensorMap(&up, product.w[product.parts - 1], Unit::elementBytes, product.k, product.n, product.strideW, 1,
                                 spanW, Tile::piece(p.parts))) != cudaSuccess)
    return error;
  const size_t shared = sizeof(ProductMemory<Tile>) + 1024;
  const auto kernel = wgmmaProduct<Unit, Tile>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared))) != cudaSuccess)
    return error;
  const int width = Tile::columns / p.parts;
  const int64_t tiles = (tilesM + p.cluster - 1) / p.cluster * ((p.n + width - 1) / width);
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

/** A shape of tiles, with nanoseconds that one takes an H100: for a step along K, and for the rest, which is mostly its outputs. */
struct TileTime {
  int rows, columns;
  float step, rest;
};
// A step of 128 x 128 takes the matrix unit 512 clocks of 1.98 GHz, and its 32 KB as many; one twice as wide, which reads x for more columns,
// takes 1 / 0.55 of that. One of 64 x 128 (estimated) waits for shared memory: both warpgroups read 32 KB and 24 KB are written. Rests go by
// outputs.
constexpr TileTime kTileTimes[] = {{128, 256, 490, 3270}, {128, 128, 270, 1800}, {64, 128, 230, 900}};

/** The shape of which all tiles end first: a multiprocessor takes whole ones, one after another. */
inline int fastestTile(const Launch& launch, const Product& product, int64_t rows, int steps) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto time = [&](const TileTime& tile) {
    const int64_t tiles = up(rows, tile.rows) * up(int64_t(product.n) * product.parts, tile.columns);
    return up(tiles, launch.context->sms) * (steps * tile.step + tile.rest);
  };
  const auto faster = [&](const TileTime& a, const TileTime& b) { return time(a) < time(b); };
  return static_cast<int>(std::min_element(std::begin(kTileTimes), std::end(kTileTimes), faster) - kTileTimes);
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
  p.constant = product.constant;
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
  switch (fastestTile(launch, product, rows, p.steps)) {
    case 0: return startProduct<Unit, Tile<128, 256>>(launch, product, p, rows);
    case 1: return startProduct<Unit, Tile<128, 128>>(launch, product, p, rows);
    default: return startProduct<Unit, Tile<64, 128>>(launch, product, p, rows);
  }
}

}  // namespace
}  // namespace fewbit::linear
