// From a tile's sums to outputs.
#pragma once
#include "skinny-params.cuh"

namespace fewbit::linear {

// Called by the warps that finish: kept out of line, because instructions that do not fit the cache are slower than calls.
static __device__ __noinline__ float decodeCall(ScaleCodec codec, uint32_t bits) { return decodeScale(codec, bits); }
static __device__ __noinline__ float activateCall(Activation fn, float x) { return activate(fn, x); }

/** The code of a row's scale that does not change along K: fetched early, decoded when it is needed. */
struct RowScale {
  uint32_t bits = 0;
  __device__ __forceinline__ void fetch(const Blocks& blocks, int row) {
    if (blocks.codec == ScaleCodec::none) return;
    bits = loadScaleBits(blocks, int64_t(blocks.rows == 1 ? row : row / blocks.rows) * blocks.columns);
  }
  __device__ __forceinline__ float value(const Blocks& blocks) const {
    if (blocks.codec == ScaleCodec::none) return 1.0f;
    return blocks.codec == ScaleCodec::f32 ? __uint_as_float(bits) : decodeCall(blocks.codec, bits);
  }
};

/** What finishes an output: fetched before its sum is known. */
struct Finish {
  RowScale inner[2], outer[2], ofX[2];
  float bias[2] = {0.0f, 0.0f};
  float residual = 0.0f;
  float2 angle = {0.0f, 0.0f};

  __device__ __forceinline__ void fetch(const SkinnyParams& p, int m, int n) {
    if (p.separable) ofX[0].fetch(p.x.scale[0], m);
    if (p.parts3 == 1) ofX[1].fetch(p.x.scale[1], m);
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (part >= p.parts) continue;
      const int row = p.rowOf(n, part);
      if (p.promote != Promote::scaled && !p.fold) inner[part].fetch(p.weights[part].scale, row);
      outer[part].fetch(p.weights[part].outer, row);
      if (p.epilogue.bias[part] != nullptr) bias[part] = __ldg(p.epilogue.bias[part] + row);
    }
    if (p.heads.shift >= 0) angle = p.heads.angle(n, p.symbols);
    if (p.epilogue.residual.at != nullptr) residual = p.epilogue.residual(m, n);
  }
  __device__ __forceinline__ void store(const SkinnyParams& p, int m, int n, const float (&y)[2]) const {
    float rowOfX = 1.0f;
    if (p.separable) rowOfX = ofX[0].value(p.x.scale[0]);
    if (p.parts3 == 1) rowOfX *= ofX[1].value(p.x.scale[1]);
    float finished[2] = {0.0f, 0.0f};
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (part >= p.parts) continue;
      float scale = rowOfX * outer[part].value(p.weights[part].outer);
      if (p.promote != Promote::scaled && !p.fold) scale *= inner[part].value(p.weights[part].scale);
      finished[part] = y[part] * scale + bias[part];
    }
    if (p.heads.shift >= 0) {
      p.heads.store(n, finished[0], finished[1], angle, p.symbols);
      return;
    }
    float first = finished[0] + residual;
    if (p.epilogue.fn != Activation::none) first = activateCall(p.epilogue.fn, first);
    p.epilogue.store(m, n, p.parts == 2 ? first * finished[1] : first);
  }
};

/**
 * Adds up a tile's sums over the workers and the parts of x, and stores them, after `wait`. One of `kFinishers` warps; `sheets` are
 * the workers' copies.
 */
template <int Tiles, class Wait>
__device__ __forceinline__ void storeSums(const SkinnyParams& p, const float* sheets, int finisher, int m0, int n0, int rows,
                                          Wait wait) {
  constexpr int step = 32 * kFinishers(Tiles);
  const int sheet = sheetOf<Tiles>(p);
  const int shift = p.parts == 2 ? 3 : 4, perTile = 1 << shift;
  const int outputs = perTile * rows;
  const int pieces = singleRow(p) ? 1 : p.parts3;
  const bool finishes = p.partial == nullptr;
  Finish next;
  // The first turn only fetches.
#pragma unroll 1
  for (int i = finisher * 32 + static_cast<int>(threadIdx.x) % 32 - step; i < outputs; i += step) {
    const Finish current = next;
    const int later = i + step;
    if (finishes && later < outputs && n0 + (later & (perTile - 1)) < p.n) next.fetch(p, m0 + (later >> shift), n0 + (later & (perTile - 1)));
    if (i < 0) {
      __syncwarp();
      wait();
      continue;
    }
    const int m = i >> shift, row = i & (perTile - 1);
    const int n = n0 + row;
    float y[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int part = 0; part < p.parts; part++) {
      const float* column = sheets + m * kPitch + row + part * perTile;
      float sum = 0.0f;
      if (p.promote == Promote::integer) {
        int exact = 0;
#pragma unroll
        for (int w = 0; w < kWorkers; w++) exact += __float_as_int(column[w * sheet]);
        sum = finishes ? static_cast<float>(exact) : __int_as_float(exact);
      } else {
#pragma unroll 1
        for (int piece = pieces - 1; piece >= 0; piece--) {
          float of[kWorkers];
#pragma unroll
          for (int w = 0; w < kWorkers; w++) of[w] = column[w * sheet + piece * p.columnsOfX * kPitch];
#pragma unroll
          for (int apart = kWorkers / 2; apart > 0; apart /= 2)
#pragma unroll
            for (int w = 0; w < apart; w++) of[w] += of[w + apart];
          sum += of[0];
        }
      }
      y[0] = part == 0 ? sum : y[0];
      y[1] = part == 1 ? sum : y[1];
    }
    if (n >= p.n) continue;
    if (finishes) {
      current.store(p, m0 + m, n, y);
    } else {
      float* slice = p.partial + (int64_t(blockIdx.y) * p.partialRows + m0 + m) * (int64_t(p.n) * p.parts);
      slice[n] = y[0];
      if (p.parts == 2) slice[p.n + n] = y[1];
    }
  }
}

/** Adds the slices of K and finishes; one thread an output. */
static __global__ void __launch_bounds__(256) finishSlices(const __grid_constant__ SkinnyParams p, int slices) {
  releaseSuccessor();
  awaitPredecessor();
  const int64_t rows = p.x.rows.at(p.symbols);
  const int64_t width = int64_t(p.n) * p.parts;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * p.n; i += int64_t(gridDim.x) * blockDim.x) {
    const int m = static_cast<int>(i / p.n), n = static_cast<int>(i % p.n);
    float y[2] = {0.0f, 0.0f};
    for (int part = 0; part < p.parts; part++) {
      int exact = 0;
      for (int s = 0; s < slices; s++) {
        const float slice = p.partial[(s * p.partialRows + m) * width + int64_t(part) * p.n + n];
        exact += __float_as_int(slice);
        y[part] += slice;
      }
      if (p.promote == Promote::integer) y[part] = static_cast<float>(exact);
    }
    Finish last;
    last.fetch(p, m, n);
    last.store(p, m, n, y);
  }
}

}  // namespace fewbit::linear
