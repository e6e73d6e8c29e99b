// Reads what `general-arguments.ts` writes: bindings and integers in one order on both sides.
#pragma once
#include "rules.hpp"

namespace fewbit::general {

class Args {
 public:
  Args(const i64* at, void* const* buffers) : at_(at), buffers_(buffers) {}

  i64 next() { return *at_++; }
  int integer() { return static_cast<int>(next()); }
  bool flag() { return next() != 0; }
  float real() { return bitcast<float>(static_cast<u32>(next())); }
  /** A bound buffer, or null where there is none. */
  template <class T>
  T* buffer() {
    const i64 index = next();
    return index < 0 ? nullptr : static_cast<T*>(buffers_[index]);
  }

  Codec codec() {
    Codec c{};
    c.kind = static_cast<CodecKind>(next());
    c.bits = integer();
    c.isSigned = integer();
    c.mantissa = integer();
    c.lowest = integer();
    c.maxFinite = static_cast<u32>(next());
    c.overflow = static_cast<u32>(next());
    c.nan = static_cast<u32>(next());
    c.ieee = integer();
    c.entries = integer();
    c.vector = integer();
    return c;
  }
  /** A table codec's numbers: a buffer and words from its start. */
  const float* table() {
    const float* data = buffer<const float>();
    const i64 offset = next();
    return data == nullptr ? nullptr : data + offset;
  }
  Stored stored() {
    Stored s{};
    s.words = buffer<const u32>();
    s.element = codec();
    s.table = table();
    s.vectorRows = integer();
    s.vectorK = integer();
    s.k = integer();
    s.rowStride = integer();
    s.granularity = integer();
    s.middle = real();
    s.levels = integer();
    for (int i = 0; i < s.levels; i++) s.scales[i] = blocks();
    s.zeroKind = static_cast<ZeroKind>(next());
    if (s.zeroKind != ZeroKind::none) s.zero = blocks();
    return s;
  }
  Rule rule() {
    Rule r{};
    r.kind = static_cast<RuleKind>(next());
    r.dtype = static_cast<Type>(next());
    r.storedIn = static_cast<Type>(next());
    r.promoted = static_cast<Type>(next());
    r.guarded = integer();
    r.zeroKind = static_cast<ZeroKind>(next());
    r.element = codec();
    r.table = table();
    r.scale = codec();
    r.zero = codec();
    r.outer = codec();
    r.mapping = static_cast<Mapping>(next());
    r.oneSided = integer();
    r.preserveZero = integer();
    r.min = real();
    r.max = real();
    r.eps = real();
    r.span = real();
    r.middle = real();
    r.floor = real();
    r.ceiling = real();
    r.top = real();
    r.inverseTop = real();
    r.before = integer();
    r.power = integer();
    r.symmetric = integer();
    r.mode = static_cast<MxMode>(next());
    r.mxPower = integer();
    r.halfUlp = static_cast<u32>(next());
    r.multiply = integer();
    r.outerKind = integer();
    r.outerDynamic = integer();
    r.prepares = integer();
    r.outerTop = real();
    r.outerFloor = real();
    r.outerGiven = real();
    r.scalers = integer();
    return r;
  }

 private:
  Blocks blocks() {
    Blocks b{};
    b.codec = codec();
    b.offset = static_cast<u32>(next());
    b.rows = integer();
    b.k = integer();
    b.columns = integer();
    return b;
  }
  const i64* at_;
  void* const* buffers_;
};

}  // namespace fewbit::general
