// A quantize step as its kernels read it (`quantizeJob` of general-quantize.ts): what makes the values, the rule, where codes go.
#pragma once
#include "common.cuh"

namespace fewbit::general {

enum class InputKind : int { plain, norm, unary, gated };

/** The values to quantize: x, or what the fused ops before make of it. */
struct Input {
  InputKind kind;
  const float *a, *b;
  Columns aAt, bAt;
  const float* weight;
  float eps, cap;
  Unary fn;
  int width;  // of a normalised row

  /** Element i of a row; `factor` is that of a norm. */
  __device__ float at(i64 row, int i, float factor) const {
    const float x = a[aAt.at(row, i)];
    switch (kind) {
      case InputKind::norm: return x * factor * weight[i];
      case InputKind::unary: return apply(fn, x, cap);
      case InputKind::gated: return apply(fn, x, cap) * b[bAt.at(row, i)];
      default: return x;
    }
  }
};

/** A quantize step: rows of k values, in blocks of height x width that share a scale, to codes and scales. */
struct QuantizeJob {
  Extent rows;
  int k, width, columns, height;  // height 0: a block spans all rows
  int rowStride, words;           // words of codes in a row, with and without padding
  u32 scaleAt, outerAt, zeroAt;   // words from the tensor's first
  u32* out;
  u32* scratch;
  i64 parametersAt;  // words of scratch before the parameters of blocks
  bool scaled;
  const float *given, *givenZero;  // scales and zero points of blocks, where they are not chosen
  Input in;
  Rule rule;

  __device__ Chosen choose(i64 block, const Keys& keys, float outer) const {
    return rule.choose(keys.lo(), keys.hi(), outer, given == nullptr ? nullptr : given + block,
                       givenZero == nullptr ? nullptr : givenZero + block);
  }
  __device__ i64 blocks(i64 n) const { return n == 0 ? 0 : (height == 0 ? 1 : (n + height - 1) / height) * columns; }
  __device__ float outer(i64 row) const {
    if (rule.outerKind == 0) return 1.0f;
    return rule.outer.decode(readCode(out + outerAt, rule.outerKind == 2 ? row : 0, rule.outer.bits));
  }
  __device__ void store(i64 block, const Chosen& chosen) const {
    storeCode(out + scaleAt, block, rule.scale.bits, chosen.scale);
    if (rule.zeroKind != ZeroKind::none) storeCode(out + zeroAt, block, rule.zero.bits, chosen.zero);
  }
};

inline QuantizeJob readQuantizeJob(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  QuantizeJob job{};
  job.rows = extent(args);
  job.k = args.integer();
  job.width = args.integer();
  job.columns = args.integer();
  job.height = args.integer();
  job.rowStride = args.integer();
  job.scaleAt = static_cast<u32>(args.next());
  job.outerAt = static_cast<u32>(args.next());
  job.zeroAt = static_cast<u32>(args.next());
  job.out = args.buffer<u32>();
  job.scratch = args.buffer<u32>();
  job.parametersAt = args.next();
  job.scaled = args.flag();
  job.given = args.buffer<const float>();
  job.givenZero = args.buffer<const float>();
  Input& in = job.in;
  in.kind = static_cast<InputKind>(args.next());
  in.a = args.buffer<const float>();
  in.aAt = columns(args);
  in.b = args.buffer<const float>();
  in.bAt = columns(args);
  in.weight = args.buffer<const float>();
  in.eps = args.real();
  in.fn = static_cast<Unary>(args.next());
  in.cap = args.real();
  in.width = job.k;
  job.rule = args.rule();
  job.words = (job.k * job.rule.element.bits + 31) / 32;
  return job;
}

}  // namespace fewbit::general
