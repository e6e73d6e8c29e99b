// What the kernels that decode weights where they multiply them are given: linear/skinny and linear/mixed.
#pragma once
#include "arguments.hpp"
#include "skinny-params.cuh"

namespace fewbit::linear {

/** Reads what both are given, and the scratch that comes last of it. */
inline void readDecoded(const Launch& launch, Arguments& arguments, SkinnyParams& p, uint8_t*& scratch, uint64_t& scratchBytes) {
  static_cast<WeightGroup&>(p) = arguments.weightGroup();
  p.x = arguments.activations();
  p.epilogue = arguments.epilogue();
  p.promote = static_cast<Promote>(arguments.small());
  p.unit = arguments.small();
  p.fold = arguments.flag();
  p.separable = arguments.flag();
  p.parts3 = arguments.small();
  scratch = arguments.buffer(&scratchBytes);
  p.symbols = launch.deviceSymbols;
}

}  // namespace fewbit::linear
