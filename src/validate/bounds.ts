import { sizeOf } from "../core/shape.js";
import { blockGrid, extentOf, type Format } from "../formats/format.js";
import { dequantize, type QuantizedTensor, scaleGranularity, zeroValues } from "../formats/tensor.js";
import { keyRowOf, sdpaBound } from "../ir/attention.js";
import { cacheRows } from "../ir/attention-shape.js";
import { evaluateConv } from "../ir/conv.js";
import { evaluateNode, exactValues, type Symbols, UNARY } from "../ir/evaluate.js";
import { concreteShape, type Node, type TensorType } from "../ir/graph.js";
import { type OpAttrs, type OpName, shapeRows, type UnaryFn } from "../ir/ops.js";
import { copyTensor, type DenseTensor, type HostTensor, isDense } from "../ir/tensor.js";
import { type Drawn, drawnOf } from "./bounds-sample.js";
import { type Stored, storeBound } from "./bounds-stored.js";

/** The unit roundoff of float32: one correctly rounded operation is off by at most U times its result. */
export const U = 2 ** -24;
/** One ulp is at most this part of a number; WGSL states accuracies in ulp. */
const ULP = 2 * U;
/** WGSL may flush a result below this to zero. */
export const TINY = 2 ** -126;

/** float32 results: exact values in float64 and how far from each a correct backend may be. */
export interface Near {
  readonly kind: "near";
  readonly shape: readonly number[];
  readonly values: Float64Array;
  readonly error: Float64Array;
}
/** Results that have one right answer. */
export interface Equal {
  readonly kind: "equal";
  readonly tensor: HostTensor;
}
/** What a correct backend may answer. docs/numerics.md derives every bound. */
export type Allowed = Near | Equal | Stored | Drawn;

export function exactly(tensor: HostTensor): Allowed {
  if (!isDense(tensor) || tensor.dtype !== "f32") return { kind: "equal", tensor };
  const values = Float64Array.from(tensor.data);
  return { kind: "near", shape: tensor.shape, values, error: new Float64Array(values.length) };
}

