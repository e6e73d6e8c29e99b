// Codecs, stored tensors and their reading by run-time description: adding a format adds no code here.
#pragma once
#include <cmath>
#include <cstdint>

#include "../../generated/formats.hpp"

namespace fewbit::general {

using detail::bitcast;
using u32 = std::uint32_t;
using i64 = std::int64_t;

// One IEEE operation each, rounded to nearest: nothing contracts them and no division is approximate. Host code that includes
// this is compiled with -ffp-contract=off.
#ifdef __CUDA_ARCH__
FEWBIT_HD inline float mul(float a, float b) { return __fmul_rn(a, b); }
FEWBIT_HD inline float add(float a, float b) { return __fadd_rn(a, b); }
FEWBIT_HD inline float sub(float a, float b) { return __fsub_rn(a, b); }
FEWBIT_HD inline float div(float a, float b) { return __fdiv_rn(a, b); }
#else
FEWBIT_HD inline float mul(float a, float b) { return a * b; }
FEWBIT_HD inline float add(float a, float b) { return a + b; }
FEWBIT_HD inline float sub(float a, float b) { return a - b; }
FEWBIT_HD inline float div(float a, float b) { return a / b; }
#endif

constexpr u32 kNan = 0x7fc00000u;
constexpr u32 kInfinity = 0x7f800000u;

FEWBIT_HD inline bool isNan(float a) { return (bitcast<u32>(a) & 0x7fffffffu) > kInfinity; }

// A larger number has a larger key; -0 comes just before 0.
FEWBIT_HD inline u32 orderKey(float a) {
  const u32 bits = bitcast<u32>(a);
  return bits >= 0x80000000u ? ~bits : bits | 0x80000000u;
}
FEWBIT_HD inline float fromOrderKey(u32 key) {
  return bitcast<float>(key >= 0x80000000u ? key & 0x7fffffffu : ~key);
}

/** The larger one, NaN if either is. */
FEWBIT_HD inline float larger(float a, float b) {
  if (isNan(a) || isNan(b)) return bitcast<float>(kNan);
  return orderKey(a) < orderKey(b) ? b : a;
}
/** NaN passes through. */
FEWBIT_HD inline float clampTo(float a, float low, float high) { return a < low ? low : a > high ? high : a; }

/** The types that the specification rounds steps to. */
enum class Type : int { f32, f16, bf16 };

FEWBIT_HD inline float roundTo(Type type, float a) {
  if (type == Type::f32) return a;
  const u32 bits = bitcast<u32>(a);
  return type == Type::bf16 ? detail::decode_bf16(detail::encode_bf16_bits(bits)) : detail::decode_f16(detail::encode_f16_bits(bits));
}

enum class CodecKind : int { real, exponent, integer, table };

/** One codec of `formats/format.ts`, as numbers. */
struct Codec {
  CodecKind kind;
  int bits;
  int isSigned;
  int mantissa;   // real: bits of it
  int lowest;     // real: float32's exponent field of the smallest normal number; exponent: that of code 0
  u32 maxFinite;  // real: codes without their sign, as floatFields of formats/codec.ts
  u32 overflow;
  u32 nan;
  int ieee;       // real: above maxFinite lies an infinity
  int entries;    // table: numbers in it
  int vector;     // table: numbers of an entry

  FEWBIT_HD u32 mask() const { return bits == 32 ? 0xffffffffu : (1u << bits) - 1u; }

