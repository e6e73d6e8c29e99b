import { blockGrid, extentOf, type Format } from "../formats/format.js";
import { dequantize, type QuantizedTensor, scaleGranularity, zeroValues } from "../formats/tensor.js";
import { keyRowOf, sdpaBound } from "../ir/attention.js";
import { cacheRows } from "../ir/attention-shape.js";
import { evaluateConv } from "../ir/conv.js";
import { evaluateNode, exactValues, type Symbols, UNARY } from "../ir/evaluate.js";
import { concreteShape, type Node, type TensorType } from "../ir/graph.js";
import { type OpAttrs, type OpName, shapeRows } from "../ir/ops.js";
import { copyTensor, type DenseTensor, type HostTensor, isDense } from "../ir/tensor.js";
import { moeCombineBound, moeLinearBound, moeRouteBound } from "./bounds-moe.js";
import {
  type Allowed,
  type Equal,
  floats,
  halfUlp,
  type Near,
  near,
  result,
  TINY,
  tensorOf,
  U,
} from "./bounds-near.js";
import { layernormBound, rmsnormBound } from "./bounds-norm.js";
import { drawnOf } from "./bounds-sample.js";
import { shortSumBound } from "./bounds-short.js";
import { storeBound } from "./bounds-stored.js";
import { UNARY_BOUNDS } from "./bounds-unary.js";

export {
  type Allowed,
  type Equal,
  halfUlp,
  type Near,
  TINY,
  U,
} from "./bounds-near.js";

export function exactly(tensor: HostTensor): Allowed {
  if (!isDense(tensor) || tensor.dtype !== "f32") return { kind: "equal", tensor };
  const values = Float64Array.from(tensor.data);
  return { kind: "near", shape: tensor.shape, values, error: new Float64Array(values.length) };
}

/**
 * What a node may give on operands that are themselves only known to be within their errors: the errors of operands pass through
 * the op's derivative, and the op's own rounding is added. Nodes of one step are chained this way, so a fused step has no
 * tolerance of its own.
 */
export function allow(
  node: Node,
  operands: readonly Allowed[],
  symbols: Symbols,
  types: readonly TensorType[],
): Allowed[] {
  return (ALLOW[node.op] as Rule<OpName>)(operands, node.attrs, symbols, types, node);
}

type Rule<Op extends OpName> = (
  operands: readonly Allowed[],
  attrs: OpAttrs[Op],
  symbols: Symbols,
  types: readonly TensorType[],
  node: Node,
) => Allowed[];

const exact: Rule<OpName> = (operands, _attrs, symbols, types, node) =>
  evaluateNode(node, operands.map(tensorOf), symbols, types).map((tensor) => ({ kind: "equal", tensor }));

