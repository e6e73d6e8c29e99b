// A worker's chunk where only the run time knows how scales are applied.
#pragma once
#include "skinny-x.cuh"

namespace fewbit::linear {

// Out of line: every codec would be there four times, and instructions that do not fit the cache are slower than calls.
static __device__ __noinline__ float decodeScaleCall(ScaleCodec codec, uint32_t bits) { return decodeScale(codec, bits); }

/** Codes of a chunk's scales and zero points: lane t of a row's four keeps those of promotions t and t + 4. */
struct AnyScales {
  uint32_t scale[2][2] = {}, zero[2][2] = {};  // of row lane / 4 and of row lane / 4 + 8

  __device__ __forceinline__ void load(const SkinnyParams& p, int perTile, int promotions, int tile, int k0, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Weights& w = p.weights[p.parts == 2 ? r : 0];
      const int n = p.rowOf(min(tile * perTile + (p.parts == 2 ? lane / 4 : lane / 4 + 8 * r), p.n - 1), r);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int index = lane % 4 + 4 * h;
        if (index >= promotions) continue;
        const int k = min(k0 + index * p.unit * 32, p.k - 1);
        if (p.promote == Promote::scaled)
          scale[r][h] = loadScaleBits(w.scale, int64_t(n / w.scale.rows) * w.scale.columns + k / w.scale.k);
        if (w.zero.codec != ScaleCodec::none)
          zero[r][h] = loadScaleBits(w.zero, int64_t(n / w.zero.rows) * w.zero.columns + k / w.zero.k);
      }
    }
  }
  __device__ __forceinline__ static float of(const uint32_t (&codes)[2], ScaleCodec codec, int promotion, int lane) {
    const uint32_t bits = __shfl_sync(~0u, promotion < 4 ? codes[0] : codes[1], (lane & ~3) | (promotion & 3));
    return codec == ScaleCodec::bf16    ? __uint_as_float(bits << 16)
           : codec == ScaleCodec::f32   ? __uint_as_float(bits)
           : codec == ScaleCodec::f16   ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits)))
           : codec == ScaleCodec::uint8 ? static_cast<float>(bits)
                                        : decodeScaleCall(codec, bits);
  }
};

/** The codes of a segment times the scales of their 16 elements. */
__device__ __forceinline__ void foldAny(const SkinnyParams& p, int perTile, int tile, int k, int lane, int r, uint32_t (&codes)[4]) {
  const Weights& w = p.weights[p.parts == 2 ? r : 0];
  const int n = p.rowOf(min(tile * perTile + (p.parts == 2 ? lane / 4 : lane / 4 + 8 * r), p.n - 1), r);
  const int column = min((k + lane % 4 * 8) / 16, w.scale.columns - 1);
  const uint32_t bits = loadScaleBits(w.scale, int64_t(n) * w.scale.columns + column);
  const __nv_bfloat162 factor = __float2bfloat162_rn(decodeScaleCall(w.scale.codec, bits));
#pragma unroll
  for (int j = 0; j < 4; j++) codes[j] = asWord(__hmul2(asPair(codes[j]), factor));
}

template <class Codes, int Tiles, class Sums>
__device__ __forceinline__ void multiplyAny(const SkinnyParams& p, int perTile, Sums& of, const AnyScales& scales,
                                            const uint8_t* codes, const uint8_t* x, const float* sumsOfX,
                                            const int (&columnAt)[Tiles], int tile, int k0, int lane) {
  using C = ChunkOf<Codes>;
  const int columns = p.columnsOfX * p.parts3;
  const bool ends = p.promote == Promote::end, scaled = p.promote == Promote::scaled;
  const Weights& w = p.weights[0];
  float scale[2] = {1.0f, 1.0f}, zero[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int segment = 0; segment < C::segments; segment++) {
    const int promotion = segment / p.unit;
    const bool fresh = segment % p.unit == 0, last = segment % p.unit == p.unit - 1;
    if (fresh) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (scaled) scale[r] = AnyScales::of(scales.scale[r], w.scale.codec, promotion, lane);
        if (w.zero.codec != ScaleCodec::none) zero[r] = AnyScales::of(scales.zero[r], w.zero.codec, promotion, lane);
      }
    }
    uint32_t low[4], high[4];
    const bool subtracts = p.element.zeros;
    const uint8_t* at = codes + segment * 4 * Codes::bits;
    Codes::decode(at, lane % 4 * Codes::bits, p.element, subtracts ? zero[0] : 0.0f, low);
    Codes::decode(at + 8 * C::pitch, lane % 4 * Codes::bits, p.element, subtracts ? zero[1] : 0.0f, high);
    if constexpr (Codes::folds) {
      if (p.fold) {
        foldAny(p, perTile, tile, k0 + segment * 32, lane, 0, low);
        foldAny(p, perTile, tile, k0 + segment * 32, lane, 1, high);
      }
    }
    of.multiply(low, high, x + segment * columns * 64, columnAt, fresh && !ends);
    if (ends || !last) continue;
    if (scaled) {
      of.promote(scale);
      if (p.floatZero) of.promoteZeros(zero, sumsOfX + promotion * (Tiles * 8));
    } else {
      of.promoteIntegers();
    }
  }
}

}  // namespace fewbit::linear
