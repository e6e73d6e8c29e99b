// The ring of shared memory through which weights stream: one warp fetches, workers free what they have read.
#pragma once
#include "skinny-params.cuh"

namespace fewbit::linear {

__device__ __forceinline__ uint32_t sharedAddress(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void barrierInit(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrierArrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(sharedAddress(barrier)) : "memory");
}
/** Waits until the phase of that parity is over. */
__device__ __forceinline__ void barrierAwait(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(sharedAddress(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(sharedAddress(barrier)),
      "r"(parity)
      : "memory");
#endif
}
/** Arrives when the copies of 16 bytes that this thread has begun are there. */
__device__ __forceinline__ void barrierArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(sharedAddress(barrier)) : "memory");
}
__device__ __forceinline__ void copy16(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

/** The same, or 16 bytes of zeros. */
__device__ __forceinline__ void copy16OrZeros(uint32_t target, const void* source, bool copies) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(copies ? 16 : 0) : "memory");
}
/** Waits for this thread's copies. */
__device__ __forceinline__ void copiesAwait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/** Copies of whole rows that need no registers (compute capability 9 on): the barrier counts their bytes. */
__device__ __forceinline__ void barrierExpect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void copyRow(uint32_t target, const void* source, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(sharedAddress(barrier))
               : "memory");
#endif
}

/** One lane of a full warp, so that the compiler knows that it is one. */
__device__ __forceinline__ bool electOne() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{ .reg .pred one; elect.sync _|one, 0xffffffff; selp.u32 %0, 1, 0, one; }" : "=r"(elected));
  return elected != 0;
#else
  return threadIdx.x % 32 == 0;
#endif
}

/** A place in the ring, and the parity of the turn around it. */
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

/** What a block walks over: tiles of 16 rows of the weights, and a slice of K. */
template <class Codes>
struct Walk {
  int perTile, tiles, begin, chunks, stagesOfTile;
  __device__ __forceinline__ explicit Walk(const SkinnyParams& p)
      : perTile(16 / p.parts),
        tiles((p.n + perTile - 1) / perTile),
        begin(blockIdx.y * p.kSlice),
        chunks(chunksOf<Codes>(min(p.kSlice, p.k - begin))),
        stagesOfTile((chunks + kWorkers - 1) / kWorkers) {}
};

/** One warp fetches all that the block reads of the weights, as far ahead as the ring has room. */
template <class Codes, int Tiles, class Mode>
__device__ __forceinline__ void fetchWeights(const SkinnyParams& p, uint8_t* shared, const SkinnyShared& at,
                                             const Walk<Codes>& walk) {
  using C = ChunkOf<Codes>;
  SkinnyBarriers& barriers = *reinterpret_cast<SkinnyBarriers*>(shared);
  const int lane = threadIdx.x % 32;
  const int sliceBytes = static_cast<int>(int64_t(walk.begin) / 32 * (4 * Codes::bits));
  const int pitch = Mode::scaleBytes > 0 ? scalePitch<Codes, Mode>(p) : 0;
  const bool leads = electOne();
  // The matrix and the row in it that are row `row` of a tile.
  const auto sourceOf = [&](int tile, int row) {
    const int part = p.parts == 2 && row >= 8 ? 1 : 0;
    return make_int2(p.rowOf(min(tile * walk.perTile + row - 8 * part, p.n - 1), part), part);
  };
  RingPlace place, arriving;
  int onTheirWay = 0;
  int slot = 0;
  bool first = true;  // turn around the ring: nothing to wait for
#pragma unroll 1
  for (int tile = blockIdx.x; tile < walk.tiles; tile += gridDim.x) {
    const bool whole = (tile + 1) * walk.perTile <= p.n;
    const int n0 = tile * walk.perTile;
    const uint8_t* low = p.weights[0].codes + p.rowOf(n0, 0) * p.rowBytes + sliceBytes;
    const uint8_t* high = p.parts == 2 ? p.weights[1].codes + p.rowOf(n0, 1) * p.rowBytes + sliceBytes : low + 8 * p.rowBytes;
#pragma unroll 1
    for (int s = 0; s < walk.stagesOfTile; s++) {
      uint64_t* full = &barriers.full[place.stage];
      if (!first) barrierAwait(&barriers.empty[place.stage], place.parity ^ 1);
      if (++onTheirWay > p.inFlight) {
        barrierAwait(&barriers.full[arriving.stage], arriving.parity);
        arriving.advance(p.stages);
      }
      uint8_t* stageAt = shared + at.ring + place.stage * C::stageBytes;
      const uint32_t stage = sharedAddress(stageAt);
      const int from = s * (kWorkers * C::rowBytes);
      const int wanted = min(walk.chunks - s * kWorkers, kWorkers) * C::rowBytes;
      const int bytes = min(wanted, static_cast<int>(p.rowBytes) - sliceBytes - from);
#if __CUDA_ARCH__ >= 900
      if (leads) barrierExpect(full, 16 * bytes);
      if (whole) {
        if (leads) {
#pragma unroll
          for (int row = 0; row < 16; row++)
            copyRow(stage + row * C::pitch, (row < 8 ? low : high) + row % 8 * p.rowBytes + from, bytes, full);
        }
      } else {
        __syncwarp();
        if (lane < 16) {
          const int2 source = sourceOf(tile, lane);
          copyRow(stage + lane * C::pitch, p.weights[source.y].codes + source.x * p.rowBytes + sliceBytes + from, bytes, full);
        }
      }
#else
      const int pieces = bytes / 16;
      for (int i = lane; i < 16 * pieces; i += 32) {
        const int2 source = sourceOf(tile, i / pieces);
        const uint8_t* codes = p.weights[source.y].codes + source.x * p.rowBytes + sliceBytes + from;
        copy16(stage + i / pieces * C::pitch + i % pieces * 16, codes + i % pieces * 16);
      }
#endif
      if (bytes < wanted) {
        // What a chunk has beyond the row's end meets zeros of x, and must be finite.
        const int rest = (wanted - bytes) / 16;
        for (int i = lane; i < 16 * rest; i += 32)
          *reinterpret_cast<uint4*>(stageAt + i / rest * C::pitch + bytes + i % rest * 16) = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
      }
      if constexpr (Mode::scaleBytes > 0) {
        if (s == 0) {
          // Two lanes a row, each with every other piece.
          const int2 source = sourceOf(tile, lane / 2);
          const Weights& w = p.weights[source.y];
          const int64_t offset = int64_t(source.x) * (pitch - 16);
          const uint32_t target =
              sharedAddress(shared + at.scales) + (slot * (Mode::floatZero ? 32 : 16) + lane / 2) * pitch;
#pragma unroll 4
          for (int piece = lane % 2 * 16; piece < pitch - 16; piece += 32) {
            copy16(target + piece, w.scale.at + offset + piece);
            if constexpr (Mode::floatZero) copy16(target + 16 * pitch + piece, w.zero.at + offset + piece);
          }
          if (++slot == p.scaleSlots) slot = 0;
        }
      }
      barrierArriveAfterCopies(full);
      place.advance(p.stages);
      if (place.stage == 0) first = false;
    }
  }
}

}  // namespace fewbit::linear
