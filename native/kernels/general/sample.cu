// sample and moe_route: choices among the logits of a row.
#include "fewbit/overlap.cuh"
#include "sample.cuh"

namespace fewbit::general {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;

struct Shared {
  float floats[kThreads];
  u32 words[kThreads];
  float sums[32];
  float steps[kSteps][32];
};

/** The largest key for which `reached(the sum of amount(i) over the keys from it on)`: some bits of it a pass. */
template <class Amount>
__device__ u32 threshold(const Sample& s, Shared& shared, float wanted, Amount amount) {
  u32 found = 0u;
  for (int shift = 30; shift >= 0; shift -= kBits) {
    float sums[kSteps];
    for (int step = 0; step < kSteps; step++) sums[step] = 0.0f;
    // The topmost pass has two bits left.
    const int most = shift == 30 ? 3 : kSteps;
    for (int i = threadIdx.x; i < s.count; i += kThreads) {
      const u32 own = key(s.logits[i]);
      if (own < found) continue;
      const float part = amount(i);
#pragma unroll
      for (int step = 0; step < kSteps; step++)
        if (step < most && own >= (found | static_cast<u32>(step + 1) << shift)) sums[step] += part;
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const float sum = warpSum(sums[step]);
      if (threadIdx.x % kWarp == 0) shared.steps[step][threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    u32 taken = 0u;
    for (int step = 0; step < most; step++) {
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; warp++) sum += shared.steps[step][warp];
      if (sum >= wanted) taken = static_cast<u32>(step + 1);
    }
    found |= taken << shift;
    __syncthreads();
  }
  return found;
}

/**
 * One block of threads draws a token by the rule of `ir/sample.ts`. Thresholds for top-k and top-p are found over the
 * order-preserving bits of the logits, so nothing is sorted; each thread owns a run of neighbouring ids for the final walk.
 */
__global__ void __launch_bounds__(kThreads) sample(const Sample s) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ Shared shared;
  const int tid = threadIdx.x;
  // The lowest id with the largest logit; a NaN is never larger.
  float most = -INFINITY;
  int best = s.count;
  for (int i = tid; i < s.count; i += kThreads) {
    if (s.logits[i] > most || (best == s.count && s.logits[i] == most)) {
      most = s.logits[i];
      best = i;
    }
  }
  shared.floats[tid] = most;
  shared.words[tid] = static_cast<u32>(best);
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (tid < half) {
      const float other = shared.floats[tid + half];
      const u32 id = shared.words[tid + half];
      const bool empty = shared.words[tid] == static_cast<u32>(s.count);
      if (id < static_cast<u32>(s.count) &&
          (empty || other > shared.floats[tid] || (other == shared.floats[tid] && id < shared.words[tid]))) {
        shared.floats[tid] = other;
        shared.words[tid] = id;
      }
    }
    __syncthreads();
  }
  // All of them NaN: the first.
  const int argmax = shared.words[0] < static_cast<u32>(s.count) ? static_cast<int>(shared.words[0]) : 0;
  const float top = s.logits[argmax];
  __syncthreads();
  float partial = 0.0f;
  for (int i = tid; i < s.count; i += kThreads) partial += expf(s.logits[i] - top);
  const float logTotal = logf(blockSum(partial, shared.sums));

