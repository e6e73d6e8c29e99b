// What the skinny kernels are told, how they cut up K and shared memory, and the instructions they are made of.
#pragma once
#include "decode.cuh"

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
  int parts3 = 3;          // bf16 parts of an element of x

  int stages = 2;
  int kSlice = 0;              // elements of K of one block (grid.y blocks side by side): whole chunks of all warps
  float* partial = nullptr;    // [slices, rows of x (capacity), n (* parts)] when there are several
  int64_t partialRows = 0;
  Epilogue epilogue;
  const uint32_t* symbols = nullptr;
};

/**
 * What is known at compile time of how scales are applied. `Any` reads all of it at run time; the others are the hot cases, where
 * the compiler can interleave segments.
 */
struct Any {
  static constexpr bool fixed = false;
};
/** Scales and zero points do not stand in the loop over K. */
struct Plain {
  static constexpr bool fixed = true, scaled = false, floatZero = false, folds = false;
  static constexpr int unit = 0, scaleBytes = 0;
};
/** A scale of `Bytes` bytes (bf16 or e8m0) for each `Unit` segments, and perhaps a bf16 zero point that is added. */
template <int Unit, bool Zero, int Bytes = 2>
struct Grouped {
  static constexpr bool fixed = true, scaled = true, floatZero = Zero, folds = false;
  static constexpr int unit = Unit, scaleBytes = Bytes;
};
/** e4m3 scales of 16 elements multiply the codes. */
struct Folded {
  static constexpr bool fixed = true, scaled = false, floatZero = false, folds = true;
  static constexpr int unit = 0, scaleBytes = 1;
};

template <int Bits>
struct Chunk {
  static constexpr int segments = Bits == 16 ? 2 : Bits <= 4 ? 8 : 4;  // of 32 elements
  static constexpr int k = segments * 32;
  static constexpr int rowBytes = segments * 4 * Bits;
  // Rows of one load lie in different banks: by padding, or (16 bits) by swapping the halves of every other row.
  static constexpr bool swaps = Bits == 16;
  static constexpr int spread = swaps ? 0 : (4 * Bits) % 16 == 0 ? 4 * Bits : 16;
  static constexpr int pitch = rowBytes + spread;
  static constexpr int bytes = 16 * pitch;
};

/** A mode's constants, with values for `Any` that are never used. */
template <class Mode>
struct ModeOf {
  static constexpr bool scaled = Mode::scaled, floatZero = Mode::floatZero, folds = Mode::folds, ends = !Mode::scaled;
  static constexpr int unitShift = Mode::unit >= 4 ? 2 : Mode::unit >= 2 ? 1 : 0, scaleBytes = Mode::scaleBytes;
};
template <>
struct ModeOf<Any> {
  static constexpr bool scaled = false, floatZero = false, folds = false, ends = false;
  static constexpr int unitShift = 0, scaleBytes = 0;
};

__device__ __forceinline__ void copyAsync16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void awaitCopies(int pending) {
  if (pending >= 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
  else if (pending == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  else if (pending == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  else asm volatile("cp.async.wait_group 0;" ::: "memory");
}

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

/** The three bf16 parts of a float32, 8 bits each; what is not finite stays in the first. */
__device__ __forceinline__ void splitBf16(float value, uint32_t (&part)[3]) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t high = bits & 0xffff0000u;
  const float rest = value - __uint_as_float(high);
  const uint32_t middle = __float_as_uint(rest) & 0xffff0000u;
  const uint32_t low = __float_as_uint(rest - __uint_as_float(middle));
  part[0] = (isnan(value) ? 0x7fc00000u : high) >> 16;
  part[1] = finite ? middle >> 16 : 0;
  part[2] = finite ? low >> 16 : 0;
}

/** Whether warps share the K of a tile: in teams, each with tiles of its own. */
__host__ __device__ constexpr bool sharesK(int tiles) { return tiles == 1; }
constexpr int kTeam = 8;
__host__ __device__ constexpr int kTeams(int tiles) { return sharesK(tiles) ? 3 : 1; }
__host__ __device__ constexpr int kWarps(int tiles) { return sharesK(tiles) ? kTeam * kTeams(tiles) : 16; }
/** Where warps share K, one more adds up and stores what they found, so that they never wait for it. */
__host__ __device__ constexpr int kThreads(int tiles) { return (kWarps(tiles) + (sharesK(tiles) ? 1 : 0)) * 32; }

/** Threads of a barrier between a team and the warp that finishes. */
constexpr int kMeeting = (kTeam + 1) * 32;

template <int Threads>
__device__ __forceinline__ void barrierSync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}
template <int Threads>
__device__ __forceinline__ void barrierArrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}
/** Copies of a tile's outputs that meet are laid out by column, and so that a warp's stores fall into different banks. */
constexpr int kPitch = 20;  // floats of a column of 16 rows in the exchange

/** Segments of 32 elements that are multiplied for `count` elements: those of whole chunks. */
template <class Codes>
__host__ __device__ inline int segmentsOf(int count) {
  using C = Chunk<Codes::bits>;
  return (count + C::k - 1) / C::k * C::segments;
}

/** One row of x, whose parts meet in registers: only one column of sums leaves a warp. */
__host__ __device__ __forceinline__ bool singleRow(const SkinnyParams& p) {
  return p.columnsOfX == 1 && p.promote != Promote::integer;
}
/** Floats of one warp's copy of a tile's sums. */
template <int Tiles>
__host__ __device__ __forceinline__ int sheetOf(const SkinnyParams& p) {
  return singleRow(p) ? 16 : Tiles * 8 * kPitch;
}

/** Shared memory of a block, in order. */
struct SkinnyShared {
  size_t x, sums, exchange, ring, total;
};
template <class Codes, int Tiles>
__host__ __device__ inline SkinnyShared sharedOf(const SkinnyParams& p) {
  const int columns = p.columnsOfX * p.parts3;
  SkinnyShared at;
  at.x = 0;
  const size_t segments = segmentsOf<Codes>(p.kSlice);
  at.sums = segments * columns * 64;
  at.exchange = at.sums + (p.floatZero ? segments / p.unit * Tiles * 8 * 4 : 0);
  at.ring = at.exchange + size_t(sharesK(Tiles) ? 2 : 1) * kWarps(Tiles) * sheetOf<Tiles>(p) * 4;
  at.total = at.ring + size_t(kWarps(Tiles)) * p.stages * Chunk<Codes::bits>::bytes + 16;
  return at;
}

}  // namespace fewbit::linear
