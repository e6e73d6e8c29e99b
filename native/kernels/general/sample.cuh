// The drawing of a token as its kernels read it; the rule is that of `ir/sample.ts`.
#pragma once
#include "common.cuh"

namespace fewbit::general {

/** Bits that order as the floats do: equal logits give equal keys. */
__device__ inline u32 key(float x) { return orderKey(x == 0.0f ? 0.0f : x); }

/** Bits of a threshold that one pass over the logits finds. */
constexpr int kBits = 3;
constexpr int kSteps = (1 << kBits) - 1;

struct Sample {
  const float* logits;
  int count;
  const u32* settings;
  int* ids;
  u32* sampled;

  __device__ float temperature() const { return bitcast<float>(settings[0]); }
  __device__ u32 topK() const { return settings[1]; }
  __device__ float topP() const { return bitcast<float>(settings[2]); }
  /** In [0, 1). */
  __device__ float uniform() const { return static_cast<float>(pcg(pcg(settings[3]) + settings[4]) >> 8) * 5.9604644775390625e-8f; }
  __device__ void write(int chosen, float logprob) const {
    sampled[0] = static_cast<u32>(chosen);
    sampled[1] = bitcast<u32>(logprob);
    ids[0] = chosen;
  }

 private:
  __device__ static u32 pcg(u32 value) {
    const u32 state = value * 747796405u + 2891336453u;
    const u32 word = ((state >> ((state >> 28) + 4u)) ^ state) * 277803737u;
    return (word >> 22) ^ word;
  }
};

/** args: logits, count, settings, ids, sampled. */
inline Sample readSample(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  Sample s{};
  s.logits = args.buffer<const float>();
  s.count = args.integer();
  s.settings = args.buffer<const u32>();
  s.ids = args.buffer<int>();
  s.sampled = args.buffer<u32>();
  return s;
}

}  // namespace fewbit::general
