// sample by a cluster of blocks: every logit is read once and stays in a register, blocks tell each other sums and extremes.
#include "../general/sample.cuh"
#include "cluster.cuh"
#include "codes.cuh"
#include "fewbit/overlap.cuh"

namespace fewbit::rows {
namespace {

constexpr int kBlocks = kCluster;
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
static_assert(kBlocks == 8 && kWarps == kWarp, "lanes add up what blocks and warps found");

/** The shared memory of a block that the others of its cluster write: a slot of each, twice, so that a write never meets a read. */
struct Exchange {
  float sums[2][kSteps][kBlocks];
  u32 keys[2][kBlocks];
  int ids[2][kBlocks];
};

struct Shared {
  Exchange exchange;
  float sums[kSteps][kWarps];
  u32 keys[kWarps];
  int ids[kWarps];
};

/** The larger key and, of equal ones, the lower id. */
__device__ __forceinline__ void prefer(u32& bestKey, int& best, u32 otherKey, int other) {
  if (otherKey > bestKey || (otherKey == bestKey && other < best)) {
    bestKey = otherKey;
    best = other;
  }
}

/** One block's part of the draw. FOURS: fours of logits of a thread. */
template <int FOURS>
struct Draw {
  const Sample& s;
  Shared& shared;
  float* masses;  // of this thread's logits, kThreads apart
  int begin;      // this block's first id
  int turn = 0;
  u32 keys[4 * FOURS];  // of this thread's logits; 0 past the last

  __device__ float logit(int i) const { return fromOrderKey(keys[i]); }
  __device__ int id(int i) const { return begin + 4 * (i / 4 * kThreads + static_cast<int>(threadIdx.x)) + i % 4; }
  __device__ float& mass(int i) const { return masses[i * kThreads + threadIdx.x]; }

  /** Sums over a warp: lane l has that of own[l / 4], in fewer exchanges than one sum after another takes. */
  __device__ static float warpSums(const float (&own)[kSteps]) {
    const int lane = threadIdx.x % kWarp;
    float four[4], two[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float upper = i < kSteps - 4 ? own[i + 4] : 0.0f;
      four[i] = ((lane & 16) != 0 ? upper : own[i]) + __shfl_xor_sync(kAll, (lane & 16) != 0 ? own[i] : upper, 16);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      two[i] = ((lane & 8) != 0 ? four[i + 2] : four[i]) + __shfl_xor_sync(kAll, (lane & 8) != 0 ? four[i] : four[i + 2], 8);
    float one = ((lane & 4) != 0 ? two[1] : two[0]) + __shfl_xor_sync(kAll, (lane & 4) != 0 ? two[0] : two[1], 4);
    one += __shfl_xor_sync(kAll, one, 2);
    return one + __shfl_xor_sync(kAll, one, 1);
  }
  /** What the blocks found, from each of them, the same in all threads of the cluster. Each lane has the sums of its warp. */
  __device__ const float (&sumsOf(float ofWarp, int count))[kSteps][kBlocks] {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (lane % 4 == 0 && lane / 4 < count) shared.sums[lane / 4][warp] = ofWarp;
    __syncthreads();
    turn ^= 1;
    if (warp < count) {
      const float sum = warpSum(shared.sums[warp][lane]);
      if (lane < kBlocks) tell(reinterpret_cast<u32*>(&shared.exchange.sums[turn][warp][blockRank()]), lane, bitcast<u32>(sum));
    }
    clusterSync();
    return shared.exchange.sums[turn];
  }
  __device__ float sum(float own) {
    const auto& all = sumsOf(warpSum(own), 1);
    float total = 0.0f;
    for (int block = 0; block < kBlocks; block++) total += all[0][block];
    return total;
  }
  /** The best of all threads' proposals. */
  __device__ void best(u32& bestKey, int& best) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const auto acrossWarp = [&] {
      for (int offset = 16; offset > 0; offset >>= 1) {
        const u32 otherKey = __shfl_xor_sync(kAll, bestKey, offset);
        prefer(bestKey, best, otherKey, __shfl_xor_sync(kAll, best, offset));
      }
    };
    acrossWarp();
    if (lane == 0) {
      shared.keys[warp] = bestKey;
      shared.ids[warp] = best;
    }
    __syncthreads();
    turn ^= 1;
    if (warp == 0) {
      bestKey = shared.keys[lane];
      best = shared.ids[lane];
      acrossWarp();
      if (lane < kBlocks) {
        tell(&shared.exchange.keys[turn][blockRank()], lane, bestKey);
        tell(reinterpret_cast<u32*>(&shared.exchange.ids[turn][blockRank()]), lane, static_cast<u32>(best));
      }
    }
    clusterSync();
    bestKey = shared.exchange.keys[turn][0];
    best = shared.exchange.ids[turn][0];
    for (int block = 1; block < kBlocks; block++)
      prefer(bestKey, best, shared.exchange.keys[turn][block], shared.exchange.ids[turn][block]);
  }
  __device__ static int blockRank() { return static_cast<int>(blockIdx.x); }  // the grid is one cluster