const ALLOW: { readonly [Op in OpName]: Rule<Op> } = {
  linear: ([x, weight, bias], { fastAccum }) => [
    linear(x as Allowed, tensorOf(weight) as QuantizedTensor, bias && near(bias), fastAccum),
  ],

  /** A linear over the pixels that the kernel covers: run on magnitudes, the op itself gives the sum of |x w|. */
  conv2d: ([x, weight, bias], attrs, _, __, node) => {
    const image = tensorOf(x) as DenseTensor;
    const tensor = tensorOf(weight) as QuantizedTensor;
    const constant = bias === undefined ? undefined : Float32Array.from(floats(bias));
    const value = evaluateConv(image, tensor, exactValues(tensor), constant, attrs);
    const positive = { ...image, data: Float32Array.from(image.data, Math.abs) };
    const size = evaluateConv(positive, tensor, magnitudes(tensor), constant?.map(Math.abs), attrs);
    const roundings = 2 * Math.sqrt(tensor.shape[1] + node.inputs.length - 2) * U;
    // The exact value was rounded to float32 once as well.
    return result(value.shape, (i) => [
      value.data[i] as number,
      roundings * (size.data[i] as number) + 2 * halfUlp(value.data[i] as number),
    ]);
  },

  /** One decoded element, times the embedding's scale (itself rounded), plus a learned position. */
  embedding: ([ids, table, positions], { scale = 1, position = "" }, symbols) => {
    const tensor = tensorOf(table) as QuantizedTensor;
    const [vocabulary, width] = tensor.shape;
    const rows = (tensorOf(ids) as DenseTensor).data;
    const [values, sizes] = [exactValues(tensor), magnitudes(tensor)];
    const roundings = decodeRoundings(tensor.format) + (scale === 1 ? 0 : 1) + (Math.fround(scale) === scale ? 0 : 1);
    const learned = positions === undefined ? null : near(positions);
    const first = (symbols[position] ?? 0) * width;
    return result([rows.length, width], (i) => {
      const row = Math.min(Math.max(rows[Math.floor(i / width)] as number, 0), vocabulary - 1);
      const at = row * width + (i % width);
      const value = (values[at] as number) * scale;
      const off = roundings * U * (sizes[at] as number) * Math.abs(scale) + halfUlp(value);
      if (learned === null) return [value, off];
      const sum = value + (learned.values[first + i] as number);
      return [sum, off + (learned.error[first + i] as number) + halfUlp(sum, off)];
    });
  },

  dequantize: ([x], { dtype }, symbols, types, node) => {
    if (dtype !== undefined) return exact([x as Allowed], {}, symbols, types, node);
    const tensor = tensorOf(x) as QuantizedTensor;
    const [values, sizes] = [dequantize(tensor), magnitudes(tensor)];
    const roundings = decodeRoundings(tensor.format);
    return result(tensor.shape, (i) => [
      values[i] as number,
      roundings * U * (sizes[i] as number) + halfUlp(values[i] as number),
    ]);
  },

  rmsnorm: ([x, weight], { eps, groups = 1 }) => rmsnormBound(near(x), near(weight), eps, groups),

  layernorm: ([x, weight, bias], { eps }) =>
    layernormBound(near(x), near(weight), bias === undefined ? null : near(bias), eps),

  moe_route: ([logits], attrs) => moeRouteBound(near(logits), attrs),

  moe_linear: ([x, ids, ...weights], _attrs, _symbols, types) => {
    const matrices = weights.map((weight) => tensorOf(weight) as QuantizedTensor);
    const shared = (types[0] as TensorType).shape.length === 2;
    const chosen = tensorOf(ids) as DenseTensor;
    return moeLinearBound(x as Allowed, chosen, matrices.length, shared, (row, expert) =>
      linear(row, matrices[expert] as QuantizedTensor, undefined),
    );
  },

  moe_combine: ([x, gates]) => moeCombineBound(near(x), near(gates)),

  /** Every sum and product is rounded to float32 in one order, on every backend alike. */
  hadamard: exact as Rule<"hadamard">,

  /** Rounded product by product as the definition does: exact on exact operands. */
  rope: ([x, table], { heads, position, interleaved, ...attrs }, symbols, types, node) => {
    const source = near(x);
    const [value] = evaluateNode(node, [tensorOf(x), tensorOf(table)], symbols, types) as [DenseTensor];
    const width = shapeRows(source.shape)[1];
    const size = width / heads;
    const { rotary = size } = attrs;
    const half = rotary / 2;
    const angles = floats(table);
    return result(source.shape, (i) => {
      const column = i % size;
      const own = source.error[i] as number;
      const turned = value.data[i] as number;
      if (column >= rotary) return [source.values[i] as number, own];
      const pair = interleaved ? Math.floor(column / 2) : column % half;
      const first = interleaved ? column % 2 === 0 : column < half;
      const other = i + (interleaved ? 1 : half) * (first ? 1 : -1);
      const cross = source.error[other] as number;
      if (own === 0 && cross === 0) return [turned, 0];
      const at = ((symbols[position] ?? 0) + Math.floor(i / width)) * rotary + pair;
      const [cos, sin] = [angles[at] as number, angles[at + half] as number];
      const size2 = Math.abs((source.values[i] as number) * cos) + Math.abs((source.values[other] as number) * sin);
      return [turned, 2 * U * size2 + Math.abs(cos) * own + Math.abs(sin) * cross + 2 * halfUlp(turned)];
    });
  },

  kv_write: ([cache, x, pages], attrs, symbols, types, node) => {
    const source = near(x);
    const before = copyTensor(tensorOf(cache)) as QuantizedTensor;
    const extra = pages === undefined ? [] : [tensorOf(pages) as DenseTensor];
    const [after] = evaluateNode(node, [before, tensorOf(x), ...extra], symbols, types) as [QuantizedTensor];
    const rows = cacheRows(types, attrs, "kv_write");
    const rowOf = keyRowOf(rows, extra[0]?.data);
    const size = after.shape[1];
    const errors = new Map<number, Float64Array>();
    for (let i = 0; i < source.values.length / size; i++) {
      const [token, head] = [Math.floor(i / rows.kvHeads), i % rows.kvHeads];
      errors.set(
        rowOf(0, head, (symbols[attrs.position] ?? 0) + token),
        source.error.subarray(i * size, (i + 1) * size),
      );
    }
    return [storeBound(after, (row) => errors.get(row) ?? null)];
  },

  sdpa: (operands, attrs, symbols, types) => {
    const { value, bound } = sdpaBound(operands.map(tensorOf), types, attrs, symbols);
    return [
      { kind: "near", shape: concreteShape((types[0] as TensorType).shape, symbols), values: value, error: bound },
    ];
  },

  unary: ([a], { fn, cap = 1 }) => {
    const source = near(a);
    const { slope, own } = UNARY_BOUNDS[fn];
    return result(source.shape, (i) => {
      const input = source.values[i] as number;
      const value = UNARY[fn](input, cap);
      const passed = slope * (source.error[i] as number);
      return [value, passed + own(input, value, cap) + halfUlp(value, passed)];
    });
  },

  binary: ([a, b], { fn }) => {
    const [left, right] = [near(a), near(b)];
    return result(left.shape, (i) => {
      const [p, q] = [left.values[i] as number, right.values[i] as number];
      const [dp, dq] = [left.error[i] as number, right.error[i] as number];
      const value = fn === "add" ? p + q : p * q;
      const passed = fn === "add" ? dp + dq : Math.abs(p) * dq + Math.abs(q) * dp + dp * dq;
      return [value, passed + halfUlp(value, passed)];
    });
  },

  quantize: ([x, ...given], { format }, symbols, types, node) => {
    const source = near(x);
    const [tensor] = evaluateNode(node, [x, ...given].map(tensorOf), symbols, types) as [QuantizedTensor];
    if (source.error.every((error) => error === 0)) return [{ kind: "equal", tensor }];
    const k = tensor.shape[1];
    return [storeBound({ ...tensor, format }, (row) => source.error.subarray(row * k, (row + 1) * k))];
  },

  last_row: ([x]) => {
    const source = near(x);
    const [rows, width] = shapeRows(source.shape);
    const from = (rows - 1) * width;
    return result([1, width], (i) => [source.values[from + i] as number, source.error[from + i] as number]);
  },

  sample: (operands, attrs, symbols, types, node) => {
    const [, ids] = exact(operands, attrs, symbols, types, node) as [Equal, Equal];
    const drawn = drawnOf(floats(operands[0]), (tensorOf(operands[1]) as DenseTensor).data as Uint32Array);
    return [drawn, { ...drawn, ids: ids.tensor as DenseTensor }];
  },
};

