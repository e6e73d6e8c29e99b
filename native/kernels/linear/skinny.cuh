// x W^T for few rows of x, at the speed of reading W.
//
// Weights are the 16 rows of a tensor-core product's left operand, and its 8 columns hold the rows of x. Codes of at most 8
// significant bits are bf16 exactly, and a float32 is exactly the sum of three bf16 of 8 bits each, so x takes three columns a row
// (one, when its own stored codes are exact in bf16): every product is exact, sums are float32, scales multiply partial sums.
//
// One block a processor walks over tiles of 16 output features. Each of its warps streams chunks of the weights through a ring of
// shared memory of its own, several chunks ahead and across tiles. With few columns eight warps share a tile's K,
// and one more adds up what they found; with many, each has tiles of its own. x stays in shared memory, in the order in
// which lanes read it; what does not fit is left to blocks of other slices of K.
#pragma once
#include "skinny-finish.cuh"
#include "skinny-x.cuh"

namespace fewbit::linear {

template <class Codes, int Tiles, class Mode>
__global__ void __launch_bounds__(kThreads(Tiles), 1) skinny(const __grid_constant__ SkinnyParams p) {
  using C = Chunk<Codes::bits>;
  constexpr int warps = kWarps(Tiles);
  constexpr bool shares = sharesK(Tiles);
  extern __shared__ __align__(16) uint8_t shared[];
  const SkinnyShared at = sharedOf<Codes, Tiles>(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  releaseSuccessor();

  const int perTile = 16 / p.parts;
  const int tiles = (p.n + perTile - 1) / perTile;
  const int begin = blockIdx.y * p.kSlice;
  const int count = min(p.kSlice, p.k - begin);
  const int m0 = blockIdx.z * p.columnsOfX;
  const int chunks = (count + C::k - 1) / C::k;
  constexpr int teams = kTeams(Tiles);
  const int team = warp / kTeam;  // the warp that finishes has none
  const int firstTile = shares ? blockIdx.x + gridDim.x * team : blockIdx.x * warps + warp;
  const int tileStep = gridDim.x * (shares ? teams : warps);
  const int firstChunk = shares ? warp % kTeam : 0;
  constexpr int chunkStep = shares ? kTeam : 1;
  const bool worker = !shares || warp < warps;
  const int perWarp = worker && chunks > firstChunk ? (chunks - firstChunk + chunkStep - 1) / chunkStep : 0;

  // The ring: what is fetched runs `stages` chunks ahead of what is multiplied, over the ends of tiles.
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared + at.ring)) + warp * p.stages * C::bytes;
  const uint8_t* ringAt = shared + at.ring + warp * p.stages * C::bytes;
  const int sliceBytes = static_cast<int>(int64_t(begin) / 32 * (4 * Codes::bits));
  constexpr int pieces = C::rowBytes / 16;
  constexpr bool even = 32 % pieces == 0;  // a lane copies the same piece of every so many rows
  int fetchTile = firstTile, fetchChunk = 0, fetchStage = 0;
  const auto fetch = [&]() {
    if (perWarp > 0 && fetchTile < tiles) {
      const int from = sliceBytes + (firstChunk + fetchChunk * chunkStep) * C::rowBytes;
      const uint32_t stage = ring + fetchStage * C::bytes;
      if (even && from + C::rowBytes <= p.rowBytes && (fetchTile + 1) * perTile <= p.n) {
        constexpr int rowsApart = even ? 32 / pieces : 1;
        const int row = lane / pieces, piece = lane % pieces;
        const int64_t offset = (int64_t(fetchTile) * perTile + row) * p.rowBytes + from + piece * 16;
        // Rows that a lane copies are an even number apart.
        const uint32_t target = stage + row * C::pitch + (C::swaps ? (piece * 16) ^ (row % 2 * 64) : piece * 16);
#pragma unroll
        for (int i = 0; i < 16 / rowsApart; i++) {
          const int part = p.parts == 2 && i * rowsApart >= 8 ? 1 : 0;
          const int apart = i * rowsApart - 8 * part;
          copyAsync16(target + i * rowsApart * C::pitch, p.weights[part].codes + offset + apart * p.rowBytes, 16);
        }
      } else {
        for (int i = lane; i < 16 * pieces; i += 32) {
          const int row = i / pieces, piece = i % pieces;
          const int n = min(fetchTile * perTile + row % perTile, p.n - 1);
          const int offset = from + piece * 16;
          const bool inside = offset < p.rowBytes;
          copyAsync16(stage + row * C::pitch + (C::swaps ? (piece * 16) ^ (row % 2 * 64) : piece * 16),
                      p.weights[row / perTile].codes + n * p.rowBytes + (inside ? offset : 0), inside ? 16 : 0);
        }
      }
      if (++fetchChunk == perWarp) fetchChunk = 0, fetchTile += tileStep;
      if (++fetchStage == p.stages) fetchStage = 0;
    }
    commitCopies();
  };
  for (int i = 0; i < p.stages - 1; i++) fetch();