  /** The largest key for which the sum of amount(i) over the keys from it on reaches `wanted`: some bits of it a pass. */
  template <class Amount>
  __device__ u32 threshold(float wanted, Amount amount) {
    u32 found = 0u;
    float above = 0.0f;  // this thread's sum over keys that every later step has
    u32 ceiling = 0xffffffffu;
    for (int shift = 30; shift >= 0; shift -= kBits) {
      const int most = shift == 30 ? 3 : kSteps;  // the topmost pass has two bits left
      float sums[kSteps] = {};
#pragma unroll
      for (int i = 0; i < 4 * FOURS; i++) {
        const u32 own = keys[i];
        if (own < found || own > ceiling) continue;
        const float part = amount(i);
#pragma unroll
        for (int step = 0; step < kSteps; step++)
          if (step < most && own >= (found | static_cast<u32>(step + 1) << shift)) sums[step] += part;
      }
      float own[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; step++) own[step] = sums[step] + above;
      const auto& all = sumsOf(warpSums(own), most);
      // Four lanes add up what the blocks found for a step: the largest step that reaches it is taken.
      const int lane = threadIdx.x % kWarp;
      float sum = 0.0f;
      if (lane < 4 * most) sum = all[lane / 4][2 * (lane % 4)] + all[lane / 4][2 * (lane % 4) + 1];
      sum += __shfl_xor_sync(kAll, sum, 1);
      sum += __shfl_xor_sync(kAll, sum, 2);
      const u32 reached = __ballot_sync(kAll, lane < 4 * most && sum >= wanted);
      const u32 taken = reached == 0u ? 0u : static_cast<u32>(35 - __clz(reached)) / 4u;
#pragma unroll
      for (int step = 0; step < kSteps; step++)
        if (static_cast<u32>(step) == taken && step < most) above += sums[step];
      if (taken < static_cast<u32>(most)) ceiling = (found | (taken + 1u) << shift) - 1u;
      found |= taken << shift;
    }
    return found;
  }

  /** The first id at which the sum of kept masses passes `share` of all of it; the last kept one where rounding leaves none. */
  __device__ int walk(u32 least, float share, int argmax) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    float kept[FOURS], before[FOURS], total = 0.0f;
    const auto keeps = [&](int i) { return keys[i] >= ::max(least, 1u); };
    // Ids run through a thread's four, then through the block's threads, then to its next fours.
#pragma unroll
    for (int c = 0; c < FOURS; c++) {
      kept[c] = 0.0f;
      for (int e = 0; e < 4; e++)
        if (keeps(4 * c + e)) kept[c] += mass(4 * c + e);
      float upTo = kept[c];
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const float lower = __shfl_up_sync(kAll, upTo, offset);
        if (lane >= offset) upTo += lower;
      }
      __syncthreads();
      if (lane == kWarp - 1) shared.sums[0][warp] = upTo;
      __syncthreads();
      float inBlock = shared.sums[0][lane];
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const float lower = __shfl_up_sync(kAll, inBlock, offset);
        if (lane >= offset) inBlock += lower;
      }
      const float earlier = __shfl_sync(kAll, inBlock, warp == 0 ? 0 : warp - 1);
      before[c] = total + (warp == 0 ? 0.0f : earlier) + (upTo - kept[c]);
      total += __shfl_sync(kAll, inBlock, kWarp - 1);
    }
    __syncthreads();
    const float mine = threadIdx.x == 0 ? total : 0.0f;
    const auto& blocks = sumsOf(warpSum(mine), 1)[0];
    float all = 0.0f, earlier = 0.0f;
    for (int block = 0; block < kBlocks; block++) {
      if (block == blockRank()) earlier = all;
      all += blocks[block];
    }
    const float target = share * all;
    // The lowest id past the target has the largest key; else the highest kept id does.
    u32 bestKey = 0u;
    int chosen = argmax;
#pragma unroll
    for (int c = 0; c < FOURS; c++) {
      float sum = earlier + before[c];
      for (int e = 0; e < 4; e++) {
        if (!keeps(4 * c + e)) continue;
        sum += mass(4 * c + e);
        const int at = id(4 * c + e);
        prefer(bestKey, chosen, sum > target ? 0xffffffffu - static_cast<u32>(at) : 1u + static_cast<u32>(at), at);
      }
    }
    best(bestKey, chosen);
    return chosen;
  }
};

