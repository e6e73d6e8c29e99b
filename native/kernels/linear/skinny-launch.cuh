// Launching the kernels of skinny.cuh.
#pragma once
#include <algorithm>
#include <type_traits>

#include "skinny.cuh"


namespace fewbit::linear {

/** Shared memory of a block beside which the next kernel's finds room, and some for small kernels between the two. */
inline size_t sharedForTwo(const Context& device) { return (device.sharedPerBlock - 1024) / 2 - 10 * 1024; }

/** Shared memory of a block whose ring has so many stages, and slots for scales: a slot is free again when the ring has gone past its tile. */
template <class Codes, int Tiles, class Mode>
size_t sharedWith(SkinnyParams& p, int stages) {
  p.stages = stages;
  const int ofTile = stagesOfTile<Codes>(p.kSlice);
  p.scaleSlots = (stages + ofTile - 1 + ofTile - 1) / ofTile;
  return sharedOf<Codes, Tiles, Mode>(p).total;
}

/** Chooses slices of K, stages and the grid, and enqueues. */
template <class Codes, int Tiles, class Mode>
cudaError_t launchSkinny(const Launch& launch, SkinnyParams p, int rows, uint64_t scratchBytes) {
  using C = ChunkOf<Codes>;
  const Context& device = *launch.context;
  const int64_t sliceBytes = int64_t{4} * rows * p.n * p.parts;
  const int mostSlices = std::max<int64_t>(1, std::min<int64_t>(scratchBytes / sliceBytes, 64));
  const int chunks = chunksOf<Codes>(p.k);
  const auto bytesWith = [&](int stages) { return sharedWith<Codes, Tiles, Mode>(p, stages); };
  if (p.heads.shift >= 0 && rows != 1) return cudaErrorInvalidValue;
  // All of K in one slice where x fits; then as few slices, and as few passes over the weights, as fit.
  int slices = 0, passes = 1;
  const int wanted = p.columnsOfX;
  for (; slices == 0; passes++) {
    p.columnsOfX = (wanted + passes - 1) / passes;
    for (int s = 1; s <= std::min(mostSlices, chunks); s++) {
      p.kSlice = (chunks + s - 1) / s * C::k;
      if (bytesWith(2) <= device.sharedPerBlock) {
        slices = (chunks * C::k + p.kSlice - 1) / p.kSlice;
        break;
      }
    }
    if ((slices == 0 && p.columnsOfX == 1) || (slices > 1 && p.heads.shift >= 0)) return cudaErrorInvalidConfiguration;
  }
  // As many stages as leave room for a second block; where x is too large for that, as many as fit.
  const size_t half = (device.sharedPerBlock - 1024) / 2;
  const size_t most = bytesWith(3) <= sharedForTwo(device) ? sharedForTwo(device) : bytesWith(2) <= half ? half : device.sharedPerBlock;
  int stages = 2;
  while (stages < kMostStages && bytesWith(stages + 1) <= most) stages++;
  const size_t shared = bytesWith(stages);
  p.inFlight = std::min(Codes::inFlight, stages);
  if (slices == 1) p.partial = nullptr;
  p.partialRows = rows;
  const int perTile = 16 / p.parts;
  const int tiles = (p.n + perTile - 1) / perTile;
  const int layers = (rows + p.columnsOfX - 1) / p.columnsOfX;
  // Where each of two blocks would have one tile, and its ring holds it, one takes both, if it multiplies fast enough: the next kernel's
  // rings fill beside it.
  constexpr bool fast = Mode::digits || Mode::bytes || Mode::halves;
  const bool small = fast && tiles <= 2 * device.sms && stagesOfTile<Codes>(p.kSlice) <= stages;
  const int blocks = device.sms * (shared <= sharedForTwo(device) && !small ? 2 : 1);
  const dim3 grid(std::max(1, std::min(tiles, blocks / (slices * layers))), slices, layers);
  static size_t allowed[16] = {};  // per device: the attribute is set when a launch needs more than before
  size_t& allowedHere = allowed[device.device & 15];
  if (shared > allowedHere) {
    const cudaError_t error =
        cudaFuncSetAttribute(skinny<Codes, Tiles, Mode>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    allowedHere = shared;
  }
  const cudaError_t error = launchOverlapped(launch, skinny<Codes, Tiles, Mode>, grid, kThreads(Tiles), shared, p);
  if (error != cudaSuccess || slices == 1) return error;
  const int64_t outputs = int64_t(rows) * p.n;
  const int finishing = static_cast<int>(std::min<int64_t>((outputs + 255) / 256, device.sms * 8));
  return launchOverlapped(launch, finishSlices, dim3(finishing), 256, 0, p, slices);
}

/** Whether rows of x can be copied in pieces of 16 bytes, of `elements` each. */
inline bool inPieces(const SkinnyParams& p, int elements) {
  return ((reinterpret_cast<uintptr_t>(p.x.at) | p.x.stride) & 15) == 0 && p.k % elements == 0;
}
/** Whether x is a row of bf16 that skinny-digits.cuh can take. */
inline bool inDigits(const SkinnyParams& p) {
  return p.columnsOfX == 1 && p.separable && p.x.bits == 16 && !p.x.half && p.x.zero.codec == ScaleCodec::none && inPieces(p, 8);
}
/** Whether x is a row that skinny-halves.cuh can take, by e4m3. */
inline bool inHalves(const SkinnyParams& p) { return inDigits(p) || (p.alike && p.separable && inPieces(p, 16)); }
/** Whether digits of a row leave room for a second block, with stages enough for both: bytes gain less by them than a ring that is too short loses. */
template <class Codes, class Mode>
bool digitsLeaveRoom(const Launch& launch, SkinnyParams p) {
  p.kSlice = chunksOf<Codes>(p.k) * ChunkOf<Codes>::k;
  return sharedWith<Codes, 1, InDigits<Mode>>(p, 3) <= sharedForTwo(*launch.context);
}
/** Whether a code of the weights is a signed byte as it lies. */
inline bool signedBytes(const SkinnyParams& p) { return p.element.flip == 128 && p.element.offset == 128.0f && !p.element.zeros; }

/** Kernels for up to 8 columns of x, and for up to 32 where the mode is a hot one; rows beyond them take another pass. */
template <class Codes, class Mode>
cudaError_t chooseTiles(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes) {
  const int most = (Mode::fixed ? 32 : 8) / p.parts3;
  const int passes = (rows + most - 1) / most;
  p.columnsOfX = (rows + passes - 1) / passes;
  if constexpr (Mode::fixed) {
    if (p.columnsOfX * p.parts3 > 8) return launchSkinny<Codes, 4, Mode>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, SignedBytes> || (std::is_same_v<Codes, Int4Codes> && Mode::fixed)) {
    if (inDigits(p) && (Codes::bits == 4 ? p.element.flip == 0 : digitsLeaveRoom<Codes, Mode>(launch, p)))
      return launchSkinny<Codes, 1, InDigits<Mode>>(launch, p, rows, scratchBytes);
  }
  return launchSkinny<Codes, 1, Mode>(launch, p, rows, scratchBytes);
}

/** Whether scales can come with the weights: rows of them, one for each row, are copied in pieces of 16 bytes, and do not crowd out x. */
inline bool rowsOfScales(const Launch& launch, const SkinnyParams& p, int chunk, bool zero) {
  const Blocks& scale = p.weights[0].scale;
  const size_t slot = size_t(16) * (scale.columns * scaleBytes(scale.codec) + 16) * (zero ? 2 : 1);
  bool copied = p.k % chunk == 0 && 8 * slot <= launch.context->sharedPerBlock;
  for (int part = 0; part < p.parts; part++) {
    const Weights& w = p.weights[part];
    const int bytes = w.scale.columns * scaleBytes(w.scale.codec);
    const uintptr_t at = reinterpret_cast<uintptr_t>(w.scale.at) | (zero ? reinterpret_cast<uintptr_t>(w.zero.at) : 0);
    copied = copied && w.scale.rows == 1 && bytes % 16 == 0 && at % 16 == 0;
    if (zero) copied = copied && w.zero.rows == 1 && w.zero.codec == w.scale.codec && w.zero.k == w.scale.k;
  }
  return copied;
}

/** Whether `unit` segments have one scale of the codec, one row a block, and zero points as `zero` says. */
template <class Codes>
bool grouped(const Launch& launch, const SkinnyParams& p, int unit, ScaleCodec codec, bool zero) {
  const Weights& w = p.weights[0];
  return p.promote == Promote::scaled && p.unit == unit && w.scale.k == unit * 32 && w.scale.codec == codec &&
         !p.element.zeros && p.floatZero == zero && rowsOfScales(launch, p, ChunkOf<Codes>::k, zero);
}

/** One row of bf16 by integer codes whose scales only the run time knows. */
template <class Codes>
cudaError_t chooseUnit(const Launch& launch, SkinnyParams& p, uint64_t scratchBytes) {
  switch (p.unit) {
    case 1: return launchSkinny<Codes, 1, InDigits<Loaded<1>>>(launch, p, 1, scratchBytes);
    case 2: return launchSkinny<Codes, 1, InDigits<Loaded<2>>>(launch, p, 1, scratchBytes);
    case 4: return launchSkinny<Codes, 1, InDigits<Loaded<4>>>(launch, p, 1, scratchBytes);
    case 8:
      if constexpr (Codes::bits == 4) return launchSkinny<Codes, 1, InDigits<Loaded<8>>>(launch, p, 1, scratchBytes);
  }
  return cudaErrorInvalidValue;
}

template <class Codes>
cudaError_t chooseScaled(const Launch& launch, SkinnyParams& p, int rows, uint64_t scratchBytes) {
  const bool plain = p.promote == Promote::end && !p.element.zeros && !p.fold;
  if constexpr (std::is_same_v<Codes, E4m3Codes>) {
    if (plain && rows == 1 && inHalves(p)) return launchSkinny<E4m3Halves, 1, InHalves>(launch, p, rows, scratchBytes);
    if (plain) return chooseTiles<Codes, Plain>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, IntCodes<8>>) {
    if (plain && signedBytes(p)) return chooseTiles<SignedBytes, Plain>(launch, p, rows, scratchBytes);
    if (p.promote == Promote::integer && p.alike && signedBytes(p) && rows == 1 && inPieces(p, 16)) {
      p.columnsOfX = 1;
      return launchSkinny<SignedBytes, 1, InBytes>(launch, p, rows, scratchBytes);
    }
  }
  if constexpr (std::is_same_v<Codes, Int4Codes>) {
    if (grouped<Codes>(launch, p, 2, ScaleCodec::bf16, true))
      return chooseTiles<Codes, Grouped<2, true>>(launch, p, rows, scratchBytes);
    if (grouped<Codes>(launch, p, 4, ScaleCodec::bf16, true))
      return chooseTiles<Codes, Grouped<4, true>>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, E2m1Codes>) {
    if (p.fold && p.weights[0].scale.codec == ScaleCodec::e4m3 && rowsOfScales(launch, p, ChunkOf<Codes>::k, false))
      return chooseTiles<Codes, Folded>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, E2m1Codes> || std::is_same_v<Codes, E4m3Codes>) {
    if (grouped<Codes>(launch, p, 1, ScaleCodec::e8m0, false))
      return chooseTiles<Codes, Grouped<1, false, 1>>(launch, p, rows, scratchBytes);
  }
  if constexpr (std::is_same_v<Codes, Int4Codes> || std::is_same_v<Codes, IntCodes<8>>) {
    p.columnsOfX = rows;
    if (p.promote != Promote::integer && inDigits(p)) {
      if constexpr (Codes::bits == 4) return chooseUnit<Int4Codes>(launch, p, scratchBytes);
      else return chooseUnit<AnyBytes>(launch, p, scratchBytes);
    }
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
