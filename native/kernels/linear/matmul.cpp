#include "matmul.hpp"

#include <array>
#include <map>
#include <mutex>

namespace fewbit::linear {
namespace {

/** Descriptors of one product, released together. */
struct Descriptors {
  const CublasLt& blas;
  CublasLt::Desc desc = nullptr;
  CublasLt::Layout w = nullptr, x = nullptr, c = nullptr, d = nullptr;
  CublasLt::Preference preference = nullptr;

  explicit Descriptors(const CublasLt& blas) : blas(blas) {}
  ~Descriptors() {
    if (desc != nullptr) blas.descDestroy(desc);
    for (CublasLt::Layout layout : {w, x, c, d})
      if (layout != nullptr) blas.layoutDestroy(layout);
    if (preference != nullptr) blas.preferenceDestroy(preference);
  }
  Descriptors(const Descriptors&) = delete;
  Descriptors& operator=(const Descriptors&) = delete;
};

template <class Value>
bool set(const CublasLt& blas, CublasLt::Desc desc, CublasLt::DescAttribute attribute, Value value) {
  return blas.descSet(desc, attribute, &value, sizeof value) == 0;
}

/** The largest power of two up to 16 that divides an address and the bytes of a stride. */
uint32_t alignment(const void* at, int64_t strideBytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(at) | static_cast<uint64_t>(strideBytes) | 16;
  return static_cast<uint32_t>(bits & -bits);
}

int64_t bytesOf(CublasLt::Type type) {
  switch (type) {
    case CublasLt::kF32:
    case CublasLt::kS32:
      return 4;
    case CublasLt::kF16:
    case CublasLt::kBf16:
      return 2;
    default:  // two codes of e2m1 a byte: rows start on 16 bytes either way
      return 1;
  }
}

using Key = std::array<int64_t, 18>;
std::mutex mutex;
std::map<Key, CublasLt::Heuristic>& algorithms() {
  static auto* known = new std::map<Key, CublasLt::Heuristic>;
  return *known;
}

}  // namespace

cudaError_t matmul(const Launch& launch, const Matmul& p) {
  const CublasLt* blas = launch.context->blas;
  if (blas == nullptr) return cudaErrorNotSupported;
  const bool integer = p.typeX == CublasLt::kS8;
  const CublasLt::Type scaleType = integer ? CublasLt::kS32 : CublasLt::kF32;
  Descriptors d(*blas);
  // In its column-major terms: D^T [n, m] = W^T^T [n, k] X^T [k, m].
  bool made = blas->descCreate(&d.desc, integer ? CublasLt::kCompute32I : CublasLt::kCompute32F, scaleType) == 0 &&
              set(*blas, d.desc, CublasLt::kTransA, int32_t{1}) && set(*blas, d.desc, CublasLt::kTransB, int32_t{0}) &&
              blas->layoutCreate(&d.w, p.typeW, p.k, p.n, p.strideW) == 0 &&
              blas->layoutCreate(&d.x, p.typeX, p.k, p.m, p.strideX) == 0 &&
              blas->layoutCreate(&d.c, p.typeD, p.n, p.m, p.c == nullptr ? p.strideD : p.strideC) == 0 &&
              blas->layoutCreate(&d.d, p.typeD, p.n, p.m, p.strideD) == 0;
  if (made && p.scaleX != nullptr) {
    made = set(*blas, d.desc, CublasLt::kScalePointerA, p.scaleW) && set(*blas, d.desc, CublasLt::kScalePointerB, p.scaleX);
    if (made && p.mode != CublasLt::kScalar)
      made = set(*blas, d.desc, CublasLt::kScaleModeA, int32_t{p.mode}) &&
             set(*blas, d.desc, CublasLt::kScaleModeB, int32_t{p.mode});
    if (!made) return cudaErrorNotSupported;  // an older library without this mode
  }
  // Rows of the table take float8 operands only where the step declares short sums.
  const bool blocks = p.mode == CublasLt::kBlocks16E4m3 || p.mode == CublasLt::kBlocks32E8m0;
  if (made && bytesOf(p.typeX) == 1 && !integer && !blocks) made = set(*blas, d.desc, CublasLt::kFastAccum, int8_t{1});
  if (!made) return cudaErrorUnknown;

  const void* c = p.c == nullptr ? p.d : p.c;
  const int64_t strideC = p.c == nullptr ? p.strideD : p.strideC;
  const int64_t bytesD = bytesOf(p.typeD);
  const uint32_t alignW = alignment(p.w, p.strideW * bytesOf(p.typeW)), alignX = alignment(p.x, p.strideX * bytesOf(p.typeX));
  const uint32_t alignC = alignment(c, strideC * bytesD), alignD = alignment(p.d, p.strideD * bytesD);
  const Key key = {launch.context->device, p.typeX, p.typeW, p.typeD, p.m,    p.n,    p.k,    p.strideX, p.strideW,
                   p.strideD,              strideC, p.c != nullptr, p.scaleX != nullptr, p.mode, alignW, alignX,
                   alignC,                 alignD};
  CublasLt::Heuristic best;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = algorithms().find(key);
    if (known != algorithms().end()) {
      best = known->second;
    } else {
      int found = 0;
      const auto prefer = [&](CublasLt::PreferenceAttribute attribute, auto value) {
        return blas->preferenceSet(d.preference, attribute, &value, sizeof value) == 0;
      };
      const bool asked = blas->preferenceCreate(&d.preference) == 0 &&
                         prefer(CublasLt::kMaxWorkspace, uint64_t{launch.context->workspaceBytes}) &&
                         prefer(CublasLt::kMinAlignA, alignW) && prefer(CublasLt::kMinAlignB, alignX) &&
                         prefer(CublasLt::kMinAlignC, alignC) && prefer(CublasLt::kMinAlignD, alignD);
      if (!asked) return cudaErrorUnknown;
      if (blas->heuristic(blas->handle, d.desc, d.w, d.x, d.c, d.d, d.preference, 1, &best, &found) != 0 || found == 0)
        return cudaErrorNotSupported;
      algorithms().emplace(key, best);
    }
  }
  const float alphaReal = 1.0f, betaReal = p.c == nullptr ? 0.0f : 1.0f;
  const int32_t alphaInteger = 1, betaInteger = p.c == nullptr ? 0 : 1;
  const void* alpha = integer ? static_cast<const void*>(&alphaInteger) : &alphaReal;
  const void* beta = integer ? static_cast<const void*>(&betaInteger) : &betaReal;
  const int status = blas->matmul(blas->handle, d.desc, alpha, p.w, d.w, p.x, d.x, beta, c, d.c, p.d, d.d, &best.algorithm,
                                  launch.context->workspace, launch.context->workspaceBytes, launch.stream);
  return status == 0 ? cudaGetLastError() : cudaErrorLaunchFailure;
}

}  // namespace fewbit::linear
