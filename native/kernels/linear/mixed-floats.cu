// Mixed kernels for bf16 and e2m1.
#include "mixed-launch.cuh"

namespace fewbit::linear {

template cudaError_t launchMixedCodes<Bf16Codes>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<E2m1Codes>(const Launch&, MixedParams&, int, uint64_t);

}  // namespace fewbit::linear
