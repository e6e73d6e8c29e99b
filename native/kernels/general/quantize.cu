// quantize, alone and with what makes its input, by any rule that a device can follow; codes are those of `quantizeTensor`.
#include "fewbit/overlap.cuh"
#include "quantize.cuh"

namespace fewbit::general {
namespace {

/** One word of codes of a row: value(i) is its element i, chosen(column) the parameters of a block. */
template <class Value, class Parameters>
__device__ u32 packWord(const QuantizeJob& job, int word, Value value, Parameters chosen) {
  const int bits = job.rule.element.bits;
  u32 packed = 0u;
  const int begin = word * 32;
  for (int i = begin / bits; i < job.k && i * bits < begin + 32; i++) {
    const float2 p = chosen(job.columns == 1 ? 0 : i / job.width);
    const u32 code = job.rule.codeOf(value(i), p.x, p.y);
    const int bit = i * bits - begin;
    packed |= bit < 0 ? code >> -bit : code << bit;
  }
  return packed;
}

/**
 * One block of threads a row, for blocks that lie in one row: the input is made, looked at and coded in one pass over memory.
 * Shared memory: the row (when `staged`), then two numbers for each block.
 */
__global__ void rows(const QuantizeJob job, bool staged, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  extern __shared__ float row_values[];
  float2* parameters = reinterpret_cast<float2*>(row_values + (staged ? (job.k + 1) / 2 * 2 : 0));
  __shared__ float sums[32];
  __shared__ Keys keys[32];
  __shared__ u32 outerCode;
  const i64 row = blockIdx.x;
  if (row >= job.rows.at(symbols)) return;
  const int tid = threadIdx.x, threads = blockDim.x;

  float factor = 0.0f;
  if (job.in.kind == InputKind::norm) {
    float sum = 0.0f;
    for (int i = tid; i < job.k; i += threads) {
      const float x = job.in.a[job.in.aAt.at(row, i)];
      sum += x * x;
    }
    factor = 1.0f / sqrtf(blockSum(sum, sums) / static_cast<float>(job.in.width) + job.in.eps);
  }
  float outer = job.rule.outerKind == 1 ? job.outer(row) : 1.0f;
  if (staged) {
    for (int i = tid; i < job.k; i += threads) row_values[i] = job.in.at(row, i, factor);
    __syncthreads();
  }
  const auto made = [&](int i) { return staged ? row_values[i] : job.in.at(row, i, factor); };
  if (job.rule.outerKind == 2) {
    Keys all;
    for (int i = tid; i < job.k; i += threads) all.add(made(i));
    all = blockKeys(all, keys);
    if (tid == 0) {
      outerCode = job.rule.outerCode(all.lo(), all.hi());
      storeCode(job.out + job.outerAt, row, job.rule.outer.bits, outerCode);
    }
    __syncthreads();
    outer = job.rule.outer.decode(outerCode);
  }
  const auto value = [&](int i) { return job.rule.prepare(made(i), outer); };

  if (job.scaled && job.columns == 1) {
    Keys all;
    for (int i = tid; i < job.k; i += threads) all.add(value(i));
    all = blockKeys(all, keys);
    if (tid == 0) {
      const Chosen chosen = job.choose(row, all, outer);
      job.store(row, chosen);
      parameters[0] = make_float2(chosen.a, chosen.b);
    }
  } else if (job.scaled) {
    int lanes = 1;
    while (lanes < kWarp && lanes * 8 <= job.width) lanes *= 2;
    const int groups = threads / lanes;
    const int lane = tid % lanes;
    for (int first = 0; first < job.columns; first += groups) {
      const int column = first + tid / lanes;
      Keys all;
      if (column < job.columns)
        for (int i = lane; i < job.width; i += lanes) all.add(value(column * job.width + i));
      all = groupKeys(all, lanes);
      if (lane == 0 && column < job.columns) {
        const Chosen chosen = job.choose(row * job.columns + column, all, outer);
        job.store(row * job.columns + column, chosen);
        parameters[column] = make_float2(chosen.a, chosen.b);
      }
    }
  }
  __syncthreads();
  const auto chosen = [&](int column) { return job.scaled ? parameters[column] : make_float2(0.0f, 0.0f); };
  u32* out = job.out + row * job.rowStride;
  for (int word = tid; word < job.rowStride; word += threads) out[word] = word < job.words ? packWord(job, word, value, chosen) : 0u;
}

/** The extremes of each block's part of each row (of the whole row when `whole`), to scratch. */
__global__ void extremes(const QuantizeJob job, bool whole, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ Keys keys[32];
  const i64 row = blockIdx.x;
  if (row >= job.rows.at(symbols)) return;
  const float outer = whole ? 1.0f : job.outer(row);
  const int columns = whole ? 1 : job.columns;
  const int width = whole ? job.k : job.width;
  for (int column = 0; column < columns; column++) {
    Keys all;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const float x = job.in.at(row, column * width + i, 0.0f);
      all.add(whole ? x : job.rule.prepare(x, outer));
    }
    all = blockKeys(all, keys);
    if (threadIdx.x == 0) {
      job.scratch[2 * (row * columns + column)] = all.low;
      job.scratch[2 * (row * columns + column) + 1] = all.high;
    }
  }
}

/** The second scale level of a whole tensor, from the extremes of its rows. One block of threads. */
__global__ void outerTensor(const QuantizeJob job, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ Keys keys[32];
  const i64 n = job.rows.at(symbols);
  if (n == 0) return;
  Keys all;
  if (job.rule.outerDynamic)
    for (i64 row = threadIdx.x; row < n; row += blockDim.x) {
      Keys other;
      other.low = job.scratch[2 * row];
      other.high = job.scratch[2 * row + 1];
      all.merge(other);
    }
  all = blockKeys(all, keys);
  if (threadIdx.x == 0) storeCode(job.out + job.outerAt, 0, job.rule.outer.bits, job.rule.outerCode(all.lo(), all.hi()));
}

/** Scales and zero points of blocks of several rows, and to scratch what encoding needs. A block of threads each. */
__global__ void choose(const QuantizeJob job, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ Keys keys[32];
  const i64 n = job.rows.at(symbols);
  const i64 block = blockIdx.x;
  if (block >= job.blocks(n)) return;
  const i64 top = job.height == 0 ? 0 : block / job.columns * job.height;
  const i64 end = job.height == 0 ? n : ::min(top + job.height, n);
  Keys all;
  // Of a whole tensor each thread takes many: several loads on their way at once.
#pragma unroll 8
  for (i64 row = top + threadIdx.x; row < end; row += blockDim.x) {
    const uint2 found = reinterpret_cast<const uint2*>(job.scratch)[row * job.columns + block % job.columns];
    Keys other;
    other.low = found.x;
    other.high = found.y;
    all.merge(other);
  }
  all = blockKeys(all, keys);
  if (threadIdx.x == 0) {
    const Chosen chosen = job.choose(block, all, job.outer(top));
    job.store(block, chosen);
    job.scratch[job.parametersAt + 2 * block] = bitcast<u32>(chosen.a);
    job.scratch[job.parametersAt + 2 * block + 1] = bitcast<u32>(chosen.b);
  }
}

/** Codes of blocks of several rows, a word to a thread. */
__global__ void encode(const QuantizeJob job, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  const i64 count = job.rows.at(symbols) * job.rowStride;
  for (i64 at = blockIdx.x * static_cast<i64>(blockDim.x) + threadIdx.x; at < count; at += static_cast<i64>(gridDim.x) * blockDim.x) {
    const i64 row = at / job.rowStride;
    const int word = static_cast<int>(at % job.rowStride);
    const float outer = job.outer(row);
    const i64 band = job.height == 0 ? 0 : row / job.height * job.columns;
    const auto value = [&](int i) { return job.rule.prepare(job.in.at(row, i, 0.0f), outer); };
    const auto chosen = [&](int column) {
      const u32* p = job.scratch + job.parametersAt + 2 * (band + column);
      return make_float2(bitcast<float>(p[0]), bitcast<float>(p[1]));
    };
    job.out[at] = word < job.words ? packWord(job, word, value, chosen) : 0u;
  }
}

/**
 * The mean of all blocks' scales, added up in float64, block after block, as the definition does: the others only fetch. To
 * scratch word 0.
 */
__global__ void scalerMean(const QuantizeJob job, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ float fetched[1024];
  const i64 count = job.blocks(job.rows.at(symbols));
  double sum = 0.0;
  for (i64 first = 0; first < count; first += blockDim.x) {
    if (first + threadIdx.x < count) fetched[threadIdx.x] = bitcast<float>(job.out[job.scaleAt + first + threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) {
      const int most = static_cast<int>(::min(static_cast<i64>(blockDim.x), count - first));
      for (int i = 0; i < most; i++) sum = __dadd_rn(sum, static_cast<double>(fetched[i]));
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const double mean = __ddiv_rn(sum, static_cast<double>(count == 0 ? 1 : count));
    job.scratch[0] = bitcast<u32>(job.rule.rnd(__double2float_rn(mean)));
  }
}

/** Quantizes the scales themselves, so many at a time: a block of threads takes one group. */
__global__ void scalers(const QuantizeJob job, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  __shared__ Keys keys[32];
  const i64 count = job.blocks(job.rows.at(symbols));
  const i64 begin = blockIdx.x * static_cast<i64>(job.rule.scalers);
  if (begin >= count) return;
  const i64 end = ::min(begin + job.rule.scalers, count);
  const float mean = bitcast<float>(job.scratch[0]);
  u32* scales = job.out + job.scaleAt;
  Keys all;
  for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) all.add(fabsf(job.rule.scalerOffset(bitcast<float>(scales[i]), mean)));
  all = blockKeys(all, keys);
  const float factor = job.rule.scalerFactor(all.hi());
  for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float scale = job.rule.scaler(bitcast<float>(scales[i]), mean, factor);
    scales[i] = isNan(scale) ? kNan : bitcast<u32>(scale);
  }
}

int threadsFor(int k) { return k <= 512 ? 128 : k <= 2048 ? 256 : 512; }

/** The bytes of a row that are kept in shared memory; longer rows are read again. */
constexpr size_t kStaged = 64 * 1024;

cudaError_t runRows(const Launch& launch) {
  const QuantizeJob job = readQuantizeJob(launch);
  const i64 n = job.rows.at(launch.symbols);
  if (n == 0) return cudaSuccess;
  const size_t row = static_cast<size_t>(job.k + 1) / 2 * 8;
  const bool staged = row <= kStaged;
  const size_t bytes = (staged ? row : 0) + (job.scaled ? static_cast<size_t>(job.columns) * 8 : 0);
  // The kernel's own arrays count as well: less than 1 KiB.
  const cudaError_t error = allowShared(rows, bytes + 1024);
  if (error != cudaSuccess) return error;
  return launchOverlapped(launch, rows, static_cast<unsigned>(n), threadsFor(job.k), bytes, job, staged, launch.deviceSymbols);
}

cudaError_t extremesOf(const Launch& launch, bool whole) {
  const QuantizeJob job = readQuantizeJob(launch);
  const i64 n = job.rows.at(launch.symbols);
  if (n == 0) return cudaSuccess;
  return launchOverlapped(launch, extremes, static_cast<unsigned>(n), threadsFor(whole ? job.k : job.width), 0, job, whole,
                          launch.deviceSymbols);
}
cudaError_t runExtremes(const Launch& launch) { return extremesOf(launch, false); }
cudaError_t runRowExtremes(const Launch& launch) { return extremesOf(launch, true); }

cudaError_t runOuter(const Launch& launch) {
  return launchOverlapped(launch, outerTensor, 1, 512, 0, readQuantizeJob(launch), launch.deviceSymbols);
}

i64 blocksOf(const QuantizeJob& job, i64 n) { return n == 0 ? 0 : (job.height == 0 ? 1 : (n + job.height - 1) / job.height) * job.columns; }

cudaError_t runChoose(const Launch& launch) {
  const QuantizeJob job = readQuantizeJob(launch);
  const i64 count = blocksOf(job, job.rows.at(launch.symbols));
  if (count == 0) return cudaSuccess;
  return launchOverlapped(launch, choose, static_cast<unsigned>(count), job.height == 0 ? 1024 : 128, 0, job, launch.deviceSymbols);
}

cudaError_t runEncode(const Launch& launch) {
  const QuantizeJob job = readQuantizeJob(launch);
  const i64 count = job.rows.at(launch.symbols) * job.rowStride;
  if (count == 0) return cudaSuccess;
  return launchOverlapped(launch, encode, gridFor(count, 256, *launch.context), 256, 0, job, launch.deviceSymbols);
}

cudaError_t runScalerMean(const Launch& launch) {
  return launchOverlapped(launch, scalerMean, 1, 1024, 0, readQuantizeJob(launch), launch.deviceSymbols);
}

cudaError_t runScalers(const Launch& launch) {
  const QuantizeJob job = readQuantizeJob(launch);
  const i64 groups = (blocksOf(job, job.rows.at(launch.symbols)) + job.rule.scalers - 1) / job.rule.scalers;
  if (groups == 0) return cudaSuccess;
  return launchOverlapped(launch, scalers, static_cast<unsigned>(groups), 256, 0, job, launch.deviceSymbols);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

/** All of them take the buffers and args of `quantizeJob` in general-quantize.ts. */
extern const Entry kQuantizeEntries[] = {
    {"general/quantize_rows", 1, general::runRows},
    {"general/quantize_extremes", 1, general::runExtremes},
    {"general/quantize_row_extremes", 1, general::runRowExtremes},
    {"general/quantize_outer", 1, general::runOuter},
    {"general/quantize_choose", 1, general::runChoose},
    {"general/quantize_encode", 1, general::runEncode},
    {"general/quantize_scaler_mean", 1, general::runScalerMean},
    {"general/quantize_scalers", 1, general::runScalers},
};
extern const size_t kQuantizeEntryCount = sizeof kQuantizeEntries / sizeof(Entry);

}  // namespace fewbit
