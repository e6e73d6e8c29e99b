// One row of x in whole numbers: exact sums of integer codes, on the tensor cores' integer units.
//
// The elements of a unit (those that share a weight's scale, or a chunk) are integers of 30 bits times one power of two, cut into
// four signed bytes: four columns of x. A bf16 keeps its 8 bits if its exponent is at most 22 below that of its unit's largest; a chunk of x
// that has a smaller one, or one that is not finite, stays bf16 and meets codes in bf16.
//
// Codes of 4 bits multiply as they lie, two a byte. Of bytes b = c0 + 16 c1 and elements X0 and X1 of x,
//   c0 X0 + c1 X1 = b X0 + (b & 240) (X1 / 16 - X0):
// with X0 and X1 whole numbers of 26 bits times 16, each byte costs one operation, where two codes out of it would cost three.
#pragma once
#include "skinny-worker.cuh"

namespace fewbit::linear {

/** Four bytes of the same place of four words: out[j] is byte j of each. */
__device__ __forceinline__ void transposeBytes(const uint32_t (&in)[4], uint32_t (&out)[4]) {
  const uint32_t low0 = __byte_perm(in[0], in[1], 0x5140), low1 = __byte_perm(in[2], in[3], 0x5140);
  const uint32_t high0 = __byte_perm(in[0], in[1], 0x7362), high1 = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(low0, low1, 0x5410);
  out[1] = __byte_perm(low0, low1, 0x7632);
  out[2] = __byte_perm(high0, high1, 0x5410);
  out[3] = __byte_perm(high0, high1, 0x7632);
}

/**
 * Where things lie: a chunk's x as digits [64 elements, or 32][digit][as many], or as bf16 [32 elements][lane % 4][8]; what a unit's four sums begin with
 * [unit][lane % 2][4], behind those of a chunk the powers of two of its units' highest digits, -1 where it stays bf16; sums of x, as three bf16,
 * [chunk][part][8].
 */
template <class Codes, class Mode>
struct Digits {
  using C = ChunkOf<Codes>;
  static constexpr int unit = Mode::scaled ? Mode::unit * 32 : C::k;
  static constexpr int units = C::k / unit;  // of a chunk
  static constexpr int block = unit == 32 ? 32 : 64;  // elements whose codes lanes load at once
  static constexpr int bytes = C::k * kDigits;
  // Where powers begin, and sums of x where scales are loaded, and all, of a chunk.
  static constexpr int powers = units * 8, wholes = powers + (units + 3) / 4 * 4, ints = kDigitInts<Codes, Mode>;
  static constexpr bool sumsX = Mode::floatZero || Mode::loads;
  /** Whether codes of 4 bits, which then are stored without a sign, stay in pairs: where lanes load 64 of them at once, whose scales come with them. */
  static constexpr bool pairs = Codes::bits == 4 && !Mode::loads;
  static_assert(!pairs || block == 64);
  static constexpr int range = pairs ? 18 : 22;  // powers of two from an element of a unit to its largest
  static constexpr int octetsOfChunk = C::k / 8, octetsOfUnit = unit / 8;
  /** 1.5 * 2^23 as a float: an integer below 2^22 added to its bits is added to its value. Sums of 128 codes are below that. */
  static constexpr int kMagic = 0x4b400000;
  static constexpr uint32_t kUpper = 0xf0f0f0f0u;

