// Prompts over caches of 8-bit codes with a scale a row. Codes are exact in bf16: they are made once, for all query heads that read them.
#include <algorithm>

#include "prefill16.cuh"

namespace fewbit {
namespace {

/** What is cached, as codes and one float32 scale a row. */
struct Coded {
  const uint8_t* codes;
  const float* scales;
  uint4* wide;  // bf16 [planes, padded, 128]
  float* factors;  // [planes, padded]
};

/** Makes the codes of keys (z = 0) and values (1) bf16, up to the last that is seen; the rest of its tile is zero. Grid: 32 rows, planes, 2. */
template <class C>
__global__ void __launch_bounds__(256) widenCache(const Coded k, const Coded v, const Params p) {
  const Seen seen(p);
  const bool keys = blockIdx.z == 0;
  const Coded cache = {keys ? k.codes : v.codes, keys ? k.scales : v.scales, keys ? k.wide : v.wide, keys ? k.factors : v.factors};
  const int key = blockIdx.x * 32 + threadIdx.x / 8, plane = blockIdx.y;
  if (key >= (seen.keys + kKeys - 1) / kKeys * kKeys) return;
  const bool any = key < seen.keys;
  const int64_t from = static_cast<int64_t>(plane) * p.keys + key, to = static_cast<int64_t>(plane) * p.padded + key;
  alignas(16) uint32_t pairs[8] = {};
  if (any) {
    const uint4 codes = *reinterpret_cast<const uint4*>(cache.codes + from * kSize + threadIdx.x % 8 * 16);
    widen<C>(codes.x, pairs);
    widen<C>(codes.y, pairs + 2);
    widen<C>(codes.z, pairs + 4);
    widen<C>(codes.w, pairs + 6);
  }
  for (int n = 0; n < 2; n++) cache.wide[to * 16 + threadIdx.x % 8 * 2 + n] = reinterpret_cast<const uint4*>(pairs)[n];
  if (threadIdx.x % 8 == 0) cache.factors[to] = any ? cache.scales[from] : 0.f;
}

/**
 * q, k, v, [sinks,] out, scratch. Further args: bits of query elements (32: dense; 16: stored bf16; 8: e4m3 with a scale a row), parts of
 * probabilities (1: declared bf16 or coarser; 3), row stride and first column of dense [T, ...] queries, whether codes are e4m3 (int8 else), and
 * byte offsets of the scales of q, k and v. Scratch: of k and of v, for every plane and key, padded to tiles, 256 bytes and a float32.
 */
cudaError_t runPrefillScaled(const Launch& launch) {
  enum { kQueryBits = kEnd, kWeightParts, kStride, kColumn, kFloat8, kScalesOf };
  const int64_t* a = launch.args;
  Params p = params(launch, 3);
  const int at = p.sinks == nullptr ? 3 : 4;
  p.out = launch.buffers[at];
  const int tokens = static_cast<int>(p.tokens.at(launch.symbols));
  if (tokens == 0) return cudaSuccess;
  const int planes = p.batch * p.heads / p.group;
  p.padded = (p.keys + kKeys - 1) / kKeys * kKeys;
  const auto scales = [&](int i) {
    return reinterpret_cast<const float*>(static_cast<const char*>(launch.buffers[i]) + a[kScalesOf + i]);
  };
  const int64_t wide = static_cast<int64_t>(planes) * p.padded;
  auto* scratch = static_cast<uint8_t*>(launch.buffers[at + 1]);
  auto* factors = reinterpret_cast<float*>(scratch + 2 * wide * kSize * 2);
  const auto coded = [&](int i) {
    return Coded{static_cast<const uint8_t*>(launch.buffers[1 + i]), scales(1 + i),
                 reinterpret_cast<uint4*>(scratch + i * wide * kSize * 2), factors + i * wide};
  };
  p.kScale = factors;
  p.vScale = factors + wide;
  // Only keys that this run sees; with a position, none past it and the run's tokens.
  const int seen = p.position < 0 ? p.keys : std::min<int64_t>(p.keys, static_cast<int64_t>(launch.symbols[p.position]) + tokens);
  const dim3 grid((seen + kKeys - 1) / kKeys * (kKeys / 32), planes, 2);
  if (a[kFloat8]) widenCache<sdpa::E4m3><<<grid, 256, 0, launch.stream>>>(coded(0), coded(1), p);
  else widenCache<sdpa::Int8><<<grid, 256, 0, launch.stream>>>(coded(0), coded(1), p);
  CUtensorMap q{}, k, v;
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t bits = a[kQueryBits];
  if (bits == 16) error = queryMap(&q, p, launch.buffers[0], 2, tokens);
  else p.q = launch.buffers[0];
  if (bits == 8) p.qScale = scales(0);
  p.queryStride = a[kStride];
  p.queryColumn = a[kColumn];
  if (error != cudaSuccess) return error;
  static_assert(sizeof(Shared16<3, true>) + 1024 - 128 <= 227 * 1024);
  const uint64_t plane = uint64_t(p.padded) * kSize * 2;
  if ((error = hopper::tensorMap(&k, coded(0).wide, 2, kSize, p.padded, kSize * 2, planes, plane, kKeys)) != cudaSuccess ||
      (error = hopper::tensorMap(&v, coded(1).wide, 2, kSize, p.padded, kSize * 2, planes, plane, kKeys)) != cudaSuccess)
    return error;
  const bool rounds = a[kWeightParts] == 1;
  if (bits == 32) return rounds ? start16<3, 1, true>(launch, tokens, p, q, k, v) : start16<3, 3, true>(launch, tokens, p, q, k, v);
  return rounds ? start16<1, 1, true>(launch, tokens, p, q, k, v) : start16<1, 3, true>(launch, tokens, p, q, k, v);
}

}  // namespace

extern const Entry kSdpaPrefillScaledEntries[] = {{"sdpa/prefill_scaled", 2, runPrefillScaled}};
extern const size_t kSdpaPrefillScaledEntryCount = 1;

}  // namespace fewbit
