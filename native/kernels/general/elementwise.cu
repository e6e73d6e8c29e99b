// Ops that make each element by itself: unary, binary, dequantize, last_row, embedding, moe_combine.
#include "eight.cuh"
#include "fewbit/overlap.cuh"

namespace fewbit::general {
namespace {

constexpr int kThreads = 256;
enum class Binary : int { add, mul };

/** Calls `body(row, i)` for every element of rows of `width` elements, from a grid of any size. */
template <class Body>
__device__ void forEach(i64 rows, int width, Body body) {
  const i64 count = rows * width;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  i64 at = blockIdx.x * static_cast<i64>(blockDim.x) + threadIdx.x;
  if (count < (static_cast<i64>(1) << 31)) {
    // Divisions of 32 bits are much cheaper.
    for (; at < count; at += step) {
      const u32 row = static_cast<u32>(at) / static_cast<u32>(width);
      body(static_cast<i64>(row), static_cast<int>(static_cast<u32>(at) - row * static_cast<u32>(width)));
    }
  } else {
    for (; at < count; at += step) body(at / width, static_cast<int>(at % width));
  }
}

struct Operands {
  Extent rows;
  int width;
  const float *a, *b;
  Columns aAt, bAt;
  float* out;
  Columns outAt;
  int lanes;  // elements that a thread takes at once: 4, where rows of all operands start on 16 bytes, or 1

  __device__ float4 load(const float* from, const Columns& at, i64 row, int i) const {
    if (lanes == 4) return loadFour(from + at.at(row, 4 * i), true);
    return make_float4(from[at.at(row, i)], 0.0f, 0.0f, 0.0f);
  }
  __device__ void store(i64 row, int i, float4 x) const {
    if (lanes == 4) storeFour(out + outAt.at(row, 4 * i), true, x);
    else out[outAt.at(row, i)] = x.x;
  }
};

Operands operands(Args& args, bool two) {
  Operands o{};
  o.rows = extent(args);
  o.width = args.integer();
  o.a = args.buffer<const float>();
  o.aAt = columns(args);
  if (two) {
    o.b = args.buffer<const float>();
    o.bAt = columns(args);
  }
  o.out = args.buffer<float>();
  o.outAt = columns(args);
  o.lanes = o.width % 4 == 0 && inFours(o.aAt) && inFours(o.bAt) && inFours(o.outAt) ? 4 : 1;
  return o;
}

__global__ void unary(const Operands o, Unary fn, float cap, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  forEach(o.rows.at(symbols), o.width / o.lanes, [&](i64 row, int i) {
    float4 x = o.load(o.a, o.aAt, row, i);
    x.x = apply(fn, x.x, cap);
    if (o.lanes == 4) x.y = apply(fn, x.y, cap), x.z = apply(fn, x.z, cap), x.w = apply(fn, x.w, cap);
    o.store(row, i, x);
  });
}

__global__ void binary(const Operands o, Binary fn, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  forEach(o.rows.at(symbols), o.width / o.lanes, [&](i64 row, int i) {
    const float4 x = o.load(o.a, o.aAt, row, i), y = o.load(o.b, o.bAt, row, i);
    o.store(row, i, fn == Binary::add ? make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w)
                                      : make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w));
  });
}

__global__ void lastRow(const Operands o, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  const i64 row = o.rows.at(symbols) - 1;
  if (row < 0) return;
  forEach(1, o.width / o.lanes, [&](i64, int i) { o.store(0, i, o.load(o.a, o.aAt, row, i)); });
}

/** out[t, h] = the sum over s of gates[t, s] a[t * slots + s, h]. */
__global__ void combine(const Operands o, int slots, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  forEach(o.rows.at(symbols), o.width, [&](i64 row, int i) {
    float sum = 0.0f;
    for (int s = 0; s < slots; s++) sum += o.b[o.bAt.at(row, s)] * o.a[o.aAt.at(row * slots + s, i)];
    o.out[o.outAt.at(row, i)] = sum;
  });
}

__global__ void dequantize(const Stored stored, float* out, Extent rows, Type type, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  forEach(rows.at(symbols), stored.k,
          [&](i64 row, int i) { out[row * stored.k + i] = stored.rounded(row, i, type); });
}

struct Embedding {
  Extent rows;
  Stored table;
  i64 vocabulary;
  const int* ids;
  float* out;
  float scale;
  const float* positions;
  int position;  // the symbol of the first one
};

__device__ i64 idAt(const Embedding& e, i64 row) {
  const i64 last = e.vocabulary - 1;
  return e.ids[row] < 0 ? 0 : e.ids[row] < last ? e.ids[row] : last;
}
__device__ float finish(const Embedding& e, i64 row, int i, float value, i64 position) {
  if (e.scale != 1.0f) value = mul(value, e.scale);
  return e.positions == nullptr ? value : add(value, e.positions[(position + row) * e.table.k + i]);
}

__global__ void embedding(const Embedding e, const u32* symbols) {
  releaseSuccessor();
  awaitPredecessor();
  const i64 position = e.positions == nullptr ? 0 : symbols[e.position];
  forEach(e.rows.at(symbols), e.table.k, [&](i64 row, int i) {
    e.out[row * e.table.k + i] = finish(e, row, i, e.table.value(idAt(e, row), i), position);
  });
}

