// rope, hadamard, kv_write and the quantizing of heads, one after another over one head of one token.
#include "fewbit/overlap.cuh"
#include "rope.cuh"

namespace fewbit::general {
namespace {

/** A head has at most this many elements: one a thread. */
constexpr int kMost = 512;

/** Quantizes a row by itself: thread i holds element i. Codes, scales and zero points are those of `quantizeTensor`. */
__device__ void storeRow(const Stream& s, i64 row, int size, float x) {
  __shared__ u32 codes[kMost], lows[kMost], highs[kMost];
  __shared__ float2 parameters[kMost];
  const int tid = threadIdx.x;
  float2 mine = make_float2(0.0f, 0.0f);
  if (s.columns > 0) {
    if (tid < s.columns) {
      lows[tid] = 0xffffffffu;
      highs[tid] = 0u;
    }
    __syncthreads();
    if (tid < size) {
      atomicMin(&lows[tid / s.width], lowKey(x));
      atomicMax(&highs[tid / s.width], highKey(x));
    }
    __syncthreads();
    if (tid < s.columns) {
      const Chosen chosen = s.rule.choose(fromOrderKey(lows[tid]), fromOrderKey(highs[tid]), 1.0f);
      storeCode(s.words + s.scaleAt, row * s.columns + tid, s.rule.scale.bits, chosen.scale);
      if (s.rule.zeroKind != ZeroKind::none) storeCode(s.words + s.zeroAt, row * s.columns + tid, s.rule.zero.bits, chosen.zero);
      parameters[tid] = make_float2(chosen.a, chosen.b);
    }
    __syncthreads();
    if (tid < size) mine = parameters[tid / s.width];
  }
  if (tid < size) codes[tid] = s.rule.codeOf(x, mine.x, mine.y);
  __syncthreads();
  const int bits = s.rule.element.bits;
  for (int word = tid; word < s.rowStride; word += blockDim.x) {
    u32 packed = 0u;
    for (int i = word * 32 / bits; i < size && i * bits < word * 32 + 32; i++) {
      const int bit = i * bits - word * 32;
      packed |= bit < 0 ? codes[i] >> -bit : codes[i] << bit;
    }
    s.words[row * s.rowStride + word] = packed;
  }
}

/** A block of threads takes one head of one token. */
__global__ void rope(const RopeJob job, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ float exchanged[kMost];
  const i64 token = blockIdx.x / job.units;
  int head = static_cast<int>(blockIdx.x % job.units);
  if (token >= job.rows.at(symbols)) return;
  int index = 0;
  while (index < job.count - 1 && head >= job.streams[index].heads) head -= job.streams[index++].heads;
  const Stream& s = job.streams[index];
  const int e = threadIdx.x;
  const float* x = s.x + s.at.at(token, head * job.size);
  float value = e < job.size ? x[e] : 0.0f;
  if (e < s.rotary) {
    const int half = s.rotary / 2;
    const bool upper = s.interleaved ? e % 2 == 1 : e >= half;
    const int pair = s.interleaved ? e / 2 : e % half;
    const int other = s.interleaved ? e ^ 1 : (e + half) % s.rotary;
    const float* angle = s.angles + (symbols[s.angleSymbol] + token) * s.rotary;
    // Products and their sum are rounded one by one, as the reference rounds them.
    const float turned = mul(x[other], angle[half + pair]);
    value = add(mul(value, angle[pair]), upper ? turned : -turned);
  }
  if (s.transform != 0.0f) {
    for (int stride = 1; stride < job.size; stride *= 2) {
      exchanged[e] = value;
      __syncthreads();
      const float other = exchanged[e ^ stride];
      __syncthreads();
      value = add((e & stride) != 0 ? -value : value, other);
    }
    value = mul(value, s.transform);
  }
  if (s.target == Target::dense) {
    if (e < job.size) s.out[s.outAt.at(token, head * job.size + e)] = value;
    return;
  }
  const i64 row = s.target == Target::rows ? token * s.heads + head : s.keyRow(head, symbols[s.cacheSymbol] + token);
  storeRow(s, row, job.size, value);
}

cudaError_t runRope(const Launch& launch) {
  const RopeJob job = readRope(launch);
  const i64 blocks = job.rows.at(launch.symbols) * job.units;
  if (blocks == 0) return cudaSuccess;
  int threads = kWarp;
  while (threads < job.size) threads *= 2;
  return launchOverlapped(launch, rope, static_cast<unsigned>(blocks), threads, 0, job, launch.deviceSymbols);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

extern const Entry kRopeEntries[] = {{"general/rope_kv", 1, general::runRope}};
extern const size_t kRopeEntryCount = sizeof kRopeEntries / sizeof(Entry);

}  // namespace fewbit
