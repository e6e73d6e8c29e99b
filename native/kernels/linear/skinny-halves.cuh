// One row of x in f16, by codes of e4m3: one instruction makes two of those f16, and several would make them bf16.
//
// A chunk of bf16 is f16 times a power of two: an element keeps its 8 bits if its exponent is at most 32 below that of its chunk's
// largest, and what is not finite stays so. A chunk that has a smaller one stays bf16 and meets codes in bf16. Codes of e4m3 need no power.
#pragma once
#include "skinny-worker.cuh"

namespace fewbit::linear {

/** A worker's row of x, in its order: of each chunk the elements, and the power of two that its sum is multiplied by, -1 where it stays bf16. */
template <class Codes>
struct Halves {
  using C = ChunkOf<Codes>;
  static constexpr int bytes = C::k * 2;
  const uint8_t* x;
  float* powers;

  __device__ __forceinline__ static void store(uint8_t* at, const uint32_t (&halves)[8]) {
    reinterpret_cast<uint4*>(at)[0] = make_uint4(halves[0], halves[1], halves[2], halves[3]);
    reinterpret_cast<uint4*>(at)[1] = make_uint4(halves[4], halves[5], halves[6], halves[7]);
  }
  __device__ __forceinline__ void setPower(int chunk, float power) const { powers[chunk * kPowerFloats] = power; }

  /** Codes of x that are read as the weights' are: sixteen of them, two octets, become f16 at once. */
  __device__ __forceinline__ void stageCodes(const SkinnyParams& p, uint8_t* target, const Walk<Codes>& walk, const Octets<Codes>& octets,
                                             const uint8_t* row) const {
    constexpr int batch = 4;  // of them that a lane asks for at once
#pragma unroll 1
    for (int first = threadIdx.x % 32 * 2; first < octets.count; first += 64 * batch) {
      uint4 raw[batch];
#pragma unroll
      for (int b = 0; b < batch; b++) {
        const int octet = first + b * 64, k = walk.begin + octets.k(octet);
        raw[b] = octet < octets.count && k < p.k ? __ldcg(reinterpret_cast<const uint4*>(row + k)) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int b = 0; b < batch; b++) {
        const int octet = first + b * 64;
        if (octet >= octets.count) break;
        uint32_t halves[8];
        Codes::halves(raw[b], halves);
        store(target + octets.at(octet, 1), halves);
        if (octet % Octets<Codes>::ofChunk == 0) setPower(octets.chunk(octet), 1.0f);
      }
    }
  }
  /** Octets of bf16, which lie where they become f16. */
  __device__ __forceinline__ void stageBf16(const SkinnyParams& p, uint8_t* target, const Walk<Codes>& walk, const Octets<Codes>& octets,
                                            const uint8_t* row) const {
    const int lane = threadIdx.x % 32;
    const auto atOf = [&](int octet) { return reinterpret_cast<uint4*>(target + octets.at(octet, 1)); };
    copyOctets(walk, octets, row, p.k, atOf);
    copiesAwait();
#pragma unroll 1
    for (int octet = lane; octet - lane < octets.count; octet += 32) {
      const bool mine = octet < octets.count;
      const uint4 raw = mine ? *atOf(octet) : make_uint4(0, 0, 0, 0);
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
      const Exponents of = exponentsOf<Octets<Codes>::ofChunk>(words);
      const int exponent = max(of.largest, 16);  // the powers of two are normal numbers for these
      const bool whole = allOfChunk<Codes>(of.least >= exponent - 32);
      if (!mine) continue;
      if (whole) {
        const float up = __int_as_float((269 - exponent) << 23);  // the largest is below 2^16
        uint32_t halves[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const __half2 pair = __floats2half2_rn(__uint_as_float(words[j] << 16) * up, __uint_as_float(words[j] & 0xffff0000u) * up);
          halves[j] = reinterpret_cast<const uint32_t&>(pair);
        }
        *atOf(octet) = make_uint4(halves[0], halves[1], halves[2], halves[3]);
      }
      if (octet % Octets<Codes>::ofChunk == 0) setPower(octets.chunk(octet), whole ? __int_as_float((exponent - 15) << 23) : -1.0f);
    }
  }

  /** Adds to `total` what a chunk makes of row lane / 4, where `codes` are, and of 8 rows on. Every column of a product is the same. */
  __device__ __forceinline__ void add(const SkinnyParams& p, const uint8_t* codes, int chunk, int t, float (&total)[2]) const {
    const uint8_t* of = x + chunk * bytes;
    const float power = powers[chunk * kPowerFloats];
    float sum[2][4] = {};  // two, so that products do not wait for each other
#pragma unroll
    for (int block = 0; block < C::k / 64; block++) {
      uint32_t low[8], high[8];
      Codes::halves(*reinterpret_cast<const uint4*>(codes + block * 64 + t * 16), low);
      Codes::halves(*reinterpret_cast<const uint4*>(codes + 8 * C::pitch + block * 64 + t * 16), high);
      const uint4* b = reinterpret_cast<const uint4*>(of + block * 128 + t * 32);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint4 four = b[j];
        multiplyHalves16x8x16(sum[j], {low[4 * j], high[4 * j], low[4 * j + 1], high[4 * j + 1]}, four.x, four.y);
        multiplyHalves16x8x16(sum[j], {low[4 * j + 2], high[4 * j + 2], low[4 * j + 3], high[4 * j + 3]}, four.z, four.w);
      }
    }
    // Only now: a power that decides what is multiplied would be waited for.
    if (power > 0.0f) {
#pragma unroll
      for (int r = 0; r < 2; r++) total[r] = fmaf(power, sum[0][2 * r], fmaf(power, sum[1][2 * r], total[r]));
      return;
    }
    float stored[4] = {};
    multiplySegments<Codes>(p.element, {0.0f, 0.0f}, codes, of, 0, C::segments, true, t, stored);
#pragma unroll
    for (int r = 0; r < 2; r++) total[r] += stored[2 * r];
  }
};

/** Multiplies in f16. */
template <class Codes, class Mode>
__device__ __forceinline__ void multiplyHalves(const Worker<Codes, Mode>& worker, int m0) {
  const SkinnyParams& p = worker.p;
  const Walk<Codes>& walk = worker.walk;
  const int g = worker.lane / 4, t = worker.lane % 4;
  uint8_t* x = worker.shared + worker.at.x;
  const Halves<Codes> of{x, reinterpret_cast<float*>(worker.shared + worker.at.sums)};
  const Octets<Codes> octets(walk, worker.warp);
  const uint8_t* row = p.x.at + m0 * p.x.stride;
  if (p.x.bits == 8) of.stageCodes(p, x, walk, octets, row);
  else of.stageBf16(p, x, walk, octets, row);
  __syncwarp();
  float total[2];
  worker.walkTiles(
      [&] { total[0] = total[1] = 0.0f; },
      [&](int, int chunk, int, const uint8_t* codes) {
        if (chunk < walk.chunks) of.add(p, codes + g * ChunkOf<Codes>::pitch, chunk, t, total);
      },
      [&](float* sheet) {
        if (t == 0) sheet[g] = total[0], sheet[g + 8] = total[1];
      });
}

}  // namespace fewbit::linear
