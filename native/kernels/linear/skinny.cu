// linear/skinny: x W^T for few rows of x.
#include "skinny-arguments.hpp"

namespace fewbit::linear {

template <class Codes>
cudaError_t launchCodes(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes);

namespace {

void readHeads(Arguments& arguments, SkinnyParams& p) {
  const int count = arguments.small();
  if (count == 0) return;
  p.heads.shift = arguments.small();
  for (int i = 0; i < count && i < 3; i++) {
    HeadRows& rows = p.heads.rows[i];
    rows.heads = arguments.small();
    rows.angles = reinterpret_cast<const float*>(arguments.buffer());
    rows.angleSymbol = arguments.small();
    rows.rounding = static_cast<Rounding>(arguments.small());
    uint8_t* base = arguments.buffer();
    rows.out = base + arguments.integer();
    rows.cacheSymbol = arguments.small();
    rows.keys = arguments.integer();
  }
  p.parts = 2;
  p.n /= 2;
  p.weights[1] = p.weights[0];
  p.epilogue.bias[1] = p.epilogue.bias[0];
}

cudaError_t run(const Launch& launch) {
  SkinnyParams p;
  uint8_t* scratch = nullptr;
  uint64_t scratchBytes = 0;
  Arguments arguments(launch);
  readDecoded(launch, arguments, p, scratch, scratchBytes);
  p.alike = arguments.flag();
  readHeads(arguments, p);
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
const Entry kLinearSkinnyEntries[] = {{"linear/skinny", 5, linear::run}};
const size_t kLinearSkinnyEntryCount = sizeof kLinearSkinnyEntries / sizeof *kLinearSkinnyEntries;
}  // namespace fewbit
