// Reads what linear-arguments.ts writes: bindings and integers, in one order.
#pragma once
#include <cstring>

#include "operands.cuh"

namespace fewbit::linear {

class Arguments {
 public:
  explicit Arguments(const Launch& launch) : launch_(launch) {}

  int64_t integer() { return at_ < launch_.argCount ? launch_.args[at_++] : (broken_ = true, 0); }
  int small() { return static_cast<int>(integer()); }
  bool flag() { return integer() != 0; }
  float real() {
    const uint32_t bits = static_cast<uint32_t>(integer());
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  /** A binding, or null for -1. `bytes` gets its size. */
  uint8_t* buffer(uint64_t* bytes = nullptr) {
    const int64_t index = integer();
    if (index >= launch_.bufferCount) broken_ = true;
    if (index < 0 || index >= launch_.bufferCount) return nullptr;
    if (bytes != nullptr) *bytes = launch_.sizes[index];
    return static_cast<uint8_t*>(launch_.buffers[index]);
  }
  /** Scale or zero codes that lie at a byte offset of `base`. */
  Blocks blocks(const uint8_t* base) {
    Blocks blocks;
    blocks.codec = static_cast<ScaleCodec>(small());
    if (blocks.codec == ScaleCodec::none) return blocks;
    blocks.at = base + integer();
    blocks.rows = small();
    blocks.k = small();
    blocks.columns = small();
    return blocks;
  }
  Extent extent() {
    const int64_t coefficient = integer();
    return Extent{coefficient, integer()};
  }
  Dense dense() {
    Dense dense;
    dense.at = reinterpret_cast<float*>(buffer());
    if (dense.at == nullptr) return dense;
    dense.stride = integer();
    dense.at += integer();
    return dense;
  }
  WeightGroup weightGroup() {
    WeightGroup group;
    group.kind = static_cast<CodeKind>(small());
    group.parts = small();
    group.n = small();
    group.k = small();
    group.rowBytes = integer();
    group.element.flip = static_cast<uint32_t>(integer());
    group.element.offset = real();
    group.element.zeros = flag();
    group.element.mantissa = small();
    group.element.multiplier = real();
    group.floatZero = flag();
    for (int part = 0; part < group.parts && part < 2; part++) {
      Weights& weights = group.weights[part];
      weights.codes = buffer();
      weights.scale = blocks(weights.codes);
      weights.outer = blocks(weights.codes);
      weights.zero = blocks(weights.codes);
    }
    return group;
  }
  Activations activations() {
    Activations x;
    uint8_t* base = buffer();
    x.bits = small();
    x.half = flag();
    x.stride = integer();
    x.at = base + integer();
    x.table = reinterpret_cast<const float*>(buffer());
    x.scale[0] = blocks(base);
    x.scale[1] = blocks(base);
    x.zero = blocks(base);
    x.rows = extent();
    return x;
  }
  Epilogue epilogue() {
    Epilogue epilogue;
    epilogue.fn = static_cast<Activation>(small());
    epilogue.rounding = static_cast<Rounding>(small());
    epilogue.out = dense();
    epilogue.residual = dense();
    for (auto& bias : epilogue.bias) bias = reinterpret_cast<const float*>(buffer());
    return epilogue;
  }
  /** Whether more was read than there is: table and addon disagree. */
  bool broken() const { return broken_ || at_ != launch_.argCount; }

 private:
  const Launch& launch_;
  int at_ = 0;
  bool broken_ = false;
};

}  // namespace fewbit::linear
