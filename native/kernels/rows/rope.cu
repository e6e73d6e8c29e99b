// rope, kv_write and the quantizing of heads: a warp takes some heads of one token, four neighbouring elements a lane.
#include "../general/rope.cuh"
#include "share.cuh"

namespace fewbit::rows {
namespace {

constexpr int kThreads = 256;

struct Heads {
  RopeJob job;
  Coder coders[kStreams];
  bool aligned[kStreams];
  int units[kStreams];  // groups of heads of a stream
  int all;              // of all streams
};

// Calls: inlined at every use they would be most of the kernel.
__device__ __noinline__ Chosen chosenOf(const Rule& rule, Keys extremes) {
  return rule.choose(extremes.lo(), extremes.hi(), 1.0f);
}
__device__ __noinline__ u64 codesOf(const Rule& rule, float4 x, float a, float b) {
  return fourCodes<Coder::any>(rule, x, a, b);
}

__device__ __forceinline__ u64 codesBy(Coder coder, const Rule& rule, float4 x, const Chosen& chosen) {
  switch (coder) {
    case Coder::bfloat: return fourCodes<Coder::bfloat>(rule, x, 0.0f, 0.0f);
    case Coder::half: return fourCodes<Coder::half>(rule, x, 0.0f, 0.0f);
    case Coder::e4m3: return fourCodes<Coder::e4m3>(rule, x, chosen.a, chosen.b);
    case Coder::integers: return fourCodes<Coder::integers>(rule, x, chosen.a, chosen.b);
    default: return codesOf(rule, x, chosen.a, chosen.b);
  }
}

/** Products and their sum are rounded one by one, as the reference rounds them. */
__device__ __forceinline__ float turn(float x, float other, float cosine, float sine, bool upper) {
  const float turned = mul(other, sine);
  return add(mul(x, cosine), upper ? turned : -turned);
}

/** Quantizes heads by themselves, BATCH of them to the rows at `rowOf`: their codes, scales and zero points. */
template <int PIECES, int BATCH, class RowOf>
__device__ __forceinline__ void storeRows(const Stream& s, Coder coder, int size, int heads, const float4 (&x)[BATCH][PIECES],
                                          RowOf rowOf) {
  const int lane = threadIdx.x % kWarp;
  const int bits = s.rule.element.bits;
  const auto store = [&](i64 block, const Chosen& chosen) {
    storeCode(s.words + s.scaleAt, block, s.rule.scale.bits, chosen.scale);
    if (s.rule.zeroKind != ZeroKind::none) storeCode(s.words + s.zeroAt, block, s.rule.zero.bits, chosen.zero);
  };
  Chosen shared = {0u, 0u, 0.0f, 0.0f};
  if (s.columns == 1) {
    // Each lane chooses for one head.
    Keys mine;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      Range range;
#pragma unroll
      for (int p = 0; p < PIECES; p++)
        if (4 * (lane + kWarp * p) < size) range.add(x[b][p]);
      const Keys keys = warpKeys(range.keys());
      if (lane == b) mine = keys;
    }
    shared = chosenOf(s.rule, mine);
    if (lane < heads) store(rowOf(lane), shared);
  }
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    if (b >= heads) break;
    const i64 row = rowOf(b);
    u32* out = s.words + row * s.rowStride;
    Chosen chosen = shared;
    chosen.a = __shfl_sync(kAll, shared.a, b);
    chosen.b = __shfl_sync(kAll, shared.b, b);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int e = 4 * (lane + kWarp * p);
      if (s.columns > 1) {
        Keys keys;
        if (e < size) keys = keysOf(x[b][p]);
        chosen = chosenOf(s.rule, groupKeys(keys, s.width / 4));
        if (e < size && e % s.width == 0) store(row * s.columns + e / s.width, chosen);
      }
      if (e < size) storeCodes(out, e / 4, bits, codesBy(coder, s.rule, x[b][p], chosen));
    }
    std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(out);
    for (int at = size * bits / 8 + lane; at < s.rowStride * 4; at += kWarp) bytes[at] = 0;
  }
}