template <int FOURS>
__global__ void __launch_bounds__(kThreads) sample(const Sample s, const bool aligned) {
  extern __shared__ float masses[];
  __shared__ Shared shared;
  releaseSuccessor();
  clusterSync();  // a block's shared memory is written by others only once it runs
  awaitPredecessor();
  const float temperature = s.temperature();
  Draw<FOURS> draw{s, shared, masses, static_cast<int>(blockIdx.x) * 4 * FOURS * kThreads};
#pragma unroll
  for (int c = 0; c < FOURS; c++) {
    const int first = draw.id(4 * c);
    if (first + 4 <= s.count) {
      const float4 four = loadFour(s.logits + first, aligned);
      draw.keys[4 * c] = key(four.x), draw.keys[4 * c + 1] = key(four.y), draw.keys[4 * c + 2] = key(four.z);
      draw.keys[4 * c + 3] = key(four.w);
    } else {
      for (int e = 0; e < 4; e++) draw.keys[4 * c + e] = first + e < s.count ? key(s.logits[first + e]) : 0u;
    }
  }
  // The lowest id with the largest logit; a NaN is never larger, and where all are NaN the first is taken.
  u32 topKey = 0u;
  int argmax = 0;
#pragma unroll
  for (int i = 0; i < 4 * FOURS; i++)
    if (draw.keys[i] != 0u && !isNan(draw.logit(i))) prefer(topKey, argmax, draw.keys[i], draw.id(i));
  draw.best(topKey, argmax);
  const float top = topKey == 0u ? s.logits[argmax] : fromOrderKey(topKey);
  float partial = 0.0f;
#pragma unroll
  for (int i = 0; i < 4 * FOURS; i++)
    if (draw.keys[i] != 0u) partial += expf(draw.logit(i) - top);
  const float logTotal = logf(draw.sum(partial));

  int chosen = argmax;
  if (temperature > 0.0f) {
#pragma unroll
    for (int i = 0; i < 4 * FOURS; i++) draw.mass(i) = expf((draw.logit(i) - top) / temperature);
    u32 least = 0u;
    // Counts are exact in float32: a vocabulary has fewer than 2^24 tokens.
    if (s.topK() > 0u && s.topK() < static_cast<u32>(s.count))
      least = draw.threshold(static_cast<float>(s.topK()), [](int) { return 1.0f; });
    if (s.topP() < 1.0f) {
      partial = 0.0f;
#pragma unroll
      for (int i = 0; i < 4 * FOURS; i++)
        if (draw.keys[i] >= ::max(least, 1u)) partial += draw.mass(i);
      const float wanted = s.topP() * draw.sum(partial);
      // The largest key whose tokens, with all above it, hold the wanted mass.
      least = ::max(least, draw.threshold(wanted, [&](int i) { return draw.mass(i); }));
    }
    chosen = draw.walk(least, s.uniform(), argmax);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) s.write(chosen, (chosen == argmax ? top : s.logits[chosen]) - top - logTotal);
}

template <int FOURS>
cudaError_t start(const Launch& launch, const Sample& s) {
  const auto kernel = sample<FOURS>;
  const size_t bytes = sizeof(float) * 4 * FOURS * kThreads;
  const cudaError_t error = allowShared(kernel, bytes + sizeof(Shared));
  if (error != cudaSuccess) return error;
  const bool aligned = reinterpret_cast<std::uintptr_t>(s.logits) % 16 == 0;
  return launchClusters(launch, kernel, dim3(kBlocks), dim3(kBlocks), kThreads, bytes, s, aligned);
}

/** args: those of `general/sample`. Up to kMostLogits of them; compute capability 9 on. */
cudaError_t runSample(const Launch& launch) {
  const Sample s = readSample(launch);
  const int perFour = 4 * kThreads * kBlocks;
  if (s.count <= perFour) return start<1>(launch, s);
  if (s.count <= 4 * perFour) return start<4>(launch, s);
  if (s.count <= 8 * perFour) return start<8>(launch, s);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fewbit::rows

namespace fewbit {

extern const Entry kRowsSampleEntries[] = {{"rows/sample", 1, rows::runSample}};
extern const size_t kRowsSampleEntryCount = sizeof kRowsSampleEntries / sizeof(Entry);

}  // namespace fewbit
