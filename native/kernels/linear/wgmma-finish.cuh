// From the sums of wgmma.cuh to outputs.
#pragma once
#include "operands.cuh"
#include "sdpa/hopper.cuh"

namespace fewbit::linear {
namespace {

constexpr int kStagedPitch = 40;  // rows of staged sums fall on different banks

struct ProductParams {
  Extent rows;
  const uint32_t* symbols;
  int n, parts, steps;
  int cluster;
  bool constant;  // W and its scales are read before the predecessor is complete
  bool vector;  // four neighbouring outputs can be stored at once
  bool direct;  // outputs are stored as threads hold their sums
  Blocks scaleX[2], scaleW[2][2];
  Epilogue epilogue;
};

#ifdef FEWBIT_HOPPER

/** Codes of a factor's levels and a bias: fetched early, decoded when the sums are there. */
struct Factor {
  uint32_t bits[2] = {0, 0};
  float bias = 0.0f;
  __device__ __forceinline__ void fetch(const Blocks (&scale)[2], const float* biases, int row) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (scale[i].codec != ScaleCodec::none) bits[i] = loadScaleBits(scale[i], int64_t(row / scale[i].rows) * scale[i].columns);
      asm volatile("" : "+r"(bits[i]));  // not to be moved behind the products
    }
    if (biases != nullptr) bias = __ldg(biases + row);
    asm volatile("" : "+f"(bias));
  }
  __device__ __forceinline__ float value(const Blocks (&scale)[2]) const {
    return decodeScale(scale[0].codec, bits[0]) * decodeScale(scale[1].codec, bits[1]);
  }
};

__device__ __forceinline__ float real(float sum) { return sum; }
__device__ __forceinline__ float real(uint32_t sum) { return static_cast<float>(static_cast<int>(sum)); }
/** silu, which prompts of language models wait for, from the fast exponential and quotient. */
__device__ __forceinline__ float siluFast(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

/** Two values as codes of 16 bits. */
__device__ __forceinline__ uint32_t codesOf(Rounding rounding, float low, float high) {
  const __nv_bfloat162 bf16 = __floats2bfloat162_rn(low, high);
  const __half2 f16 = __floats2half2_rn(low, high);
  return rounding == Rounding::bf16 ? reinterpret_cast<const uint32_t&>(bf16) : reinterpret_cast<const uint32_t&>(f16);
}

/** Outputs of rows m and m + 8 and 16 columns from n on, of which a lane has the two at 2 t and 8 + 2 t. */
template <bool Rounded>
__device__ __forceinline__ void storeSixteen(const ProductParams& p, int m, int n, int rows, const float (&v)[2][4]) {
  const int t = threadIdx.x % 4;
  const Dense& out = p.epilogue.out;
  // Neighbouring lanes exchange pairs, so that each has four columns side by side.
  const bool even = t % 2 == 0;
  const int column = n + t % 2 * 8 + t / 2 * 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = m + 8 * half;
    const float *one = &v[0][2 * half], *two = &v[1][2 * half];
    const bool inside = row < rows && column < p.n;
    if constexpr (Rounded) {
      const uint32_t first = codesOf(p.epilogue.rounding, one[0], one[1]), second = codesOf(p.epilogue.rounding, two[0], two[1]);
      const uint32_t other = __shfl_xor_sync(~0u, even ? second : first, 1);
      if (inside)
        *reinterpret_cast<uint2*>(reinterpret_cast<uint16_t*>(out.at) + row * out.stride + column) =
            even ? make_uint2(first, other) : make_uint2(other, second);
    } else {
      const float low = __shfl_xor_sync(~0u, even ? two[0] : one[0], 1), high = __shfl_xor_sync(~0u, even ? two[1] : one[1], 1);
      if (inside)
        *reinterpret_cast<float4*>(&out(row, column)) =
            even ? make_float4(one[0], one[1], low, high) : make_float4(low, high, two[0], two[1]);
    }
  }
}

/** A warp's sums d of 16 rows from m0 on, and the columns from n0 on, to outputs, from where threads hold them: `ProductParams::direct`. */
template <int N, bool Gated, bool Rounded, class Value>
__device__ __forceinline__ void finishDirect(const ProductParams& p, const Value (&d)[N / 2], const float2 (&columns)[N], float ofRow,
                                             int m0, int n0, int rows) {
  constexpr int groups = (Gated ? N / 2 : N) / 8;
  const int lane = threadIdx.x % 32, row = lane / 4;
  const float factor[2] = {__shfl_sync(~0u, ofRow, row), __shfl_sync(~0u, ofRow, row + 8)};
  const bool relu = p.epilogue.fn == Activation::relu;
  const auto finished = [&](int group, int i) {
    const float4 of = *reinterpret_cast<const float4*>(&columns[8 * group + 2 * (lane % 4)]);
    return real(d[4 * group + i]) * (factor[i / 2] * (i % 2 == 0 ? of.x : of.z)) + (i % 2 == 0 ? of.y : of.w);
  };
#pragma unroll
  for (int group = 0; group < groups; group += 2) {
    if (n0 + 8 * group >= p.n) break;
    float v[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& value = v[i / 4][i % 4] = finished(group + i / 4, i % 4);
      if constexpr (Gated) value = siluFast(value) * finished(group + i / 4 + groups, i % 4);
      else if (relu) value = activate(Activation::relu, value);
    }
    storeSixteen<Rounded>(p, m0 + row, n0 + 8 * group, rows, v);
  }
}

