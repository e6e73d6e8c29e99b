// What the linear kernels know of their operands: run-time descriptors, so that no kernel names a format.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "fewbit/launch.hpp"
#include "fewbit/overlap.cuh"

namespace fewbit::linear {

/** Codecs of scales and zero points. The order is that of `SCALE_CODECS` in linear-arguments.ts. */
enum class ScaleCodec : int { none, f32, f16, bf16, e8m0, e4m3, int8, uint8 };

__host__ __device__ inline int scaleBytes(ScaleCodec codec) {
  return codec == ScaleCodec::none ? 0 : codec == ScaleCodec::f32 ? 4 : codec <= ScaleCodec::bf16 ? 2 : 1;
}

/** One level of scales, or the zero points: codes at `at`, one for each block of `rows` x `k` elements, row-major. */
struct Blocks {
  const uint8_t* at = nullptr;
  ScaleCodec codec = ScaleCodec::none;
  int rows = 1;     // rows of a block
  int k = 1;        // elements of K of a block
  int columns = 1;  // blocks along K
};

__device__ __forceinline__ uint32_t loadScaleBits(const Blocks& blocks, int64_t index) {
  const int bytes = scaleBytes(blocks.codec);
  if (bytes == 4) return __ldg(reinterpret_cast<const uint32_t*>(blocks.at) + index);
  if (bytes == 2) return __ldg(reinterpret_cast<const uint16_t*>(blocks.at) + index);
  return __ldg(blocks.at + index);
}

__device__ __forceinline__ float decodeScale(ScaleCodec codec, uint32_t bits) {
  switch (codec) {
    case ScaleCodec::f32:
      return __uint_as_float(bits);
    case ScaleCodec::bf16:
      return __uint_as_float(bits << 16);
    case ScaleCodec::f16:
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    case ScaleCodec::e8m0:  // 2^(code - 127): code 0 is a subnormal float32, all ones is NaN
      return __uint_as_float(bits == 255 ? 0x7fc00000u : bits == 0 ? 0x00400000u : bits << 23);
    case ScaleCodec::e4m3:
      return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(bits), __NV_E4M3)));
    case ScaleCodec::int8:
      return static_cast<float>(static_cast<int8_t>(bits));
    case ScaleCodec::uint8:
      return static_cast<float>(bits);
    default:
      return 1.0f;
  }
}

/** `decodeScale` for inner loops: f32 and bf16 are a shift. */
struct FastScale {
  ScaleCodec codec;
  int shift;
  bool simple;
  __device__ __forceinline__ explicit FastScale(ScaleCodec codec)
      : codec(codec),
        shift(codec == ScaleCodec::bf16 ? 16 : 0),
        simple(codec == ScaleCodec::bf16 || codec == ScaleCodec::f32) {}
  __device__ __forceinline__ float operator()(uint32_t bits) const {
    return simple ? __uint_as_float(bits << shift) : decodeScale(codec, bits);
  }
};

__device__ __forceinline__ float blockValue(const Blocks& blocks, int row, int k) {
  if (blocks.codec == ScaleCodec::none) return 1.0f;
  const int64_t index = static_cast<int64_t>(row / blocks.rows) * blocks.columns + k / blocks.k;
  return decodeScale(blocks.codec, loadScaleBits(blocks, index));
}

/** How weight codes are read. The order is that of `CODE_KINDS` in linear-arguments.ts. */
enum class CodeKind : int { bf16, e4m3, e5m2, int8, int4, e2m1, int1, int2, int3, int5, int6, int7, float5, float6 };

/** Run-time facts of an element codec; integers are (code ^ flip) - offset - zero. */
struct Element {
  uint32_t flip = 0;     // 2^(bits - 1) for signed codes: makes them unsigned
  float offset = 0;      // and is taken off again; the middle code of a float zero point
  bool zeros = false;    // integer zero points are subtracted from the codes
  int mantissa = 0;      // small floats
  float multiplier = 1;  // 2^(127 - bias)
};

/** One matrix of weights. */
struct Weights {
  const uint8_t* codes = nullptr;
  Blocks scale;  // level 0
  Blocks outer;  // level 1, constant along K
  Blocks zero;
};

/** The weights of a step: one matrix, or [gate, up], which share everything but the pointers. */
struct WeightGroup {
  Weights weights[2];
  int parts = 1;
  CodeKind kind = CodeKind::bf16;
  int n = 0, k = 0;
  int64_t rowBytes = 0;
  Element element;
  bool floatZero = false;  // zero points in the units of the weight, added
};

enum class Activation : int { none, relu, silu, geluTanh, gelu };

