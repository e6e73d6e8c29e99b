// Skinny kernels for float weights of 4, 8 and 16 bits.
#include "skinny-launch.cuh"

namespace fewbit::linear {

template cudaError_t launchCodes<Bf16Codes>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<E4m3Codes>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<E5m2Codes>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<E2m1Codes>(const Launch&, SkinnyParams&, int, uint64_t);

}  // namespace fewbit::linear