/** As `embedding`, for tables of which 8 neighbouring elements share their scales and zero points. */
__global__ void embeddingEights(const Embedding e, const u32* symbols) {
  __shared__ float shared[kLut];
  releaseSuccessor();
  const float* lut = decodeTable(e.table, shared);
  const i64 position = e.positions == nullptr ? 0 : symbols[e.position];
  awaitPredecessor();
  forEach(e.rows.at(symbols), e.table.k / 8, [&](i64 row, int eight) {
    const i64 id = idAt(e, row);
    const int at = 8 * eight;
    float x[8];
    codes8(e.table, lut, id, at, x);
    const float scale = e.table.scale(id, at), offset = e.table.offset(id, at);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (e.table.levels > 0) x[i] = mul(x[i], scale);
      if (e.table.zeroKind == ZeroKind::real) x[i] = add(x[i], offset);
      x[i] = finish(e, row, at + i, x[i], position);
    }
    float* out = e.out + row * e.table.k + at;
    storeFour(out, true, make_float4(x[0], x[1], x[2], x[3]));
    storeFour(out + 4, true, make_float4(x[4], x[5], x[6], x[7]));
  });
}

/** args: operands of one, fn, cap. */
cudaError_t runUnary(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, false);
  const Unary fn = static_cast<Unary>(args.next());
  const float cap = args.real();
  const i64 count = o.rows.at(launch.symbols) * o.width / o.lanes;
  if (count == 0) return cudaSuccess;
  return launchOverlapped(launch, unary, gridFor(count, kThreads, *launch.context), kThreads, 0, o, fn, cap, launch.deviceSymbols);
}

/** args: operands of two, fn. */
cudaError_t runBinary(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, true);
  const Binary fn = static_cast<Binary>(args.next());
  const i64 count = o.rows.at(launch.symbols) * o.width / o.lanes;
  if (count == 0) return cudaSuccess;
  return launchOverlapped(launch, binary, gridFor(count, kThreads, *launch.context), kThreads, 0, o, fn, launch.deviceSymbols);
}

/** args: operands of one; rows are those of the operand. */
cudaError_t runLastRow(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, false);
  if (o.rows.at(launch.symbols) == 0) return cudaSuccess;
  return launchOverlapped(launch, lastRow, gridFor(o.width / o.lanes, kThreads, *launch.context), kThreads, 0, o, launch.deviceSymbols);
}

/** args: operands of two (x and gates), slots. */
cudaError_t runCombine(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, true);
  const int slots = args.integer();
  const i64 count = o.rows.at(launch.symbols) * o.width;
  if (count == 0) return cudaSuccess;
  return launchOverlapped(launch, combine, gridFor(count, kThreads, *launch.context), kThreads, 0, o, slots, launch.deviceSymbols);
}

/** args: rows (extent), x (stored), out, type. */
cudaError_t runDequantize(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Extent rows = extent(args);
  const Stored stored = args.stored();
  float* out = args.buffer<float>();
  const Type type = static_cast<Type>(args.next());
  const i64 count = rows.at(launch.symbols) * stored.k;
  if (count == 0) return cudaSuccess;
  return launchOverlapped(launch, dequantize, gridFor(count, kThreads, *launch.context), kThreads, 0, stored, out, rows, type,
                          launch.deviceSymbols);
}

/** args: rows (extent), table (stored), vocabulary, ids, out, scale, positions, position's symbol. */
cudaError_t runEmbedding(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  Embedding e{};
  e.rows = extent(args);
  e.table = args.stored();
  e.vocabulary = args.next();
  e.ids = args.buffer<const int>();
  e.out = args.buffer<float>();
  e.scale = args.real();
  e.positions = args.buffer<const float>();
  e.position = args.integer();
  const i64 count = e.rows.at(launch.symbols) * e.table.k;
  if (count == 0) return cudaSuccess;
  const Stored& table = e.table;
  const bool eights = table.k % 8 == 0 && 8 % table.vectorK == 0 && (table.granularity >= table.k || table.granularity % 8 == 0);
  if (!eights) return launchOverlapped(launch, embedding, gridFor(count, kThreads, *launch.context), kThreads, 0, e, launch.deviceSymbols);
  return launchOverlapped(launch, embeddingEights, gridFor(count / 8, kThreads, *launch.context), kThreads, 0, e, launch.deviceSymbols);
}

}  // namespace
}  // namespace fewbit::general

namespace fewbit {

extern const Entry kElementwiseEntries[] = {
    {"general/unary", 2, general::runUnary},           {"general/binary", 2, general::runBinary},
    {"general/last_row", 1, general::runLastRow},      {"general/moe_combine", 1, general::runCombine},
    {"general/dequantize", 1, general::runDequantize}, {"general/embedding", 1, general::runEmbedding},
};
extern const size_t kElementwiseEntryCount = sizeof kElementwiseEntries / sizeof(Entry);

}  // namespace fewbit
