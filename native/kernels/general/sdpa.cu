// sdpa over dense or stored operands of any format: every mask, window, soft-cap, sink, page table and rounding of probabilities.
#include "eight.cuh"
#include "fewbit/overlap.cuh"

namespace fewbit::general {
namespace {

/** Scores of keys that are not seen, and what tells them from real ones; differences of scores stay finite. */
constexpr float kNone = -2.0e30f, kReal = -1.5e30f;
/** Mask entries from here down take their key out: -2^100. */
constexpr float kMasked = -1.2676506002282294e30f;
/** What stands for the weight of a key that a query does not see, whose value must not reach it: 0 * NaN is NaN. */
constexpr float kHidden = -1.0f;
constexpr int kWarps = 4;

/** A row of k or v, decoded 8 elements at a time where its format allows. */
struct Rows {
  Stored stored;
  bool eights;
};

struct Attention {
  Extent tokens, keys;
  int batch, heads, kvHeads, size;
  bool tokenMajor;
  bool storedQuery;
  Stored query;
  const float* q;
  Columns qAt;  // of token-major dense rows
  Rows k, v;
  void* out;
  bool rounds16;  // out is bf16, else float32
  float scale, softcap;  // no soft-cap: 0
  bool causal, ring;
  int window;    // 0 without
  int position;  // the symbol; -1 without
  int page;      // 0 without
  const u32* pages;
  const float *mask, *sinks;
  bool maskBatch, maskHeads;
  bool rounds;
  Codec codec;  // of probabilities
  const float* table;
  float roundScale;
};

/** What does not change between the queries of a run. */
struct Run {
  i64 tokens, keys, first, seen;
};

__device__ i64 keyRow(const Attention& a, const Run& run, int b, int h, i64 j) {
  const i64 slot = a.ring ? j % run.keys : j;
  if (a.page == 0) return (static_cast<i64>(b) * a.kvHeads + h) * run.keys + slot;
  return (a.pages[slot / a.page] * static_cast<i64>(a.kvHeads) + h) * a.page + slot % a.page;
}

__device__ i64 firstKey(const Attention& a, i64 p) { return a.window == 0 ? 0 : ::max(p + 1 - a.window, static_cast<i64>(0)); }
__device__ i64 endKey(const Attention& a, const Run& run, i64 p) {
  return ::min(a.causal ? p + 1 : a.window == 0 ? run.seen : p + a.window, run.seen);
}

__device__ float scoreOf(const Attention& a, const Run& run, float dot, int b, int head, i64 t, i64 j) {
  const i64 p = run.first + t;
  if (j < firstKey(a, p) || j >= endKey(a, run, p)) return kNone;
  float s = dot * a.scale;
  if (a.softcap != 0.0f) s = a.softcap * tanhf(s / a.softcap);
  if (a.mask != nullptr) {
    const i64 plane = (a.maskBatch ? b : 0) * static_cast<i64>(a.maskHeads ? a.heads : 1) + (a.maskHeads ? head : 0);
    const float added = a.mask[(plane * run.tokens + t) * run.keys + j];
    if (added <= kMasked) return kNone;
    s += added;
  }
  return s;
}

/** Rows [begin, begin + 32) of k or v, those before `last`, to shared rows of `pitch` floats. */
// A call: inlined it would be most of every instance.
__device__ __noinline__ void loadTile(const Attention& a, const Run& run, const Rows& rows, const float* lut, int b, int h, i64 begin, i64 last,
                         float* tile, int pitch) {
  const int granules = (a.size + 7) / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < 32 * granules; i += kWarps * kWarp) {
    const int line = i / granules, at = i % granules * 8;
    float values[8] = {};
    if (begin + line < last) {
      const i64 row = keyRow(a, run, b, h, begin + line);
      if (rows.eights) {
        values8(rows.stored, lut, row, at, values);
      } else {
#pragma unroll 1
        for (int e = at; e < ::min(at + 8, a.size); e++) tile[line * pitch + e] = rows.stored.value(row, e);
        continue;
      }
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (at + e < a.size) tile[line * pitch + at + e] = values[e];
  }
}

/**
 * Online softmax in tiles of 32 keys (Milakov and Gimelshein 2018; Dao et al. 2022). A block of threads takes ROWS * 4 query rows
 * of one KV head, the rows of all query heads that share it; a warp keeps ROWS of them, a lane a key of the tile and then the
 * elements lane, lane + 32, ... of the result.
 */
template <int PARTS, int ROWS>
__global__ void __launch_bounds__(kWarps* kWarp) attend(const __grid_constant__ Attention a, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  extern __shared__ __align__(16) float memory[];
  __shared__ float tables[2][kLut];
  const int pitch = a.size + 1, qPitch = (a.size + 3) / 4 * 4;
  float* queries = memory;                               // [4 * ROWS][qPitch], zero past the head
  float* tile = memory + kWarps * ROWS * qPitch;         // [32][pitch]
  const float* kLutOf = decodeTable(a.k.stored, tables[0]);
  const float* vLutOf = decodeTable(a.v.stored, tables[1]);
  Run run;
  run.tokens = a.tokens.at(symbols);
  run.keys = a.keys.at(symbols);
  run.first = a.position < 0 ? 0 : symbols[a.position];
  run.seen = a.position < 0 ? run.keys : run.first + run.tokens;
  const int group = a.heads / a.kvHeads;
  const i64 rows = run.tokens * group;
  const int b = static_cast<int>(blockIdx.y) / a.kvHeads, h = static_cast<int>(blockIdx.y) % a.kvHeads;
  const i64 r0 = static_cast<i64>(blockIdx.x) * kWarps * ROWS;
  if (r0 >= rows) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  for (int i = threadIdx.x; i < kWarps * ROWS * qPitch; i += kWarps * kWarp) {
    const int e = i % qPitch;
    const i64 r = r0 + i / qPitch;
    float x = 0.0f;
    if (r < rows && e < a.size) {
      const i64 t = r / group;
      const int head = h * group + static_cast<int>(r % group);
      const i64 row = a.tokenMajor ? t * a.heads + head : (static_cast<i64>(b) * a.heads + head) * run.tokens + t;
      if (a.storedQuery) x = a.query.value(row, e);
      else x = a.tokenMajor ? a.q[a.qAt.at(t, static_cast<i64>(head) * a.size + e)] : a.q[row * a.size + e];
    }
    queries[i] = x;
  }

  float top[ROWS], total[ROWS], sums[ROWS][PARTS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const i64 r = r0 + warp * ROWS + i;
    top[i] = kNone;
    total[i] = 0.0f;
    if (a.sinks != nullptr && r < rows) {
      top[i] = a.sinks[h * group + static_cast<int>(r % group)];
      total[i] = 1.0f;
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) sums[i][part] = 0.0f;
  }
  const i64 from = firstKey(a, run.first + r0 / group);
  const i64 last = endKey(a, run, run.first + (::min(r0 + kWarps * ROWS, rows) - 1) / group);
#pragma unroll 1
  for (i64 begin = from; begin < last; begin += 32) {
    __syncthreads();
    loadTile(a, run, a.k, kLutOf, b, h, begin, last, tile, pitch);
    __syncthreads();
    float dots[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) dots[i] = 0.0f;
    const float* key = tile + lane * pitch;
    const float* query = queries + warp * ROWS * qPitch;
    for (int e = 0; e < a.size; e += 4) {
      const int left = a.size - e;
      const float k0 = key[e], k1 = left > 1 ? key[e + 1] : 0.0f, k2 = left > 2 ? key[e + 2] : 0.0f, k3 = left > 3 ? key[e + 3] : 0.0f;
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const float4 q = *reinterpret_cast<const float4*>(query + i * qPitch + e);
        dots[i] += q.x * k0 + q.y * k1 + q.z * k2 + q.w * k3;
      }
    }
    float weights[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const i64 r = r0 + warp * ROWS + i;
      float score = kNone;
      const i64 t = r / group, key = begin + lane;
      if (r < rows && key < last) score = scoreOf(a, run, dots[i], b, h * group + static_cast<int>(r % group), t, key);
      const float next = fmaxf(top[i], warpMax(score));
      const float factor = top[i] == next ? 1.0f : expf(top[i] - next);
      float p = score > kReal ? expf(score - next) : 0.0f;
      total[i] = total[i] * factor + warpSum(p);
      top[i] = next;
      if (a.rounds) p = a.codec.decode(a.codec.encode(p * a.roundScale, a.table), a.table) / a.roundScale;
      const i64 position = run.first + t;
      weights[i] = key < firstKey(a, position) || key >= endKey(a, run, position) ? kHidden : p;
#pragma unroll
      for (int part = 0; part < PARTS; part++) sums[i][part] *= factor;
    }
    __syncthreads();
    loadTile(a, run, a.v, vLutOf, b, h, begin, last, tile, pitch);
    __syncthreads();
    const int most = static_cast<int>(::min(last - begin, static_cast<i64>(32)));
    for (int j = 0; j < most; j++) {
      float p[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; i++) p[i] = __shfl_sync(kAll, weights[i], j);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int e = part * kWarp + lane;
        const float v = e < a.size ? tile[j * pitch + e] : 0.0f;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
          if (p[i] != kHidden) sums[i][part] += p[i] * v;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const i64 r = r0 + warp * ROWS + i;
    if (r >= rows) continue;
    const i64 t = r / group;
    const int head = h * group + static_cast<int>(r % group);
    const i64 row = a.tokenMajor ? t * a.heads + head : (static_cast<i64>(b) * a.heads + head) * run.tokens + t;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int e = part * kWarp + lane;
      if (e >= a.size) continue;
      const float value = total[i] > 0.0f ? sums[i][part] / total[i] : 0.0f;
      const i64 at = row * a.size + e;
      if (a.rounds16) static_cast<uint16_t*>(a.out)[at] = static_cast<uint16_t>(detail::encode_bf16(value));
      else static_cast<float*>(a.out)[at] = value;
    }
  }
}

Rows readRows(Args& args) {
  Rows rows{};
  rows.stored = args.stored();
  rows.eights = args.flag();
  return rows;
}

template <int PARTS, int ROWS>
cudaError_t launchAttend(const Attention& a, i64 rows, const Launch& launch) {
  const size_t bytes = 4 * (static_cast<size_t>(kWarps * ROWS) * ((a.size + 3) / 4 * 4) + 32 * static_cast<size_t>(a.size + 1));
  const cudaError_t error = allowShared(attend<PARTS, ROWS>, bytes + sizeof(float) * 2 * kLut);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((rows + kWarps * ROWS - 1) / (kWarps * ROWS)), static_cast<unsigned>(a.batch * a.kvHeads));
  return launchOverlapped(launch, attend<PARTS, ROWS>, grid, kWarps * kWarp, bytes, a, launch.deviceSymbols);
}

