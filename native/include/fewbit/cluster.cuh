// Blocks of a cluster that send each other what they found (compute capability 9 on). What is sent counts towards a barrier of the block that gets
// it: a barrier of the whole cluster would first wait for all that a block's multiprocessor has on its way, other kernels' copies too.
// Source: PTX ISA 8.1, "st.async" and "mbarrier".
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fewbit::cluster {

__device__ __forceinline__ uint32_t own(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

/** By all threads of a block, before they `arrive`: so many bytes will be sent to it, once. */
__device__ __forceinline__ void open(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(own(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();  // one thread does both, but racecheck takes the first for all of its warp
  if (threadIdx.x == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(own(barrier)), "r"(bytes) : "memory");
#endif
}

/** All threads of a block: it runs, and its barriers are open; and behind `meet` those of all blocks. */
__device__ __forceinline__ void arrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/** Stores words where `at` lies in the shared memory of `block`, and counts them towards its `barrier`. */
__device__ __forceinline__ void send(uint32_t* at, uint64_t* barrier, int block, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 there, done;\n\t"
      "mapa.shared::cluster.u32 there, %0, %2;\n\tmapa.shared::cluster.u32 done, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %3, [done];\n\t}" ::"r"(own(at)),
      "r"(own(barrier)), "r"(block), "r"(value)
      : "memory");
#endif
}
__device__ __forceinline__ void send(float2* at, uint64_t* barrier, int block, float2 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 there, done;\n\t"
      "mapa.shared::cluster.u32 there, %0, %2;\n\tmapa.shared::cluster.u32 done, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [done];\n\t}" ::"r"(own(at)),
      "r"(own(barrier)), "r"(block), "f"(value.x), "f"(value.y)
      : "memory");
#endif
}

/** Until all bytes have come. */
__device__ __forceinline__ void await(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred come;\n\tagain_%=:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 come, [%0], 0;\n\t@!come bra again_%=;\n\t}" ::"r"(own(barrier))
      : "memory");
#endif
}

}  // namespace fewbit::cluster
