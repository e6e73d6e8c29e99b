// Blocks of a cluster that tell each other what they found (compute capability 9 on).
#pragma once
#include "../general/common.cuh"

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

/**
 * Words that every block of a cluster sends to all of them, once: `WORDS` of each block at most. What is sent says itself that it has come,
 * where a barrier of the cluster would first wait for all of a block's memory.
 */
template <int WORDS>
struct Exchange {
  std::uint64_t barrier;
  u32 words[kCluster][WORDS];

  /** By one thread, before a `clusterSync` and any `send`: how many words each block sends. */
  __device__ __forceinline__ void open(int count) {
#if __CUDA_ARCH__ >= 900
    const u32 at = own(&barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(4 * kCluster * count) : "memory");
#endif
  }
  /** As this block's word `index`, to `block`. */
  __device__ __forceinline__ void send(int block, int index, u32 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .b32 there, done;\n\t"
        "mapa.shared::cluster.u32 there, %0, %2;\n\tmapa.shared::cluster.u32 done, %1, %2;\n\t"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %3, [done];\n\t}" ::"r"(own(&words[blockIdx.y][index])),
        "r"(own(&barrier)), "r"(block), "r"(value)
        : "memory");
#endif
  }
  /** Until all words have come. */
  __device__ __forceinline__ void await() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .pred come;\n\tagain_%=:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 come, [%0], 0;\n\t@!come bra again_%=;\n\t}" ::"r"(own(&barrier))
        : "memory");
#endif
  }

 private:
  __device__ __forceinline__ static u32 own(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }
};

}  // namespace fewbit::rows
