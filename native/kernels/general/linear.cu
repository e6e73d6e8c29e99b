// linear and moe_linear for any formats of x and the weights. `gemv` reads weights once for a few rows of x, `tile` goes through
// shared memory for many, `plain` takes formats whose blocks or table entries fit neither.
#include "eight.cuh"
#include "fewbit/overlap.cuh"

namespace fewbit::general {
namespace {

enum class Epilogue : int { none, residual, unary, gated };

struct Linear {
  Extent rows;  // of the output
  int n, k;
  bool stored;
  Stored xs;       // x, when it is stored
  const float* x;  // else
  Columns xAt;
  bool aligned;  // rows of a dense x start on 16 bytes
  int parts;
  Stored weights[2];  // gate and up, or the only one
  const float* bias[2];
  Epilogue epilogue;
  Unary fn;
  float cap;
  const float* residual;
  Columns residualAt;
  float* out;
  Columns outAt;
  bool integer;     // both operands are integers: products are summed exactly
  bool scaleAfter;  // no scale changes along k
  int segment;      // elements that share all scales, at most 32: what is summed exactly otherwise
  // moe_linear: the expert of each output row, the experts here, and the rows of the output to a row of x.
  const int* ids;
  int experts, firstExpert, heldExperts, rowsOfX;

  /** The row of the weights that output n of row m takes; -1 where the expert is not here. */
  __device__ i64 weightRow(i64 m, int at) const {
    if (ids == nullptr) return at;
    const int id = ::min(::max(ids[m], 0), experts - 1) - firstExpert;
    return id < 0 || id >= heldExperts ? -1 : static_cast<i64>(id) * n + at;
  }
  __device__ void store(i64 m, int at, float y0, float y1) const {
    if (bias[0] != nullptr) y0 += bias[0][at];
    if (epilogue == Epilogue::gated) {
      if (bias[1] != nullptr) y1 += bias[1][at];
      y0 = apply(fn, y0, cap) * y1;
    } else if (epilogue == Epilogue::unary) {
      y0 = apply(fn, y0, cap);
    } else if (epilogue == Epilogue::residual) {
      y0 += residual[residualAt.at(m, at)];
    }
    out[outAt.at(m, at)] = y0;
  }
};

template <bool INTEGER>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<true> {
  using type = int;
};

__device__ void dense8(const Linear& l, i64 row, int at, float out[8]) {
  const float* x = l.x + l.xAt.at(row, at);
  if (l.aligned && at + 8 <= l.k) {
    const float4 a = reinterpret_cast<const float4*>(x)[0], b = reinterpret_cast<const float4*>(x)[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = at + i < l.k ? x[i] : 0.0f;
}

template <bool INTEGER>
__device__ void x8(const Linear& l, const float* lut, i64 row, int at, typename ElementOf<INTEGER>::type out[8]) {
  if constexpr (INTEGER) codes8(l.xs, lut, row, at, out);
  else if (l.stored) values8(l.xs, lut, row, at, out);
  else dense8(l, row, at, out);
}
template <bool INTEGER>
__device__ void w8(const Stored& w, const float* lut, i64 row, int at, typename ElementOf<INTEGER>::type out[8]) {
  if constexpr (INTEGER) codes8(w, lut, row, at, out);
  else values8(w, lut, row, at, out);
}

constexpr int kGemvWarps = 4, kGemvThreads = kGemvWarps * kWarp;
/** Elements of x that lie in shared memory at a time, and the runs of 8 that they are. */
constexpr int kChunk = 1024, kRuns = kChunk / 8;

template <class T>
struct alignas(16) Four {
  T at[4];
};

/** A warp an output feature, for ROWS rows of x, which all warps share decoded. */
template <bool INTEGER, int ROWS>
__global__ void __launch_bounds__(kGemvThreads) gemv(const Linear l, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  using T = typename ElementOf<INTEGER>::type;
  __shared__ float tables[2][kLut];
  // Halves of 8 elements apart: neighbouring lanes read neighbouring banks.
  __shared__ Four<T> shared[ROWS][2][kRuns];
  __shared__ float xScale[ROWS][INTEGER ? kRuns : 1];
  const float* wLut = decodeTable(l.weights[0], tables[0]);
  const float* xLut = l.stored ? decodeTable(l.xs, tables[1]) : nullptr;
  const i64 m = l.rows.at(symbols);
  const int blocks = (l.n + kGemvWarps - 1) / kGemvWarps;
  const i64 m0 = static_cast<i64>(blockIdx.x / blocks) * ROWS;
  if (m0 >= m) return;
  const int at = ::min(static_cast<int>(blockIdx.x % blocks) * kGemvWarps + static_cast<int>(threadIdx.x) / kWarp, l.n - 1);
  const int lane = threadIdx.x % kWarp;
  const i64 weightRow = l.weightRow(m0, at);
  if (weightRow < 0) return;
  // Lanes whose 8 elements share a run of exact integers.
  const int sharers = l.segment / 8;
  float first[ROWS], second[ROWS];
#pragma unroll 1
  for (int part = 0; part < l.parts; part++) {
    const Stored& w = l.weights[part];
    float sum[ROWS];
    int whole[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      sum[r] = 0.0f;
      whole[r] = 0;
    }
#pragma unroll 1
    for (int chunk = 0; chunk < l.k; chunk += kChunk) {
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < ROWS * kRuns; i += kGemvThreads) {
        const int r = i / kRuns, run = i % kRuns, from = chunk + run * 8;
        const i64 xRow = (m0 + r) / l.rowsOfX;
        T values[8] = {};
        const bool here = m0 + r < m && from < l.k;
        if (here) x8<INTEGER>(l, xLut, xRow, from, values);
        shared[r][0][run] = {{values[0], values[1], values[2], values[3]}};
        shared[r][1][run] = {{values[4], values[5], values[6], values[7]}};
        if (INTEGER && here) xScale[r][run] = l.xs.scale(xRow, from);
      }
      __syncthreads();
#pragma unroll 1
      for (int run = lane; run - lane < kRuns && chunk + (run - lane) * 8 < l.k; run += kWarp) {
        const int from = chunk + run * 8;
        T wv[8];
        w8<INTEGER>(w, wLut, weightRow, from, wv);
        const float scale = INTEGER && !l.scaleAfter && from < l.k ? w.scale(weightRow, from) : 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          const Four<T> a = shared[r][0][run], b = shared[r][1][run];
          T dot = 0;
#pragma unroll
          for (int i = 0; i < 4; i++) dot += a.at[i] * wv[i];
#pragma unroll
          for (int i = 0; i < 4; i++) dot += b.at[i] * wv[4 + i];
          if constexpr (INTEGER) {
            if (l.scaleAfter) {
              whole[r] += dot;
            } else {
              for (int offset = 1; offset < sharers; offset <<= 1) dot += __shfl_xor_sync(kAll, dot, offset);
              if (lane % sharers == 0 && from < l.k) sum[r] += static_cast<float>(dot) * (scale * xScale[r][run]);
            }
          } else {
            sum[r] += dot;
          }
        }
      }
    }
    const float scale = INTEGER && l.scaleAfter ? w.scale(weightRow, 0) : 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float y = INTEGER && l.scaleAfter ? static_cast<float>(warpSum(whole[r])) * (scale * xScale[r][0]) : warpSum(sum[r]);
      if (part == 0) first[r] = y;
      second[r] = y;
    }
  }
  if (lane != 0 || static_cast<int>(blockIdx.x % blocks) * kGemvWarps + static_cast<int>(threadIdx.x) / kWarp >= l.n) return;
#pragma unroll 1
  for (int r = 0; r < ROWS && m0 + r < m; r++) {
    float y0 = 0.0f, y1 = 0.0f;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
      if (i == r) y0 = first[i], y1 = second[i];
    l.store(m0 + r, at, y0, y1);
  }
}

constexpr int kTile = 64, kStep = 32, kPitch = kTile + 4, kMicro = 4;
constexpr int kTileThreads = (kTile / kMicro) * (kTile / kMicro);
static_assert(kTileThreads * 8 == kTile * kStep, "a thread decodes 8 elements of each operand");

/** 64 x 64 outputs to a block, 4 x 4 to a thread; operands are decoded into shared memory 32 elements of k at a time. */
template <bool INTEGER>
__global__ void __launch_bounds__(kTileThreads) tile(const Linear l, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  using T = typename ElementOf<INTEGER>::type;
  __shared__ float tables[2][kLut];
  __shared__ __align__(16) T xTile[kStep][kPitch];
  __shared__ __align__(16) T wTile[kStep][kPitch];
  __shared__ float xScale[kStep / 8][kTile], wScale[kStep / 8][kTile];
  const float* wLut = decodeTable(l.weights[0], tables[0]);
  const float* xLut = l.stored ? decodeTable(l.xs, tables[1]) : nullptr;
  const i64 m = l.rows.at(symbols);
  const int columns = (l.n + kTile - 1) / kTile;
  const i64 m0 = static_cast<i64>(blockIdx.x / columns) * kTile;
  const int n0 = static_cast<int>(blockIdx.x % columns) * kTile;
  if (m0 >= m) return;
  const int tid = threadIdx.x;
  const int line = tid % kTile, granule = tid / kTile;
  const int tm = tid / (kTile / kMicro) * kMicro, tn = tid % (kTile / kMicro) * kMicro;
  float first[kMicro][kMicro], second[kMicro][kMicro];
#pragma unroll 1
  for (int part = 0; part < l.parts; part++) {
    const Stored& w = l.weights[part];
    float sum[kMicro][kMicro];
    T run[kMicro][kMicro];
#pragma unroll
    for (int i = 0; i < kMicro; i++)
#pragma unroll
      for (int j = 0; j < kMicro; j++) {
        sum[i][j] = 0.0f;
        run[i][j] = 0;
      }
#pragma unroll 1
    for (int k0 = 0; k0 < l.k; k0 += kStep) {
      const int from = k0 + granule * 8;
      T values[8];
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] = 0;
      const bool xHere = m0 + line < m && from < l.k, wHere = n0 + line < l.n && from < l.k;
      if (xHere) x8<INTEGER>(l, xLut, m0 + line, from, values);
#pragma unroll
      for (int i = 0; i < 8; i++) xTile[granule * 8 + i][line] = values[i];
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] = 0;
      if (wHere) w8<INTEGER>(w, wLut, n0 + line, from, values);
#pragma unroll
      for (int i = 0; i < 8; i++) wTile[granule * 8 + i][line] = values[i];
      if (INTEGER && !l.scaleAfter) {
        xScale[granule][line] = xHere ? l.xs.scale(m0 + line, from) : 0.0f;
        wScale[granule][line] = wHere ? w.scale(n0 + line, from) : 0.0f;
      }
      __syncthreads();
      const auto step = [&](int at) {
        T a[kMicro], b[kMicro];
#pragma unroll
        for (int i = 0; i < kMicro; i++) a[i] = xTile[at][tm + i];
#pragma unroll
        for (int j = 0; j < kMicro; j++) b[j] = wTile[at][tn + j];
#pragma unroll
        for (int i = 0; i < kMicro; i++)
#pragma unroll
          for (int j = 0; j < kMicro; j++) run[i][j] += a[i] * b[j];
      };
      if (!INTEGER || l.scaleAfter) {
#pragma unroll 8
        for (int at = 0; at < kStep; at++) step(at);
      } else {
#pragma unroll 1
        for (int begin = 0; begin < kStep; begin += l.segment) {
#pragma unroll 8
          for (int at = begin; at < begin + l.segment; at++) step(at);
#pragma unroll
          for (int i = 0; i < kMicro; i++)
#pragma unroll
            for (int j = 0; j < kMicro; j++) {
              sum[i][j] += static_cast<float>(run[i][j]) * (wScale[begin / 8][tn + j] * xScale[begin / 8][tm + i]);
              run[i][j] = 0;
            }
        }
      }
      __syncthreads();
    }
    // Scales that were left for the end take the place of the last step's.
    if (INTEGER && l.scaleAfter) {
      if (granule == 0) {
        xScale[0][line] = m0 + line < m ? l.xs.scale(m0 + line, 0) : 0.0f;
        wScale[0][line] = n0 + line < l.n ? w.scale(n0 + line, 0) : 0.0f;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kMicro; i++)
#pragma unroll
      for (int j = 0; j < kMicro; j++) {
        float y = INTEGER && !l.scaleAfter ? sum[i][j] : static_cast<float>(run[i][j]);
        if (INTEGER && l.scaleAfter) y *= wScale[0][tn + j] * xScale[0][tm + i];
        if (part == 0) first[i][j] = y;
        second[i][j] = y;
      }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kMicro; i++)
#pragma unroll
    for (int j = 0; j < kMicro; j++)
      if (m0 + tm + i < m && n0 + tn + j < l.n) l.store(m0 + tm + i, n0 + tn + j, first[i][j], second[i][j]);
}