  /** Sum over the lanes of a unit. */
  template <class T>
  __device__ __forceinline__ static T overUnit(T value) {
#pragma unroll
    for (int apart = octetsOfUnit / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
    return value;
  }

  /** Stages a worker's chunks of row `m` of x. */
  __device__ __forceinline__ static void stage(const SkinnyParams& p, uint8_t* shared, const SkinnyShared& at,
                                               const Walk<Codes>& walk, int warp, int m) {
    const int lane = threadIdx.x % 32;
    const Octets<Codes> octets(walk, warp);
    const auto targetOf = [&](int octet) { return shared + at.x + octets.chunk(octet) * bytes; };
    // What is to be cut up lies in the upper half of a chunk's place, and everything is asked for at once.
    const auto rawOf = [&](int octet) { return targetOf(octet) + bytes / 2 + octet % octetsOfChunk * 16; };
    copyOctets(walk, octets, p.x.at + m * p.x.stride, p.k, rawOf);
    copiesAwait();
#pragma unroll 1
    for (int octet = lane; octet - lane < octets.count; octet += 32) {
      const bool mine = octet < octets.count;
      const uint4 raw = mine ? *reinterpret_cast<const uint4*>(rawOf(octet)) : make_uint4(0, 0, 0, 0);
      __syncwarp();
      stageOctet(p, shared, at, octets.chunk(octet), octet % octetsOfChunk, {raw.x, raw.y, raw.z, raw.w}, targetOf(octet), mine);
    }
    __syncwarp();
  }

  /** An octet of bf16 of a chunk that the lanes of its octets stage together. */
  __device__ __forceinline__ static void stageOctet(const SkinnyParams& p, uint8_t* shared, const SkinnyShared& at, int chunk,
                                                    int inChunk, const uint32_t (&words)[4], uint8_t* target, bool mine) {
    const auto valueOf = [&](int j) { return __uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u); };
    const Exponents of = exponentsOf<octetsOfUnit>(words);
    // The powers of two are normal numbers for these exponents.
    const int exponent = min(max(of.largest, 32), 253);
    const bool fits = of.least > 255 || (of.largest == exponent && of.least >= exponent - range);  // only zeros always do
    const float up = __int_as_float((283 - exponent) << 23);  // the largest is below 2^30
    const float power = __int_as_float((exponent - 5) << 23);
    int integers[8];
    uint32_t digits[8];
#pragma unroll
    for (int j = 0; j < 8; j++) integers[j] = __float2int_rz(valueOf(j) * up);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int integer = pairs && j % 2 == 1 ? (integers[j] >> 4) - integers[j - 1] : integers[j];
      digits[j] = (static_cast<uint32_t>(integer) + 0x00808080u) ^ 0x00808080u;
    }
    const auto place = [](int i) { return Codes::bits == 4 ? i % 4 * 2 + i / 4 : i; };  // of nibbles, even ones come first
    uint32_t halves[2][4];
    transposeBytes({digits[place(0)], digits[place(1)], digits[place(2)], digits[place(3)]}, halves[0]);
    transposeBytes({digits[place(4)], digits[place(5)], digits[place(6)], digits[place(7)]}, halves[1]);
    const bool whole = allOfChunk<Codes>(fits);

