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

/** Four codes, the first one lowest. A NaN of `x` is as the rule has it. */
template <Coder CODER>
__device__ __forceinline__ u64 fourCodes(const Rule& rule, float4 x, float a, float b) {
  if (CODER == Coder::bfloat) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
    return bitcast<u32>(low) | static_cast<u64>(bitcast<u32>(high)) << 32;
  }
  if (CODER == Coder::half) {
    const __half2 low = __floats2half2_rn(x.x, x.y), high = __floats2half2_rn(x.z, x.w);
    return bitcast<u32>(low) | static_cast<u64>(bitcast<u32>(high)) << 32;
  }
  if (CODER == Coder::e4m3 || CODER == Coder::floats) {
    const bool divides = rule.kind == RuleKind::amax;
    // A zero divided by a number above zero is itself, but takes the division's slow way.
    const bool ordinary = a > 0.0f && a < bitcast<float>(kInfinity);
    const auto scaled = [&](float value) {
      const bool keeps = ordinary && value == 0.0f;
      return rule.cut(!divides ? mul(value, a) : keeps ? value : div(keeps ? a : value, a));
    };
#if __CUDA_ARCH__ >= 890
    if (CODER == Coder::e4m3) {
      const auto pair = [](float low, float high) -> u32 {
        return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
      };
      return pair(scaled(x.x), scaled(x.y)) | pair(scaled(x.z), scaled(x.w)) << 16;
    }
#endif
    Codec codec = rule.element;
    codec.kind = CodecKind::real;
    const int bits = codec.bits;
    const u32 low = codec.encode(scaled(x.x)) | codec.encode(scaled(x.y)) << bits;
    const u32 high = codec.encode(scaled(x.z)) | codec.encode(scaled(x.w)) << bits;
    return low | static_cast<u64>(high) << 2 * bits;
  }
  if (CODER == Coder::integers) {
    const u32 mask = rule.element.mask();
    const auto code = [&](float value) {
      const float steps = add(rintf(mul(value, a)), b);
      // The clamp lets NaN through, whose conversion is 0.
      return static_cast<u32>(static_cast<int>(clampTo(steps, rule.min, rule.max))) & mask;
    };
    const int bits = rule.element.bits;
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

/** As `groupKeys` over a whole warp. */
__device__ __forceinline__ Keys warpKeys(Keys keys) {
  keys.low = __reduce_min_sync(kAll, keys.low);
  keys.high = __reduce_max_sync(kAll, keys.high);
  return keys;
}
__device__ __forceinline__ void addFour(Keys& keys, float4 x) {
  keys.add(x.x);
  keys.add(x.y);
  keys.add(x.z);
  keys.add(x.w);
}

}  // namespace fewbit::rows
