// Decoding over caches whose elements or codes f16 holds. Queries and probabilities are two f16 parts each (22 bits): columns of the matrix
// unit, whose rows are keys or elements of a head. docs/numerics.md, "Attention on CUDA", says what this keeps.
#pragma once
#include <type_traits>

#include "decode_tile.cuh"
#include "halves.cuh"

namespace fewbit::sdpa {
namespace {

/**
 * A warp at work on `Rows` query rows of a KV head, four to a column block; `Shape` says where its tiles lie. Columns are 2 row + part, so
 * that lane 4g + t holds row t's scores of keys g (and g + 8), and row t's output for the elements `element(., g)`.
 */
template <class C, int Size, int Rows, class Shape>
struct HalvesWorker {
  using R = Row<C, Size>;
  static constexpr int kTile = Shape::kKeys, kSixteens = kTile / 16, kColumns = Rows / 4, kGroups = R::kGroups;
  static constexpr int kPer = 16 / C::kBits;                 // elements in 16 bits
  static constexpr int kChunks = R::kBytes / 16;             // of 16 bytes of a row
  static constexpr int kBlocks = Size / 16;                  // products along a head
  static constexpr bool kScaled = R::kScales > 0;

  uint32_t q[kColumns][kBlocks][2];
  float o[kColumns][kBlocks][4];
  float top[kColumns], sum[kColumns], scale[kColumns];
  int from[kColumns], to[kColumns];
  const float* mask[kColumns];
  /** Outputs are of values times `toHalves` of this. Without scales, the largest weight is 1. */
  int exponent = kScaled ? kLeastExponent : 127;

  /** Element i, of Size / 8, of a lane's output. */
  static __device__ __forceinline__ int element(int i, int g) { return i / kPer * 8 * kPer + g * kPer + i % kPer; }

  __device__ __forceinline__ HalvesWorker(const Params& p, const Seen& seen, int plane, int block) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      const QueryRow row(p, seen, plane, block * Rows + 4 * c + g / 2, Size);
      // A word of a key has 2 kPer elements.
      alignas(16) float x[kChunks][2 * kPer];
      float most = 0.f;
#pragma unroll
      for (int n = 0; n < kChunks; n++) {
        constexpr int kAtOnce = kPer == 1 ? 2 : 4;
#pragma unroll
        for (int i = 0; i < 2 * kPer; i += kAtOnce) row.load<kAtOnce>(x[n] + i, n * 8 * kPer + t4 * 2 * kPer + i);
#pragma unroll
        for (int i = 0; i < 2 * kPer; i++) most = fmaxf(most, fabsf(x[n][i]));
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const int size = max(__float_as_int(most) >> 23, kLeastExponent);
      const float by = toHalves(size);
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; i++) {
        const int at = i % kPer;
        float low = x[i / kPer][C::kAdjacent ? 2 * at : at] * by, high = x[i / kPer][C::kAdjacent ? 2 * at + 1 : at + kPer] * by;
        if (g & 1) low = secondPart(low), high = secondPart(high);
        q[c][i / 2][i % 2] = packF16(low, high);
      }
      scale[c] = p.scale * fromHalves(__shfl_sync(~0u, size, 8 * t4));
      const QueryRow mine(p, seen, plane, block * Rows + 4 * c + t4, Size);
      from[c] = mine.from;
      to[c] = mine.to;
      mask[c] = mine.mask;
      top[c] = -INFINITY;
      sum[c] = 0.f;
#pragma unroll
      for (int n = 0; n < kBlocks; n++) o[c][n][0] = o[c][n][1] = o[c][n][2] = o[c][n][3] = 0.f;
    }
  }

  /** Scales of a key's groups, two in a word, and its zero points. */
  static __device__ __forceinline__ void groupScales(float (&to)[kGroups], const uint8_t* scales, int key) {
    uint32_t pairs[(kGroups + 1) / 2];
    words<(kGroups + 1) / 2>(pairs, scales + key * R::kScales);
#pragma unroll
    for (int i = 0; i < kGroups; i++) to[i] = i % 2 == 0 ? lowBf16(pairs[i / 2]) : highBf16(pairs[i / 2]);
  }
  static __device__ __forceinline__ uint32_t groupZeros(const uint8_t* zeros, int key) {
    const uint8_t* at = zeros + key * R::kZeros;
    if constexpr (R::kZeros == 4) return *reinterpret_cast<const uint32_t*>(at);
    else return *reinterpret_cast<const uint16_t*>(at);
  }

