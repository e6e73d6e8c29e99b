// The entry of attention over a cache.
#include <algorithm>
#include <cstring>

#include "decode.hpp"

namespace fewbit {
namespace {

enum Arg {
  kSize, kCodec, kHeads, kKvHeads, kBatch, kScale, kSoftcap, kCausal, kWindow, kTokens, kTokensSymbol, kKeyCount, kKeySymbol,
  kPosition, kPage, kRing, kTokenMajor, kQueryBits, kQueryStride, kQueryColumn, kMask, kSinks, kPages, kMaskBatch, kMaskHeads,
  kKeyScales, kKeyZeros, kValueScales, kValueZeros, kSplits, kRound, kQueryScales, kRounds, kEarly
};

float floatArg(int64_t arg) {
  const uint32_t bits = static_cast<uint32_t>(arg);
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

/**
 * q, k, v, [mask,] [sinks,] [pages,] out[, scratch, arrivals]. k and v bind the whole stored tensor; the args have the byte offsets of their
 * scales and zero points. Splits: blocks at most among which the keys of a KV head are divided, for each of which scratch has
 * room for (Size + 2) floats a query row, rows rounded up to 8, and arrivals a zero for each KV head and 8 rows; or 0 for a cluster, which
 * needs neither.
 */
cudaError_t runDecode(const Launch& launch) {
  const int64_t* a = launch.args;
  sdpa::DecodeParams p{};
  int at = 3;
  auto buffer = [&](int i) { return launch.buffers[i]; };
  auto operand = [&](int i, int64_t scales, int64_t zeros) {
    const auto* base = static_cast<const uint8_t*>(buffer(i));
    return sdpa::Operand{base, base + scales, base + zeros};
  };
  p.q = buffer(0);
  p.k = operand(1, a[kKeyScales], a[kKeyZeros]);
  p.v = operand(2, a[kValueScales], a[kValueZeros]);
  if (a[kMask]) p.mask = static_cast<const float*>(buffer(at++));
  if (a[kSinks]) p.sinks = static_cast<const float*>(buffer(at++));
  if (a[kPages]) p.pages = static_cast<const uint32_t*>(buffer(at++));
  p.out = buffer(at++);
  p.symbols = launch.deviceSymbols;
  p.tokens = {a[kTokens], a[kTokensSymbol]};
  p.keys = {a[kKeyCount], a[kKeySymbol]};
  p.position = static_cast<int>(a[kPosition]);
  p.page = static_cast<int>(a[kPage]);
  p.ring = static_cast<int>(a[kRing]);
  p.heads = static_cast<int>(a[kHeads]);
  p.kvHeads = static_cast<int>(a[kKvHeads]);
  p.group = p.heads / p.kvHeads;
  p.causal = static_cast<int>(a[kCausal]);
  p.window = static_cast<int>(a[kWindow]);
  p.tokenMajor = static_cast<int>(a[kTokenMajor]);
  p.maskBatch = static_cast<int>(a[kMaskBatch]);
  p.maskHeads = static_cast<int>(a[kMaskHeads]);
  p.queryBits = static_cast<int>(a[kQueryBits]);
  p.queryStride = a[kQueryStride];
  p.queryColumn = a[kQueryColumn];
  p.scale = floatArg(a[kScale]);
  p.softcap = floatArg(a[kSoftcap]);
  p.round = floatArg(a[kRound]);
  p.queryScales = reinterpret_cast<const float*>(static_cast<const char*>(p.q) + a[kQueryScales]);
  p.rounds = static_cast<int>(a[kRounds]);
  p.early = static_cast<int>(a[kEarly]);
  const int planes = static_cast<int>(a[kBatch]) * p.kvHeads;
  const int rows = static_cast<int>(p.tokens.at(launch.symbols)) * p.group;
  if (rows == 0) return cudaSuccess;
  // A block for every multiprocessor.
  const int blocks = planes * ((rows + 7) / 8);
  const int splits = a[kSplits] == 0 ? 0 : std::clamp<int>(launch.context->sms / blocks, 1, static_cast<int>(a[kSplits]));
  if (splits != 0) {
    p.parts = static_cast<float*>(buffer(at));
    p.arrivals = static_cast<uint32_t*>(buffer(at + 1));
  }
  const auto start = [&](auto run) { return run(launch, p, splits, planes, rows, static_cast<int>(a[kSize])); };
  // In the order of `CACHES` in sdpa-decode.ts.
  switch (a[kCodec]) {
    case 0: return start(sdpa::startDecode<sdpa::F32>);
    case 1: return start(sdpa::startDecode<sdpa::F16>);
    case 2: return start(sdpa::startDecode<sdpa::Bf16>);
    case 3: return start(sdpa::startDecode<sdpa::Int8>);
    case 4: return start(sdpa::startDecode<sdpa::E4m3>);
    case 5: return start(sdpa::startDecode<sdpa::UInt4>);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

extern const Entry kSdpaDecodeEntries[] = {{"sdpa/decode", 2, runDecode}};
extern const size_t kSdpaDecodeEntryCount = 1;

}  // namespace fewbit
