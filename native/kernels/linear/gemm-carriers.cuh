// Carriers: what the tensor cores multiply in place of operands that they do not take as they are stored.
//
// A carrier is a bf16 or f16 number in scratch, and products of carriers are those of the stored values. A value of up to 8
// significant bits (11 for f16, after its row was scaled by a power of two) is one carrier; a float32 is the sum of three bf16 of 8
// bits each, or of two f16 (22 bits). Products of parts add up in float32; pairs of parts whose product is below 2^-24 of
// the whole are left out. Scales that do not change along K are applied afterwards.
#pragma once
#include "arguments.hpp"
#include "decode.cuh"

namespace fewbit::linear {
namespace {

/** What the tensor cores multiply. The order is that of `CARRIERS` in linear-gemm.ts. */
enum class Carrier : int { stored, bf16, f16, s8, blocks };

struct GemmParams : WeightGroup {
  Activations x;
  Epilogue epilogue;
  Carrier carrier = Carrier::stored;
  int xParts = 1, wParts = 1;
  bool scaledX = false, scaledW = false;  // carriers hold values with their scales, not bare codes
  int columns = 0;                        // K of the carriers: K padded, and in f16 the columns of float zero points
  const uint32_t* symbols = nullptr;
  // Scratch.
  uint8_t* xCarrier = nullptr;
  float* xFactor = nullptr;  // [rows]: multiplies a row of results
  uint8_t* wCarrier = nullptr;
  float* wFactor = nullptr;    // [parts, n]
  float* products = nullptr;   // [parts, rows, n], s32 for s8 carriers
};

constexpr int kThreads = 256;

__device__ __forceinline__ float blockMax(float value) {
  __shared__ float most[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
  __syncthreads();
  value = most[threadIdx.x % (kThreads / 32)];
#pragma unroll
  for (int step = kThreads / 64; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return __shfl_sync(~0u, value, 0);
}

/** The power of two that takes numbers up to `most` below 2^limit, and its inverse; both normal. */
__device__ __forceinline__ float2 powerFor(float most, int limit) {
  const int exponent = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 126, -100), 126);  // most < 2^exponent
  const int up = min(max(limit - exponent, -126), 126);
  return make_float2(__uint_as_float((127 + up) << 23), __uint_as_float((127 - up) << 23));
}

/** The power of two that an f16 carrier of x leaves room for sums of a group in. */
__host__ __device__ inline int headroom(const GemmParams& p) {
  int bits = 0;
  if (p.floatZero)
    while ((1 << bits) < p.weights[0].zero.k) bits++;
  return 15 - bits;
}
/** Groups of a float zero point, each of which takes two columns of f16. */
__host__ __device__ inline int zeroColumns(const GemmParams& p) {
  return p.carrier == Carrier::f16 && p.floatZero ? (p.weights[0].zero.columns * 2 + 7) / 8 * 8 : 0;
}

__device__ __forceinline__ uint32_t carry(Carrier carrier, float value, int part) {
  if (carrier == Carrier::f16) {
    const __half high = __float2half_rn(value);
    if (part == 0) return __half_as_ushort(high);
    const float rest = isinf(__half2float(high)) || isnan(value) ? 0.0f : value - __half2float(high);
    return __half_as_ushort(__float2half_rn(rest));
  }
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (!finite) return part > 0 ? 0 : isnan(value) ? 0x7fc0 : bits >> 16;
  const float rest = value - __uint_as_float(bits & 0xffff0000u);
  if (part == 0) return bits >> 16;
  const uint32_t middle = __float_as_uint(rest);
  if (part == 1) return middle >> 16;
  return __float_as_uint(rest - __uint_as_float(middle & 0xffff0000u)) >> 16;
}

/** Eight elements of a row of x, zero beyond its end. */
__device__ __forceinline__ void octetOfX(const GemmParams& p, int m, int octet, bool vector, float (&values)[8]) {
  const int k = octet * 8;
  if (vector && k + 8 <= p.k) {
    const uint8_t* row = p.x.at + int64_t(m) * p.x.stride;
    if (p.x.bits == 0) {
      const float4 a = __ldg(reinterpret_cast<const float4*>(row) + octet * 2);
      const float4 b = __ldg(reinterpret_cast<const float4*>(row) + octet * 2 + 1);
      values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
      values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    } else {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(row) + octet);
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    }
    return;
  }
  // Of one carrier an element, the scale of level 1 is a factor of the row.
  const auto scaleOf = [&](int at) { return !p.scaledX ? 1.0f : p.xParts == 1 ? p.x.innerScale(m, at) : p.x.scaleAt(m, at); };
  if (p.x.bits == 8 && k + 8 <= p.k && p.x.zero.codec == ScaleCodec::none && p.x.scale[0].k % 8 == 0 && p.x.scale[1].codec == ScaleCodec::none &&
      ((reinterpret_cast<uintptr_t>(p.x.at) | p.x.stride) & 7) == 0) {
    const uint2 codes = __ldg(reinterpret_cast<const uint2*>(p.x.at + int64_t(m) * p.x.stride + k));
    const float scale = scaleOf(k);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = __ldg(p.x.table + ((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)) & 255u)) * scale;
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; i++) {
    float value = 0.0f;
    if (k + i < p.k) {
      value = p.x.code(m, k + i);
      if (p.scaledX) value *= scaleOf(k + i);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = j == i ? value : values[j];
  }
}

/** Eight bf16 numbers times a power of two as f16, and their sum. */
__device__ __forceinline__ uint4 halvesOf(uint4 eight, float power, float& sum) {
  const uint32_t in[4] = {eight.x, eight.y, eight.z, eight.w};
  uint32_t out[4];
  float pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float low = __uint_as_float(in[i] << 16) * power, high = __uint_as_float(in[i] & 0xffff0000u) * power;
    pairs[i] = low + high;
    const __half2 both = __floats2half2_rn(low, high);
    out[i] = reinterpret_cast<const uint32_t&>(both);
  }
  sum = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
  return make_uint4(out[0], out[1], out[2], out[3]);
}

