// rmsnorm and layernorm: a group of elements of a row is normalised by a warp, or by a block of threads when it is long.
#include "fewbit/overlap.cuh"
#include "norm.cuh"

namespace fewbit::general {
namespace {

template <bool WIDE>
__device__ float total(float x, float* shared) {
  if (WIDE) return blockSum(x, shared);
  return warpSum(x);
}

template <bool WIDE>
__global__ void norm(const Norm n, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ float shared[32];
  const int lanes = WIDE ? blockDim.x : kWarp;
  const int lane = threadIdx.x % lanes;
  const i64 unit = WIDE ? blockIdx.x : blockIdx.x * static_cast<i64>(blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (unit >= n.rows.at(symbols) * n.groups) return;
  const i64 row = unit / n.groups;
  const int first = static_cast<int>(unit % n.groups) * n.width;
  const float* x = n.x + n.xAt.at(row, first);
  float* out = n.out + n.outAt.at(row, first);
  const float width = static_cast<float>(n.width);
  float mean = 0.0f;
  if (n.centred) {
    for (int i = lane; i < n.width; i += lanes) mean += x[i];
    mean = total<WIDE>(mean, shared) / width;
  }
  float sum = 0.0f;
  for (int i = lane; i < n.width; i += lanes) {
    const float v = x[i] - mean;
    sum += v * v;
  }
  const float factor = 1.0f / sqrtf(total<WIDE>(sum, shared) / width + n.eps);
  for (int i = lane; i < n.width; i += lanes) {
    const float y = (x[i] - mean) * factor * n.weight[i];
    out[i] = n.bias == nullptr ? y : y + n.bias[i];
  }
}

/** Elements from which on a block of threads takes a group. */
constexpr int kWide = 1024;

cudaError_t runNorm(const Launch& launch) {
  const Norm n = readNorm(launch);
  const i64 units = n.rows.at(launch.symbols) * n.groups;
  if (units == 0) return cudaSuccess;
  if (n.width >= kWide)
    return launchOverlapped(launch, norm<true>, static_cast<unsigned>(units), n.width >= 4096 ? 512 : 256, 0, n, launch.deviceSymbols);
  return launchOverlapped(launch, norm<false>, static_cast<unsigned>((units + 3) / 4), 4 * kWarp, 0, n, launch.deviceSymbols);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

extern const Entry kNormEntries[] = {{"general/norm", 1, general::runNorm}};
extern const size_t kNormEntryCount = sizeof kNormEntries / sizeof(Entry);

}  // namespace fewbit
