import { f32Bits } from "../core/dtype.js";
import { matmul } from "../core/matmul.js";
import { blockGrid, codecBits, codecVector } from "../formats/format.js";
import { readCode, rowWords, writeCode } from "../formats/pack.js";
import { dequantize, type QuantizedTensor } from "../formats/tensor.js";
import { hadamard } from "../quantize/attention.js";
import { dequantizeTo } from "../quantize/dequantize.js";
import { quantizeTensor } from "../quantize/quantize.js";
import { checkCapacity, evaluateSdpa, keyRowOf } from "./attention.js";
import { cacheRows } from "./attention-shape.js";
import { evaluateConv } from "./conv.js";
import { dense, type Node, stored, type TensorType } from "./graph.js";
import { evaluateMoeCombine, evaluateMoeLinear, evaluateMoeRoute } from "./moe.js";
import { type OpAttrs, type OpName, shapeRows, type UnaryFn } from "./ops.js";
import { sampleToken, unpackSettings } from "./sample.js";
import { type DenseTensor, type HostTensor, isDense } from "./tensor.js";

/** Values of the graph's symbols in one run. */
export type Symbols = Readonly<Record<string, number>>;

/**
 * What every op computes, in float64 over the exact stored values, with each op's result rounded once to float32. Every
 * backend is judged against this. In-place ops change and return their aliased operand. `types` are the operands' types in the graph:
 * attention reads from them how stored rows fold.
 */
export function evaluateNode(
  node: Node,
  operands: readonly HostTensor[],
  symbols: Symbols,
  types: readonly TensorType[] = operands.map(typeOf),
): HostTensor[] {
  const evaluate = EVALUATE[node.op] as Evaluator<OpName>;
  return evaluate(operands, node.attrs, symbols, types);
}

/** A host tensor's own type; stored tensors forget how their leading dimensions were folded. */
const typeOf = (tensor: HostTensor): TensorType =>
  isDense(tensor) ? dense(tensor.dtype, tensor.shape) : stored(tensor.format, tensor.shape);

