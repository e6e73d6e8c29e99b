// x W^T for few rows of x, at the speed of reading W.
//
// Weights are the 16 rows of a tensor-core product's left operand, and its 8 columns hold the rows of x. Codes of at most 8
// significant bits are bf16 exactly, and a float32 is exactly the sum of three bf16 of 8 bits each, so x takes three columns a row
// (one, when its own stored codes are exact in bf16): every product is exact, sums are float32, scales multiply partial sums.
//
// A row of bf16 by integer codes is multiplied in whole numbers instead (skinny-digits.cuh), one of signed bytes by such as it lies
// (skinny-bytes.cuh), and one of bf16 or e4m3 by e4m3 in f16 (skinny-halves.cuh). Outputs that are heads are turned and stored where
// attention reads them (skinny-heads.cuh).
//
// A block walks over tiles of 16 output features. One of its warps streams the weights into a ring of shared memory, across tiles and
// before x is there. Eight warps share a tile's K and multiply; others add up what those found and store it, so that nobody waits for an
// epilogue. A block takes less than half a multiprocessor where x is small, so that the next kernel's rings fill while one ends. x
// stays in shared memory, in the order in which lanes read it; what does not fit is left to blocks of other slices of K.
#pragma once
#include "skinny-bytes.cuh"
#include "skinny-digits.cuh"
#include "skinny-finish.cuh"
#include "skinny-halves.cuh"
#include "skinny-stored.cuh"

namespace fewbit::linear {

template <class Codes, int Tiles, class Mode>
__global__ void __launch_bounds__(kThreads(Tiles)) __maxnreg__(Tiles == 1 ? 64 : 128)
    skinny(const __grid_constant__ SkinnyParams p) {
  using C = ChunkOf<Codes>;
  extern __shared__ __align__(128) uint8_t shared[];
  SkinnyBarriers& barriers = *reinterpret_cast<SkinnyBarriers*>(shared);
  const SkinnyShared at = sharedOf<Codes, Tiles, Mode>(p);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // the same for a whole warp, and known to be
  const Walk<Codes> walk(p);
  const int m0 = blockIdx.z * p.columnsOfX;
  const int rows = min(static_cast<int>(p.x.rows.at(p.symbols)) - m0, p.columnsOfX);
  if (rows <= 0) {
    awaitPredecessor();
    return;
  }
  releaseSuccessor();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      barrierInit(&barriers.full[i], 32);
      barrierInit(&barriers.empty[i], kWorkers);
    }
    for (int i = 0; i < 2; i++) {
      barrierInit(&barriers.summed[i], kWorkers * 32);
      barrierInit(&barriers.stored[i], kFinishers(Tiles) * 32);
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __syncthreads();

  float* exchange = reinterpret_cast<float*>(shared + at.exchange);
  const int sheet = sheetOf<Tiles>(p);
  if (warp == kWorkers) {
    fetchWeights<Codes, Tiles, Mode>(p, shared, at, walk);
    return;
  }
  awaitPredecessor();
  if (warp > kWorkers) {
    const int group = (warp - kWorkers - 1) / kFinishers(Tiles);  // which of two tiles, and of two copies of sums
    const float* sheets = exchange + group * kWorkers * sheet;
    uint32_t parity = 0;
#pragma unroll 1
    for (int tile = blockIdx.x + group * gridDim.x; tile < walk.tiles; tile += 2 * gridDim.x, parity ^= 1) {
      storeSums<Tiles>(p, sheets, (warp - kWorkers - 1) % kFinishers(Tiles), m0, tile * walk.perTile, rows,
                       [&] { barrierAwait(&barriers.summed[group], parity); });
      barrierArrive(&barriers.stored[group]);
    }
    return;
  }

  const Worker<Codes, Mode> worker{p, shared, at, walk, exchange, sheet, warp, lane};
  if constexpr (Mode::bytes) multiplyBytes(worker, m0);
  else if constexpr (Mode::digits) multiplyDigits(worker, m0);
  else if constexpr (Mode::halves) multiplyHalves(worker, m0);
  else multiplyStored<Codes, Tiles, Mode>(worker, m0, rows);
}

}  // namespace fewbit::linear
