// How scales, zero points and codes are chosen: `quantize/rules.ts` bit for bit, by run-time description.
#pragma once
#include "codec.hpp"

namespace fewbit::general {

enum class RuleKind : int { cast, affine, amax, mslk, mx, nvfp4, nf4 };
enum class Mapping : int { symmetric, noClipping, asymmetric };
enum class MxMode : int { floor, ceil, even, rceil };

/** The codes of a block's scale and zero point, and what its elements are coded with. */
struct Chosen {
  u32 scale, zero;
  float a, b;
};

/** A format's rule. What a field means depends on the rule: see the kernel table's `ruleArgs`. */
struct Rule {
  RuleKind kind;
  Type dtype, storedIn, promoted;
  int guarded;
  Codec element, scale, zero, outer;
  ZeroKind zeroKind;
  const float* table;  // a table codec's entries

  Mapping mapping;         // affine
  int oneSided;            // affine: -1 or 1 when that side alone has codes (one-bit ranges)
  int preserveZero;        // affine
  float min, max, eps;     // affine: the code range; nvfp4: the scale's range
  float span, middle;      // affine: max - min, or half of it, and (max + min + 1) / 2
  float floor, ceiling;    // amax
  float top;               // the element codec's largest value
  float inverseTop;        // mx
  int before, power;       // amax
  int symmetric;           // mslk
  MxMode mode;             // mx
  int mxPower;             // mx: floor(log2(top))
  u32 halfUlp;             // mx
  int multiply;            // nvfp4
  int outerKind;           // 0 none, 1 a tensor, 2 a row
  int outerDynamic;        // whether it depends on the data
  int prepares;            // whether values are rounded to the first level's codec first
  float outerTop, outerFloor, outerGiven;
  int scalers;             // nf4: scales that are quantized together; 0 without

  FEWBIT_HD float rnd(float a) const { return roundTo(dtype, a); }
  FEWBIT_HD float cut(float a) const { return clampTo(a, -top, top); }
  FEWBIT_HD static u32 code(const Codec& codec, float value) { return codec.encode(isNan(value) ? bitcast<float>(kNan) : value); }

  /** The second scale level's code, from the extremes of what it spans. */
  FEWBIT_HD u32 outerCode(float lo, float hi) const {
    if (kind == RuleKind::mslk) return code(outer, div(larger(larger(-lo, hi), 1.0f / 512.0f), outerTop));
    const float chosen = outerDynamic ? div(larger(-lo, hi), outerTop) : outerGiven;
    return code(outer, chosen < outerFloor ? outerFloor : chosen);
  }
  /** Replaces a value before anything else looks at it. */
  FEWBIT_HD float prepare(float x, float outerValue) const {
    return prepares ? scale.decode(scale.encode(div(x, outerValue))) : x;
  }

  /** The parameters of a block with these extremes (both NaN if it holds one), or with a given scale and zero point. */
  FEWBIT_HD Chosen choose(float lo, float hi, float outerValue, const float* given = nullptr, const float* givenZero = nullptr) const {
    switch (kind) {
      case RuleKind::affine:
        return chooseAffine(lo, hi, given, givenZero);
      case RuleKind::amax:
        return chooseAmax(lo, hi, given);
      case RuleKind::mslk:
        return chooseMslk(lo, hi, given, givenZero);
      case RuleKind::mx:
        return chooseMx(lo, hi, given);
      case RuleKind::nvfp4: {
        const float inverse = outerKind == 0 ? 1.0f : div(1.0f, outerValue);
        float chosen = div(larger(-lo, hi), top);
        if (outerKind != 0) chosen = multiply ? mul(chosen, inverse) : div(chosen, outerValue);
        if (given != nullptr) chosen = *given;
        const u32 stored = code(scale, clampTo(chosen, min, max));
        return {stored, 0u, div(inverse, scale.decode(stored)), 0.0f};
      }
      case RuleKind::nf4: {
        const float largest = larger(-lo, hi);
        return {bitcast<u32>(largest), 0u, guarded && largest == 0.0f ? 1.0f : largest, 0.0f};
      }
      default:
        return {0u, 0u, 0.0f, 0.0f};
    }
  }

