// rmsnorm and layernorm of rows that are read once: a row stays in the registers of a block, or of a warp.
#include "../general/norm.cuh"
#include "share.cuh"

namespace fewbit::rows {
namespace {

template <int FOURS>
__global__ void __launch_bounds__(kMostThreads) norm(const __grid_constant__ Norm n, const __grid_constant__ Share share,
                                                     const bool aligned, const u32* symbols) {
  __shared__ float sums[2][32];
  releaseSuccessor();
  const Place place(share, n.width);
  constexpr bool kEarly = FOURS <= 4;  // weights wait in registers, where there are enough
  float4 weight[FOURS], x[FOURS];
#pragma unroll
  for (int i = 0; i < FOURS; i++)
    if (kEarly && place.holds(i)) weight[i] = loadFour(n.weight + place.element(i), true);
  const bool inside = place.row < n.rows.at(symbols) * n.groups;
  awaitPredecessor();
  if (!inside) return;
  const i64 row = n.groups == 1 ? place.row : place.row / n.groups;
  const int first = n.groups == 1 ? 0 : static_cast<int>(place.row % n.groups) * n.width;
  const float* in = n.x + n.xAt.at(row, first);
  float* out = n.out + n.outAt.at(row, first);
#pragma unroll
  for (int i = 0; i < FOURS; i++)
    x[i] = place.holds(i) ? loadFour(in + place.element(i), aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float width = static_cast<float>(n.width);
  float mean = 0.0f;
  if (n.centred) {
#pragma unroll
    for (int i = 0; i < FOURS; i++) mean += (x[i].x + x[i].y) + (x[i].z + x[i].w);
    mean = teamSum(mean, place, sums[0]) / width;
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < FOURS; i++) {
    if (!place.holds(i)) continue;
    x[i] = make_float4(x[i].x - mean, x[i].y - mean, x[i].z - mean, x[i].w - mean);
    sum += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
  }
  const float factor = 1.0f / sqrtf(teamSum(sum, place, sums[1]) / width + n.eps);
#pragma unroll
  for (int i = 0; i < FOURS; i++) {
    if (!place.holds(i)) continue;
    const float4 w = kEarly ? weight[i] : loadFour(n.weight + place.element(i), true);
    float4 y = make_float4(x[i].x * factor * w.x, x[i].y * factor * w.y, x[i].z * factor * w.z, x[i].w * factor * w.w);
    if (n.bias != nullptr) {
      const float4 shift = loadFour(n.bias + place.element(i), true);
      y = make_float4(y.x + shift.x, y.y + shift.y, y.z + shift.z, y.w + shift.w);
    }
    storeFour(out + place.element(i), aligned, y);
  }
}

/** args: those of `general/norm`. */
cudaError_t runNorm(const Launch& launch) {
  const Norm n = readNorm(launch);
  const i64 rows = n.rows.at(launch.symbols) * n.groups;
  if (rows == 0) return cudaSuccess;
  const bool aligned = inFours(n.xAt) && inFours(n.outAt);
  const Share share = shareRows(rows, n.width, true, *launch.context);
  return withFours(share.fours, [&](auto fours) {
    return launchOverlapped(launch, norm<fours.value>, share.grid(rows), share.threads, 0, n, share, aligned, launch.deviceSymbols);
  });
}

}  // namespace
}  // namespace fewbit::rows

namespace fewbit {

extern const Entry kRowsNormEntries[] = {{"rows/norm", 1, rows::runNorm}};
extern const size_t kRowsNormEntryCount = sizeof kRowsNormEntries / sizeof(Entry);

}  // namespace fewbit
