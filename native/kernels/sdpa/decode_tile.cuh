// What a warp does with a tile of keys: scores, softmax and the weighted sum of values on the matrix unit. Queries and probabilities are
// three bf16 parts each, which is float32 itself, against codes that are exact in bf16 or are split, too.
#pragma once
#include "decode_shape.cuh"

namespace fewbit::sdpa {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/** d[16 x 8] += a[16 x 16] b[16 x 8]. */
__device__ __forceinline__ void product(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/** Loads `Words` words of shared memory, 4, 2 or 1. */
template <int Words>
__device__ __forceinline__ void words(uint32_t* to, const uint8_t* from) {
  if constexpr (Words == 4) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  else if constexpr (Words == 2) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
  else *to = *reinterpret_cast<const uint32_t*>(from);
}

/**
 * A warp at work on `Rows` query rows of a KV head; `Shape` says where its tiles lie. The matrix unit has 16 rows: with 8, second parts are
 * the other rows and third parts a product of their own; with 4, second parts are rows 4 to 7 and third parts rows 8 to 11. Lane 4g + t
 * holds row g of queries and of the output.
 */
template <class C, int Size, int Rows, class Shape>
struct Worker {
  using R = Row<C, Size>;
  static constexpr int kTile = Shape::kKeys, kHalves = kTile / 8;
  static constexpr int kSteps = Size / 16;   // matrix products along a head
  static constexpr int kBlocks = Size / 8;   // columns of results, eight at a time
  static constexpr int kKeyWords = Size * C::kBits / 128, kValueWords = Size * C::kBits / 256;
  static constexpr int kKeyChunk = kKeyWords < 4 ? kKeyWords : 4, kValueChunk = kValueWords < 4 ? kValueWords : 4;
  static constexpr int kPerWord = 32 / C::kBits;
  static constexpr bool kFour = Rows == 4;

  uint32_t q[kSteps][kFour ? 4 : 6];
  float o[kBlocks][4];
  float top = -INFINITY, sum = 0.f;
  uint32_t nans = 0;  // columns of values, of this thread's eight, that hold a NaN
  int from, to;
  const float* mask;

  /** Chunk j of the keys that a thread loads lies at this byte of its block of 128 bytes, j / 2. */
  static __device__ __forceinline__ int keyByte(int j, int t4) {
    return kKeyWords >= 8 ? (2 * t4 + (j & 1)) * 16 : t4 * kKeyChunk * 4;
  }
  /** Element i of a thread's part of a key, as an element of the head. */
  static __device__ __forceinline__ int keyElement(int i, int t4) {
    constexpr int kChunk = kKeyChunk * kPerWord;
    const int j = i / kChunk;
    return (j / 2 * 1024 + keyByte(j, t4) * 8) / C::kBits + i % kChunk;
  }

  /** Loads the queries of a block of rows. */
  __device__ __forceinline__ Worker(const Params& p, const Seen& seen, int plane, int block) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    const int b = plane / p.kvHeads, h = plane % p.kvHeads;
    const int row = min(block * Rows + g % Rows, seen.tokens * p.group - 1), token = row / p.group, head = h * p.group + row % p.group;
    const int64_t at = p.tokenMajor ? token * p.queryStride + p.queryColumn + static_cast<int64_t>(head) * Size
                                    : ((static_cast<int64_t>(b) * p.heads + head) * seen.tokens + token) * Size;
    /** Four neighbouring elements. */
    auto load = [&](float* x, int element) {
      const int64_t d = at + element;
      if (p.queryBits == 16) {
        const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.q) + d);
        x[0] = lowBf16(pairs.x), x[1] = highBf16(pairs.x), x[2] = lowBf16(pairs.y), x[3] = highBf16(pairs.y);
      } else if (p.queryBits == 8) {
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(p.q) + d);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = fromE4m3(static_cast<uint8_t>(codes >> 8 * i)) * p.queryScales[at / Size];
      } else {
        *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(static_cast<const float*>(p.q) + d);
      }
    };
    auto give = [&](int s, int half, float low, float high) {
      uint32_t parts[3];
      split(low, high, parts);
      q[s][2 * half] = kFour && g >= 4 ? parts[1] : parts[0];
      q[s][2 * half + 1] = !kFour ? parts[1] : g < 4 ? parts[2] : 0u;
      if constexpr (!kFour) q[s][4 + half] = parts[2];
    };
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {
      alignas(16) float x[8];
      if constexpr (R::kGrouped) {
        // A product of the matrix unit takes elements of one group: pairs {0, 4}, {1, 5}, {2, 6}, {3, 7} of eight that are one word.
        load(x, s * 16 + t4 * 8);
        load(x + 4, s * 16 + t4 * 8 + 4);
#pragma unroll
        for (int i = 0; i < 4; i++) give(s + i / 2, i % 2, x[i], x[i + 4]);
      } else {
        load(x, keyElement(4 * s, t4));
        load(x + 4, keyElement(4 * s + 4, t4));
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* four = x + i / 2 * 4;
          give(s + i / 2, i % 2, four[C::kAlternate ? i % 2 : i % 2 * 2], four[C::kAlternate ? i % 2 + 2 : i % 2 * 2 + 1]);
        }
      }
    }
    from = seen.from(token);
    to = seen.to(token);
    const int64_t plain = static_cast<int64_t>(p.maskBatch ? b : 0) * (p.maskHeads ? p.heads : 1) + (p.maskHeads ? head : 0);
    mask = p.mask == nullptr ? nullptr : p.mask + (plain * seen.tokens + token) * seen.capacity;
