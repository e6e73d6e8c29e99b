// linear/gemm and linear/wgmma: x W^T for many rows of x, through cuBLASLt's tensor-core products or Hopper's own.
#include <algorithm>

#include "gemm-carriers.cuh"
#include "gemm-finish.cuh"
#include "matmul.hpp"
#include "wgmma.hpp"

namespace fewbit::linear {
namespace {

cudaError_t carryWeights(const Launch& launch, const GemmParams& p) {
  constexpr int perBlock = kThreads / 32;
  return withCodes(p.kind, [&](auto codes) {
    carryW<decltype(codes)><<<(p.parts * p.n + perBlock - 1) / perBlock, kThreads, 0, launch.stream>>>(p);
    return cudaGetLastError();
  });
}

CublasLt::Type typeOf(const GemmParams& p, bool ofX) {
  if (p.carrier == Carrier::bf16) return CublasLt::kBf16;
  if (p.carrier == Carrier::f16) return CublasLt::kF16;
  if (p.carrier == Carrier::s8 || p.kind == CodeKind::int8) return CublasLt::kS8;
  if (ofX) return p.x.bits == 16 ? CublasLt::kBf16 : p.x.half ? CublasLt::kE5m2 : CublasLt::kE4m3;
  return p.kind == CodeKind::bf16 ? CublasLt::kBf16 : p.kind == CodeKind::e5m2 ? CublasLt::kE5m2 : CublasLt::kE4m3;
}

/** One float32 a row of a matrix of `rows`, or one for all of it: what cuBLASLt applies itself. */
bool vectorScales(const Blocks& scale, int rows, bool& scalar) {
  scalar = scale.rows >= rows && rows > 1;
  return scale.codec == ScaleCodec::f32 && scale.columns == 1 && (scale.rows == 1 || scalar);
}

cudaError_t carryRows(const Launch& launch, const GemmParams& p, int rows) {
  const size_t shared = zeroColumns(p) > 0 ? size_t(p.columns) / 8 * 4 : 0;
  carryX<<<rows, kThreads, shared, launch.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t run(const Launch& launch) {
  GemmParams p;
  Scratch scratch;
  if (!read(launch, p, scratch)) return cudaErrorInvalidValue;
  const int rows = static_cast<int>(p.x.rows.at(launch.symbols));
  if (rows == 0) return cudaSuccess;
  if (rows > 65535) return cudaErrorInvalidConfiguration;

  const bool converts = p.carrier == Carrier::bf16 || p.carrier == Carrier::f16;
  const Epilogue& e = p.epilogue;
  const auto take = [&](int64_t bytes) { return scratch.take(bytes); };
  if (converts) p.xCarrier = take(int64_t{2} * p.xParts * rows * p.columns);
  if (converts) p.wCarrier = take(int64_t{2} * p.parts * p.wParts * p.n * p.columns);
  if (p.carrier == Carrier::s8) p.wCarrier = take(int64_t(p.parts) * p.n * p.columns);
  p.xFactor = reinterpret_cast<float*>(take(int64_t{4} * rows));
  p.wFactor = reinterpret_cast<float*>(take(int64_t{4} * p.parts * p.n));
  const bool integer = typeOf(p, true) == CublasLt::kS8;
  const bool unscaled = p.weights[0].scale.codec == ScaleCodec::none && p.x.scale[0].codec == ScaleCodec::none && !converts;

  Matmul product;
  product.typeX = typeOf(p, true);
  product.typeW = typeOf(p, false);
  product.typeD = integer ? CublasLt::kS32 : CublasLt::kF32;
  product.m = rows;
  product.n = p.n;
  product.k = p.carrier == Carrier::stored || p.carrier == Carrier::s8 ? p.k : p.columns;
  const int codeBytes = p.carrier == Carrier::stored && p.kind == CodeKind::bf16 ? 2 : 1;
  product.strideX = converts ? p.columns : p.x.stride / codeBytes;
  product.strideW = converts || p.carrier == Carrier::s8 ? p.columns : p.rowBytes / codeBytes;
  product.x = converts ? p.xCarrier : p.x.at;

  // The library may scale and store by itself: one matrix, float32 scales of rows or tensors, at most a residual to add.
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(launch.stream, &capturing)) return error;
  // A captured product has the rows of the largest run, and would store rows that a run does not have.
  const bool exactRows = capturing == cudaStreamCaptureStatusNone || p.x.rows.symbol < 0;
  const bool plain = exactRows && p.parts == 1 && e.bias[0] == nullptr && e.fn == Activation::none &&
                     e.rounding == Rounding::none;
  if (plain && p.carrier == Carrier::stored && !integer) {
    bool scalarX = false, scalarW = false, direct = unscaled;
    if (!unscaled && p.x.scale[1].codec == ScaleCodec::none && p.weights[0].outer.codec == ScaleCodec::none &&
        vectorScales(p.x.scale[0], rows, scalarX) && vectorScales(p.weights[0].scale, p.n, scalarW) && scalarX == scalarW) {
      product.scaleX = p.x.scale[0].at;
      product.scaleW = p.weights[0].scale.at;
      product.mode = scalarX ? CublasLt::kScalar : CublasLt::kOuterVector;
      direct = true;
    }
    if (direct) {
      product.w = p.weights[0].codes;
      product.d = e.out.at;
      product.strideD = e.out.stride;
      product.c = e.residual.at;
      product.strideC = e.residual.stride;
      const cudaError_t error = matmul(launch, product);
      if (error != cudaErrorNotSupported) return error;
      product.scaleX = product.scaleW = nullptr;
      product.c = nullptr;
    }
  }

  p.products = reinterpret_cast<float*>(take(int64_t{4} * p.parts * rows * p.n));
  if (!scratch.enough()) return cudaErrorMemoryAllocation;
  if (!unscaled) {
    cudaError_t error;
    if ((error = carryRows(launch, p, rows)) != cudaSuccess || (error = carryWeights(launch, p)) != cudaSuccess) return error;
  }
  product.strideD = p.n;
  product.strideC = p.n;
  for (int matrix = 0; matrix < p.parts; matrix++) {
    product.d = p.products + int64_t(matrix) * rows * p.n;
    product.c = nullptr;
    // The smallest products first: what they round is rounded away least.
    const int most = p.xParts == 1 || p.wParts == 1 ? 2 : p.carrier == Carrier::f16 ? 1 : 2;
    for (int order = most; order >= 0; order--) {
      for (int part = 0; part < p.xParts; part++) {
        const int other = order - part;
        if (other < 0 || other >= p.wParts) continue;
        if (converts) {
          product.x = p.xCarrier + int64_t{2} * part * rows * p.columns;
          product.w = p.wCarrier + int64_t{2} * (int64_t(matrix) * p.wParts + other) * p.n * p.columns;
        } else {
          product.w = p.carrier == Carrier::s8 ? p.wCarrier + int64_t(matrix) * p.n * p.columns : p.weights[matrix].codes;
        }
        const cudaError_t error = matmul(launch, product);
        if (error != cudaSuccess) return error;
        product.c = product.d;
      }
    }
  }
  if (integer) launchFinish<true>(launch, p, !unscaled, rows);
  else launchFinish<false>(launch, p, !unscaled, rows);
  return cudaGetLastError();
}

/** One product that is finished where its sums are; only operands that the tensor cores do not take as they lie are converted. */
cudaError_t runHopper(const Launch& launch) {
  GemmParams p;
  Scratch scratch;
  if (!read(launch, p, scratch) || p.xParts * p.wParts != 1) return cudaErrorInvalidValue;
  const int rows = static_cast<int>(p.x.rows.at(launch.symbols));
  if (rows == 0) return cudaSuccess;

  const bool bf16 = p.carrier == Carrier::bf16, f16 = p.carrier == Carrier::f16;
  const bool bf16X = p.x.bits == 16 && !p.x.half && p.x.scale[0].codec == ScaleCodec::none;
  const bool carriesX = f16 || (bf16 && !bf16X);
  const bool carriesW = f16 || p.carrier == Carrier::s8 || (bf16 && (p.kind != CodeKind::bf16 || p.scaledW));
  const int bytesW = p.carrier == Carrier::s8 ? 1 : 2;
  if (carriesX) p.xCarrier = scratch.take(int64_t{2} * rows * p.columns);
  if (carriesW) p.wCarrier = scratch.take(int64_t(bytesW) * p.parts * p.n * p.columns);
  if (carriesX) p.xFactor = reinterpret_cast<float*>(scratch.take(int64_t{4} * rows));
  if (carriesW) p.wFactor = reinterpret_cast<float*>(scratch.take(int64_t{4} * p.parts * p.n));
  if (!scratch.enough()) return cudaErrorMemoryAllocation;
  cudaError_t error;
  if (carriesX && (error = carryRows(launch, p, rows)) != cudaSuccess) return error;
  if (carriesW && (error = carryWeights(launch, p)) != cudaSuccess) return error;

  Product product;
  product.typeX = typeOf(p, true);
  product.typeW = typeOf(p, false);
  product.parts = p.parts;
  product.n = p.n;
  product.k = carriesX && carriesW ? p.columns : p.k;
  product.rows = p.x.rows;
  product.epilogue = p.epilogue;
  product.x = carriesX ? p.xCarrier : p.x.at;
  product.strideX = carriesX ? int64_t{2} * p.columns : p.x.stride;
  product.strideW = carriesW ? int64_t(bytesW) * p.columns : p.rowBytes;
  product.constant = !carriesW;
  const auto factors = [](const float* at) {
    Blocks blocks;
    blocks.at = reinterpret_cast<const uint8_t*>(at);
    blocks.codec = ScaleCodec::f32;
    return blocks;
  };
  if (carriesX) product.scaleX[0] = factors(p.xFactor);
  else std::copy_n(p.x.scale, 2, product.scaleX);
  for (int part = 0; part < p.parts; part++) {
    const Weights& w = p.weights[part];
    product.w[part] = carriesW ? p.wCarrier + int64_t(bytesW) * part * p.n * p.columns : w.codes;
    product.scaleW[part][0] = carriesW ? factors(p.wFactor + int64_t(part) * p.n) : w.scale;
    if (!carriesW) product.scaleW[part][1] = w.outer;
  }
  return product.typeX == CublasLt::kS8      ? productS8(launch, product)
         : bf16 || f16 || p.x.bits == 16     ? product16(launch, product)
                                             : product8(launch, product);
}

}  // namespace
}  // namespace fewbit::linear

namespace fewbit {
extern const Entry kLinearGemmEntries[];
extern const size_t kLinearGemmEntryCount;
const Entry kLinearGemmEntries[] = {{"linear/gemm", 3, linear::run}, {"linear/wgmma", 2, linear::runHopper}};
const size_t kLinearGemmEntryCount = sizeof kLinearGemmEntries / sizeof *kLinearGemmEntries;
}  // namespace fewbit
