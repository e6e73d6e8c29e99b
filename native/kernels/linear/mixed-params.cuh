// What the mixed kernels are told, and how shared memory and prepared x are laid out.
#pragma once
#include "skinny-params.cuh"

namespace fewbit::linear {

/** Elements of K of a stage of the ring, in segments of 32. */
constexpr int kMixedK = 128;
constexpr int kMixedSegments = kMixedK / 32;
/** Rows of the weights that a block owns; of a gated product every other eight are those of up. */
constexpr int kMixedRows = 128;
/** Two warpgroups that multiply, and one that fetches and gives registers to the others. */
constexpr int kMixedWorkers = 8;
constexpr int kFetchers = 128;
constexpr int kMixedThreads = kMixedWorkers * 32 + kFetchers;
/** Columns of x that one pass takes at most. */
constexpr int kMixedColumns = 128;
/** Blocks that may share a tile's K. */
constexpr int kMixedSlices = 8;
/** Floats from a column of a block's sums to the next: a warp's stores fall into different banks. */
constexpr int kMixedPitch = kMixedRows + 4;

/** `unit` is at most a stage's segments, `kSlice` whole stages, `columnsOfX` the rows of x of one pass. */
struct MixedParams : SkinnyParams {
  int tiles = 0, passes = 1, slices = 1;
  uint8_t* columns = nullptr;  // prepared x: [pass][stage][K / 64][N][64] bf16, swizzled
  /**
   * With float zero points, sums of x over what is promoted together. Those that the matrix unit multiplies are [pass][stage][N][8]
   * bf16, three parts of each of two sums, and zeros; others are [pass][stage][promotion][N] float32.
   */
  uint8_t* sums = nullptr;
  bool multipliesSums = false;
  float* factors = nullptr;    // of the rows of x
};

/** A stage's rows of weights: padding puts the rows that one load reads into different banks. */
template <int Bits>
struct MixedRow {
  static constexpr int bytes = kMixedK / 8 * Bits;
  static constexpr int pitch = bytes + ((4 * Bits) % 16 == 0 ? 4 * Bits : 16);
};

__host__ __device__ inline int mixedStages(int k) { return (k + kMixedK - 1) / kMixedK; }
/** Promotions of a stage. */
__host__ __device__ inline int promotionsOf(const MixedParams& p) { return kMixedSegments / p.unit; }
/** Bytes of a column's sums of x in a stage: of up to four float32, or of eight bf16. */
constexpr int kMixedSumBytes = 16;

constexpr int kMostMixedStages = 8;
struct MixedBarriers {
  uint64_t full[kMostMixedStages], empty[kMostMixedStages];
};

/** Shared memory of a block, from a multiple of 1024 on: the ring, later the sums. */
template <int Bits, int N>
struct MixedShared {
  static constexpr int columnBytes = N * kMixedK * 2;
  static constexpr int sumBytes = N * kMixedSumBytes;
  static constexpr int codeBytes = kMixedRows * MixedRow<Bits>::pitch;
  int sums, codes, barriers, total;
  __host__ __device__ MixedShared(int stages, bool multipliesSums) {
    sums = stages * columnBytes;
    codes = sums + (multipliesSums ? stages * sumBytes : 0);
    const int ring = codes + stages * codeBytes + 16;  // fields of odd widths are read a word beyond their end
    const int sheet = N * kMixedPitch * 4;
    barriers = ring > sheet ? ring : sheet;
    total = barriers + static_cast<int>(sizeof(MixedBarriers));
  }
};

}  // namespace fewbit::linear
