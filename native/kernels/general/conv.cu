// conv2d: a warp an output pixel; weights of any format are decoded where they are used.
#include "common.cuh"
#include "fewbit/overlap.cuh"

namespace fewbit::general {
namespace {

struct Conv {
  Extent images;
  const float* x;
  Stored weight;
  const float* bias;
  float* out;
  int channels, height, width;          // of an image
  int features, outHeight, outWidth;    // of a result
  int groups, kernelWidth, taps;
  int strideY, strideX, paddingY, paddingX, dilationY, dilationX;
};

__global__ void conv(const Conv c, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  const i64 pixel = blockIdx.x * static_cast<i64>(blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const i64 area = static_cast<i64>(c.outHeight) * c.outWidth;
  if (pixel >= c.images.at(symbols) * c.features * area) return;
  const int column = static_cast<int>(pixel % c.outWidth);
  const int row = static_cast<int>(pixel / c.outWidth % c.outHeight);
  const int feature = static_cast<int>(pixel / area % c.features);
  const i64 image = pixel / (area * c.features);
  const int inner = c.channels / c.groups;
  const int first = feature / (c.features / c.groups) * inner;
  float sum = 0.0f;
  for (int i = lane; i < c.taps * inner; i += kWarp) {
    const int tap = i / inner, channel = i % inner;
    const int y = row * c.strideY - c.paddingY + tap / c.kernelWidth * c.dilationY;
    const int z = column * c.strideX - c.paddingX + tap % c.kernelWidth * c.dilationX;
    if (y < 0 || y >= c.height || z < 0 || z >= c.width) continue;
    sum += c.x[((image * c.channels + first + channel) * c.height + y) * c.width + z] * c.weight.value(feature, i);
  }
  sum = warpSum(sum);
  if (lane == 0) c.out[pixel] = c.bias == nullptr ? sum : sum + c.bias[feature];
}

/** args: images (extent), x, weight (stored), bias, out, then the numbers of `Conv` in order. */
cudaError_t runConv(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  Conv c{};
  c.images = extent(args);
  c.x = args.buffer<const float>();
  c.weight = args.stored();
  c.bias = args.buffer<const float>();
  c.out = args.buffer<float>();
  for (int* field : {&c.channels, &c.height, &c.width, &c.features, &c.outHeight, &c.outWidth, &c.groups, &c.kernelWidth, &c.taps,
                     &c.strideY, &c.strideX, &c.paddingY, &c.paddingX, &c.dilationY, &c.dilationX})
    *field = args.integer();
  const i64 pixels = c.images.at(launch.symbols) * c.features * c.outHeight * c.outWidth;
  if (pixels == 0) return cudaSuccess;
  return launchOverlapped(launch, conv, static_cast<unsigned>((pixels + 7) / 8), 8 * kWarp, 0, c, launch.deviceSymbols);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

extern const Entry kConvEntries[] = {{"general/conv2d", 1, general::runConv}};
extern const size_t kConvEntryCount = sizeof kConvEntries / sizeof(Entry);

}  // namespace fewbit