/** args: as `sdpaArguments` of general-sdpa.ts writes them. */
cudaError_t runSdpa(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  Attention a{};
  a.tokens = extent(args);
  a.keys = extent(args);
  a.batch = args.integer();
  a.heads = args.integer();
  a.kvHeads = args.integer();
  a.size = args.integer();
  a.tokenMajor = args.flag();
  a.storedQuery = args.flag();
  if (a.storedQuery) {
    a.query = args.stored();
  } else {
    a.q = args.buffer<const float>();
    a.qAt = columns(args);
  }
  a.k = readRows(args);
  a.v = readRows(args);
  a.out = args.buffer<void>();
  a.rounds16 = args.flag();
  a.scale = args.real();
  a.softcap = args.real();
  a.causal = args.flag();
  a.ring = args.flag();
  a.window = args.integer();
  a.position = args.integer();
  a.page = args.integer();
  a.pages = args.buffer<const u32>();
  a.mask = args.buffer<const float>();
  a.maskBatch = args.flag();
  a.maskHeads = args.flag();
  a.sinks = args.buffer<const float>();
  a.rounds = args.flag();
  if (a.rounds) {
    a.codec = args.codec();
    a.table = args.table();
    a.roundScale = args.real();
  }
  const i64 rows = a.tokens.at(launch.symbols) * (a.heads / a.kvHeads);
  if (rows == 0 || a.batch == 0) return cudaSuccess;
  const bool few = rows <= 2 * kWarps;
  if (a.size <= 64) return few ? launchAttend<2, 1>(a, rows, launch) : launchAttend<2, 4>(a, rows, launch);
  if (a.size <= 128) return few ? launchAttend<4, 1>(a, rows, launch) : launchAttend<4, 4>(a, rows, launch);
  return few ? launchAttend<8, 1>(a, rows, launch) : launchAttend<8, 4>(a, rows, launch);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

extern const Entry kGeneralSdpaEntries[] = {{"general/sdpa", 2, general::runSdpa}};
extern const size_t kGeneralSdpaEntryCount = sizeof kGeneralSdpaEntries / sizeof(Entry);

}  // namespace fewbit
