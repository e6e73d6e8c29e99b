// The warpgroup products that linears use: d[64 x N] (+)= a[64 x 32 bytes] b[N x 32 bytes]^T, both in swizzled shared memory.
#pragma once
#include "sdpa/hopper.cuh"

namespace fewbit::linear {

#define FEWBIT_R8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define FEWBIT_R32                                                                                     \
  FEWBIT_R8(0, 1, 2, 3, 4, 5, 6, 7) ", " FEWBIT_R8(8, 9, 10, 11, 12, 13, 14, 15) ", "                  \
  FEWBIT_R8(16, 17, 18, 19, 20, 21, 22, 23) ", " FEWBIT_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define FEWBIT_R64                                                                                     \
  FEWBIT_R32 ", "                                                                                      \
  FEWBIT_R8(32, 33, 34, 35, 36, 37, 38, 39) ", " FEWBIT_R8(40, 41, 42, 43, 44, 45, 46, 47) ", "        \
  FEWBIT_R8(48, 49, 50, 51, 52, 53, 54, 55) ", " FEWBIT_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define FEWBIT_R128                                                                                    \
  FEWBIT_R64 ", " FEWBIT_R8(64, 65, 66, 67, 68, 69, 70, 71) ", "                                       \
  FEWBIT_R8(72, 73, 74, 75, 76, 77, 78, 79) ", " FEWBIT_R8(80, 81, 82, 83, 84, 85, 86, 87) ", "        \
  FEWBIT_R8(88, 89, 90, 91, 92, 93, 94, 95) ", " FEWBIT_R8(96, 97, 98, 99, 100, 101, 102, 103) ", "    \
  FEWBIT_R8(104, 105, 106, 107, 108, 109, 110, 111) ", "                                               \
  FEWBIT_R8(112, 113, 114, 115, 116, 117, 118, 119) ", " FEWBIT_R8(120, 121, 122, 123, 124, 125, 126, 127)
#define FEWBIT_W8(c, d, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define FEWBIT_W32(c, d, i) FEWBIT_W8(c, d, i), FEWBIT_W8(c, d, i + 8), FEWBIT_W8(c, d, i + 16), FEWBIT_W8(c, d, i + 24)
#define FEWBIT_W64(c, d, i) FEWBIT_W32(c, d, i), FEWBIT_W32(c, d, i + 32)
#define FEWBIT_W128(c, d, i) FEWBIT_W64(c, d, i), FEWBIT_W64(c, d, i + 64)

/** A product of so many sums a thread, for so many columns; operands are numbered behind the sums. */
#define FEWBIT_PRODUCT(Accumulator, constraint, sums, columns, registers, words, a_, b_, add_, k, types, flags)        \
    __device__ __forceinline__ static void product(Accumulator (&d)[sums], uint64_t a, uint64_t b, int add) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns k types  \
                   " {" registers "}, " a_ ", " b_ ", p" flags ";\n}"                                                  \
                   : words(constraint, d, 0)                                                                           \
                   : "l"(a), "l"(b), "r"(add));                                                                        \
    }
/** A unit: its accumulators' type, bytes of an element, and its product for N = 256, 128 and 64. */
#define FEWBIT_UNIT(Name, Accumulator, constraint, bytes, k, types, flags)                                             \
  struct Name {                                                                                                        \
    using Value = Accumulator;                                                                                         \
    static constexpr int elementBytes = bytes;                                                                         \
    FEWBIT_PRODUCT(Accumulator, constraint, 128, "256", FEWBIT_R128, FEWBIT_W128, "%128", "%129", "%130", k, types, flags) \
    FEWBIT_PRODUCT(Accumulator, constraint, 64, "128", FEWBIT_R64, FEWBIT_W64, "%64", "%65", "%66", k, types, flags)   \
    FEWBIT_PRODUCT(Accumulator, constraint, 32, "64", FEWBIT_R32, FEWBIT_W32, "%32", "%33", "%34", k, types, flags)    \
  };
#define FEWBIT_REAL(x) "+f"(x)
#define FEWBIT_WHOLE(x) "+r"(x)

#ifdef FEWBIT_HOPPER
#define FEWBIT_UNIT_16(Name, type) FEWBIT_UNIT(Name, float, FEWBIT_REAL, 2, "k16.f32.", type "." type, ", 1, 1, 0, 0")
#define FEWBIT_UNIT_8(Name, types) FEWBIT_UNIT(Name, float, FEWBIT_REAL, 1, "k32.f32.", types, ", 1, 1")
#define FEWBIT_UNIT_S8(Name) FEWBIT_UNIT(Name, uint32_t, FEWBIT_WHOLE, 1, "k32.s32.", "s8.s8", "")
#else
#define FEWBIT_UNIT_NONE(Name, Accumulator, bytes)  \
  struct Name {                                     \
    using Value = Accumulator;                      \
    static constexpr int elementBytes = bytes;      \
  };
#define FEWBIT_UNIT_16(Name, type) FEWBIT_UNIT_NONE(Name, float, 2)
#define FEWBIT_UNIT_8(Name, types) FEWBIT_UNIT_NONE(Name, float, 1)
#define FEWBIT_UNIT_S8(Name) FEWBIT_UNIT_NONE(Name, uint32_t, 1)
#endif

}  // namespace fewbit::linear
