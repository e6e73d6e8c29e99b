// Launches that overlap the end of their predecessor (programmatic dependent launch, compute capability 9 on).
#pragma once
#include "fewbit/launch.hpp"

namespace fewbit {

/** `launchOverlapped` with blocks in clusters of those extents, which divide the grid's (compute capability 9 on). */
template <class... Params, class... Args>
cudaError_t launchClusters(const Launch& launch, void (*kernel)(Params...), dim3 grid, dim3 cluster, int threads, size_t shared,
                           Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = launch.stream;
  cudaLaunchAttribute attributes[2] = {};
  if (launch.context->overlaps) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster.x * cluster.y * cluster.z > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster.x;
    attributes[config.numAttrs].val.clusterDim.y = cluster.y;
    attributes[config.numAttrs++].val.clusterDim.z = cluster.z;
  }
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

/**
 * Enqueues a kernel whose blocks may start while its predecessor in the stream still runs; graphs keep the edge. Every block of it
 * calls `awaitPredecessor` before it reads or writes what another kernel of the program writes or reads, and before it ends: the
 * kernels after it rely on that. Weights, constants and symbols may be read before. An ordinary launch where the code that runs is that
 * of a compute capability below 9, which has no such waiting.
 */
template <class... Params, class... Args>
cudaError_t launchOverlapped(const Launch& launch, void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                             Args... args) {
  return launchClusters(launch, kernel, grid, dim3(1), threads, shared, args...);
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

/**
 * Reads a kernel's parameter, so that the multiprocessor has it near. Each launch has parameters of its own, which otherwise arrive
 * line by line as they are asked for; before `awaitPredecessor` this costs nothing.
 */
template <class T>
__device__ __forceinline__ void touch(const T& parameter) {
  constexpr int kLine = 64;
  const char* bytes = reinterpret_cast<const char*>(&parameter);
  uint32_t all = 0u;
#pragma unroll
  for (int at = 0; at + 4 <= static_cast<int>(sizeof(T)); at += kLine) all ^= *reinterpret_cast<const uint32_t*>(bytes + at);
  asm volatile("" ::"r"(all));
}

}  // namespace fewbit