    int sums[kDigits] = {0, 0, 0, 0};  // of a unit's elements, in digits that are below 2^15 and need not be bytes
    float sum = 0.0f;
    if constexpr (sumsX) {
      if constexpr (pairs) {
        int low = 0, high = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) low += integers[j] & 0xffff, high += integers[j] >> 16;
        low = overUnit(low), high = overUnit(high) + (low >> 16);
        sums[0] = low & 255, sums[1] = low >> 8 & 255, sums[2] = high & 255, sums[3] = high >> 8;
      } else {
#pragma unroll
        for (int j = 0; j < kDigits; j++)
          for (const auto& half : halves) sums[j] = __dp4a(static_cast<int>(half[j]), 0x01010101, sums[j]);
        const int low = overUnit(sums[0] + (sums[1] << 16)), high = overUnit(sums[2] + (sums[3] << 16));
        sums[0] = static_cast<int16_t>(low), sums[1] = (low - sums[0]) >> 16;
        sums[2] = static_cast<int16_t>(high), sums[3] = (high - sums[2]) >> 16;
      }
      sum = fmaf(static_cast<float>(sums[3] * 256 + sums[2]), 65536.0f, static_cast<float>(sums[1] * 256 + sums[0])) * (power * 0x1p-24f);
      if (!whole) {
        float stored = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) stored += valueOf(j);
#pragma unroll
        for (int apart = octetsOfUnit / 2; apart > 0; apart /= 2) stored += __shfl_xor_sync(lanesOfChunk<Codes>(), stored, apart);
        sum = stored;
      }
    }
    if (!mine) return;
    if (whole) {
#pragma unroll
      for (int j = 0; j < kDigits; j++) {
        uint8_t* column = target + inChunk / (block / 8) * (block * kDigits) + j * block;
        if constexpr (pairs) {
          // The first elements of two octets side by side, and behind them the second ones, as products take them.
          uint32_t* of = reinterpret_cast<uint32_t*>(column + inChunk % (block / 8) / 2 * 16 + inChunk % 2 * 4);
          of[0] = halves[0][j], of[2] = halves[1][j];
        } else {
          *reinterpret_cast<uint2*>(column + inChunk % (block / 8) * 8) = make_uint2(halves[0][j], halves[1][j]);
        }
      }
    } else {
      const auto pair = [&](int i) {
        return __byte_perm(__float_as_uint(valueOf(Codes::first(i))), __float_as_uint(valueOf(Codes::first(i) + Codes::apart)), 0x7632);
      };
      *reinterpret_cast<uint4*>(target + inChunk * 16) = make_uint4(pair(0), pair(1), pair(2), pair(3));
    }
    if (inChunk % octetsOfUnit != 0) return;
    const int u = inChunk / octetsOfUnit;
    int* entry = reinterpret_cast<int*>(shared + at.sums) + chunk * ints;
    entry[powers + u] = __float_as_int(whole ? power : -1.0f);
    if constexpr (Mode::loads) {
#pragma unroll
      for (int j = 0; j < 8; j++) entry[u * 8 + j] = __float_as_int(static_cast<float>(sums[j / 4 * 2 + j % 2]));
      entry[wholes + u] = __float_as_int(sum);
    }
    if constexpr (Mode::floatZero) {
#pragma unroll
      for (int j = 0; j < 8; j++) entry[u * 8 + j] = kMagic - static_cast<int>(p.element.offset) * sums[j / 4 * 2 + j % 2];
      uint32_t part[3];
      splitBf16(sum, part);
      unsigned short* parts = reinterpret_cast<unsigned short*>(shared + at.parts + chunk * kPartBytes) + u;
#pragma unroll
      for (int j = 0; j < 3; j++) parts[j * 8] = static_cast<unsigned short>(part[j]);
    }
  }

  float total[4], zeros[4];  // of the columns 2t, 2t + 1, for rows lane / 4 and 8 rows on; with loaded scales, `zeros` of a row is whole

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < 4; c++) total[c] = zeros[c] = 0.0f;
  }
  __device__ __forceinline__ void promote(const float (&scale)[2], float power, const float (&sum)[4]) {
#pragma unroll
    for (int c = 0; c < 4; c++) total[c] = fmaf(scale[c / 2] * power, sum[c], total[c]);
  }
  /** A chunk of x whose `codes` begin at row lane / 4 of the weights. `scales`: `scale(r, u)` and `zero(r, u)` of a row's units. */
  template <class Scales>
  __device__ __forceinline__ void add(const SkinnyParams& p, const uint8_t* shared, const SkinnyShared& at, const uint8_t* codes, int chunk,
                                      const Scales& scales, int lane) {
    const int g = lane / 4, t = lane % 4;
    const uint8_t* x = shared + at.x + chunk * bytes;
    const int* of = reinterpret_cast<const int*>(shared + at.sums) + chunk * ints;
    const uint32_t flip = Codes::flipOf(p.element);
    float power[(units + 3) / 4 * 4];
    if constexpr (units == 1) {
      power[0] = __int_as_float(of[powers]);
    } else {
#pragma unroll
      for (int u = 0; u < units; u += 4) {
        const float4 four = *reinterpret_cast<const float4*>(of + powers + u);
        power[u] = four.x, power[u + 1] = four.y, power[u + 2] = four.z, power[u + 3] = four.w;
      }
    }
    const auto zerosOf = [&](int u, float (&zero)[2]) {
      if constexpr (Mode::loads) {
        zero[0] = scales.zero(0, u), zero[1] = scales.zero(1, u);
        if (!p.floatZero) return;
        const float ofX = __int_as_float(of[wholes + u]);
        zeros[0] = fmaf(zero[0], ofX, zeros[0]), zeros[2] = fmaf(zero[1], ofX, zeros[2]);
      }
    };
    if (power[0] > 0.0f) {
#pragma unroll
      for (int u = 0; u < units; u++) {
        float zero[2] = {0.0f, 0.0f}, sum[4];
        zerosOf(u, zero);
        sumWhole(p, x, of + u * 8, codes, flip, u, zero, g, t, sum);
        promote({scales.scale(0, u), scales.scale(1, u)}, power[u], sum);
      }
    } else {
#pragma unroll
      for (int u = 0; u < units; u++) {
        float zero[2] = {0.0f, 0.0f}, sum[4];
        zerosOf(u, zero);
        sumStored(p, x, codes, u, zero, g, t, sum);
        promote({scales.scale(0, u), scales.scale(1, u)}, 1.0f, sum);
      }
    }
    if constexpr (Mode::floatZero) {
      // Zero points times sums of x, whose parts are the columns.
      const bool has = t * 2 < units;
      const uint32_t b =
          has ? *reinterpret_cast<const uint32_t*>(shared + at.parts + chunk * kPartBytes + min(g, 2) * 16 + t * 4) : 0u;
      multiply16x8x16(zeros, {has ? scales.zeroWord(0, t, units) : 0u, has ? scales.zeroWord(1, t, units) : 0u, 0u, 0u}, b, 0u);
    }
  }
  /** The sums of a unit: what the columns' sums begin with, or sums of x, are at `of`. */
  __device__ __forceinline__ static void sumWhole(const SkinnyParams& p, const uint8_t* x, const int* of, const uint8_t* codes, uint32_t flip,
                                                  int u, const float (&zero)[2], int g, int t, float (&sum)[4]) {
    int exact[4] = {kMagic, kMagic, kMagic, kMagic};
    if constexpr (Mode::floatZero) {
      const int4 first = *reinterpret_cast<const int4*>(of + t % 2 * 4);
      exact[0] = first.x, exact[1] = first.y, exact[2] = first.z, exact[3] = first.w;
    }
#pragma unroll
    for (int k = u * unit; k < (u + 1) * unit; k += block) {
      const uint8_t* from = codes + k * Codes::bits / 8 + t * (block * Codes::bits / 32);
      const uint8_t* columns = x + k * kDigits + g % kDigits * block + t * (block / 4);
      if constexpr (pairs) {
        const uint2 low = *reinterpret_cast<const uint2*>(from), high = *reinterpret_cast<const uint2*>(from + 8 * C::pitch);
        const uint4 b = *reinterpret_cast<const uint4*>(columns);
        multiplyUnsigned16x8x32(exact, {low.x, high.x, low.y, high.y}, b.x, b.y);
        multiplyUnsigned16x8x32(exact, {low.x & kUpper, high.x & kUpper, low.y & kUpper, high.y & kUpper}, b.z, b.w);
      } else if constexpr (block == 64) {
        uint32_t low[4], high[4];
        Codes::bytes(from, flip, low);
        Codes::bytes(from + 8 * C::pitch, flip, high);
        multiplyBytes16x8x64(exact, low, high, *reinterpret_cast<const uint4*>(columns));
      } else {
        uint32_t low[2], high[2];
        Codes::bytes(from, flip, low);
        Codes::bytes(from + 8 * C::pitch, flip, high);
        const uint2 b = *reinterpret_cast<const uint2*>(columns);
        multiplyBytes16x8x32(exact, {low[0], high[0], low[1], high[1]}, b.x, b.y);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) sum[c] = __int_as_float(exact[c]) - __int_as_float(kMagic);
    if constexpr (Mode::loads) {
      // Whole numbers below 2^24.
      const float4 ofX = *reinterpret_cast<const float4*>(of + t % 2 * 4);
      const float offset = Codes::offsetOf(p.element);
      const float more[2] = {offset + (p.element.zeros ? zero[0] : 0.0f), offset + (p.element.zeros ? zero[1] : 0.0f)};
      sum[0] = fmaf(-more[0], ofX.x, sum[0]), sum[1] = fmaf(-more[0], ofX.y, sum[1]);
      sum[2] = fmaf(-more[1], ofX.z, sum[2]), sum[3] = fmaf(-more[1], ofX.w, sum[3]);
    }
  }
  /** The same of a chunk that stayed bf16: x is the column of the highest digit. */
  __device__ __forceinline__ static void sumStored(const SkinnyParams& p, const uint8_t* x, const uint8_t* codes, int u, const float (&zero)[2],
                                                   int g, int t, float (&sum)[4]) {
    Element element = p.element;
    if constexpr (!Mode::loads) element.zeros = false;
    sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    multiplySegments<Codes>(element, zero, codes, x, u * (unit / 32), (u + 1) * (unit / 32), g == kDigits - 1, t, sum);
  }
  /** Copies what a tile ends with for the finishers. */
  __device__ __forceinline__ void store(float* sheet, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float y = fmaf(total[2 * h], 0x1p-8f, total[2 * h + 1]);
      if (t == 0) y = y * 0x1p-16f + zeros[2 * h + 1];
      if (t < (Mode::loads ? 1 : 2)) y += zeros[2 * h];
      y += __shfl_xor_sync(~0u, y, 1);
      if (t == 0) sheet[g + 8 * h] = y;
    }
  }
};