  const int columns = p.columnsOfX * p.parts3;
  const auto fixedOr = [](bool fixed, bool other) { return Mode::fixed ? fixed : other; };
  const bool ends = fixedOr(ModeOf<Mode>::ends, p.promote == Promote::end);
  const bool scaled = fixedOr(ModeOf<Mode>::scaled, p.promote == Promote::scaled);
  const bool floatZero = fixedOr(ModeOf<Mode>::floatZero, p.floatZero);
  const bool intZero = fixedOr(false, p.element.zeros);
  const bool folds = Codes::folds && fixedOr(ModeOf<Mode>::folds, p.fold);
  const bool zeros = floatZero || intZero;
  // Segments between promotions are a power of two.
  const int unitShift = ends ? 31 - __clz(C::segments) : Mode::fixed ? ModeOf<Mode>::unitShift : 31 - __clz(p.unit);
  const int unitMask = (1 << unitShift) - 1;
  const int perChunk = C::segments >> unitShift;  // promotions of a chunk
  Element element = p.element;
  if constexpr (Mode::fixed) element.zeros = false;

  // Lane t of a row's four keeps the scale and zero codes of promotions t and t + 4 of a chunk; index 0 is row g, 1 row g + 8.
  uint32_t scaleBits[2][2], zeroBits[2][2], nextScale[2][2] = {}, nextZero[2][2] = {};
  uint32_t foldBits[2][8], nextFold[2][8] = {};
  const FastScale scaleOf(p.weights[0].scale.codec), zeroOf(p.weights[0].zero.codec);
  const auto fetchScales = [&](int tile, int chunk) {
    if (!scaled && !zeros && !folds) return;
    const int k0 = begin + chunk * C::k;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Weights& w = p.weights[p.parts == 2 ? r : 0];
      const int n = min(tile * perTile + (p.parts == 2 ? g : g + 8 * r), p.n - 1);
      const int row = n / w.scale.rows;
      if constexpr (ModeOf<Mode>::scaled) {
        // A power of two of elements a block, one row each: index by shift.
        const int index = min((k0 >> (unitShift + 5)) + (t & (perChunk - 1)), w.scale.columns - 1);
        const int64_t base = int64_t(n) * w.scale.columns + index;
        if constexpr (ModeOf<Mode>::scaleBytes == 2) {
          nextScale[r][0] = __ldg(reinterpret_cast<const uint16_t*>(w.scale.at) + base);
          if (floatZero) nextZero[r][0] = __ldg(reinterpret_cast<const uint16_t*>(w.zero.at) + base);
        } else {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            if (4 * h >= perChunk) continue;
            nextScale[r][h] = __ldg(w.scale.at + int64_t(n) * w.scale.columns +
                                    min((k0 >> (unitShift + 5)) + t + 4 * h, w.scale.columns - 1));
          }
        }
      } else if constexpr (!Mode::fixed) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int index = t + 4 * h;
          if (index >= perChunk) continue;
          const int k = min(k0 + (index << (unitShift + 5)), p.k - 1);
          if (scaled) nextScale[r][h] = loadScaleBits(w.scale, int64_t(row) * w.scale.columns + k / w.scale.k);
          if (zeros) nextZero[r][h] = loadScaleBits(w.zero, int64_t(n / w.zero.rows) * w.zero.columns + k / w.zero.k);
        }
      }
      if constexpr (Codes::folds) {
        if (folds) {
#pragma unroll
          for (int s = 0; s < C::segments; s++) {
            const int index = min((k0 + s * 32 + t * 8) >> 4, w.scale.columns - 1);
            nextFold[r][s] = __ldg(w.scale.at + int64_t(n) * w.scale.columns + index);
          }
        }
      }
    }
  };
  // Weights and their scales are nobody's results: they are on their way before x is there.
  if (perWarp > 0 && firstTile < tiles) fetchScales(firstTile, firstChunk);

  awaitPredecessor();
  const int rows = min(static_cast<int>(p.x.rows.at(p.symbols)) - m0, p.columnsOfX);
  if (rows <= 0) {
    awaitCopies(0);
    return;
  }
  stageX<Codes, Tiles>(p, shared, at, m0, rows, begin, count);
  __syncthreads();

  const auto fromOwner = [&](uint32_t (&bits)[2], int unit) {
    return __shfl_sync(~0u, unit < 4 ? bits[0] : bits[1], (lane & ~3) | (unit & 3));
  };

  // Columns past the last read it again: what they sum is never looked at.
  int columnAt[Tiles];
