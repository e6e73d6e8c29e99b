// Eight neighbouring weight codes to four pairs of bf16, exactly: codes of at most 8 significant bits, scales not applied.
#pragma once
#include "operands.cuh"

namespace fewbit::linear {

__device__ __forceinline__ uint32_t packHigh(float low, float high) {  // both exact in bf16
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
__device__ __forceinline__ uint32_t asWord(__nv_bfloat162 pair) { return reinterpret_cast<uint32_t&>(pair); }
__device__ __forceinline__ __nv_bfloat162 asPair(uint32_t word) { return reinterpret_cast<__nv_bfloat162&>(word); }

/** Pairs (0, 1), (2, 3), (4, 5), (6, 7): the order of most decoders; `first` is the first code of a pair, `apart` the second's distance. */
struct Natural {
  static constexpr int spread = 16;   // bytes of a row of codes that four lanes read at once, as Chunk is told
  static constexpr int inFlight = 2;  // stages of the skinny kernels' ring that are best on their way at a time (bench/NOTES.md)
  static constexpr bool folds = false;  // whether scales may multiply the pairs
  static constexpr bool interleaved = false;
  static constexpr int apart = 1;
  __device__ static constexpr int first(int pair) { return 2 * pair; }
};
/** Pairs (0, 4), (1, 5), (2, 6), (3, 7): every fourth code of 4 bits lies 16 bits apart. */
struct Interleaved {
  static constexpr int inFlight = 1;
  static constexpr bool interleaved = true;
  static constexpr int apart = 4;
  __device__ static constexpr int first(int pair) { return pair; }
};

/** Loads the field of 8 codes of `Bits` bits at byte `at` of shared memory, whose rows start on words. */
template <int Bits>
__device__ __forceinline__ void loadField(const uint8_t* row, int at, uint32_t (&field)[2]) {
  if constexpr (Bits == 4) {
    field[0] = *reinterpret_cast<const uint32_t*>(row + at);
  } else if constexpr (Bits == 8) {
    const uint2 two = *reinterpret_cast<const uint2*>(row + at);
    field[0] = two.x;
    field[1] = two.y;
  } else {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(row + (at & ~3));
    const int shift = (at & 3) * 8;
    const uint32_t w0 = words[0];
    const uint32_t w1 = Bits > 2 ? words[1] : 0;
    field[0] = __funnelshift_r(w0, w1, shift);
    if constexpr (Bits > 4) field[1] = __funnelshift_r(w1, Bits == 7 ? words[2] : 0, shift);
  }
}

template <int Bits>
__device__ __forceinline__ uint32_t codeOf(const uint32_t (&field)[2], int i) {
  const int bit = i * Bits;
  const uint32_t shifted = bit == 0    ? field[0]
                           : bit >= 32 ? field[1] >> (bit - 32)
                           : bit + Bits > 32 ? __funnelshift_r(field[0], field[1], bit)
                                             : field[0] >> bit;
  return shifted & ((1u << Bits) - 1);
}

/** Integers of any width: the code goes into the low bits of 2^23, which is exact, and 2^23 comes off with the offset. */
template <int Bits>
struct IntCodes : Natural {
  static constexpr int bits = Bits, spread = Bits == 8 ? 32 : 16;
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element& element, float zero,
                                                uint32_t (&out)[4]) {
    uint32_t field[2] = {0, 0};
    loadField<Bits>(row, at, field);
    const float base = 8388608.0f + element.offset + zero;
    float values[8];
    if constexpr (Bits == 8) {
      const uint32_t flip = element.flip * 0x01010101u;
#pragma unroll
      for (int i = 0; i < 8; i++)
        values[i] = __uint_as_float(__byte_perm(field[i / 4] ^ flip, 0x4b000000u, 0x7440 | (i % 4))) - base;
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        values[i] = __uint_as_float((codeOf<Bits>(field, i) ^ element.flip) | 0x4b000000u) - base;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = packHigh(values[2 * i], values[2 * i + 1]);
  }
};

/**
 * Signed bytes, two at a time: 128 + (code & 127) and 128 + (code & 128) are bf16 whose low bits are the code's, and their difference is
 * its value. Pairs (0, 2), (1, 3), (4, 6), (5, 7).
 */
struct SignedBytes {
  static constexpr bool folds = false;
  static constexpr int bits = 8, apart = 2, spread = 64, inFlight = 2;
  __device__ __forceinline__ static uint32_t flipOf(const Element&) { return 0; }
  /** Sixteen codes as bytes, from what lies at `at`. */
  __device__ __forceinline__ static void bytes(const uint8_t* at, uint32_t, uint32_t (&out)[4]) {
    const uint4 four = *reinterpret_cast<const uint4*>(at);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
  }
  __device__ static constexpr int first(int pair) { return pair / 2 * 4 + pair % 2; }
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element&, float, uint32_t (&out)[4]) {
    uint32_t field[2];
    loadField<8>(row, at, field);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t word = field[i / 2] >> (8 * (i % 2));
      out[i] = asWord(__hsub2(asPair((word & 0x007f007fu) | 0x43004300u), asPair((word & 0x00800080u) | 0x43004300u)));
    }
  }
};

