// The seam between the addon and kernels: a kernel is a host function that enqueues work on a stream.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fewbit {

struct CublasLt;  // cublaslt.hpp: the functions of a cuBLASLt found at run time, or null

/** A device as kernels see it; one per addon device, alive as long as its programs. */
struct Context {
  int device = 0;
  int sms = 0;
  int major = 0, minor = 0;
  size_t sharedPerBlock = 0;  // the opt-in maximum
  bool overlaps = false;      // the code that runs on it is of 9.0 or newer: it waits for predecessors (overlap.cuh), and blocks form clusters
  const CublasLt* blas = nullptr;
  void* workspace = nullptr;  // for cuBLASLt, on this context's stream only
  size_t workspaceBytes = 0;
};

/** One dispatch of a program. Pointers are valid during the call; buffers and deviceSymbols as long as the program. */
struct Launch {
  const Context* context = nullptr;
  void* const* buffers = nullptr;  // device pointers, in the order of the dispatch's bindings
  const uint64_t* sizes = nullptr;  // bytes of each
  int bufferCount = 0;
  const int64_t* args = nullptr;  // the static integers that the kernel's row in TypeScript wrote
  int argCount = 0;
  const uint32_t* symbols = nullptr;  // host: this run's values; while a graph is captured, the largest of its bucket (for grids)
  const uint32_t* deviceSymbols = nullptr;  // device: this run's values; kernels read extents from here
  cudaStream_t stream = nullptr;
};

/** A kernel that TypeScript's table can name. `abi` grows when the meaning of bindings or args changes. */
struct Entry {
  const char* name;
  uint32_t abi;
  cudaError_t (*run)(const Launch&);
};

/** An extent coefficient * symbols[symbol], or the coefficient alone when symbol is negative: two args. */
struct Extent {
  int64_t coefficient;
  int64_t symbol;
  __host__ __device__ int64_t at(const uint32_t* symbols) const {
    return symbol < 0 ? coefficient : coefficient * static_cast<int64_t>(symbols[symbol]);
  }
};

}  // namespace fewbit