#pragma unroll
    for (int n = 0; n < kBlocks; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
  }

  /** Takes a tile: rows from `row` of a stage, which are the keys from `key0`. `await` returns when the values are there. */
  template <class Await>
  __device__ __forceinline__ void take(const Params& p, const Stage& stage, int row, int key0, Await await) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    // Of groups: a key's scales, two in a word, and its zero points.
    constexpr int kGroups = R::kGroups;
    auto scalesOf = [&](const uint8_t* scales, int key, uint32_t (&to)[(kGroups + 1) / 2]) {
      words<(kGroups + 1) / 2>(to, scales + (row + key) * R::kScales);
    };
    auto groupScale = [&](const uint32_t (&of)[(kGroups + 1) / 2], int group) {
      return group % 2 == 0 ? lowBf16(of[group / 2]) : highBf16(of[group / 2]);
    };
    auto zerosOf = [&](const uint8_t* zeros, int key) -> uint32_t {
      const uint8_t* at = zeros + (row + key) * R::kZeros;
      if constexpr (R::kZeros == 4) return *reinterpret_cast<const uint32_t*>(at);
      else return *reinterpret_cast<const uint16_t*>(at);
    };
    auto scaleOf = [&](const uint8_t* scales, int key) {
      if constexpr (R::kScales == 4 && !R::kGrouped) return reinterpret_cast<const float*>(scales)[row + key];
      else return 1.f;
    };

    // Scores of keys 2 t4 + {0, 1} of every eight, for row g.
    float s[kHalves][2];
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
      if constexpr (R::kGrouped) {
        s[half][0] = s[half][1] = 0.f;
        uint32_t scales[2][(kGroups + 1) / 2];
        scalesOf(stage.keyScales, half * 8 + 2 * t4, scales[0]);
        scalesOf(stage.keyScales, half * 8 + 2 * t4 + 1, scales[1]);
        const uint32_t zeros = zerosOf(stage.keyZeros, half * 8 + g);
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
          uint32_t k[1];
          words<1>(k, stage.keys + Shape::KeyPlace::at(row + half * 8 + g, 0, group * 16 + t4 * 4));
          const uint32_t zero = zeros >> 8 * group & 0xff, minus = C::minus(zero, zero);
          float d[4] = {};
#pragma unroll
          for (int m = 0; m < 2; m++) {
            const int n = 2 * group + m;
            const uint32_t b0 = C::pairOf(k[0], 2 * m, minus), b1 = C::pairOf(k[0], 2 * m + 1, minus);
            if constexpr (!kFour) product(d, q[n][4], 0u, q[n][5], 0u, b0, b1);
            product(d, q[n][0], q[n][1], q[n][2], q[n][3], b0, b1);
          }
#pragma unroll
          for (int e = 0; e < 2; e++) s[half][e] = fmaf(d[e] + d[e + 2], groupScale(scales[e], group), s[half][e]);
        }
      } else {
        alignas(16) uint32_t k[kKeyWords];
#pragma unroll
        for (int j = 0; j < kKeyWords / kKeyChunk; j++)
          words<kKeyChunk>(k + j * kKeyChunk, stage.keys + Shape::KeyPlace::at(row + half * 8 + g, j / 2, keyByte(j, t4)));
        // Two sums each, so that a product need not wait for the one before it.
        float d[2][4] = {};
#pragma unroll
        for (int n = 0; n < kSteps; n++) {
          uint32_t b0[C::kParts], b1[C::kParts];
          C::four(k, n, b0, b1);
          if constexpr (!kFour) product(d[0], q[n][4], 0u, q[n][5], 0u, b0[0], b1[0]);
#pragma unroll
          for (int part = C::kParts - 1; part >= 0; part--)
            product(d[kFour ? n & 1 : 1], q[n][0], q[n][1], q[n][2], q[n][3], b0[part], b1[part]);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) s[half][e] = (d[0][e] + d[1][e]) + (d[0][e + 2] + d[1][e + 2]);
        if constexpr (C::kNan) {
          bool found = false;
#pragma unroll
          for (int i = 0; i < kKeyWords; i++) found |= C::nan(k[i]);
          // Four lanes hold a key; its score is this thread's if the key is 2 t4 or the next.
          const uint32_t lanes = __ballot_sync(~0u, found);
          if (lanes >> 8 * t4 & 0x0fu) s[half][0] = NAN;
          if (lanes >> 8 * t4 & 0xf0u) s[half][1] = NAN;
        }
      }
    }
    // What few graphs ask for is branched around as a whole, so that it costs the others nothing.
    auto eachScore = [&](auto change) {
#pragma unroll
      for (int half = 0; half < kHalves; half++)
#pragma unroll
        for (int e = 0; e < 2; e++) change(s[half][e], 8 * half + 2 * t4 + e);
    };
    eachScore([&](float& x, int key) {
      if constexpr (kFour) x += __shfl_xor_sync(~0u, x, 16);
      x *= p.scale * scaleOf(stage.keyScales, key);
    });
    if (p.softcap != 0.f)
      eachScore([&](float& x, int) {
        const float a = fminf(fabsf(x) / p.softcap, 15.f);
        x = copysignf(p.softcap * (1.f - 2.f / (expf(2.f * a) + 1.f)), x);
      });
    float highest = -INFINITY;
    if (key0 < from || key0 + kTile > to)
      eachScore([&](float& x, int key) {
        key += key0;
        if (key < from || key >= to) x = -INFINITY;
      });
    if (mask != nullptr)
      eachScore([&](float& x, int key) {
        key += key0;
        if (key < from || key >= to) return;
        const float added = mask[key];
        x = added <= -0x1p100f ? -INFINITY : x + added;
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
    if (p.round != 0.f)
      eachScore([&](float& x, int) { x = fromE4m3(__nv_cvt_float_to_fp8(x * p.round, __NV_SATFINITE, __NV_E4M3)) / p.round; });
    await();
    eachScore([&](float& x, int key) { x *= scaleOf(stage.valueScales, key); });
    /** Probabilities of both eights of 16 keys as the matrix unit takes them. */
    auto weights = [&](float a0, float a1, float b0, float b1, uint32_t (&w)[2][3]) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t parts[3];
        split(i == 0 ? a0 : b0, i == 0 ? a1 : b1, parts);
        w[i][0] = kFour && g >= 4 ? parts[1] : parts[0];
        w[i][1] = !kFour ? parts[1] : g < 4 ? parts[2] : 0u;
        w[i][2] = parts[2];
      }
    };
