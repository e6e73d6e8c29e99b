// Attention of few query rows over many keys: what its kernels are given, and the caches that they read.
#pragma once
#include "fewbit/launch.hpp"

namespace fewbit::sdpa {

struct Operand {
  const uint8_t* rows;
  const uint8_t* scales;
  const uint8_t* zeros;
};

struct DecodeParams {
  const void* q;
  const float* queryScales;  // of e4m3 queries, one a row
  Operand k, v;
  const float *mask, *sinks;
  const uint32_t *pages, *symbols;
  void* out;
  float* parts;        // of splits, each (size + 2) floats a row
  uint32_t* arrivals;  // of splits: one a KV head and block of rows, zero between launches
  Extent tokens, keys;  // keys: room for them in k, or all of them without a position
  int position, page, ring, heads, kvHeads, group, causal, window, tokenMajor, maskBatch, maskHeads, queryBits, rounds, early;  // rounds: out is bf16; early: keys before the position were there before this run
  int64_t queryStride, queryColumn;
  float scale, softcap, round;  // round: probabilities times this become e4m3; 0 keeps them
};

// How a cache stores its elements: `cache.cuh`.
struct F32;
struct F16;
struct Bf16;
struct Int8;
struct E4m3;
struct UInt4;

/**
 * Enqueues attention over a cache of `C`. `splits`: blocks among which the keys of a KV head are divided, or 0 for a cluster; `planes`:
 * batch * KV heads; `rows`: query rows of a KV head at most; `size`: elements of a head, 64 or 128.
 */
template <class C>
cudaError_t startDecode(const Launch& launch, const DecodeParams& p, int splits, int planes, int rows, int size);

}  // namespace fewbit::sdpa
