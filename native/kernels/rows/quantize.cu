// quantize, alone and with what makes its input, where blocks lie in rows: values are loaded once and stay in registers.
#include "quantize_rows.cuh"

namespace fewbit::rows {
namespace {

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
    sums.blocks.open(1);
    foundByBlocks.open(2);
    cluster::arrive();
    cluster::meet();
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
    if constexpr (CODER != Coder::floats && CODER != Coder::any) {
      constexpr bool kScaled = CODER == Coder::e4m3 || CODER == Coder::integers;  // the others only behind a norm
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
          if constexpr (kFours == 1) return by(norm ? quantizeRows<CODER, 1, true, true> : quantizeRows<CODER, 1, !kScaled, true>);
        } else {
          return by(norm ? quantizeRows<CODER, kFours, true, false> : quantizeRows<CODER, kFours, !kScaled, false>);
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
