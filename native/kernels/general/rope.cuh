// A rope_kv step as its kernels read it.
#pragma once
#include "common.cuh"

namespace fewbit::general {

constexpr int kStreams = 4;

enum class Target : int { dense, rows, cache };

/** Heads that go through the step: perhaps rotated, perhaps transformed, into a dense value, a stored one or a cache. */
struct Stream {
  const float* x;
  Columns at;
  int heads;
  int rotary;  // elements that are rotated; 0 without a rope
  bool interleaved;
  const float* angles;
  int angleSymbol;
  float transform;  // the factor after the butterflies; 0 without them
  Target target;
  float* out;
  Columns outAt;
  // Stored targets:
  u32* words;
  int rowStride;
  u32 scaleAt, zeroAt;
  int width, columns;  // elements of a block, blocks of a row (0 without scales)
  Rule rule;
  // Caches:
  const u32* pages;
  int page;
  int cacheSymbol;
  bool ring;
  i64 keys;

  /** The row of a cache, as `keyRowOf` of ir/attention.ts. */
  __device__ i64 keyRow(int head, i64 position) const {
    const i64 slot = ring ? position % keys : position;
    if (page == 0) return head * keys + slot;
    return (pages[slot / page] * static_cast<i64>(heads) + head) * page + slot % page;
  }
};

struct RopeJob {
  Extent rows;
  int size, units, count;
  Stream streams[kStreams];
};

inline Stream stream(Args& args) {
  Stream s{};
  s.x = args.buffer<const float>();
  s.at = columns(args);
  s.heads = args.integer();
  s.rotary = args.integer();
  s.interleaved = args.flag();
  s.angles = args.buffer<const float>();
  s.angleSymbol = args.integer();
  s.transform = args.real();
  s.target = static_cast<Target>(args.next());
  if (s.target == Target::dense) {
    s.out = args.buffer<float>();
    s.outAt = columns(args);
    return s;
  }
  s.words = args.buffer<u32>();
  s.rowStride = args.integer();
  s.scaleAt = static_cast<u32>(args.next());
  s.zeroAt = static_cast<u32>(args.next());
  s.width = args.integer();
  s.columns = args.integer();
  s.rule = args.rule();
  if (s.target == Target::rows) return s;
  s.pages = args.buffer<const u32>();
  s.page = args.integer();
  s.cacheSymbol = args.integer();
  s.ring = args.flag();
  s.keys = args.next();
  return s;
}

/** args: rows (extent), size of a head, streams, each as `stream` reads it. */
inline RopeJob readRope(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  RopeJob job{};
  job.rows = extent(args);
  job.size = args.integer();
  job.count = args.integer();
  for (int i = 0; i < job.count; i++) {
    job.streams[i] = stream(args);
    job.units += job.streams[i].heads;
  }
  return job;
}

}  // namespace fewbit::general
