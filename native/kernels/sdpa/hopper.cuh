// Hopper's asynchronous units as attention uses them: barriers in shared memory, tensor copies, warpgroup matrix products.
// Source: PTX ISA 8.0, "Asynchronous warpgroup level matrix instructions" and "cp.async.bulk.tensor".
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FEWBIT_HOPPER 1
#endif

namespace fewbit::hopper {

/** Fills `map` for a tensor of 2-byte or 1-byte elements with boxes of 128 bytes x rows, swizzled by 128 bytes; strides in bytes. */
inline cudaError_t tensorMap(CUtensorMap* map, const void* base, int elementBytes, uint64_t size, uint64_t rows,
                             uint64_t rowStride, uint64_t planes, uint64_t planeStride, uint32_t boxRows) {
  // Found at run time, so that the addon loads where there is no driver.
  static void* encode = nullptr;
  if (encode == nullptr) {
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  }
  const cuuint64_t extents[3] = {size, rows, planes};
  const cuuint64_t strides[2] = {rowStride, planeStride};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(128 / elementBytes), boxRows, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUtensorMapDataType type = elementBytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, type, 3, const_cast<void*>(base), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#ifdef FEWBIT_HOPPER

__device__ __forceinline__ uint32_t shared(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void barrierInit(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(barrier)), "r"(count));
}
__device__ __forceinline__ void barrierExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(barrier)) : "memory");
}
__device__ __forceinline__ void barrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
          shared(barrier)),
      "r"(parity)
      : "memory");
}
/** Barriers of warps, for two warpgroups that take turns. */
__device__ __forceinline__ void turnWait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void turnPass(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/** Makes shared memory written by ordinary stores visible to the matrix and copy units. */
__device__ __forceinline__ void fenceShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void load(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int row, int plane) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared(to)),
      "l"(map), "r"(shared(barrier)), "r"(column), "r"(row), "r"(plane)
      : "memory");
}
/** Copies bytes that lie in one piece: addresses and their number are multiples of 16. */
__device__ __forceinline__ void loadBytes(void* to, const void* from, uint64_t* barrier, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared(to)), "l"(from),
               "r"(bytes), "r"(shared(barrier))
               : "memory");
}

/**
 * Describes a tile whose rows are 128 swizzled bytes: `stride` bytes from eight rows to the next eight; `leading` bytes between
 * blocks of 64 columns, which only a transposed operand reads.
 */
__device__ __forceinline__ uint64_t tile(const void* at, uint32_t leading = 16, uint32_t stride = 1024) {
  return static_cast<uint64_t>((shared(at) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void productFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void productCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left>
__device__ __forceinline__ void productWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
/** Keeps the compiler from moving accumulators across asynchronous products. */
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

#define FEWBIT_D64                                                                                                         \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "   \
  "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "    \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define FEWBIT_D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FEWBIT_OUT64(d) \
  FEWBIT_D8(d, 0), FEWBIT_D8(d, 8), FEWBIT_D8(d, 16), FEWBIT_D8(d, 24), FEWBIT_D8(d, 32), FEWBIT_D8(d, 40), FEWBIT_D8(d, 48), FEWBIT_D8(d, 56)

/** d[64 x 128] (+)= a[64 x 16] b[128 x 16]^T, bf16, both in shared memory. */
__device__ __forceinline__ void productBf16(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " FEWBIT_D64 ", %64, %65, p, 1, 1, 0, 0;\n}"
               : FEWBIT_OUT64(d)
               : "l"(a), "l"(b), "r"(add));
}
/** d[64 x 128] (+)= a[64 x 16] b[16 x 128], bf16, a in registers, b with its 128 columns along memory. */
__device__ __forceinline__ void productBf16(float (&d)[64], const uint32_t* a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " FEWBIT_D64 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
               : FEWBIT_OUT64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
/** d[64 x 128] (+)= a[64 x 32] b[128 x 32]^T, e4m3, a in registers. */
__device__ __forceinline__ void productE4m3(float (&d)[64], const uint32_t* a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " FEWBIT_D64 ", {%64, %65, %66, %67}, %68, p, 1, 1;\n}"
               : FEWBIT_OUT64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ __forceinline__ uint32_t packBf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
/** Four values as e4m3 bytes, lowest first. */
__device__ __forceinline__ uint32_t packE4m3(float a, float b, float c, float d) {
  uint32_t out;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(out)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return out;
}
__device__ __forceinline__ float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

}  // namespace fewbit::hopper
