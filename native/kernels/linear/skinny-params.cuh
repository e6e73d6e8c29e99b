// What the skinny kernels are told, how they cut up K and shared memory, and the product they are made of.
#pragma once
#include "decode.cuh"
#include "skinny-heads.cuh"

namespace fewbit::linear {

enum class Promote : int {
  end,      // scales do not change along K: they multiply the finished sum
  scaled,   // a partial sum is scaled and added where the scale changes
  integer,  // products of integer codes: exact partial sums are added as int32
};

struct SkinnyParams : WeightGroup {
  bool fold = false;  // scales of 16 elements, exact in bf16 with their codes, multiply those
  Promote promote = Promote::end;
  int unit = 0;  // segments of 32 elements between promotions: a power of two, at most a chunk's

  Activations x;
  bool separable = false;  // x's codes are exact in bf16 and its scales constant along K
  int columnsOfX = 1;      // rows of x that one block takes
  int parts3 = 3;          // bf16 parts of an element of x; with one of an x that is not separable, its inner scale is in it
  bool alike = false;      // x's codes are of the weights' kind, without zero points

  int stages = 2;      // of the ring
  int inFlight = 2;    // stages of it that are on their way at a time: more would hold up x and what other kernels read
  int scaleSlots = 0;  // tiles whose scales lie in shared memory
  int kSlice = 0;      // elements of K of one block (grid.y blocks side by side): whole chunks
  float* partial = nullptr;  // [slices, rows of x (capacity), n (* parts)] when there are several
  int64_t partialRows = 0;
  Epilogue epilogue;
  /** Where outputs go that are heads: `n` is then half of them, and both parts are one matrix. */
  Heads heads;
  const uint32_t* symbols = nullptr;

