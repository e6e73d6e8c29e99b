// How cached keys and values become operands of matrix units: as f16 or bf16, which hold all codes, or as several parts of bf16.
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
/** (x & mask) ^ base, in one instruction. */
__device__ __forceinline__ uint32_t flipped(uint32_t x, uint32_t mask, uint32_t base) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(x), "r"(mask), "r"(base));
  return out;
}
__device__ __forceinline__ uint32_t packF16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ float fromF16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint32_t fmaF16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
__device__ __forceinline__ uint32_t addF16(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ __forceinline__ uint32_t subF16(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
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

// What is cached. `kBits` of an element; bytes of scales and of zero points of a row, or of 32 elements of it where it has zero points.
// `kOdd`: elements may be infinite or NaN.
// `kHalves`: elements or codes are exact in f16. `keys` and `values` make those of a word f16 pairs, which takes the fewest moves: pair i is
// element i of the word's low half and element i of its high half, or neighbours (keys of `kAdjacent`). `element(x, i)` is one of 16 bits.
// Others are `kParts` bf16 that sum to an element; `pair(a, b, i, j, out)` is element i of a and element j of b.

struct Bf16 {
  static constexpr int kBits = 16, kParts = 1, kScale = 0, kZero = 0;
  static constexpr bool kHalves = false, kOdd = true;
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[1]) {
    out[0] = __byte_perm(a[i / 2], b[j / 2], (i & 1 ? 0x32 : 0x10) | (j & 1 ? 0x7600 : 0x5400));
  }
};
struct F32 {
  static constexpr int kBits = 32, kParts = 3, kScale = 0, kZero = 0;
  static constexpr bool kHalves = false, kOdd = true;
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[3]) {
    split(__uint_as_float(a[i]), __uint_as_float(b[j]), out);
  }
};
struct F16 {
  static constexpr int kBits = 16, kScale = 0, kZero = 0;
  static constexpr bool kHalves = true, kOdd = true, kAdjacent = true;
  static __device__ __forceinline__ void keys(uint32_t x, uint32_t* out) { out[0] = x; }
  static __device__ __forceinline__ void values(uint32_t x, uint32_t* out) { out[0] = x; }
  static __device__ __forceinline__ float element(uint16_t x, int) { return fromF16(x); }
};
/** int8 with one float32 scale a row. */
struct Int8 {
  static constexpr int kBits = 8, kParts = 1, kScale = 4, kZero = 0;
  static constexpr bool kHalves = true, kOdd = false, kAdjacent = false;
  static __device__ __forceinline__ void keys(uint32_t x, uint32_t* out) {
    // 1024 + (128 + code) - 1152.
    out[0] = addF16(flipped(x, 0x00ff00ffu, 0x64806480u), 0xe480e480u);
    out[1] = addF16(flipped(x >> 8, 0x00ff00ffu, 0x64806480u), 0xe480e480u);
  }
  static __device__ __forceinline__ void values(uint32_t x, uint32_t* out) { keys(x, out); }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[1]) {
    const uint32_t x = __byte_perm(a[i / 4], b[j / 4], (i & 3) | (4 + (j & 3)) << 8);
    // The low seven bits make 128 + x mod 128; the sign makes what is subtracted 128 or 256.
    out[0] = fmaBf16(masked(x, 0x00800080u, 0x43004300u), 0xbf80bf80u, masked(x, 0x007f007fu, 0x43004300u));
  }
};
/** e4m3 with one float32 scale a row. As bf16, NaN comes out as 480. */
struct E4m3 {
  static constexpr int kBits = 8, kParts = 1, kScale = 4, kZero = 0;
  static constexpr bool kHalves = true, kOdd = true, kAdjacent = true;
  static __device__ __forceinline__ void keys(uint32_t x, uint32_t* out) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(x >> 16 * i), __NV_E4M3);
      out[i] = pair.x | static_cast<uint32_t>(pair.y) << 16;
    }
  }
  static __device__ __forceinline__ void values(uint32_t x, uint32_t* out) { keys(__byte_perm(x, x, 0x3120), out); }
  static __device__ __forceinline__ float element(uint16_t x, int i) { return fromE4m3(static_cast<uint8_t>(x >> 8 * i)); }
  static __device__ __forceinline__ void pair(const uint32_t* a, const uint32_t* b, int i, int j, uint32_t (&out)[1]) {
    const uint32_t x = __byte_perm(a[i / 4], b[j / 4], (i & 3) << 4 | (4 + (j & 3)) << 12);
    // The same fields in bf16 stand for 2^-120 times the value, subnormal codes included.
    out[0] = fmaBf16(masked(x >> 4, 0x07f007f0u, x & 0x80008000u), 0x7b807b80u, 0x80008000u);
  }
};
/** Unsigned 4 bits; a bf16 scale and a byte of zero point for every 32 elements. What the scale multiplies is exact in f16. */
struct UInt4 {
  static constexpr int kBits = 4, kScale = 2, kZero = 1;
  static constexpr bool kHalves = true, kOdd = false, kAdjacent = false;
  /** Codes of a word less zero points, of which `zeros` has 1024 more. */
  static __device__ __forceinline__ void codes(uint32_t x, uint32_t zeros, uint32_t* out) {
    const uint32_t minus = fmaF16(zeros, 0xbc00bc00u, 0x63806380u);  // -(64 + zero)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t y = x >> 8 * i;
      out[2 * i] = subF16(masked(y, 0x000f000fu, 0x64006400u), zeros);
      out[2 * i + 1] = fmaF16(masked(y, 0x00f000f0u, 0x64006400u), 0x2c002c00u, minus);
    }
  }
};

}  // namespace fewbit::sdpa
