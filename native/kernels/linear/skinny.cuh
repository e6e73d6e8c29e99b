// x W^T for few rows of x, at the speed of reading W.
//
// Weights are the 16 rows of a tensor-core product's left operand, and its 8 columns hold the rows of x. Codes of at most 8
// significant bits are bf16 exactly, and a float32 is exactly the sum of three bf16 of 8 bits each, so x takes three columns a row
// (one, when its own stored codes are exact in bf16): every product is exact, sums are float32, scales multiply partial sums.
//
// One block a processor walks over tiles of 16 output features. One of its warps streams the weights into a ring of shared memory,
// as far ahead as the ring has room: across tiles, and before x is there. Eight warps share a tile's K and multiply; others add up what
// those found and store it, so that nobody waits for an epilogue. The next kernel may start when a block has asked for its last
// weights, and a block takes less than half a processor where x is small: two kernels' rings lie side by side, and memory
// is not idle while one ends and the other begins. x stays in shared memory, in the order in which lanes read it; what
// does not fit is left to blocks of other slices of K.
#pragma once
#include "skinny-any.cuh"
#include "skinny-finish.cuh"

namespace fewbit::linear {

/** Scales and zero points of a worker's chunk, as codes: of row lane / 4, and of row lane / 4 + 8. */
template <class Codes, class Mode>
struct ChunkScales {
  using C = Chunk<Codes::bits>;
  static constexpr int bytes = Mode::folds ? C::segments * 2 : C::segments / Mode::unit * Mode::scaleBytes;
  static constexpr int words = bytes < 4 ? 1 : bytes / 4;
  uint32_t scale[2][words], zero[2][words];

  __device__ __forceinline__ static void read(const uint8_t* at, uint32_t (&out)[words]) {
    if constexpr (bytes == 2) out[0] = *reinterpret_cast<const uint16_t*>(at);
    else if constexpr (bytes == 4) out[0] = *reinterpret_cast<const uint32_t*>(at);
    else if constexpr (bytes == 8) {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      out[0] = two.x, out[1] = two.y;
    } else {
      static_assert(bytes == 16);
      const uint4 four = *reinterpret_cast<const uint4*>(at);
      out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
    }
  }
  __device__ __forceinline__ void load(const uint8_t* slot, int pitch, int row, int chunk) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint8_t* at = slot + (row + 8 * r) * pitch + chunk * bytes;
      read(at, scale[r]);
      if constexpr (Mode::floatZero) read(at + 16 * pitch, zero[r]);
    }
  }
  __device__ __forceinline__ static float bf16Of(const uint32_t (&codes)[words], int unit) {
    return __uint_as_float(unit % 2 == 0 ? codes[unit / 2] << 16 : codes[unit / 2] & 0xffff0000u);
  }
  __device__ __forceinline__ float scaleOf(int r, int unit) const {
    if constexpr (Mode::scaleBytes == 2) return bf16Of(scale[r], unit);
    return decodeScale(ScaleCodec::e8m0, scale[r][unit / 4] >> (8 * (unit % 4)) & 255u);
  }
  /** The factor of a lane's codes in a segment, twice. */
  __device__ __forceinline__ __nv_bfloat162 factorOf(int r, int segment, int lane) const {
    const uint32_t code = scale[r][segment / 2] >> (16 * (segment % 2) + lane % 4 / 2 * 8) & 255u;
    return __float2bfloat162_rn(decodeScale(ScaleCodec::e4m3, code));
  }
};