  /** Scores or weights of a lane: of row t of every column block, by `keyOf(i, e)`. */
  using Weights = float[kColumns][kSixteens][2];
  static __device__ __forceinline__ int keyOf(int i, int e) { return 16 * i + 8 * e + (threadIdx.x & 31) / 4; }
  template <class Change>
  static __device__ __forceinline__ void each(Weights& x, Change change) {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
#pragma unroll
      for (int i = 0; i < kSixteens; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) change(x[c][i][e], c, i, e);
  }
  __device__ __forceinline__ bool sees(int c, int key) const { return key >= from[c] && key < to[c]; }

  /** Products of queries and keys. */
  __device__ __forceinline__ void dots(Weights& s, const Stage& stage, int row) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kSixteens; i++) {
      // Two sums each, so that a product need not wait for the one before it; of groups, one.
      float d[kColumns][2][4] = {}, sums[kColumns][4] = {};
      float scales[2][kGroups];
      uint32_t zeros[2];
      if constexpr (R::kGrouped) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          groupScales(scales[e], stage.keyScales, row + keyOf(i, e));
          zeros[e] = groupZeros(stage.keyZeros, row + keyOf(i, e));
        }
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        const int at = chunk + (lane >> 4);
        uint32_t w[4], k[2][2 * kPer];
        loadRows(w, stage.keys + Shape::KeyPlace::at(row + 16 * i + (lane & 15), at / 8, at % 8 * 16));
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            if constexpr (R::kGrouped) {
              const int group = chunk + n;
              C::codes(w[2 * n + e], __byte_perm(zeros[e], 0x64646464u, group | 4 << 4 | group << 8 | 4 << 12), k[e] + n * kPer);
            } else {
              C::keys(w[2 * n + e], k[e] + n * kPer);
            }
          }
