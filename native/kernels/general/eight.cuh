// Decoding 8 neighbouring elements of a stored row at once.
#pragma once
#include "common.cuh"

namespace fewbit::general {

/**
 * Code values of elements [at, at + 8) of a row, zero points and middle codes subtracted; `at` is a multiple of 8, a table's entry
 * divides 8 elements, and what lies past the row is zero. Integers for INTEGER.
 */
template <class T>
__device__ inline void codes8(const Stored& s, const float* lut, i64 row, int at, T out[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = 0;
  const int left = s.k - at;
  if (left <= 0) return;
  const Codec& codec = s.element;
  const int bits = codec.bits;
  const u32* words = s.words + row / s.vectorRows * s.rowStride;
  if (bits > 8) {
    u32 codes[8];
    if (bits == 32) {
      const uint4* at4 = reinterpret_cast<const uint4*>(words + at);
      const uint4 a = at4[0], b = left > 4 ? at4[1] : make_uint4(0u, 0u, 0u, 0u);
      codes[0] = a.x, codes[1] = a.y, codes[2] = a.z, codes[3] = a.w;
      codes[4] = b.x, codes[5] = b.y, codes[6] = b.z, codes[7] = b.w;
    } else if (bits == 16) {
      const uint4 a = *reinterpret_cast<const uint4*>(words + at / 2);
      codes[0] = a.x & 0xffffu, codes[1] = a.x >> 16, codes[2] = a.y & 0xffffu, codes[3] = a.y >> 16;
      codes[4] = a.z & 0xffffu, codes[5] = a.z >> 16, codes[6] = a.w & 0xffffu, codes[7] = a.w >> 16;
    } else {
      for (int i = 0; i < 8; i++) codes[i] = i < left ? readCode(words, at + i, bits) : 0u;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < left) out[i] = static_cast<T>(codec.decode(codes[i], s.table));
  } else {
    // The codes that hold these elements, from the lowest bit on.
    const int count = ::min((left + s.vectorK - 1) / s.vectorK, 8 / s.vectorK);
    const int bit = at / s.vectorK * bits;
    const u32* p = words + (bit >> 5);
    const int offset = bit & 31, need = offset + count * bits;
    const u32 w0 = p[0], w1 = need > 32 ? p[1] : 0u, w2 = need > 64 ? p[2] : 0u;
    u32 low = __funnelshift_r(w0, w1, offset), high = __funnelshift_r(w1, w2, offset);
    const u32 mask = codec.mask();
    if (codec.kind == CodecKind::table && s.element.vector > 1) {
      const int lane = static_cast<int>(row % s.vectorRows) * s.vectorK;
      for (int i = 0; i < 8; i++) {
        if (i < left) out[i] = static_cast<T>(lut[static_cast<i64>(low & mask) * codec.vector + lane + i % s.vectorK]);
        if (i % s.vectorK == s.vectorK - 1) {
          low = __funnelshift_r(low, high, bits);
          high >>= bits;
        }
      }
      return;
    }
    const int sign = 32 - bits;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u32 code = low & mask;
      low = __funnelshift_r(low, high, bits);
      high >>= bits;
      if (i < left) {
        if (lut != nullptr) out[i] = static_cast<T>(lut[code]);
        else out[i] = static_cast<T>(codec.isSigned ? static_cast<int>(code << sign) >> sign : static_cast<int>(code));
      }
    }
  }
  if (s.zeroKind == ZeroKind::none) return;
  const T shift = static_cast<T>(s.shift(row, at));
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < left) out[i] -= shift;
}

/** The same elements as real values: scales applied, and a float zero point added. */
__device__ inline void values8(const Stored& s, const float* lut, i64 row, int at, float out[8]) {
  codes8(s, lut, row, at, out);
  if (s.levels == 0 || at >= s.k) return;
  const float scale = s.scale(row, at), offset = s.offset(row, at);
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = at + i < s.k ? out[i] * scale + offset : 0.0f;
}

}  // namespace fewbit::general
