// One row of signed bytes by signed bytes, in whole numbers: sums are exact, scales meet them at the end.
#pragma once
#include "skinny-worker.cuh"

namespace fewbit::linear {

/** Multiplies x's codes as they lie; a chunk of them [64 elements][64]. */
template <class Codes, class Mode>
__device__ __forceinline__ void multiplyBytes(const Worker<Codes, Mode>& worker, int m0) {
  using C = ChunkOf<Codes>;
  const SkinnyParams& p = worker.p;
  const int lane = worker.lane, g = lane / 4, t = lane % 4;
  uint8_t* x = worker.shared + worker.at.x;
  constexpr int pieces = C::k / 16;  // of a chunk
  const uint8_t* row = p.x.at + m0 * p.x.stride + worker.walk.begin;
#pragma unroll 1
  for (int i = lane; i < (worker.walk.chunks - worker.warp + kWorkers - 1) / kWorkers * pieces; i += 32) {
    const int k = (worker.warp + i / pieces * kWorkers) * C::k + i % pieces * 16;
    copy16OrZeros(sharedAddress(x + k), row + k, worker.walk.begin + k < p.k);
  }
  copiesAwait();
  __syncwarp();
  int sum[4];
  worker.walkTiles(
      [&] { sum[0] = sum[1] = sum[2] = sum[3] = 0; },
      [&](int, int chunk, int, const uint8_t* codes) {
        if (chunk >= worker.walk.chunks) return;
        codes += g * C::pitch + t * 16;
#pragma unroll
        for (int block = 0; block < C::k; block += 64) {
          uint32_t low[4], high[4];
          Codes::bytes(codes + block, 0, low);
          Codes::bytes(codes + 8 * C::pitch + block, 0, high);
          multiplyBytes16x8x64(sum, low, high, *reinterpret_cast<const uint4*>(x + chunk * C::k + block + t * 16));
        }
      },
      [&](float* sheet) {
        // Every column is the same.
        if (t == 0) sheet[g] = __int_as_float(sum[0]), sheet[g + 8] = __int_as_float(sum[2]);
      });
}

}  // namespace fewbit::linear