#pragma unroll
  for (int j = 0; j < Tiles; j++) columnAt[j] = min(j * 8 + g, columns - 1) * 64 + t * 16;
  float* exchange = reinterpret_cast<float*>(shared + at.exchange);
  const float* sums = reinterpret_cast<const float*>(shared + at.sums);
  int stage = 0, turn = 0;
  if constexpr (shares) {
    if (!worker) {
      const int sheet = sheetOf<Tiles>(p);
      int of = 0;  // the team whose tile is next
#pragma unroll 1
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int copy = of * 2 + turn % 2;
        storeSums<kTeam, Tiles>(p, exchange + copy * kTeam * sheet, m0, tile * perTile, perTile, rows,
                                [&] { barrierSync<kMeeting>(1 + copy); });
        __syncwarp();
        if (tile + 2 * tileStep < tiles) barrierArrive<kMeeting>(1 + 2 * teams + copy);
        if (++of == teams) of = 0, turn++;
      }
      return;
    }
  }
  for (int tile = firstTile; tile < tiles; tile += tileStep, turn++) {
    float total[Tiles][4], sum[Tiles][4];
#pragma unroll
    for (int j = 0; j < Tiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) total[j][c] = 0.0f, sum[j][c] = 0.0f;

    for (int i = 0; i < perWarp; i++) {
      const int chunk = firstChunk + i * chunkStep;
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) scaleBits[r][h] = nextScale[r][h], zeroBits[r][h] = nextZero[r][h];
        // One exchange for both.
        if constexpr (ModeOf<Mode>::scaleBytes == 2) scaleBits[r][0] |= zeroBits[r][0] << 16;
#pragma unroll
        for (int s = 0; s < 8; s++) foldBits[r][s] = nextFold[r][s];
      }
      __syncwarp();
      fetch();
      if (i + 1 < perWarp) fetchScales(tile, chunk + chunkStep);
      else if (tile + tileStep < tiles) fetchScales(tile + tileStep, firstChunk);
      awaitCopies(p.stages - 1);
      __syncwarp();
      const uint8_t* rowsAt = ringAt + stage * C::bytes + g * C::pitch;
      const int swap = C::swaps ? g % 2 * 64 : 0;
      if (++stage == p.stages) stage = 0;
      const uint8_t* xAt = shared + at.x + chunk * (C::segments * columns * 64);
      const float* sumsAt = sums + chunk * (perChunk * Tiles * 8) + 2 * t;
      float scale[2] = {1.0f, 1.0f}, zero[2] = {0.0f, 0.0f};
