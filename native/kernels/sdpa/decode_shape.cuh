// How attention over a cache is cut: keys into tiles of shared memory, and among warps, blocks and splits.
#pragma once
#include <algorithm>

#include "cache.cuh"
#include "decode.hpp"

namespace fewbit::sdpa {
namespace {

using Params = DecodeParams;

/** Blocks of a cluster, which join their results in shared memory. */
constexpr int kCluster = 8;
/** Keys at least for which a split is worth its join. */
constexpr int kLeastKeys = 256;

/** What the bytes of a cached row are. */
template <class C, int Size>
struct Row {
  static constexpr int kBytes = Size * C::kBits / 8;
  static constexpr bool kGrouped = C::kZero != 0;
  static constexpr int kGroups = kGrouped ? Size / 32 : 1;
  static constexpr int kScales = C::kScale * kGroups, kZeros = C::kZero * kGroups;
};

/** Floats of a finished piece of a row: its output, the greatest score, the sum of its weights. */
template <int Size>
constexpr int kLine = Size + 2;
/** Bytes of a row that the blocks of a cluster give to one of them. */
template <int Size>
constexpr int kGiven = kCluster * kLine<Size> * 4;

/** Rows `Stride` bytes apart; `byte` lies in the block of 128 bytes of that number. */
template <int Stride>
struct Padded {
  static __device__ __forceinline__ int at(int row, int block, int byte) { return row * Stride + block * 128 + byte; }
};
/** Rows as tensor copies lay them down: blocks of 128 bytes, `Rows` of them one below the other, swizzled by 128 bytes. */
template <int Bytes, int Rows>
struct Swizzled {
  static __device__ __forceinline__ int at(int row, int block, int byte) {
    const int linear = row * (Bytes < 128 ? Bytes : 128) + byte;
    return block * Rows * 128 + (linear ^ (linear >> 7 & 7) << 4);
  }
};

/** Where the keys and values of a stage lie in shared memory, and their scales and zero points. */
struct Stage {
  uint8_t *keys, *values, *keyScales, *valueScales, *keyZeros, *valueZeros;
};

/**
 * Tiles that each warp copies for itself, row by row: any cache on any device. Rows are apart so that neither k's nor v's readers meet in
 * a bank. In a cluster blocks are small; else one fills a multiprocessor, and its warps read neighbouring tiles.
 */
template <class C, int Size, bool Joined>
struct Ring {
  using R = Row<C, Size>;
  static constexpr int kWarps = Joined || C::kBits == 32 ? 4 : 8;
  /** Keys that a warp takes at a time: more where they are small, so that its waits are fewer, unless there are few keys. */
  static constexpr int kKeys = !Joined && C::kBits < 8 ? 32 : 16;
  static constexpr int kKeyStride = R::kBytes + 16, kValueStride = R::kBytes + 16;
  using KeyPlace = Padded<kKeyStride>;
  using ValuePlace = Padded<kValueStride>;
  static constexpr int kValues = kKeys * kKeyStride, kScaleAt = kValues + kKeys * kValueStride;
  static constexpr int kZeroAt = kScaleAt + 2 * kKeys * R::kScales;
  static constexpr int kBytes = (kZeroAt + 2 * kKeys * R::kZeros + 15) / 16 * 16;
  static constexpr int kStages = kBytes > (Joined ? 10000 : 6000) ? 2 : kBytes > (Joined ? 6000 : 5000) ? 3 : kBytes > 3000 ? 4 : 6;
  static constexpr int kJoin = (kWarps + 1) * 8 * kLine<Size> * 4;
  /** What a block of a cluster is given by the others comes behind the rest. */
  static constexpr int kGivenAt = kWarps * kStages * kBytes > kJoin ? kWarps * kStages * kBytes : kJoin;
  static constexpr int kShared = kGivenAt + (Joined ? kGiven<Size> : 0);
  static_assert(kShared <= 160 * 1024, "sdpa-decode.ts asks devices for that much");
  static __device__ Stage stage(uint8_t* at) {
    return {at,           at + kValues, at + kScaleAt, at + kScaleAt + kKeys * R::kScales,
            at + kZeroAt, at + kZeroAt + kKeys * R::kZeros};
  }
};

/** Tiles of all warps of a block that Hopper's copy unit fetches at once: long bursts of neighbouring bytes, for many keys. */
template <class C, int Size, int Rows>
struct Stream {
  using R = Row<C, Size>;
  // Codes of 4 bits take the most instructions a byte: as many warps as there are registers for.
  static constexpr bool kMany = C::kBits < 8 && Rows == 4;
  static constexpr int kWarps = kMany ? 16 : 8, kKeys = C::kBits > 8 || kMany ? 16 : 32, kAll = kWarps * kKeys;
  using KeyPlace = Swizzled<R::kBytes, kAll>;
  using ValuePlace = Swizzled<R::kBytes, kAll>;
  /** Blocks of 128 bytes of a row, and lines of them (a row of fewer bytes shares one), which take two copies where they exceed 256. */
  static constexpr int kBoxes = R::kBytes > 128 ? R::kBytes / 128 : 1, kLines = kAll * R::kBytes / kBoxes / 128;
  static constexpr int kBoxRows = kLines > 256 ? kLines / 2 : kLines;
  static constexpr int kRows = kAll * R::kBytes, kScaleAt = 2 * kRows, kZeroAt = kScaleAt + 2 * kAll * R::kScales;
  static constexpr int kBytes = (kZeroAt + 2 * kAll * R::kZeros + 1023) / 1024 * 1024;
  static constexpr int kStages = 222 * 1024 / kBytes < 8 ? 222 * 1024 / kBytes : 8;
  static constexpr int kJoin = (kWarps + 1) * 8 * kLine<Size> * 4;
  static constexpr int kShared = 1024 + (kStages * kBytes > kJoin ? kStages * kBytes : kJoin);
  static __device__ Stage stage(uint8_t* at) {
    return {at,           at + kRows, at + kScaleAt, at + kScaleAt + kAll * R::kScales,
            at + kZeroAt, at + kZeroAt + kAll * R::kZeros};
  }
};
/** Caches whose rows are small enough for several stages of a stream. */
template <class C>
constexpr bool kStreams = C::kBits <= 16;

/** Which keys a query row sees. */
struct Seen {
  int tokens, position, keys, capacity;
  const Params& p;
  __device__ explicit Seen(const Params& p)
      : tokens(static_cast<int>(p.tokens.at(p.symbols))),
        position(p.position < 0 ? 0 : static_cast<int>(p.symbols[p.position])),
        capacity(static_cast<int>(p.keys.at(p.symbols))),
        p(p) {
    keys = p.position < 0 ? capacity : position + tokens;
  }
  __device__ int from(int t) const { return p.window == 0 ? 0 : max(0, position + t - p.window + 1); }
  __device__ int to(int t) const {
    return p.causal ? min(position + t + 1, keys) : p.window == 0 ? keys : min(position + t + p.window, keys);
  }
};

/** How the keys of a block of query rows are cut into tiles, `each` for a split; `used` splits have some. */
struct Cut {
  int first, end, tiles, each, used;
  __device__ Cut(const Seen& seen, int block, int rows, int keys, int splits, int least) {
    const int group = seen.p.group;
    const int last = min(block * rows + rows, seen.tokens * group) - 1;
    first = seen.from(block * rows / group) / 16 * 16;
    end = max(seen.to(last / group), first);
    tiles = (end - first + keys - 1) / keys;
    each = max((tiles + splits - 1) / splits, least);
    used = max((tiles + each - 1) / each, 1);
  }
};

}  // namespace
}  // namespace fewbit::sdpa