  /** The value of a code, by formula; `entry` of a table is read from `table`. */
  FEWBIT_HD float decode(u32 code, const float* table = nullptr) const {
    switch (kind) {
      case CodecKind::table:
        return table[code];
      case CodecKind::integer:
        return isSigned ? static_cast<float>(static_cast<std::int32_t>(code << (32 - bits)) >> (32 - bits)) : static_cast<float>(code);
      case CodecKind::exponent: {
        const u32 field = code + static_cast<u32>(lowest);
        return bitcast<float>(code == mask() ? kNan : field == 0u ? 0x400000u : field << 23);
      }
      default: {
        if (bits == 32) return bitcast<float>(code);
        const u32 sign = isSigned ? 1u << (bits - 1) : 0u;
        const u32 magnitude = code & (mask() ^ sign);
        const int shift = 23 - mantissa;
        // The fields of float32 with a shorter mantissa: infinity, NaN and subnormals keep their places.
        if (bits == mantissa + 9 && lowest == 1 && ieee && isSigned) return bitcast<float>(code << shift);
        u32 value;
        if (magnitude > maxFinite) {
          value = ieee ? (magnitude << shift) | kInfinity : kNan;
        } else if (magnitude < (1u << mantissa)) {
          const u32 base = static_cast<u32>(lowest + shift) << 23;
          value = bitcast<u32>(sub(bitcast<float>(magnitude | base), bitcast<float>(base)));
        } else {
          value = (magnitude << shift) + (static_cast<u32>(lowest - 1) << 23);
        }
        return bitcast<float>(value | ((code & sign) != 0u ? 0x80000000u : 0u));
      }
    }
  }

  /** The code nearest to a value, ties to even; what overflows and NaN become is `encode` of formats/codec.ts. */
  FEWBIT_HD u32 encode(float value, const float* table = nullptr) const {
    const u32 bits32 = bitcast<u32>(value);
    const u32 magnitude = bits32 & 0x7fffffffu;
    switch (kind) {
      case CodecKind::integer: {
        if (magnitude > kInfinity) return 0u;
        const i64 half = static_cast<i64>(1) << (bits - 1);
        const double least = isSigned ? static_cast<double>(-half) : 0.0;
        const double most = static_cast<double>(isSigned ? half - 1 : 2 * half - 1);
        const double rounded = rint(static_cast<double>(value));
        const double clipped = rounded < least ? least : rounded > most ? most : rounded;
        return static_cast<u32>(static_cast<i64>(clipped)) & mask();
      }
      case CodecKind::exponent: {
        if (magnitude > kInfinity || bits32 == kInfinity) return mask();
        if (bits32 >= 0x80000000u) return 0u;
        // Half a binade rounds up. Below 2^-126 the leading bit is explicit: 1.5 * 2^-127 is 0x600000.
        const u32 rounded = bits32 < 0x800000u ? (bits32 >= 0x600000u ? 1u : 0u) : (bits32 + 0x400000u) >> 23;
        const u32 offset = static_cast<u32>(lowest);
        const u32 code = rounded > offset ? rounded - offset : 0u;
        return code < mask() - 1u ? code : mask() - 1u;
      }
      case CodecKind::table: {
        // Far outside the table the distances cannot be told apart, and infinities have none.
        double low = table[0], high = table[0];
        for (int i = 1; i < entries; i++) {
          low = table[i] < low ? table[i] : low;
          high = table[i] > high ? table[i] : high;
        }
        const double given = value < low ? low : value > high ? high : static_cast<double>(value);
        u32 best = 0u;
        for (int i = 1; i < entries; i++) {
          if (fabs(given - static_cast<double>(table[i])) < fabs(given - static_cast<double>(table[best]))) best = static_cast<u32>(i);
        }
        return best;
      }
      default: {
        if (bits == 32) return bits32;
        if (magnitude > kInfinity) return nan;
        // One rounding serves normal and subnormal codes: below the lowest exponent the significand only moves further right,
        // and a carry out of the mantissa moves into the exponent by itself.
        const u32 exponent = detail::max(magnitude >> 23, 1u);
        const u32 significand = magnitude - ((exponent - 1u) << 23);
        const u32 kept = detail::max(exponent, static_cast<u32>(lowest));
        const u32 shift = detail::min(kept - exponent + static_cast<u32>(23 - mantissa), 25u);
        const u32 odd = (significand >> shift) & 1u;
        const u32 rounded = (significand + ((1u << (shift - 1u)) - 1u) + odd) >> shift;
        const u32 code = rounded + ((kept - static_cast<u32>(lowest)) << mantissa);
        const u32 sign = isSigned && bits32 >= 0x80000000u ? 1u << (bits - 1) : 0u;
        return (code > maxFinite ? overflow : code) | sign;
      }
    }
  }
};

/** Code number `index` of a run of codes of `bits` bits that starts at `words`. */
FEWBIT_HD inline u32 readCode(const u32* words, i64 index, int bits) {
  const i64 bit = index * bits;
  const u32* at = words + (bit >> 5);
  const int offset = static_cast<int>(bit & 31);
  u32 code = at[0] >> offset;
  if (offset + bits > 32) code |= at[1] << (32 - offset);
  return bits == 32 ? code : code & ((1u << bits) - 1u);
}

/** Stores a code of 8, 16 or 32 bits. */
FEWBIT_HD inline void storeCode(u32* words, i64 index, int bits, u32 code) {
  if (bits == 8) reinterpret_cast<std::uint8_t*>(words)[index] = static_cast<std::uint8_t>(code);
  else if (bits == 16) reinterpret_cast<std::uint16_t*>(words)[index] = static_cast<std::uint16_t>(code);
  else words[index] = code;
}

/** One number for every block of a stored tensor: a scale level, or its zero points. */
struct Blocks {
  Codec codec;
  u32 offset;   // words from the tensor's first
  int rows, k;  // extents of a block; 0 rows are all
  int columns;  // blocks in a row of them