/** Bytes of either sign, for sums of whole numbers: those without one lose 128. */
struct AnyBytes : IntCodes<8> {
  static constexpr int spread = 64, inFlight = 2;
  __device__ __forceinline__ static uint32_t flipOf(const Element& element) { return element.flip == 0 ? 0x80808080u : 0u; }
  __device__ __forceinline__ static float offsetOf(const Element& element) { return element.offset - 128.0f; }
  __device__ __forceinline__ static void bytes(const uint8_t* at, uint32_t flip, uint32_t (&out)[4]) {
    const uint4 four = *reinterpret_cast<const uint4*>(at);
    out[0] = four.x ^ flip, out[1] = four.y ^ flip, out[2] = four.z ^ flip, out[3] = four.w ^ flip;
  }
  /** Eight of them. */
  __device__ __forceinline__ static void bytes(const uint8_t* at, uint32_t flip, uint32_t (&out)[2]) {
    const uint2 two = *reinterpret_cast<const uint2*>(at);
    out[0] = two.x ^ flip, out[1] = two.y ^ flip;
  }
};

/** Four-bit integers, two at a time: 128 + code is a bf16 whose low bits are the code. */
struct Int4Codes : Interleaved {
  static constexpr bool folds = false;
  static constexpr int bits = 4, spread = 32;
  /** What makes stored codes the bytes that `bytes` gives, and what those have too much. */
  __device__ __forceinline__ static uint32_t flipOf(const Element& element) { return element.flip * 0x01010101u; }
  __device__ __forceinline__ static float offsetOf(const Element& element) { return element.offset; }
  /** Sixteen codes as bytes: of each eight the even ones first. */
  __device__ __forceinline__ static void bytes(const uint8_t* at, uint32_t flip, uint32_t (&out)[4]) {
    const uint2 two = *reinterpret_cast<const uint2*>(at);
    out[0] = (two.x ^ flip) & 0x0f0f0f0fu;
    out[1] = (two.x >> 4 ^ flip) & 0x0f0f0f0fu;
    out[2] = (two.y ^ flip) & 0x0f0f0f0fu;
    out[3] = (two.y >> 4 ^ flip) & 0x0f0f0f0fu;
  }
  /** Eight of them. */
  __device__ __forceinline__ static void bytes(const uint8_t* at, uint32_t flip, uint32_t (&out)[2]) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(at);
    out[0] = (word ^ flip) & 0x0f0f0f0fu;
    out[1] = (word >> 4 ^ flip) & 0x0f0f0f0fu;
  }
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element& element, float zero,
                                                uint32_t (&out)[4]) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(row + at);
    const uint32_t magic = 0x43004300u ^ (element.flip * 0x00010001u);
    const __nv_bfloat162 base = __float2bfloat162_rn(128.0f + element.offset);
    const __nv_bfloat162 zeros = __float2bfloat162_rn(zero);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __nv_bfloat162 value = __hsub2(asPair(((word >> (4 * i)) & 0x000f000fu) ^ magic), base);
      out[i] = asWord(element.zeros ? __hsub2(value, zeros) : value);
    }
  }
};

/** Two of the four codes of e4m3 in a word as f16; the conversion takes either half of a register, which a shift would hide. */
__device__ __forceinline__ __half2 halvesOfE4m3(uint32_t word, int pair) {
  const ushort2 two = reinterpret_cast<const ushort2&>(word);
  return __half2(__nv_cvt_fp8x2_to_halfraw2(pair == 0 ? two.x : two.y, __NV_E4M3));
}