  /** The element code of a (prepared) value, without bits above it. */
  FEWBIT_HD u32 codeOf(float x, float a, float b) const {
    switch (kind) {
      case RuleKind::affine: {
        float steps;
        if (zeroKind == ZeroKind::real) {
          steps = rintf(roundTo(promoted, div(roundTo(promoted, sub(x, b)), a)));
        } else {
          steps = roundTo(promoted, add(rintf(roundTo(promoted, mul(x, a))), b));
        }
        if (isNan(steps)) return 0u;
        return static_cast<u32>(static_cast<int>(clampTo(steps, min, max))) & element.mask();
      }
      case RuleKind::amax:
        return element.encode(cut(div(x, a)), table);
      case RuleKind::mslk: {
        if (symmetric) return element.encode(clampTo(div(x, a), -8.0f, 7.0f), table);
        const float steps = clampTo(rintf(div(sub(x, b), a)), 0.0f, 15.0f);
        return element.encode(sub(steps, 8.0f), table);
      }
      case RuleKind::mx:
      case RuleKind::nvfp4:
        return element.encode(cut(mul(x, a)), table);
      case RuleKind::nf4:
        return nearestEntry(rnd(div(x, a)));
      default:
        return element.encode(x, table);
    }
  }

  /** A quantized scale of nf4 (`quantizeScalers`): `largest` is the largest |offset| of its group. */
  FEWBIT_HD float scalerFactor(float largest) const { return rnd(mul(rnd(div(0.5f, largest)), 256.0f)); }
  FEWBIT_HD float scalerOffset(float value, float mean) const { return rnd(sub(value, mean)); }
  FEWBIT_HD float scaler(float value, float mean, float factor) const {
    const float steps = rintf(rnd(mul(scalerOffset(value, mean), factor)));
    const float code = isNan(steps) ? 0.0f : clampTo(steps, -128.0f, 127.0f);
    return rnd(add(rnd(div(code, factor)), mean));
  }

  /** `choose` of the rule amax. */
  FEWBIT_HD Chosen chooseAmax(float lo, float hi, const float* given) const {
    const float largest = clampTo(larger(-lo, hi), floor, ceiling);
    const float quotient = div(largest, top);
    float chosen = before ? rnd(quotient) : quotient;
    if (power) chosen = nearestPower(chosen);
    const float least = 1.17549435e-38f;
    // A scale of zero makes 0/0 of an all-zero block; a subnormal one is flushed by some devices.
    if (guarded && chosen < least) chosen = larger(quotient, least);
    if (given != nullptr) chosen = *given;
    const u32 stored = code(scale, chosen);
    return {stored, 0u, before ? scale.decode(stored) : chosen, 0.0f};
  }

 private:
  FEWBIT_HD Chosen chooseAffine(float lo, float hi, const float* given, const float* givenZero) const {
    const float least = preserveZero && lo > 0.0f ? 0.0f : lo;
    const float greatest = preserveZero && hi < 0.0f ? 0.0f : hi;
    float chosen;
    if (mapping == Mapping::asymmetric) chosen = rnd(div(rnd(sub(greatest, least)), span));
    else if (oneSided != 0) chosen = rnd(oneSided < 0 ? -least : greatest);
    else if (mapping == Mapping::symmetric) chosen = rnd(div(larger(-least, greatest), span));
    else {
      const float below = rnd(div(least, min)), above = rnd(div(greatest, max));
      chosen = below > above ? below : above;
    }
    if (chosen < eps) chosen = eps;
    if (given != nullptr) chosen = *given;
    // A scale that float16 holds as (nearly) zero has no reciprocal there: 0 * infinity would be the code of zero.
    if (guarded && roundTo(storedIn, div(1.0f, roundTo(storedIn, chosen))) == bitcast<float>(kInfinity))
      chosen = storedIn == Type::f16 ? 6.103515625e-05f : 1.17549435e-38f;
    const u32 stored = code(scale, chosen);
    const float value = scale.decode(stored);
    const float fixed = givenZero == nullptr ? 0.0f : *givenZero;
    if (zeroKind == ZeroKind::real) {
      const u32 zeroCode = code(zero, given != nullptr ? fixed : rnd(add(lo, rnd(mul(chosen, middle)))));
      return {stored, zeroCode, value, roundTo(promoted, sub(zero.decode(zeroCode), roundTo(promoted, mul(value, middle))))};
    }
    const float inverse = roundTo(storedIn, div(1.0f, value));
    if (zeroKind == ZeroKind::none) return {stored, 0u, inverse, 0.0f};
    float point = truncf(middle);
    if (mapping == Mapping::asymmetric) point = clampTo(rnd(sub(min, rintf(rnd(div(least, chosen))))), min, max);
    if (given != nullptr) point = fixed;
    const u32 zeroCode = code(zero, point);
    return {stored, zeroCode, inverse, zero.decode(zeroCode)};
  }

