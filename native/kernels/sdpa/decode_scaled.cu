// Caches with scales. A file of their own, so that both compile at a time.
#include "decode.cuh"

namespace fewbit::sdpa {

template cudaError_t startDecode<Int8>(const Launch&, const DecodeParams&, int, int, int, int);
template cudaError_t startDecode<E4m3>(const Launch&, const DecodeParams&, int, int, int, int);
template cudaError_t startDecode<UInt4>(const Launch&, const DecodeParams&, int, int, int, int);

}  // namespace fewbit::sdpa
