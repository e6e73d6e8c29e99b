// How cached keys and values become operands of matrix units: as bf16, which holds the codes of 8 bits, or as several parts of it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace fewbit::sdpa {

__device__ __forceinline__ uint32_t packBf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ float lowBf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float highBf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t fmaBf16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
/** Splits a pair into bf16 parts that sum to it, 8 bits each. */
template <int N>
__device__ __forceinline__ void split(float low, float high, uint32_t (&parts)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    parts[n] = packBf16(low, high);
    low -= lowBf16(parts[n]);
    high -= highBf16(parts[n]);
  }
}

__device__ __forceinline__ float fromE4m3(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

/** Elements 4n to 4n + 3 of a key as two pairs, as a codec that has no order of its own gives them. */
template <class C>
struct InOrder {
  /** Whether the pairs are elements {0, 2} and {1, 3}, for which codes of 8 bits need not be moved. */
  static constexpr bool kAlternate = false;
  template <class Grid, int N>
  static __device__ __forceinline__ void four(const uint32_t* k, int n, Grid grid, uint32_t (&b0)[N], uint32_t (&b1)[N]) {
    C::pair(k, k, 4 * n, 4 * n + 1, grid, grid, b0);
    C::pair(k, k, 4 * n + 2, 4 * n + 3, grid, grid, b1);
  }
};
/** The same for codes of 8 bits; `pairOf` reads the low halves of 16 bits. */
template <class C>
struct Alternate {
  static constexpr bool kAlternate = true;
  static __device__ __forceinline__ void four(const uint32_t* k, int n, float2, uint32_t (&b0)[1], uint32_t (&b1)[1]) {
    b0[0] = C::pairOf(k[n]);
    b1[0] = C::pairOf(k[n] >> 8);
  }
};

// How the bits of cached elements become bf16. `kBits` of an element, `kParts` that sum to it, bytes of scales and of zero points of
// a row. `pair(a, b, i, j, ...)` is element i of a and element j of b, as kParts pairs.

struct Bf16 : InOrder<Bf16> {
  static constexpr int kBits = 16, kParts = 1, kScale = 0, kZero = 0;
  static constexpr bool kNan = false;
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, float2, float2, uint32_t (&out)[1]) {
    out[0] = __byte_perm(a[i / 2], b[j / 2], (i & 1 ? 0x32 : 0x10) | (j & 1 ? 0x7600 : 0x5400));
  }
};
struct F16 : InOrder<F16> {
  static constexpr int kBits = 16, kParts = 2, kScale = 0, kZero = 0;
  static constexpr bool kNan = false;
  static __device__ float at(const uint32_t* a, int i) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(a[i / 2] >> (i & 1) * 16)));
  }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, float2, float2, uint32_t (&out)[2]) {
    split(at(a, i), at(b, j), out);
  }
};
struct F32 : InOrder<F32> {
  static constexpr int kBits = 32, kParts = 3, kScale = 0, kZero = 0;
  static constexpr bool kNan = false;
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, float2, float2, uint32_t (&out)[3]) {
    split(__uint_as_float(a[i]), __uint_as_float(b[j]), out);
  }
};
/** Bytes i of a and j of b in the low halves of 16 bits; the high halves hold anything. */
__device__ __forceinline__ uint32_t bytePair(const uint32_t* a, const uint32_t* b, int i, int j) {
  return __byte_perm(a[i / 4], b[j / 4], (i & 3) | (4 + (j & 3)) << 8);
}
/** int8 with one float32 scale a row. */
struct Int8 : Alternate<Int8> {
  static constexpr int kBits = 8, kParts = 1, kScale = 4, kZero = 0;
  static constexpr bool kNan = false;
  static __device__ __forceinline__ uint32_t pairOf(uint32_t x) {
    // The low seven bits make 128 + x mod 128; the sign makes what is subtracted 128 or 256.
    return fmaBf16((x & 0x00800080u) | 0x43004300u, 0xbf80bf80u, (x & 0x007f007fu) | 0x43004300u);
  }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, float2, float2, uint32_t (&out)[1]) {
    out[0] = pairOf(bytePair(a, b, i, j));
  }
};
/** e4m3 with one float32 scale a row. NaN comes out as 480: `nan` finds it in a word. */
struct E4m3 : Alternate<E4m3> {
  static constexpr int kBits = 8, kParts = 1, kScale = 4, kZero = 0;
  static constexpr bool kNan = true;
  static __device__ __forceinline__ uint32_t pairOf(uint32_t x) {
    // The same fields in bf16 stand for 2^-120 times the value, subnormal codes included.
    return fmaBf16((x << 8 & 0x80008000u) | (x << 4 & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
  }
  static __device__ bool nan(uint32_t word) { return (((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0; }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, float2, float2, uint32_t (&out)[1]) {
    out[0] = pairOf(bytePair(a, b, i, j));
  }
};
/** Unsigned 4 bits; a bf16 scale and a byte of zero point for every 32 elements. */
struct UInt4 : InOrder<UInt4> {
  static constexpr int kBits = 4, kParts = 2, kScale = 2, kZero = 1;
  static constexpr bool kNan = false;
  static __device__ float at(const uint32_t* a, int i, float2 scaleZero) {
    const float code = __uint_as_float(0x4b000000u | (a[i / 8] >> (i & 7) * 4 & 15u));
    return (code - (8388608.f + scaleZero.y)) * scaleZero.x;
  }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, float2 p, float2 r, uint32_t (&out)[2]) {
    split(at(a, i, p), at(b, j, r), out);
  }
};

}  // namespace fewbit::sdpa
