// The warpgroup products of mixed.cuh: d[64 x N] (+)= a[64 x 16] b[N x 16]^T, bf16, a in registers, b in swizzled shared memory.
#pragma once
#include "sdpa/hopper.cuh"

#ifdef FEWBIT_HOPPER
namespace fewbit::linear {

#define FEWBIT_MIXED_PRODUCT(columns, registers, outputs, a0, a1, a2, a3, at, add)                                        \
  __device__ __forceinline__ void product(float (&d)[columns / 2], const uint32_t* a, uint64_t b, int accumulates) {    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns             \
                 "k16.f32.bf16.bf16 {" registers "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " at ", p, 1, 1, 0;\n}"            \
                 : outputs                                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulates));                               \
  }
#define FEWBIT_MIXED_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FEWBIT_MIXED_R16 FEWBIT_MIXED_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FEWBIT_MIXED_R32 \
  FEWBIT_MIXED_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FEWBIT_MIXED_R64                                                                                   \
  FEWBIT_MIXED_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                   "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FEWBIT_MIXED_D16(d, i) FEWBIT_D8(d, i), FEWBIT_D8(d, i + 8)
#define FEWBIT_MIXED_D32(d, i) FEWBIT_MIXED_D16(d, i), FEWBIT_MIXED_D16(d, i + 16)
#define FEWBIT_MIXED_D64(d) FEWBIT_MIXED_D32(d, 0), FEWBIT_MIXED_D32(d, 32)
FEWBIT_MIXED_PRODUCT(16, FEWBIT_MIXED_R8, FEWBIT_D8(d, 0), "%8", "%9", "%10", "%11", "%12", "%13")
FEWBIT_MIXED_PRODUCT(32, FEWBIT_MIXED_R16, FEWBIT_MIXED_D16(d, 0), "%16", "%17", "%18", "%19", "%20", "%21")
FEWBIT_MIXED_PRODUCT(64, FEWBIT_MIXED_R32, FEWBIT_MIXED_D32(d, 0), "%32", "%33", "%34", "%35", "%36", "%37")
FEWBIT_MIXED_PRODUCT(128, FEWBIT_MIXED_R64, FEWBIT_MIXED_D64(d), "%64", "%65", "%66", "%67", "%68", "%69")

/** Describes N rows of 16 bytes side by side, not swizzled, as columns of 16 elements: the last eight are the first again. */
__device__ __forceinline__ uint64_t sumsTile(const void* at) {
  constexpr uint64_t groupBytes = 8 * 16;  // from eight rows to the next eight; from eight elements to the next none
  return static_cast<uint64_t>((hopper::shared(at) & 0x3ffff) >> 4) | (groupBytes >> 4) << 32;
}

}  // namespace fewbit::linear
#endif
