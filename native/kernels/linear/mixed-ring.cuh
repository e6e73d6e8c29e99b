// The ring of shared memory through which codes of the weights and prepared x stream to the mixed kernels.
#pragma once
#include "mixed-params.cuh"
#include "sdpa/hopper.cuh"
#include "skinny-ring.cuh"

namespace fewbit::linear {

#ifdef FEWBIT_HOPPER

/** The matrix and the row in it that are row `row` of a block's tile; what is beyond the last row reads that again. */
struct MixedSource {
  int part, n;
  __device__ __forceinline__ MixedSource(const MixedParams& p, int tile, int row)
      : part(p.parts == 2 ? row / 8 % 2 : 0),
        n(min(p.parts == 2 ? tile * (kMixedRows / 2) + row / 16 * 8 + row % 8 : tile * kMixedRows + row, p.n - 1)) {}
};

/** 16 bytes, of which those past `bytes` are zeros. */
__device__ __forceinline__ void copy16(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

/** The copies of one of the threads that fetch: every `kFetchers`th piece of 16 bytes of a stage of codes. */
template <int Bits>
struct CodePieces {
  using Row = MixedRow<Bits>;
  static constexpr bool regular = Bits == 4 || Bits == 8 || Bits == 16;  // its pieces are at the same place of rows `step` apart
  static constexpr int step = kFetchers / Bits;
  const uint8_t* from[2];  // its first piece and its second: of gate and of up where those take turns
  int64_t pair;            // bytes to the next two
  uint32_t target;
  bool whole;

  __device__ __forceinline__ CodePieces(const MixedParams& p, int tile, int thread) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const MixedSource source(p, tile, thread / Bits + i * step);
      from[i] = p.weights[source.part].codes + source.n * p.rowBytes + thread % Bits * 16;
    }
    pair = (p.parts == 2 ? step : 2 * step) * p.rowBytes;
    target = thread / Bits * Row::pitch + thread % Bits * 16;
    whole = regular && (tile + 1) * (kMixedRows / p.parts) <= p.n;
  }
  /** What a stage has beyond a row's end meets zeros of x, and must be finite: zeros. */
  __device__ __forceinline__ void fetch(const MixedParams& p, uint32_t to, int tile, int thread, int stage) const {
    const int64_t column = int64_t(stage) * Row::bytes;
    if (whole && column + Row::bytes <= p.rowBytes) {
      if constexpr (regular) {
#pragma unroll
        for (int i = 0; i < Bits; i++) copy16(to + target + i * step * Row::pitch, from[i % 2] + column + i / 2 * pair);
      }
      return;
    }
#pragma unroll 1
    for (int i = thread; i < kMixedRows * Bits; i += kFetchers) {
      const int row = i / Bits, at = i % Bits * 16;
      const MixedSource source(p, tile, row);
      const bool inside = column + at < p.rowBytes;
      copy16(to + row * Row::pitch + at, p.weights[source.part].codes + source.n * p.rowBytes + (inside ? column + at : 0),
             inside ? 16 : 0);
    }
  }
};

/** Four warps fetch all that the block reads, as far ahead as the ring has room: codes before x is there. */
template <int Bits, int N>
__device__ __forceinline__ void fetchMixed(const MixedParams& p, uint8_t* shared, const MixedShared<Bits, N>& at, int tile, int pass,
                                           int begin, int end) {
  using Shared = MixedShared<Bits, N>;
  MixedBarriers& barriers = *reinterpret_cast<MixedBarriers*>(shared + at.barriers);
  const int thread = threadIdx.x - kMixedWorkers * 32;
  const bool leads = thread == 0;
  const CodePieces<Bits> pieces(p, tile, thread);
  const int sumBytes = p.multipliesSums ? Shared::sumBytes : 0;
  const int64_t first = int64_t(pass) * mixedStages(p.k);
  const auto fetchCodesTo = [&](int place, int stage) {
    pieces.fetch(p, sharedAddress(shared + at.codes + place * Shared::codeBytes), tile, thread, stage);
    barrierArriveAfterCopies(&barriers.full[place]);
  };
  const auto fetchX = [&](int place, int stage) {
    if (!leads) return;
    uint64_t* full = &barriers.full[place];
    hopper::barrierExpect(full, Shared::columnBytes + sumBytes);
    hopper::loadBytes(shared + place * Shared::columnBytes, p.columns + (first + stage) * Shared::columnBytes, full,
                      Shared::columnBytes);
    if (sumBytes > 0)
      hopper::loadBytes(shared + at.sums + place * Shared::sumBytes, p.sums + (first + stage) * sumBytes, full, sumBytes);
  };
  const int ahead = min(p.stages, end - begin);
  for (int i = 0; i < ahead; i++) fetchCodesTo(i, begin + i);
  awaitPredecessor();
  // x was written by ordinary stores, and is read by the unit for copies.
  asm volatile("fence.proxy.async;" ::: "memory");
  for (int i = 0; i < ahead; i++) fetchX(i, begin + i);
  RingPlace place;
  for (int stage = begin + ahead; stage < end; stage++) {
    barrierAwait(&barriers.empty[place.stage], place.parity);
    fetchX(place.stage, stage);
    fetchCodesTo(place.stage, stage);
    place.advance(p.stages);
  }
}

#endif

}  // namespace fewbit::linear
