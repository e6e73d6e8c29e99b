import { maxValue } from "../formats/codec.js";
import { codecBits, extentOf, type Rule } from "../formats/format.js";
import { packRow } from "../formats/pack.js";
import { ROUND } from "./affine.js";
import { type Procedure, type RuleContext, scaleWriter, type Tile, zeroWriter } from "./rules.js";

const ITERATIONS = 20;
const P = 0.7;
const KAPPA = 1.01;

/** Where the groups of a tensor lie: groups of one row side by side, `width` values each. */
function groupsOf({ format, out, columns }: RuleContext) {
  const [n, k] = out.shape;
  const block = format.scales[0]?.block ?? ([1, "all"] as const);
  return { count: n * columns, width: extentOf(block[1], k), columns, k };
}

/** Calls `visit` with every group of a tile. */
function forEachGroup(
  context: RuleContext,
  tile: Tile,
  visit: (group: number, begin: number, end: number) => void,
): void {
  const { width, columns, k } = groupsOf(context);
  for (let row = tile.begin; row < tile.end; row++) {
    for (let column = 0; column < columns; column++) {
      const begin = (row - tile.begin) * k + column * width;
      visit(row * columns + column, begin, begin + width);
    }
  }
}

/** Encodes the rows of a tile group by group. */
function encodeTile(
  context: RuleContext,
  tile: Tile,
  encode: (group: number, begin: number, end: number, codes: Int32Array, at: number) => void,
): void {
  const { width, columns, k } = groupsOf(context);
  const { format, out } = context;
  const bits = codecBits(format.element);
  const { stride } = out;
  const codes = new Int32Array(k);
  for (let row = tile.begin; row < tile.end; row++) {
    for (let column = 0; column < columns; column++) {
      const begin = (row - tile.begin) * k + column * width;
      encode(row * columns + column, begin, begin + width, codes, column * width);
    }
    packRow(out.buffers.qdata, (row - out.begin) * stride, codes, k, bits);
  }
}

/**
 * Half-quadratic quantization (specification 8), float32: zero points that minimize a sparse error, found in up to 20
 * passes; the search of the whole tensor stops when its mean error no longer falls.
 */