  const float temperature = s.temperature();
  const u32 topK = s.topK();
  const float topP = s.topP();
  int chosen = argmax;
  if (temperature > 0.0f) {
    const auto mass = [&](int i) { return expf((s.logits[i] - top) / temperature); };
    u32 least = 0u;
    // Counts are exact in float32: a vocabulary has fewer than 2^24 tokens.
    if (topK > 0u && topK < static_cast<u32>(s.count))
      least = threshold(s, shared, static_cast<float>(topK), [](int) { return 1.0f; });
    if (topP < 1.0f) {
      partial = 0.0f;
      for (int i = tid; i < s.count; i += kThreads)
        if (key(s.logits[i]) >= least) partial += mass(i);
      const float wanted = topP * blockSum(partial, shared.sums);
      // The largest key whose tokens, with all above it, hold the wanted mass.
      least = ::max(least, threshold(s, shared, wanted, mass));
    }
    const int run = (s.count + kThreads - 1) / kThreads;
    const int begin = ::min(tid * run, s.count), end = ::min(begin + run, s.count);
    partial = 0.0f;
    for (int i = begin; i < end; i++)
      if (key(s.logits[i]) >= least) partial += mass(i);
    const float kept = blockSum(partial, shared.sums);
    shared.floats[tid] = partial;
    shared.words[tid] = static_cast<u32>(s.count);
    __syncthreads();
    const float target = s.uniform() * kept;
    if (partial > 0.0f) {
      float sum = 0.0f;
      for (int i = 0; i < tid; i++) sum += shared.floats[i];
      // The last kept id of a run that ends above the target, or of any run: sums may fall short by rounding.
      u32 word = static_cast<u32>(s.count);
      for (int i = begin; i < end; i++) {
        if (key(s.logits[i]) < least) continue;
        sum += mass(i);
        word = static_cast<u32>(i);
        if (sum > target) break;
      }
      shared.words[tid] = sum <= target ? word | 0x80000000u : word;
    }
    __syncthreads();
    if (tid == 0) {
      u32 fallback = static_cast<u32>(argmax);
      for (int i = 0; i < kThreads; i++) {
        const u32 word = shared.words[i];
        if (word == static_cast<u32>(s.count)) continue;
        fallback = word & 0x7fffffffu;
        if (word < 0x80000000u) break;
      }
      chosen = static_cast<int>(fallback);
    }
  }
  if (tid == 0) s.write(chosen, s.logits[chosen] - top - logTotal);
}

struct Route {
  Extent rows;
  int experts, top;
  bool normalize;
  const float* logits;
  Columns at;
  int* ids;
  float* gates;
};

/** A warp takes a token: experts come out one after another, each the first after the one before in falling order. */
__global__ void route(const Route r, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  const i64 token = blockIdx.x * static_cast<i64>(blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (token >= r.rows.at(symbols)) return;
  const float* logits = r.logits + r.at.at(token, 0);
  // NaN is the smallest; 0 and -0 are equal.
  const auto rank = [&](int i) { return isNan(logits[i]) ? 0u : key(logits[i]); };
  u32 lastRank = 0xffffffffu;
  int lastId = -1;
  float first = 0.0f, sum = 0.0f;
  for (int slot = 0; slot < r.top; slot++) {
    u32 bestRank = 0u;
    int best = r.experts;
    for (int i = lane; i < r.experts; i += kWarp) {
      const u32 own = rank(i);
      const bool after = own < lastRank || (own == lastRank && i > lastId);
      if (after && (best == r.experts || own > bestRank)) {
        bestRank = own;
        best = i;
      }
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
      const u32 otherRank = __shfl_xor_sync(kAll, bestRank, offset);
      const int other = __shfl_xor_sync(kAll, best, offset);
      if (other < r.experts && (best == r.experts || otherRank > bestRank || (otherRank == bestRank && other < best))) {
        bestRank = otherRank;
        best = other;
      }
    }
    lastRank = bestRank;
    lastId = best;
    const float logit = logits[best];
    if (slot == 0) first = logit;
    const float weight = expf(logit - first);
    sum += weight;
    if (lane == 0) {
      r.ids[token * r.top + slot] = best;
      r.gates[token * r.top + slot] = weight;
    }
  }
  if (!r.normalize) {
    sum = 0.0f;
    for (int i = lane; i < r.experts; i += kWarp) sum += expf(logits[i] - first);
    sum = warpSum(sum);
  }
  if (lane == 0)
    for (int slot = 0; slot < r.top; slot++) r.gates[token * r.top + slot] /= sum;
}

cudaError_t runSample(const Launch& launch) {
  return launchOverlapped(launch, sample, 1, kThreads, 0, readSample(launch));
}

/** args: rows (extent), experts, top, normalize, logits, its columns, ids, gates. */
cudaError_t runRoute(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  Route r{};
  r.rows = extent(args);
  r.experts = args.integer();
  r.top = args.integer();
  r.normalize = args.flag();
  r.logits = args.buffer<const float>();
  r.at = columns(args);
  r.ids = args.buffer<int>();
  r.gates = args.buffer<float>();
  const i64 n = r.rows.at(launch.symbols);
  if (n == 0) return cudaSuccess;
  return launchOverlapped(launch, route, static_cast<unsigned>((n + 3) / 4), 4 * kWarp, 0, r, launch.deviceSymbols);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

extern const Entry kSampleEntries[] = {{"general/sample", 1, general::runSample}, {"general/moe_route", 1, general::runRoute}};
extern const size_t kSampleEntryCount = sizeof kSampleEntries / sizeof(Entry);

}  // namespace fewbit