/** Half an ulp of a float32 result that is `value`, or anything within `slack` of it. */
export function halfUlp(value: number, slack = 0): number {
  const magnitude = Math.abs(value) + slack;
  if (!(magnitude >= TINY)) return TINY;
  return 2 ** (Math.floor(Math.log2(magnitude)) - 24) || TINY;
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

const near = (allowed: Allowed | undefined): Near => {
  if (allowed?.kind === "near") return allowed;
  throw new Error("a float32 operand is expected");
};
const tensorOf = (allowed: Allowed | undefined): HostTensor => {
  if (allowed?.kind === "equal") return allowed.tensor;
  if (allowed?.kind === "near") return { dtype: "f32", shape: allowed.shape, data: Float32Array.from(allowed.values) };
  throw new Error("an exact operand is expected");
};
const floats = (allowed: Allowed | undefined): Float64Array => near(allowed).values;
const result = (shape: readonly number[], value: (i: number) => readonly [value: number, error: number]): Near[] => {
  const count = sizeOf(shape);
  const [values, error] = [new Float64Array(count), new Float64Array(count)];
  for (let i = 0; i < count; i++) [values[i], error[i]] = value(i) as [number, number];
  return [{ kind: "near", shape, values, error }];
};
const exact: Rule<OpName> = (operands, _attrs, symbols, types, node) =>
  evaluateNode(node, operands.map(tensorOf), symbols, types).map((tensor) => ({ kind: "equal", tensor }));

const ALLOW: { readonly [Op in OpName]: Rule<Op> } = {
  linear: ([x, weight, bias]) => [linear(x as Allowed, tensorOf(weight) as QuantizedTensor, bias && near(bias))],

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

  /** One decoded element, times the embedding's scale. */
  embedding: ([ids, table], { scale = 1 }) => {
    const tensor = tensorOf(table) as QuantizedTensor;
    const [vocabulary, width] = tensor.shape;
    const rows = (tensorOf(ids) as DenseTensor).data;
    const [values, sizes] = [exactValues(tensor), magnitudes(tensor)];
    const roundings = decodeRoundings(tensor.format) + (scale === 1 ? 0 : 1);
    return result([rows.length, width], (i) => {
      const row = Math.min(Math.max(rows[Math.floor(i / width)] as number, 0), vocabulary - 1);
      const at = row * width + (i % width);
      const value = (values[at] as number) * scale;
      return [value, roundings * U * (sizes[at] as number) * Math.abs(scale) + halfUlp(value)];
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

  /** A sum of squares, a mean, a root, a reciprocal, two products: every part's relative error adds up. */
  rmsnorm: ([x, weight], { eps }) => {
    const [source, gain] = [near(x), near(weight)];
    const [rows, width] = shapeRows(source.shape);
    const factors = Array.from({ length: rows }, (_, row) => {
      let [sum, slack] = [0, 0];
      for (let i = row * width; i < (row + 1) * width; i++) {
        sum += (source.values[i] as number) ** 2;
        slack += 2 * Math.abs(source.values[i] as number) * (source.error[i] as number);
      }
      const mean = sum / width + eps;
      const relative = (2 * Math.sqrt(width) + 1) * U + ACCURACY.divide + 2 * U + slack / width / mean;
      return [1 / Math.sqrt(mean), relative / 2 + ACCURACY.sqrt + ACCURACY.divide] as const;
    });
    return result(source.shape, (i) => {
      const [factor, relative] = factors[Math.floor(i / width)] as readonly [number, number];
      const scale = factor * (gain.values[i % width] as number);
      const value = (source.values[i] as number) * scale;
      return [value, Math.abs(value) * (relative + U) + Math.abs(scale) * (source.error[i] as number) + halfUlp(value)];
    });
  },

  /** Every sum and product is rounded to float32 in one order, on every backend alike. */
  hadamard: exact as Rule<"hadamard">,

  /** Rounded product by product as the definition does: exact on exact operands. */
  rope: ([x, table], { heads, position, interleaved }, symbols, types, node) => {
    const source = near(x);
    const [value] = evaluateNode(node, [tensorOf(x), tensorOf(table)], symbols, types) as [DenseTensor];
    const width = shapeRows(source.shape)[1];
    const size = width / heads;
    const half = size / 2;
    const angles = floats(table);
    return result(source.shape, (i) => {
      const column = i % size;
      const pair = interleaved ? Math.floor(column / 2) : column % half;
      const first = interleaved ? column % 2 === 0 : column < half;
      const other = i + (interleaved ? 1 : half) * (first ? 1 : -1);
      const [own, cross] = [source.error[i] as number, source.error[other] as number];
      if (own === 0 && cross === 0) return [value.data[i] as number, 0];
      const at = ((symbols[position] ?? 0) + Math.floor(i / width)) * size;
      const [cos, sin] = [angles[at + pair] as number, angles[at + half + pair] as number];
      const size2 = Math.abs((source.values[i] as number) * cos) + Math.abs((source.values[other] as number) * sin);
      return [
        value.data[i] as number,
        2 * U * size2 + Math.abs(cos) * own + Math.abs(sin) * cross + 2 * halfUlp(value.data[i] as number),
      ];
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

  unary: ([a], { fn }) => {
    const source = near(a);
    const { slope, own } = UNARY_BOUNDS[fn];
    return result(source.shape, (i) => {
      const input = source.values[i] as number;
      const value = UNARY[fn](input);
      const passed = slope * (source.error[i] as number);
      return [value, passed + own(input, value) + halfUlp(value, passed)];
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

/** Accuracies that WGSL states ("Accuracy of Concrete Floating Point Expressions"), as relative errors. */
const ACCURACY = {
  /** 2.5 ulp. */
  divide: 2.5 * ULP,
  /** Inherited from 1 / inverseSqrt(x): 2 ulp and a division. */
  sqrt: 2 * ULP + 2.5 * ULP,
  /** 3 + 2 |x| ulp. */
  exp: (x: number) => (3 + 2 * Math.abs(x)) * ULP,
  /** An absolute error. */
  tanh: 1e-5,
} as const;

interface UnaryBound {
  /** The largest slope of the function (its Lipschitz constant). */
  readonly slope: number;
  /** The error of computing it, beside the final rounding. */
  own(x: number, y: number): number;
}

const UNARY_BOUNDS: Readonly<Record<UnaryFn, UnaryBound>> = {
  relu: { slope: 1, own: () => 0 },
  silu: {
    slope: 1.1,
    // x / (1 + e): e is off by exp's accuracy, the sum by a rounding, the quotient by a division's accuracy. Beyond 2^126 a
    // divisor has no stated accuracy; the result is then below 88 * 2^-126.
    own: (x, y) => {
      const e = Math.exp(-x);
      return Math.abs(y) * ((e / (1 + e)) * ACCURACY.exp(x) + U + ACCURACY.divide) + (x < -87 ? 128 * TINY : 0);
    },
  },
  gelu_tanh: {
    slope: 1.13,
    // tanh(g) within 1e-5, moved by g's own six roundings (its slope is 1 - tanh^2); then a sum and two products.
    own: (x, y) => {
      const g = Math.sqrt(2 / Math.PI) * (Math.abs(x) + 0.044715 * Math.abs(x) ** 3);
      const moved = (1 - Math.tanh(g) ** 2) * 6 * U * g;
      return 0.5 * Math.abs(x) * (ACCURACY.tanh + moved + U) + 2 * U * Math.abs(y);
    },
  },
  gelu: {
    slope: 1.13,
    // x/2 * erfc(-x / sqrt 2) = t exp(-z^2 + p(t)), or 2 minus it: the approximation's 1.2e-7, the exponent's error (5 roundings
    // of z^2; Horner's 18 over coefficients that sum to 7.3, and t's own 6 through p' <= 4), exp's accuracy, t's and a product.
    own: (x, y) => {
      const z = Math.abs(x) / Math.SQRT2;
      const exponent = 5 * z * z * U + (18 * 7.3 + 4 * 6) * U;
      const tail = 1.2e-7 + exponent + ACCURACY.exp(z * z + 1.3) + 7 * U;
      const erfc = x >= 0 ? 2 - (2 * y) / (x || 1) : (2 * y) / x;
      return 0.5 * Math.abs(x) * (Math.abs(erfc) * tail + U) + 2 * U * Math.abs(y);
    },
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

/** x W^T + b. See docs/numerics.md, "linear". */
function linear(x: Allowed, weight: QuantizedTensor, bias: Near | undefined): Near {
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
    const rounded = relative * size + passed + own * exactSize + k * TINY;
    const added = bias === undefined ? 0 : (bias.error[i % n] as number) + halfUlp(sum, rounded);
    return [value, rounded + added + halfUlp(value, rounded)];
  })[0] as Near;
}
