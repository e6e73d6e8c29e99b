// Skinny kernels for 4-bit integers.
#include "skinny-launch.cuh"

namespace fewbit::linear {

template cudaError_t launchCodes<Int4Codes>(const Launch&, SkinnyParams&, int, uint64_t);

}  // namespace fewbit::linear
