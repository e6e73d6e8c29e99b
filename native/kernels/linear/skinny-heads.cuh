// Outputs of one row that are heads: turned by their position (rope) and stored where attention reads them, the newest keys and values in
// their caches.
#pragma once
#include "operands.cuh"

namespace fewbit::linear {

/** Heads that follow each other in the outputs: queries, keys or values. */
struct HeadRows {
  int heads = 0;
  const float* angles = nullptr;  // [positions, half a head of cosines and of sines]; null: not turned
  int angleSymbol = 0;
  Rounding rounding = Rounding::none;  // `out` is float32, or codes of 16 bits
  void* out = nullptr;                 // [heads, size], or a cache [heads, keys, size]
  int cacheSymbol = -1;
  int64_t keys = 0;
};

/** All outputs of a linear: element i of a head and the one half a head further make a pair, whose rows of the weights share a tile. */
struct Heads {
  int shift = -1;  // log2 of half a head; -1: outputs are no heads
  HeadRows rows[3];

  /** Which heads, and which of them, output `n` of the first halves belongs to. */
  __device__ __forceinline__ int2 of(int n) const {
    int head = n >> shift, kind = 0;
    while (kind < 2 && head >= rows[kind].heads) head -= rows[kind++].heads;
    return make_int2(kind, head);
  }
  /** Cosine and sine of a pair. */
  __device__ __forceinline__ float2 angle(int n, const uint32_t* symbols) const {
    const HeadRows& to = rows[of(n).x];
    if (to.angles == nullptr) return make_float2(1.0f, 0.0f);
    const int half = 1 << shift;
    const float* at = to.angles + int64_t(symbols[to.angleSymbol]) * 2 * half + (n & (half - 1));
    return make_float2(__ldg(at), __ldg(at + half));
  }
  /** Products and their sum are rounded one by one, as the reference rounds them. */
  __device__ __forceinline__ void store(int n, float low, float high, float2 angle, const uint32_t* symbols) const {
    const int2 which = of(n);
    const HeadRows& to = rows[which.x];
    const int half = 1 << shift;
    if (to.angles != nullptr) {
      const float turned = __fsub_rn(__fmul_rn(low, angle.x), __fmul_rn(high, angle.y));
      high = __fadd_rn(__fmul_rn(high, angle.x), __fmul_rn(low, angle.y));
      low = turned;
    }
    const int64_t row = to.cacheSymbol < 0 ? which.y : which.y * to.keys + symbols[to.cacheSymbol];
    const int64_t at = row * 2 * half + (n & (half - 1));
    if (to.rounding == Rounding::none) {
      float* out = static_cast<float*>(to.out) + at;
      out[0] = low, out[half] = high;
    } else {
      unsigned short* out = static_cast<unsigned short*>(to.out) + at;
      out[0] = roundedCode(to.rounding, low), out[half] = roundedCode(to.rounding, high);
    }
  }
};

}  // namespace fewbit::linear