export function hqq(context: RuleContext): Procedure {
  const { format, guarded, out } = context;
  const bits = codecBits(format.element);
  const most = 2 ** bits - 1;
  const { count } = groupsOf(context);
  const inverse = new Float32Array(count);
  const zeros = new Float32Array(count);
  const total = out.shape[0] * out.shape[1];
  const tinygemm = format.zero.domain === "float";
  const zeroLimit = format.zero.domain === "int" ? maxValue(format.zero.codec) : Number.POSITIVE_INFINITY;
  let iteration = 0;
  let beta = 10;
  let error = 0;
  let best = 1e4;
  let searching = true;
  const storeScale = scaleWriter(context, 0);
  const storeZero = zeroWriter(context);

  const first = (data: Float32Array, group: number, begin: number, end: number) => {
    let lo = Number.POSITIVE_INFINITY;
    let hi = Number.NEGATIVE_INFINITY;
    for (let i = begin; i < end; i++) {
      lo = Math.min(lo, data[i] as number);
      hi = Math.max(hi, data[i] as number);
    }
    let scale = Math.min(Math.fround(Math.fround(1 / Math.fround(hi - lo)) * most), 2e4);
    // A nearly constant group far from zero has a zero point beyond what its codec holds.
    if (guarded && Math.abs(lo * scale) > zeroLimit) scale = Math.fround(zeroLimit / Math.abs(lo) / 2);
    inverse[group] = scale;
    const zero = Math.fround(-lo * scale);
    zeros[group] = bits === 4 ? zero + ROUND - ROUND : zero;
  };
  const improve = (data: Float32Array, group: number, begin: number, end: number) => {
    const scale = inverse[group] as number;
    const zero = zeros[group] as number;
    // Below this magnitude the shrinkage of the error, |e| - |e|^(p-1) / beta, is negative: the error counts as none.
    const negligible = (0.999 / beta) ** (1 / (2 - P));
    let sum = 0;
    for (let i = begin; i < end; i++) {
      const value = data[i] as number;
      const rounded = Math.fround(Math.fround(value * scale) + zero) + ROUND - ROUND;
      const code = rounded < 0 ? 0 : rounded > most ? most : rounded;
      const e = Math.fround(value - Math.fround(Math.fround(code - zero) / scale));
      const size = Math.abs(e);
      error += size;
      let kept = value;
      if (size > negligible) {
        const shrunk = Math.fround(size - Math.fround(Math.fround(size ** (P - 1)) / beta));
        if (shrunk > 0) kept = Math.fround(value - Math.sign(e) * shrunk);
      }
      sum += Math.fround(code - Math.fround(kept * scale));
    }
    zeros[group] = sum / (end - begin);
  };

  return {
    get writes() {
      return !searching;
    },
    pass: (tile) => {
      const { data } = tile;
      if (searching) {
        forEachGroup(context, tile, (group, begin, end) => {
          if (iteration === 0) first(data, group, begin, end);
          improve(data, group, begin, end);
        });
        return;
      }
      encodeTile(context, tile, (group, begin, end, codes, at) => {
        const scale = inverse[group] as number;
        const zero = zeros[group] as number;
        const stored = Math.fround(1 / scale);
        storeScale(group, stored);
        storeZero(group, tinygemm ? Math.fround(Math.fround(2 ** (bits - 1) - zero) * stored) : zero);
        for (let i = begin; i < end; i++) {
          const code = Math.fround(Math.fround((data[i] as number) * scale) + zero) + ROUND - ROUND;
          codes[at + i - begin] = code < 0 ? 0 : code > most ? most : code;
        }
      });
    },
    finish: () => {
      const mean = error / Math.max(total, 1);
      error = 0;
      beta *= KAPPA;
      iteration++;
      searching = mean < best && iteration < ITERATIONS;
      best = Math.min(best, mean);
    },
  };
}

/** The smallest scale of the scale-only search: float32's epsilon. */
const LEAST_SCALE = 2 ** -23;

/**
 * HQQ_SCALE_ONLY (specification 8), float32: the least-squares scale of the current codes, in up to 20 passes, until no
 * scale of the tensor moves by more than 1e-5 of itself.
 */
export function hqqScale(context: RuleContext, rule: Extract<Rule, { kind: "hqq_scale" }>): Procedure {
  const { count } = groupsOf(context);
  const scales = new Float32Array(count);
  const bound = Math.max(Math.abs(rule.min), Math.abs(rule.max));
  let iteration = 0;
  let change = 0;
  let searching = true;
  const store = scaleWriter(context, 0);
  const encode = (value: number, scale: number) => {
    const code = Math.fround(value / scale) + ROUND - ROUND;
    return code < rule.min ? rule.min : code > rule.max ? rule.max : code;
  };
  return {
    get writes() {
      return !searching;
    },
    pass: (tile) => {
      const { data } = tile;
      if (!searching) {
        encodeTile(context, tile, (group, begin, end, codes, at) => {
          const scale = scales[group] as number;
          store(group, scale);
          for (let i = begin; i < end; i++) codes[at + i - begin] = encode(data[i] as number, scale);
        });
        return;
      }
      forEachGroup(context, tile, (group, begin, end) => {
        if (iteration === 0) {
          let largest = 0;
          for (let i = begin; i < end; i++) largest = Math.max(largest, Math.abs(data[i] as number));
          scales[group] = Math.max(largest / bound, LEAST_SCALE);
        }
        const scale = scales[group] as number;
        let [products, squares] = [0, 0];
        for (let i = begin; i < end; i++) {
          const code = encode(data[i] as number, scale);
          products += (data[i] as number) * code;
          squares += code * code;
        }
        if (squares === 0) return;
        scales[group] = Math.max(products / squares, LEAST_SCALE);
        change = Math.max(change, Math.abs((scales[group] as number) - scale) / scale);
      });
    },
    finish: () => {
      iteration++;
      searching = change >= 1e-5 && iteration < ITERATIONS;
      change = 0;
    },
  };
}