/** As `storeRows` for codes of 16 bits without scales. */
template <int PIECES, int BATCH, class RowOf>
__device__ __forceinline__ void storeHalves(const Stream& s, Coder coder, int size, int heads, const float4 (&x)[BATCH][PIECES],
                                            RowOf rowOf) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    if (b >= heads) break;
    u32* out = s.words + rowOf(b) * s.rowStride;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int e = 4 * (lane + kWarp * p);
      if (e >= size) continue;
      const u64 codes = coder == Coder::bfloat ? fourCodes<Coder::bfloat>(s.rule, x[b][p], 0.0f, 0.0f)
                                               : fourCodes<Coder::half>(s.rule, x[b][p], 0.0f, 0.0f);
      storeCodes(out, e / 4, 16, codes);
    }
    for (int word = size / 2 + lane; word < s.rowStride; word += kWarp) out[word] = 0u;
  }
}

/** PIECES: fours of a head that a lane holds. BATCH: heads of a warp, loaded before the first is stored. */
template <bool SCALED, int PIECES, int BATCH>
__global__ void __launch_bounds__(kThreads, SCALED && PIECES > 1 ? 2 : 3) rope(const __grid_constant__ Heads h, const u32* symbols) {
  releaseSuccessor();
  const int lane = threadIdx.x % kWarp;
  const u32 unit = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  const u32 token = unit / static_cast<u32>(h.all);
  int group = static_cast<int>(unit - token * static_cast<u32>(h.all));
  int index = 0;
  while (index < h.job.count - 1 && group >= h.units[index]) group -= h.units[index++];
  const Stream& s = h.job.streams[index];
  const bool aligned = h.aligned[index];
  const int size = h.job.size, first = group * BATCH, heads = ::min(BATCH, s.heads - first);
  const float* x = s.x + s.at.at(token, first * size);
  const int half = s.rotary / 2;
  const float* angle = s.rotary == 0 ? nullptr : s.angles + (symbols[s.angleSymbol] + static_cast<i64>(token)) * s.rotary;
  const i64 position = s.target == Target::cache ? static_cast<i64>(symbols[s.cacheSymbol]) + token : 0;
  const bool inside = token < h.job.rows.at(symbols);
  if (SCALED && BATCH == 1) touch(s.rule);
  awaitPredecessor();
  if (!inside) return;

  float4 own[BATCH][PIECES];
#pragma unroll
  for (int b = 0; b < BATCH; b++)
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int e = 4 * (lane + kWarp * p);
      own[b][p] = e < size && b < heads ? loadFour(x + b * size + e, aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  if (s.rotary > 0) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int e = 4 * (lane + kWarp * p);
      const bool turns = e < s.rotary, upper = e >= half;
      const int partner = upper ? e - half : e + half;
      float4 cosine = make_float4(0.0f, 0.0f, 0.0f, 0.0f), sine = cosine;
      if (turns && s.interleaved) {
        const float2 c = *reinterpret_cast<const float2*>(angle + e / 2);
        const float2 d = *reinterpret_cast<const float2*>(angle + half + e / 2);
        cosine = make_float4(c.x, c.x, c.y, c.y);
        sine = make_float4(d.x, d.x, d.y, d.y);
      } else if (turns) {
        cosine = loadFour(angle + (upper ? partner : e), true);
        sine = loadFour(angle + half + (upper ? partner : e), true);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const float4 v = own[b][p];
        float4 o = v;
        if (s.interleaved) {
          if (turns) own[b][p] = make_float4(turn(v.x, v.y, cosine.x, sine.x, false), turn(v.y, v.x, cosine.y, sine.y, true),
                                             turn(v.z, v.w, cosine.z, sine.z, false), turn(v.w, v.z, cosine.w, sine.w, true));
          continue;
        }
        if (PIECES == 1) {
          // The other half of the pairs is in other lanes.
          const int from = partner / 4;
          o = make_float4(__shfl_sync(kAll, v.x, from), __shfl_sync(kAll, v.y, from), __shfl_sync(kAll, v.z, from),
                          __shfl_sync(kAll, v.w, from));
        } else if (turns && b < heads) {
          o = loadFour(x + b * size + partner, aligned);
        }
        if (turns)
          own[b][p] = make_float4(turn(v.x, o.x, cosine.x, sine.x, upper), turn(v.y, o.y, cosine.y, sine.y, upper),
                                  turn(v.z, o.z, cosine.z, sine.z, upper), turn(v.w, o.w, cosine.w, sine.w, upper));
      }
    }
  }
  if (s.target == Target::dense) {
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        const int e = 4 * (lane + kWarp * p);
        if (e < size && b < heads) storeFour(s.out + s.outAt.at(token, (first + b) * size + e), aligned, own[b][p]);
      }
  } else {
    const auto rowOf = [&](int b) {
      return s.target == Target::rows ? static_cast<i64>(token) * s.heads + first + b : s.keyRow(first + b, position);
    };
    if (SCALED) storeRows(s, h.coders[index], size, heads, own, rowOf);
    else storeHalves(s, h.coders[index], size, heads, own, rowOf);
  }
}

