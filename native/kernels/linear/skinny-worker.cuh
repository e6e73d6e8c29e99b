// What every warp that multiplies does: it walks over tiles and stages of the ring.
#pragma once
#include "skinny-any.cuh"

namespace fewbit::linear {

/** Scales and zero points of a worker's chunk, as codes: of row lane / 4, and of row lane / 4 + 8. */
template <class Codes, class Mode>
struct ChunkScales {
  using C = ChunkOf<Codes>;
  static constexpr int bytes = kScaleBytes<Codes, Mode>;
  static constexpr int words = bytes < 4 ? 1 : bytes / 4;
  uint32_t scale[2][words], zero[2][words];

  __device__ __forceinline__ static void read(const uint8_t* at, uint32_t (&out)[words]) {
    if constexpr (bytes == 2) out[0] = *reinterpret_cast<const uint16_t*>(at);
    else if constexpr (bytes == 4) out[0] = *reinterpret_cast<const uint32_t*>(at);
    else if constexpr (bytes == 8) {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      out[0] = two.x, out[1] = two.y;
    } else {
      static_assert(bytes == 16);
      const uint4 four = *reinterpret_cast<const uint4*>(at);
      out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
    }
  }
  __device__ __forceinline__ void load(const SkinnyParams& p, const uint8_t* shared, const SkinnyShared& at, int slot, int row,
                                       int chunk) {
    const int pitch = scalePitch<Codes, Mode>(p);
    const uint8_t* begin = shared + at.scales + slot * 16 * pitch * (Mode::floatZero ? 2 : 1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint8_t* of = begin + (row + 8 * r) * pitch + chunk * bytes;
      read(of, scale[r]);
      if constexpr (Mode::floatZero) read(of + 16 * pitch, zero[r]);
    }
  }
  __device__ __forceinline__ static float bf16Of(const uint32_t (&codes)[words], int unit) {
    return __uint_as_float(unit % 2 == 0 ? codes[unit / 2] << 16 : codes[unit / 2] & 0xffff0000u);
  }
  __device__ __forceinline__ float scaleOf(int r, int unit) const {
    if constexpr (Mode::scaleBytes == 2) return bf16Of(scale[r], unit);
    return decodeScale(ScaleCodec::e8m0, scale[r][unit / 4] >> (8 * (unit % 4)) & 255u);
  }
  /** The factor of a lane's codes in a segment, twice. */
  __device__ __forceinline__ __nv_bfloat162 factorOf(int r, int segment, int lane) const {
    const uint32_t code = scale[r][segment / 2] >> (16 * (segment % 2) + lane % 4 / 2 * 8) & 255u;
    return __float2bfloat162_rn(decodeScale(ScaleCodec::e4m3, code));
  }
};

/** Adds up the products of segments of x that stay bf16, [segment][lane % 4][8], in the columns whose lanes `have` one. */
template <class Codes>
__device__ __forceinline__ void multiplySegments(const Element& element, const float (&zero)[2], const uint8_t* codes, const uint8_t* x,
                                                 int begin, int end, bool have, int t, float (&sum)[4]) {
#pragma unroll 1
  for (int segment = begin; segment < end; segment++) {
    uint32_t low[4], high[4];
    Codes::decode(codes + segment * 4 * Codes::bits, t * Codes::bits, element, zero[0], low);
    Codes::decode(codes + 8 * ChunkOf<Codes>::pitch + segment * 4 * Codes::bits, t * Codes::bits, element, zero[1], high);
    uint4 b = make_uint4(0, 0, 0, 0);
    if (have) b = *reinterpret_cast<const uint4*>(x + segment * 64 + t * 16);
    multiply16x8x16(sum, {low[0], high[0], low[1], high[1]}, b.x, b.y);
    multiply16x8x16(sum, {low[2], high[2], low[3], high[3]}, b.z, b.w);
  }
}

/** One of the warps that multiply, and where its block keeps what. */
template <class Codes, class Mode>
struct Worker {
  const SkinnyParams& p;
  uint8_t* shared;
  const SkinnyShared& at;
  const Walk<Codes>& walk;
  float* exchange;
  int sheet, warp, lane;

  /** Calls `begin()` before each tile, `multiply(tile, chunk, slot of scales, codes)` for each of its stages, and `store(sheet)` behind it. */
  template <class Begin, class Multiply, class Store>
  __device__ __forceinline__ void walkTiles(Begin begin, Multiply multiply, Store store) const {
    using C = ChunkOf<Codes>;
    SkinnyBarriers& barriers = *reinterpret_cast<SkinnyBarriers*>(shared);
    const uint8_t* mine = shared + at.ring + warp * C::rowBytes;
    RingPlace place;
    int slot = 0;
#pragma unroll 1
    for (int tile = blockIdx.x, turn = 0; tile < walk.tiles; tile += gridDim.x, turn++) {
      begin();
#pragma unroll 1
      for (int s = 0; s < walk.stagesOfTile; s++) {
        barrierAwait(&barriers.full[place.stage], place.parity);
        multiply(tile, s * kWorkers + warp, slot, mine + place.stage * C::stageBytes);
        __syncwarp();
        if (lane == 0) barrierArrive(&barriers.empty[place.stage]);
        place.advance(p.stages);
      }
      if constexpr (Mode::scaleBytes > 0) {
        if (++slot == p.scaleSlots) slot = 0;
      }
      const int copy = turn % 2;
      if (turn >= 2) barrierAwait(&barriers.stored[copy], turn / 2 % 2 ^ 1);  // what was there two turns ago
      store(exchange + (copy * kWorkers + warp) * sheet);
      barrierArrive(&barriers.summed[copy]);
    }
  }
};

}  // namespace fewbit::linear
