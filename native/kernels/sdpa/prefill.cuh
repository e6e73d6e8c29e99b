// Attention over many query rows on Hopper's matrix units: one warpgroup copies keys and values, two compute 64 rows each and
// take turns, so that the softmax of one runs beside the products of the other (Shah et al., FlashAttention-3, 2024). This is what both
// kernels share; heads have 128 elements.
#pragma once
#include <cmath>
#include <cstring>

#include "fewbit/launch.hpp"
#include "hopper.cuh"

namespace fewbit {
namespace {

constexpr int kRows = 128, kKeys = 128, kSize = 128, kStages = 2, kThreads = 384;
/** Barriers of the two computing warpgroups: whose turn it is (1, 2), and both (3). */
constexpr int kTurn = 1, kBoth = 3;

struct Params {
  void* out;
  const uint32_t* symbols;
  Extent tokens;
  int keys, position;  // keys of a head; the symbol of the first query's position, or -1
  int heads, group, batch, causal, window, tokenMajor, rounds;  // rounds: out is bf16
  float scale;
  const float* sinks;
  // e4m3 throughout: one for each batch and KV head. Codes in bf16: of query rows, if any, and of keys, `padded` a plane.
  const float *qScale, *kScale, *vScale;
  int padded;
  // Queries that a block makes bf16 by itself: dense float32, or e4m3 codes; null where the copy unit brings them.
  const void* q;
  int64_t queryStride, queryColumn;  // of dense rows [T, ...]
};

/** Which keys the queries of a step see. */
struct Seen {
  int tokens, position, keys, causal, window;
  __device__ explicit Seen(const Params& p)
      : tokens(static_cast<int>(p.tokens.at(p.symbols))),
        position(p.position < 0 ? 0 : static_cast<int>(p.symbols[p.position])),
        keys(p.position < 0 ? p.keys : min(position + tokens, p.keys)),
        causal(p.causal),
        window(p.window) {}
  __device__ int from(int t) const { return window == 0 ? 0 : max(0, position + t - window + 1); }
  __device__ int to(int t) const {
    return causal ? min(position + t + 1, keys) : window == 0 ? keys : min(position + t + window, keys);
  }
};

#ifdef FEWBIT_HOPPER
using namespace hopper;

/** What a thread knows of the softmax of its two rows. */
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  /** Turns scores into weights exp2(scale (s - top) + shift); `shrink` is what earlier results are multiplied with. */
  __device__ __forceinline__ void step(float (&s)[64], float scale, float shift, float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float most[4] = {s[2 * r], s[2 * r + 1], s[4 + 2 * r], s[5 + 2 * r]};
#pragma unroll
      for (int j = 2; j < 16; j++) {
        most[(j & 1) * 2] = fmaxf(most[(j & 1) * 2], s[4 * j + 2 * r]);
        most[(j & 1) * 2 + 1] = fmaxf(most[(j & 1) * 2 + 1], s[4 * j + 2 * r + 1]);
      }
      float highest = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      const float next = fmaxf(top[r], highest);
      // While a row has seen no key, any finite top gives weights of zero.
      const float base = next == -INFINITY ? 0.f : next * scale;
      shrink[r] = exp2Fast(top[r] * scale - base);
      top[r] = next;
      float part[2] = {0.f, 0.f};
#pragma unroll
      for (int j = 0; j < 16; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[4 * j + 2 * r + e];
          x = exp2Fast(fmaf(x, scale, shift - base));
          part[e] += x;
        }
      }
      sum[r] = fmaf(sum[r], shrink[r], part[0] + part[1]);
    }
  }
};

/** Makes scores or weights of keys that the two rows of a thread do not see `none`; `column` is the thread's first key of a tile. */
__device__ __forceinline__ void hide(float (&s)[64], int column, const int (&from)[2], const int (&to)[2], float none) {
#pragma unroll
  for (int j = 0; j < 16; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = column + 8 * j + (i & 1);
      if (key < from[i >> 1] || key >= to[i >> 1]) s[4 * j + i] = none;
    }
  }
}

/** The tiles of keys that a block of query rows walks, last to first. */
struct Walk {
  int first, count;
  __device__ Walk(const Seen& seen, int row) {
    const int last = min(row + kRows, seen.tokens) - 1;
    first = seen.from(row) / kKeys;
    count = max((seen.to(last) + kKeys - 1) / kKeys - first, 0);
  }
  __device__ int key(int step) const { return (first + count - 1 - step) * kKeys; }
};

/** Whether any thread of the two computing warpgroups says so; they meet. */
__device__ __forceinline__ bool anyOfBoth(bool mine) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred mine, any;\nsetp.ne.u32 mine, %1, 0;\nbarrier.cta.red.or.pred any, %2, 256, mine;\nselp.u32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(mine)), "n"(kBoth)
      : "memory");
  return any != 0;
}

/**
 * Values of keys that only some rows see must not reach the others, not even as 0 * NaN. Of a tile with such keys, in shared memory, what is
 * infinite or NaN is added to the rows that see it and then taken out. `odd(word)` has all bits of such elements of a word; `element(n, d)`
 * is element d of key n of the tile. Both computing warpgroups come here.
 */
