// Mixed kernels for 4-bit integers.
#include "mixed-launch.cuh"

namespace fewbit::linear {

template cudaError_t launchMixedCodes<Int4Codes>(const Launch&, MixedParams&, int, uint64_t);

}  // namespace fewbit::linear
