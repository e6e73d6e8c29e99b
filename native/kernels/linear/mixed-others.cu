// Mixed kernels for the other codes.
#include "mixed-launch.cuh"

namespace fewbit::linear {

template cudaError_t launchMixedCodes<E5m2Codes>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<IntCodes<1>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<IntCodes<2>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<IntCodes<3>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<IntCodes<5>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<IntCodes<6>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<IntCodes<7>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<FloatCodes<5>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<FloatCodes<6>>(const Launch&, MixedParams&, int, uint64_t);

}  // namespace fewbit::linear
