// linear/skinny: x W^T for few rows of x.
#include "arguments.hpp"
#include "skinny.cuh"

namespace fewbit::linear {

template <class Codes>
cudaError_t launchCodes(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes);

namespace {

cudaError_t run(const Launch& launch) {
  Arguments arguments(launch);
  SkinnyParams p;
  static_cast<WeightGroup&>(p) = arguments.weightGroup();
  p.x = arguments.activations();
  p.epilogue = arguments.epilogue();
  p.promote = static_cast<Promote>(arguments.small());
  p.unit = arguments.small();
  p.fold = arguments.flag();
  p.separable = arguments.flag();
  p.parts3 = arguments.small();
  uint64_t scratchBytes = 0;
  p.partial = reinterpret_cast<float*>(arguments.buffer(&scratchBytes));
  if (arguments.broken()) return cudaErrorInvalidValue;
  p.symbols = launch.deviceSymbols;
  const int rows = static_cast<int>(p.x.rows.at(launch.symbols));
  if (rows == 0) return cudaSuccess;
  return withCodes(p.kind, [&](auto codes) { return launchCodes<decltype(codes)>(launch, p, rows, scratchBytes); });
}

}  // namespace
}  // namespace fewbit::linear

namespace fewbit {
extern const Entry kLinearSkinnyEntries[];
extern const size_t kLinearSkinnyEntryCount;
const Entry kLinearSkinnyEntries[] = {{"linear/skinny", 2, linear::run}};
const size_t kLinearSkinnyEntryCount = sizeof kLinearSkinnyEntries / sizeof *kLinearSkinnyEntries;
}  // namespace fewbit
