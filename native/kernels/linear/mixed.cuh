// x W^T for some tens of rows of x on Hopper, in one pass over the stored codes of W.
//
// A block owns 128 rows of the weights. Four warps stream their codes and prepared x (mixed-x.cuh) into a ring of shared memory; two
// warpgroups decode 64 rows each into registers, the left operand of the matrix unit, which takes all columns of x at once: a code is
// read and decoded once. Codes are bf16 exactly and a float32 is three columns of bf16, as in skinny.cuh; sums are float32, and scales
// multiply the partial sums of what shares them; zero points that are added multiply sums of x. Blocks of a cluster share a tile's K,
// and add up what each found in a fixed order.
#pragma once
#include <type_traits>

#include "mixed-finish.cuh"
#include "mixed-ring.cuh"
#include "mixed-scales.cuh"
#include "mixed-units.cuh"

namespace fewbit::linear {

#ifdef FEWBIT_HOPPER

/** A warp's sums, of rows lane / 4 and lane / 4 + 8 and columns 8 j + 2 t and the next, in the order of the matrix unit. */
template <int N>
struct MixedSums {
  float sum[N / 2], total[N / 2];

  __device__ __forceinline__ void promote(float low, float high) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) total[i] = fmaf(i % 4 < 2 ? low : high, sum[i], total[i]);
  }
  __device__ __forceinline__ void promoteZeros(float low, float high, const float* sumsOfX) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float2 of = __ldcg(reinterpret_cast<const float2*>(sumsOfX + j * 8));
      total[4 * j] = fmaf(low, of.x, total[4 * j]);
      total[4 * j + 1] = fmaf(low, of.y, total[4 * j + 1]);
      total[4 * j + 2] = fmaf(high, of.x, total[4 * j + 2]);
      total[4 * j + 3] = fmaf(high, of.y, total[4 * j + 3]);
    }
  }
  __device__ __forceinline__ void promoteIntegers() {
#pragma unroll
    for (int i = 0; i < N / 2; i++) total[i] = __int_as_float(__float_as_int(total[i]) + __float2int_rn(sum[i]));
  }
  __device__ __forceinline__ void store(bool promoted, float* sheet, int row, int t) const {
#pragma unroll
    for (int i = 0; i < N / 2; i++)
      sheet[(i / 4 * 8 + 2 * t + i % 2) * kMixedPitch + row + i % 4 / 2 * 8] = promoted ? total[i] : sum[i];
  }
};

/** The codes of a lane in some segments of two rows, read at once so that one latency is waited for. */
template <int Bits, int Segments>
struct RawCodes {
  static constexpr bool whole = Bits == 4 || Bits == 8 || Bits == 16;  // an octet is a vector of words
  alignas(16) uint32_t words[Segments][2][whole ? Bits / 4 : 1];

  __device__ __forceinline__ void load(const uint8_t* row, int t) {
#pragma unroll
    for (int segment = 0; segment < Segments; segment++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint8_t* at = row + r * 8 * MixedRow<Bits>::pitch + segment * 4 * Bits + t * Bits;
        uint32_t* to = words[segment][r];
        if constexpr (Bits == 4) to[0] = *reinterpret_cast<const uint32_t*>(at);
        if constexpr (Bits == 8) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(at);
        if constexpr (Bits == 16) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(at);
      }
  }
};

/** Eight warps decode and multiply what the ring brings. */
template <class Codes, int N, class Mode>
__device__ __forceinline__ void multiplyMixed(const MixedParams& p, uint8_t* shared, const MixedShared<Codes::bits, N>& at, int tile,
                                              int pass, int begin, int end, MixedSums<N>& of) {
  using Shared = MixedShared<Codes::bits, N>;
  using Row = MixedRow<Codes::bits>;
  constexpr bool promotes = Mode::scaled || !Mode::fixed;
  MixedBarriers& barriers = *reinterpret_cast<MixedBarriers*>(shared + at.barriers);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  const int row = warp * 16 + lane / 4;
  const int rows[2] = {MixedSource(p, tile, row).n, MixedSource(p, tile, row + 8).n};
  const int unit = Mode::fixed ? Mode::unit : p.unit, shift = __ffs(unit) - 1;
  Element element = p.element;
  if constexpr (Mode::fixed) element.zeros = false;
  if constexpr (promotes) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) of.total[i] = 0.0f;
  }
  constexpr int together = N == 64 && promotes ? 2 : kMixedSegments;  // as registers allow
  using Raw = RawCodes<Codes::bits, together>;
  using Scales = MixedScales<std::conditional_t<Mode::scaled, Mode, Grouped<1, false>>>;
  Scales next(p, rows, begin);
  MixedAnyScales nextAny;
  MixedFolds nextFold;
  if constexpr (Mode::scaled) next.load(p);
  if constexpr (!Mode::fixed) nextAny.load(p, rows, begin, lane);
  if constexpr (Mode::folds) nextFold.load(p, rows, begin, lane);
  if (!Mode::fixed && p.floatZero) awaitPredecessor();  // sums of x are read from where they were written
  uint32_t a[2][8];
  RingPlace place;
  int before = 0;