#pragma unroll
    for (int pair = 0; pair < kHalves / 2; pair++) {
      // Values of keys 2 t4 + {0, 1} of both eights.
      auto keyOf = [&](int i) { return 16 * pair + 2 * t4 + (i & 1) + 8 * (i >> 1); };
      uint32_t w[2][3];
      if constexpr (R::kGrouped) {
        uint32_t scales[4][(kGroups + 1) / 2], zeros[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          scalesOf(stage.valueScales, keyOf(i), scales[i]);
          zeros[i] = zerosOf(stage.valueZeros, keyOf(i));
        }
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
          // A product takes columns of one group, whose scales join the probabilities; a thread has four of every 32 columns.
          weights(s[2 * pair][0] * groupScale(scales[0], group), s[2 * pair][1] * groupScale(scales[1], group),
                  s[2 * pair + 1][0] * groupScale(scales[2], group), s[2 * pair + 1][1] * groupScale(scales[3], group), w);
          uint32_t codes[4];
#pragma unroll
          for (int i = 0; i < 4; i++)
            codes[i] = *reinterpret_cast<const uint16_t*>(stage.values + Shape::ValuePlace::at(row + keyOf(i), 0, group * 16 + g * 2));
          const uint32_t low = __byte_perm(codes[0], codes[1], 0x5410), high = __byte_perm(codes[2], codes[3], 0x5410);
          const uint32_t minusLow = C::minus(zeros[0] >> 8 * group & 0xff, zeros[1] >> 8 * group & 0xff);
          const uint32_t minusHigh = C::minus(zeros[2] >> 8 * group & 0xff, zeros[3] >> 8 * group & 0xff);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int n = 4 * group + i;
            const uint32_t b0 = C::pairOf(low, i, minusLow), b1 = C::pairOf(high, i, minusHigh);
            if constexpr (!kFour) product(o[n], w[0][2], 0u, w[1][2], 0u, b0, b1);
            product(o[n], w[0][0], w[0][1], w[1][0], w[1][1], b0, b1);
          }
        }
      } else {
        weights(s[2 * pair][0], s[2 * pair][1], s[2 * pair + 1][0], s[2 * pair + 1][1], w);
        // Elements that lie side by side in memory go to one thread.
        alignas(16) uint32_t v[4][kValueWords];
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int j = 0; j < kValueWords / kValueChunk; j++)
            words<kValueChunk>(v[i] + j * kValueChunk, stage.values + Shape::ValuePlace::at(row + keyOf(i), j, g * kValueChunk * 4));
          if constexpr (C::kNan)
