import { f32Bits } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { blockGrid, codecBits, codecVector } from "../formats/format.js";
import { readCode, rowWords, writeCode } from "../formats/pack.js";
import { dequantize, type QuantizedTensor } from "../formats/tensor.js";
import { quantizeTensor } from "../quantize/quantize.js";
import type { Node } from "./graph.js";
import { type OpAttrs, type OpName, shapeRows, type UnaryFn } from "./ops.js";
import { sampleToken, unpackSettings } from "./sample.js";
import type { DenseTensor, HostTensor } from "./tensor.js";

/** Values of the graph's symbols in one run. */
export type Symbols = Readonly<Record<string, number>>;

/**
 * What every op computes, in float64 over the exact stored values, with each op's result rounded once to float32. Every
 * backend is judged against this. In-place ops change and return their aliased operand.
 */
export function evaluateNode(node: Node, operands: readonly HostTensor[], symbols: Symbols): HostTensor[] {
  const evaluate = EVALUATE[node.op] as Evaluator<OpName>;
  return evaluate(operands, node.attrs, symbols);
}

type Evaluator<Op extends OpName> = (
  operands: readonly HostTensor[],
  attrs: OpAttrs[Op],
  symbols: Symbols,
) => HostTensor[];

const floats = (tensor: HostTensor | undefined): Float32Array => (tensor as DenseTensor).data as Float32Array;
const quantized = (tensor: HostTensor | undefined): QuantizedTensor => tensor as QuantizedTensor;
const f32 = (shape: readonly number[], data: Float32Array): DenseTensor => ({ dtype: "f32", shape, data });

/** Weights are read many times: their exact values are kept while the tensor lives. */
const weightValues = new WeakMap<QuantizedTensor, Float64Array>();
export function exactValues(tensor: QuantizedTensor): Float64Array {
  let values = weightValues.get(tensor);
  if (values === undefined) {
    values = dequantize(tensor);
    weightValues.set(tensor, values);
  }
  return values;
}

/** Exact values of a dense or stored tensor. */
export function valuesOf(tensor: HostTensor): ArrayLike<number> {
  return "data" in tensor ? tensor.data : dequantize(tensor);
}

