// Made by "npm run generate" from src/formats/table.ts; do not edit.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FEWBIT_HD __host__ __device__
#else
#define FEWBIT_HD
#endif

namespace fewbit {

/// What the generated functions are written with.
namespace detail {
using u32 = std::uint32_t;
using f32 = float;

template <class To, class From>
FEWBIT_HD inline To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bitcast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
FEWBIT_HD constexpr T select(T no, T yes, bool condition) {
  return condition ? yes : no;
}
FEWBIT_HD constexpr u32 min(u32 a, u32 b) { return a < b ? a : b; }
FEWBIT_HD constexpr u32 max(u32 a, u32 b) { return a < b ? b : a; }
template <class T, unsigned N>
struct array {
  T at[N];
  template <class... Values>
  FEWBIT_HD constexpr array(Values... values) : at{static_cast<T>(values)...} {}
  FEWBIT_HD constexpr T operator[](u32 i) const { return at[i]; }
};

FEWBIT_HD inline f32 decode_f32(u32 code) {
  return bitcast<f32>(code << 0u);
}
FEWBIT_HD inline u32 encode_f32_bits(u32 bits) {
  return bits;
}
FEWBIT_HD inline u32 encode_f32(f32 value) {
  return encode_f32_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_f16(u32 code) {
  const auto magnitude = code & 0x7fffu;
  const auto normal = bitcast<f32>((magnitude << 13u) + 0x38000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x3f000000u) - bitcast<f32>(0x3f000000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 0x400u));
  const auto value = select(finite, (magnitude << 13u) | 0x7f800000u, magnitude > 0x7bffu);
  return bitcast<f32>(value | ((code & 0x8000u) << 16u));
}
FEWBIT_HD inline u32 encode_f16_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 113u);
  const auto shift = min(kept - exponent + 13u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 113u) << 10u);
  const auto saturated = select(code, 0x7c00u, code > 0x7bffu);
  return select(saturated | ((bits >> 31u) << 15u), 0x7fffu, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_f16(f32 value) {
  return encode_f16_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_bf16(u32 code) {
  return bitcast<f32>(code << 16u);
}
FEWBIT_HD inline u32 encode_bf16_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 1u);
  const auto shift = min(kept - exponent + 16u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 1u) << 7u);
  const auto saturated = select(code, 0x7f80u, code > 0x7f7fu);
  return select(saturated | ((bits >> 31u) << 15u), 0x7fffu, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_bf16(f32 value) {
  return encode_bf16_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e4m3(u32 code) {
  const auto magnitude = code & 127u;
  const auto normal = bitcast<f32>((magnitude << 20u) + 0x3c000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x46800000u) - bitcast<f32>(0x46800000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 8u));
  const auto value = select(finite, 0x7fc00000u, magnitude > 126u);
  return bitcast<f32>(value | ((code & 128u) << 24u));
}
FEWBIT_HD inline u32 encode_e4m3_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 121u);
  const auto shift = min(kept - exponent + 20u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 121u) << 3u);
  const auto saturated = select(code, 126u, code > 126u);
  return select(saturated | ((bits >> 31u) << 7u), 127u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e4m3(f32 value) {
  return encode_e4m3_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e5m2(u32 code) {
  const auto magnitude = code & 127u;
  const auto normal = bitcast<f32>((magnitude << 21u) + 0x38000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x43000000u) - bitcast<f32>(0x43000000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 4u));
  const auto value = select(finite, (magnitude << 21u) | 0x7f800000u, magnitude > 123u);
  return bitcast<f32>(value | ((code & 128u) << 24u));
}
FEWBIT_HD inline u32 encode_e5m2_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 113u);
  const auto shift = min(kept - exponent + 21u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 113u) << 2u);
  const auto saturated = select(code, 124u, code > 123u);
  return select(saturated | ((bits >> 31u) << 7u), 127u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e5m2(f32 value) {
  return encode_e5m2_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int8(u32 code) {
  return bitcast<f32>((code ^ 128u) | 0x4b000000u) - bitcast<f32>(0x4b000080u);
}
FEWBIT_HD inline u32 encode_int8_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(127u, 128u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 255u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int8(f32 value) {
  return encode_int8_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint4(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint4_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(15u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint4(f32 value) {
  return encode_uint4_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int4(u32 code) {
  return bitcast<f32>((code ^ 8u) | 0x4b000000u) - bitcast<f32>(0x4b000008u);
}
FEWBIT_HD inline u32 encode_int4_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(7u, 8u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 15u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int4(f32 value) {
  return encode_int4_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint8(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint8_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(255u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint8(f32 value) {
  return encode_uint8_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int1(u32 code) {
  return bitcast<f32>((code ^ 1u) | 0x4b000000u) - bitcast<f32>(0x4b000001u);
}
FEWBIT_HD inline u32 encode_int1_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(0u, 1u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 1u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int1(f32 value) {
  return encode_int1_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int2(u32 code) {
  return bitcast<f32>((code ^ 2u) | 0x4b000000u) - bitcast<f32>(0x4b000002u);
}
FEWBIT_HD inline u32 encode_int2_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(1u, 2u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 3u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int2(f32 value) {
  return encode_int2_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int3(u32 code) {
  return bitcast<f32>((code ^ 4u) | 0x4b000000u) - bitcast<f32>(0x4b000004u);
}
FEWBIT_HD inline u32 encode_int3_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(3u, 4u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 7u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int3(f32 value) {
  return encode_int3_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int5(u32 code) {
  return bitcast<f32>((code ^ 16u) | 0x4b000000u) - bitcast<f32>(0x4b000010u);
}
FEWBIT_HD inline u32 encode_int5_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(15u, 16u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 31u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int5(f32 value) {
  return encode_int5_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int6(u32 code) {
  return bitcast<f32>((code ^ 32u) | 0x4b000000u) - bitcast<f32>(0x4b000020u);
}
FEWBIT_HD inline u32 encode_int6_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(31u, 32u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 63u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int6(f32 value) {
  return encode_int6_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_int7(u32 code) {
  return bitcast<f32>((code ^ 64u) | 0x4b000000u) - bitcast<f32>(0x4b000040u);
}
FEWBIT_HD inline u32 encode_int7_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(63u, 64u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(select(clipped, (0u - clipped) & 127u, negative), 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_int7(f32 value) {
  return encode_int7_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint1(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint1_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(1u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint1(f32 value) {
  return encode_uint1_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint2(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint2_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(3u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint2(f32 value) {
  return encode_uint2_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint3(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint3_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(7u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint3(f32 value) {
  return encode_uint3_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint5(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint5_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(31u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint5(f32 value) {
  return encode_uint5_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint6(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint6_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(63u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint6(f32 value) {
  return encode_uint6_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_uint7(u32 code) {
  return bitcast<f32>(code | 0x4b000000u) - bitcast<f32>(0x4b000000u);
}
FEWBIT_HD inline u32 encode_uint7_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto negative = bits >= 0x80000000u;
  const auto significand = (magnitude & 0x7fffffu) | 0x800000u;
  const auto shift = 150u - min(max(magnitude >> 23u, 125u), 149u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto limit = select(127u, 0u, negative);
  const auto clipped = select(min(rounded, limit), limit, magnitude >= 0x4b000000u);
  return select(clipped, 0u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_uint7(f32 value) {
  return encode_uint7_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e3m2(u32 code) {
  const auto magnitude = code & 31u;
  const auto normal = bitcast<f32>((magnitude << 21u) + 0x3e000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x49000000u) - bitcast<f32>(0x49000000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 4u));
  return bitcast<f32>(finite | ((code & 32u) << 26u));
}
FEWBIT_HD inline u32 encode_e3m2_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 125u);
  const auto shift = min(kept - exponent + 21u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 125u) << 2u);
  const auto saturated = select(code, 31u, code > 31u);
  return select(saturated | ((bits >> 31u) << 5u), 31u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e3m2(f32 value) {
  return encode_e3m2_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e2m3(u32 code) {
  const auto magnitude = code & 31u;
  const auto normal = bitcast<f32>((magnitude << 20u) + 0x3f000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x49800000u) - bitcast<f32>(0x49800000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 8u));
  return bitcast<f32>(finite | ((code & 32u) << 26u));
}
FEWBIT_HD inline u32 encode_e2m3_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 127u);
  const auto shift = min(kept - exponent + 20u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 127u) << 3u);
  const auto saturated = select(code, 31u, code > 31u);
  return select(saturated | ((bits >> 31u) << 5u), 31u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e2m3(f32 value) {
  return encode_e2m3_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e2m2(u32 code) {
  const auto magnitude = code & 15u;
  const auto normal = bitcast<f32>((magnitude << 21u) + 0x3f000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x4a000000u) - bitcast<f32>(0x4a000000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 4u));
  return bitcast<f32>(finite | ((code & 16u) << 27u));
}
FEWBIT_HD inline u32 encode_e2m2_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 127u);
  const auto shift = min(kept - exponent + 21u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 127u) << 2u);
  const auto saturated = select(code, 15u, code > 15u);
  return select(saturated | ((bits >> 31u) << 4u), 15u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e2m2(f32 value) {
  return encode_e2m2_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e3m1(u32 code) {
  const auto magnitude = code & 15u;
  const auto normal = bitcast<f32>((magnitude << 22u) + 0x3e000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x49800000u) - bitcast<f32>(0x49800000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 2u));
  return bitcast<f32>(finite | ((code & 16u) << 27u));
}
FEWBIT_HD inline u32 encode_e3m1_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 125u);
  const auto shift = min(kept - exponent + 22u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 125u) << 1u);
  const auto saturated = select(code, 15u, code > 15u);
  return select(saturated | ((bits >> 31u) << 4u), 15u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e3m1(f32 value) {
  return encode_e3m1_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e2m1(u32 code) {
  const auto magnitude = code & 7u;
  const auto normal = bitcast<f32>((magnitude << 22u) + 0x3f000000u);
  const auto subnormal = bitcast<f32>(magnitude | 0x4a800000u) - bitcast<f32>(0x4a800000u);
  const auto finite = bitcast<u32>(select(normal, subnormal, magnitude < 2u));
  return bitcast<f32>(finite | ((code & 8u) << 28u));
}
FEWBIT_HD inline u32 encode_e2m1_bits(u32 bits) {
  const auto magnitude = bits & 0x7fffffffu;
  const auto exponent = max(magnitude >> 23u, 1u);
  const auto significand = magnitude - ((exponent - 1u) << 23u);
  const auto kept = max(exponent, 127u);
  const auto shift = min(kept - exponent + 22u, 25u);
  const auto odd = (significand >> shift) & 1u;
  const auto rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
  const auto code = rounded + ((kept - 127u) << 1u);
  const auto saturated = select(code, 7u, code > 7u);
  return select(saturated | ((bits >> 31u) << 3u), 7u, magnitude > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e2m1(f32 value) {
  return encode_e2m1_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_e8m0(u32 code) {
  const auto field = code + 0u;
  const auto power = select(field << 23u, 0x400000u, field == 0u);
  return bitcast<f32>(select(power, 0x7fc00000u, code == 255u));
}
FEWBIT_HD inline u32 encode_e8m0_bits(u32 bits) {
  const auto rounded = select((bits + 0x400000u) >> 23u, select(0u, 1u, bits >= 0x600000u), bits < 0x800000u);
  const auto code = min(max(rounded, 0u) - 0u, 254u);
  const auto positive = select(code, 0u, bits >= 0x80000000u);
  return select(positive, 255u, bits == 0x7f800000u || (bits & 0x7fffffffu) > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_e8m0(f32 value) {
  return encode_e8m0_bits(bitcast<u32>(value));
}

FEWBIT_HD inline f32 decode_nf4(u32 code) {
  return bitcast<f32>(select(select(select(select(0xbf800000u, 0xbf323a2au, (code & 1u) != 0u), select(0xbf066cf4u, 0xbeca3055u, (code & 1u) != 0u), (code & 2u) != 0u), select(select(0xbe919ce0u, 0xbe3d3c36u, (code & 1u) != 0u), select(0xbdba92a3u, 0u, (code & 1u) != 0u), (code & 2u) != 0u), (code & 4u) != 0u), select(select(select(0x3da30553u, 0x3e24c2f8u, (code & 1u) != 0u), select(0x3e7c01a3u, 0x3ead013bu, (code & 1u) != 0u), (code & 2u) != 0u), select(select(0x3ee1a36eu, 0x3f10068eu, (code & 1u) != 0u), select(0x3f391687u, 0x3f800000u, (code & 1u) != 0u), (code & 2u) != 0u), (code & 4u) != 0u), (code & 8u) != 0u));
}
FEWBIT_HD inline u32 encode_nf4_bits(u32 bits) {
  const auto key = select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
  const auto above_0 = key >= 0x40a6e2ebu;
  const auto above_1 = key >= 0x40e3ac71u;
  const auto above_2 = key >= 0x41147ae1u;
  const auto above_3 = key >= 0x41521965u;
  const auto above_4 = key >= 0x418fc504u;
  const auto above_5 = key >= 0x41f2bd3cu;
  const auto above_6 = key >= 0x42c56d5cu;
  const auto above_7 = key >= 0xbd230554u;
  const auto above_8 = key >= 0xbdf645a2u;
  const auto above_9 = key >= 0xbe50624eu;
  const auto above_10 = key >= 0xbe958107u;
  const auto above_11 = key >= 0xbec75255u;
  const auto above_12 = key >= 0xbf006c23u;
  const auto above_13 = key >= 0xbf248e8bu;
  const auto above_14 = key >= 0xbf5c8b44u;
  return select(select(select(select(select(select(select(select(select(select(select(select(select(select(select(select(0u, 1u, above_0), 2u, above_1), 3u, above_2), 4u, above_3), 5u, above_4), 6u, above_5), 7u, above_6), 8u, above_7), 9u, above_8), 10u, above_9), 11u, above_10), 12u, above_11), 13u, above_12), 14u, above_13), 15u, above_14), 0u, (bits & 0x7fffffffu) > 0x7f800000u);
}
FEWBIT_HD inline u32 encode_nf4(f32 value) {
  return encode_nf4_bits(bitcast<u32>(value));
}
}  // namespace detail

/// How a stored number is read and written. `decode` takes a code without bits above it; `encode` rounds to nearest, ties to
/// even; both agree bit for bit with fewbit's TypeScript. A codec without them has a learned table.
namespace codec {
struct f32 {
  static constexpr int bits = 32;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_f32(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_f32(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_f32_bits(bits); }
};
struct f16 {
  static constexpr int bits = 16;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_f16(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_f16(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_f16_bits(bits); }
};
struct bf16 {
  static constexpr int bits = 16;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_bf16(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_bf16(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_bf16_bits(bits); }
};
struct e4m3 {
  static constexpr int bits = 8;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e4m3(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e4m3(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e4m3_bits(bits); }
};
struct e5m2 {
  static constexpr int bits = 8;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e5m2(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e5m2(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e5m2_bits(bits); }
};
struct int8 {
  static constexpr int bits = 8;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int8(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int8(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int8_bits(bits); }
};
struct uint4 {
  static constexpr int bits = 4;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint4(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint4(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint4_bits(bits); }
};
struct int4 {
  static constexpr int bits = 4;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int4(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int4(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int4_bits(bits); }
};
struct uint8 {
  static constexpr int bits = 8;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint8(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint8(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint8_bits(bits); }
};
struct int1 {
  static constexpr int bits = 1;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int1(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int1(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int1_bits(bits); }
};
struct int2 {
  static constexpr int bits = 2;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int2(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int2(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int2_bits(bits); }
};
struct int3 {
  static constexpr int bits = 3;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int3(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int3(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int3_bits(bits); }
};
struct int5 {
  static constexpr int bits = 5;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int5(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int5(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int5_bits(bits); }
};
struct int6 {
  static constexpr int bits = 6;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int6(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int6(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int6_bits(bits); }
};
struct int7 {
  static constexpr int bits = 7;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_int7(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_int7(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_int7_bits(bits); }
};
struct uint1 {
  static constexpr int bits = 1;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint1(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint1(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint1_bits(bits); }
};
struct uint2 {
  static constexpr int bits = 2;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint2(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint2(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint2_bits(bits); }
};
struct uint3 {
  static constexpr int bits = 3;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint3(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint3(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint3_bits(bits); }
};
struct uint5 {
  static constexpr int bits = 5;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint5(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint5(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint5_bits(bits); }
};
struct uint6 {
  static constexpr int bits = 6;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint6(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint6(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint6_bits(bits); }
};
struct uint7 {
  static constexpr int bits = 7;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_uint7(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_uint7(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_uint7_bits(bits); }
};
struct e3m2 {
  static constexpr int bits = 6;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e3m2(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e3m2(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e3m2_bits(bits); }
};
struct e2m3 {
  static constexpr int bits = 6;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e2m3(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e2m3(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e2m3_bits(bits); }
};
struct e2m2 {
  static constexpr int bits = 5;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e2m2(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e2m2(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e2m2_bits(bits); }
};
struct e3m1 {
  static constexpr int bits = 5;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e3m1(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e3m1(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e3m1_bits(bits); }
};
struct e2m1 {
  static constexpr int bits = 4;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e2m1(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e2m1(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e2m1_bits(bits); }
};
struct e8m0 {
  static constexpr int bits = 8;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_e8m0(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_e8m0(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_e8m0_bits(bits); }
};
struct nf4 {
  static constexpr int bits = 4;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
  FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_nf4(code); }
  FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_nf4(value); }
  FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_nf4_bits(bits); }
};
struct learned4_1x1 {
  static constexpr int bits = 4;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
};
struct learned8_1x1 {
  static constexpr int bits = 8;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 1;
};
struct learned4_1x2 {
  static constexpr int bits = 4;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 2;
};
struct learned8_1x4 {
  static constexpr int bits = 8;
  static constexpr int vector_rows = 1;
  static constexpr int vector_k = 4;
};
}  // namespace codec

/// The extent of a block that is the whole dimension.
constexpr int whole = 0;

template <class Codec, int Rows, int K>
struct Scale {
  using codec = Codec;
  static constexpr int rows = Rows;
  static constexpr int k = K;
};

/// none: c * s. integer: (c - z) * s. floating: (c - mid) * s + z; c the code's value, s the scale, z the zero point.
enum class ZeroDomain { none, integer, floating };

/// One struct per row of the format table. `scales` lists the levels, innermost first; a scale is the product of its levels.
namespace format {
struct f32 {
  static constexpr const char* name = "f32";
  using element = codec::f32;
  using scales = std::tuple<>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "cast";
  };
};
struct f16 {
  static constexpr const char* name = "f16";
  using element = codec::f16;
  using scales = std::tuple<>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "cast";
  };
};
struct bf16 {
  static constexpr const char* name = "bf16";
  using element = codec::bf16;
  using scales = std::tuple<>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "cast";
  };
};
struct float8_e4m3 {
  static constexpr const char* name = "float8_e4m3";
  using element = codec::e4m3;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "amax";
    static constexpr double floor = 0;
    static constexpr const char* round = "before";
  };
};
struct float8_e5m2 {
  static constexpr const char* name = "float8_e5m2";
  using element = codec::e5m2;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "amax";
    static constexpr double floor = 0;
    static constexpr const char* round = "before";
  };
};
struct int8 {
  static constexpr const char* name = "int8";
  using element = codec::int8;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -128;
    static constexpr double max = 127;
    static constexpr double eps = 1.1920928955078125e-7;
  };
};
struct int8_asymmetric {
  static constexpr const char* name = "int8_asymmetric";
  using element = codec::int8;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -128;
    static constexpr double max = 127;
    static constexpr double eps = 1.1920928955078125e-7;
  };
};
struct int4_tinygemm {
  static constexpr const char* name = "int4_tinygemm";
  using element = codec::uint4;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::floating;
  using zero_point = codec::bf16;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 15;
    static constexpr const char* eps = "normal";
  };
};
struct int4_plain {
  static constexpr const char* name = "int4_plain";
  using element = codec::int4;
  using scales = std::tuple<Scale<codec::bf16, 1, 128>>;
  static constexpr ZeroDomain zero = ZeroDomain::floating;
  using zero_point = codec::bf16;
  struct rule {
    static constexpr const char* kind = "mslk_int4";
    static constexpr bool symmetric = false;
  };
};
struct int4_symmetric {
  static constexpr const char* name = "int4_symmetric";
  using element = codec::int4;
  using scales = std::tuple<Scale<codec::bf16, 1, 128>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "mslk_int4";
    static constexpr bool symmetric = true;
  };
};
struct int4_preshuffled {
  static constexpr const char* name = "int4_preshuffled";
  using element = codec::int4;
  using scales = std::tuple<Scale<codec::e4m3, 1, 128>, Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "mslk_int4";
    static constexpr bool symmetric = true;
  };
};
struct int4_int_zero {
  static constexpr const char* name = "int4_int_zero";
  using element = codec::uint4;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 15;
    static constexpr double eps = 0.000001;
  };
};
struct int4_hqq {
  static constexpr const char* name = "int4_hqq";
  using element = codec::uint4;
  using scales = std::tuple<Scale<codec::f16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::f16;
  struct rule {
    static constexpr const char* kind = "hqq";
  };
};
struct int4_sinq {
  static constexpr const char* name = "int4_sinq";
  using element = codec::int4;
  using scales = std::tuple<Scale<codec::f32, 1, 64>, Scale<codec::f32, whole, 1>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "sinq";
    static constexpr double min = -8;
    static constexpr double max = 7;
    static constexpr double iterations = 20;
  };
};
struct int1 {
  static constexpr const char* name = "int1";
  using element = codec::int1;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -1;
    static constexpr double max = 0;
    static constexpr const char* eps = "normal";
  };
};
struct int2 {
  static constexpr const char* name = "int2";
  using element = codec::int2;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -2;
    static constexpr double max = 1;
    static constexpr const char* eps = "normal";
  };
};
struct int3 {
  static constexpr const char* name = "int3";
  using element = codec::int3;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -4;
    static constexpr double max = 3;
    static constexpr const char* eps = "normal";
  };
};
struct int4 {
  static constexpr const char* name = "int4";
  using element = codec::int4;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -8;
    static constexpr double max = 7;
    static constexpr const char* eps = "normal";
  };
};
struct int5 {
  static constexpr const char* name = "int5";
  using element = codec::int5;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -16;
    static constexpr double max = 15;
    static constexpr const char* eps = "normal";
  };
};
struct int6 {
  static constexpr const char* name = "int6";
  using element = codec::int6;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -32;
    static constexpr double max = 31;
    static constexpr const char* eps = "normal";
  };
};
struct int7 {
  static constexpr const char* name = "int7";
  using element = codec::int7;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -64;
    static constexpr double max = 63;
    static constexpr const char* eps = "normal";
  };
};
struct intx8 {
  static constexpr const char* name = "intx8";
  using element = codec::int8;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "symmetric";
    static constexpr double min = -128;
    static constexpr double max = 127;
    static constexpr const char* eps = "normal";
  };
};
struct int2_asymmetric {
  static constexpr const char* name = "int2_asymmetric";
  using element = codec::int2;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -2;
    static constexpr double max = 1;
    static constexpr const char* eps = "normal";
  };
};
struct int3_asymmetric {
  static constexpr const char* name = "int3_asymmetric";
  using element = codec::int3;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -4;
    static constexpr double max = 3;
    static constexpr const char* eps = "normal";
  };
};
struct int4_asymmetric {
  static constexpr const char* name = "int4_asymmetric";
  using element = codec::int4;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -8;
    static constexpr double max = 7;
    static constexpr const char* eps = "normal";
  };
};
struct int5_asymmetric {
  static constexpr const char* name = "int5_asymmetric";
  using element = codec::int5;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -16;
    static constexpr double max = 15;
    static constexpr const char* eps = "normal";
  };
};
struct int6_asymmetric {
  static constexpr const char* name = "int6_asymmetric";
  using element = codec::int6;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -32;
    static constexpr double max = 31;
    static constexpr const char* eps = "normal";
  };
};
struct int7_asymmetric {
  static constexpr const char* name = "int7_asymmetric";
  using element = codec::int7;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -64;
    static constexpr double max = 63;
    static constexpr const char* eps = "normal";
  };
};
struct intx8_asymmetric {
  static constexpr const char* name = "intx8_asymmetric";
  using element = codec::int8;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::int8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = -128;
    static constexpr double max = 127;
    static constexpr const char* eps = "normal";
  };
};
struct uint1 {
  static constexpr const char* name = "uint1";
  using element = codec::uint1;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 1;
    static constexpr const char* eps = "normal";
  };
};
struct uint2 {
  static constexpr const char* name = "uint2";
  using element = codec::uint2;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 3;
    static constexpr const char* eps = "normal";
  };
};
struct uint3 {
  static constexpr const char* name = "uint3";
  using element = codec::uint3;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 7;
    static constexpr const char* eps = "normal";
  };
};
struct uint4 {
  static constexpr const char* name = "uint4";
  using element = codec::uint4;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 15;
    static constexpr const char* eps = "normal";
  };
};
struct uint5 {
  static constexpr const char* name = "uint5";
  using element = codec::uint5;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 31;
    static constexpr const char* eps = "normal";
  };
};
struct uint6 {
  static constexpr const char* name = "uint6";
  using element = codec::uint6;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 63;
    static constexpr const char* eps = "normal";
  };
};
struct uint7 {
  static constexpr const char* name = "uint7";
  using element = codec::uint7;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 127;
    static constexpr const char* eps = "normal";
  };
};
struct uint8 {
  static constexpr const char* name = "uint8";
  using element = codec::uint8;
  using scales = std::tuple<Scale<codec::bf16, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::integer;
  using zero_point = codec::uint8;
  struct rule {
    static constexpr const char* kind = "affine";
    static constexpr const char* mapping = "asymmetric";
    static constexpr double min = 0;
    static constexpr double max = 255;
    static constexpr const char* eps = "normal";
  };
};
struct fp6_e3m2 {
  static constexpr const char* name = "fp6_e3m2";
  using element = codec::e3m2;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "amax";
    static constexpr double floor = 1e-12;
    static constexpr const char* round = "after";
  };
};
struct fp6_e2m3 {
  static constexpr const char* name = "fp6_e2m3";
  using element = codec::e2m3;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "amax";
    static constexpr double floor = 1e-12;
    static constexpr const char* round = "after";
  };
};
struct fp5_e2m2 {
  static constexpr const char* name = "fp5_e2m2";
  using element = codec::e2m2;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "amax";
    static constexpr double floor = 1e-12;
    static constexpr const char* round = "after";
  };
};
struct fp5_e3m1 {
  static constexpr const char* name = "fp5_e3m1";
  using element = codec::e3m1;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "amax";
    static constexpr double floor = 1e-12;
    static constexpr const char* round = "after";
  };
};
struct fp4_e2m1 {
  static constexpr const char* name = "fp4_e2m1";
  using element = codec::e2m1;
  using scales = std::tuple<Scale<codec::bf16, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "amax";
    static constexpr double floor = 1e-12;
    static constexpr const char* round = "after";
  };
};
struct mxfp8_e4m3 {
  static constexpr const char* name = "mxfp8_e4m3";
  using element = codec::e4m3;
  using scales = std::tuple<Scale<codec::e8m0, 1, 32>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "mx";
    static constexpr const char* mode = "rceil";
  };
};
struct mxfp8_e5m2 {
  static constexpr const char* name = "mxfp8_e5m2";
  using element = codec::e5m2;
  using scales = std::tuple<Scale<codec::e8m0, 1, 32>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "mx";
    static constexpr const char* mode = "rceil";
  };
};
struct mxfp6_e3m2 {
  static constexpr const char* name = "mxfp6_e3m2";
  using element = codec::e3m2;
  using scales = std::tuple<Scale<codec::e8m0, 1, 32>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "mx";
    static constexpr const char* mode = "rceil";
  };
};
struct mxfp6_e2m3 {
  static constexpr const char* name = "mxfp6_e2m3";
  using element = codec::e2m3;
  using scales = std::tuple<Scale<codec::e8m0, 1, 32>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "mx";
    static constexpr const char* mode = "rceil";
  };
};
struct mxfp4 {
  static constexpr const char* name = "mxfp4";
  using element = codec::e2m1;
  using scales = std::tuple<Scale<codec::e8m0, 1, 32>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "mx";
    static constexpr const char* mode = "rceil";
  };
};
struct nvfp4 {
  static constexpr const char* name = "nvfp4";
  using element = codec::e2m1;
  using scales = std::tuple<Scale<codec::e4m3, 1, 16>, Scale<codec::f32, whole, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "nvfp4";
    static constexpr const char* variant = "divide";
  };
};
struct nvfp4_single {
  static constexpr const char* name = "nvfp4_single";
  using element = codec::e2m1;
  using scales = std::tuple<Scale<codec::e4m3, 1, 16>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "nvfp4";
    static constexpr const char* variant = "divide";
  };
};
struct nf4 {
  static constexpr const char* name = "nf4";
  using element = codec::nf4;
  using scales = std::tuple<Scale<codec::f32, 1, 64>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "nf4";
    static constexpr double scalers = 256;
  };
};
struct codebook4 {
  static constexpr const char* name = "codebook4";
  using element = codec::learned4_1x1;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "codebook";
    static constexpr double iterations = 200;
  };
};
struct codebook8 {
  static constexpr const char* name = "codebook8";
  using element = codec::learned8_1x1;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "codebook";
    static constexpr double iterations = 200;
  };
};
struct codebook4_1x2 {
  static constexpr const char* name = "codebook4_1x2";
  using element = codec::learned4_1x2;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "codebook";
    static constexpr double iterations = 200;
  };
};
struct codebook8_1x4 {
  static constexpr const char* name = "codebook8_1x4";
  using element = codec::learned8_1x4;
  using scales = std::tuple<Scale<codec::f32, 1, whole>>;
  static constexpr ZeroDomain zero = ZeroDomain::none;
  using zero_point = void;
  struct rule {
    static constexpr const char* kind = "codebook";
    static constexpr double iterations = 200;
  };
};
}  // namespace format

}  // namespace fewbit

/// Every codec with fixed values, and every format.
#define FEWBIT_CODECS(X) \
  X(f32) \
  X(f16) \
  X(bf16) \
  X(e4m3) \
  X(e5m2) \
  X(int8) \
  X(uint4) \
  X(int4) \
  X(uint8) \
  X(int1) \
  X(int2) \
  X(int3) \
  X(int5) \
  X(int6) \
  X(int7) \
  X(uint1) \
  X(uint2) \
  X(uint3) \
  X(uint5) \
  X(uint6) \
  X(uint7) \
  X(e3m2) \
  X(e2m3) \
  X(e2m2) \
  X(e3m1) \
  X(e2m1) \
  X(e8m0) \
  X(nf4)
#define FEWBIT_FORMATS(X) \
  X(f32) \
  X(f16) \
  X(bf16) \
  X(float8_e4m3) \
  X(float8_e5m2) \
  X(int8) \
  X(int8_asymmetric) \
  X(int4_tinygemm) \
  X(int4_plain) \
  X(int4_symmetric) \
  X(int4_preshuffled) \
  X(int4_int_zero) \
  X(int4_hqq) \
  X(int4_sinq) \
  X(int1) \
  X(int2) \
  X(int3) \
  X(int4) \
  X(int5) \
  X(int6) \
  X(int7) \
  X(intx8) \
  X(int2_asymmetric) \
  X(int3_asymmetric) \
  X(int4_asymmetric) \
  X(int5_asymmetric) \
  X(int6_asymmetric) \
  X(int7_asymmetric) \
  X(intx8_asymmetric) \
  X(uint1) \
  X(uint2) \
  X(uint3) \
  X(uint4) \
  X(uint5) \
  X(uint6) \
  X(uint7) \
  X(uint8) \
  X(fp6_e3m2) \
  X(fp6_e2m3) \
  X(fp5_e2m2) \
  X(fp5_e3m1) \
  X(fp4_e2m1) \
  X(mxfp8_e4m3) \
  X(mxfp8_e5m2) \
  X(mxfp6_e3m2) \
  X(mxfp6_e2m3) \
  X(mxfp4) \
  X(nvfp4) \
  X(nvfp4_single) \
  X(nf4) \
  X(codebook4) \
  X(codebook8) \
  X(codebook4_1x2) \
  X(codebook8_1x4)