/** A warp an output, element by element: blocks and table entries of any extents. */
__global__ void plain(const Linear l, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  const i64 output = blockIdx.x * static_cast<i64>(blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const i64 row = output / l.n;
  const int at = static_cast<int>(output % l.n);
  if (row >= l.rows.at(symbols)) return;
  const i64 weightRow = l.weightRow(row, at);
  if (weightRow < 0) return;
  const i64 xRow = row / l.rowsOfX;
  float y[2] = {0.0f, 0.0f};
  for (int part = 0; part < l.parts; part++) {
    const Stored& w = l.weights[part];
    const auto product = [&](int i) {
      return static_cast<int>(l.xs.raw(xRow, i) - l.xs.shift(xRow, i)) * static_cast<int>(w.raw(weightRow, i) - w.shift(weightRow, i));
    };
    if (l.integer && l.scaleAfter) {
      int sum = 0;
      for (int i = lane; i < l.k; i += kWarp) sum += product(i);
      y[part] = static_cast<float>(warpSum(sum)) * (w.scale(weightRow, 0) * l.xs.scale(xRow, 0));
    } else if (l.integer) {
      float sum = 0.0f;
      for (int begin = lane * l.segment; begin < l.k; begin += kWarp * l.segment) {
        int run = 0;
        for (int i = begin; i < ::min(begin + l.segment, l.k); i++) run += product(i);
        sum += static_cast<float>(run) * (w.scale(weightRow, begin) * l.xs.scale(xRow, begin));
      }
      y[part] = warpSum(sum);
    } else {
      float sum = 0.0f;
      for (int i = lane; i < l.k; i += kWarp)
        sum += (l.stored ? l.xs.value(xRow, i) : l.x[l.xAt.at(xRow, i)]) * w.value(weightRow, i);
      y[part] = warpSum(sum);
    }
  }
  if (lane == 0) l.store(row, at, y[0], y[1]);
}

Linear readLinear(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  Linear l{};
  l.rows = extent(args);
  l.n = args.integer();
  l.k = args.integer();
  l.stored = args.flag();
  if (l.stored) {
    l.xs = args.stored();
  } else {
    l.x = args.buffer<const float>();
    l.xAt = columns(args);
    l.aligned = l.xAt.stride % 4 == 0 && l.xAt.column % 4 == 0;
  }
  l.parts = args.integer();
  for (int part = 0; part < l.parts; part++) {
    l.weights[part] = args.stored();
    l.bias[part] = args.buffer<const float>();
  }
  l.epilogue = static_cast<Epilogue>(args.next());
  l.fn = static_cast<Unary>(args.next());
  l.cap = args.real();
  l.residual = args.buffer<const float>();
  l.residualAt = columns(args);
  l.out = args.buffer<float>();
  l.outAt = columns(args);
  l.integer = args.flag();
  l.scaleAfter = args.flag();
  l.segment = args.integer();
  l.ids = args.buffer<const int>();
  l.experts = args.integer();
  l.firstExpert = args.integer();
  l.heldExperts = args.integer();
  l.rowsOfX = args.integer();
  return l;
}

template <int ROWS>
cudaError_t launchGemv(const Linear& l, i64 m, const Launch& launch) {
  const i64 blocks = (l.n + kGemvWarps - 1) / kGemvWarps * ((m + ROWS - 1) / ROWS);
  if (l.integer) return launchOverlapped(launch, gemv<true, ROWS>, static_cast<unsigned>(blocks), kGemvThreads, 0, l, launch.deviceSymbols);
  return launchOverlapped(launch, gemv<false, ROWS>, static_cast<unsigned>(blocks), kGemvThreads, 0, l, launch.deviceSymbols);
}

cudaError_t runGemv(const Launch& launch) {
  const Linear l = readLinear(launch);
  const i64 m = l.rows.at(launch.symbols);
  if (m == 0 || l.n == 0) return cudaSuccess;
  if (m == 1 || l.ids != nullptr) return launchGemv<1>(l, m, launch);
  return launchGemv<8>(l, m, launch);
}

cudaError_t runTile(const Launch& launch) {
  const Linear l = readLinear(launch);
  const i64 m = l.rows.at(launch.symbols);
  if (m == 0 || l.n == 0) return cudaSuccess;
  const i64 blocks = (l.n + kTile - 1) / kTile * ((m + kTile - 1) / kTile);
  if (l.integer) return launchOverlapped(launch, tile<true>, static_cast<unsigned>(blocks), kTileThreads, 0, l, launch.deviceSymbols);
  return launchOverlapped(launch, tile<false>, static_cast<unsigned>(blocks), kTileThreads, 0, l, launch.deviceSymbols);
}

cudaError_t runPlain(const Launch& launch) {
  const Linear l = readLinear(launch);
  const i64 outputs = l.rows.at(launch.symbols) * l.n;
  if (outputs == 0) return cudaSuccess;
  return launchOverlapped(launch, plain, static_cast<unsigned>((outputs + 7) / 8), 8 * kWarp, 0, l, launch.deviceSymbols);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

/** All of them take the buffers and args of `linearArguments` in general-linear.ts. */
extern const Entry kGeneralLinearEntries[] = {
    {"general/linear_gemv", 1, general::runGemv},
    {"general/linear_tile", 1, general::runTile},
    {"general/linear_plain", 1, general::runPlain},
};
extern const size_t kGeneralLinearEntryCount = sizeof kGeneralLinearEntries / sizeof(Entry);

}  // namespace fewbit
