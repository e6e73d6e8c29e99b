// D = X W^T through cuBLASLt: both operands row-major with K innermost.
#pragma once
#include "fewbit/cublaslt.hpp"
#include "fewbit/launch.hpp"

namespace fewbit::linear {

struct Matmul {
  CublasLt::Type typeX, typeW, typeD;  // D is f32, or s32 for s8 operands
  int64_t m, n, k;
  const void *x, *w;
  void* d;
  int64_t strideX, strideW, strideD;  // elements
  /** D = X W^T + C; C may be D. */
  const void* c = nullptr;
  int64_t strideC = 0;
  /**
   * float32 scales that multiply the result: one each (`kScalar`) or one a row of x and of W (`kOuterVector`); or one code for each
   * block along K, swizzled (swizzle.hpp).
   */
  const void *scaleX = nullptr, *scaleW = nullptr;
  CublasLt::ScaleMode mode = CublasLt::kScalar;
};

/** Enqueues it. cudaErrorNotSupported when the library has no algorithm for it. */
cudaError_t matmul(const Launch& launch, const Matmul& product);

}  // namespace fewbit::linear
