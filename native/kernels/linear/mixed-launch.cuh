// Launching the kernels of mixed.cuh.
#pragma once
#include <algorithm>
#include <type_traits>

#include "mixed-x.cuh"
#include "mixed.cuh"

namespace fewbit::linear {

/** Slices of K, when `fits[s]` blocks in clusters of s run at once. */
inline int slicesOf(int blocks, int stages, const int* fits) {
  constexpr int ends = 3, meets = 5;  // what starts and ends a block, and what meeting others costs, in stages
  int best = 1;
  int64_t least = INT64_MAX;
  for (int slices = 1; slices <= std::min(kMixedSlices, stages); slices++) {
    const int each = (stages + slices - 1) / slices;
    if ((stages + each - 1) / each != slices || fits[slices] == 0) continue;
    const int64_t rounds = (int64_t(blocks) * slices - 1) / fits[slices] + 1;
    const int64_t cost = rounds * (each + ends) + (slices > 1 ? meets : 0);
    if (cost < least) least = cost, best = slices;
  }
  return best;
}

/** Chooses stages and slices, and enqueues. */
template <class Codes, int N, class Mode>
cudaError_t launchMixed(const Launch& launch, MixedParams p, int rows, uint64_t scratchBytes) {
  const Context& device = *launch.context;
  const int stagesOfK = mixedStages(p.k);
  const int64_t columnBytes = int64_t(p.passes) * stagesOfK * N * kMixedK * 2;
  const int64_t sumBytes = p.floatZero ? int64_t(p.passes) * stagesOfK * N * kMixedSumBytes : 0;
  if (static_cast<uint64_t>(columnBytes + sumBytes + int64_t{4} * rows) > scratchBytes) return cudaErrorMemoryAllocation;
  p.sums = p.columns + columnBytes;
  p.multipliesSums = Mode::floatZero;
  p.factors = reinterpret_cast<float*>(p.columns + columnBytes + sumBytes);

  const auto bytesWith = [&](int stages) {
    return static_cast<size_t>(MixedShared<Codes::bits, N>(stages, Mode::floatZero).total) + 1024;
  };
  // Two blocks a multiprocessor where each has room for three stages.
  const size_t half = (device.sharedPerBlock + 1024) / 2 - 1024;
  const bool two = mixedBlocks(N) == 2 && bytesWith(3) <= half;
  const size_t most = two ? half : device.sharedPerBlock;
  p.stages = 2;
  if (bytesWith(2) > most) return cudaErrorInvalidConfiguration;
  while (p.stages < kMostMixedStages && bytesWith(p.stages + 1) <= most) p.stages++;
  const size_t shared = bytesWith(p.stages);
  const int perTile = kMixedRows / p.parts;
  p.tiles = (p.n + perTile - 1) / perTile;

  const auto kernel = mixed<Codes, N, Mode>;
  cudaError_t error = cudaSuccess;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kMixedThreads);
  config.dynamicSmemBytes = shared;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  // What the device told of the kernel, for the shared memory of its last launch.
  struct Known {
    size_t shared = 0, most = 0;
    int blocks[kMixedSlices + 1] = {};  // that run at once in clusters of so many: some multiprocessors are left without
  };
  static Known devices[16];
  Known& known = devices[device.device & 15];
  if (shared > known.most) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    known.most = shared;
  }
  if (shared != known.shared) {
    for (int slices = 1; slices <= kMixedSlices; slices++) {
      int clusters = 0;
      attributes[0].val.clusterDim = {static_cast<unsigned>(slices), 1, 1};
      config.gridDim = dim3(slices);
      if ((error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) != cudaSuccess) return error;
      known.blocks[slices] = clusters * slices;
    }
    known.shared = shared;
  }
  p.slices = slicesOf(p.tiles * p.passes, stagesOfK, known.blocks);
  p.kSlice = (stagesOfK + p.slices - 1) / p.slices * kMixedK;

  // An octet's pairs lie in the order of the decoder: the kernels for one order are the same for all decoders that have it.
  using Order = std::conditional_t<Codes::apart == 1, Natural, std::conditional_t<Codes::apart == 4, Interleaved, SignedBytes>>;
  error = launchOverlapped(launch, prepareColumns<Order>, dim3((stagesOfK * kMixedK / 8 + 255) / 256, rows), 256, 0, p, N);
  if (error != cudaSuccess) return error;
  config.gridDim = dim3(p.slices, p.passes, p.tiles);
  attributes[0].val.clusterDim = {static_cast<unsigned>(p.slices), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.numAttrs = device.overlaps ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

/** The narrowest kernel that takes all columns of a pass; passes only where there are more than the widest takes. */
template <class Codes, class Mode>
cudaError_t chooseColumns(const Launch& launch, MixedParams& p, int rows, uint64_t scratchBytes) {
  const int most = kMixedColumns / p.parts3;
  p.passes = (rows + most - 1) / most;
  p.columnsOfX = (rows + p.passes - 1) / p.passes;
  const int columns = p.passes == 1 ? p.columnsOfX * p.parts3 : kMixedColumns;
  if constexpr (Mode::fixed) {
    if (columns <= 16) return launchMixed<Codes, 16, Mode>(launch, p, rows, scratchBytes);
    if (columns > 32 && columns <= 64) return launchMixed<Codes, 64, Mode>(launch, p, rows, scratchBytes);
  }
  if (columns <= 32) return launchMixed<Codes, 32, Mode>(launch, p, rows, scratchBytes);
  return launchMixed<Codes, 128, Mode>(launch, p, rows, scratchBytes);
}

/** Whether `Mode` is how scales are applied: groups of whole units, one row a block, read a stage at a time. */
template <class Mode>
bool grouped(const MixedParams& p) {
  constexpr int bytes = kMixedSegments / Mode::unit * Mode::scaleBytes;
  bool is = p.promote == Promote::scaled && p.unit == Mode::unit && !p.element.zeros && p.floatZero == Mode::floatZero &&
            p.k % kMixedK == 0;  // offsets of scales take 32 bits: a group has at least as many codes as bytes of scale
  for (int part = 0; part < p.parts; part++) {
    const Weights& w = p.weights[part];
    is = is && w.scale.rows == 1 && w.scale.k == Mode::unit * 32 &&
         w.scale.codec == (Mode::scaleBytes == 2 ? ScaleCodec::bf16 : ScaleCodec::e8m0) &&
         reinterpret_cast<uintptr_t>(w.scale.at) % bytes == 0;
    if (Mode::floatZero)
      is = is && w.zero.rows == 1 && w.zero.k == w.scale.k && w.zero.codec == w.scale.codec &&
           reinterpret_cast<uintptr_t>(w.zero.at) % bytes == 0;
  }
  return is;
}

/** The first of the modes that fits, else the one that reads everything at run time. */
template <class Codes, class... Modes>
cudaError_t chooseGrouped(const Launch& launch, MixedParams& p, int rows, uint64_t scratchBytes) {
  cudaError_t error = cudaErrorNotSupported;
  const bool found = ((grouped<Modes>(p) && (error = chooseColumns<Codes, Modes>(launch, p, rows, scratchBytes), true)) || ...);
  return found ? error : chooseColumns<Codes, Any>(launch, p, rows, scratchBytes);
}

/** Launches for one kind of codes; instantiated in several files, because there are many. */
template <class Codes>
cudaError_t launchMixedCodes(const Launch& launch, MixedParams& p, int rows, uint64_t scratchBytes) {
  const bool plain = p.promote == Promote::end && !p.element.zeros && !p.fold;
  if constexpr (std::is_same_v<Codes, Bf16Codes>) {
    return chooseColumns<Codes, Plain>(launch, p, rows, scratchBytes);  // bf16 has no scales
  } else if constexpr (std::is_same_v<Codes, IntCodes<8>>) {
    if (plain && p.element.flip == 128 && p.element.offset == 128.0f)
      return chooseColumns<SignedBytes, Plain>(launch, p, rows, scratchBytes);
    return chooseGrouped<Codes>(launch, p, rows, scratchBytes);
  } else if constexpr (std::is_same_v<Codes, E4m3Codes>) {
    if (plain) return chooseColumns<Codes, Plain>(launch, p, rows, scratchBytes);
    return chooseGrouped<Codes, Grouped<1, false, 1>>(launch, p, rows, scratchBytes);
  } else if constexpr (std::is_same_v<Codes, E2m1Codes>) {
    if (p.fold) return chooseColumns<Codes, Folded>(launch, p, rows, scratchBytes);
    return chooseGrouped<Codes, Grouped<1, false, 1>>(launch, p, rows, scratchBytes);
  } else if constexpr (std::is_same_v<Codes, Int4Codes>) {
    return chooseGrouped<Codes, Grouped<2, true>, Grouped<4, true>, Grouped<4, false>>(launch, p, rows, scratchBytes);
  } else {
    return chooseGrouped<Codes>(launch, p, rows, scratchBytes);
  }
}

}  // namespace fewbit::linear
