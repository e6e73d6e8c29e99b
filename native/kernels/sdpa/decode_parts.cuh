// Decoding over caches of bf16 and float32: queries and probabilities are three bf16 parts each, which is float32 itself, against elements
// that are bf16 or are split, too.
#pragma once
#include "decode_tile.cuh"

namespace fewbit::sdpa {
namespace {

/** d[16 x 8] += a[16 x 16] b[16 x 8]. */
__device__ __forceinline__ void product(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/**
 * A warp at work on `Rows` query rows of a KV head; `Shape` says where its tiles lie. The matrix unit has 16 rows: with 8, second parts are
 * the other rows and third parts a product of their own; with 4, second parts are rows 4 to 7 and third parts rows 8 to 11. Lane 4g + t
 * holds row g of queries and of the output.
 */
template <class C, int Size, int Rows, class Shape>
struct PartsWorker {
  static constexpr int kTile = Shape::kKeys, kHalves = kTile / 8;
  static constexpr int kSteps = Size / 16;   // matrix products along a head
  static constexpr int kBlocks = Size / 8;   // columns of results, eight at a time
  static constexpr int kKeyWords = Size * C::kBits / 128, kValueWords = Size * C::kBits / 256;
  static constexpr int kPerWord = 32 / C::kBits, kChunk = 4 * kPerWord;  // elements of 16 bytes
  static constexpr bool kFour = Rows == 4;

  uint32_t q[kSteps][kFour ? 4 : 6];
  float o[kBlocks][4];
  float top = -INFINITY, sum = 0.f;
  int from, to;
  const float* mask;

  /** Where 16 bytes j of a thread's part of a key start in their block of 128 bytes, j / 2. */
  static __device__ __forceinline__ int keyByte(int j, int t4) { return (2 * t4 + (j & 1)) * 16; }
  /** Element i of a thread's part of a key, as an element of the head. */
  static __device__ __forceinline__ int keyElement(int i, int t4) {
    const int j = i / kChunk;
    return (j / 2 * 1024 + keyByte(j, t4) * 8) / C::kBits + i % kChunk;
  }
  /** Result e of column block n, as an element of the head. */
  static __device__ __forceinline__ int column(int n, int e, int t4) {
    return n / kChunk * 8 * kChunk + n % kChunk + kChunk * (2 * t4 + e);
  }

  /** Loads the queries of a block of rows. */
  __device__ __forceinline__ PartsWorker(const Params& p, const Seen& seen, int plane, int block) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    const QueryRow row(p, seen, plane, block * Rows + g % Rows, Size);
    auto give = [&](int s, int half, float low, float high) {
      uint32_t parts[3];
      split(low, high, parts);
      q[s][2 * half] = kFour && g >= 4 ? parts[1] : parts[0];
      q[s][2 * half + 1] = !kFour ? parts[1] : g < 4 ? parts[2] : 0u;
      if constexpr (!kFour) q[s][4 + half] = parts[2];
    };
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      alignas(16) float x[4];
      row.load<4>(x, keyElement(4 * s, t4));
      give(s, 0, x[0], x[1]);
      give(s, 1, x[2], x[3]);
    }
    from = row.from;
    to = row.to;
    mask = row.mask;
#pragma unroll
    for (int n = 0; n < kBlocks; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
  }

  /** Takes a tile: rows from `row` of a stage, which are the keys from `key0`. `await` returns when the values are there. */
  template <class Await>
  __device__ __forceinline__ void take(const Params& p, const Stage& stage, int row, int key0, Await await) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    // Scores of keys 2 t4 + {0, 1} of every eight, for row g.
    float s[kHalves][2];
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
      alignas(16) uint32_t k[kKeyWords];
#pragma unroll
      for (int j = 0; j < kKeyWords / 4; j++)
        words<4>(k + j * 4, stage.keys + Shape::KeyPlace::at(row + half * 8 + g, j / 2, keyByte(j, t4)));
      // Two sums each, so that a product need not wait for the one before it.
      float d[2][4] = {};
#pragma unroll
      for (int n = 0; n < kSteps; n++) {
        uint32_t b0[C::kParts], b1[C::kParts];
        C::pair(k, k, 4 * n, 4 * n + 1, b0);
        C::pair(k, k, 4 * n + 2, 4 * n + 3, b1);
        if constexpr (!kFour) product(d[0], q[n][4], 0u, q[n][5], 0u, b0[0], b1[0]);
#pragma unroll
        for (int part = C::kParts - 1; part >= 0; part--)
          product(d[kFour ? n & 1 : 1], q[n][0], q[n][1], q[n][2], q[n][3], b0[part], b1[part]);
      }
#pragma unroll
      for (int e = 0; e < 2; e++) s[half][e] = (d[0][e] + d[1][e]) + (d[0][e + 2] + d[1][e + 2]);
    }
    // What few graphs ask for is branched around as a whole, so that it costs the others nothing.
    auto eachScore = [&](auto change) {
#pragma unroll
      for (int half = 0; half < kHalves; half++)
#pragma unroll
        for (int e = 0; e < 2; e++) change(s[half][e], key0 + 8 * half + 2 * t4 + e);
    };
    eachScore([&](float& x, int) {
      if constexpr (kFour) x += __shfl_xor_sync(~0u, x, 16);
      x *= p.scale;
    });
    if (p.softcap != 0.f) eachScore([&](float& x, int) { x = softCapped(x, p.softcap); });
    float highest = -INFINITY;
    const bool hides = __any_sync(~0u, key0 < from || key0 + kTile > to);
    if (hides)
      eachScore([&](float& x, int key) {
        if (key < from || key >= to) x = -INFINITY;
      });
    if (mask != nullptr)
      eachScore([&](float& x, int key) {
        if (key >= from && key < to) x = maskedScore(x, mask[key]);
      });
    eachScore([&](float& x, int) { highest = fmaxf(highest, x); });
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    if (__any_sync(~0u, highest > top)) {
      const float next = fmaxf(top, highest);
      const float shrink = top == next ? 1.f : exp2Fast((top - next) * kLog2e);
      top = next;
      sum *= shrink;
#pragma unroll
      for (int n = 0; n < kBlocks; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] *= shrink;
    }
    const float base = top == -INFINITY ? 0.f : top;
    eachScore([&](float& x, int) {
      x = exp2Fast((x - base) * kLog2e);
      sum += x;
    });
    if (p.round != 0.f) eachScore([&](float& x, int) { x = rounded(x, p.round); });
    await();
    if (hides) addValues<true>(stage, row, key0, s);
    else addValues<false>(stage, row, key0, s);
    __syncwarp();
  }