#pragma unroll
      for (int s = 0; s < C::segments; s++) {
        const int unit = s >> unitShift;
        if ((scaled || zeros) && (s & unitMask) == 0) {
#pragma unroll
          for (int r = 0; r < 2; r++) {
            if constexpr (ModeOf<Mode>::scaled) {
              const uint32_t bits = fromOwner(scaleBits[r], unit);
              if constexpr (ModeOf<Mode>::scaleBytes == 2) {
                scale[r] = __uint_as_float(bits << 16);
                zero[r] = __uint_as_float(bits & 0xffff0000u);
              } else {
                scale[r] = decodeScale(ScaleCodec::e8m0, bits);
              }
            } else {
              if (scaled) scale[r] = scaleOf(fromOwner(scaleBits[r], unit));
              if (zeros) zero[r] = zeroOf(fromOwner(zeroBits[r], unit));
            }
          }
        }
        uint32_t low[4], high[4];
        Codes::decode(rowsAt + ((s * 4 * Codes::bits) ^ swap), t * Codes::bits, element, intZero ? zero[0] : 0.0f, low);
        Codes::decode(rowsAt + 8 * C::pitch + ((s * 4 * Codes::bits) ^ swap), t * Codes::bits, element, intZero ? zero[1] : 0.0f, high);
        if constexpr (Codes::folds) {
          if (folds) {
            const __nv_bfloat162 f0 = __float2bfloat162_rn(decodeScale(ScaleCodec::e4m3, foldBits[0][s]));
            const __nv_bfloat162 f1 = __float2bfloat162_rn(decodeScale(ScaleCodec::e4m3, foldBits[1][s]));
#pragma unroll
            for (int j = 0; j < 4; j++) {
              low[j] = asWord(__hmul2(asPair(low[j]), f0));
              high[j] = asWord(__hmul2(asPair(high[j]), f1));
            }
          }
        }
        const bool fresh = !ends && (s & unitMask) == 0;
        const uint32_t a0[4] = {low[0], high[0], low[1], high[1]};
        const uint32_t a1[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
        for (int j = 0; j < Tiles; j++) {
          const uint4 b = *reinterpret_cast<const uint4*>(xAt + s * columns * 64 + columnAt[j]);
          if (fresh) multiplyFresh16x8x16(sum[j], a0, b.x, b.y);
          else multiply16x8x16(sum[j], a0, b.x, b.y);
          multiply16x8x16(sum[j], a1, b.z, b.w);
        }
        if (((s + 1) & unitMask) == 0 && !ends) {
          if (scaled) {
#pragma unroll
            for (int j = 0; j < Tiles; j++) {
#pragma unroll
              for (int c = 0; c < 4; c++) total[j][c] = fmaf(scale[c / 2], sum[j][c], total[j][c]);
              if (floatZero) {
                const float2 of = *reinterpret_cast<const float2*>(sumsAt + (unit * Tiles + j) * 8);
                total[j][0] = fmaf(zero[0], of.x, total[j][0]);
                total[j][1] = fmaf(zero[0], of.y, total[j][1]);
                total[j][2] = fmaf(zero[1], of.x, total[j][2]);
                total[j][3] = fmaf(zero[1], of.y, total[j][3]);
              }
            }
          } else {
#pragma unroll
            for (int j = 0; j < Tiles; j++)
#pragma unroll
              for (int c = 0; c < 4; c++)
                total[j][c] = __int_as_float(__float_as_int(total[j][c]) + __float2int_rn(sum[j][c]));
          }
        }
      }
    }

    // Sums of the parts of x, and the warps' shares of K, meet: by column, so that neighbouring words are read.
    const int sheet = sheetOf<Tiles>(p);
    const int copy = team * 2 + turn % 2;
    float* mine = exchange + (shares ? copy * kTeam + firstChunk : warp) * sheet;
    if (shares && turn >= 2) barrierSync<kMeeting>(1 + 2 * teams + copy);  // the copy of two turns ago was read
    if (singleRow(p)) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float first = ends ? sum[0][2 * h] : total[0][2 * h], second = ends ? sum[0][2 * h + 1] : total[0][2 * h + 1];
        const float third = __shfl_sync(~0u, first, (lane & ~3) | 1);
        if (t == 0) mine[g + 8 * h] = p.parts3 == 3 ? third + second + first : first;
      }
    } else {
#pragma unroll
      for (int j = 0; j < Tiles; j++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          mine[(j * 8 + 2 * t + c % 2) * kPitch + g + 8 * (c / 2)] = ends ? sum[j][c] : total[j][c];
    }
    __syncwarp();
    if constexpr (shares) {
      barrierArrive<kMeeting>(1 + copy);
    } else {
      storeSums<1, Tiles>(p, mine, m0, tile * perTile, perTile, rows);
      __syncwarp();
    }
  }
}

}  // namespace fewbit::linear