  /** The row of the weights, and of their scales, that makes output `n` of a part. */
  __device__ __forceinline__ int rowOf(int n, int part) const {
    return heads.shift < 0 ? n : n + (((n >> heads.shift) + part) << heads.shift);
  }
};

/**
 * What is known at compile time of how scales are applied. `Any` reads all of it at run time, and scales from global memory; the
 * others are the hot cases: segments can be interleaved, and scales come with the weights.
 */
struct Any {
  static constexpr bool digits = false, bytes = false, halves = false;
  static constexpr bool loads = false, fixed = false, scaled = false, floatZero = false, folds = false;
  static constexpr int unit = 1, scaleBytes = 0;
};
/** Scales and zero points do not stand in the loop over K. */
struct Plain : Any {
  static constexpr bool fixed = true;
};
/** A scale of `Bytes` bytes (bf16 or e8m0) for each `Unit` segments, and perhaps a bf16 zero point that is added. */
template <int Unit, bool Zero, int Bytes = 2>
struct Grouped : Plain {
  static constexpr bool scaled = true, floatZero = Zero;
  static constexpr int unit = Unit, scaleBytes = Bytes;
};
/** e4m3 scales of 16 elements multiply the codes. */
struct Folded : Plain {
  static constexpr bool folds = true;
  static constexpr int scaleBytes = 1;
};

/** As `Any`, but for how often scales change. */
template <int Unit>
struct Loaded : Plain {
  static constexpr bool loads = true, scaled = true;
  static constexpr int unit = Unit;
};

/** One row of x as digits (skinny-digits.cuh), so many. */
constexpr int kDigits = 4;
template <class Mode>
struct InDigits : Mode {
  static constexpr bool digits = true;
};
/** One row of signed bytes by signed bytes (skinny-bytes.cuh). */
struct InBytes : Plain {
  static constexpr bool bytes = true;
};
/** One row of bf16 or e4m3 by e4m3 (skinny-halves.cuh). */
struct InHalves : Plain {
  static constexpr bool halves = true;
};

/** Warps that multiply. They share each tile's K: warp i takes the chunks i, i + kWorkers, ... */
constexpr int kWorkers = 8;
/** Warps that add up what workers found, and store it: so many for every other tile. */
__host__ __device__ constexpr int kFinishers(int tiles) { return tiles == 1 ? 1 : 2; }
/** The workers, one warp that fetches, and two groups of finishers. */
__host__ __device__ constexpr int kThreads(int tiles) { return (kWorkers + 1 + 2 * kFinishers(tiles)) * 32; }

/** What a worker takes at a time: 16 rows of the weights, `k` elements wide; `Spread` is what four lanes read of a row at once. */
template <int Bits, int Spread>
struct Chunk {
  static constexpr int segments = Bits == 16 ? 2 : Bits <= 4 ? 8 : 4;  // of 32 elements
  static constexpr int k = segments * 32;
  static constexpr int rowBytes = segments * 4 * Bits;
  /** A stage of the ring: one chunk a worker. The spread puts the rows that one load reads into different banks. */
  static constexpr int pitch = kWorkers * rowBytes + Spread;
  static constexpr int stageBytes = 16 * pitch;
};
template <class Codes>
using ChunkOf = Chunk<Codes::bits, Codes::spread>;

__device__ __forceinline__ void multiply16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiplyFresh16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ __forceinline__ void multiplyHalves16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/** The same of 64 elements of signed bytes, to int32; lanes hold 16 neighbouring codes of a row, and x is in their order. */
__device__ __forceinline__ void multiplyBytes16x8x32(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/** The same by bytes without a sign. */
__device__ __forceinline__ void multiplyUnsigned16x8x32(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiplyBytes16x8x64(int (&sum)[4], const uint32_t (&low)[4], const uint32_t (&high)[4], const uint4& b) {
  multiplyBytes16x8x32(sum, {low[0], high[0], low[1], high[1]}, b.x, b.y);
  multiplyBytes16x8x32(sum, {low[2], high[2], low[3], high[3]}, b.z, b.w);
}

/** Copies of a tile's sums that meet are laid out by column, and so that a warp's stores fall into different banks. */
constexpr int kPitch = 20;  // floats of a column of 16 rows

/** One row of x, whose parts meet in registers: only one column of sums leaves a warp. */
__host__ __device__ __forceinline__ bool singleRow(const SkinnyParams& p) {
  return p.columnsOfX == 1 && p.promote != Promote::integer;
}
/** Floats of one warp's copy of a tile's sums. */
template <int Tiles>
__host__ __device__ __forceinline__ int sheetOf(const SkinnyParams& p) {
  return singleRow(p) ? 16 : Tiles * 8 * kPitch;
}

/** Chunks of `count` elements, and the stages of the ring that they take. */
template <class Codes>
__host__ __device__ inline int chunksOf(int count) {
  return (count + ChunkOf<Codes>::k - 1) / ChunkOf<Codes>::k;
}
template <class Codes>
__host__ __device__ inline int stagesOfTile(int count) {
  return (chunksOf<Codes>(count) + kWorkers - 1) / kWorkers;
}

/** Bytes of x in shared memory from one segment of 32 elements to the next. */
template <class Mode>
__host__ __device__ inline int segmentBytes(const SkinnyParams& p) {
  return Mode::bytes ? 32 : Mode::digits ? 32 * kDigits : p.columnsOfX * p.parts3 * 64;
}

/** Bytes of a row's scales of a chunk, where they come with the weights: K is whole chunks then. */
template <class Codes, class Mode>
constexpr int kScaleBytes = ChunkOf<Codes>::segments / (Mode::folds ? 1 : Mode::unit) * (Mode::folds ? 2 : Mode::scaleBytes);
/** Bytes from row to row of a tile's scales in shared memory. */
template <class Codes, class Mode>
__host__ __device__ inline int scalePitch(const SkinnyParams& p) {
  return chunksOf<Codes>(p.k) * kScaleBytes<Codes, Mode> + 16;
}

/** Barriers of shared memory: one of each kind a stage, and one of each kind a copy of a tile's sums. */
constexpr int kMostStages = 8;
struct SkinnyBarriers {
  uint64_t full[kMostStages], empty[kMostStages];
  uint64_t summed[2], stored[2];
};

/** Integers of a chunk that digits are summed with: eight a unit, its power, and its sum of x where scales are loaded. */
template <class Codes, class Mode>
constexpr int kDigitInts = [] {
  constexpr int segments = ChunkOf<Codes>::segments, units = segments / (Mode::scaled ? Mode::unit : segments);
  return units * 8 + (units + 3) / 4 * 4 * (Mode::loads ? 2 : 1);
}();

/** Floats from a chunk's power of two to the next one's, where x is f16. */
constexpr int kPowerFloats = 4;

/** Floats that a chunk's sums of x take, or what digits or halves are summed with. */
template <class Codes, int Tiles, class Mode>
__host__ __device__ inline int sumsOfChunk(const SkinnyParams& p) {
  if constexpr (Mode::digits) return kDigitInts<Codes, Mode>;
  if constexpr (Mode::halves) return kPowerFloats;
  return ChunkOf<Codes>::segments / p.unit * Tiles * 8;
}

/** Of a chunk's sums of x, as three bf16 each, where digits are used: 8 of a part side by side. */
constexpr int kPartBytes = 48;

/** Shared memory of a block, in order, after the barriers. */
struct SkinnyShared {
  size_t x, sums, parts, exchange, scales, ring, total;
};
template <class Codes, int Tiles, class Mode>
__host__ __device__ inline SkinnyShared sharedOf(const SkinnyParams& p) {
  using C = ChunkOf<Codes>;
  const size_t segments = chunksOf<Codes>(p.kSlice) * C::segments;
  SkinnyShared at;
  at.x = (sizeof(SkinnyBarriers) + 127) / 128 * 128;
  at.sums = at.x + segments * segmentBytes<Mode>(p);
  at.parts = at.sums + (p.floatZero || Mode::digits || Mode::halves ? segments / C::segments * sumsOfChunk<Codes, Tiles, Mode>(p) * 4 : 0);
  at.exchange = at.parts + (Mode::digits && Mode::floatZero ? segments / C::segments * kPartBytes : 0);
  at.scales = at.exchange + size_t{2} * kWorkers * sheetOf<Tiles>(p) * 4;
  at.ring = at.scales + (Mode::scaleBytes > 0 ? size_t(p.scaleSlots) * 16 * scalePitch<Codes, Mode>(p) * (Mode::floatZero ? 2 : 1) : 0);
  at.total = at.ring + size_t(p.stages) * C::stageBytes + 16;  // fields of odd widths are read a word beyond their end
  return at;
}

}  // namespace fewbit::linear