__device__ __forceinline__ float activate(Activation fn, float x) {
  switch (fn) {
    case Activation::relu:
      return x > 0.0f || isnan(x) ? x : 0.0f;
    case Activation::silu:
      return x / (1.0f + expf(-x));
    case Activation::geluTanh: {
      const float g = 0.7978845608028654f * (x + 0.044715f * x * x * x);
      return 0.5f * x * (1.0f + tanhf(g));
    }
    case Activation::gelu:
      return 0.5f * x * erfcf(-x * 0.70710678118654752f);
    default:
      return x;
  }
}

/**
 * Activations: dense float32, or codes in a stored layout, one value per code: (table[code] - zero) * scales. Codes of 16 bits
 * (bf16, f16) have no table.
 */
struct Activations {
  const uint8_t* at = nullptr;
  int64_t stride = 0;  // bytes from row to row
  int bits = 0;        // 0: dense float32
  bool half = false;   // 16-bit codes are f16, not bf16
  const float* table = nullptr;
  Blocks scale[2];
  Blocks zero;
  Extent rows;

  __device__ __forceinline__ float code(int64_t m, int k) const {
    const uint8_t* row = at + m * stride;
    if (bits == 0) return __ldg(reinterpret_cast<const float*>(row) + k);
    if (bits == 16) {
      const uint16_t raw = __ldg(reinterpret_cast<const uint16_t*>(row) + k);
      return half ? __half2float(__ushort_as_half(raw)) : __uint_as_float(static_cast<uint32_t>(raw) << 16);
    }
    const int bit = k * bits;
    uint32_t field = __ldg(row + (bit >> 3));
    if ((bit & 7) + bits > 8) field |= static_cast<uint32_t>(__ldg(row + (bit >> 3) + 1)) << 8;
    const float value = __ldg(table + ((field >> (bit & 7)) & ((1u << bits) - 1)));
    return zero.codec == ScaleCodec::none ? value : value - blockValue(zero, static_cast<int>(m), k);
  }
  /** The scale of level 0 at an element, and that of level 1 of a row where it does not change along K. */
  __device__ __forceinline__ float innerScale(int64_t m, int k) const { return blockValue(scale[0], static_cast<int>(m), k); }
  __device__ __forceinline__ float outerScale(int64_t m) const { return blockValue(scale[1], static_cast<int>(m), 0); }
  /** The product of the scales at an element. */
  __device__ __forceinline__ float scaleAt(int64_t m, int k) const {
    const float first = blockValue(scale[0], static_cast<int>(m), k);
    return scale[1].codec == ScaleCodec::none ? first : first * blockValue(scale[1], static_cast<int>(m), k);
  }
};

/** A dense float32 matrix within the rows of its storage. */
struct Dense {
  float* at = nullptr;
  int64_t stride = 0;  // elements from row to row
  __device__ __forceinline__ float& operator()(int64_t row, int64_t column) const { return at[row * stride + column]; }
};

/** How a result is stored. The order is that of `ROUNDINGS` in linear-arguments.ts, after `none`. */
enum class Rounding : int { none, bf16, f16 };

/** The code of 16 bits of a number. */
__device__ __forceinline__ unsigned short roundedCode(Rounding rounding, float value) {
  return rounding == Rounding::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : __half_as_ushort(__float2half_rn(value));
}

/** What happens to finished sums: bias, then either a residual, an activation, or activation(gate) * up. */
struct Epilogue {
  const float* bias[2] = {nullptr, nullptr};
  Dense residual;
  Activation fn = Activation::none;
  Dense out;  // with `rounding`, codes of 16 bits lie at out.at, out.stride codes from row to row
  Rounding rounding = Rounding::none;

  __device__ __forceinline__ void store(int64_t row, int64_t column, float value) const {
    if (rounding == Rounding::none) {
      out(row, column) = value;
      return;
    }
    reinterpret_cast<unsigned short*>(out.at)[row * out.stride + column] = code(value);
  }
  /** Four columns from one that is a multiple of four; rows start on 16 bytes, or 8 with `rounding`. */
  __device__ __forceinline__ void store4(int64_t row, int64_t column, float4 v) const {
    if (rounding == Rounding::none) {
      *reinterpret_cast<float4*>(&out(row, column)) = v;
      return;
    }
    const uint32_t low = code(v.x) | code(v.y) << 16, high = code(v.z) | code(v.w) << 16;
    *reinterpret_cast<uint2*>(reinterpret_cast<unsigned short*>(out.at) + row * out.stride + column) = make_uint2(low, high);
  }

 private:
  __device__ __forceinline__ uint32_t code(float value) const { return roundedCode(rounding, value); }
};

}  // namespace fewbit::linear
