// Attention of few query rows over many keys (flash decoding; Dao et al. 2023). Keys and values are read once for the query heads
// that share them. Each warp copies tiles of keys into its own ring in shared memory and multiplies them on the matrix unit: queries and
// probabilities as three bf16 parts each, which is float32 itself, against codes that are exact in bf16 or are split, too.
#pragma once
#include <cooperative_groups.h>

#include "decode_shape.cuh"

namespace fewbit::sdpa {
namespace {

namespace cg = cooperative_groups;

/** Blocks of a cluster, which join their results without a second kernel. */
constexpr int kCluster = 8;
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

template <int Bytes>
__device__ __forceinline__ void copy(void* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(Bytes));
}

/**
 * `Rows` query rows of a block. The matrix unit has 16 rows: with 8, second parts are the other rows and third parts a product of their
 * own; with 4, second parts are rows 4 to 7 and third parts rows 8 to 11. Grid: splits, batch * KV heads, blocks of rows.
 */
template <class C, int Size, int Rows, bool Joined>
__global__ void __launch_bounds__(kWarps<C, Joined> * 32, kWarps<C, Joined> == 4 ? 2 : 1) decode(const Params p) {
  constexpr int kTile = kKeys<C, Joined>, kHalves = kTile / 8;
  using R = Ring<C, Size, Joined>;
  constexpr int kSteps = Size / 16;   // matrix products along a head
  constexpr int kBlocks = Size / 8;   // columns of results, eight at a time
  constexpr int kKeyWords = Size * C::kBits / 128, kValueWords = Size * C::kBits / 256;
  constexpr int kKeyChunk = kKeyWords < 4 ? kKeyWords : 4, kValueChunk = kValueWords < 4 ? kValueWords : 4;
  constexpr int kPerWord = 32 / C::kBits;
  constexpr bool kFour = Rows == 4;
  constexpr int kWarps = sdpa::kWarps<C, Joined>;
  extern __shared__ __align__(16) uint8_t raw[];

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (Joined) return;  // clusters are Hopper's
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  // The join may get ready beside this kernel; it waits for its end.
  if constexpr (!Joined) asm volatile("griddepcontrol.launch_dependents;");
#endif
  const Seen seen(p);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t4 = lane & 3;
  const int plane = blockIdx.y, b = plane / p.kvHeads, h = plane % p.kvHeads, block = blockIdx.z;
  const int rows = seen.tokens * p.group;
  if (block * Rows >= rows) return;
  const Cut cut(seen, block, Rows, kTile, gridDim.x, Joined ? 1 : kLeast);
  if constexpr (!Joined) {
    if (static_cast<int>(blockIdx.x) >= cut.used && blockIdx.x > 0) return;
  }

  const int firstTile = blockIdx.x * cut.each, endTile = min(firstTile + cut.each, cut.tiles);
  uint8_t* ring = raw + warp * R::kStages * R::kBytes;
  auto rowOf = [&](int key) -> int64_t {
    key = min(key, cut.end - 1);
    const int slot = p.ring ? key % seen.capacity : key;
    if (p.page == 0) return static_cast<int64_t>(plane) * seen.capacity + slot;
    return (static_cast<int64_t>(p.pages[slot / p.page]) * p.kvHeads + h) * p.page + slot % p.page;
  };
  auto stageOf = [&](int tile) { return ring + (tile - firstTile) / kWarps % R::kStages * R::kBytes; };
  auto fetch = [&](int tile) {
    if (tile < endTile) {
      uint8_t* stage = stageOf(tile);
      const int key0 = cut.first + tile * kTile;
      constexpr int kChunks = R::kRow / 16;
      auto row = [&](int n, int64_t from) {
        const int at = n / kChunks, chunk = n % kChunks * 16;
        copy<16>(stage + at * R::kKeyStride + chunk, p.k.rows + from);
        copy<16>(stage + R::kValues + at * R::kValueStride + chunk, p.v.rows + from);
      };
      auto grid = [&](int n, int64_t key) {
        if constexpr (R::kScales > 0) {
          const Operand& operand = n < kTile ? p.k : p.v;
          copy<R::kScales>(stage + R::kScaleAt + n * R::kScales, operand.scales + key * R::kScales);
          if constexpr (R::kZeros >= 4) copy<4>(stage + R::kZeroAt + n * R::kZeros, operand.zeros + key * R::kZeros);
          else if constexpr (R::kZeros > 0)
            for (int i = 0; i < R::kZeros; i++) stage[R::kZeroAt + n * R::kZeros + i] = operand.zeros[key * R::kZeros + i];
        }
      };
      // The rows of a tile mostly lie one after another.
      if (p.page == 0 && p.ring == 0 && key0 + kTile <= cut.end) {
        const int64_t first = static_cast<int64_t>(plane) * seen.capacity + key0;
#pragma unroll
        for (int i = 0; i < kTile * kChunks / 32; i++) row(i * 32 + lane, first * R::kRow + i * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < kTile / 16; i++) grid(i * 32 + lane, first + (i * 32 + lane) % kTile);
      } else {
#pragma unroll 1
        for (int n = lane; n < kTile * kChunks; n += 32) row(n, rowOf(key0 + n / kChunks) * R::kRow + n % kChunks * 16);
#pragma unroll 1
        for (int n = lane; n < 2 * kTile; n += 32) grid(n, rowOf(key0 + n % kTile));
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  for (int i = 0; i < R::kStages - 1; i++) fetch(firstTile + warp + i * kWarps);

  // The query of row g, in parts as the matrix unit takes them. Element i of this thread is keyElement(i) of the head.
  const int row = min(block * Rows + g % Rows, rows - 1), token = row / p.group, head = h * p.group + row % p.group;
  auto keyElement = [&](int i) {
    constexpr int kChunk = kKeyChunk * kPerWord;
    return kChunk * (t4 + 4 * (i / kChunk)) + i % kChunk;
  };
  uint32_t q[kSteps][kFour ? 4 : 6];
  {
    const int64_t at = p.tokenMajor ? token * p.queryStride + p.queryColumn + static_cast<int64_t>(head) * Size
                                    : ((static_cast<int64_t>(b) * p.heads + head) * seen.tokens + token) * Size;
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      float x[4];
      if (p.queryBits == 16) {
        const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.q) + at + keyElement(4 * s));
        x[0] = lowBf16(pairs.x), x[1] = highBf16(pairs.x), x[2] = lowBf16(pairs.y), x[3] = highBf16(pairs.y);
      } else if (p.queryBits == 8) {
        const int64_t d = at + keyElement(4 * s);
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(p.q) + d);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = fromE4m3(static_cast<uint8_t>(codes >> 8 * i)) * p.queryScales[at / Size];
      } else {
        *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(static_cast<const float*>(p.q) + at + keyElement(4 * s));
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t parts[3];
        split(x[C::kAlternate ? half : 2 * half], x[C::kAlternate ? half + 2 : 2 * half + 1], parts);
        q[s][2 * half] = kFour && g >= 4 ? parts[1] : parts[0];
        q[s][2 * half + 1] = !kFour ? parts[1] : g < 4 ? parts[2] : 0u;
        if constexpr (!kFour) q[s][4 + half] = parts[2];
      }
    }
  }
  const int from = seen.from(token), to = seen.to(token);
  const float* mask = p.mask == nullptr ? nullptr
                                        : p.mask + (static_cast<int64_t>((p.maskBatch ? b : 0) * (p.maskHeads ? p.heads : 1) +
                                                                         (p.maskHeads ? head : 0)) *
                                                        seen.tokens +
                                                    token) *
                                                       seen.capacity;

