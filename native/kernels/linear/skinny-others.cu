// Skinny kernels for the other widths.
#include "skinny-launch.cuh"

namespace fewbit::linear {

template cudaError_t launchCodes<IntCodes<8>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<IntCodes<1>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<IntCodes<2>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<IntCodes<3>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<IntCodes<5>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<IntCodes<6>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<IntCodes<7>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<FloatCodes<5>>(const Launch&, SkinnyParams&, int, uint64_t);
template cudaError_t launchCodes<FloatCodes<6>>(const Launch&, SkinnyParams&, int, uint64_t);

}  // namespace fewbit::linear