/** Roundings of one decoded element beside the last: a product of scale levels, a zero point that is no integer. */
function decodeRoundings({ scales, zero, element }: Format): number {
  const wide = zero.domain === "int" && zero.codec.kind !== "int" ? 1 : 0;
  const middle = zero.domain === "float" && element.kind !== "int" ? 1 : 0;
  return wide + middle + (zero.domain === "float" ? 1 : 0) + Math.max(0, scales.length - 1);
}

const sizes = new WeakMap<QuantizedTensor, Float64Array>();

/**
 * The magnitudes that an element's rounding is relative to: its value's, except with a float zero point, where the value is
 * itself a sum of two terms and may cancel: |(code - mid) * scale| + |zero|.
 */
export function magnitudes(tensor: QuantizedTensor): Float64Array {
  let found = sizes.get(tensor);
  if (found === undefined) {
    const { format, shape } = tensor;
    const values = dequantize(tensor);
    const block = format.scales[0]?.block;
    if (format.zero.domain !== "float" || block === undefined) found = values.map(Math.abs);
    else {
      const zeros = zeroValues(tensor);
      const columns = blockGrid(block, shape)[1];
      const [height, breadth] = [extentOf(block[0], shape[0]), extentOf(block[1], shape[1])];
      found = values.map((value, i) => {
        const [row, k] = [Math.floor(i / shape[1]), i % shape[1]];
        const zero = zeros[Math.floor(row / height) * columns + Math.floor(k / breadth)] as number;
        return Math.abs(value - zero) + Math.abs(zero);
      });
    }
    sizes.set(tensor, found);
  }
  return found;
}

