// x in shared memory, as the columns of bf16 that the skinny kernels multiply.
#pragma once
#include "skinny-params.cuh"

namespace fewbit::linear {

/** x of this slice, split and laid out as [segment][column][lane % 4][8]. */
template <class Codes, int Tiles>
__device__ void stageX(const SkinnyParams& p, uint8_t* shared, const SkinnyShared& at, int m0, int rows, int begin,
                       int count) {
  const int threads = blockDim.x;
  const int segments = segmentsOf<Codes>(count);
  const int columns = p.columnsOfX * p.parts3;
  const bool vector = p.x.bits == 0 && ((reinterpret_cast<uintptr_t>(p.x.at) | p.x.stride) & 15) == 0;
  const int octets = segments * 4 * p.columnsOfX;
  float* sums = reinterpret_cast<float*>(shared + at.sums);
  if (p.floatZero) {
    for (int i = threadIdx.x; i < segments / p.unit * Tiles * 8; i += threads) sums[i] = 0.0f;
    __syncthreads();
  }
  for (int i = threadIdx.x; i < (octets + 31) / 32 * 32; i += threads) {
    const int octet = i % (segments * 4);
    const int m = i / (segments * 4);  // beyond the last row for the last lanes: they take part in the exchange only
    const int k = begin + octet * 8;
    float values[8];
    if (m >= rows || k >= p.k) {
#pragma unroll
      for (int j = 0; j < 8; j++) values[j] = 0.0f;
    } else if (vector && k + 8 <= p.k) {
      const float4* source = reinterpret_cast<const float4*>(p.x.at + (m0 + m) * p.x.stride) + k / 4;
      const float4 a = source[0], b = source[1];
      values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
      values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    } else {
      for (int j = 0; j < 8; j++) {
        values[j] = 0.0f;
        if (k + j < p.k) {
          values[j] = p.x.code(m0 + m, k + j);
          if (!p.separable) values[j] *= p.x.scaleAt(m0 + m, k + j);
        }
      }
    }
    if (p.floatZero) {
      // Sums of x over what is promoted together, for the columns of first parts; the octets of a unit are neighbouring lanes.
      float sum = ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]));
      for (int step = p.unit * 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (octet % (p.unit * 4) == 0 && i < octets) sums[octet / (p.unit * 4) * (Tiles * 8) + m] = sum;
    }
    if (i >= octets) continue;
    uint32_t parts[8][3];
#pragma unroll
    for (int j = 0; j < 8; j++) splitBf16(values[j], parts[j]);
    uint8_t* target = shared + at.x + (octet / 4) * (columns * 64) + m * 64 + (octet % 4) * 16;
    for (int part = 0; part < p.parts3; part++) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int low = Codes::interleaved ? j : 2 * j;
        const int high = Codes::interleaved ? j + 4 : 2 * j + 1;
        const uint32_t a = part == 0 ? parts[low][0] : part == 1 ? parts[low][1] : parts[low][2];
        const uint32_t b = part == 0 ? parts[high][0] : part == 1 ? parts[high][1] : parts[high][2];
        words[j] = a | (b << 16);
      }
      *reinterpret_cast<uint4*>(target + part * p.columnsOfX * 64) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace fewbit::linear