/**
 * SINQ (specification 8), float32: columns (of the tensor cut into groups) and groups are divided by their standard
 * deviations in turn, and what is left is quantized symmetrically. Level 0 holds a scale per group, level 1 one per
 * column.
 */
export function sinq(context: RuleContext, rule: Extract<Rule, { kind: "sinq" }>): Procedure {
  const { count, width, k } = groupsOf(context);
  const byGroup = new Float64Array(count).fill(1);
  const byColumn = new Float64Array(width).fill(1);
  const scales = new Float32Array(count);
  const sums = new Float64Array(width);
  const squares = new Float64Array(width);
  let target = Number.POSITIVE_INFINITY;
  let iteration = -1;
  const storeGroup = scaleWriter(context, 0);

  /** What a deviation divides by. A constant group has none; dividing by its rounding errors would overflow. */
  const divisorOf = (spread: number) => {
    const ratio = Math.max(spread / target, 1e-8);
    return context.guarded && ratio < 1e-4 ? 1 : ratio;
  };
  /** Column deviations of the values as divided so far; the sums start anew. */
  const columnDeviations = () => {
    const deviations = Float64Array.from(sums, (sum, c) => deviation(sum, squares[c] as number, count));
    sums.fill(0);
    squares.fill(0);
    return deviations;
  };
  return {
    get writes() {
      return iteration >= rule.iterations;
    },
    pass: (tile) => {
      const { data } = tile;
      if (iteration >= rule.iterations) {
        encodeTile(context, tile, (group, begin, end, codes, at) => {
          const scale = scales[group] as number;
          const divisor = byGroup[group] as number;
          storeGroup(group, Math.fround(scale * divisor));
          for (let i = begin; i < end; i++) {
            const value = Math.fround((data[i] as number) / (divisor * (byColumn[i - begin] as number)));
            const code = Math.fround(value / scale) + ROUND - ROUND;
            codes[at + i - begin] = code < rule.min ? rule.min : code > rule.max ? rule.max : code;
          }
        });
        return;
      }
      forEachGroup(context, tile, (group, begin, end) => {
        let [sum, square, largest] = [0, 0, 0];
        for (let i = begin; i < end; i++) {
          const value = (data[i] as number) / ((byGroup[group] as number) * (byColumn[i - begin] as number));
          sum += value;
          square += value * value;
          largest = Math.max(largest, Math.abs(value));
        }
        const spread = deviation(sum, square, end - begin);
        if (iteration < 0) target = Math.min(target, spread);
        const divisor = iteration < 0 ? 1 : divisorOf(spread);
        byGroup[group] = (byGroup[group] as number) * divisor;
        scales[group] = Math.max(largest / divisor / rule.max, 1e-8);
        for (let i = begin; i < end; i++) {
          const value = (data[i] as number) / ((byGroup[group] as number) * (byColumn[i - begin] as number));
          sums[i - begin] = (sums[i - begin] as number) + value;
          squares[i - begin] = (squares[i - begin] as number) + value * value;
        }
      });
    },
    finish: () => {
      const deviations = columnDeviations();
      if (iteration < 0) target = Math.max(Math.min(target, ...deviations), 1e-8);
      iteration++;
      if (iteration < rule.iterations) {
        for (let c = 0; c < width; c++) {
          byColumn[c] = (byColumn[c] as number) * divisorOf(deviations[c] as number);
        }
        return;
      }
      const storeColumn = scaleWriter(context, 1);
      for (let c = 0; c < k; c++) storeColumn(c, Math.fround(byColumn[c % width] as number));
    },
  };
}

/** Sample standard deviation (n - 1) from sums. */
function deviation(sum: number, squares: number, count: number): number {
  return Math.sqrt(Math.max(squares - (sum * sum) / count, 0) / Math.max(count - 1, 1));
}