function isInteger({ element, zero }: Format): boolean {
  return (
    element.kind === "int" &&
    element.bits <= 8 &&
    (zero.domain === "none" || (zero.domain === "int" && zero.codec.kind === "int"))
  );
}

/** Codes that may be one or the other neighbour are values with an error. */
function asValues(x: Allowed): Allowed {
  if (x.kind !== "stored") return x;
  return { kind: "near", shape: x.tensor.shape, values: exactValues(x.tensor), error: x.error };
}

/** x W^T + b. See docs/numerics.md, "linear". */
function linear(given: Allowed, weight: QuantizedTensor, bias: Near | undefined, fastAccum = false): Near {
  const x = asValues(given);
  const [n, k] = weight.shape;
  const stored = x.kind === "equal" ? (x.tensor as QuantizedTensor) : null;
  const [values, inputs] = stored === null ? [floats(x), floats(x)] : [exactValues(stored), magnitudes(stored)];
  const [w, wSize] = [exactValues(weight), magnitudes(weight)];
  const integer = stored !== null && isInteger(stored.format) && isInteger(weight.format);
  // Products are summed exactly over all of K where no scale changes along it, else over the 32 elements of a chunk at most.
  const shared = integer ? Math.min(scaleGranularity(stored.format, k), scaleGranularity(weight.format, k)) : 1;
  const run = shared >= k ? k : Math.min(shared, 32);
  const error = x.kind === "near" && x.error.some((e) => e > 0) ? x.error : null;
  // Integer sums of a run are exact; the run is converted, scaled by every level of both operands, and added to the others.
  const scales = (stored?.format.scales.length ?? 0) + weight.format.scales.length;
  const runs = Math.ceil(k / run);
  const relative = integer ? (runs > 1 ? 2 * Math.sqrt(runs) * U : 0) + (scales + 1) * U : 2 * Math.sqrt(k) * U;
  const leading = stored === null ? near(x).shape.slice(0, -1) : stored.shape.slice(0, 1);
  // The sums here are rounded too, in float64.
  const own = k * 2 ** -53;
  return result([...leading, n], (i) => {
    const [row, column] = [Math.floor(i / n) * k, (i % n) * k];
    const constant = bias === undefined ? 0 : (bias.values[i % n] as number);
    let [sum, size, passed, exactSize] = [0, 0, 0, 0];
    for (let begin = 0; begin < k; begin += run) {
      let part = 0;
      for (let j = begin; j < Math.min(begin + run, k); j++) {
        part += (values[row + j] as number) * (w[column + j] as number);
        exactSize += Math.abs((values[row + j] as number) * (w[column + j] as number));
        if (!integer) size += Math.abs(inputs[row + j] as number) * (wSize[column + j] as number);
        if (error !== null) passed += (error[row + j] as number) * Math.abs(w[column + j] as number);
      }
      sum += part;
      if (integer) size += Math.abs(part);
    }
    const value = sum + constant;
    // A bias is one more rounding, of a sum that is within the bound so far.
    const short = fastAccum ? shortSumBound((j) => (values[row + j] as number) * (w[column + j] as number), k) : 0;
    const rounded = relative * size + short + passed + own * exactSize + k * TINY;
    const added = bias === undefined ? 0 : (bias.error[i % n] as number) + halfUlp(sum, rounded);
    return [value, rounded + added + halfUlp(value, rounded)];
  })[0] as Near;
}