  /** o += probabilities times values. Hides: values of some keys must not reach some rows, not even as 0 * NaN. */
  template <bool Hides>
  __device__ __forceinline__ void addValues(const Stage& stage, int row, int key0, const float (&s)[kHalves][2]) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    bool odd = false;
#pragma unroll
    for (int pair = 0; pair < kHalves / 2; pair++) {
      // Values of keys 2 t4 + {0, 1} of both eights.
      auto keyOf = [&](int i) { return 16 * pair + 2 * t4 + (i & 1) + 8 * (i >> 1); };
      // Probabilities as the matrix unit takes them.
      uint32_t w[2][3];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t parts[3];
        split(s[2 * pair + i][0], s[2 * pair + i][1], parts);
        w[i][0] = kFour && g >= 4 ? parts[1] : parts[0];
        w[i][1] = !kFour ? parts[1] : g < 4 ? parts[2] : 0u;
        w[i][2] = parts[2];
      }
      // Elements that lie side by side in memory go to one thread.
      alignas(16) uint32_t v[4][kValueWords];
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < kValueWords / 4; j++)
          words<4>(v[i] + j * 4, stage.values + Shape::ValuePlace::at(row + keyOf(i), j, g * 16));
        if constexpr (Hides) {
#pragma unroll
          for (int n = 0; n < kValueWords; n++) odd |= dropOdd(v[i][n]);
        }
      }
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
        uint32_t b0[C::kParts], b1[C::kParts];
        C::pair(v[0], v[1], n, n, b0);
        C::pair(v[2], v[3], n, n, b1);
        if constexpr (!kFour) product(o[n], w[0][2], 0u, w[1][2], 0u, b0[0], b1[0]);
#pragma unroll
        for (int part = C::kParts - 1; part >= 0; part--)
          product(o[n], w[0][0], w[0][1], w[1][0], w[1][1], b0[part], b1[part]);
      }
    }
    if constexpr (Hides)
      if (__any_sync(~0u, odd)) addOdd(stage, row, key0);
  }

  /** Makes elements of a word that are infinite or NaN zero; whether there were any. */
  static __device__ __forceinline__ bool dropOdd(uint32_t& word) {
    const uint32_t before = word;
    if constexpr (C::kBits == 32) {
      if (!isFinite(__uint_as_float(word))) word = 0;
    } else {
      if (!isFinite(lowBf16(word))) word &= 0xffff0000u;
      if (!isFinite(highBf16(word))) word &= 0x0000ffffu;
    }
    return word != before;
  }

  /** Adds what `dropOdd` took out to the rows that see it. */
  __device__ __forceinline__ void addOdd(const Stage& stage, int row, int key0) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    if (g >= Rows) return;
#pragma unroll 1
    for (int key = max(from - key0, 0); key < min(to - key0, kTile); key++)
#pragma unroll
      for (int n = 0; n < kBlocks; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int byte = column(n, e, t4) * C::kBits / 8;
          const uint8_t* at = stage.values + Shape::ValuePlace::at(row + key, byte / 128, byte % 128);
          const float x = C::kBits == 32 ? *reinterpret_cast<const float*>(at) : lowBf16(*reinterpret_cast<const uint16_t*>(at));
          if (!isFinite(x)) o[n][e] += x;
        }
  }

  /** Writes the warp's rows as lines, `Rows` of them: output relative to the greatest score, that score, and the sum. */
  __device__ __forceinline__ void finish(float* lines) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* line = lines + g % Rows * kLine<Size>;
    if (t4 == 0 && g < Rows) {
      line[Size] = top;
      line[Size + 1] = sum;
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float x = o[n][e] + o[n][e + 2];
        if constexpr (kFour) x += __shfl_xor_sync(~0u, x, 16);
        if (g < Rows) line[column(n, e, t4)] = x;
      }
    }
  }
};

}  // namespace
}  // namespace fewbit::sdpa