template <bool SCALED, int PIECES, int BATCH>
cudaError_t start(const Launch& launch, Heads& h, i64 rows) {
  for (int i = 0; i < h.job.count; i++) {
    h.units[i] = (h.job.streams[i].heads + BATCH - 1) / BATCH;
    h.all += h.units[i];
  }
  const unsigned blocks = static_cast<unsigned>((rows * h.all + 7) / 8);
  return launchOverlapped(launch, rope<SCALED, PIECES, BATCH>, blocks, kThreads, 0, h, launch.deviceSymbols);
}

/** SCALED: whether a stored stream takes more than a conversion. */
template <bool SCALED>
cudaError_t startAny(const Launch& launch, Heads& h, i64 rows) {
  // Few heads are a matter of latency: a warp each.
  const bool many = rows * h.job.units > 64 * launch.context->sms;
  if (h.job.size <= 128) return many ? start<SCALED, 1, SCALED ? 2 : 4>(launch, h, rows) : start<SCALED, 1, 1>(launch, h, rows);
  if (h.job.size <= 256) return many ? start<SCALED, 2, 2>(launch, h, rows) : start<SCALED, 2, 1>(launch, h, rows);
  return start<SCALED, 4, 1>(launch, h, rows);
}

/** args: those of `general/rope_kv`, whose streams are not transformed. */
cudaError_t runRope(const Launch& launch) {
  Heads h{};
  h.job = readRope(launch);
  const i64 rows = h.job.rows.at(launch.symbols);
  if (rows == 0) return cudaSuccess;
  bool scaled = false;
  for (int i = 0; i < h.job.count; i++) {
    const Stream& s = h.job.streams[i];
    const bool dense = s.target == Target::dense;
    h.aligned[i] = inFours(s.at) && (!dense || inFours(s.outAt));
    h.coders[i] = dense ? Coder::bfloat : coderOf(s.rule);
    scaled = scaled || (h.coders[i] != Coder::bfloat && h.coders[i] != Coder::half);
  }
  return scaled ? startAny<true>(launch, h, rows) : startAny<false>(launch, h, rows);
}

}  // namespace
}  // namespace fewbit::rows

namespace fewbit {

extern const Entry kRowsRopeEntries[] = {{"rows/rope_kv", 1, rows::runRope}};
extern const size_t kRowsRopeEntryCount = sizeof kRowsRopeEntries / sizeof(Entry);

}  // namespace fewbit