export const UNARY: Readonly<Record<UnaryFn, (x: number) => number>> = {
  relu: (x) => Math.max(x, 0),
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

const EVALUATE: { readonly [Op in OpName]: Evaluator<Op> } = {
  embedding: ([ids, table], attrs) => {
    const rows = (ids as DenseTensor).data;
    const [vocabulary, width] = quantized(table).shape;
    const scale = attrs.scale ?? 1;
    const out = new Float32Array(rows.length * width);
    for (let t = 0; t < rows.length; t++) {
      const row = Math.min(Math.max(rows[t] as number, 0), vocabulary - 1);
      const values = dequantize(quantized(table), [row, row + 1]);
      for (let k = 0; k < width; k++) out[t * width + k] = (values[k] as number) * scale;
    }
    return [f32([rows.length, width], out)];
  },

  rmsnorm: ([x, weight], { eps }) => {
    const source = x as DenseTensor;
    const [rows, width] = shapeRows(source.shape);
    const [values, gain] = [floats(x), floats(weight)];
    const out = new Float32Array(values.length);
    for (let row = 0; row < rows; row++) {
      let sum = 0;
      for (let k = 0; k < width; k++) sum += (values[row * width + k] as number) ** 2;
      const factor = 1 / Math.sqrt(sum / width + eps);
      for (let k = 0; k < width; k++) out[row * width + k] = (values[row * width + k] as number) * factor * (gain[k] as number);
    }
    return [f32(source.shape, out)];
  },

  linear: ([x, weight, bias]) => {
    const matrix = quantized(weight);
    const [n, k] = matrix.shape;
    const input = valuesOf(x as HostTensor);
    const rows = input.length / Math.max(k, 1);
    const leading = (x as HostTensor).shape.slice(0, -1);
    const out = matmul(input, exactValues(matrix), rows, n, k, bias === undefined ? undefined : floats(bias));
    return [f32([...leading, n], out)];
  },

  rope: ([x, table], { heads, position }, symbols) => {
    const source = x as DenseTensor;
    const [rows, width] = shapeRows(source.shape);
    const size = width / heads;
    const half = size / 2;
    const [values, angles] = [floats(x), floats(table)];
    const out = new Float32Array(values.length);
    for (let t = 0; t < rows; t++) {
      const angle = ((symbols[position] ?? 0) + t) * size;
      for (let start = t * width; start < (t + 1) * width; start += size) {
        for (let i = 0; i < half; i++) {
          const [a, b] = [values[start + i] as number, values[start + half + i] as number];
          const [cos, sin] = [angles[angle + i] as number, angles[angle + half + i] as number];
          out[start + i] = a * cos - b * sin;
          out[start + half + i] = b * cos + a * sin;
        }
      }
    }
    return [f32(source.shape, out)];
  },

  kv_write: ([cache, x], { position }, symbols) => {
    const target = quantized(cache);
    const source = x as DenseTensor;
    const [tokens, width] = shapeRows(source.shape);
    const size = target.shape[1];
    const heads = width / size;
    const capacity = target.shape[0] / heads;
    const rows = quantizeTensor(floats(source), [tokens * heads, size], "f32", target.format);
    const first = symbols[position] ?? 0;
    if (first + tokens > capacity) throw new FewbitError("cache/overflow", { needed: first + tokens, capacity });
    for (let t = 0; t < tokens; t++) {
      for (let head = 0; head < heads; head++) copyRow(target, head * capacity + first + t, rows, t * heads + head);
    }
    weightValues.delete(target);
    return [target];
  },

  sdpa: ([q, k, v], attrs, symbols) => {
    const source = q as DenseTensor;
    const [tokens, width] = shapeRows(source.shape);
    const [keys, values] = [quantized(k), quantized(v)];
    const size = keys.shape[1];
    const capacity = keys.shape[0] / attrs.kvHeads;
    const first = symbols[attrs.position] ?? 0;
    const out = new Float32Array(tokens * width);
    const query = floats(q);
    for (let kvHead = 0; kvHead < attrs.kvHeads; kvHead++) {
      const range = [kvHead * capacity, kvHead * capacity + first + tokens] as const;
      const [kRows, vRows] = [dequantize(keys, range), dequantize(values, range)];
      const group = attrs.heads / attrs.kvHeads;
      for (let head = kvHead * group; head < (kvHead + 1) * group; head++) {
        for (let t = 0; t < tokens; t++) {
          const seen = attrs.causal ? first + t + 1 : first + tokens;
          attend(query, t * width + head * size, kRows, vRows, seen, size, attrs.scale, out);
        }
      }
    }
    return [f32(source.shape, out)];
  },

  unary: ([a], { fn }) => [f32((a as DenseTensor).shape, Float32Array.from(floats(a), UNARY[fn]))],

  binary: ([a, b], { fn }) => {
    const [left, right] = [floats(a), floats(b)];
    const out = new Float32Array(left.length);
    for (let i = 0; i < out.length; i++) {
      const [x, y] = [left[i] as number, right[i] as number];
      out[i] = fn === "add" ? x + y : x * y;
    }
    return [f32((a as DenseTensor).shape, out)];
  },

  quantize: ([x], { format }) => {
    const source = x as DenseTensor;
    return [quantizeTensor(floats(source), shapeRows(source.shape), "f32", format)];
  },

  dequantize: ([x]) => [f32(quantized(x).shape, Float32Array.from(dequantize(quantized(x))))],

  last_row: ([x]) => {
    const source = x as DenseTensor;
    const [rows, width] = shapeRows(source.shape);
    return [f32([1, width], floats(x).slice((rows - 1) * width, rows * width))];
  },

  sample: ([logits, settings, ids]) => {
    const drawn = sampleToken(floats(logits), unpackSettings((settings as DenseTensor).data as Uint32Array));
    const target = ids as DenseTensor;
    target.data[0] = drawn.id;
    return [{ dtype: "u32", shape: [2], data: Uint32Array.of(drawn.id, f32Bits(drawn.logprob)) }, target];
  },
};

/** x [rows, k] times w [n, k] transposed, in float64, rounded to float32. */
function matmul(
  x: ArrayLike<number>,
  w: Float64Array,
  rows: number,
  n: number,
  k: number,
  bias: Float32Array | undefined,
): Float32Array {
  const out = new Float32Array(rows * n);
  const input = x instanceof Float64Array ? x : Float64Array.from(x);
  for (let row = 0; row < rows; row++) {
    const from = row * k;
    for (let column = 0; column < n; column++) {
      const base = column * k;
      let sum = bias === undefined ? 0 : (bias[column] as number);
      for (let i = 0; i < k; i++) sum += (input[from + i] as number) * (w[base + i] as number);
      out[row * n + column] = sum;
    }
  }
  return out;
}

/** One query row against `seen` keys: softmax(scale * q k) v. */
function attend(
  q: Float32Array,
  at: number,
  keys: Float64Array,
  values: Float64Array,
  seen: number,
  size: number,
  scale: number,
  out: Float32Array,
): void {
  const scores = new Float64Array(seen);
  let top = Number.NEGATIVE_INFINITY;
  for (let j = 0; j < seen; j++) {
    let dot = 0;
    for (let i = 0; i < size; i++) dot += (q[at + i] as number) * (keys[j * size + i] as number);
    scores[j] = dot * scale;
    top = Math.max(top, scores[j] as number);
  }
  let total = 0;
  const sum = new Float64Array(size);
  for (let j = 0; j < seen; j++) {
    const weight = Math.exp((scores[j] as number) - top);
    total += weight;
    for (let i = 0; i < size; i++) sum[i] = (sum[i] as number) + weight * (values[j * size + i] as number);
  }
  for (let i = 0; i < size; i++) out[at + i] = (sum[i] as number) / total;
}

/** Copies one stored row, with its scales and zero points, between tensors of one format. */
function copyRow(target: QuantizedTensor, targetRow: number, source: QuantizedTensor, sourceRow: number): void {
  const { format } = target;
  const k = target.shape[1];
  const stride = rowWords(k / codecVector(format.element)[1], codecBits(format.element));
  target.qdata.set(source.qdata.subarray(sourceRow * stride, (sourceRow + 1) * stride), targetRow * stride);
  const copyCodes = (to: Uint32Array | undefined, from: Uint32Array | undefined, columns: number, bits: number) => {
    if (to === undefined || from === undefined) return;
    for (let i = 0; i < columns; i++) {
      const index = targetRow * columns + i;
      const word = Math.floor((index * bits) / 32);
      const mask = bits === 32 ? 0xffffffff : (2 ** bits - 1) << ((index * bits) % 32);
      to[word] = (to[word] as number) & ~mask;
      writeCode(to, 0, index, bits, readCode(from, 0, sourceRow * columns + i, bits));
    }
  };
  for (const [i, level] of format.scales.entries()) {
    const columns = blockGrid(level.block, [1, k])[1];
    copyCodes(target.scales[i], source.scales[i], columns, codecBits(level.codec));
    if (i === 0 && format.zero.domain !== "none") copyCodes(target.zero, source.zero, columns, codecBits(format.zero.codec));
  }
}

/** The error function, by its series below 3 and by the continued fraction of its complement above (float64 accurate). */
function erf(x: number): number {
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  if (a < 3) {
    let term = a;
    let sum = a;
    for (let n = 1; Math.abs(term) > 1e-18 * Math.abs(sum) && n < 200; n++) {
      term *= -(a * a) / n;
      sum += term / (2 * n + 1);
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI);
  }
  let fraction = 0;
  for (let n = 60; n > 0; n--) fraction = n / 2 / (a + fraction);
  return Math.sign(x) * (1 - Math.exp(-a * a) / (Math.sqrt(Math.PI) * (a + fraction)));
}
