// Launches that overlap the end of their predecessor (programmatic dependent launch, compute capability 9 on).
#pragma once
#include "fewbit/launch.hpp"

namespace fewbit {

/**
 * Enqueues a kernel whose blocks may start while its predecessor in the stream still runs; graphs keep the edge. Every block of it
 * calls `awaitPredecessor` before it reads or writes what another kernel of the program writes or reads, and before it ends: the
 * kernels after it rely on that. Weights, constants and symbols may be read before. An ordinary launch where the code that runs is that
 * of a compute capability below 9, which has no such waiting.
 */
template <class... Params, class... Args>
cudaError_t launchOverlapped(const Launch& launch, void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                             Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = launch.stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = launch.context->overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

/** Waits until the kernels before this one are complete and their writes are seen. */
__device__ __forceinline__ void awaitPredecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/** Lets the next kernel's blocks start as soon as every block of this one has said so and there is room for them. */
__device__ __forceinline__ void releaseSuccessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fewbit
