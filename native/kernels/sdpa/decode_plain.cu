// Caches of plain numbers. A file of their own, so that both compile at a time.
#include "decode.cuh"

namespace fewbit::sdpa {

template cudaError_t startDecode<F32>(const Launch&, const DecodeParams&, int, int, int, int);
template cudaError_t startDecode<F16>(const Launch&, const DecodeParams&, int, int, int, int);
template cudaError_t startDecode<Bf16>(const Launch&, const DecodeParams&, int, int, int, int);

}  // namespace fewbit::sdpa