template <int Bytes, class Odd, class Element>
__device__ __forceinline__ void purge(uint8_t* tile, float (&o)[64], int key0, const int (&from)[2], const int (&to)[2], Odd odd,
                                      Element element) {
  auto* words = reinterpret_cast<uint4*>(tile);
  const int first = threadIdx.x - 128;
  bool found = false;
#pragma unroll
  for (int i = first; i < Bytes / 16; i += 256) {
    const uint4 w = words[i];
    found |= (odd(w.x) | odd(w.y) | odd(w.z) | odd(w.w)) != 0;
  }
  if (!anyOfBoth(found)) return;
  // Few instructions rather than few steps: this is seldom run, and lies within the loop over tiles.
#pragma unroll 1
  for (int n = 0; n < kKeys; n++) {
    const int key = key0 + n;
#pragma unroll 1
    for (int d = 0; d < kSize; d++) {
      const float x = element(n, d);
      if (fabsf(x) < INFINITY) continue;
      const float low = key >= from[0] && key < to[0] ? x : 0.f, high = key >= from[1] && key < to[1] ? x : 0.f;
      const int at = d - (threadIdx.x & 3) * 2;
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (at == i / 4 * 8 + (i & 1)) o[i] += i & 2 ? high : low;
    }
  }
  turnWait(kBoth, 256);
#pragma unroll 1
  for (int i = first; i < Bytes / 16; i += 256) {
    uint4 w = words[i];
    w.x &= ~odd(w.x);
    w.y &= ~odd(w.y);
    w.z &= ~odd(w.z);
    w.w &= ~odd(w.w);
    words[i] = w;
  }
  fenceShared();
  turnWait(kBoth, 256);
}

/** Where a warpgroup's results go. */
__device__ __forceinline__ void store(const Params& p, const Seen& seen, const float (&o)[64], Softmax& softmax, float shift,
                                      float scale, int row, int head, int b) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = softmax.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (p.sinks != nullptr) {
      const float base = softmax.top[r] == -INFINITY ? 0.f : softmax.top[r] * p.scale;
      sum += exp2Fast(fmaf(p.sinks[head], 1.4426950408889634f, shift - base));
    }
    const float factor = sum > 0.f || sum != sum ? scale / sum : 0.f;
    const int t = row + 8 * r;
    if (t >= seen.tokens) continue;
    const int64_t at = p.tokenMajor ? static_cast<int64_t>(t) * p.heads + head
                                    : (static_cast<int64_t>(b) * p.heads + head) * seen.tokens + t;
    const int64_t first = at * kSize + 2 * (lane & 3);
    if (p.rounds) {
      auto* out = static_cast<__nv_bfloat16*>(p.out) + first;
#pragma unroll
      for (int j = 0; j < 16; j++)
        *reinterpret_cast<uint32_t*>(out + 8 * j) = packBf16(o[4 * j + 2 * r] * factor, o[4 * j + 2 * r + 1] * factor);
    } else {
      float* out = static_cast<float*>(p.out) + first;
#pragma unroll
      for (int j = 0; j < 16; j++)
        *reinterpret_cast<float2*>(out + 8 * j) = make_float2(o[4 * j + 2 * r] * factor, o[4 * j + 2 * r + 1] * factor);
    }
  }
}
#endif

// Args of both entries.
enum Arg { kHeads, kKvHeads, kBatch, kScale, kCausal, kWindow, kTokens, kTokensSymbol, kKeyCount, kPosition, kTokenMajor, kSinks, kRounds, kEnd };

Params params(const Launch& launch, int buffers) {
  const int64_t* a = launch.args;
  Params p{};
  p.symbols = launch.deviceSymbols;
  p.tokens = {a[kTokens], a[kTokensSymbol]};
  p.keys = static_cast<int>(a[kKeyCount]);
  p.position = static_cast<int>(a[kPosition]);
  p.heads = static_cast<int>(a[kHeads]);
  p.group = static_cast<int>(a[kHeads] / a[kKvHeads]);
  p.batch = static_cast<int>(a[kBatch]);
  p.causal = static_cast<int>(a[kCausal]);
  p.window = static_cast<int>(a[kWindow]);
  p.tokenMajor = static_cast<int>(a[kTokenMajor]);
  p.rounds = static_cast<int>(a[kRounds]);
  const uint32_t bits = static_cast<uint32_t>(a[kScale]);
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  p.scale = static_cast<float>(static_cast<double>(scale) * 1.4426950408889634);
  p.sinks = a[kSinks] ? static_cast<const float*>(launch.buffers[buffers]) : nullptr;
  return p;
}

template <class Kernel>
cudaError_t start(Kernel kernel, size_t bytes, const Launch& launch, int tokens, const Params& p, const CUtensorMap& q,
                  const CUtensorMap& k, const CUtensorMap& v) {
  // Tiles start on 1024 bytes, shared memory on 128.
  const int shared = static_cast<int>(bytes) + 1024 - 128;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(p.heads, (tokens + kRows - 1) / kRows, p.batch), kThreads, shared, launch.stream>>>(q, k, v, p);
  return cudaGetLastError();
}

/** The map of stored queries [T, heads, 128] or [batch, heads, T, 128]. */
cudaError_t queryMap(CUtensorMap* map, const Params& p, const void* q, int bytes, int tokens) {
  const uint64_t row = kSize * bytes;
  return p.tokenMajor ? hopper::tensorMap(map, q, bytes, kSize, tokens, row * p.heads, p.heads, row, kRows)
                      : hopper::tensorMap(map, q, bytes, kSize, tokens, row, p.batch * p.heads, row * tokens, kRows);
}

}  // namespace
}  // namespace fewbit
