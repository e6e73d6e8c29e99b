// Codes of at most 8 significant bits multiply x in bf16: every format, every number of rows.
#pragma once
#include "skinny-any.cuh"
#include "skinny-worker.cuh"

namespace fewbit::linear {

/** What a worker sums of a tile: `sum` since the last promotion, `total` of what was promoted. */
template <int Tiles>
struct TileSums {
  float total[Tiles][4], sum[Tiles][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) total[j][c] = 0.0f, sum[j][c] = 0.0f;
  }
  /** One segment of 32 elements: `low` and `high` are the codes of rows lane / 4 and lane / 4 + 8. */
  __device__ __forceinline__ void multiply(const uint32_t (&low)[4], const uint32_t (&high)[4], const uint8_t* x,
                                           const int (&columnAt)[Tiles], bool fresh) {
    const uint32_t a0[4] = {low[0], high[0], low[1], high[1]};
    const uint32_t a1[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
    for (int j = 0; j < Tiles; j++) {
      const uint4 b = *reinterpret_cast<const uint4*>(x + columnAt[j]);
      if (fresh) multiplyFresh16x8x16(sum[j], a0, b.x, b.y);
      else multiply16x8x16(sum[j], a0, b.x, b.y);
      multiply16x8x16(sum[j], a1, b.z, b.w);
    }
  }
  __device__ __forceinline__ void promote(const float (&scale)[2]) {
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) total[j][c] = fmaf(scale[c / 2], sum[j][c], total[j][c]);
  }
  __device__ __forceinline__ void promoteZeros(const float (&zero)[2], const float* sumsOfX) {
#pragma unroll
    for (int j = 0; j < Tiles; j++) {
      const float2 of = *reinterpret_cast<const float2*>(sumsOfX + j * 8);
      total[j][0] = fmaf(zero[0], of.x, total[j][0]);
      total[j][1] = fmaf(zero[0], of.y, total[j][1]);
      total[j][2] = fmaf(zero[1], of.x, total[j][2]);
      total[j][3] = fmaf(zero[1], of.y, total[j][3]);
    }
  }
  __device__ __forceinline__ void promoteIntegers() {
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        total[j][c] = __int_as_float(__float_as_int(total[j][c]) + __float2int_rn(sum[j][c]));
  }
  /** Copies what the tile ends with, for the finishers: with one row of x, the sum of its parts. */
  __device__ __forceinline__ void store(const SkinnyParams& p, bool promoted, float* sheet, int g, int t, int lane) const {
    if (singleRow(p)) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float first = promoted ? total[0][2 * h] : sum[0][2 * h];
        const float second = promoted ? total[0][2 * h + 1] : sum[0][2 * h + 1];
        const float third = __shfl_sync(~0u, first, (lane & ~3) | 1);
        if (t == 0) sheet[g + 8 * h] = p.parts3 == 3 ? third + second + first : first;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        sheet[(j * 8 + 2 * t + c % 2) * kPitch + g + 8 * (c / 2)] = promoted ? total[j][c] : sum[j][c];
  }
};

/** Multiplies codes in bf16 (skinny.cuh). */
template <class Codes, int Tiles, class Mode>
__device__ __forceinline__ void multiplyStored(const Worker<Codes, Mode>& worker, int m0, int rows) {
  using C = ChunkOf<Codes>;
  const SkinnyParams& p = worker.p;
  const SkinnyShared& at = worker.at;
  const Walk<Codes>& walk = worker.walk;
  uint8_t* shared = worker.shared;
  const int warp = worker.warp, lane = worker.lane;
  stageX<Codes, Tiles, Mode>(p, shared, at, walk, warp, m0, rows);
  const int g = lane / 4, t = lane % 4;
  const int columns = p.columnsOfX * p.parts3;
  const bool ends = Mode::fixed ? !Mode::scaled : p.promote == Promote::end;
  // Columns past the last read it again: what they sum is never looked at.
  int columnAt[Tiles];
#pragma unroll
  for (int j = 0; j < Tiles; j++) columnAt[j] = min(j * 8 + g, p.columnsOfX * p.parts3 - 1) * 64 + t * 16;
  const float* sums = reinterpret_cast<const float*>(shared + at.sums) + 2 * t;
  Element element = p.element;
  if constexpr (Mode::fixed) element.zeros = false;

  const int promotions = C::segments / (Mode::fixed ? Mode::unit : p.unit);  // of a chunk
  AnyScales next;
  if constexpr (!Mode::fixed) {
    if (static_cast<int>(blockIdx.x) < walk.tiles)
      next.load(p, walk.perTile, promotions, blockIdx.x, walk.begin + warp * C::k, lane);
  }
  const int sumsPitch = sumsOfChunk<Codes, Tiles, Mode>(p);
  TileSums<Tiles> of;
  worker.walkTiles(
      [&] { of.clear(); },
      [&](int tile, int chunk, int slot, const uint8_t* rows16) {
        const uint8_t* codes = rows16 + g * C::pitch;
        const uint8_t* x = shared + at.x + chunk * (C::segments * columns * 64);
        if constexpr (Mode::fixed) {
          if (chunk >= walk.chunks) return;
          ChunkScales<Codes, Mode> scales;
          if constexpr (Mode::scaleBytes > 0) scales.load(p, shared, at, slot, g, walk.begin / C::k + chunk);
#pragma unroll
          for (int segment = 0; segment < C::segments; segment++) {
            uint32_t low[4], high[4];
            Codes::decode(codes + segment * 4 * Codes::bits, t * Codes::bits, element, 0.0f, low);
            Codes::decode(codes + 8 * C::pitch + segment * 4 * Codes::bits, t * Codes::bits, element, 0.0f, high);
            if constexpr (Mode::folds) {
              const __nv_bfloat162 f0 = scales.factorOf(0, segment, lane), f1 = scales.factorOf(1, segment, lane);
#pragma unroll
              for (int j = 0; j < 4; j++) {
                low[j] = asWord(__hmul2(asPair(low[j]), f0));
                high[j] = asWord(__hmul2(asPair(high[j]), f1));
              }
            }
            const int unit = segment / Mode::unit;
            of.multiply(low, high, x + segment * columns * 64, columnAt, Mode::scaled && segment % Mode::unit == 0);
            if constexpr (Mode::scaled) {
              if (segment % Mode::unit == Mode::unit - 1) {
                of.promote({scales.scaleOf(0, unit), scales.scaleOf(1, unit)});
                if constexpr (Mode::floatZero)
                  of.promoteZeros({scales.bf16Of(scales.zero[0], unit), scales.bf16Of(scales.zero[1], unit)},
                                  sums + chunk * sumsPitch + unit * (Tiles * 8));
              }
            }
          }
        } else {
          // The next chunk's scales are asked for before this one's are used.
          AnyScales scales = next;
          const bool more = chunk + kWorkers < walk.chunks;
          const int nextTile = more ? tile : tile + gridDim.x;
          if (nextTile < walk.tiles)
            next.load(p, walk.perTile, promotions, nextTile, walk.begin + (more ? chunk + kWorkers : warp) * C::k, lane);
          if (chunk < walk.chunks)
            multiplyAny<Codes, Tiles>(p, walk.perTile, of, scales, codes, x, sums + chunk * sumsPitch, columnAt, tile,
                                      walk.begin + chunk * C::k, lane);
        }
      },
      [&](float* sheet) { of.store(p, !ends, sheet, g, t, lane); });
}

}  // namespace fewbit::linear
