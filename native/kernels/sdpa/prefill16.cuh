// Attention over many query rows in bf16: operands that bf16 holds, or as several parts of it.
#pragma once
#include "cache.cuh"
#include "prefill.cuh"

namespace fewbit {
namespace {

template <int Parts, bool Scaled>
struct Shared16 {
  uint8_t q[Parts][2][kRows][128], k[kStages][2][kKeys][128], v[kStages][2][kKeys][128];
  float scales[Scaled ? kStages : 1][2][kKeys];  // of keys and of values
  uint64_t qFull, kFull[kStages], kFree[kStages], vFull[kStages], vFree[kStages];
};
/** Four codes of `C` as bf16, in order. */
template <class C>
__device__ __forceinline__ void widen(uint32_t codes, uint32_t* pairs) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t pair[1];
    C::pair(&codes, &codes, 2 * half, 2 * half + 1, pair);
    // NaN is not among what `pair` gives.
    if constexpr (C::kOdd) {
      if ((codes >> 16 * half & 0x7f) == 0x7f) pair[0] |= 0x7fff;
      if ((codes >> 16 * half & 0x7f00) == 0x7f00) pair[0] |= 0x7fff0000;
    }
    pairs[half] = pair[0];
  }
}

#ifdef FEWBIT_HOPPER
/** Splits a pair into `N` bf16 parts that sum to it: 8 bits each. */
template <int N>
__device__ __forceinline__ void split(float low, float high, uint32_t* parts, int stride) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    const uint32_t pair = packBf16(low, high);
    parts[n * stride] = pair;
    low -= __uint_as_float(pair << 16);
    high -= __uint_as_float(pair & 0xffff0000u);
  }
}

/** Makes a block's queries bf16 in shared memory, 8 elements at a time, as the copy unit would swizzle them: chunk ^ row % 8. 256 threads. */
template <int Parts>
__device__ __forceinline__ void makeQueries(const Params& p, const Seen& seen, uint8_t (&to)[Parts][2][kRows][128], int row0, int head, int b) {
  for (int i = threadIdx.x - 128; i < kRows * 16; i += 256) {
    const int r = i / 16, chunk = i % 16, t = row0 + r;
    const int64_t row = p.tokenMajor ? t * (Parts == 1 ? static_cast<int64_t>(p.heads) * kSize : p.queryStride) + p.queryColumn +
                                           static_cast<int64_t>(head) * kSize
                                     : ((static_cast<int64_t>(b) * p.heads + head) * seen.tokens + t) * kSize;
    alignas(16) uint32_t pairs[Parts][4] = {};
    if (t < seen.tokens) {
      if constexpr (Parts == 1) {
        const uint2 codes = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.q) + row + chunk * 8);
        widen<sdpa::E4m3>(codes.x, pairs[0]);
        widen<sdpa::E4m3>(codes.y, pairs[0] + 2);
      } else {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(p.q) + row + chunk * 8);
        const float4 low = from[0], high = from[1];
        split<Parts>(low.x, low.y, pairs[0], 4);
        split<Parts>(low.z, low.w, pairs[0] + 1, 4);
        split<Parts>(high.x, high.y, pairs[0] + 2, 4);
        split<Parts>(high.z, high.w, pairs[0] + 3, 4);
      }
    }
#pragma unroll
    for (int n = 0; n < Parts; n++)
      *reinterpret_cast<uint4*>(&to[n][chunk / 8][r][(chunk % 8 ^ r % 8) * 16]) = *reinterpret_cast<const uint4*>(pairs[n]);
  }
  fenceShared();
  turnWait(kBoth, 256);
}
#endif

/**
 * q in QueryParts bf16 parts, probabilities in WeightParts. One part of each rounds them; three are float32 itself. Scaled: k and v are codes,
 * whose scales multiply scores and probabilities. Grid: heads, blocks of rows, batch.
 */
