// How attention over a cache is cut: keys into tiles of shared memory, and among warps, blocks and splits.
#pragma once
#include <algorithm>

#include "cache.cuh"
#include "decode.hpp"

namespace fewbit::sdpa {
namespace {

using Params = DecodeParams;

/** Warps of a block, which read neighbouring tiles: memory answers few long streams faster than many short ones. */
template <class C, bool Joined>
constexpr int kWarps = Joined || C::kBits == 32 ? 4 : 8;
template <class C>
constexpr bool kGrouped = C::kZero != 0;

/** Keys that a warp takes at a time: more where they are small, so that its waits are fewer, unless there are few keys. */
template <class C, bool Joined>
constexpr int kKeys = !Joined && C::kBits < 8 ? 32 : 16;

/** A tile of keys in shared memory: rows are apart so that neither k's nor v's readers meet in a bank. */
template <class C, int Size, bool Joined>
struct Ring {
  static constexpr int Keys = kKeys<C, Joined>, kWarps = sdpa::kWarps<C, Joined>;
  static constexpr int kRow = Size * C::kBits / 8;
  static constexpr int kGroups = kGrouped<C> ? Size / 32 : 1;
  static constexpr int kScales = C::kScale * kGroups, kZeros = C::kZero * kGroups;
  static constexpr int kKeyStride = kRow % 128 == 0 ? kRow + 64 : kRow, kValueStride = kRow + 16;
  static constexpr int kValues = Keys * kKeyStride, kScaleAt = kValues + Keys * kValueStride;
  static constexpr int kZeroAt = kScaleAt + 2 * Keys * kScales;
  static constexpr int kBytes = (kZeroAt + 2 * Keys * kZeros + 15) / 16 * 16;
  static constexpr int kStages = kBytes > 10000 ? 2 : kBytes > 6000 ? 3 : kBytes > 3000 ? 4 : 6;
  /** What a block keeps of its rows for the join: top, sum, and the unfinished output. */
  static constexpr int kJoin = (kWarps + 1) * 8 * (Size + 2) * 4;
  static constexpr int kShared = kWarps * kStages * kBytes > kJoin ? kWarps * kStages * kBytes : kJoin;
};

/** Which keys a query row sees, and how the keys of a block of rows are cut into tiles and shared among splits. */
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
    used = (tiles + each - 1) / each;
  }
};

/** Tiles of a split at least, unless the splits join in one kernel. */
constexpr int kLeast = 4;

}  // namespace
}  // namespace fewbit::sdpa
