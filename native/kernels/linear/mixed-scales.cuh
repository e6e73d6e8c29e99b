// Scales and zero points as the warps of a mixed kernel need them: fetched a stage ahead, into registers.
#pragma once
#include "mixed-params.cuh"

namespace fewbit::linear {

/** Scales and zero points of a stage, of rows lane / 4 and lane / 4 + 8, as codes: each lane has all that it needs. */
template <class Mode>
struct MixedScales {
  static constexpr int bytes = kMixedSegments / Mode::unit * Mode::scaleBytes;
  static constexpr int words = bytes < 4 ? 1 : bytes / 4;
  uint32_t offset[2];  // of the next stage, in bytes
  uint32_t scale[2][words], zero[2][words];

  __device__ __forceinline__ MixedScales(const MixedParams& p, const int (&row)[2], int stage) {
#pragma unroll
    for (int r = 0; r < 2; r++)
      offset[r] = static_cast<uint32_t>(row[r]) * p.weights[0].scale.columns * Mode::scaleBytes + stage * bytes;
  }
  __device__ __forceinline__ static void read(const uint8_t* at, uint32_t (&out)[words]) {
    if constexpr (bytes == 2) out[0] = __ldg(reinterpret_cast<const uint16_t*>(at));
    else if constexpr (bytes == 4) out[0] = __ldg(reinterpret_cast<const uint32_t*>(at));
    else {
      static_assert(bytes == 8);
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(at));
      out[0] = two.x, out[1] = two.y;
    }
  }
  __device__ __forceinline__ void load(const MixedParams& p) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Weights& w = p.weights[p.parts == 2 ? r : 0];
      read(w.scale.at + offset[r], scale[r]);
      if constexpr (Mode::floatZero) read(w.zero.at + offset[r], zero[r]);
      offset[r] += bytes;
    }
  }
  __device__ __forceinline__ static float bf16Of(const uint32_t (&codes)[words], int unit) {
    return __uint_as_float(unit % 2 == 0 ? codes[unit / 2] << 16 : codes[unit / 2] & 0xffff0000u);
  }
  __device__ __forceinline__ float scaleOf(int r, int unit) const {
    if constexpr (Mode::scaleBytes == 2) return bf16Of(scale[r], unit);
    return decodeScale(ScaleCodec::e8m0, scale[r][unit / 4] >> (8 * (unit % 4)) & 255u);
  }
};

/** The same where only the run time knows them: lane t of a row's four keeps those of promotion t. */
struct MixedAnyScales {
  uint32_t scale[2] = {}, zero[2] = {};

  __device__ __forceinline__ void load(const MixedParams& p, const int (&row)[2], int stage, int lane) {
    const int t = lane % 4;
    if (t >= promotionsOf(p)) return;
    const int k = min(stage * kMixedK + t * p.unit * 32, p.k - 1);
#pragma unroll 1
    for (int r = 0; r < 2; r++) {
      const Weights& w = p.weights[p.parts == 2 ? r : 0];
      const int n = r == 0 ? row[0] : row[1];
      uint32_t codes[2] = {};
      if (p.promote == Promote::scaled && w.scale.codec != ScaleCodec::none)
        codes[0] = loadScaleBits(w.scale, int64_t(n / w.scale.rows) * w.scale.columns + k / w.scale.k);
      if (w.zero.codec != ScaleCodec::none)
        codes[1] = loadScaleBits(w.zero, int64_t(n / w.zero.rows) * w.zero.columns + k / w.zero.k);
      scale[0] = r == 0 ? codes[0] : scale[0], scale[1] = r == 1 ? codes[0] : scale[1];
      zero[0] = r == 0 ? codes[1] : zero[0], zero[1] = r == 1 ? codes[1] : zero[1];
    }
  }
};

/** Scales of 16 elements that multiply their codes: lane t of a row's four keeps those of the stage's elements from 32 t on. */
struct MixedFolds {
  uint32_t codes[2] = {};

  __device__ __forceinline__ void load(const MixedParams& p, const int (&row)[2], int stage, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Blocks& scale = p.weights[p.parts == 2 ? r : 0].scale;
      const int column = stage * (kMixedK / 16) + lane % 4 * 2;
      const uint8_t* at = scale.at + int64_t(row[r]) * scale.columns;
      codes[r] = __ldg(at + min(column, scale.columns - 1)) | uint32_t(__ldg(at + min(column + 1, scale.columns - 1))) << 8;
    }
  }
  /** The factor of a lane's codes in a segment, twice. */
  __device__ __forceinline__ __nv_bfloat162 factorOf(int r, int segment, int lane) const {
    const uint32_t code = __shfl_sync(~0u, codes[r], (lane & ~3) | segment) >> (lane % 4 / 2 * 8) & 255u;
    return __float2bfloat162_rn(decodeScale(ScaleCodec::e4m3, code));
  }
};

}  // namespace fewbit::linear