type Evaluator<Op extends OpName> = (
  operands: readonly HostTensor[],
  attrs: OpAttrs[Op],
  symbols: Symbols,
  types: readonly TensorType[],
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

export const UNARY: Readonly<Record<UnaryFn, (x: number, cap: number) => number>> = {
  relu: (x) => Math.max(x, 0),
  silu: (x) => x / (1 + Math.exp(-x)),
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
  softcap: (x, cap) => cap * Math.tanh(x / cap),
  gelu: (x) => 0.5 * x * erfc(-x / Math.SQRT2),
  // 1 + tanh(u) is 2 / (1 + exp(-2u)), which keeps its digits where tanh(u) is near -1.
  gelu_tanh: (x) => x / (1 + Math.exp(-2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

const EVALUATE: { readonly [Op in OpName]: Evaluator<Op> } = {
  embedding: ([ids, table, positions], attrs, symbols) => {
    const rows = (ids as DenseTensor).data;
    const first = symbols[attrs.position ?? ""] ?? 0;
    const [vocabulary, width] = quantized(table).shape;
    const scale = attrs.scale ?? 1;
    const out = new Float32Array(rows.length * width);
    for (let t = 0; t < rows.length; t++) {
      const row = Math.min(Math.max(rows[t] as number, 0), vocabulary - 1);
      const values = dequantize(quantized(table), [row, row + 1]);
      for (let k = 0; k < width; k++) {
        const learned = positions === undefined ? 0 : (floats(positions)[(first + t) * width + k] as number);
        out[t * width + k] = (values[k] as number) * scale + learned;
      }
    }
    return [f32([rows.length, width], out)];
  },

  rmsnorm: ([x, weight], { eps, groups = 1 }) => {
    const source = x as DenseTensor;
    const [rows, width] = shapeRows(source.shape);
    const size = width / groups;
    const [values, gain] = [floats(x), floats(weight)];
    const out = new Float32Array(values.length);
    for (let start = 0; start < rows * width; start += size) {
      let sum = 0;
      for (let k = 0; k < size; k++) sum += (values[start + k] as number) ** 2;
      const factor = 1 / Math.sqrt(sum / size + eps);
      for (let k = 0; k < size; k++) out[start + k] = (values[start + k] as number) * factor * (gain[k] as number);
    }
    return [f32(source.shape, out)];
  },

  layernorm: ([x, weight, bias], { eps }) => {
    const source = x as DenseTensor;
    const [rows, width] = shapeRows(source.shape);
    const [values, gain] = [floats(x), floats(weight)];
    const shift = bias === undefined ? null : floats(bias);
    const out = new Float32Array(values.length);
    for (let row = 0; row < rows; row++) {
      const part = values.subarray(row * width, (row + 1) * width);
      const mean = part.reduce((sum, value) => sum + value, 0) / width;
      const variance = part.reduce((sum, value) => sum + (value - mean) ** 2, 0) / width;
      const factor = 1 / Math.sqrt(variance + eps);
      for (let k = 0; k < width; k++)
        out[row * width + k] = ((part[k] as number) - mean) * factor * (gain[k] as number) + (shift?.[k] ?? 0);
    }
    return [f32(source.shape, out)];
  },

  linear: ([x, weight, bias]) => {
    const matrix = quantized(weight);
    const [n, k] = matrix.shape;
    const input = valuesOf(x as HostTensor);
    const rows = input.length / Math.max(k, 1);
    const leading = (x as HostTensor).shape.slice(0, -1);
    const out = matmul(input, exactValues(matrix), [rows, n, k], bias && floats(bias));
    return [f32([...leading, n], out)];
  },

  conv2d: ([x, weight, bias], attrs) => {
    const matrix = quantized(weight);
    return [
      evaluateConv(x as DenseTensor, matrix, exactValues(matrix), bias === undefined ? undefined : floats(bias), attrs),
    ];
  },

  /** Products and sums are rounded to float32 one by one, so that every backend rotates to the same bits. */
  rope: ([x, table], { heads, position, interleaved, ...attrs }, symbols) => {
    const source = x as DenseTensor;
    const [rows, width] = shapeRows(source.shape);
    const size = width / heads;
    const { rotary = size } = attrs;
    const half = rotary / 2;
    const [values, angles] = [floats(x), floats(table)];
    const out = values.slice();
    const { fround } = Math;
    for (let t = 0; t < rows; t++) {
      const angle = ((symbols[position] ?? 0) + t) * rotary;
      for (let start = t * width; start < (t + 1) * width; start += size) {
        for (let i = 0; i < half; i++) {
          const [at, other] = interleaved ? [start + 2 * i, start + 2 * i + 1] : [start + i, start + half + i];
          const [a, b] = [values[at] as number, values[other] as number];
          const [cos, sin] = [angles[angle + i] as number, angles[angle + half + i] as number];
          out[at] = fround(a * cos) - fround(b * sin);
          out[other] = fround(b * cos) + fround(a * sin);
        }
      }
    }
    return [f32(source.shape, out)];
  },

  hadamard: ([x], { heads }) => {
    const { shape } = x as DenseTensor;
    return [f32(shape, hadamard(floats(x), (shape[1] as number) / heads))];
  },

  kv_write: ([cache, x, pages], attrs, symbols, types) => {
    const target = quantized(cache);
    const source = x as DenseTensor;
    const rows = cacheRows(types, attrs, "kv_write");
    const [tokens] = shapeRows(source.shape);
    const size = target.shape[1];
    const first = symbols[attrs.position] ?? 0;
    checkCapacity(rows, first, tokens);
    const stored = quantizeTensor(floats(source), [tokens * rows.kvHeads, size], "f32", target.format);
    const rowOf = keyRowOf(rows, (pages as DenseTensor | undefined)?.data);
    for (let t = 0; t < tokens; t++) {
      for (let head = 0; head < rows.kvHeads; head++) {
        copyRow(target, rowOf(0, head, first + t), stored, t * rows.kvHeads + head);
      }
    }
    weightValues.delete(target);
    return [target];
  },

  sdpa: (operands, attrs, symbols, types) => [evaluateSdpa(operands, types, attrs, symbols)],

  moe_route: ([logits], attrs) => evaluateMoeRoute(logits as DenseTensor, attrs),

  moe_linear: ([x, ids, ...weights], _attrs, _symbols, types) => {
    const matrices = weights.map((weight) => exactValues(quantized(weight)));
    const [n, k] = quantized(weights[0]).shape;
    const input = Float64Array.from(valuesOf(x as HostTensor));
    const shared = (types[0] as TensorType).shape.length === 2;
    return [
      evaluateMoeLinear(ids as DenseTensor, weights.length, n, shared, (row, expert) =>
        matmul(input.subarray(row * k, (row + 1) * k), matrices[expert] as Float64Array, [1, n, k]),
      ),
    ];
  },

  moe_combine: ([x, gates]) => [evaluateMoeCombine(x as DenseTensor, gates as DenseTensor)],

  unary: ([a], { fn, cap = 1 }) => [
    f32(
      (a as DenseTensor).shape,
      floats(a).map((x) => UNARY[fn](x, cap)),
    ),
  ],

  binary: ([a, b], { fn }) => {
    const [left, right] = [floats(a), floats(b)];
    const out = new Float32Array(left.length);
    for (let i = 0; i < out.length; i++) {
      const [x, y] = [left[i] as number, right[i] as number];
      out[i] = fn === "add" ? x + y : x * y;
    }
    return [f32((a as DenseTensor).shape, out)];
  },

  quantize: ([x, scale, zero], { format, heads = 1, dtype = "f32", ...options }) => {
    const source = x as DenseTensor;
    const [rows, width] = shapeRows(source.shape);
    const given =
      scale === undefined
        ? {}
        : { given: { scale: floats(scale), ...(zero === undefined ? {} : { zero: floats(zero) }) } };
    return [quantizeTensor(floats(source), [rows * heads, width / heads], dtype, format, { ...options, ...given })];
  },

  dequantize: ([x], { dtype }) => {
    const tensor = quantized(x);
    return [
      f32(tensor.shape, dtype === undefined ? Float32Array.from(dequantize(tensor)) : dequantizeTo(tensor, dtype)),
    ];
  },

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
    if (i === 0 && format.zero.domain !== "none")
      copyCodes(target.zero, source.zero, columns, codecBits(format.zero.codec));
  }
}

/**
 * The complementary error function, 1 - erf(x), with its digits kept where it is small: by the series of erf below 2, by the
 * continued fraction above (Abramowitz and Stegun, 7.1.5 and 7.1.14).
 */
function erfc(x: number): number {
  if (x < 0) return 2 - erfc(-x);
  if (x > 27) return 0;
  if (x < 2) {
    let term = x;
    let sum = x;
    for (let n = 1; Math.abs(term) > 1e-18 * sum; n++) {
      term *= -(x * x) / n;
      sum += term / (2 * n + 1);
    }
    return 1 - (2 * sum) / Math.sqrt(Math.PI);
  }
  let fraction = 0;
  for (let n = 100; n > 0; n--) fraction = n / 2 / (x + fraction);
  return Math.exp(-x * x) / (Math.sqrt(Math.PI) * (x + fraction));
}
