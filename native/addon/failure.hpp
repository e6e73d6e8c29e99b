// CUDA errors as C++ exceptions; addon.cpp makes JavaScript errors of them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fewbit {

struct Failure : std::runtime_error {
  enum class Kind { error, memory, lost };

  Failure(Kind kind, std::string operation, const std::string& reason) : runtime_error(reason), kind(kind), operation(std::move(operation)) {}

  Kind kind;
  std::string operation;
  uint64_t needed = 0, limit = 0;  // bytes, for Kind::memory
};

/** What a status means. Whether an error is sticky is not in its number: another call is asked, and answers with it. */
inline Failure failure(cudaError_t status, std::string operation) {
  cudaGetLastError();
  const std::string reason = std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) return Failure(Failure::Kind::memory, std::move(operation), reason);
  // Without a driver or a device every call fails: nothing is lost.
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice) return Failure(Failure::Kind::error, std::move(operation), reason);
  const cudaError_t after = cudaFree(nullptr);
  const bool lost = after != cudaSuccess && after != cudaErrorStreamCaptureUnsupported;
  return Failure(lost ? Failure::Kind::lost : Failure::Kind::error, std::move(operation), reason);
}

inline void check(cudaError_t status, const char* operation) {
  if (status != cudaSuccess) throw failure(status, operation);
}

}  // namespace fewbit
