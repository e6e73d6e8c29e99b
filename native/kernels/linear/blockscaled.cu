// linear/blockscaled: x W^T of operands whose scales go by blocks along K, through cuBLASLt's block scaling (compute capability 10 on).
#include "gemm-finish.cuh"
#include "matmul.hpp"
#include "swizzle.hpp"

namespace fewbit::linear {
namespace {

/** Scale codes of one byte, one a block and row, into tiles; what pads those is zero. */
__global__ void __launch_bounds__(kThreads) swizzleScales(Blocks scale, int rows, uint8_t* out) {
  const int64_t padded = static_cast<int64_t>((scale.columns + 3) / 4) * 4;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < (rows + 127) / 128 * 128 * padded;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / padded, block = i % padded;
    const bool inside = row < rows && block < scale.columns;
    out[swizzledAt(row, block, scale.columns)] = inside ? scale.at[row * scale.columns + block] : 0;
  }
}

/** Scales of the second level, which do not change along K: one a row. */
__global__ void __launch_bounds__(kThreads) outerFactors(Blocks outer, int rows, float* out) {
  for (int row = blockIdx.x * kThreads + threadIdx.x; row < rows; row += gridDim.x * kThreads) out[row] = blockValue(outer, row, 0);
}

int blocksFor(int64_t count) { return static_cast<int>(std::min<int64_t>((count + kThreads - 1) / kThreads, 1024)); }

uint8_t* swizzled(const Launch& launch, Scratch& scratch, const Blocks& scale, int rows) {
  const int64_t bytes = swizzledBytes(rows, scale.columns);
  uint8_t* out = scratch.take(bytes);
  if (scratch.enough()) swizzleScales<<<blocksFor(bytes), kThreads, 0, launch.stream>>>(scale, rows, out);
  return out;
}

CublasLt::Type typeOfX(const Activations& x) { return x.bits == 4 ? CublasLt::kE2m1 : x.half ? CublasLt::kE5m2 : CublasLt::kE4m3; }
CublasLt::Type typeOfW(CodeKind kind) {
  return kind == CodeKind::e2m1 ? CublasLt::kE2m1 : kind == CodeKind::e5m2 ? CublasLt::kE5m2 : CublasLt::kE4m3;
}

cudaError_t run(const Launch& launch) {
  GemmParams p;
  Scratch scratch;
  if (!read(launch, p, scratch) || p.carrier != Carrier::blocks) return cudaErrorInvalidValue;
  const int rows = static_cast<int>(p.x.rows.at(launch.symbols));
  if (rows == 0) return cudaSuccess;
  if (rows > 65535) return cudaErrorInvalidConfiguration;

  Matmul product;
  product.typeX = typeOfX(p.x);
  product.typeW = typeOfW(p.kind);
  product.typeD = CublasLt::kF32;
  product.m = rows;
  product.n = p.n;
  product.k = p.k;
  const int codesOfByte = p.x.bits == 4 ? 2 : 1;
  product.strideX = p.x.stride * codesOfByte;
  product.strideW = p.rowBytes * codesOfByte;
  product.strideD = product.strideC = p.n;
  product.mode = p.x.scale[0].codec == ScaleCodec::e8m0 ? CublasLt::kBlocks32E8m0 : CublasLt::kBlocks16E4m3;
  product.x = p.x.at;
  product.scaleX = swizzled(launch, scratch, p.x.scale[0], rows);
  p.xFactor = reinterpret_cast<float*>(scratch.take(int64_t{4} * rows));
  p.wFactor = reinterpret_cast<float*>(scratch.take(int64_t{4} * p.parts * p.n));
  const uint8_t* scalesOfW[2] = {};
  for (int matrix = 0; matrix < p.parts; matrix++) scalesOfW[matrix] = swizzled(launch, scratch, p.weights[matrix].scale, p.n);
  p.products = reinterpret_cast<float*>(scratch.take(int64_t{4} * p.parts * rows * p.n));
  if (!scratch.enough()) return cudaErrorMemoryAllocation;

  outerFactors<<<blocksFor(rows), kThreads, 0, launch.stream>>>(p.x.scale[1], rows, p.xFactor);
  for (int matrix = 0; matrix < p.parts; matrix++) {
    outerFactors<<<blocksFor(p.n), kThreads, 0, launch.stream>>>(p.weights[matrix].outer, p.n, p.wFactor + int64_t(matrix) * p.n);
    product.w = p.weights[matrix].codes;
    product.scaleW = scalesOfW[matrix];
    product.d = p.products + int64_t(matrix) * rows * p.n;
    if (const cudaError_t error = matmul(launch, product)) return error;
  }
  launchFinish<false>(launch, p, true, rows);
  return cudaGetLastError();
}

}  // namespace
}  // namespace fewbit::linear

namespace fewbit {
extern const Entry kLinearBlockscaledEntries[];
extern const size_t kLinearBlockscaledEntryCount;
const Entry kLinearBlockscaledEntries[] = {{"linear/blockscaled", 1, linear::run}};
const size_t kLinearBlockscaledEntryCount = sizeof kLinearBlockscaledEntries / sizeof *kLinearBlockscaledEntries;
}  // namespace fewbit
