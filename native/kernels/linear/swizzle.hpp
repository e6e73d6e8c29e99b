// Where cuBLASLt's block scaling (compute capability 10 on) expects scales to lie.
#pragma once
#include <cstdint>

#ifndef FEWBIT_HD
#ifdef __CUDACC__
#define FEWBIT_HD __host__ __device__
#else
#define FEWBIT_HD
#endif
#endif

namespace fewbit::linear {

/** Tiles of 128 rows by 4 blocks along K, 512 bytes each; a matrix is padded to whole ones. */
FEWBIT_HD inline int64_t swizzledBytes(int64_t rows, int64_t blocks) {
  return (rows + 127) / 128 * ((blocks + 3) / 4) * 512;
}

/** The byte of the scale of a row's block: tiles lie row by row, a tile's rows 32 apart side by side (specification 14). */
FEWBIT_HD inline int64_t swizzledAt(int64_t row, int64_t block, int64_t blocks) {
  const int64_t tile = row / 128 * ((blocks + 3) / 4) + block / 4;
  return tile * 512 + row % 32 * 16 + row / 32 % 4 * 4 + block % 4;
}

}  // namespace fewbit::linear
