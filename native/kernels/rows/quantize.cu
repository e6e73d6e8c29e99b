// quantize, alone and with what makes its input, where blocks lie in rows: values are loaded once and stay in registers.
#include "../general/quantize.cuh"
#include "share.cuh"

namespace fewbit::rows {
namespace {

/** How the scales of a row lie. */
enum class Grain : int {
  none,    // none, or each of them known
  row,     // one for the row
  blocks,  // one for a power of two of fours, at most a warp's
  tensor,  // one for all rows, chosen before: what encoding needs of it lies in scratch
};

__device__ __forceinline__ float4 relu(float4 x) {
  const auto one = [](float value) { return value < 0.0f ? 0.0f : value; };
  return make_float4(one(x.x), one(x.y), one(x.z), one(x.w));
}

/** What the fused ops before the quantize make of four elements. */
__device__ __forceinline__ float4 activate(const Input& in, float4 x) {
  if (in.fn == Unary::relu) return relu(x);
  return make_float4(apply(in.fn, x.x, in.cap), apply(in.fn, x.y, in.cap), apply(in.fn, x.z, in.cap), apply(in.fn, x.w, in.cap));
}

// A call: inlined it would be most of the kernel.
__device__ __noinline__ Chosen chosenOf(const QuantizeJob& job, i64 block, Keys extremes, float outer) {
  return job.choose(block, extremes, outer);
}

/** Chooses and stores the parameters of blocks that some lanes of a warp share. Each lane chooses for one of them. */
template <int FOURS>
__device__ __forceinline__ void chooseBlocks(const QuantizeJob& job, const Place& place, i64 band, float outer,
                                             const float4 (&x)[FOURS], float2 (&parameters)[FOURS]) {
  constexpr int kRound = FOURS < 4 ? FOURS : 4;  // fours of a lane whose blocks are no more than the lanes
  const int lanes = job.width / 4, groups = kWarp / lanes;
  const int lane = threadIdx.x % kWarp;
  // Of this lane: the round's four and the lanes whose block it chooses for.
  const int turn = lane / groups, source = lane % groups * lanes;
#pragma unroll
  for (int start = 0; start < FOURS; start += kRound) {
    Keys mine;
#pragma unroll
    for (int i = 0; i < kRound; i++) {
      Keys keys;
      if (place.holds(start + i)) keys = keysOf(x[start + i]);
      keys = groupKeys(keys, lanes);
      const u32 low = __shfl_sync(kAll, keys.low, source), high = __shfl_sync(kAll, keys.high, source);
      if (turn == i) {
        mine.low = low;
        mine.high = high;
      }
    }
    // The four that the first lane of the block holds.
    const int four = (start + ::min(turn, kRound - 1)) * place.lanes + place.lane - lane + source;
    const bool real = turn < kRound && four < place.fours;
    const i64 block = band + (real ? (place.first + 4 * four) / job.width : 0);
    const Chosen chosen = chosenOf(job, block, mine, outer);
    if (real) job.store(block, chosen);
#pragma unroll
    for (int i = 0; i < kRound; i++) {
      const int from = i * groups + lane / lanes;
      parameters[start + i] = make_float2(__shfl_sync(kAll, chosen.a, from), __shfl_sync(kAll, chosen.b, from));
    }
  }
}

/** The extremes of a row of which a thread has `x`, for every thread of its team. `shared` is used once. */
template <int FOURS>
__device__ __forceinline__ Keys keysOf(const float4 (&x)[FOURS], const Place& place, Keys* shared) {
  Range range;
#pragma unroll
  for (int i = 0; i < FOURS; i++)
    if (place.holds(i)) range.add(x[i]);
  return teamKeys(range.keys(), place, shared);
}

/** What is left of a row's last sixteen bytes is zeros. */
__device__ __forceinline__ void endRow(u32* out, int k, int rowStride, int bits, const Place& place) {
  std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(out);
#pragma unroll 1
  for (int at = k / 4 * bits / 2 + place.lane; at < rowStride * 4; at += place.lanes) bytes[at] = 0;
}

/** The fours of a row that a thread keeps: the input, or what the fused ops before the quantize make of it. */
template <int FOURS>
struct Values {
  static constexpr bool kEarly = FOURS <= 4;  // weights wait in registers, where there are enough
  float4 weight[FOURS], x[FOURS];

