// Mixed kernels for codes of 8 bits.
#include "mixed-launch.cuh"

namespace fewbit::linear {

template cudaError_t launchMixedCodes<IntCodes<8>>(const Launch&, MixedParams&, int, uint64_t);
template cudaError_t launchMixedCodes<E4m3Codes>(const Launch&, MixedParams&, int, uint64_t);

}  // namespace fewbit::linear