/** Scales and zero points that came with the weights. */
template <class Codes, class Mode>
struct FetchedScales : ChunkScales<Codes, Mode> {
  using Base = ChunkScales<Codes, Mode>;
  __device__ __forceinline__ float scale(int r, int u) const {
    if constexpr (Mode::scaled) return Base::scaleOf(r, u);
    return 1.0f;
  }
  /** Zero points of units 2t and 2t + 1. */
  __device__ __forceinline__ uint32_t zeroWord(int r, int t, int units) const { return t == 0 ? Base::zero[r][0] : Base::zero[r][units / 2 - 1]; }
};
/** Those that lanes load by themselves. */
struct LoadedScales {
  const SkinnyParams& p;
  const AnyScales& codes;
  int lane;
  __device__ __forceinline__ float scale(int r, int u) const {
    return p.promote == Promote::scaled ? AnyScales::of(codes.scale[r], p.weights[0].scale.codec, u, lane) : 1.0f;
  }
  __device__ __forceinline__ float zero(int r, int u) const {
    return p.weights[0].zero.codec == ScaleCodec::none ? 0.0f : AnyScales::of(codes.zero[r], p.weights[0].zero.codec, u, lane);
  }
};

/** Multiplies in whole numbers. */
template <class Codes, class Mode>
__device__ __forceinline__ void multiplyDigits(const Worker<Codes, Mode>& worker, int m0) {
  using C = ChunkOf<Codes>;
  const SkinnyParams& p = worker.p;
  const Walk<Codes>& walk = worker.walk;
  const int lane = worker.lane, warp = worker.warp;
  Digits<Codes, Mode>::stage(p, worker.shared, worker.at, walk, warp, m0);
  Digits<Codes, Mode> of;
  const auto begin = [&] { of.clear(); };
  const auto store = [&](float* sheet) { of.store(sheet, lane); };
  if constexpr (Mode::loads) {
    constexpr int units = Digits<Codes, Mode>::units;
    AnyScales next;
    const auto load = [&](int tile, int chunk) {
      if (tile < walk.tiles) next.load(p, walk.perTile, units, tile, walk.begin + chunk * C::k, lane);
    };
    load(blockIdx.x, warp);
    worker.walkTiles(
        begin,
        [&](int tile, int chunk, int, const uint8_t* codes) {
          // The next chunk's scales are asked for before this one's are used.
          const AnyScales scales = next;
          const bool more = chunk + kWorkers < walk.chunks;
          load(more ? tile : tile + gridDim.x, more ? chunk + kWorkers : warp);
          if (chunk < walk.chunks)
            of.add(p, worker.shared, worker.at, codes + lane / 4 * C::pitch, chunk, LoadedScales{p, scales, lane}, lane);
        },
        store);
  } else {
    worker.walkTiles(
        begin,
        [&](int, int chunk, int slot, const uint8_t* codes) {
          if (chunk >= walk.chunks) return;
          FetchedScales<Codes, Mode> scales;
          if constexpr (Mode::scaleBytes > 0) scales.load(p, worker.shared, worker.at, slot, lane / 4, walk.begin / C::k + chunk);
          of.add(p, worker.shared, worker.at, codes + lane / 4 * C::pitch, chunk, scales, lane);
        },
        store);
  }
}

}  // namespace fewbit::linear