/** The largest finite magnitude of `most` and eight bf16 numbers. */
__device__ __forceinline__ float largest(float most, uint4 eight) {
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float low = fabsf(__uint_as_float(words[i] << 16)), high = fabsf(__uint_as_float(words[i] & 0xffff0000u));
    most = low < INFINITY ? fmaxf(most, low) : most;
    most = high < INFINITY ? fmaxf(most, high) : most;
  }
  return most;
}

/** One block a row of x: [part][row][columns]. */
__global__ void __launch_bounds__(kThreads) carryX(const __grid_constant__ GemmParams p) {
  extern __shared__ float sums[];  // of x over 8 elements, for float zero points
  constexpr int kKept = 8;         // octets of a thread: rows of up to 16384 are read once
  const int m = blockIdx.x;
  const int rows = gridDim.x;
  if (m >= p.x.rows.at(p.symbols)) return;
  const bool converts = p.carrier == Carrier::bf16 || p.carrier == Carrier::f16;
  const bool aligned = ((reinterpret_cast<uintptr_t>(p.x.at) | static_cast<uintptr_t>(p.x.stride)) & 15) == 0;
  const bool bf16 = p.x.bits == 16 && !p.x.half && p.x.scale[0].codec == ScaleCodec::none;
  const bool vector = aligned && (p.x.bits == 0 || bf16);
  const bool kept = p.carrier == Carrier::f16 && aligned && bf16 && p.xParts == 1 && p.k % 8 == 0 && p.k <= 8 * kThreads * kKept;
  uint4 row[kKept];
  float2 power = make_float2(1.0f, 1.0f);
  if (p.carrier == Carrier::f16) {
    float most = 0.0f;
    if (kept) {
      const uint4* in = reinterpret_cast<const uint4*>(p.x.at + int64_t(m) * p.x.stride);
#pragma unroll
      for (int i = 0; i < kKept; i++) {
        const int octet = i * kThreads + threadIdx.x;
        if (octet * 8 < p.k) row[i] = __ldg(in + octet);
      }
#pragma unroll
      for (int i = 0; i < kKept; i++)
        if ((i * kThreads + threadIdx.x) * 8 < p.k) most = largest(most, row[i]);
    } else {
#pragma unroll 2
      for (int octet = threadIdx.x; octet * 8 < p.k; octet += kThreads) {
        float values[8] = {};
        octetOfX(p, m, octet, vector, values);
#pragma unroll
        for (int i = 0; i < 8; i++) most = fabsf(values[i]) < INFINITY ? fmaxf(most, fabsf(values[i])) : most;
      }
    }
    power = powerFor(blockMax(most), headroom(p));
  }
  if (threadIdx.x == 0) p.xFactor[m] = power.y * (!p.scaledX ? p.x.scaleAt(m, 0) : p.xParts == 1 ? p.x.outerScale(m) : 1.0f);
  if (!converts) return;
  uint16_t* out = reinterpret_cast<uint16_t*>(p.xCarrier) + int64_t(m) * p.columns;
  const int64_t partStride = int64_t(rows) * p.columns;
  const int zeros = zeroColumns(p);
  const int kEnd = p.columns - zeros;
  if (kept) {
#pragma unroll
    for (int i = 0; i < kKept; i++) {
      const int octet = i * kThreads + threadIdx.x;
      if (octet * 8 >= kEnd) break;
      float sum;
      reinterpret_cast<uint4*>(out)[octet] = halvesOf(octet * 8 < p.k ? row[i] : make_uint4(0, 0, 0, 0), power.x, sum);
      if (zeros > 0) sums[octet] = sum;
    }
  } else {
#pragma unroll 2
    for (int octet = threadIdx.x; octet * 8 < kEnd; octet += kThreads) {
      float values[8] = {};
      octetOfX(p, m, octet, vector, values);
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] *= power.x;
      if (zeros > 0)
        sums[octet] = ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]));
      for (int part = 0; part < p.xParts; part++) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          words[i] = carry(p.carrier, values[2 * i], part) | carry(p.carrier, values[2 * i + 1], part) << 16;
        *reinterpret_cast<uint4*>(out + part * partStride + octet * 8) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  if (zeros == 0) return;
  // Sums over groups, high and low halves, for the columns that hold zero points.
  __syncthreads();
  const Blocks& zero = p.weights[0].zero;
  for (int group = threadIdx.x; group < zeros / 2; group += kThreads) {
    float sum = 0.0f;
    if (group < zero.columns)
      for (int octet = group * (zero.k / 8); octet < min((group + 1) * (zero.k / 8), (p.k + 7) / 8); octet++) sum += sums[octet];
    const uint32_t both = carry(Carrier::f16, sum, 0) | carry(Carrier::f16, sum, 1) << 16;
    for (int part = 0; part < p.xParts; part++)
      *reinterpret_cast<uint32_t*>(out + part * partStride + kEnd + group * 2) = part == 0 ? both : 0;
  }
}

