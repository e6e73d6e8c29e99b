// Prompts over a cache of bf16.
#include "prefill.cuh"

namespace fewbit {
namespace {

template <int Parts>
struct Shared16 {
  uint8_t q[Parts][2][kRows][128], k[kStages][2][kKeys][128], v[kStages][2][kKeys][128];
  uint64_t qFull, kFull[kStages], kFree[kStages], vFull[kStages], vFree[kStages];
};
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
#endif

/**
 * bf16: q in QueryParts bf16 parts, probabilities in WeightParts. One part of each rounds them; three are float32 itself.
 * Grid: heads, blocks of rows, batch.
 */
template <int QueryParts, int WeightParts>
__global__ void __launch_bounds__(kThreads, 1)
    prefill16(const __grid_constant__ CUtensorMap qMap, const __grid_constant__ CUtensorMap kMap,
              const __grid_constant__ CUtensorMap vMap, const Params p) {
#ifdef FEWBIT_HOPPER
  extern __shared__ uint8_t raw[];
  auto& mem = *reinterpret_cast<Shared16<QueryParts>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
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
      const int planes = p.batch * p.heads, plane = b * (p.heads / p.group) + head / p.group;
      barrierExpect(&mem.qFull, sizeof(mem.q));
#pragma unroll
      for (int n = 0; n < QueryParts; n++)
        for (int c = 0; c < 2; c++) load(mem.q[n][c], &qMap, &mem.qFull, 64 * c, row0, n * planes + b * p.heads + head);
      auto copy = [&](const CUtensorMap* map, uint8_t (*to)[kKeys][128], uint64_t* full, uint64_t* free, int step) {
        barrierWait(free, (step / kStages & 1) ^ 1);
        barrierExpect(full, 2 * kKeys * 128);
        for (int c = 0; c < 2; c++) load(to[c], map, full, 64 * c, walk.key(step), plane);
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
    auto weigh = [&](int step) {
      const int key = walk.key(step);
      if (key + kKeys > all[1] || key < all[0]) hide(s, key + 2 * (lane & 3), from, to);
      softmax.step(s, p.scale, 0.f, shrink);
    };
    auto pack = [&](uint32_t (&w)[WeightParts * 32]) {
#pragma unroll
      for (int i = 0; i < 32; i++) split<WeightParts>(s[2 * i], s[2 * i + 1], w + i, 32);
    };
    auto release = [&](uint64_t* free) {
      if (lane == 0) barrierArrive(free);
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

    barrierWait(&mem.qFull, 0);
    uint32_t w[WeightParts * 32];
    if (walk.count > 0) {
      clean();
      if constexpr (WeightParts == 1) {
        // The scores of a tile are computed beside the weighted sum of the tile before it.
        if (turn == 1) turnPass(kTurn, 256);
        scores(0);
        productWait<0>();
        pin(s);
        release(&mem.kFree[0]);
        weigh(0);
        pack(w);
        for (int step = 1; step < walk.count; step++) {
          turnWait(kTurn + turn, 256);
          scores(step);
          values(step - 1, w);
          if (turn == 0 || step + 1 < walk.count) turnPass(kTurn + (turn ^ 1), 256);
          productWait<1>();
          pin(s);
          release(&mem.kFree[step % kStages]);
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
        values(walk.count - 1, w);
        productWait<0>();
        pin(o);
      } else {
        for (int step = 0; step < walk.count; step++) {
          scores(step);
          productWait<0>();
          pin(s);
          release(&mem.kFree[step % kStages]);
          weigh(step);
#pragma unroll
          for (int i = 0; i < 64; i++) o[i] *= shrink[i >> 1 & 1];
          pack(w);
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

/** Dense float32 queries as three bf16 parts: out [3, batch, heads, rows, 128], rows a multiple of 128 and the rest zero. */
__global__ void splitQueries(const float* q, __nv_bfloat16* out, int64_t stride, int64_t column, int rows, const Params p) {
  const int t = blockIdx.x, head = blockIdx.y, b = blockIdx.z, d = threadIdx.x;
  const int tokens = static_cast<int>(p.tokens.at(p.symbols));
  const int64_t from = p.tokenMajor ? t * stride + column + static_cast<int64_t>(head) * kSize
                                    : ((static_cast<int64_t>(b) * p.heads + head) * tokens + t) * kSize;
  float x = t < tokens ? q[from + d] : 0.f;
  const int64_t part = static_cast<int64_t>(p.batch) * p.heads * rows * kSize;
  __nv_bfloat16* to = out + ((static_cast<int64_t>(b) * p.heads + head) * rows + t) * kSize + d;
  for (int n = 0; n < 3; n++) {
    const __nv_bfloat16 high = __float2bfloat16_rn(x);
    to[n * part] = high;
    x -= __bfloat162float(high);
  }
}

/**
 * q, k, v, [sinks,] out[, scratch]. Further args: parts of q (1: stored bf16; 3: dense float32, through scratch) and of
 * probabilities (1: declared bf16; 3), row stride and first column of dense [T, ...] queries.
 */
cudaError_t runPrefill16(const Launch& launch) {
  Params p = params(launch, 3);
  const int at = p.sinks == nullptr ? 3 : 4;
  p.out = static_cast<float*>(launch.buffers[at]);
  const int64_t queryParts = launch.args[kEnd], weightParts = launch.args[kEnd + 1];
  const int tokens = static_cast<int>(p.tokens.at(launch.symbols));
  if (tokens == 0) return cudaSuccess;
  const int planes = p.batch * p.heads / p.group;
  CUtensorMap q, k, v;
  cudaError_t error;
  if (queryParts == 1) {
    error = queryMap(&q, p, launch.buffers[0], 2, tokens);
  } else {
    const int rows = (tokens + kRows - 1) / kRows * kRows;
    auto* parts = static_cast<__nv_bfloat16*>(launch.buffers[at + 1]);
    splitQueries<<<dim3(rows, p.heads, p.batch), kSize, 0, launch.stream>>>(
        static_cast<const float*>(launch.buffers[0]), parts, launch.args[kEnd + 2], launch.args[kEnd + 3], rows, p);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    error = hopper::tensorMap(&q, parts, 2, kSize, rows, kSize * 2, 3 * p.batch * p.heads, uint64_t(rows) * kSize * 2, kRows);
  }
  if (error != cudaSuccess) return error;
  const uint64_t plane = uint64_t(p.keys) * kSize * 2;
  if ((error = hopper::tensorMap(&k, launch.buffers[1], 2, kSize, p.keys, kSize * 2, planes, plane, kKeys)) != cudaSuccess ||
      (error = hopper::tensorMap(&v, launch.buffers[2], 2, kSize, p.keys, kSize * 2, planes, plane, kKeys)) != cudaSuccess)
    return error;
  if (queryParts == 1)
    return weightParts == 1 ? start(prefill16<1, 1>, sizeof(Shared16<1>), launch, tokens, p, q, k, v)
                            : start(prefill16<1, 3>, sizeof(Shared16<1>), launch, tokens, p, q, k, v);
  return weightParts == 1 ? start(prefill16<3, 1>, sizeof(Shared16<3>), launch, tokens, p, q, k, v)
                          : start(prefill16<3, 3>, sizeof(Shared16<3>), launch, tokens, p, q, k, v);
}

}  // namespace

extern const Entry kSdpaPrefill16Entries[] = {{"sdpa/prefill16", 1, runPrefill16}};
extern const size_t kSdpaPrefill16EntryCount = 1;

}  // namespace fewbit
