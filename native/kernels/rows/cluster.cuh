// Blocks of a cluster that tell each other what they found (compute capability 9 on).
#pragma once
#include "../general/common.cuh"
#include "fewbit/cluster.cuh"

namespace fewbit::rows {

using general::u32;

/** The largest cluster that every device of compute capability 9 takes. */
constexpr int kCluster = 8;

__device__ __forceinline__ void clusterSync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/** Writes to where `at` lies in the shared memory of another block. */
__device__ __forceinline__ void tell(u32* at, int block, u32 value) {
#if __CUDA_ARCH__ >= 900
  const u32 own = static_cast<u32>(__cvta_generic_to_shared(at));
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(block));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
#endif
}

/** Words that every block of a cluster sends to all of them, once: `WORDS` of each block at most. */
template <int WORDS>
struct Exchange {
  std::uint64_t barrier;
  u32 words[kCluster][WORDS];

  /** By all threads, before the blocks meet and any `send`: how many words each block sends. */
  __device__ __forceinline__ void open(int count) { cluster::open(&barrier, 4 * kCluster * count); }
  /** As this block's word `index`, to `block`. */
  __device__ __forceinline__ void send(int block, int index, u32 value) {
    cluster::send(&words[blockIdx.y][index], &barrier, block, value);
  }
  /** Until all words have come. */
  __device__ __forceinline__ void await() { cluster::await(&barrier); }
};

}  // namespace fewbit::rows