/** Eight values as they are stored in a carrier of bf16, f16 or signed bytes. */
__device__ __forceinline__ void storeOctet(Carrier carrier, uint8_t* row, int octet, const float (&v)[8]) {
  if (carrier == Carrier::s8) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++) words[j / 4] |= (static_cast<uint32_t>(static_cast<int>(v[j])) & 255u) << (8 * (j % 4));
    *reinterpret_cast<uint2*>(row + octet * 8) = make_uint2(words[0], words[1]);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const __nv_bfloat162 bf16 = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    const __half2 f16 = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
    words[i] = carrier == Carrier::f16 ? reinterpret_cast<const uint32_t&>(f16) : reinterpret_cast<const uint32_t&>(bf16);
  }
  *reinterpret_cast<uint4*>(row + octet * 16) = make_uint4(words[0], words[1], words[2], words[3]);
}

/** Eight decoded codes, in order. */
template <class Codes>
__device__ __forceinline__ void decodeOctet(const GemmParams& p, const uint8_t* row, int at, float zero, float (&values)[8]) {
  uint32_t pairs[4];
  Codes::decode(row, at, p.element, zero, pairs);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[Codes::interleaved ? i : 2 * i] = __uint_as_float(pairs[i] << 16);
    values[Codes::interleaved ? i + 4 : 2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

/** A row whose codes are read a vector at a time, several ahead of the stores, and whose scales change with a power of two of them. */
template <class Codes>
__device__ __forceinline__ void carryVectors(const GemmParams& p, const Weights& w, int n, float power, int shift, uint8_t* out, int end) {
  constexpr int ahead = 4, words = Codes::bits / 4;
  const uint8_t* row = w.codes + n * p.rowBytes;
  Blocks scales = w.scale;
  scales.at += int64_t(n / scales.rows) * scales.columns * scaleBytes(scales.codec);
  const FastScale decode(scales.codec);
  const int octets = p.k / 8;
  for (int begin = threadIdx.x % 32; begin < end; begin += 32 * ahead) {
    alignas(8) uint32_t codes[ahead][words] = {};
    uint32_t scale[ahead];
#pragma unroll
    for (int i = 0; i < ahead; i++) {
      const int octet = begin + 32 * i;
      if (octet >= octets) continue;
      if constexpr (words == 1) codes[i][0] = __ldg(reinterpret_cast<const uint32_t*>(row) + octet);
      else *reinterpret_cast<uint2*>(codes[i]) = __ldg(reinterpret_cast<const uint2*>(row) + octet);
      if (p.scaledW) scale[i] = loadScaleBits(scales, octet * 8 >> shift);
    }
#pragma unroll
    for (int i = 0; i < ahead; i++) {
      const int octet = begin + 32 * i;
      if (octet >= end) break;
      float values[8];
      decodeOctet<Codes>(p, reinterpret_cast<const uint8_t*>(codes[i]), 0, 0.0f, values);
      const float factor = octet >= octets ? 0.0f : p.scaledW ? decode(scale[i]) * power : power;
#pragma unroll
      for (int j = 0; j < 8; j++) values[j] *= factor;
      storeOctet(p.carrier, out, octet, values);
    }
  }
}

/** A row of any kind. */
template <class Codes>
__device__ __forceinline__ void carryElements(const GemmParams& p, const Weights& w, int n, float power, uint8_t* out, int64_t partBytes,
                                              int end) {
  for (int octet = threadIdx.x % 32; octet < end; octet += 32) {
    const int k = octet * 8;
    float values[8] = {};
    if (k < p.k) {
      const float zero = p.element.zeros ? blockValue(w.zero, n, k) : 0.0f;
      const float factor = p.scaledW ? blockValue(w.scale, n, k) : 1.0f;
      decodeOctet<Codes>(p, w.codes + n * p.rowBytes, octet * Codes::bits, zero, values);
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] = k + i < p.k ? values[i] * factor * power : 0.0f;
    }
    if (p.wParts == 1) storeOctet(p.carrier, out, octet, values);
    for (int part = 0; p.wParts > 1 && part < p.wParts; part++) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        words[i] = carry(p.carrier, values[2 * i], part) | carry(p.carrier, values[2 * i + 1], part) << 16;
      *reinterpret_cast<uint4*>(out + part * partBytes + octet * 16) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

/** One warp a row of weights: [matrix][part][row][columns]. */
template <class Codes>
__global__ void __launch_bounds__(kThreads) carryW(const __grid_constant__ GemmParams p) {
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.parts * p.n) return;
  const int matrix = row / p.n, n = row - matrix * p.n;
  const Weights& w = p.weights[matrix];
  const int zeros = zeroColumns(p);
  const int kEnd = p.columns - zeros;
  float2 power = make_float2(1.0f, 1.0f);
  if (p.carrier == Carrier::f16) {
    // No code is larger than 2^bits; a zero point's own code is a bf16 of its row.
    const int64_t scaleRow = int64_t(n / w.scale.rows) * w.scale.columns, zeroRow = int64_t(n / w.zero.rows) * w.zero.columns;
    float most = 0.0f;
    for (int i = lane; i < w.scale.columns; i += 32) {
      const uint32_t scale = loadScaleBits(w.scale, scaleRow + i);
      const uint32_t zero = zeros > 0 ? loadScaleBits(w.zero, zeroRow + i) : 0;
      most = fmaxf(most, fabsf(decodeScale(w.scale.codec, scale)) * (1 << (Codes::bits - 1)));
      if (zeros > 0) most = fmaxf(most, fabsf(decodeScale(w.zero.codec, zero)));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    power = powerFor(most, 15);
  }
  if (lane == 0)
    p.wFactor[row] = power.y * (p.scaledW ? 1.0f : blockValue(w.scale, n, 0)) * blockValue(w.outer, n, 0);
  if (p.carrier == Carrier::stored) return;
  const int bytes = p.carrier == Carrier::s8 ? 1 : 2;
  uint8_t* out = p.wCarrier + (int64_t(matrix) * p.wParts * p.n + n) * p.columns * bytes;
  const int64_t partBytes = int64_t(p.n) * p.columns * bytes;
  bool vectors = false;
  if constexpr (Codes::bits == 4 || Codes::bits == 8) {
    const bool regular = (w.scale.k & (w.scale.k - 1)) == 0 || !p.scaledW;
    vectors = regular && p.wParts == 1 && !p.element.zeros && p.k % 8 == 0;
    if (vectors) carryVectors<Codes>(p, w, n, power.x, 31 - __clz(w.scale.k), out, kEnd / 8);
  }
  if (!vectors) carryElements<Codes>(p, w, n, power.x, out, partBytes, kEnd / 8);
  // A zero point meets both halves of a sum.
  for (int group = lane; group < zeros / 2; group += 32) {
    const float zero = group < w.zero.columns ? blockValue(w.zero, n, group * w.zero.k) * power.x : 0.0f;
    const uint32_t half = carry(Carrier::f16, zero, 0);
    for (int part = 0; part < p.wParts; part++)
      *reinterpret_cast<uint32_t*>(out + part * partBytes + (kEnd + group * 2) * 2) = part == 0 ? half | half << 16 : 0;
  }
}

}  // namespace
}  // namespace fewbit::linear
