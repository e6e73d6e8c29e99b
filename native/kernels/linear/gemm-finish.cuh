// What the entries of products through cuBLASLt share: how they read their arguments, and how sums become outputs.
#pragma once
#include "gemm-carriers.cuh"

namespace fewbit::linear {
namespace {

/** Memory of a step that is taken piece by piece, each on 256 bytes. */
struct Scratch {
  uint8_t* base = nullptr;
  uint64_t size = 0, taken = 0;
  uint8_t* take(int64_t bytes) {
    uint8_t* piece = base + taken;
    taken += (bytes + 255) / 256 * 256;
    return piece;
  }
  bool enough() const { return taken <= size; }
};

/** What both entries are given; false when table and addon disagree. */
bool read(const Launch& launch, GemmParams& p, Scratch& scratch) {
  Arguments arguments(launch);
  static_cast<WeightGroup&>(p) = arguments.weightGroup();
  p.x = arguments.activations();
  p.epilogue = arguments.epilogue();
  p.carrier = static_cast<Carrier>(arguments.small());
  p.xParts = arguments.small();
  p.wParts = arguments.small();
  p.scaledX = arguments.flag();
  p.scaledW = arguments.flag();
  p.columns = arguments.small();
  scratch.base = arguments.buffer(&scratch.size);
  p.symbols = launch.deviceSymbols;
  return !arguments.broken();
}

/** Sums to outputs: vectors of four where rows allow, several of them on their way at once. */
template <bool Integer, bool Gated>
__global__ void __launch_bounds__(kThreads) finishProducts(const __grid_constant__ GemmParams p, bool factors, int64_t rows) {
  constexpr int ahead = 4;
  const int m = blockIdx.y;
  if (m >= p.x.rows.at(p.symbols)) return;
  const float ofX = factors ? p.xFactor[m] : 1.0f;
  const Epilogue& e = p.epilogue;
  const auto one = [&](int n, float gate, float up) {
    if (factors) {
      gate *= ofX * p.wFactor[n];
      if (Gated) up *= ofX * p.wFactor[p.n + n];
    }
    if (e.bias[0] != nullptr) {
      gate += e.bias[0][n];
      if (Gated) up += e.bias[1][n];
    }
    if (Gated) return activate(e.fn, gate) * up;
    if (e.residual.at != nullptr) gate += e.residual(m, n);
    return activate(e.fn, gate);
  };
  const float* first = p.products + int64_t(m) * p.n;
  const float* second = first + rows * p.n;
  const auto real = [](float stored) { return Integer ? static_cast<float>(__float_as_int(stored)) : stored; };
  const int begin = blockIdx.x * kThreads * ahead * 4;
  const int outBytes = e.rounding == Rounding::none ? 4 : 2;
  if (p.n % 4 == 0 && ((reinterpret_cast<uintptr_t>(e.out.at) | (e.out.stride * outBytes)) & (4 * outBytes - 1)) == 0) {
    float4 a[ahead], b[ahead];
#pragma unroll
    for (int i = 0; i < ahead; i++) {
      const int n = begin + (i * kThreads + threadIdx.x) * 4;
      if (n >= p.n) continue;
      a[i] = __ldcs(reinterpret_cast<const float4*>(first + n));
      b[i] = Gated ? __ldcs(reinterpret_cast<const float4*>(second + n)) : a[i];
    }
#pragma unroll
    for (int i = 0; i < ahead; i++) {
      const int n = begin + (i * kThreads + threadIdx.x) * 4;
      if (n >= p.n) continue;
      e.store4(m, n, make_float4(one(n, real(a[i].x), real(b[i].x)), one(n + 1, real(a[i].y), real(b[i].y)),
                                 one(n + 2, real(a[i].z), real(b[i].z)), one(n + 3, real(a[i].w), real(b[i].w))));
    }
    return;
  }
  for (int n = begin + threadIdx.x; n < min(begin + kThreads * ahead * 4, p.n); n += kThreads)
    e.store(m, n, one(n, real(first[n]), Gated ? real(second[n]) : 0.0f));
}

template <bool Integer>
void launchFinish(const Launch& launch, const GemmParams& p, bool factors, int rows) {
  const dim3 grid((p.n + 16 * kThreads - 1) / (16 * kThreads), rows);
  if (p.parts == 2) finishProducts<Integer, true><<<grid, kThreads, 0, launch.stream>>>(p, factors, rows);
  else finishProducts<Integer, false><<<grid, kThreads, 0, launch.stream>>>(p, factors, rows);
}

}  // namespace
}  // namespace fewbit::linear
