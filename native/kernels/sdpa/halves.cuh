// Products of f16 on the matrix unit, its operands as lanes load them, and numbers as two f16 parts.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

namespace fewbit::sdpa {
namespace {

/** d[16 x 8] += a[16 x 16] b[16 x 8], of f16. */
__device__ __forceinline__ void productF16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/** Four matrices of eight rows of 16 bytes, row l % 8 of matrix l / 8 from lane l: a lane gets word t of row g of each. */
__device__ __forceinline__ void loadRows(uint32_t (&w)[4], const uint8_t* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}
/** As above, but a lane gets 16 bits g of rows 2t and 2t + 1. */
__device__ __forceinline__ void loadColumns(uint32_t (&w)[4], const uint8_t* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}
/** The power of two of that biased exponent. */
__device__ __forceinline__ float power(int biased) { return __int_as_float(biased << 23); }

/** Second parts are 2^11 times what first parts leave, so that both have the same range. */
constexpr float kSecond = 0x1p11f;
__device__ __forceinline__ float secondPart(float x) { return (x - __half2float(__float2half_rn(x))) * kSecond; }
__device__ __forceinline__ float joined(float first, float second) { return fmaf(second, 1.f / kSecond, first); }

/** The least biased exponent E for which 2^(141 - E), which takes a number of that exponent to [2^14, 2^15), is far from overflow. */
constexpr int kLeastExponent = 28;
__device__ __forceinline__ float toHalves(int exponent) { return power(268 - exponent); }
__device__ __forceinline__ float fromHalves(int exponent) { return power(exponent - 14); }
/** Both parts of a weight keep their bits from here on. Smaller ones are multiplied by `kBand` and take another round. */
constexpr float kLeastWeight = 0x1p-14f, kBand = 0x1p29f;

}  // namespace
}  // namespace fewbit::sdpa
