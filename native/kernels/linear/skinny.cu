// linear/skinny: x W^T for few rows of x.
#include "skinny-arguments.hpp"

namespace fewbit::linear {

template <class Codes>
cudaError_t launchCodes(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes);

namespace {

cudaError_t run(const Launch& launch) {
  SkinnyParams p;
  uint8_t* scratch = nullptr;
  uint64_t scratchBytes = 0;
  Arguments arguments(launch);
  readDecoded(launch, arguments, p, scratch, scratchBytes);
  const int ways = arguments.small();
  p.bytes = (ways & 1) != 0;
  p.groups = (ways & 2) != 0;
  p.norm.row = reinterpret_cast<const float*>(arguments.buffer());
  if (p.norm.row != nullptr) {
    p.norm.row += arguments.integer();
    p.norm.weight = reinterpret_cast<const float*>(arguments.buffer());
    p.norm.eps = arguments.real();
  }
  if (arguments.broken()) return cudaErrorInvalidValue;
  p.partial = reinterpret_cast<float*>(scratch);
  const int rows = static_cast<int>(p.x.rows.at(launch.symbols));
  if (rows == 0) return cudaSuccess;
  return withCodes(p.kind, [&](auto codes) { return launchCodes<decltype(codes)>(launch, p, rows, scratchBytes); });
}

}  // namespace
}  // namespace fewbit::linear

namespace fewbit {
extern const Entry kLinearSkinnyEntries[];
extern const size_t kLinearSkinnyEntryCount;
const Entry kLinearSkinnyEntries[] = {{"linear/skinny", 3, linear::run}};
const size_t kLinearSkinnyEntryCount = sizeof kLinearSkinnyEntries / sizeof *kLinearSkinnyEntries;
}  // namespace fewbit