#pragma unroll 1
  for (int stage = begin; stage < end; stage++) {
    const Scales scales = next;
    const MixedFolds fold = nextFold;
    float scale[2] = {1.0f, 1.0f}, zero[2] = {0.0f, 0.0f};  // of promotion t, where only the run time knows them
    if constexpr (!Mode::fixed) {
#pragma unroll 1
      for (int r = 0; r < 2; r++) {
        float s = 1.0f, z = 0.0f;
        if (p.promote == Promote::scaled) s = decodeScale(p.weights[0].scale.codec, r == 0 ? nextAny.scale[0] : nextAny.scale[1]);
        if (p.weights[0].zero.codec != ScaleCodec::none)
          z = decodeScale(p.weights[0].zero.codec, r == 0 ? nextAny.zero[0] : nextAny.zero[1]);
        scale[0] = r == 0 ? s : scale[0], scale[1] = r == 1 ? s : scale[1];
        zero[0] = r == 0 ? z : zero[0], zero[1] = r == 1 ? z : zero[1];
      }
    }
    if (stage + 1 < end) {
      if constexpr (Mode::scaled) next.load(p);
      if constexpr (!Mode::fixed) nextAny.load(p, rows, stage + 1, lane);
      if constexpr (Mode::folds) nextFold.load(p, rows, stage + 1, lane);
    }
    barrierAwait(&barriers.full[place.stage], place.parity);
    const uint8_t* codes = shared + at.codes + place.stage * Shared::codeBytes + row * Row::pitch;
    const uint64_t x = hopper::tile(shared + place.stage * Shared::columnBytes);
    if constexpr (Mode::floatZero) {
      // Zero points of two promotions are a lane's two elements of K, thrice: for the parts of the sums of x.
      a[1][0] = t < 3 ? scales.zero[0][0] : 0;
      a[1][1] = t < 3 ? scales.zero[1][0] : 0;
      a[1][2] = a[1][3] = 0;
      hopper::productFence();
      product(of.total, a[1], sumsTile(shared + at.sums + place.stage * Shared::sumBytes), 1);
      hopper::productCommit();
    }
    Raw raw;
#pragma unroll
    for (int segment = 0; segment < kMixedSegments; segment++) {
      const int promotion = Mode::fixed ? segment / Mode::unit : segment >> shift;
      const bool fresh = promotes ? (segment & (unit - 1)) == 0 : segment == 0 && stage == begin;
      const bool last = promotes && (segment & (unit - 1)) == unit - 1;
      const int from = (lane & ~3) | promotion;
      float subtracted[2] = {0.0f, 0.0f};
      if (!Mode::fixed && element.zeros) {
        subtracted[0] = __shfl_sync(~0u, zero[0], from);
        subtracted[1] = __shfl_sync(~0u, zero[1], from);
      }
      uint32_t low[4], high[4];
      if constexpr (Raw::whole) {
        if (segment % together == 0) raw.load(codes + segment * 4 * Codes::bits, t);
        Codes::decode(reinterpret_cast<const uint8_t*>(raw.words[segment % together][0]), 0, element, subtracted[0], low);
        Codes::decode(reinterpret_cast<const uint8_t*>(raw.words[segment % together][1]), 0, element, subtracted[1], high);
      } else {
        Codes::decode(codes + segment * 4 * Codes::bits, t * Codes::bits, element, subtracted[0], low);
        Codes::decode(codes + 8 * Row::pitch + segment * 4 * Codes::bits, t * Codes::bits, element, subtracted[1], high);
      }
      if constexpr (Mode::folds) {
        const __nv_bfloat162 f0 = fold.factorOf(0, segment, lane), f1 = fold.factorOf(1, segment, lane);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          low[j] = asWord(__hmul2(asPair(low[j]), f0));
          high[j] = asWord(__hmul2(asPair(high[j]), f1));
        }
      }
      uint32_t(&mine)[8] = a[segment % 2];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        mine[2 * j] = low[j];
        mine[2 * j + 1] = high[j];
      }
      // Two products of 16 elements: of the first two pairs of codes, and of the others.
      const uint64_t columns = x + (segment / 2 * (N * 128) + segment % 2 * 64) / 16;
      hopper::productFence();
      product(of.sum, mine, columns, !fresh);
      product(of.sum, mine + 4, columns + 2, 1);
      hopper::productCommit();
      if (last) {
        hopper::productWait<0>();
        hopper::pin(of.sum);
        hopper::pin(a[0]);
        hopper::pin(a[1]);
        if constexpr (Mode::floatZero) hopper::pin(of.total);
        if constexpr (Mode::fixed) {
          of.promote(scales.scaleOf(0, promotion), scales.scaleOf(1, promotion));
        } else if (p.promote == Promote::integer) {
          of.promoteIntegers();
        } else {
          of.promote(__shfl_sync(~0u, scale[0], from), __shfl_sync(~0u, scale[1], from));
          if (p.floatZero) {
            const int64_t before = (int64_t(pass) * mixedStages(p.k) + stage) * promotionsOf(p) + promotion;
            of.promoteZeros(__shfl_sync(~0u, zero[0], from), __shfl_sync(~0u, zero[1], from),
                            reinterpret_cast<const float*>(p.sums) + before * N + 2 * t);
          }
        }
      } else {
        hopper::productWait<1>();
        hopper::pin(a[(segment + 1) % 2]);
      }
      if (!promotes && segment == 0 && stage > begin && lane == 0) barrierArrive(&barriers.empty[before]);
    }
    before = place.stage;
    // Products that ended have used all that was read of the stage: a load still on its way could find what is fetched next.
    if (promotes && lane == 0) barrierArrive(&barriers.empty[before]);
    place.advance(p.stages);
  }
  hopper::productWait<0>();
  hopper::pin(of.sum);
}