template <int QueryParts, int WeightParts, bool Scaled>
__global__ void __launch_bounds__(kThreads, 1)
    prefill16(const __grid_constant__ CUtensorMap qMap, const __grid_constant__ CUtensorMap kMap,
              const __grid_constant__ CUtensorMap vMap, const Params p) {
#ifdef FEWBIT_HOPPER
  extern __shared__ __align__(128) uint8_t raw[];
  auto& mem = *reinterpret_cast<Shared16<QueryParts, Scaled>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const Seen seen(p);
  const int head = blockIdx.x, b = blockIdx.z;
  // The longest rows first: the last blocks to start are then the shortest.
  const int row0 = (gridDim.y - 1 - blockIdx.y) * kRows;
  if (row0 >= seen.tokens) return;
  const Walk walk(seen, row0);
  if (threadIdx.x == 0) {
    barrierInit(&mem.qFull, 1);
    for (int i = 0; i < kStages; i++) {
      barrierInit(&mem.kFull[i], 1);
      barrierInit(&mem.vFull[i], 1);
      barrierInit(&mem.kFree[i], 8);
      barrierInit(&mem.vFree[i], 8);
    }
    fenceShared();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      const int plane = b * (p.heads / p.group) + head / p.group;
      if (QueryParts == 1 && p.q == nullptr) {
        barrierExpect(&mem.qFull, sizeof(mem.q));
        for (int c = 0; c < 2; c++) load(mem.q[0][c], &qMap, &mem.qFull, 64 * c, row0, b * p.heads + head);
      }
      auto copy = [&](const CUtensorMap* map, uint8_t (*to)[kKeys][128], uint64_t* full, uint64_t* free, int step) {
        barrierWait(free, (step / kStages & 1) ^ 1);
        const bool scales = Scaled && map == &kMap;
        barrierExpect(full, 2 * kKeys * 128 + (scales ? sizeof(mem.scales[0]) : 0));
        for (int c = 0; c < 2; c++) load(to[c], map, full, 64 * c, walk.key(step), plane);
        if (scales) {
          const int64_t from = static_cast<int64_t>(plane) * p.padded + walk.key(step);
          loadBytes(mem.scales[step % kStages][0], p.kScale + from, full, kKeys * 4);
          loadBytes(mem.scales[step % kStages][1], p.vScale + from, full, kKeys * 4);
        }
      };
      for (int step = 0; step <= walk.count; step++) {
        if (step < walk.count) {
          const int s = step % kStages;
          copy(&kMap, mem.k[s], &mem.kFull[s], &mem.kFree[s], step);
        }
        if (step > 0) {
          const int s = (step - 1) % kStages;
          copy(&vMap, mem.v[s], &mem.vFull[s], &mem.vFree[s], step - 1);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int turn = threadIdx.x / 128 - 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
    const int row = row0 + turn * 64 + warp * 16 + lane / 4;
    const int from[2] = {seen.from(row), seen.from(row + 8)}, to[2] = {seen.to(row), seen.to(row + 8)};
    const int all[2] = {seen.from(min(row0 + kRows, seen.tokens) - 1), seen.to(row0)};
    float s[64], o[64];
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.f;
    Softmax softmax;
    float shrink[2];

    auto scores = [&](int step) {
      const int stage = step % kStages;
      barrierWait(&mem.kFull[stage], step / kStages & 1);
      pin(s);
      productFence();
#pragma unroll
      for (int n = QueryParts - 1; n >= 0; n--) {
        const uint64_t a = tile(mem.q[n][0][turn * 64]), k = tile(mem.k[stage]);
#pragma unroll
        for (int i = 0; i < 8; i++)
          productBf16(s, a + (i / 4) * (kRows * 128 >> 4) + 2 * (i % 4), k + (i / 4) * (kKeys * 128 >> 4) + 2 * (i % 4),
                      n != QueryParts - 1 || i != 0);
      }
      productCommit();
    };
    /** o += weights v, of the parts as `split` gives them. */
    auto values = [&](int step, uint32_t (&w)[WeightParts * 32]) {
      const int stage = step % kStages;
      barrierWait(&mem.vFull[stage], step / kStages & 1);
      pin(o);
      pin(w);
      productFence();
      const uint64_t v = tile(mem.v[stage], kKeys * 128);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int n = WeightParts - 1; n >= 0; n--) productBf16(o, w + n * 32 + 4 * i, v + i * (16 * 128 >> 4), 1);
      productCommit();
    };
    auto release = [&](uint64_t* free) {
      if (lane == 0) barrierArrive(free);
    };
    /** Multiplies the columns of s with scales of keys (0) or values (1), and its two rows with factors. */
    auto scaled = [&](int step, int which, float low, float high) {
      const float* scales = mem.scales[step % kStages][which] + 2 * (lane & 3);
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const float2 pair = *reinterpret_cast<const float2*>(scales + 8 * j);
        s[4 * j] *= pair.x * low;
        s[4 * j + 1] *= pair.y * low;
        s[4 * j + 2] *= pair.x * high;
        s[4 * j + 3] *= pair.y * high;
      }
    };
    float rowScale[2] = {1.f, 1.f};
    if (Scaled && p.qScale != nullptr) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int t = min(row + 8 * r, seen.tokens - 1);
        rowScale[r] = p.qScale[p.tokenMajor ? static_cast<int64_t>(t) * p.heads + head
                                            : (static_cast<int64_t>(b) * p.heads + head) * seen.tokens + t];
      }
    }
    /** Whether some row of the block does not see some key of a tile. */
    auto hides = [&](int key) { return key + kKeys > all[1] || key < all[0]; };
    /** Scores to probabilities; the tile of keys is free after it. */
    auto weigh = [&](int step) {
      const int key = walk.key(step);
      if constexpr (Scaled) scaled(step, 0, rowScale[0], rowScale[1]);
      else release(&mem.kFree[step % kStages]);
      if (hides(key)) hide(s, key + 2 * (lane & 3), from, to, -INFINITY);
      softmax.step(s, p.scale, 0.f, shrink);
      if constexpr (Scaled) {
        scaled(step, 1, 1.f, 1.f);
        if (hides(key)) hide(s, key + 2 * (lane & 3), from, to, 0.f);
        __syncwarp();
        release(&mem.kFree[step % kStages]);
      }
    };
    auto pack = [&](uint32_t (&w)[WeightParts * 32]) {
#pragma unroll
      for (int i = 0; i < 32; i++) split<WeightParts>(s[2 * i], s[2 * i + 1], w + i, 32);
    };
    /** Rows of v past the last key may hold anything, and 0 * NaN is NaN. */
    auto clean = [&] {
      const int key = walk.key(0);
      if (key + kKeys <= seen.keys) return;
      barrierWait(&mem.vFull[0], 0);
      const int begin = seen.keys - key;
      for (int i = threadIdx.x - 128; i < (kKeys - begin) * 16; i += 256)
        *reinterpret_cast<uint4*>(&mem.v[0][i / 8 & 1][begin + i / 16][(i & 7) * 16]) = make_uint4(0, 0, 0, 0);
      fenceShared();
      turnWait(kBoth, 256);
    };

    /** Before the values of a tile are added. */
    auto check = [&](int step) {
      if (!hides(walk.key(step))) return;
      const int stage = step % kStages;
      barrierWait(&mem.vFull[stage], step / kStages & 1);
      auto& v = mem.v[stage];
      purge<sizeof v>(v[0][0], o, walk.key(step), from, to,
                      [](uint32_t word) { return ((word & 0x7f807f80u) + 0x00800080u >> 15 & 0x00010001u) * 0xffffu; },
                      [&](int n, int d) {
                        const auto* row = reinterpret_cast<const uint16_t*>(v[d / 64][n]);
                        return __uint_as_float(static_cast<uint32_t>(row[(d / 8 % 8 ^ n % 8) * 8 + d % 8]) << 16);
                      });
    };

    if (QueryParts == 1 && p.q == nullptr) barrierWait(&mem.qFull, 0);
    else makeQueries<QueryParts>(p, seen, mem.q, row0, head, b);
    uint32_t w[WeightParts * 32];
    if (walk.count > 0) {
      clean();
      if constexpr (WeightParts == 1) {
        // The scores of a tile are computed beside the weighted sum of the tile before it.
        if (turn == 1) turnPass(kTurn, 256);
        scores(0);
        productWait<0>();
        pin(s);
        weigh(0);
        pack(w);
        for (int step = 1; step < walk.count; step++) {
          check(step - 1);
          turnWait(kTurn + turn, 256);
          scores(step);
          values(step - 1, w);
          if (turn == 0 || step + 1 < walk.count) turnPass(kTurn + (turn ^ 1), 256);
          productWait<1>();
          pin(s);
          weigh(step);
          productWait<0>();
          pin(o);
          pin(w);
          release(&mem.vFree[(step - 1) % kStages]);
#pragma unroll
          for (int i = 0; i < 64; i++) o[i] *= shrink[i >> 1 & 1];
          pack(w);
        }
        // With one tile nobody waits for the first turn.
        if (walk.count == 1 && turn == 0) turnWait(kTurn, 256);
        check(walk.count - 1);
        values(walk.count - 1, w);
        productWait<0>();
        pin(o);
      } else {
        for (int step = 0; step < walk.count; step++) {
          scores(step);
          productWait<0>();
          pin(s);
          weigh(step);
#pragma unroll
          for (int i = 0; i < 64; i++) o[i] *= shrink[i >> 1 & 1];
          pack(w);
          check(step);
          values(step, w);
          productWait<0>();
          pin(o);
          release(&mem.vFree[step % kStages]);
        }
      }
    }
    store(p, seen, o, softmax, 0.f, 1.f, row, head, b);
  }
#endif
}

template <int QueryParts, int WeightParts, bool Scaled>
cudaError_t start16(const Launch& launch, int tokens, const Params& p, const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v) {
  return start(prefill16<QueryParts, WeightParts, Scaled>, sizeof(Shared16<QueryParts, Scaled>), launch, tokens, p, q, k, v);
}

}  // namespace
}  // namespace fewbit
