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
/** (x & mask) | base, in one instruction. */
__device__ __forceinline__ uint32_t masked(uint32_t x, uint32_t mask, uint32_t base) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "r"(mask), "r"(base));
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
  template <int N>
  static __device__ __forceinline__ void four(const uint32_t* k, int n, uint32_t (&b0)[N], uint32_t (&b1)[N]) {
    C::pair(k, k, 4 * n, 4 * n + 1, b0);
    C::pair(k, k, 4 * n + 2, 4 * n + 3, b1);
  }
};

// How the bits of cached elements become bf16. `kWarps` of a block that streams them: more where they take more instructions. `kBits` of an element, `kParts` that sum to it, bytes of scales and of zero points of
// a row. `pair(a, b, i, j, out)` is element i of a and element j of b, as kParts pairs.

struct Bf16 : InOrder<Bf16> {
  static constexpr int kBits = 16, kParts = 1, kScale = 0, kZero = 0, kWarps = 8;
  static constexpr bool kNan = false;
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[1]) {
    out[0] = __byte_perm(a[i / 2], b[j / 2], (i & 1 ? 0x32 : 0x10) | (j & 1 ? 0x7600 : 0x5400));
  }
};
struct F16 : InOrder<F16> {
  static constexpr int kBits = 16, kParts = 2, kScale = 0, kZero = 0, kWarps = 8;
  static constexpr bool kNan = false;
  static __device__ float at(const uint32_t* a, int i) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(a[i / 2] >> (i & 1) * 16)));
  }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[2]) {
    split(at(a, i), at(b, j), out);
  }
};
struct F32 : InOrder<F32> {
  static constexpr int kBits = 32, kParts = 3, kScale = 0, kZero = 0, kWarps = 8;
  static constexpr bool kNan = false;
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[3]) {
    split(__uint_as_float(a[i]), __uint_as_float(b[j]), out);
  }
};
/** int8 with one float32 scale a row. */
struct Int8 {
  static constexpr int kBits = 8, kParts = 1, kScale = 4, kZero = 0, kWarps = 8;
  static constexpr bool kNan = false, kAlternate = true;
  /** Codes in the low halves of 16 bits. */
  static __device__ __forceinline__ uint32_t pairOf(uint32_t x) {
    // The low seven bits make 128 + x mod 128; the sign makes what is subtracted 128 or 256.
    return fmaBf16(masked(x, 0x00800080u, 0x43004300u), 0xbf80bf80u, masked(x, 0x007f007fu, 0x43004300u));
  }
  static __device__ __forceinline__ void four(const uint32_t* k, int n, uint32_t (&b0)[1], uint32_t (&b1)[1]) {
    b0[0] = pairOf(k[n]);
    b1[0] = pairOf(k[n] >> 8);
  }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[1]) {
    out[0] = pairOf(__byte_perm(a[i / 4], b[j / 4], (i & 3) | (4 + (j & 3)) << 8));
  }
};
/** e4m3 with one float32 scale a row. NaN comes out as 480: `nan` finds it in a word. */
struct E4m3 {
  static constexpr int kBits = 8, kParts = 1, kScale = 4, kZero = 0, kWarps = 12;
  static constexpr bool kNan = true, kAlternate = true;
  /** Codes in the high halves of 16 bits. */
  static __device__ __forceinline__ uint32_t pairOf(uint32_t x) {
    // The same fields in bf16 stand for 2^-120 times the value, subnormal codes included.
    return fmaBf16(masked(x >> 4, 0x07f007f0u, x & 0x80008000u), 0x7b807b80u, 0x80008000u);
  }
  static __device__ __forceinline__ void four(const uint32_t* k, int n, uint32_t (&b0)[1], uint32_t (&b1)[1]) {
    b0[0] = pairOf(k[n] << 8);
    b1[0] = pairOf(k[n]);
  }
  static __device__ bool nan(uint32_t word) { return (((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0; }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[1]) {
    out[0] = pairOf(__byte_perm(a[i / 4], b[j / 4], (i & 3) << 4 | (4 + (j & 3)) << 12));
  }
};
/** Unsigned 4 bits; a bf16 scale and a byte of zero point for every 32 elements. What the scale multiplies is exact in bf16. */
struct UInt4 {
  static constexpr int kBits = 4, kParts = 1, kScale = 2, kZero = 1, kWarps = 12;
  static constexpr bool kNan = false, kAlternate = false;
  /** Codes i of both halves of x less a zero point each. */
  static __device__ __forceinline__ uint32_t pairOf(uint32_t x, int i, uint32_t minusZeros) {
    const uint32_t codes = fmaBf16(masked(x >> 4 * i, 0x000f000fu, 0x43004300u), 0x3f803f80u, 0xc300c300u);
    return fmaBf16(codes, 0x3f803f80u, minusZeros);
  }
  static __device__ __forceinline__ uint32_t minus(uint32_t a, uint32_t b) {
    const float minusA = 8388608.f - __uint_as_float(0x4b000000u | a), minusB = 8388608.f - __uint_as_float(0x4b000000u | b);
    return __byte_perm(__float_as_uint(minusA), __float_as_uint(minusB), 0x7632);
  }
};

}  // namespace fewbit::sdpa
