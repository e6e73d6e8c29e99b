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
  switch (p.kind) {
#define FEWBIT_LAUNCH(kind, codes) \
  case CodeKind::kind:             \
    return launchMixedCodes<codes>(launch, p, rows, scratchBytes);
    FEWBIT_LAUNCH(bf16, Bf16Codes)
    FEWBIT_LAUNCH(e4m3, E4m3Codes)
    FEWBIT_LAUNCH(e5m2, E5m2Codes)
    FEWBIT_LAUNCH(int8, IntCodes<8>)
    FEWBIT_LAUNCH(int4, Int4Codes)
    FEWBIT_LAUNCH(e2m1, E2m1Codes)
    FEWBIT_LAUNCH(int1, IntCodes<1>)
    FEWBIT_LAUNCH(int2, IntCodes<2>)
    FEWBIT_LAUNCH(int3, IntCodes<3>)
    FEWBIT_LAUNCH(int5, IntCodes<5>)
    FEWBIT_LAUNCH(int6, IntCodes<6>)
    FEWBIT_LAUNCH(int7, IntCodes<7>)
    FEWBIT_LAUNCH(float5, FloatCodes<5>)
    FEWBIT_LAUNCH(float6, FloatCodes<6>)
#undef FEWBIT_LAUNCH
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace fewbit::linear

namespace fewbit {
extern const Entry kLinearMixedEntries[];
extern const size_t kLinearMixedEntryCount;
const Entry kLinearMixedEntries[] = {{"linear/mixed", 1, linear::runMixed}};
const size_t kLinearMixedEntryCount = sizeof kLinearMixedEntries / sizeof *kLinearMixedEntries;
}  // namespace fewbit
