// Ops that make each element by itself: unary, binary, dequantize, last_row, embedding, moe_combine.
#include "common.cuh"

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
  return o;
}

__global__ void unary(const Operands o, Unary fn, float cap, const u32* symbols) {
  forEach(o.rows.at(symbols), o.width,
          [&](i64 row, int i) { o.out[o.outAt.at(row, i)] = apply(fn, o.a[o.aAt.at(row, i)], cap); });
}

__global__ void binary(const Operands o, Binary fn, const u32* symbols) {
  forEach(o.rows.at(symbols), o.width, [&](i64 row, int i) {
    const float left = o.a[o.aAt.at(row, i)], right = o.b[o.bAt.at(row, i)];
    o.out[o.outAt.at(row, i)] = fn == Binary::add ? left + right : left * right;
  });
}

__global__ void lastRow(const Operands o, const u32* symbols) {
  const i64 row = o.rows.at(symbols) - 1;
  if (row < 0) return;
  forEach(1, o.width, [&](i64, int i) { o.out[i] = o.a[o.aAt.at(row, i)]; });
}

/** out[t, h] = the sum over s of gates[t, s] a[t * slots + s, h]. */
__global__ void combine(const Operands o, int slots, const u32* symbols) {
  forEach(o.rows.at(symbols), o.width, [&](i64 row, int i) {
    float sum = 0.0f;
    for (int s = 0; s < slots; s++) sum += o.b[o.bAt.at(row, s)] * o.a[o.aAt.at(row * slots + s, i)];
    o.out[o.outAt.at(row, i)] = sum;
  });
}

__global__ void dequantize(const Stored stored, float* out, Extent rows, Type type, const u32* symbols) {
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

__global__ void embedding(const Embedding e, const u32* symbols) {
  forEach(e.rows.at(symbols), e.table.k, [&](i64 row, int i) {
    const i64 last = e.vocabulary - 1;
    const i64 id = e.ids[row] < 0 ? 0 : e.ids[row] < last ? e.ids[row] : last;
    float value = e.table.value(id, i);
    if (e.scale != 1.0f) value = mul(value, e.scale);
    if (e.positions != nullptr) value = add(value, e.positions[(symbols[e.position] + row) * e.table.k + i]);
    e.out[row * e.table.k + i] = value;
  });
}

/** args: operands of one, fn, cap. */
cudaError_t runUnary(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, false);
  const Unary fn = static_cast<Unary>(args.next());
  const float cap = args.real();
  const i64 count = o.rows.at(launch.symbols) * o.width;
  if (count == 0) return cudaSuccess;
  unary<<<gridFor(count, kThreads, *launch.context), kThreads, 0, launch.stream>>>(o, fn, cap, launch.deviceSymbols);
  return cudaGetLastError();
}

/** args: operands of two, fn. */
cudaError_t runBinary(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, true);
  const Binary fn = static_cast<Binary>(args.next());
  const i64 count = o.rows.at(launch.symbols) * o.width;
  if (count == 0) return cudaSuccess;
  binary<<<gridFor(count, kThreads, *launch.context), kThreads, 0, launch.stream>>>(o, fn, launch.deviceSymbols);
  return cudaGetLastError();
}

/** args: operands of one; rows are those of the operand. */
cudaError_t runLastRow(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, false);
  if (o.rows.at(launch.symbols) == 0) return cudaSuccess;
  lastRow<<<gridFor(o.width, kThreads, *launch.context), kThreads, 0, launch.stream>>>(o, launch.deviceSymbols);
  return cudaGetLastError();
}

/** args: operands of two (x and gates), slots. */
cudaError_t runCombine(const Launch& launch) {
  Args args(launch.args, launch.buffers);
  const Operands o = operands(args, true);
  const int slots = args.integer();
  const i64 count = o.rows.at(launch.symbols) * o.width;
  if (count == 0) return cudaSuccess;
  combine<<<gridFor(count, kThreads, *launch.context), kThreads, 0, launch.stream>>>(o, slots, launch.deviceSymbols);
  return cudaGetLastError();
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
  dequantize<<<gridFor(count, kThreads, *launch.context), kThreads, 0, launch.stream>>>(stored, out, rows, type, launch.deviceSymbols);
  return cudaGetLastError();
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
  embedding<<<gridFor(count, kThreads, *launch.context), kThreads, 0, launch.stream>>>(e, launch.deviceSymbols);
  return cudaGetLastError();
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