#pragma unroll
            for (int n = 0; n < kValueWords; n++)
              if (C::nan(v[i][n]))
                for (int byte = 0; byte < 4; byte++)
                  if ((v[i][n] >> 8 * byte & 0x7f) == 0x7f) nans |= 1u << (4 * n + byte);
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
    }
    __syncwarp();
  }

  /** Writes the warp's rows as lines, `Rows` of them: output relative to the greatest score, that score, and the sum. */
  __device__ __forceinline__ void finish(float* lines) {
    const int lane = threadIdx.x & 31, g = lane / 4, t4 = lane & 3;
    if constexpr (C::kNan) {
      nans |= __shfl_xor_sync(~0u, nans, 1);
      nans |= __shfl_xor_sync(~0u, nans, 2);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* line = lines + g % Rows * kLine<Size>;
    if (t4 == 0 && g < Rows) {
      line[Size] = top;
      line[Size + 1] = sum;
    }
    constexpr int kChunk = R::kGrouped ? 4 : kValueChunk * kPerWord;
#pragma unroll
    for (int n = 0; n < kBlocks; n++) {
      const int at = n / kChunk * 8 * kChunk + n % kChunk;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float x = o[n][e] + o[n][e + 2];
        if constexpr (kFour) x += __shfl_xor_sync(~0u, x, 16);
        if constexpr (C::kNan)
          if (__shfl_sync(~0u, nans, 4 * (2 * t4 + e)) >> n & 1) x = NAN;
        if (g < Rows) line[at + kChunk * (2 * t4 + e)] = x;
      }
    }
  }
};

}  // namespace
}  // namespace fewbit::sdpa
