// The part of cuBLASLt that kernels use, found at run time: own declarations, so that neither building nor loading needs it.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fewbit {

/** Functions of libcublasLt, and a handle. All status results are 0 for success. */
struct CublasLt {
  using Status = int;
  using Handle = struct HandleTag*;
  using Desc = struct DescTag*;
  using Layout = struct LayoutTag*;
  using Preference = struct PreferenceTag*;
  struct Algorithm {
    uint64_t data[8];
  };
  struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
  };

  // Values of cublasLt.h, cublas_api.h and library_types.h, which never change.
  enum Type : int { kF32 = 0, kF16 = 2, kS8 = 3, kS32 = 10, kBf16 = 14, kE4m3 = 28, kE5m2 = 29, kE2m1 = 33 };
  enum Compute : int { kCompute32F = 68, kCompute32I = 72 };
  enum DescAttribute : int {
    kTransA = 3,
    kTransB = 4,
    kScalePointerA = 17,
    kScalePointerB = 18,
    kFastAccum = 25,
    kScaleModeA = 31,
    kScaleModeB = 32,
  };
  enum ScaleMode : int { kScalar = 0, kBlocks16E4m3 = 1, kBlocks32E8m0 = 2, kOuterVector = 3 };
  enum PreferenceAttribute : int { kMaxWorkspace = 1, kMinAlignA = 5, kMinAlignB = 6, kMinAlignC = 7, kMinAlignD = 8 };

  Handle handle = nullptr;
  size_t version = 0;

  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  size_t (*getVersion)();
  Status (*descCreate)(Desc*, Compute, Type scale);
  Status (*descDestroy)(Desc);
  Status (*descSet)(Desc, DescAttribute, const void*, size_t);
  Status (*layoutCreate)(Layout*, Type, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*layoutDestroy)(Layout);
  Status (*preferenceCreate)(Preference*);
  Status (*preferenceDestroy)(Preference);
  Status (*preferenceSet)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*heuristic)(Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, Heuristic*, int* found);
  Status (*matmul)(Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                   const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t bytes, cudaStream_t);
};

/** The library with a handle on the current device, or null with the reason in words. Lives as long as the process. */
const CublasLt* loadCublasLt(const char** reason = nullptr);

}  // namespace fewbit