  /** Before the predecessor is complete. */
  __device__ __forceinline__ void prefetch(const float* weights, const Place& place) {
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      if (kEarly && place.holds(i)) weight[i] = loadFour(weights + place.element(i), true);
  }
  __device__ __forceinline__ void norm(const float* weights, const Place& place, bool cluster, int width, float eps, Sums& sums) {
    const float factor = normFactor(x, place, cluster, width, eps, sums);
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      if (place.holds(i)) x[i] = normed(x[i], factor, kEarly ? weight[i] : loadFour(weights + place.element(i), true));
  }
  __device__ __forceinline__ void make(const Input& in, const Place& place, const Share& share, bool aligned, Sums& sums) {
    const i64 row = place.row;
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      x[i] = place.holds(i) ? loadFour(in.a + in.aAt.at(row, place.element(i)), aligned) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (in.kind == InputKind::norm) {
      norm(in.weight, place, share.cluster > 1, in.width, in.eps, sums);
    } else if (in.kind != InputKind::plain) {
#pragma unroll
      for (int i = 0; i < FOURS; i++) {
        if (!place.holds(i)) continue;
        x[i] = activate(in, x[i]);
        if (in.kind == InputKind::gated) x[i] = times(x[i], loadFour(in.b + in.bAt.at(row, place.element(i)), aligned));
      }
    }
  }
};

/** The extremes of each row, to scratch, as the general kernel leaves them where a block spans all rows. */
template <int FOURS>
__global__ void __launch_bounds__(kMostThreads) extremes(const __grid_constant__ QuantizeJob job, const __grid_constant__ Share share,
                                                         const bool aligned, const u32* symbols) {
  __shared__ Sums sums;
  __shared__ Keys found[32];
  releaseSuccessor();
  const Place place(share, job.k);
  Values<FOURS> values;
  if (job.in.kind == InputKind::norm) values.prefetch(job.in.weight, place);
  const bool inside = place.row < job.rows.at(symbols);
  awaitPredecessor();
  if (!inside) return;
  values.make(job.in, place, share, aligned, sums);
  const Keys all = keysOf(values.x, place, found);
  if (place.lane == 0) {
    job.scratch[2 * place.row] = all.low;
    job.scratch[2 * place.row + 1] = all.high;
  }
}

template <Coder CODER, int FOURS>
__global__ void __launch_bounds__(kMostThreads) quantize(const __grid_constant__ QuantizeJob job, const __grid_constant__ Share share,
                                                         const Grain grain, const bool aligned, const u32* symbols) {
  __shared__ Sums sums;
  __shared__ Keys found[32];
  __shared__ Exchange<2> foundByBlocks;
  releaseSuccessor();
  if (share.cluster > 1) {
    if (threadIdx.x == 0) {
      sums.blocks.open(1);
      foundByBlocks.open(2);
    }
    clusterSync();
  }
  const Place place(share, job.k);
  constexpr bool kScaled = CODER != Coder::bfloat && CODER != Coder::half;
  Values<FOURS> values;
  if (job.in.kind == InputKind::norm) values.prefetch(job.in.weight, place);
  if (kScaled) touch(job.rule);
  const bool direct = CODER == Coder::e4m3 && job.rule.kind == RuleKind::amax;  // no call, which takes its way through all rules
  if (kScaled && FOURS == 1 && !direct && job.given == nullptr) {
    // Of few rows most of the time is latency, that of code as well: it is fetched while the predecessor ends.
    Keys ones;
    ones.add(1.0f);
    const Chosen unused = chosenOf(job, 0, ones, 1.0f);
    asm volatile("" ::"r"(unused.scale), "f"(unused.a));
  }
  const bool inside = place.row < job.rows.at(symbols);
  awaitPredecessor();
  if (!inside) return;
  const i64 row = place.row;
  values.make(job.in, place, share, aligned, sums);
  const float4(&x)[FOURS] = values.x;

  float outer = 1.0f;
  if (kScaled && job.rule.outerKind == 1) {
    const u32 code = job.rule.outerCode(0.0f, 0.0f);  // it is given
    outer = job.rule.outer.decode(code);
    if (row == 0 && place.element(0) == 0) storeCode(job.out + job.outerAt, 0, job.rule.outer.bits, code);
  }
  // A block of several rows has its scale given; its first row stores it.
  const i64 band = (job.height == 1 ? row : job.height == 0 ? 0 : row / job.height) * job.columns;
  const bool stores = job.height == 1 || (job.height == 0 ? row == 0 : row % job.height == 0);
  Chosen chosen = {0u, 0u, 0.0f, 0.0f};
  if (kScaled && grain == Grain::row) {
    Keys all;
    if (job.given == nullptr) {
      all = keysOf(x, place, found);
      if (share.cluster > 1) {
        if (threadIdx.x < kCluster) {
          foundByBlocks.send(threadIdx.x, 0, all.low);
          foundByBlocks.send(threadIdx.x, 1, all.high);
        }
        foundByBlocks.await();
        for (const auto& block : foundByBlocks.words) all.merge({block[0], block[1]});
      }
    }
    if (direct)
      chosen = job.rule.chooseAmax(all.lo(), all.hi(), job.given == nullptr ? nullptr : job.given + band);
    else
      chosen = chosenOf(job, band, all, outer);
    if (stores && place.element(0) == 0) job.store(band, chosen);
  } else if (kScaled && grain == Grain::tensor) {
    chosen.a = bitcast<float>(job.scratch[job.parametersAt]);
    chosen.b = bitcast<float>(job.scratch[job.parametersAt + 1]);
  }

  u32* out = job.out + row * job.rowStride;
  const int bits = job.rule.element.bits;
  constexpr int kUnroll = CODER == Coder::any ? 1 : FOURS;
  float2 parameters[FOURS];
  if (kScaled && grain == Grain::blocks) {
    chooseBlocks(job, place, band, outer, x, parameters);
  } else {
#pragma unroll
    for (int i = 0; i < FOURS; i++) parameters[i] = make_float2(chosen.a, chosen.b);
  }
#pragma unroll kUnroll
  for (int i = 0; i < FOURS; i++)
    if (place.holds(i)) storeCodes(out, place.element(i) / 4, bits, fourCodes<CODER>(job.rule, x[i], parameters[i].x, parameters[i].y));
  if (place.first + share.width >= job.k) endRow(out, job.k, job.rowStride, bits, place);
}

/** Rows that have one scale each, a float32 chosen here from the largest magnitude, of values as they lie, behind relu or a norm. */
struct RowsJob {
  Extent rows;
  const float *a, *weight;
  Columns aAt;
  u32* out;
  float* scales;
  int k, rowStride;
  float eps;
  bool relu;
  int passes;            // of threads with one four; 2: with a rehearsal
  float floor;           // magnitudes are no less
  float steps, inverse;  // magnitude over scale
  float least;           // scales are no less
  float min, max;        // integer codes
};

/** Whether a job is one of those; the scales are those of the rules amax and affine. */
bool fits(const QuantizeJob& job, Grain grain, bool aligned) {
  const Rule& rule = job.rule;
  const InputKind kind = job.in.kind;
  if (grain != Grain::row || job.given != nullptr || job.height != 1 || !aligned) return false;
  if (kind != InputKind::plain && kind != InputKind::norm && (kind != InputKind::unary || job.in.fn != Unary::relu)) return false;
  if (rule.dtype != Type::f32 || rule.scale.kind != CodecKind::real || rule.scale.bits != 32 || rule.outerKind != 0) return false;
  if (rule.kind == RuleKind::amax) return rule.guarded && !rule.power && rule.ceiling == bitcast<float>(kInfinity);
  return rule.kind == RuleKind::affine && rule.zeroKind == ZeroKind::none && rule.mapping == Mapping::symmetric && rule.oneSided == 0 &&
         rule.element.bits == 8 && rule.eps >= 0x1p-100f;
}

RowsJob rowsJob(const QuantizeJob& job, int passes) {
  const Input& in = job.in;
  const Rule& rule = job.rule;
  const bool amax = rule.kind == RuleKind::amax;
  const float steps = amax ? rule.top : rule.span;
  return {job.rows, in.a, in.weight, in.aAt, job.out, reinterpret_cast<float*>(job.out + job.scaleAt), job.k, job.rowStride, in.eps,
          in.kind == InputKind::unary, passes, amax ? rule.floor : 0.0f, steps, 1.0f / steps, amax ? kLeastNormal : rule.eps,
          rule.min, rule.max};
}

/**
 * `quantize` of those alone. Few rows are a matter of latency, most of it that of code that no multiprocessor has read: where blocks wait for
 * a predecessor anyway, they first go through all of it with ones for input, and store nothing.
 */
template <Coder CODER, int FOURS, bool NORM, bool CLUSTER>
__global__ void __launch_bounds__(kMostThreads) quantizeRows(const __grid_constant__ RowsJob job, const __grid_constant__ Share share,
                                                             const u32* symbols) {
  __shared__ u32 found[2][kWarp];  // of each pass
  __shared__ Sums sums[2];
  __shared__ Exchange<kWarp> exchanges[2];
  releaseSuccessor();
  if (CLUSTER) {
    if (threadIdx.x == 0) {
      for (int pass = 0; pass < 2; pass++) {
        if (NORM) sums[pass].blocks.open(1);
        exchanges[pass].open(share.threads / kWarp);
      }
    }
    clusterSync();
  }
  const Place place(share, job.k);
  Values<FOURS> values;
  float4(&x)[FOURS] = values.x;
  if (NORM) values.prefetch(job.weight, place);
  const bool inside = place.row < job.rows.at(symbols);
  i64 from = job.aAt.at(place.row, place.element(0));
  u32* out = job.out + place.row * job.rowStride;
  asm volatile("" : "+l"(from));  // it is known before the wait
#pragma unroll 1
  for (int pass = FOURS == 1 ? job.passes : 1; pass > 0; pass--) {
    const bool real = pass == 1;
    if (real) awaitPredecessor();
    if (!inside) continue;
    const float other = real ? 0.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      x[i] = real && place.holds(i) ? loadFour(job.a + from + 4 * i * place.lanes, true) : make_float4(other, other, other, other);
    if (NORM) {
      values.norm(job.weight, place, CLUSTER, job.k, job.eps, sums[pass - 1]);
    } else if (job.relu) {
#pragma unroll
      for (int i = 0; i < FOURS; i++) x[i] = relu(x[i]);
    }
    u32 most = 0u;
#pragma unroll
    for (int i = 0; i < FOURS; i++) most = ::max(most, largestOf(x[i]));
    const float largest = bitcast<float>(CLUSTER ? clusterMost(most, place, exchanges[pass - 1]) : teamMost(most, place, found[pass - 1]));
    const float scale = rowScale(largest < job.floor ? job.floor : largest, job.steps, job.inverse, job.least);
    if (real && place.element(0) == 0) job.scales[place.row] = isNan(scale) ? bitcast<float>(kNan) : scale;
    const auto store = [&](auto code) {
#pragma unroll
      for (int i = 0; i < FOURS; i++) {
        const u32 codes = code(x[i]);
        if (real && place.holds(i)) out[place.element(i) / 4] = codes;
      }
    };
    if constexpr (CODER == Coder::e4m3) {
      const RowDivisor by(scale);
      store([&](float4 v) { return e4m3Codes(make_float4(by.under(v.x), by.under(v.y), by.under(v.z), by.under(v.w))); });
    } else {
      const float inverse = __frcp_rn(scale);
      const auto code = [&](float value) { return integerCode(value, inverse, 0.0f, job.min, job.max); };
      store([&](float4 v) { return packBytes(code(v.x), code(v.y), code(v.z), code(v.w)); });
    }
    if (real && place.first + share.width >= job.k) endRow(out, job.k, job.rowStride, 8, place);
  }
}

bool inFours(const Input& in) { return general::inFours(in.aAt) && (in.b == nullptr || general::inFours(in.bAt)); }

template <Coder CODER>
cudaError_t start(const Launch& launch, const QuantizeJob& job) {
  const i64 rows = job.rows.at(launch.symbols);
  Grain grain = !job.scaled ? Grain::none : job.columns == 1 ? Grain::row : Grain::blocks;
  if (job.scratch != nullptr) grain = Grain::tensor;
  const bool whole = job.in.kind == InputKind::norm || (grain == Grain::row && job.given == nullptr);
  const bool aligned = inFours(job.in);
  // For the scale of a tensor a row is normed as `extremes` did: in one block.
  const Share share = shareRows(rows, job.k, whole, *launch.context, grain == Grain::none || grain == Grain::row);
  return withFours(share.fours, [&](auto fours) {
    constexpr int kFours = fours.value;
    if constexpr (CODER == Coder::e4m3 || CODER == Coder::integers) {
      if (fits(job, grain, aligned)) {
        const dim3 grid = share.grid(rows);
        const bool few = static_cast<int>(grid.x * grid.y) <= launch.context->sms;
        const auto by = [&](auto kernel) {
          return launchClusters(launch, kernel, grid, dim3(1, share.cluster), share.threads, 0,
                                rowsJob(job, few && launch.context->overlaps ? 2 : 1), share, launch.deviceSymbols);
        };
        const bool norm = job.in.kind == InputKind::norm;
        if (share.cluster > 1) {
          // A thread of a cluster has one four.
          if constexpr (kFours == 1) return by(norm ? quantizeRows<CODER, 1, true, true> : quantizeRows<CODER, 1, false, true>);
        } else {
          return by(norm ? quantizeRows<CODER, kFours, true, false> : quantizeRows<CODER, kFours, false, false>);
        }
      }
    }
    return launchClusters(launch, quantize<CODER, kFours>, share.grid(rows), dim3(1, share.cluster), share.threads, 0, job, share,
                          grain, aligned, launch.deviceSymbols);
  });
}

/** args: those of the general kernels of quantize. */
cudaError_t runExtremes(const Launch& launch) {
  const QuantizeJob job = readQuantizeJob(launch);
  const i64 rows = job.rows.at(launch.symbols);
  if (rows == 0) return cudaSuccess;
  const Share share = shareRows(rows, job.k, true, *launch.context);
  return withFours(share.fours, [&](auto fours) {
    return launchOverlapped(launch, extremes<fours.value>, share.grid(rows), share.threads, 0, job, share, inFours(job.in),
                            launch.deviceSymbols);
  });
}

/** args: those of the general kernels of quantize; with scratch, the parameters of the one block of all rows lie in it. */
cudaError_t runQuantize(const Launch& launch) {
  const QuantizeJob job = readQuantizeJob(launch);
  if (job.rows.at(launch.symbols) == 0) return cudaSuccess;
  switch (coderOf(job.rule)) {
    case Coder::bfloat: return start<Coder::bfloat>(launch, job);
    case Coder::half: return start<Coder::half>(launch, job);
    case Coder::e4m3: return start<Coder::e4m3>(launch, job);
    case Coder::floats: return start<Coder::floats>(launch, job);
    case Coder::integers: return start<Coder::integers>(launch, job);
    default: return start<Coder::any>(launch, job);
  }
}

}  // namespace
}  // namespace fewbit::rows

namespace fewbit {

extern const Entry kRowsQuantizeEntries[] = {{"rows/quantize", 2, rows::runQuantize}, {"rows/quantize_extremes", 1, rows::runExtremes}};
extern const size_t kRowsQuantizeEntryCount = sizeof kRowsQuantizeEntries / sizeof(Entry);

}  // namespace fewbit
