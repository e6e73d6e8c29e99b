#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "device.hpp"

namespace fewbit {
namespace {
__global__ void fill(uint32_t* words, uint64_t count, uint32_t value) {
  for (uint64_t i = blockIdx.x * uint64_t{256} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * 256) words[i] = value;
}

struct Few {
  uint8_t bytes[kFewBytes];
};
__global__ void store(uint8_t* to, const __grid_constant__ Few few) { to[threadIdx.x] = few.bytes[threadIdx.x]; }
__global__ void copy(uint8_t* to, const uint8_t* from) { to[threadIdx.x] = from[threadIdx.x]; }
}  // namespace

cudaError_t fillWords(uint32_t* words, uint64_t count, uint32_t value, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  fill<<<static_cast<unsigned>(std::min<uint64_t>((count + 255) / 256, 4096)), 256, 0, stream>>>(words, count, value);
  return cudaGetLastError();
}

cudaError_t storeFew(void* to, const void* data, size_t bytes, cudaStream_t stream) {
  Few few;
  std::memcpy(few.bytes, data, bytes);
  store<<<1, static_cast<unsigned>(bytes), 0, stream>>>(static_cast<uint8_t*>(to), few);
  return cudaGetLastError();
}

cudaError_t copyFew(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  copy<<<1, static_cast<unsigned>(bytes), 0, stream>>>(static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from));
  return cudaGetLastError();
}

bool waitsForPredecessors() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, fill) == cudaSuccess && attributes.ptxVersion >= 90;
}

namespace {
/** buffers: words; args: the first word, count, value. The offset is not checked: tests of the machinery misuse it. */
cudaError_t runFill(const Launch& launch) {
  return fillWords(static_cast<uint32_t*>(launch.buffers[0]) + launch.args[0], static_cast<uint64_t>(launch.args[1]),
                   static_cast<uint32_t>(launch.args[2]), launch.stream);
}
}  // namespace

extern const Entry kFillEntries[] = {{"addon/fill", 1, runFill}};
extern const size_t kFillEntryCount = 1;

}  // namespace fewbit
