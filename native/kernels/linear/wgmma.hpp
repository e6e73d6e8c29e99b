// X W^T by Hopper's warpgroup products, finished before it is stored. Compute capability 9.0 alone.
#pragma once
#include "fewbit/cublaslt.hpp"
#include "operands.cuh"

namespace fewbit::linear {

/** Operands as the tensor cores take them, row-major with K innermost; rows start on 16 bytes. */
struct Product {
  CublasLt::Type typeX, typeW;  // bf16 or f16 both, s8 both, or float8
  const void* x = nullptr;
  const void* w[2] = {nullptr, nullptr};  // one matrix, or [gate, up]
  int64_t strideX = 0, strideW = 0;       // bytes
  bool constant = false;                  // W and its scales: no kernel of the program writes them
  int parts = 1;
  int n = 0, k = 0;
  Extent rows;
  /** Factors of a row of x and of a row of each matrix, in two levels; nothing changes along K. */
  Blocks scaleX[2], scaleW[2][2];
  Epilogue epilogue;
};

/** Enqueues it. Sums are those of the tensor cores over all of K: float32, or exact int32. */
cudaError_t product16(const Launch& launch, const Product& product);
cudaError_t product8(const Launch& launch, const Product& product);
cudaError_t productS8(const Launch& launch, const Product& product);

}  // namespace fewbit::linear
