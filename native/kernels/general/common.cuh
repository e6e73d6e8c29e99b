// What the general kernels share on the device.
#pragma once
#include <algorithm>

#include "descriptor.hpp"
#include "fewbit/launch.hpp"

namespace fewbit::general {

/** Rows of `stride` elements of which an operand takes those from `column` on. */
struct Columns {
  i64 stride, column;
  FEWBIT_HD i64 at(i64 row, i64 i) const { return row * stride + column + i; }
};

inline Extent extent(Args& args) {
  const i64 coefficient = args.next();
  return Extent{coefficient, args.next()};
}
inline Columns columns(Args& args) {
  const i64 stride = args.next();
  return Columns{stride, args.next()};
}

/** Four neighbouring numbers; `aligned` says whether they start on 16 bytes. */
__device__ inline float4 loadFour(const float* at, bool aligned) {
  if (aligned) return *reinterpret_cast<const float4*>(at);
  return make_float4(at[0], at[1], at[2], at[3]);
}
__device__ inline void storeFour(float* at, bool aligned, float4 x) {
  if (aligned) {
    *reinterpret_cast<float4*>(at) = x;
  } else {
    at[0] = x.x, at[1] = x.y, at[2] = x.z, at[3] = x.w;
  }
}
/** Whether fours of every row of an operand start on 16 bytes, as its buffer does. */
inline bool inFours(const Columns& columns) { return columns.stride % 4 == 0 && columns.column % 4 == 0; }

enum class Unary : int { relu, gelu, gelu_tanh, silu, sigmoid, softcap };

// A call: inlined into unrolled epilogues it would be most of their code.
__device__ __noinline__ static float apply(Unary fn, float x, float cap) {
  switch (fn) {
    case Unary::relu: return x < 0.0f ? 0.0f : x;
    // erfc keeps the tail that 1 + erf loses.
    case Unary::gelu: return 0.5f * x * erfcf(x * -0.7071067811865476f);
    // 1 + tanh(g) is 2 / (1 + exp(-2g)), which keeps its digits where tanh(g) is near -1.
    case Unary::gelu_tanh: return x / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case Unary::silu: return x / (1.0f + expf(-x));
    case Unary::sigmoid: return 1.0f / (1.0f + expf(-x));
    case Unary::softcap: return cap * tanhf(x / cap);
  }
  return 0.0f;
}

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ inline float warpSum(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}
__device__ inline int warpSum(int x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}
__device__ inline double warpSum(double x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}
__device__ inline float warpMax(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}

/** The sum over a block of whole warps, for every thread. `shared` has room for 32 values and may be used again at once. */
template <class T>
__device__ T blockSum(T x, T* shared) {
  x = warpSum(x);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = 0;
  for (int i = 0; i < warps; i++) total += shared[i];
  __syncthreads();
  return total;
}

/** Extremes as order keys. */
struct Keys {
  u32 low = 0xffffffffu, high = 0u;
  __device__ void add(float x) {
    low = ::min(low, lowKey(x));
    high = ::max(high, highKey(x));
  }
  __device__ void merge(Keys other) {
    low = ::min(low, other.low);
    high = ::max(high, other.high);
  }
  __device__ float lo() const { return fromOrderKey(low); }
  __device__ float hi() const { return fromOrderKey(high); }
};

/** Over groups of `lanes` threads, a power of two up to 32, of a whole warp. */
__device__ inline Keys groupKeys(Keys keys, int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) {
    Keys other;
    other.low = __shfl_xor_sync(kAll, keys.low, offset);
    other.high = __shfl_xor_sync(kAll, keys.high, offset);
    keys.merge(other);
  }
  return keys;
}

/** Over a block of whole warps, for every thread. */
__device__ inline Keys blockKeys(Keys keys, Keys* shared) {
  keys = groupKeys(keys, kWarp);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = keys;
  __syncthreads();
  Keys all;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; i++) all.merge(shared[i]);
  __syncthreads();
  return all;
}

/** Numbers of a decode table that fit a kernel's shared memory. */
constexpr int kLut = 1024;

/** Fills `shared` with the values of an element's codes where a table pays; the whole block takes part. Null where none does. */
__device__ inline const float* decodeTable(const Stored& stored, float* shared) {
  const Codec& codec = stored.element;
  if (codec.kind == CodecKind::table) {
    if (codec.entries > kLut) return stored.table;
    for (int i = threadIdx.x; i < codec.entries; i += blockDim.x) shared[i] = stored.table[i];
  } else if (codec.kind == CodecKind::integer || codec.bits > 8) {
    return nullptr;
  } else {
    for (int i = threadIdx.x; i < 1 << codec.bits; i += blockDim.x) shared[i] = codec.decode(static_cast<u32>(i));
  }
  __syncthreads();
  return shared;
}

/** Blocks of `threads` for `count` elements; what exceeds the grid is taken by its stride. */
inline unsigned gridFor(i64 count, int threads, const Context& context) {
  const i64 most = static_cast<i64>(context.sms) * 16;
  return static_cast<unsigned>(std::min((count + threads - 1) / threads, most));
}

/** Raises a kernel's dynamic shared memory where it exceeds what needs no consent. */
template <class Kernel>
cudaError_t allowShared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace fewbit::general
