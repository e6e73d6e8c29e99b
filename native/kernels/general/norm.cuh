// A norm as its kernels read it.
#pragma once
#include "common.cuh"

namespace fewbit::general {

struct Norm {
  Extent rows;
  int groups, width;  // of a row, and of a group
  const float* x;
  Columns xAt;
  const float *weight, *bias;
  float* out;
  Columns outAt;
  float eps;
  bool centred;  // layernorm
};

/** args: rows (extent), groups, width of a group, x, its columns, weight, bias, out, its columns, eps, centred. */
inline Norm readNorm(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  Norm n{};
  n.rows = extent(args);
  n.groups = args.integer();
  n.width = args.integer();
  n.x = args.buffer<const float>();
  n.xAt = columns(args);
  n.weight = args.buffer<const float>();
  n.bias = args.buffer<const float>();
  n.out = args.buffer<float>();
  n.outAt = columns(args);
  n.eps = args.real();
  n.centred = args.flag();
  return n;
}

}  // namespace fewbit::general
