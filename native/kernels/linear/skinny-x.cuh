// x in shared memory, as the columns of bf16 that the skinny kernels multiply.
#pragma once
#include "skinny-ring.cuh"

namespace fewbit::linear {

/** The three bf16 parts of a float32, 8 bits each; what is not finite stays in the first. */
__device__ __forceinline__ void splitBf16(float value, uint32_t (&part)[3]) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t high = bits & 0xffff0000u;
  const float rest = value - __uint_as_float(high);
  const uint32_t middle = __float_as_uint(rest) & 0xffff0000u;
  const uint32_t low = __float_as_uint(rest - __uint_as_float(middle));
  part[0] = (isnan(value) ? 0x7fc00000u : high) >> 16;
  part[1] = finite ? middle >> 16 : 0;
  part[2] = finite ? low >> 16 : 0;
}

/** Where a worker's octets (8 neighbouring elements) of x lie: in its chunks, which are every `kWorkers`th. */
template <class Codes>
struct Octets {
  using C = ChunkOf<Codes>;
  static constexpr int ofChunk = C::k / 8;
  int warp, count;
  __device__ __forceinline__ Octets(const Walk<Codes>& walk, int warp)
      : warp(warp), count(walk.chunks > warp ? (walk.chunks - warp + kWorkers - 1) / kWorkers * ofChunk : 0) {}
  __device__ __forceinline__ int chunk(int octet) const { return warp + octet / ofChunk * kWorkers; }
  __device__ __forceinline__ int k(int octet) const { return chunk(octet) * C::k + octet % ofChunk * 8; }
  /** Bytes from the first octet of the first column in shared memory. */
  __device__ __forceinline__ int at(int octet, int columns) const {
    return (chunk(octet) * C::segments + octet % ofChunk / 4) * (columns * 64) + octet % 4 * 16;
  }
};

/** Asks for a worker's octets of a row of bf16, `at(octet)`, zeros from element `end` on. Lanes read what they have asked for. */
template <class Codes, class At>
__device__ __forceinline__ void copyOctets(const Walk<Codes>& walk, const Octets<Codes>& octets, const uint8_t* row, int end, At at) {
#pragma unroll 1
  for (int octet = threadIdx.x % 32; octet < octets.count; octet += 32) {
    const int k = walk.begin + octets.k(octet);
    copy16OrZeros(sharedAddress(at(octet)), row + int64_t(k) * 2, k < end);
  }
}

/** Exponents of bf16 as they are stored: of the largest of all that `Lanes` neighbouring lanes have, of the least of one's own but zeros. */
struct Exponents {
  int largest, least;
};
template <int Lanes>
__device__ __forceinline__ Exponents exponentsOf(const uint32_t (&words)[4]) {
  uint32_t largest = 0, least = ~0u;  // least of those that are not zero, less 1
#pragma unroll
  for (const uint32_t word : words) {
    const uint32_t magnitudes = word & 0x7fff7fffu;
    largest = __vmaxu2(largest, magnitudes);
    least = __vminu2(least, __vsub2(magnitudes, 0x00010001u));
  }
#pragma unroll
  for (int apart = Lanes / 2; apart > 0; apart /= 2) largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, apart));
  return {static_cast<int>(max(largest & 0xffffu, largest >> 16) >> 7), static_cast<int>((min(least & 0xffffu, least >> 16) + 1) >> 7)};
}

/** The lanes that have a chunk's octets, and whether all of them say so. */
template <class Codes>
__device__ __forceinline__ uint32_t lanesOfChunk() {
  constexpr int count = Octets<Codes>::ofChunk;
  return (~0u >> (32 - count)) << (threadIdx.x % 32 / count * count);
}
template <class Codes>
__device__ __forceinline__ bool allOfChunk(bool say) {
  return (__ballot_sync(~0u, !say) & lanesOfChunk<Codes>()) == 0;
}