/** What a worker sums of a tile: `sum` since the last promotion, `total` of what was promoted. */
template <int Tiles>
struct TileSums {
  float total[Tiles][4], sum[Tiles][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) total[j][c] = 0.0f, sum[j][c] = 0.0f;
  }
  /** One segment of 32 elements: `low` and `high` are the codes of rows lane / 4 and lane / 4 + 8. */
  __device__ __forceinline__ void multiply(const uint32_t (&low)[4], const uint32_t (&high)[4], const uint8_t* x,
                                           const int (&columnAt)[Tiles], bool fresh) {
    const uint32_t a0[4] = {low[0], high[0], low[1], high[1]};
    const uint32_t a1[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
    for (int j = 0; j < Tiles; j++) {
      const uint4 b = *reinterpret_cast<const uint4*>(x + columnAt[j]);
      if (fresh) multiplyFresh16x8x16(sum[j], a0, b.x, b.y);
      else multiply16x8x16(sum[j], a0, b.x, b.y);
      multiply16x8x16(sum[j], a1, b.z, b.w);
    }
  }
  __device__ __forceinline__ void promote(const float (&scale)[2]) {
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) total[j][c] = fmaf(scale[c / 2], sum[j][c], total[j][c]);
  }
  __device__ __forceinline__ void promoteZeros(const float (&zero)[2], const float* sumsOfX) {
#pragma unroll
    for (int j = 0; j < Tiles; j++) {
      const float2 of = *reinterpret_cast<const float2*>(sumsOfX + j * 8);
      total[j][0] = fmaf(zero[0], of.x, total[j][0]);
      total[j][1] = fmaf(zero[0], of.y, total[j][1]);
      total[j][2] = fmaf(zero[1], of.x, total[j][2]);
      total[j][3] = fmaf(zero[1], of.y, total[j][3]);
    }
  }
  __device__ __forceinline__ void promoteIntegers() {
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        total[j][c] = __int_as_float(__float_as_int(total[j][c]) + __float2int_rn(sum[j][c]));
  }
  /** Copies what the tile ends with, for the finishers: with one row of x, the sum of its parts. */
  __device__ __forceinline__ void store(const SkinnyParams& p, bool promoted, float* sheet, int g, int t, int lane) const {
    if (singleRow(p)) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float first = promoted ? total[0][2 * h] : sum[0][2 * h];
        const float second = promoted ? total[0][2 * h + 1] : sum[0][2 * h + 1];
        const float third = __shfl_sync(~0u, first, (lane & ~3) | 1);
        if (t == 0) sheet[g + 8 * h] = p.parts3 == 3 ? third + second + first : first;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        sheet[(j * 8 + 2 * t + c % 2) * kPitch + g + 8 * (c / 2)] = promoted ? total[j][c] : sum[j][c];
  }
};

