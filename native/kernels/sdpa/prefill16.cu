// Prompts over a cache of bf16.
#include "prefill16.cuh"

namespace fewbit {
namespace {

/**
 * q, k, v, [sinks,] out. Further args: parts of q (1: stored bf16; 3: dense float32) and of
 * probabilities (1: declared bf16; 3), row stride and first column of dense [T, ...] queries.
 */
cudaError_t runPrefill16(const Launch& launch) {
  Params p = params(launch, 3);
  const int at = p.sinks == nullptr ? 3 : 4;
  p.out = launch.buffers[at];
  const int64_t queryParts = launch.args[kEnd], weightParts = launch.args[kEnd + 1];
  const int tokens = static_cast<int>(p.tokens.at(launch.symbols));
  if (tokens == 0) return cudaSuccess;
  const int planes = p.batch * p.heads / p.group;
  CUtensorMap q{}, k, v;
  cudaError_t error = cudaSuccess;
  if (queryParts == 1) error = queryMap(&q, p, launch.buffers[0], 2, tokens);
  else p.q = launch.buffers[0];
  p.queryStride = launch.args[kEnd + 2];
  p.queryColumn = launch.args[kEnd + 3];
  if (error != cudaSuccess) return error;
  const uint64_t plane = uint64_t(p.keys) * kSize * 2;
  if ((error = hopper::tensorMap(&k, launch.buffers[1], 2, kSize, p.keys, kSize * 2, planes, plane, kKeys)) != cudaSuccess ||
      (error = hopper::tensorMap(&v, launch.buffers[2], 2, kSize, p.keys, kSize * 2, planes, plane, kKeys)) != cudaSuccess)
    return error;
  if (queryParts == 1)
    return weightParts == 1 ? start16<1, 1, false>(launch, tokens, p, q, k, v) : start16<1, 3, false>(launch, tokens, p, q, k, v);
  return weightParts == 1 ? start16<3, 1, false>(launch, tokens, p, q, k, v) : start16<3, 3, false>(launch, tokens, p, q, k, v);
}

}  // namespace

extern const Entry kSdpaPrefill16Entries[] = {{"sdpa/prefill16", 3, runPrefill16}};
extern const size_t kSdpaPrefill16EntryCount = 1;

}  // namespace fewbit