  FEWBIT_HD i64 index(i64 row, int at) const { return (rows == 0 ? 0 : row / rows * columns) + at / k; }
  FEWBIT_HD float value(const u32* words, i64 row, int at) const {
    return codec.decode(readCode(words + offset, index(row, at), codec.bits));
  }
};

enum class ZeroKind : int { none, integer, real };
constexpr int kMostLevels = 3;

/** A stored tensor in `storedLayout`, as numbers. `words` and `table` are where it lies. */
struct Stored {
  Codec element;
  int vectorRows, vectorK;
  int k;
  int rowStride;  // words
  int levels;
  Blocks scales[kMostLevels];
  ZeroKind zeroKind;
  Blocks zero;
  float middle;     // the code subtracted by a float zero point
  int granularity;  // elements along k that share all scales and zero points
  const u32* words;
  const float* table;

  /** The code value of an element: no scale, no zero point. `lut` replaces decoding when it is not null. */
  FEWBIT_HD float raw(i64 row, int at, const float* lut = nullptr) const {
    const u32 code = readCode(words + row / vectorRows * rowStride, at / vectorK, element.bits);
    if (element.kind == CodecKind::table) {
      const int lane = static_cast<int>(row % vectorRows) * vectorK + at % vectorK;
      return (lut != nullptr ? lut : table)[static_cast<i64>(code) * element.vector + lane];
    }
    return lut != nullptr ? lut[code] : element.decode(code);
  }
  FEWBIT_HD float scale(i64 row, int at) const {
    if (levels == 0) return 1.0f;
    float product = scales[levels - 1].value(words, row, at);
    for (int i = levels - 2; i >= 0; i--) product = mul(product, scales[i].value(words, row, at));
    return product;
  }
  /** What is subtracted from code values. */
  FEWBIT_HD float shift(i64 row, int at) const {
    if (zeroKind == ZeroKind::none) return 0.0f;
    return zeroKind == ZeroKind::integer ? zero.value(words, row, at) : middle;
  }
  /** What is added to scaled values. */
  FEWBIT_HD float offset(i64 row, int at) const { return zeroKind == ZeroKind::real ? zero.value(words, row, at) : 0.0f; }

  /** The element's value, every operation rounded to a type (`quantize/dequantize.ts`). */
  FEWBIT_HD float rounded(i64 row, int at, Type type) const {
    float value = roundTo(type, raw(row, at));
    if (zeroKind == ZeroKind::integer) value = roundTo(type, sub(value, roundTo(type, zero.value(words, row, at))));
    if (zeroKind == ZeroKind::real && middle != 0.0f) value = roundTo(type, sub(value, middle));
    if (levels > 0) value = roundTo(type, mul(value, scale(row, at)));
    return zeroKind == ZeroKind::real ? roundTo(type, add(value, zero.value(words, row, at))) : value;
  }
  FEWBIT_HD float value(i64 row, int at) const { return rounded(row, at, Type::f32); }
};

}  // namespace fewbit::general