/** Sums of x over what is promoted together, for the columns of first parts; the octets of a unit are neighbouring lanes. */
template <class Codes, int Tiles>
struct SumsOfX {
  float* at;
  int shift;  // octets of a unit, as a power of two
  int pitch;  // from chunk to chunk
  __device__ __forceinline__ void add(const Octets<Codes>& octets, int octet, int m, float sum) const {
    for (int apart = 1 << shift >> 1; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    if (octet >= octets.count || (octet & ((1 << shift) - 1)) != 0) return;
    const int inChunk = octet % Octets<Codes>::ofChunk;
    float* row = at + octets.chunk(octet) * pitch + (inChunk >> shift) * (Tiles * 8);
    if (m == 0) {
#pragma unroll
      for (int i = 0; i < Tiles * 2; i++) reinterpret_cast<float4*>(row)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    row[m] = sum;
  }
};

/** Eight elements of x of `Width` bits as they lie in memory, and their bf16 parts in the order of the codes' pairs. */
template <class Codes, int Width>
struct Octet {
  static constexpr int parts = Width == 32 ? 3 : 1;
  uint4 raw[Width == 32 ? 2 : 1];

  __device__ __forceinline__ void load(const uint8_t* at) {
    if constexpr (Width == 8) {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      raw[0].x = two.x, raw[0].y = two.y;
    } else {
      raw[0] = *reinterpret_cast<const uint4*>(at);
      if constexpr (Width == 32) raw[1] = *reinterpret_cast<const uint4*>(at + 16);
    }
  }
  __device__ __forceinline__ void clear() {
    raw[0] = make_uint4(0, 0, 0, 0);
    if constexpr (Width == 32) raw[1] = raw[0];
  }
  __device__ __forceinline__ static uint32_t upper(const uint32_t (&bits)[8], int pair) {
    return __byte_perm(bits[Codes::first(pair)], bits[Codes::first(pair) + Codes::apart], 0x7632);
  }
  /** Stores the parts `apart` bytes from each other, codes of 8 bits times `scale`; returns the sum of the values. */
  __device__ __forceinline__ float store(const float* table, uint8_t* target, int apart, bool stores, float scale = 1.0f) const {
    uint32_t bits[8];
    const uint32_t words[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if constexpr (Width == 32) bits[j] = j < 4 ? words[j] : (&raw[1].x)[j - 4];
      if constexpr (Width == 16) bits[j] = j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u;
      if constexpr (Width == 8) bits[j] = __float_as_uint(__ldg(table + (words[j / 4] >> (8 * (j % 4)) & 0xffu)) * scale);
    }
    const auto valueOf = [&](int j) { return __uint_as_float(bits[j]); };
    const float sum =
        ((valueOf(0) + valueOf(1)) + (valueOf(2) + valueOf(3))) + ((valueOf(4) + valueOf(5)) + (valueOf(6) + valueOf(7)));
    uint32_t largest = 0;
    if constexpr (Width == 32) {
#pragma unroll
      for (int j = 0; j < 8; j++) largest = max(largest, bits[j] & 0x7fffffffu);
    }
#pragma unroll
    for (int part = 0; part < parts; part++) {
      uint32_t top[8];
#pragma unroll
      for (int j = 0; j < 8; j++) top[j] = bits[j];
      if (part == 0 && largest >= 0x7f800000u) {
        // What is not finite stays in the first part; a NaN's upper half must be one too.
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if ((bits[j] & 0x7fffffffu) > 0x7f800000u) top[j] = 0x7fc00000u;
          if ((bits[j] & 0x7f800000u) == 0x7f800000u) bits[j] = 0u;
        }
      }
      if (stores)
        *reinterpret_cast<uint4*>(target + part * apart) = make_uint4(upper(top, 0), upper(top, 1), upper(top, 2), upper(top, 3));
      if (part + 1 < parts) {
#pragma unroll
        for (int j = 0; j < 8; j++) bits[j] = __float_as_uint(valueOf(j) - __uint_as_float(bits[j] & 0xffff0000u));
      }
    }
    return sum;
  }
};

/** Rows of bf16, asked for at once where their codes' pairs will lie. */
template <class Codes, int Tiles>
__device__ __forceinline__ void stageBf16(const SkinnyParams& p, uint8_t* target, const SumsOfX<Codes, Tiles>& sums, const Walk<Codes>& walk,
                                          const Octets<Codes>& octets, int m0, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int m = 0; m < p.columnsOfX; m++) {
    copyOctets(walk, octets, p.x.at + (m0 + m) * p.x.stride, m < rows ? p.k : 0,
               [&](int octet) { return target + octets.at(octet, p.columnsOfX) + m * 64; });
  }
  copiesAwait();
#pragma unroll 1
  for (int m = 0; m < p.columnsOfX; m++) {
#pragma unroll 1
    for (int octet = lane; octet - lane < octets.count; octet += 32) {
      uint8_t* at = target + octets.at(octet, p.columnsOfX) + m * 64;
      const bool mine = octet < octets.count;
      Octet<Codes, 16> of;
      of.clear();
      if (mine) of.load(at);
      const float sum = of.store(nullptr, at, 0, mine);
      if (p.floatZero) sums.add(octets, octet, m, sum);
    }
  }
}

