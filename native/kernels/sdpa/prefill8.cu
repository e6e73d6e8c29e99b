// Whole prompts in e4m3, with one scale a KV head.
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cache.cuh"
#include "prefill.cuh"

namespace fewbit {
namespace {

struct Shared8 {
  uint8_t q[2][kRows][128], k[kStages][2][kKeys][128], v[kStages][kSize][128], codes[kRows][128];
  uint64_t qFull, kFull[kStages], kFree[kStages], vFull[kStages], vFree[kStages];
};

/** Sixteen e4m3 codes as bf16, which holds their values. */
__device__ __forceinline__ void widen(uint4 codes, uint32_t* pairs) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(words[i / 2] >> 16 * (i & 1)), __NV_E4M3);
    const float2 values = __half22float2(__half2(halves));
    const __nv_bfloat162 pair = __float22bfloat162_rn(values);
    pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

/** The logarithm of what e4m3 probabilities are multiplied with: their largest is 2^8. */
constexpr float kShift8 = 8.f;

/**
 * e4m3: scores are computed in bf16, which holds the codes, because the unit's sums of e4m3 products keep too few bits for them;
 * probabilities and values as e4m3. k is what `widen8`, v what `transpose8` made. Grid as above.
 */
__global__ void __launch_bounds__(kThreads, 1)
    prefill8(const __grid_constant__ CUtensorMap qMap, const __grid_constant__ CUtensorMap kMap,
             const __grid_constant__ CUtensorMap vMap, const Params p) {
#ifdef FEWBIT_HOPPER
  extern __shared__ __align__(128) uint8_t raw[];
  auto& mem = *reinterpret_cast<Shared8*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const Seen seen(p);
  const int head = blockIdx.x, b = blockIdx.z;
  const int row0 = (gridDim.y - 1 - blockIdx.y) * kRows;
  if (row0 >= seen.tokens) return;
  const Walk walk(seen, row0);
  const int plane = b * (p.heads / p.group) + head / p.group;
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
      barrierExpect(&mem.qFull, sizeof(mem.codes));
      load(mem.codes, &qMap, &mem.qFull, 0, row0, b * p.heads + head);
      for (int step = 0; step <= walk.count; step++) {
        if (step < walk.count) {
          const int s = step % kStages;
          barrierWait(&mem.kFree[s], (step / kStages & 1) ^ 1);
          barrierExpect(&mem.kFull[s], sizeof(mem.k[s]));
          for (int c = 0; c < 2; c++) load(mem.k[s][c], &kMap, &mem.kFull[s], 64 * c, walk.key(step), plane);
        }
        if (step > 0) {
          const int s = (step - 1) % kStages;
          barrierWait(&mem.vFree[s], ((step - 1) / kStages & 1) ^ 1);
          barrierExpect(&mem.vFull[s], sizeof(mem.v[s]));
          load(mem.v[s], &vMap, &mem.vFull[s], walk.key(step - 1), 0, plane);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int turn = threadIdx.x / 128 - 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
    const int row = row0 + turn * 64 + warp * 16 + lane / 4;
    const int from[2] = {seen.from(row), seen.from(row + 8)}, to[2] = {seen.to(row), seen.to(row + 8)};
    const int all[2] = {seen.from(min(row0 + kRows, seen.tokens) - 1), seen.to(row0)};
    Params scaled = p;
    scaled.scale = p.scale * p.qScale[plane] * p.kScale[plane];
    // Sums of one tile are added in float32: the unit's own sums of e4m3 products keep fewer bits.
    float s[64], part[64], o[64];
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.f;
    Softmax softmax;
    float shrink[2] = {0.f, 0.f};
    uint32_t w[16];

    auto scores = [&](int step) {
      const int stage = step % kStages;
      barrierWait(&mem.kFull[stage], step / kStages & 1);
      pin(s);
      productFence();
      const uint64_t a = tile(mem.q[0][turn * 64]), k = tile(mem.k[stage]);
#pragma unroll
      for (int i = 0; i < 8; i++)
        productBf16(s, a + (i / 4) * (kRows * 128 >> 4) + 2 * (i % 4), k + (i / 4) * (kKeys * 128 >> 4) + 2 * (i % 4), i != 0);
      productCommit();
    };
    auto values = [&](int step) {
      const int stage = step % kStages;
      barrierWait(&mem.vFull[stage], step / kStages & 1);
      pin(part);
      pin(w);
      productFence();
      const uint64_t v = tile(mem.v[stage]);
#pragma unroll
      for (int i = 0; i < 4; i++) productE4m3(part, w + 4 * i, v + 2 * i, i != 0);
      productCommit();
    };
    auto hides = [&](int key) { return key + kKeys > all[1] || key < all[0]; };
    auto weigh = [&](int step) {
      const int key = walk.key(step);
      if (hides(key)) hide(s, key + 2 * (lane & 3), from, to, -INFINITY);
      softmax.step(s, scaled.scale, kShift8, shrink);
    };
    // Within 32 keys, columns stand in the order in which a thread holds them; `transpose8` has the same order.
    auto pack = [&] {
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const float* x = s + 16 * i + 8 * h + 2 * r;
            w[4 * i + 2 * h + r] = packE4m3(x[0], x[1], x[4], x[5]);
          }
    };
    /** Before the values of a tile are added. */
    auto check = [&](int step) {
      if (!hides(walk.key(step))) return;
      const int stage = step % kStages;
      barrierWait(&mem.vFull[stage], step / kStages & 1);
      auto& v = mem.v[stage];
      purge<sizeof v>(v[0], o, walk.key(step), from, to,
                      [](uint32_t word) { return ((word & 0x7f7f7f7fu) + 0x01010101u >> 7 & 0x01010101u) * 0xffu; },
                      [&](int n, int d) {
                        // As `transpose8` lays them down.
                        const int at = n % 8 / 2 * 4 + n % 16 / 8 * 2 + n % 2;
                        return sdpa::fromE4m3(v[d][(n / 16 ^ d % 8) * 16 + at]);
                      });
    };
    auto release = [&](uint64_t* free) {
      if (lane == 0) barrierArrive(free);
    };

    barrierWait(&mem.qFull, 0);
    // Queries as bf16, 16 codes at a time; the copy unit's swizzle is chunk ^ row % 8.
    for (int i = threadIdx.x - 128; i < kRows * 8; i += 256) {
      const int r = i / 8, chunk = i % 8;
      uint32_t pairs[8];
      widen(*reinterpret_cast<const uint4*>(&mem.codes[r][(chunk ^ r % 8) * 16]), pairs);
      for (int n = 0; n < 2; n++)
        *reinterpret_cast<uint4*>(&mem.q[chunk / 4][r][((chunk % 4 * 2 + n) ^ r % 8) * 16]) = reinterpret_cast<const uint4*>(pairs)[n];
    }
    fenceShared();
    turnWait(kBoth, 256);
    if (walk.count > 0) {
      if (turn == 1) turnPass(kTurn, 256);
      scores(0);
      productWait<0>();
      pin(s);
      release(&mem.kFree[0]);
      weigh(0);
      pack();
      for (int step = 1; step < walk.count; step++) {
        check(step - 1);
        const float before[2] = {shrink[0], shrink[1]};
        turnWait(kTurn + turn, 256);
        scores(step);
        values(step - 1);
        if (turn == 0 || step + 1 < walk.count) turnPass(kTurn + (turn ^ 1), 256);
        productWait<1>();
        pin(s);
        release(&mem.kFree[step % kStages]);
        weigh(step);
        productWait<0>();
        pin(part);
        pin(w);
        release(&mem.vFree[(step - 1) % kStages]);
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = fmaf(o[i], before[i >> 1 & 1], part[i]);
        pack();
      }
      if (walk.count == 1 && turn == 0) turnWait(kTurn, 256);
      check(walk.count - 1);
      values(walk.count - 1);
      productWait<0>();
      pin(part);
#pragma unroll
      for (int i = 0; i < 64; i++) o[i] = fmaf(o[i], shrink[i >> 1 & 1], part[i]);
    }
    store(scaled, seen, o, softmax, kShift8, p.vScale[plane], row, head, b);
  }
#endif
}

/**
 * v [planes, keys, 128] e4m3 to [planes, 128, padded keys], keys past the last as zeros. Within 16 keys, byte 4t + e is key
 * 2t + e for e < 2 and key 8 + 2t + e - 2 for the others.
 */
__global__ void transpose8(const uint8_t* v, uint8_t* out, int padded, const Params p) {
  __shared__ uint8_t turned[kKeys][kSize + 4];
  const Seen seen(p);
  const int key0 = blockIdx.x * kKeys;
  if (key0 >= seen.keys) return;
  const uint8_t* in = v + (static_cast<int64_t>(blockIdx.y) * p.keys + key0) * kSize;
  for (int i = threadIdx.x; i < kKeys * kSize / 4; i += blockDim.x) {
    const int key = i / (kSize / 4), d = i % (kSize / 4) * 4;
    *reinterpret_cast<uint32_t*>(&turned[key][d]) =
        key0 + key < seen.keys ? *reinterpret_cast<const uint32_t*>(in + key * kSize + d) : 0u;
  }
  __syncthreads();
  uint8_t* to = out + static_cast<int64_t>(blockIdx.y) * kSize * padded + key0;
  for (int i = threadIdx.x; i < kKeys * kSize / 4; i += blockDim.x) {
    const int d = i / (kKeys / 4), at = i % (kKeys / 4) * 4;
    const int key = at / 16 * 16 + (at % 16) / 2;
    const uint32_t word = turned[key][d] | turned[key + 1][d] << 8 | turned[key + 8][d] << 16 |
                          static_cast<uint32_t>(turned[key + 9][d]) << 24;
    *reinterpret_cast<uint32_t*>(to + static_cast<int64_t>(d) * padded + at) = word;
  }
}

/** Keys [planes, keys, 128] e4m3 as bf16, up to the last that is seen. */
__global__ void widen8(const uint8_t* k, uint32_t* out, const Params p) {
  const Seen seen(p);
  const int key = blockIdx.x * (blockDim.x / 8) + threadIdx.x / 8;
  if (key >= seen.keys) return;
  const int64_t at = (static_cast<int64_t>(blockIdx.y) * p.keys + key) * kSize + threadIdx.x % 8 * 16;
  uint32_t pairs[8];
  widen(*reinterpret_cast<const uint4*>(k + at), pairs);
  for (int n = 0; n < 2; n++) reinterpret_cast<uint4*>(out)[at / 8 + n] = reinterpret_cast<const uint4*>(pairs)[n];
}

/**
 * q, k, v, [sinks,] out, scratch (of every plane: padded keys * 128 bytes, keys * 256 bytes). Further args: byte offsets of the scales of q,
 * k and v in their buffers.
 */
cudaError_t runPrefill8(const Launch& launch) {
  Params p = params(launch, 3);
  const int at = p.sinks == nullptr ? 3 : 4;
  p.out = launch.buffers[at];
  const float** scales[] = {&p.qScale, &p.kScale, &p.vScale};
  for (int i = 0; i < 3; i++)
    *scales[i] = reinterpret_cast<const float*>(static_cast<const char*>(launch.buffers[i]) + launch.args[kEnd + i]);
  const int tokens = static_cast<int>(p.tokens.at(launch.symbols));
  if (tokens == 0) return cudaSuccess;
  const int planes = p.batch * p.heads / p.group, padded = (p.keys + kKeys - 1) / kKeys * kKeys;
  auto* turned = static_cast<uint8_t*>(launch.buffers[at + 1]);
  auto* wide = reinterpret_cast<uint32_t*>(turned + static_cast<int64_t>(planes) * padded * kSize);
  transpose8<<<dim3(padded / kKeys, planes), 256, 0, launch.stream>>>(static_cast<const uint8_t*>(launch.buffers[2]), turned,
                                                                      padded, p);
  widen8<<<dim3((p.keys + 31) / 32, planes), 256, 0, launch.stream>>>(static_cast<const uint8_t*>(launch.buffers[1]), wide, p);
  CUtensorMap q, k, v;
  cudaError_t error;
  if ((error = cudaGetLastError()) != cudaSuccess || (error = queryMap(&q, p, launch.buffers[0], 1, tokens)) != cudaSuccess ||
      (error = hopper::tensorMap(&k, wide, 2, kSize, p.keys, kSize * 2, planes, uint64_t(p.keys) * kSize * 2, kKeys)) !=
          cudaSuccess ||
      (error = hopper::tensorMap(&v, turned, 1, padded, kSize, padded, planes, uint64_t(padded) * kSize, kSize)) != cudaSuccess)
    return error;
  return start(prefill8, sizeof(Shared8), launch, tokens, p, q, k, v);
}

}  // namespace

extern const Entry kSdpaPrefill8Entries[] = {{"sdpa/prefill8", 2, runPrefill8}};
extern const size_t kSdpaPrefill8EntryCount = 1;

}  // namespace fewbit