template <class Codes, int Tiles, class Mode>
__global__ void __launch_bounds__(kThreads(Tiles), Tiles == 1 ? 3 : 1)
    skinny(const __grid_constant__ SkinnyParams p) {
  using C = Chunk<Codes::bits>;
  extern __shared__ __align__(128) uint8_t shared[];
  SkinnyBarriers& barriers = *reinterpret_cast<SkinnyBarriers*>(shared);
  const SkinnyShared at = sharedOf<Codes, Tiles, Mode>(p);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // the same for a whole warp, and known to be
  const Walk<Codes> walk(p);
  const int m0 = blockIdx.z * p.columnsOfX;
  const int rows = min(static_cast<int>(p.x.rows.at(p.symbols)) - m0, p.columnsOfX);
  if (rows <= 0) {
    awaitPredecessor();
    return;
  }
  releaseSuccessor();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      barrierInit(&barriers.full[i], 32);
      barrierInit(&barriers.empty[i], kWorkers);
    }
    for (int i = 0; i < 2; i++) {
      barrierInit(&barriers.summed[i], kWorkers);
      barrierInit(&barriers.stored[i], kFinishers(Tiles));
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __syncthreads();

  float* exchange = reinterpret_cast<float*>(shared + at.exchange);
  const int sheet = sheetOf<Tiles>(p);
  if (warp == kWorkers) {
    fetchWeights<Codes, Tiles, Mode>(p, shared, at, walk);
    return;
  }
  awaitPredecessor();
  if (warp > kWorkers) {
    const int group = (warp - kWorkers - 1) / kFinishers(Tiles);  // which of two tiles, and of two copies of sums
    const float* sheets = exchange + group * kWorkers * sheet;
    uint32_t parity = 0;
#pragma unroll 1
    for (int tile = blockIdx.x + group * gridDim.x; tile < walk.tiles; tile += 2 * gridDim.x, parity ^= 1) {
      storeSums<Tiles>(p, sheets, (warp - kWorkers - 1) % kFinishers(Tiles), m0, tile * walk.perTile, rows,
                       [&] { barrierAwait(&barriers.summed[group], parity); });
      __syncwarp();
      if (lane == 0) barrierArrive(&barriers.stored[group]);
    }
    return;
  }

  stageX<Codes, Tiles, Mode>(p, shared, at, walk, warp, m0, rows);
  const int g = lane / 4, t = lane % 4;
  const int columns = p.columnsOfX * p.parts3;
  const bool ends = Mode::fixed ? !Mode::scaled : p.promote == Promote::end;
  // Columns past the last read it again: what they sum is never looked at.
  int columnAt[Tiles];
#pragma unroll
  for (int j = 0; j < Tiles; j++) columnAt[j] = min(j * 8 + g, columns - 1) * 64 + t * 16;
  const uint8_t* mine = shared + at.ring + warp * C::rowBytes + g * C::pitch;
  const float* sums = reinterpret_cast<const float*>(shared + at.sums) + 2 * t;
  Element element = p.element;
  if constexpr (Mode::fixed) element.zeros = false;

  const int promotions = C::segments / (Mode::fixed ? Mode::unit : p.unit);  // of a chunk
  AnyScales next;
  if constexpr (!Mode::fixed) {
    if (static_cast<int>(blockIdx.x) < walk.tiles)
      next.load(p, walk.perTile, promotions, blockIdx.x, walk.begin + warp * C::k, lane);
  }
  RingPlace place;
  int slot = 0;
  TileSums<Tiles> of;
#pragma unroll 1
  for (int tile = blockIdx.x, turn = 0; tile < walk.tiles; tile += gridDim.x, turn++) {
    of.clear();
#pragma unroll 1
    for (int s = 0; s < walk.stagesOfTile; s++) {
      const int chunk = s * kWorkers + warp;
      AnyScales scales = next;
      if constexpr (!Mode::fixed) {
        const bool more = chunk + kWorkers < walk.chunks;
        const int nextTile = more ? tile : tile + gridDim.x;
        if (nextTile < walk.tiles)
          next.load(p, walk.perTile, promotions, nextTile, walk.begin + (more ? chunk + kWorkers : warp) * C::k, lane);
      }
      barrierAwait(&barriers.full[place.stage], place.parity);
      if (chunk < walk.chunks) {
        const uint8_t* codes = mine + place.stage * C::stageBytes;
        const uint8_t* x = shared + at.x + chunk * (C::segments * columns * 64);
        if constexpr (Mode::fixed) {
          ChunkScales<Codes, Mode> scales;
          if constexpr (Mode::scaleBytes > 0) {
            const int pitch = scalePitch(p);
            scales.load(shared + at.scales + slot * 16 * pitch * (Mode::floatZero ? 2 : 1), pitch, g, walk.begin / C::k + chunk);
          }
#pragma unroll
          for (int segment = 0; segment < C::segments; segment++) {
            uint32_t low[4], high[4];
            Codes::decode(codes + segment * 4 * Codes::bits, t * Codes::bits, element, 0.0f, low);
            Codes::decode(codes + 8 * C::pitch + segment * 4 * Codes::bits, t * Codes::bits, element, 0.0f, high);
            if constexpr (Mode::folds) {
              const __nv_bfloat162 f0 = scales.factorOf(0, segment, lane), f1 = scales.factorOf(1, segment, lane);
#pragma unroll
              for (int j = 0; j < 4; j++) {
                low[j] = asWord(__hmul2(asPair(low[j]), f0));
                high[j] = asWord(__hmul2(asPair(high[j]), f1));
              }
            }
            const int unit = segment / Mode::unit;
            of.multiply(low, high, x + segment * columns * 64, columnAt, Mode::scaled && segment % Mode::unit == 0);
            if constexpr (Mode::scaled) {
              if (segment % Mode::unit == Mode::unit - 1) {
                of.promote({scales.scaleOf(0, unit), scales.scaleOf(1, unit)});
                if constexpr (Mode::floatZero)
                  of.promoteZeros({scales.bf16Of(scales.zero[0], unit), scales.bf16Of(scales.zero[1], unit)},
                                  sums + (chunk * promotions + unit) * (Tiles * 8));
              }
            }
          }
        } else {
          multiplyAny<Codes, Tiles>(p, walk.perTile, of, scales, codes, x, sums + chunk * promotions * (Tiles * 8), columnAt, tile,
                                    walk.begin + chunk * C::k, lane);
        }
      }
      __syncwarp();
      if (lane == 0) barrierArrive(&barriers.empty[place.stage]);
      place.advance(p.stages);
    }
    if constexpr (Mode::scaleBytes > 0) {
      if (++slot == p.scaleSlots) slot = 0;
    }
    const int copy = turn % 2;
    if (turn >= 2) barrierAwait(&barriers.stored[copy], turn / 2 % 2 ^ 1);  // what was there two turns ago
    of.store(p, !ends, exchange + (copy * kWorkers + warp) * sheet, g, t, lane);
    __syncwarp();
    if (lane == 0) barrierArrive(&barriers.summed[copy]);
  }
}

}  // namespace fewbit::linear