struct E4m3Codes : Natural {
  static constexpr int bits = 8, spread = 32, inFlight = 1;
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element&, float, uint32_t (&out)[4]) {
    uint32_t field[2];
    loadField<8>(row, at, field);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 values = __half22float2(halvesOfE4m3(field[i / 2], i % 2));
      out[i] = packHigh(values.x, values.y);
    }
  }
};
/** The same, for products in f16. */
struct E4m3Halves : E4m3Codes {
  static constexpr int spread = 64, inFlight = 2;
  /** Sixteen codes as pairs of f16. */
  __device__ __forceinline__ static void halves(const uint4& four, uint32_t (&out)[8]) {
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const __half2 pair = halvesOfE4m3(words[i / 2], i % 2);
      out[i] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
};

/** A float8_e5m2 code is the upper byte of a float16. */
struct E5m2Codes : Natural {
  static constexpr int bits = 8, spread = 32;
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element&, float, uint32_t (&out)[4]) {
    uint32_t field[2];
    loadField<8>(row, at, field);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t pair = __byte_perm(field[i / 2], 0, i % 2 == 0 ? 0x1404 : 0x3424);
      const float2 values = __half22float2(reinterpret_cast<__half2&>(pair));
      out[i] = packHigh(values.x, values.y);
    }
  }
};

/** e2m1: exponent and mantissa land on a bf16's lowest, 2^-126 too small. */
struct E2m1Codes : Interleaved {
  static constexpr bool folds = true;
  static constexpr int bits = 4, spread = 16;
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element&, float, uint32_t (&out)[4]) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(row + at);
    const __nv_bfloat162 power = __float2bfloat162_rn(8.507059173023462e37f);  // 2^126
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t sign = (word << (12 - 4 * i)) & 0x80008000u;
      const uint32_t magnitude = (i < 2 ? word << (6 - 4 * i) : word >> (4 * i - 6)) & 0x01c001c0u;
      out[i] = asWord(__hmul2(asPair(sign | magnitude), power));
    }
  }
};

/** Small floats without special values: exponent and mantissa become a float32's, 2^(127 - bias) too small. */
template <int Bits>
struct FloatCodes : Natural {
  static constexpr int bits = Bits;
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element& element, float,
                                                uint32_t (&out)[4]) {
    uint32_t field[2] = {0, 0};
    loadField<Bits>(row, at, field);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t code = codeOf<Bits>(field, i);
      const uint32_t magnitude = (code & ((1u << (Bits - 1)) - 1)) << (23 - element.mantissa);
      values[i] = __uint_as_float(magnitude | (code >> (Bits - 1) << 31)) * element.multiplier;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = packHigh(values[2 * i], values[2 * i + 1]);
  }
};

struct Bf16Codes : Natural {
  static constexpr int bits = 16, spread = 64;
  __device__ __forceinline__ static void decode(const uint8_t* row, int at, const Element&, float, uint32_t (&out)[4]) {
    const uint4 four = *reinterpret_cast<const uint4*>(row + at);
    out[0] = four.x;
    out[1] = four.y;
    out[2] = four.z;
    out[3] = four.w;
  }
};

/** Calls `use` with the decoder of a kind of codes. */
template <class Use>
cudaError_t withCodes(CodeKind kind, Use use) {
  switch (kind) {
    case CodeKind::bf16: return use(Bf16Codes());
    case CodeKind::e4m3: return use(E4m3Codes());
    case CodeKind::e5m2: return use(E5m2Codes());
    case CodeKind::int8: return use(IntCodes<8>());
    case CodeKind::int4: return use(Int4Codes());
    case CodeKind::e2m1: return use(E2m1Codes());
    case CodeKind::int1: return use(IntCodes<1>());
    case CodeKind::int2: return use(IntCodes<2>());
    case CodeKind::int3: return use(IntCodes<3>());
    case CodeKind::int5: return use(IntCodes<5>());
    case CodeKind::int6: return use(IntCodes<6>());
    case CodeKind::int7: return use(IntCodes<7>());
    case CodeKind::float5: return use(FloatCodes<5>());
    case CodeKind::float6: return use(FloatCodes<6>());
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fewbit::linear