  float o[kBlocks][4];
#pragma unroll
  for (int n = 0; n < kBlocks; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
  float top = -INFINITY, sum = 0.f;
  uint32_t nans = 0;  // columns of values, of this thread's eight, that hold a NaN
  for (int tile = firstTile + warp; tile < endTile; tile += kWarps) {
    asm volatile("cp.async.wait_group %0;" ::"n"(R::kStages - 2));
    __syncwarp();
    // The stage that is filled now was read in the step before.
    fetch(tile + (R::kStages - 1) * kWarps);
    const uint8_t* stage = stageOf(tile);
    auto scaleZero = [&](int key, int group) {  // of k (key < 16) or v
      float2 out = make_float2(1.f, 0.f);
      if constexpr (kGrouped<C>) {
        const int at = key * R::kGroups + group;
        out.x = __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(stage + R::kScaleAt)[at]) << 16);
        out.y = static_cast<float>(stage[R::kZeroAt + at]);
      }
      return out;
    };
    auto words = [&](uint32_t* to, const uint8_t* from, int count, int chunk, int step) {
#pragma unroll
      for (int i = 0; i < count; i += chunk) {
        const uint8_t* at = from + i / chunk * step;
        if (chunk == 4) *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(at);
        else if (chunk == 2) *reinterpret_cast<uint2*>(to + i) = *reinterpret_cast<const uint2*>(at);
        else to[i] = *reinterpret_cast<const uint32_t*>(at);
      }
    };

