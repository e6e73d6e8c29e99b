// linear/mixed: x W^T for some tens of rows of x, over stored codes of W.
#include "arguments.hpp"
#include "mixed-params.cuh"

namespace fewbit::linear {

template <class Codes>
cudaError_t launchMixedCodes(const Launch& launch, MixedParams& p, int rows, uint64_t scratchBytes);

namespace {

cudaError_t runMixed(const Launch& launch) {
  Arguments arguments(launch);
  MixedParams p;
  static_cast<WeightGroup&>(p) = arguments.weightGroup();
  p.x = arguments.activations();
  p.epilogue = arguments.epilogue();
  p.promote = static_cast<Promote>(arguments.small());
  p.unit = arguments.small();
  p.fold = arguments.flag();
  p.separable = arguments.flag();
  p.parts3 = arguments.small();
  uint64_t scratchBytes = 0;
  p.columns = arguments.buffer(&scratchBytes);
  if (arguments.broken()) return cudaErrorInvalidValue;
  p.symbols = launch.deviceSymbols;
  const int rows = static_cast<int>(p.x.rows.at(launch.symbols));
  if (rows == 0) return cudaSuccess;
  return withCodes(p.kind, [&](auto codes) { return launchMixedCodes<decltype(codes)>(launch, p, rows, scratchBytes); });
}

}  // namespace
}  // namespace fewbit::linear

namespace fewbit {
extern const Entry kLinearMixedEntries[];
extern const size_t kLinearMixedEntryCount;
const Entry kLinearMixedEntries[] = {{"linear/mixed", 1, linear::runMixed}};
const size_t kLinearMixedEntryCount = sizeof kLinearMixedEntries / sizeof *kLinearMixedEntries;
}  // namespace fewbit