__device__ __forceinline__ float stagedBits(float sum) { return sum; }
__device__ __forceinline__ float stagedBits(uint32_t sum) { return __uint_as_float(sum); }
__device__ __forceinline__ float sumOf(float, float staged) { return staged; }
__device__ __forceinline__ float sumOf(uint32_t, float staged) { return static_cast<float>(__float_as_int(staged)); }

/** A warp's 32 sums of each of 16 rows, as its threads hold them; of a gated product 16 of gate, then the 16 of up. */
template <int N, class Value>
__device__ __forceinline__ void stage(float (&to)[16][kStagedPitch], const Value (&d)[N / 2], int chunk, bool gated) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < N / 32; c++) {
    if (c != chunk) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int alone = 4 * (4 * c + i), paired = 4 * (2 * c + i % 2 + i / 2 * (N / 16));
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<float2*>(&to[lane / 4 + 8 * half][8 * i + 2 * (lane % 4)]) =
            make_float2(stagedBits(gated ? d[paired + 2 * half] : d[alone + 2 * half]),
                        stagedBits(gated ? d[paired + 2 * half + 1] : d[alone + 2 * half + 1]));
    }
  }
}

__device__ __forceinline__ void storeFour(const ProductParams& p, int m, int n, const float (&v)[4]) {
  if (p.vector) {
    if (n < p.n) p.epilogue.store4(m, n, make_float4(v[0], v[1], v[2], v[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (n + i < p.n) p.epilogue.store(m, n + i, v[i]);
}

__device__ __forceinline__ void loadFour(const ProductParams& p, int m, int n, float (&v)[4]) {
  const Dense& residual = p.epilogue.residual;
  if (p.vector) {
    if (n >= p.n) return;
    const float4 four = *reinterpret_cast<const float4*>(&residual(m, n));
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (n + i < p.n) v[i] = residual(m, n + i);
}

/** `activate` of the first or of all rows. */
__device__ __forceinline__ void activateRows(Activation fn, bool all, float (&v)[4][4]) {
  if (fn == Activation::silu) {
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (i < 8 || all) v[i / 4][i % 4] = siluFast(v[i / 4][i % 4]);
  } else if (fn == Activation::relu) {
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (i < 8 || all) v[i / 4][i % 4] = activate(Activation::relu, v[i / 4][i % 4]);
  } else if (fn != Activation::none) {
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (i < 8 || all) v[i / 4][i % 4] = activate(fn, v[i / 4][i % 4]);
  }
}

/** The same for what `finishDirect` does not do: rows of sums are staged, so that residuals are read and outputs stored by lines. */
template <int N, class Value>
__device__ __forceinline__ void finishTile(const ProductParams& p, const Value (&d)[N / 2], float (&staged)[16][kStagedPitch],
                                           const float2 (&columns)[N], float ofRow, int m0, int n0, int rows) {
  const int lane = threadIdx.x % 32;
  const bool gated = p.parts == 2;
  const Activation fn = p.epilogue.fn;
  const int lanes = gated ? 4 : 8;  // that hold a row of a chunk, four outputs each
  const int width = 4 * lanes;
  const auto rowOf = [&](int i) { return gated ? i % 2 * 8 + lane / 4 : i * 4 + lane / 8; };
  const bool adds = p.epilogue.residual.at != nullptr;
  float added[4][4] = {};
  const auto fetch = [&](int n) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (m0 + rowOf(i) < rows) loadFour(p, m0 + rowOf(i), n, added[i]);
  };
  if (adds) fetch(n0 + 4 * (lane % lanes));
#pragma unroll 1
  for (int chunk = 0; chunk < N / 32; chunk++) {
    const int at = chunk * width + 4 * (lane % lanes);
    if (n0 + chunk * width >= p.n) break;
    stage<N>(staged, d, chunk, gated);
    __syncwarp();
    // Four rows of the thread's outputs; of a gated product two of gate and the same two of up.
    float v[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool up = gated && i >= 2;
      const float4 sums = *reinterpret_cast<const float4*>(&staged[rowOf(i)][4 * (lane % lanes) + (up ? 16 : 0)]);
      const float4* of = reinterpret_cast<const float4*>(&columns[at + (up ? N / 2 : 0)]);
      const float4 first = of[0], second = of[1];
      const float factor = __shfl_sync(~0u, ofRow, rowOf(i));
      v[i][0] = sumOf(Value(), sums.x) * (factor * first.x) + first.y;
      v[i][1] = sumOf(Value(), sums.y) * (factor * first.z) + first.w;
      v[i][2] = sumOf(Value(), sums.z) * (factor * second.x) + second.y;
      v[i][3] = sumOf(Value(), sums.w) * (factor * second.z) + second.w;
    }
    __syncwarp();
    if (adds) {
#pragma unroll
      for (int i = 0; i < 16; i++) v[i / 4][i % 4] += added[i / 4][i % 4];
      if (chunk + 1 < N / 32) fetch(n0 + at + width);  // before these are stored: memory is far
    }
    activateRows(fn, !gated, v);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (gated && i >= 2) break;
      if (gated) {
#pragma unroll
        for (int j = 0; j < 4; j++) v[i][j] *= v[i % 2 + 2][j];
      }
      if (m0 + rowOf(i) < rows) storeFour(p, m0 + rowOf(i), n0 + at, v[i]);
    }
  }
}
#endif

}  // namespace
}  // namespace fewbit::linear