/** x whose elements of `Width` bits can be loaded eight at a time; code 0 is 0. */
template <class Codes, int Tiles, int Width>
__device__ __forceinline__ void stageOctets(const SkinnyParams& p, uint8_t* target, const SumsOfX<Codes, Tiles>& sums,
                                            const Walk<Codes>& walk, const Octets<Codes>& octets, int m0, int rows) {
  constexpr int batch = Width == 32 ? 2 : 4;  // octets that a lane loads at once
  const int lane = threadIdx.x % 32;
  const int columns = p.columnsOfX * p.parts3;
#pragma unroll 1
  for (int m = 0; m < p.columnsOfX; m++) {
    const uint8_t* row = p.x.at + (m0 + m) * p.x.stride;
#pragma unroll 1
    for (int first = lane; first - lane < octets.count; first += 32 * batch) {
      Octet<Codes, Width> loaded[batch];
#pragma unroll
      for (int b = 0; b < batch; b++) {
        const int k = walk.begin + octets.k(first + b * 32);
        loaded[b].clear();
        if (first + b * 32 < octets.count && m < rows && k < p.k) loaded[b].load(row + int64_t(k) * Width / 8);
      }
#pragma unroll
      for (int b = 0; b < batch; b++) {
        const int octet = first + b * 32;
        if (octet - lane >= octets.count) break;
        float scale = 1.0f;
        if (Width == 8 && !p.separable) scale = p.x.innerScale(m0 + min(m, rows - 1), min(walk.begin + octets.k(octet), p.k - 1));
        const float sum =
            loaded[b].store(p.x.table, target + octets.at(octet, columns) + m * 64, p.columnsOfX * 64, octet < octets.count, scale);
        if (p.floatZero) sums.add(octets, octet, m, sum);
      }
    }
  }
}

/** x of any kind, an element at a time. */
template <class Codes, int Tiles>
__device__ __noinline__ void stageElements(const SkinnyParams& p, uint8_t* target, SumsOfX<Codes, Tiles> sums, Walk<Codes> walk,
                                           Octets<Codes> octets, int m0, int rows) {
  const int lane = threadIdx.x % 32;
  const int columns = p.columnsOfX * p.parts3;
#pragma unroll 1
  for (int m = 0; m < p.columnsOfX; m++) {
#pragma unroll 1
    for (int octet = lane; octet - lane < octets.count; octet += 32) {
      float sum = 0.0f;
#pragma unroll 1
      for (int j = 0; j < 8; j++) {
        const int k = walk.begin + octets.k(octet) + Codes::first(j / 2) + j % 2 * Codes::apart;
        float value = 0.0f;
        if (octet < octets.count && m < rows && k < p.k) {
          value = p.x.code(m0 + m, k);
          if (!p.separable && p.x.bits != 0) value *= p.parts3 == 1 ? p.x.innerScale(m0 + m, k) : p.x.scaleAt(m0 + m, k);
        }
        sum += value;
        uint32_t part[3];
        splitBf16(value, part);
        if (octet >= octets.count) continue;
        unsigned short* at = reinterpret_cast<unsigned short*>(target + octets.at(octet, columns) + m * 64) + j;
        at[0] = static_cast<unsigned short>(part[0]);
        if (p.parts3 == 1) continue;
        at[p.columnsOfX * 32] = static_cast<unsigned short>(part[1]);
        at[p.columnsOfX * 64] = static_cast<unsigned short>(part[2]);
      }
      if (p.floatZero) sums.add(octets, octet, m, sum);
    }
  }
}

template <class Codes, int Tiles, class Mode>
__device__ __forceinline__ SumsOfX<Codes, Tiles> sumsOfX(const SkinnyParams& p, uint8_t* shared, const SkinnyShared& at) {
  const int unit = Mode::fixed && Mode::scaled ? Mode::unit : p.unit;
  return {reinterpret_cast<float*>(shared + at.sums), 33 - __clz(unit), sumsOfChunk<Codes, Tiles, Mode>(p)};
}

/**
 * A worker's chunks of x, split and laid out as [segment][column][lane % 4][8], and their sums over what is promoted together where
 * zero points multiply those. Each worker reads only what it stored itself.
 */
template <class Codes, int Tiles, class Mode>
__device__ __forceinline__ void stageX(const SkinnyParams& p, uint8_t* shared, const SkinnyShared& at, const Walk<Codes>& walk,
                                       int warp, int m0, int rows) {
  const Octets<Codes> octets(walk, warp);
  const SumsOfX<Codes, Tiles> sums = sumsOfX<Codes, Tiles, Mode>(p, shared, at);
  uint8_t* target = shared + at.x;
  const bool aligned = ((reinterpret_cast<uintptr_t>(p.x.at) | p.x.stride) & 15) == 0 && p.k % 8 == 0;
  const bool exact = aligned && p.parts3 == 1 && p.x.zero.codec == ScaleCodec::none;  // one bf16 an element, perhaps with its scale
  if (aligned && p.x.bits == 0) stageOctets<Codes, Tiles, 32>(p, target, sums, walk, octets, m0, rows);
  else if (exact && p.separable && p.x.bits == 16 && !p.x.half) stageBf16<Codes, Tiles>(p, target, sums, walk, octets, m0, rows);
  else if (exact && p.x.bits == 8 && (p.separable || p.x.scale[0].k % 8 == 0)) stageOctets<Codes, Tiles, 8>(p, target, sums, walk, octets, m0, rows);
  else stageElements<Codes, Tiles>(p, target, sums, walk, octets, m0, rows);
  __syncwarp();
}

}  // namespace fewbit::linear
