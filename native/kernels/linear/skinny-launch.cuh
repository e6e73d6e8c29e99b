// Launching the kernels of skinny.cuh.
#pragma once
#include <algorithm>
#include <type_traits>

#include "skinny.cuh"

namespace fewbit::linear {

/** Chooses slices of K, stages and the grid, and enqueues. */
template <class Codes, int Tiles, class Mode>
cudaError_t launchSkinny(const Launch& launch, SkinnyParams p, int rows, uint64_t scratchBytes) {
  using C = Chunk<Codes::bits>;
  const Context& device = *launch.context;
  const int64_t sliceBytes = int64_t{4} * rows * p.n * p.parts;
  const int mostSlices = std::max<int64_t>(1, std::min<int64_t>(scratchBytes / sliceBytes, 64));
  const int chunks = (p.k + C::k - 1) / C::k;
  // All of K in one slice where x fits; then as few slices, and as few passes over the weights, as fit.
  int slices = 0, passes = 1;
  const int wanted = p.columnsOfX;
  for (; slices == 0; passes++) {
    p.columnsOfX = (wanted + passes - 1) / passes;
    for (int s = 1; s <= std::min(mostSlices, chunks); s++) {
      p.kSlice = (chunks + s - 1) / s * C::k;
      p.stages = 2;
      if (sharedOf<Codes, Tiles>(p).total <= device.sharedPerBlock) {
        slices = (chunks * C::k + p.kSlice - 1) / p.kSlice;
        break;
      }
    }
    if (slices == 0 && p.columnsOfX == 1) return cudaErrorInvalidConfiguration;
  }
  const int mostStages = kWarps(Tiles) > 16 ? 3 : 4;
  while (p.stages < mostStages) {
    p.stages++;
    if (sharedOf<Codes, Tiles>(p).total > device.sharedPerBlock) {
      p.stages--;
      break;
    }
  }
  if (slices == 1) p.partial = nullptr;
  p.partialRows = rows;
  const int perTile = 16 / p.parts;
  const int tiles = (p.n + perTile - 1) / perTile;
  const int tilesOfBlock = sharesK(Tiles) ? 1 : kWarps(Tiles);
  const int layers = (rows + p.columnsOfX - 1) / p.columnsOfX;
  const dim3 grid(std::max(1, std::min((tiles + tilesOfBlock - 1) / tilesOfBlock, device.sms / (slices * layers))), slices,
                  layers);
  const size_t shared = sharedOf<Codes, Tiles>(p).total;
  static size_t allowed[16] = {};  // per device: the attribute is set when a launch needs more than before
  size_t& most = allowed[device.device & 15];
  if (shared > most) {
    const cudaError_t error =
        cudaFuncSetAttribute(skinny<Codes, Tiles, Mode>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    most = shared;
  }
  const cudaError_t error = launchOverlapped(launch, skinny<Codes, Tiles, Mode>, grid, kThreads(Tiles), shared, p);
  if (error != cudaSuccess || slices == 1) return error;
  const int64_t outputs = int64_t(rows) * p.n;
  const int blocks = static_cast<int>(std::min<int64_t>((outputs + 255) / 256, device.sms * 8));
  return launchOverlapped(launch, finishSlices, dim3(blocks), 256, 0, p, slices);
}

/** Codes common enough for kernels of their own where x has many columns or scales are plain. */
template <class Codes>
struct Wide : std::false_type {};
template <>
struct Wide<Bf16Codes> : std::true_type {};
template <>
struct Wide<E4m3Codes> : std::true_type {};
template <>
struct Wide<E5m2Codes> : std::true_type {};
template <>
struct Wide<E2m1Codes> : std::true_type {};
template <>
struct Wide<Int4Codes> : std::true_type {};
template <>
struct Wide<IntCodes<8>> : std::true_type {};

template <class Codes, class Mode>
cudaError_t chooseTiles(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes) {
  // Rows that do not fit in the columns of one pass over the weights take another.
  constexpr bool wide = Wide<Codes>::value;
  const int most = (wide ? 32 : 8) / p.parts3;
  const int passes = (rows + most - 1) / most;
  p.columnsOfX = (rows + passes - 1) / passes;
  if constexpr (wide) {
    if (p.columnsOfX * p.parts3 > 8) return launchSkinny<Codes, 4, Mode>(launch, p, rows, scratchBytes);
  }
  return launchSkinny<Codes, 1, Mode>(launch, p, rows, scratchBytes);
}

/** Whether every segment count of a unit has one scale of the codec, one row a block, and zero points as `zero` says. */
inline bool grouped(const SkinnyParams& p, int unit, ScaleCodec codec, bool zero) {
  const Weights& w = p.weights[0];
  return p.promote == Promote::scaled && p.unit == unit && w.scale.k == unit * 32 && w.scale.rows == 1 &&
         w.scale.codec == codec && !p.element.zeros && p.floatZero == zero && (!zero || w.zero.codec == ScaleCodec::bf16);
}

template <class Codes>
cudaError_t chooseScaled(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes) {
  if constexpr (Wide<Codes>::value) {
    if (p.promote == Promote::end && !p.element.zeros && !p.fold)
      return chooseTiles<Codes, Plain>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, Int4Codes>) {
    if (grouped(p, 2, ScaleCodec::bf16, true))
      return chooseTiles<Codes, Grouped<2, true>>(launch, p, rows, scratchBytes);
    if (grouped(p, 4, ScaleCodec::bf16, true))
      return chooseTiles<Codes, Grouped<4, true>>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, E2m1Codes>) {
    if (p.fold && p.weights[0].scale.codec == ScaleCodec::e4m3)
      return chooseTiles<Codes, Folded>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, E2m1Codes> || std::is_same_v<Codes, E4m3Codes>) {
    if (grouped(p, 1, ScaleCodec::e8m0, false))
      return chooseTiles<Codes, Grouped<1, false, 1>>(launch, p, rows, scratchBytes);
  }
  return chooseTiles<Codes, Any>(launch, p, rows, scratchBytes);
}

/** Launches for one kind of codes; instantiated in one file each, because there are many. */
template <class Codes>
cudaError_t launchCodes(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes) {
  if constexpr (std::is_same_v<Codes, Bf16Codes>) {
    return chooseTiles<Codes, Plain>(launch, p, rows, scratchBytes);  // bf16 has no scales
  } else {
    return chooseScaled<Codes>(launch, p, rows, scratchBytes);
  }
}

}  // namespace fewbit::linear
