// linear/mixed: x W^T for some tens of rows of x, over stored codes of W.
#include "mixed-params.cuh"
#include "skinny-arguments.hpp"

namespace fewbit::linear {

template <class Codes>
cudaError_t launchMixedCodes(const Launch& launch, MixedParams& p, int rows, uint64_t scratchBytes);

namespace {

cudaError_t runMixed(const Launch& launch) {
  MixedParams p;
  uint8_t* scratch = nullptr;
  uint64_t scratchBytes = 0;
  Arguments arguments(launch);
  readDecoded(launch, arguments, p, scratch, scratchBytes);
  if (arguments.broken()) return cudaErrorInvalidValue;
  p.columns = scratch;
  const int rows = static_cast<int>(p.x.rows.at(launch.symbols));
  if (rows == 0) return cudaSuccess;
  return withCodes(p.kind, [&](auto codes) { return launchMixedCodes<decltype(codes)>(launch, p, rows, scratchBytes); });
}

}  // namespace
}  // namespace fewbit::linear

namespace fewbit {
extern const Entry kLinearMixedEntries[];
extern const size_t kLinearMixedEntryCount;
const Entry kLinearMixedEntries[] = {{"linear/mixed", 2, linear::runMixed}};
const size_t kLinearMixedEntryCount = sizeof kLinearMixedEntries / sizeof *kLinearMixedEntries;
}  // namespace fewbit
