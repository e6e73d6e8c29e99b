// Codes of four neighbouring values at once: by the conversions that the hardware has, where a codec is one of them, else by the rule.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../general/common.cuh"

namespace fewbit::rows {

using namespace general;
using u64 = std::uint64_t;

/** How codes are made. All ways give the codes of `Rule::codeOf`. */
enum class Coder : int {
  any,
  bfloat,    // 16 bits, 8 of them an exponent, without a scale
  half,      // 16 bits, 5 of them an exponent, without a scale
  e4m3,      // 8 bits, 4 of them an exponent, scaled
  floats,    // shorter floats of any kind, scaled
  integers,  // affine, by float32 operations
};

inline Coder coderOf(const Rule& rule) {
  const Codec& element = rule.element;
  if (rule.kind == RuleKind::cast) {
    const bool wide = element.kind == CodecKind::real && element.bits == 16 && element.isSigned && element.ieee && element.nan == 0x7fffu;
    if (wide && element.mantissa == 7 && element.lowest == 1 && element.overflow == 0x7f80u) return Coder::bfloat;
    if (wide && element.mantissa == 10 && element.lowest == 113 && element.overflow == 0x7c00u) return Coder::half;
    return Coder::any;
  }
  if (rule.kind == RuleKind::amax || rule.kind == RuleKind::mx || rule.kind == RuleKind::nvfp4) {
    if (element.kind != CodecKind::real || element.bits > 8) return Coder::any;
    // Values are cut at 448 before they are converted, so what else has no finite code does not matter.
    const bool fits = element.bits == 8 && element.isSigned && element.mantissa == 3 && element.lowest == 121;
    return fits && element.nan == 0x7fu && rule.top == 448.0f ? Coder::e4m3 : Coder::floats;
  }
  const bool single = rule.kind == RuleKind::affine && rule.promoted == Type::f32 && rule.zeroKind != ZeroKind::real;
  return single ? Coder::integers : Coder::any;
}

/** Whether four codes fill whole bytes and fit 64 bits. */
__host__ __device__ inline bool packs(int bits) { return bits % 2 == 0 && bits <= 16; }

// NaN if either is, unlike fminf and fmaxf.
__device__ __forceinline__ float least(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float greatest(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

/**
 * x over a divisor by the steps of a hardware division without its exceptions: rounded to nearest where nothing on the way is subnormal or
 * overflows. `inverse` is that of the divisor, rounded to nearest or nearly so. A zero loses its sign.
 */
__device__ __forceinline__ float quotient(float x, float divisor, float inverse) {
  const float first = x * inverse;
  const float second = fmaf(fmaf(-divisor, first, x), inverse, first);
  return fmaf(fmaf(-divisor, second, x), inverse, second);
}
__device__ __forceinline__ float inverseOf(float a) {
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(a));
  return fmaf(fmaf(-a, guess, 1.0f), guess, guess);
}

/**
 * Division of several numbers by one. `ordinary` divisors take `quotient`, which is exact where it has a code other than zero's: that is
 * above 2^-40 in all formats of 8 bits.
 */
struct Divisor {
  float divisor, inverse, most;
  bool ordinary;

  __device__ __forceinline__ Divisor(float a, float top) : divisor(a), inverse(inverseOf(a)), most(2.0f * top * a) {
    ordinary = a > 0x1p-60f && a < 0x1p+60f && top < 0x1p+40f;
  }
  /** x over an ordinary divisor. What lies beyond twice the largest code comes no larger than that; NaN stays. */
  __device__ __forceinline__ float under(float x) const {
    const float cut = least(greatest(x, -most), most);
    return copysignf(quotient(cut, divisor, inverse), cut);
  }
};

/**
 * Division of a row's numbers by a scale of that row: NaN, infinite or normal and below 2^120, no number much larger than 2^10 scales. Without
 * branches: of small scales a power of two is taken out, and an infinite one becomes the one whose inverse is flushed to zero.
 */
struct RowDivisor {
  float power, divisor, inverse;

  __device__ __forceinline__ explicit RowDivisor(float scale) : power(scale < 0x1p-60f ? 0x1p+80f : 1.0f) {
    divisor = least(scale * power, 0x1p+127f);
    inverse = inverseOf(divisor);
  }
  __device__ __forceinline__ float under(float x) const { return copysignf(quotient(x * power, divisor, inverse), x); }
};

constexpr float kLeastNormal = 1.17549435e-38f;

/**
 * The scale of a row whose largest magnitude, which may be NaN, makes `steps` steps: rounded to nearest if `least` is normal and `steps` a
 * whole number, or `least` so large that what a division leaves over is a float32.
 */
__device__ __forceinline__ float rowScale(float largest, float steps, float inverse, float least) {
  // `quotient` makes NaN of infinity.
  const float scale = largest == bitcast<float>(kInfinity) ? largest : quotient(largest, steps, inverse);
  return scale < least ? least : scale;
}

// A call: few divisors are not ordinary.
__device__ __noinline__ static float4 quotients(float4 x, float a) { return make_float4(div(x.x, a), div(x.y, a), div(x.z, a), div(x.w, a)); }

/** Four codes of e4m3, the first one lowest. What is beyond the largest one is cut. */
__device__ __forceinline__ u32 e4m3Codes(float4 x) {
#if __CUDA_ARCH__ >= 890
  const auto pair = [](float low, float high) -> u32 {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
  };
  return pair(x.x, x.y) | pair(x.z, x.w) << 16;
#else
  const auto code = [](float value) -> u32 { return detail::encode_e4m3(value); };
  return code(x.x) | code(x.y) << 8 | code(x.z) << 16 | code(x.w) << 24;
#endif
}

/** An integer code before it is cut to its bits; that of NaN is 0. */
__device__ __forceinline__ u32 integerCode(float x, float a, float b, float min, float max) {
  const float steps = add(rintf(mul(x, a)), b);
  return static_cast<u32>(static_cast<int>(least(greatest(steps, min), max)));
}
/** The lowest bytes of four numbers. */
__device__ __forceinline__ u32 packBytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

/** Four numbers as bf16 or f16, the first one lowest. */
template <Coder CODER>
__device__ __forceinline__ u64 halfCodes(float4 x) {
  if (CODER == Coder::bfloat) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
    return bitcast<u32>(low) | static_cast<u64>(bitcast<u32>(high)) << 32;
  }
  const __half2 low = __floats2half2_rn(x.x, x.y), high = __floats2half2_rn(x.z, x.w);
  return bitcast<u32>(low) | static_cast<u64>(bitcast<u32>(high)) << 32;
}

/** Four codes, the first one lowest. A NaN of `x` is as the rule has it. */
template <Coder CODER>
__device__ __forceinline__ u64 fourCodes(const Rule& rule, float4 x, float a, float b) {
  if (CODER == Coder::bfloat || CODER == Coder::half) return halfCodes<CODER>(x);
  if (CODER == Coder::e4m3 || CODER == Coder::floats) {
    const bool divides = rule.kind == RuleKind::amax;
    const Divisor divisor(a, rule.top);
    float4 scaled;
    if (divides && divisor.ordinary) scaled = make_float4(divisor.under(x.x), divisor.under(x.y), divisor.under(x.z), divisor.under(x.w));
    else if (divides) scaled = quotients(x, a);
    else scaled = make_float4(mul(x.x, a), mul(x.y, a), mul(x.z, a), mul(x.w, a));
    if (CODER == Coder::e4m3) return e4m3Codes(scaled);
    Codec codec = rule.element;
    codec.kind = CodecKind::real;
    const int bits = codec.bits;
    const auto coded = [&](float value) { return codec.encode(rule.cut(value)); };
    const u32 low = coded(scaled.x) | coded(scaled.y) << bits;
    const u32 high = coded(scaled.z) | coded(scaled.w) << bits;
    return low | static_cast<u64>(high) << 2 * bits;
  }
  if (CODER == Coder::integers) {
    const int bits = rule.element.bits;
    const auto whole = [&](float value) { return integerCode(value, a, b, rule.min, rule.max); };
    if (bits == 8) return packBytes(whole(x.x), whole(x.y), whole(x.z), whole(x.w));
    const u32 mask = rule.element.mask();
    const auto code = [&](float value) { return whole(value) & mask; };
    const u32 low = code(x.x) | code(x.y) << bits, high = code(x.z) | code(x.w) << bits;
    return low | static_cast<u64>(high) << 2 * bits;
  }
  u64 packed = 0;
  const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll 1
  for (int i = 0; i < 4; i++) packed |= static_cast<u64>(rule.codeOf(values[i], a, b)) << i * rule.element.bits;
  return packed;
}

/** Writes four codes, `at` counted in fours. */
__device__ __forceinline__ void storeCodes(u32* row, int at, int bits, u64 codes) {
  if (bits == 16) {
    reinterpret_cast<uint2*>(row)[at] = make_uint2(static_cast<u32>(codes), static_cast<u32>(codes >> 32));
  } else if (bits == 8) {
    row[at] = static_cast<u32>(codes);
  } else if (bits == 4) {
    reinterpret_cast<std::uint16_t*>(row)[at] = static_cast<std::uint16_t>(codes);
  } else {
    std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(row) + static_cast<i64>(at) * (bits / 2);
    for (int i = 0; i < bits / 2; i++) bytes[i] = static_cast<std::uint8_t>(codes >> 8 * i);
  }
}

/** The bits of the largest magnitude, which compare as integers do: those of a NaN are the largest. */
__device__ __forceinline__ u32 largestOf(float4 x) {
  return bitcast<u32>(greatest(greatest(fabsf(x.x), fabsf(x.y)), greatest(fabsf(x.z), fabsf(x.w))));
}

/** As `groupKeys` over a whole warp. */
__device__ __forceinline__ Keys warpKeys(Keys keys) {
  keys.low = __reduce_min_sync(kAll, keys.low);
  keys.high = __reduce_max_sync(kAll, keys.high);
  return keys;
}

/** Extremes as numbers, both NaN as soon as one is: adding takes two operations, where keys take nine. */
struct Range {
  float low = bitcast<float>(kInfinity), high = -bitcast<float>(kInfinity);

  __device__ __forceinline__ void add(float4 x) {
    low = least(low, least(least(x.x, x.y), least(x.z, x.w)));
    high = greatest(high, greatest(greatest(x.x, x.y), greatest(x.z, x.w)));
  }
  __device__ __forceinline__ Keys keys() const {
    Keys all;
    all.low = lowKey(low);
    all.high = highKey(high);
    return all;
  }
};
__device__ __forceinline__ Keys keysOf(float4 x) {
  Range range;
  range.add(x);
  return range.keys();
}

}  // namespace fewbit::rows