#endif

/** Blocks a multiprocessor: two where registers allow. */
__host__ __device__ constexpr int mixedBlocks(int n) { return n <= 64 ? 2 : 1; }

/** grid (slices of K (a cluster), passes, tiles). `Mode` as in skinny-params.cuh. */
template <class Codes, int N, class Mode>
__global__ void __launch_bounds__(kMixedThreads, mixedBlocks(N)) mixed(const __grid_constant__ MixedParams p) {
#ifdef FEWBIT_HOPPER
  extern __shared__ uint8_t raw[];
  // The same offset in every block of a cluster: they read each other's sums.
  uint8_t* shared = raw + (1024 - sharedAddress(raw) % 1024) % 1024;
  const MixedShared<Codes::bits, N> at(p.stages, Mode::floatZero);
  MixedBarriers& barriers = *reinterpret_cast<MixedBarriers*>(shared + at.barriers);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  releaseSuccessor();
  const int slice = blockIdx.x, pass = blockIdx.y, tile = blockIdx.z;
  const int m0 = pass * p.columnsOfX;
  const int rows = min(static_cast<int>(p.x.rows.at(p.symbols)) - m0, p.columnsOfX);
  if (rows <= 0) {
    awaitPredecessor();
    return;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      hopper::barrierInit(&barriers.full[i], kFetchers + 1);
      hopper::barrierInit(&barriers.empty[i], kMixedWorkers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int begin = slice * (p.kSlice / kMixedK), end = min(begin + p.kSlice / kMixedK, mixedStages(p.k));
  if (warp >= kMixedWorkers) {
    if constexpr (mixedBlocks(N) == 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    fetchMixed<Codes::bits, N>(p, shared, at, tile, pass, begin, end);
    __syncwarp();
    clusterMeet<false>();
    if (p.slices > 1) clusterMeet<false>();
    return;
  }
  if constexpr (mixedBlocks(N) == 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  else asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
  float* sheet = reinterpret_cast<float*>(shared);
  MixedSums<N> of;
  multiplyMixed<Codes, N, Mode>(p, shared, at, tile, pass, begin, end, of);
  hopper::turnWait(1, kMixedWorkers * 32);  // the ring is read: the sums take its place
  of.store(Mode::scaled || !Mode::fixed, sheet, warp * 16 + threadIdx.x % 32 / 4, threadIdx.x % 4);
  awaitPredecessor();
  __syncwarp();
  clusterMeet<true>();
  if (!Mode::fixed && p.promote == Promote::integer) finishMixed<true>(p, sheet, tile, m0, rows, slice);
  else finishMixed<false>(p, sheet, tile, m0, rows, slice);
  __syncwarp();
  if (p.slices > 1) clusterMeet<false>();  // no block leaves before the others have read its sums
#endif
}

}  // namespace fewbit::linear