    // Scores of keys 2 t4 + {0, 1} of every eight, for row g.
    float s[kHalves][2];
#pragma unroll
      for (int half = 0; half < kHalves; half++) {
        alignas(16) uint32_t k[kKeyWords];
        words(k, stage + (half * 8 + g) * R::kKeyStride + t4 * kKeyChunk * 4, kKeyWords, kKeyChunk, 16 * kKeyChunk);
        // Two sums each, so that a product need not wait for the one before it.
        float d[2][4] = {};
        const float2 grid = scaleZero(half * 8 + g, t4 * kKeyChunk * kPerWord / 32);
#pragma unroll
        for (int n = 0; n < kSteps; n++) {
          uint32_t b0[C::kParts], b1[C::kParts];
          C::four(k, n, grid, b0, b1);
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
    // What few graphs ask for is branched around as a whole, so that it costs the others nothing.
    auto eachScore = [&](auto change) {
#pragma unroll
      for (int half = 0; half < kHalves; half++)
#pragma unroll
        for (int e = 0; e < 2; e++) change(s[half][e], 8 * half + 2 * t4 + e);
    };
    auto scaleOf = [&](int key) {  // of k (key < kTile) or v
      if constexpr (R::kScales == 4 && !kGrouped<C>) return reinterpret_cast<const float*>(stage + R::kScaleAt)[key];
      else return 1.f;
    };
    eachScore([&](float& x, int key) {
      if constexpr (kFour) x += __shfl_xor_sync(~0u, x, 16);
      x *= p.scale * scaleOf(key);
    });
    if (p.softcap != 0.f)
      eachScore([&](float& x, int) {
        const float a = fminf(fabsf(x) / p.softcap, 15.f);
        x = copysignf(p.softcap * (1.f - 2.f / (expf(2.f * a) + 1.f)), x);
      });
    float highest = -INFINITY;
    eachScore([&](float& x, int key) {
      key += cut.first + tile * kTile;
      if (key < from || key >= to) x = -INFINITY;
    });
    if (mask != nullptr)
      eachScore([&](float& x, int key) {
        key += cut.first + tile * kTile;
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
    eachScore([&](float& x, int key) { x *= scaleOf(kTile + key); });
#pragma unroll
    for (int pair = 0; pair < kHalves / 2; pair++) {
      // Probabilities as the matrix unit takes them.
      uint32_t w[2][3];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int half = 2 * pair + i;
        uint32_t parts[3];
        split(s[half][0], s[half][1], parts);
        w[i][0] = kFour && g >= 4 ? parts[1] : parts[0];
        w[i][1] = !kFour ? parts[1] : g < 4 ? parts[2] : 0u;
        w[i][2] = parts[2];
      }
      // Values of keys 2 t4 + {0, 1} of both eights; elements that lie side by side in memory go to one thread.
      alignas(16) uint32_t v[4][kValueWords];
      float2 grid[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = 16 * pair + 2 * t4 + (i & 1) + 8 * (i >> 1);
        words(v[i], stage + R::kValues + key * R::kValueStride + g * kValueChunk * 4, kValueWords, kValueChunk, 32 * kValueChunk);
        grid[i] = scaleZero(kTile + key, g * kValueChunk * kPerWord / 32);
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
        C::pair(v[0], v[1], n, n, grid[0], grid[1], b0);
        C::pair(v[2], v[3], n, n, grid[2], grid[3], b1);
        if constexpr (!kFour) product(o[n], w[0][2], 0u, w[1][2], 0u, b0[0], b1[0]);
#pragma unroll
        for (int part = C::kParts - 1; part >= 0; part--)
          product(o[n], w[0][0], w[0][1], w[1][0], w[1][1], b0[part], b1[part]);
      }
    }
    __syncwarp();
  }
  asm volatile("cp.async.wait_group 0;");
  __syncthreads();

  if constexpr (C::kNan) {
    nans |= __shfl_xor_sync(~0u, nans, 1);
    nans |= __shfl_xor_sync(~0u, nans, 2);
  }
  // Join the warps: the block's tops and sums, and its output relative to them.
  float* join = reinterpret_cast<float*>(raw);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  constexpr int kLine = Size + 2;
  {
    float* line = join + (warp * Rows + g % Rows) * kLine;
    if (t4 == 0 && g < Rows) {
      line[Size] = top;
      line[Size + 1] = sum;
    }
    constexpr int kChunk = kValueChunk * kPerWord;
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
  __syncthreads();
  const int held = min(Rows, rows - block * Rows), d = threadIdx.x % Size;
  /** The block's lines: those of its warps relative to the greatest of their tops. A group of `Size` threads makes a line at a time. */
  auto joined = [&](float* lines) {
    constexpr int kAtOnce = kWarps * 32 / Size;
#pragma unroll
    for (int first = 0; first < Rows; first += kAtOnce) {
      const int r = first + threadIdx.x / Size;
      float most = -INFINITY, total = 0.f, y = 0.f;
#pragma unroll
      for (int n = 0; n < kWarps; n++) most = fmaxf(most, join[(n * Rows + r) * kLine + Size]);
#pragma unroll
      for (int n = 0; n < kWarps; n++) {
        const float* from = join + (n * Rows + r) * kLine;
        // A top of minus infinity goes with a sum of zero, or NaN.
        const float factor = from[Size] == -INFINITY ? from[Size + 1] : exp2Fast((from[Size] - most) * kLog2e);
        total = fmaf(from[Size + 1], factor, total);
        y = fmaf(from[d], factor, y);
      }
      if (r >= held) continue;
      lines[r * kLine + d] = y;
      if (d == 0) {
        lines[r * kLine + Size] = most;
        lines[r * kLine + Size + 1] = total;
      }
    }
  };
  if constexpr (!Joined) {
    joined(p.parts + ((static_cast<int64_t>(block) * gridDim.y + plane) * gridDim.x + blockIdx.x) * Rows * kLine);
  } else {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const cg::cluster_group cluster = cg::this_cluster();
    float* mine = join + kWarps * Rows * kLine;
    joined(mine);
    cluster.sync();
    // Each block of the cluster finishes one row.
    const int r = blockIdx.x;
    if (r < held && threadIdx.x < Size) {
      float highest = -INFINITY;
      const float* lines[kCluster];
#pragma unroll
      for (int n = 0; n < kCluster; n++) {
        lines[n] = cluster.map_shared_rank(mine + r * kLine, n);
        highest = fmaxf(highest, lines[n][Size]);
      }
      const int last = block * Rows + r, outHead = h * p.group + last % p.group, outToken = last / p.group;
      const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[outHead];
      highest = fmaxf(highest, sink);
      float sums = sink == -INFINITY ? 0.f : exp2Fast((sink - highest) * kLog2e), y = 0.f;
#pragma unroll
      for (int n = 0; n < kCluster; n++) {
        const float factor = lines[n][Size] == -INFINITY ? lines[n][Size + 1] : exp2Fast((lines[n][Size] - highest) * kLog2e);
        sums = fmaf(lines[n][Size + 1], factor, sums);
        y = fmaf(lines[n][d], factor, y);
      }
      const int64_t at = p.tokenMajor ? static_cast<int64_t>(outToken) * p.heads + outHead
                                      : (static_cast<int64_t>(b) * p.heads + outHead) * seen.tokens + outToken;
      p.out[at * Size + d] = sums == 0.f ? 0.f : y / sums;
    }
    cluster.sync();
#endif
  }
}

/** Joins the splits of one query row. Grid: rows of a KV head, batch * KV heads. */
template <int Size>
__global__ void joinSplits(const Params p, int splits, int rows, int keys) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  constexpr int kLine = Size + 2;
  const Seen seen(p);
  const int row = blockIdx.x, plane = blockIdx.y, block = row / rows, d = threadIdx.x;
  if (row >= seen.tokens * p.group) return;
  const Cut cut(seen, block, rows, keys, splits, kLeast);
  const int used = max(cut.used, 1);
  const float* part = p.parts + ((static_cast<int64_t>(block) * gridDim.y + plane) * splits * rows + row % rows) * kLine;
  const int head = plane % p.kvHeads * p.group + row % p.group, token = row / p.group, b = plane / p.kvHeads;
  const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[head];
  float highest = sink;
  for (int n = 0; n < used; n++) highest = fmaxf(highest, part[n * rows * kLine + Size]);
  float sum = sink == -INFINITY ? 0.f : exp2Fast((sink - highest) * kLog2e), y = 0.f;
  for (int n = 0; n < used; n++) {
    const float* line = part + n * rows * kLine;
    const float factor = line[Size] == -INFINITY ? line[Size + 1] : exp2Fast((line[Size] - highest) * kLog2e);
    sum = fmaf(line[Size + 1], factor, sum);
    y = fmaf(line[d], factor, y);
  }
  const int64_t at = p.tokenMajor ? static_cast<int64_t>(token) * p.heads + head
                                  : (static_cast<int64_t>(b) * p.heads + head) * seen.tokens + token;
  p.out[at * Size + d] = sum == 0.f ? 0.f : y / sum;
}

template <class C, int Size, int Rows, bool Joined>
cudaError_t start(const Launch& launch, const Params& p, int splits, int planes, int rows) {
  constexpr int kTile = kKeys<C, Joined>, kShared = Ring<C, Size, Joined>::kShared;
  auto* kernel = decode<C, Size, Rows, Joined>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(splits, planes, (rows + Rows - 1) / Rows);
  config.blockDim = dim3(kWarps<C, Joined> * 32);
  config.dynamicSmemBytes = kShared;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = Joined ? 1 : 0;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, p);
  if (Joined || launched != cudaSuccess) return launched;
  config.gridDim = dim3(rows, planes);
  config.blockDim = dim3(Size);
  config.dynamicSmemBytes = 0;
  config.numAttrs = launch.context->major >= 9 ? 1 : 0;
  attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return cudaLaunchKernelEx(&config, joinSplits<Size>, p, splits, Rows, kTile);
}

template <class C, int Size>
cudaError_t start(const Launch& launch, const Params& p, int splits, int planes, int rows) {
  if (splits == 0)
    return rows <= 4 ? start<C, Size, 4, true>(launch, p, kCluster, planes, rows)
                     : start<C, Size, 8, true>(launch, p, kCluster, planes, rows);
  return rows <= 4 ? start<C, Size, 4, false>(launch, p, splits, planes, rows)
                   : start<C, Size, 8, false>(launch, p, splits, planes, rows);
}

}  // namespace

template <class C>
cudaError_t startDecode(const Launch& launch, const DecodeParams& p, int splits, int planes, int rows, int size) {
  return size == 128  ? start<C, 128>(launch, p, splits, planes, rows)
         : size == 64 ? start<C, 64>(launch, p, splits, planes, rows) : cudaErrorInvalidValue;
}

}  // namespace fewbit::sdpa