  /** The power of two nearest in log2: no float32 is sqrt(2) times one, 0x3504f3 is the last mantissa below. */
  FEWBIT_HD static float nearestPower(float a) {
    const u32 bits = bitcast<u32>(a);
    if (bits == 0u || bits >= kInfinity) return a;
    int exponent = 0;
    const float fraction = frexpf(a, &exponent);  // in [1/2, 1)
    return ldexpf(1.0f, exponent - 1 + ((bitcast<u32>(fraction) & 0x7fffffu) > 0x3504f3u ? 1 : 0));
  }

  FEWBIT_HD Chosen chooseMslk(float lo, float hi, const float* given, const float* givenZero) const {
    const float least = 1e-6f;
    if (symmetric) {
      const float largest = larger(-lo, hi);
      const float chosen = given != nullptr ? *given : div(largest < least ? least : largest, 8.0f);
      return {code(scale, chosen), 0u, chosen, 0.0f};
    }
    const float range = sub(hi, lo);
    const float chosen = given != nullptr ? *given : div(range < least ? least : range, 15.0f);
    const float eight = mul(chosen, 8.0f);
    const float point = givenZero != nullptr ? *givenZero : add(lo, eight);
    const float start = given != nullptr ? sub(point, eight) : lo;
    return {code(scale, chosen), zeroKind == ZeroKind::none ? 0u : code(zero, point), chosen, start};
  }

  FEWBIT_HD Chosen chooseMx(float lo, float hi, const float* given) const {
    const u32 largest = bitcast<u32>(larger(-lo, hi)) & 0x7fffffffu;
    u32 exponent = largest >> 23, byte;
    if (mode == MxMode::rceil) {
      const u32 bits = bitcast<u32>(mul(bitcast<float>(largest), inverseTop));
      exponent = bits >> 23;
      const u32 fraction = bits & 0x7fffffu;
      byte = exponent + (exponent == 0u ? (fraction > 0x400000u ? 1u : 0u) : fraction == 0u ? 0u : 1u);
    } else {
      if (mode == MxMode::even) exponent = (largest + halfUlp) >> 23;
      byte = exponent + (mode == MxMode::ceil && (largest & 0x7fffffu) != 0u ? 1u : 0u);
      byte = byte > static_cast<u32>(mxPower) ? byte - static_cast<u32>(mxPower) : 0u;
    }
    if ((exponent & 255u) == 255u) byte = 255u;
    if (given != nullptr) byte = code(scale, *given);
    const u32 reciprocal = byte == 255u ? kNan : byte == 254u ? 0x400000u : (254u - byte) << 23;
    return {byte, 0u, bitcast<float>(reciprocal), 0.0f};
  }

  /** The first entry of a sorted table nearest to a ratio: only the two around it can be. */
  FEWBIT_HD u32 nearestEntry(float ratio) const {
    if (isNan(ratio)) return 0u;
    int low = 0, high = element.entries - 1;
    while (high - low > 1) {
      const int middleEntry = (low + high) / 2;
      if (ratio >= table[middleEntry]) low = middleEntry;
      else high = middleEntry;
    }
    const float below = fabsf(rnd(sub(ratio, table[low]))), above = fabsf(rnd(sub(ratio, table[high])));
    return static_cast<u32>(above < below ? high : low);
  }
};

/** Keys of extremes: a NaN is both the least and the greatest of its run. */
FEWBIT_HD inline u32 lowKey(float a) { return isNan(a) ? 0u : orderKey(a); }
FEWBIT_HD inline u32 highKey(float a) { return isNan(a) ? 0xffffffffu : orderKey(a); }

}  // namespace fewbit::general