#pragma unroll
        for (int n = 0; n < kPer; n++) {
          const int block = chunk / 2 * kPer + n;
#pragma unroll
          for (int c = 0; c < kColumns; c++) {
            float(&to)[4] = d[c][R::kGrouped ? n / (kPer / 2) : n & 1];
            productF16(to, k[0][2 * n], k[1][2 * n], k[0][2 * n + 1], k[1][2 * n + 1], q[c][block][0], q[c][block][1]);
          }
        }
        if constexpr (R::kGrouped) {
#pragma unroll
          for (int c = 0; c < kColumns; c++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) {
                sums[c][e] = fmaf(d[c][n][e], scales[e / 2][chunk + n], sums[c][e]);
                d[c][n][e] = 0.f;
              }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        if constexpr (!R::kGrouped) {
#pragma unroll
          for (int e = 0; e < 4; e++) sums[c][e] = d[c][0][e] + d[c][1][e];
        }
        for (int e = 0; e < 2; e++) s[c][i][e] = joined(sums[c][2 * e], sums[c][2 * e + 1]) * scale[c];
      }
    }
  }

  /** Takes a tile: rows from `row` of a stage, which are the keys from `key0`. `await` returns when the values are there. */
  template <class Await>
  __device__ __forceinline__ void take(const Params& p, const Stage& stage, int row, int key0, Await await) {
    Weights s;
    dots(s, stage, row);
    if constexpr (kScaled && !R::kGrouped)
      each(s, [&](float& x, int, int i, int e) { x *= reinterpret_cast<const float*>(stage.keyScales)[row + keyOf(i, e)]; });
    // What few graphs ask for is branched around as a whole, so that it costs the others nothing.
    if (p.softcap != 0.f) each(s, [&](float& x, int, int, int) { x = softCapped(x, p.softcap); });
    bool hides = false;
#pragma unroll
    for (int c = 0; c < kColumns; c++) hides |= key0 < from[c] || key0 + kTile > to[c];
    if (hides)
      each(s, [&](float& x, int c, int i, int e) {
        if (!sees(c, key0 + keyOf(i, e))) x = -INFINITY;
      });
    if (p.mask != nullptr)
      each(s, [&](float& x, int c, int i, int e) {
        const int key = key0 + keyOf(i, e);
        if (sees(c, key)) x = maskedScore(x, mask[c][key]);
      });
    float highest[kColumns];
    bool higher = false;
#pragma unroll
    for (int c = 0; c < kColumns; c++) highest[c] = -INFINITY;
    each(s, [&](float& x, int c, int, int) { highest[c] = fmaxf(highest[c], x); });
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) highest[c] = fmaxf(highest[c], __shfl_xor_sync(~0u, highest[c], lanes));
      higher |= highest[c] > top[c];
    }
    if (__any_sync(~0u, higher)) {
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        const float next = fmaxf(top[c], highest[c]);
        const float shrink = top[c] == next ? 1.f : exp2Fast((top[c] - next) * kLog2e);
        top[c] = next;
        sum[c] *= shrink;
        multiply(c, shrink);
      }
    }
    float base[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; c++) base[c] = top[c] == -INFINITY ? 0.f : top[c];
    each(s, [&](float& x, int c, int, int) {
      x = exp2Fast((x - base[c]) * kLog2e);
      sum[c] += x;
    });
    if (p.round != 0.f) each(s, [&](float& x, int, int, int) { x = rounded(x, p.round); });
    await();

    Weights w[kGroups];
    const bool whole = weigh(w, s, stage, row);
    if (__all_sync(~0u, whole)) {
      addValues<false>(stage, row, w, 1.f);
    } else {
#pragma unroll
      for (int group = 0; group < kGroups; group++)
        each(w[group], [&](float& x, int c, int i, int e) {
          // Not even 0 * NaN reaches rows that do not see a key.
          if (!sees(c, key0 + keyOf(i, e))) x = 0.f;
        });
      bool odd = false, more = true;
#pragma unroll 1
      for (float by = 1.f; more; by *= 1.f / kBand) {
        Weights band[kGroups];
        more = false;
#pragma unroll
        for (int group = 0; group < kGroups; group++)
          each(w[group], [&](float& x, int c, int i, int e) {
            const bool later = fabsf(x) < kLeastWeight;
            band[group][c][i][e] = later ? 0.f : x;
            x = later ? x * kBand : 0.f;
            more |= x != 0.f;
          });
        more = __any_sync(~0u, more);
        odd = addValues<true>(stage, row, band, by);
      }
      if constexpr (C::kOdd)
        if (odd) addOdd(stage, row, key0);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(int c, float by) {
#pragma unroll
    for (int n = 0; n < kBlocks; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[c][n][i] *= by;
  }

  /** Weights of values: probabilities times scales, times `toHalves(exponent)`. Whether all of this lane's keep their bits. */
  __device__ __forceinline__ bool weigh(Weights (&w)[kGroups], Weights& s, const Stage& stage, int row) {
    bool whole = true;
    if constexpr (!kScaled) {
      each(s, [&](float& x, int c, int i, int e) {
        const float y = x * toHalves(127);
        w[0][c][i][e] = y;
        whole &= y >= kLeastWeight;
      });
    } else {
      float scales[kSixteens][2][kGroups], most[kSixteens][2];
#pragma unroll
      for (int i = 0; i < kSixteens; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int key = row + keyOf(i, e);
          if constexpr (R::kGrouped) groupScales(scales[i][e], stage.valueScales, key);
          else scales[i][e][0] = reinterpret_cast<const float*>(stage.valueScales)[key];
          most[i][e] = 0.f;
#pragma unroll
          for (int group = 0; group < kGroups; group++) most[i][e] = fmaxf(most[i][e], fabsf(scales[i][e][group]));
        }
      uint32_t largest = 0;
      each(s, [&](float& x, int, int i, int e) { largest = max(largest, weightBits(x * most[i][e])); });
      largest = __reduce_max_sync(~0u, largest);
      const int next = static_cast<int>(largest >> 23);
      if (next > exponent) {
        const float by = power(max(127 + exponent - next, 0));
        exponent = next;
#pragma unroll
        for (int c = 0; c < kColumns; c++) multiply(c, by);
      }
      const float by = toHalves(exponent);
#pragma unroll
      for (int group = 0; group < kGroups; group++)
        each(s, [&](float& x, int c, int i, int e) {
          // In this order nothing is lost to underflow that the largest weight leaves room for.
          const float y = x * (scales[i][e][group] * by);
          w[group][c][i][e] = y;
          whole &= fabsf(y) >= kLeastWeight;
        });
    }
    return whole;
  }
  /** A weight's magnitude as an integer of the same order; zero where it is infinite or NaN, which no exponent makes better. */
  static __device__ __forceinline__ uint32_t weightBits(float x) { return isFinite(x) ? __float_as_uint(fabsf(x)) : 0u; }

  /**
   * o += weights times values, times `by` if careful. Careful, elements that are infinite or NaN are left out, and it is said whether there
   * are any in the tile.
   */
  template <bool Careful>
  __device__ __forceinline__ bool addValues(const Stage& stage, int row, const Weights (&w)[kGroups], float by) {
    const int lane = threadIdx.x & 31, t4 = lane & 3;
    bool odd = false;
#pragma unroll
    for (int i = 0; i < kSixteens; i++) {
      uint32_t b[kColumns][2], zeros[2][2];
      auto give = [&](int group) {
#pragma unroll
        for (int c = 0; c < kColumns; c++)
#pragma unroll
          for (int e = 0; e < 2; e++) b[c][e] = transposed(packF16(w[group][c][i][e], secondPart(w[group][c][i][e])));
      };
      if constexpr (R::kGrouped) {
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int n = 0; n < 2; n++) zeros[e][n] = groupZeros(stage.valueZeros, row + 16 * i + 8 * e + 2 * t4 + n);
      } else give(0);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        const int at = chunk + (lane >> 4);
        uint32_t words[4], v[2][2 * kPer];
        loadColumns(words, stage.values + Shape::ValuePlace::at(row + 16 * i + (lane & 15), at / 8, at % 8 * 16));
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            if constexpr (R::kGrouped) {
              const int group = chunk + n;
              const uint32_t both = masked(__byte_perm(zeros[e][0], zeros[e][1], group | (4 + group) << 8), 0x00ff00ffu, 0x64006400u);
              C::codes(words[2 * n + e], both, v[e] + n * kPer);
            } else {
              C::values(words[2 * n + e], v[e] + n * kPer);
            }
          }
        if constexpr (Careful && C::kOdd) {
#pragma unroll
          for (int n = 0; n < 2 * kPer; n++) odd |= dropOdd(v[0][n]) | dropOdd(v[1][n]);
        }
        for (int n = 0; n < kPer; n++) {
          const int block = chunk / 2 * kPer + n;
          if constexpr (R::kGrouped)
            if (n % (kPer / 2) == 0) give(chunk + n / (kPer / 2));
#pragma unroll
          for (int c = 0; c < kColumns; c++) {
            if constexpr (Careful) {
              float d[4] = {};
              productF16(d, v[0][2 * n], v[0][2 * n + 1], v[1][2 * n], v[1][2 * n + 1], b[c][0], b[c][1]);
#pragma unroll
              for (int e = 0; e < 4; e++) o[c][block][e] = fmaf(d[e], by, o[c][block][e]);
            } else {
              productF16(o[c][block], v[0][2 * n], v[0][2 * n + 1], v[1][2 * n], v[1][2 * n + 1], b[c][0], b[c][1]);
            }
          }
        }
      }
    }
    return C::kOdd && __any_sync(~0u, odd);
  }

  /** Makes elements of a pair that are infinite or NaN zero; whether there were any. */
  static __device__ __forceinline__ bool dropOdd(uint32_t& pair) {
    const uint32_t found = (pair & 0x7c007c00u) + 0x04000400u & 0x80008000u;
    pair &= ~((found >> 15) * 0xffffu);
    return found != 0;
  }

  /** Adds what `dropOdd` took out to the rows that see it. */
  __device__ __forceinline__ void addOdd(const Stage& stage, int row, int key0) {
    if constexpr (C::kOdd) {
      const int g = (threadIdx.x & 31) / 4;
#pragma unroll 1
      for (int key = 0; key < kTile; key++)
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; i++) {
          const int chunk = i / kPer;
          const uint8_t* at = stage.values + Shape::ValuePlace::at(row + key, chunk / 8, chunk % 8 * 16 + 2 * g);
          const float x = C::element(*reinterpret_cast<const uint16_t*>(at), i % kPer);
          if (isFinite(x)) continue;
#pragma unroll
          for (int c = 0; c < kColumns; c++)
            if (sees(c, key0 + key)) o[c][i / 2][i % 2 * 2] += x;
        }
    }
  }

  /** Writes the warp's rows as lines, `Rows` of them: output relative to the greatest score, that score, and the sum. */
  __device__ __forceinline__ void finish(float* lines) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    const float by = fromHalves(exponent);
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum[c] += __shfl_xor_sync(~0u, sum[c], lanes);
      float* line = lines + (4 * c + t4) * kLine<Size>;
      if (g == 0) {
        line[Size] = top[c];
        line[Size + 1] = sum[c];
      }
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; i++) {
        const float first = o[c][i / 2][i % 2 * 2], second = o[c][i / 2][i % 2 * 2 + 1];
        // An infinity times a second part of zero is NaN.
        line[element(i, g)] = (fabsf(first) == INFINITY ? first : joined(first, second)) * by;
      }
    }
  }
};

}  // namespace
}  // namespace fewbit::sdpa
