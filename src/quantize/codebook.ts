import { type Codec, codecBits, extentOf, type Rule, type ScaleLevel } from "../formats/format.js";
import { packRow, rowWords } from "../formats/pack.js";
import { type Procedure, type RuleContext, scaleWriter, type Tile } from "./rules.js";

/** How often k-means looks whether it has converged. */
const CHECK_EVERY = 10;

/**
 * Learned codebooks (specification 16): k-means over the patches of the scaled tensor. The start is greedy: patch 0, then again and
 * again the patch farthest from all chosen ones. Keeps one float32 per patch while it starts.
 */
export function codebook(context: RuleContext, rule: Extract<Rule, { kind: "codebook" }>): Procedure {
  const { format, tensor, options } = context;
  const element = format.element as Extract<Codec, { kind: "lut" }>;
  const [patchRows, patchK] = element.vector;
  const size = patchRows * patchK;
  const entries = 2 ** element.bits;
  const [n, k] = tensor.shape;
  const perRow = k / patchK;
  const points = (n / patchRows) * perRow;
  const centers = tensor.table as Float32Array;
  const bits = codecBits(element);
  const scaleTile = tileScaler(context);
  const storeScale = scaleWriter(context, 0);
  const stride = rowWords(perRow, bits);

  let phase: "start" | "iterate" | "encode" = "start";
  let chosen = 0;
  let iteration = 0;
  let distances = new Float32Array(0);
  let farthest = -1;
  let candidate = new Float32Array(size);
  const sums = new Float64Array(entries * size);
  const counts = new Float64Array(entries);
  let nearest = nearestCenter(centers, entries, size);
  if (options.table !== undefined) {
    centers.set(options.table);
    nearest = nearestCenter(centers, entries, size);
    phase = "encode";
  } else {
    distances = new Float32Array(points).fill(Number.POSITIVE_INFINITY);
  }

  /** Calls `visit` with every patch of a scaled tile, gathered into `patch`. */
  const patch = new Float32Array(size);
  const forEachPatch = (
    data: Float32Array,
    tile: Tile,
    visit: (point: number, row: number, column: number) => void,
  ) => {
    for (let row = tile.begin; row < tile.end; row += patchRows) {
      for (let column = 0; column < perRow; column++) {
        for (let r = 0; r < patchRows; r++) {
          const at = (row - tile.begin + r) * k + column * patchK;
          for (let c = 0; c < patchK; c++) patch[r * patchK + c] = data[at + c] as number;
        }
        visit((row / patchRows) * perRow + column, row / patchRows, column);
      }
    }
  };

  /** Measures every patch against the center chosen last, and keeps the farthest one. */
  const measure = (point: number) => {
    let squared = Number.POSITIVE_INFINITY;
    if (chosen > 0) {
      squared = 0;
      for (let i = 0; i < size; i++)
        squared += ((patch[i] as number) - (centers[(chosen - 1) * size + i] as number)) ** 2;
    }
    const distance = Math.min(distances[point] as number, squared);
    distances[point] = distance;
    if (distance > farthest) {
      farthest = distance;
      candidate = patch.slice();
    }
  };
  const accumulate = () => {
    const center = nearest(patch);
    counts[center] = (counts[center] as number) + 1;
    for (let i = 0; i < size; i++) sums[center * size + i] = (sums[center * size + i] as number) + (patch[i] as number);
  };
  /** Moves centers to the means of their patches; whether any moved. */
  const move = (): boolean => {
    let moved = false;
    for (let center = 0; center < entries; center++) {
      const count = counts[center] as number;
      if (count === 0) continue;
      for (let i = center * size; i < (center + 1) * size; i++) {
        const before = centers[i] as number;
        centers[i] = (sums[i] as number) / count;
        moved ||= Math.abs((centers[i] as number) - before) > 1e-8 + 1e-6 * Math.abs(before);
      }
    }
    sums.fill(0);
    counts.fill(0);
    nearest = nearestCenter(centers, entries, size);
    return moved;
  };

  return {
    pass: (tile) => {
      const data = scaleTile(tile, phase === "encode" ? storeScale : undefined);
      if (phase === "start") return forEachPatch(data, tile, measure);
      if (phase === "iterate") return forEachPatch(data, tile, accumulate);
      const codes = new Int32Array(perRow);
      forEachPatch(data, tile, (_point, row, column) => {
        codes[column] = nearest(patch);
        if (column === perRow - 1) packRow(tensor.qdata, row * stride, codes, perRow, bits);
      });
    },
    finish: () => {
      if (phase === "encode") return false;
      if (phase === "start") {
        centers.set(candidate, chosen * size);
        chosen++;
        farthest = -1;
        if (chosen < entries) return true;
        distances = new Float32Array(0);
        nearest = nearestCenter(centers, entries, size);
        phase = rule.iterations > 0 ? "iterate" : "encode";
        return true;
      }
      const moved = move();
      iteration++;
      if (iteration >= rule.iterations || (iteration % CHECK_EVERY === 0 && !moved)) phase = "encode";
      return true;
    },
  };
}

/** Divides a tile by its scales, which it chooses (and hands to `store`) or takes as given. */
function tileScaler({ format, tensor, guarded, options }: RuleContext) {
  const level = format.scales[0] as ScaleLevel;
  const k = tensor.shape[1];
  const width = extentOf(level.block[1], k);
  const columns = k / width;
  const { element } = format;
  const scalar = element.kind === "lut" && element.vector[0] * element.vector[1] === 1;
  const choose = (data: Float32Array, begin: number): number => {
    let [largest, signed, squares] = [0, Number.NEGATIVE_INFINITY, 0];
    for (let i = begin; i < begin + width; i++) {
      const value = data[i] as number;
      largest = Math.max(largest, Math.abs(value));
      signed = Math.max(signed, value);
      squares += value * value;
    }
    // torchao takes the signed maximum: negative rows then divide by the floor (28.13).
    const scale = !scalar ? Math.sqrt(squares) : guarded ? largest : signed;
    return Math.fround(Math.max(Math.fround(scale), Math.fround(1e-9)));
  };
  return (tile: Tile, store: ((index: number, value: number) => number) | undefined): Float32Array => {
    const out = new Float32Array(tile.data.length);
    for (let row = tile.begin; row < tile.end; row++) {
      for (let column = 0; column < columns; column++) {
        const begin = (row - tile.begin) * k + column * width;
        const index = row * columns + column;
        const scale = options.given?.scale[index] ?? choose(tile.data, begin);
        store?.(index, scale);
        for (let i = begin; i < begin + width; i++) out[i] = (tile.data[i] as number) / scale;
      }
    }
    return out;
  };
}

/** A function that finds the entry nearest to a patch, the first on ties. Scalar tables are searched in sorted order. */
function nearestCenter(centers: Float32Array, entries: number, size: number): (patch: Float32Array) => number {
  if (size > 1) {
    return (patch) => {
      let best = 0;
      let least = Number.POSITIVE_INFINITY;
      for (let center = 0; center < entries; center++) {
        let squared = 0;
        for (let i = 0; i < size; i++) squared += ((patch[i] as number) - (centers[center * size + i] as number)) ** 2;
        if (squared < least) {
          least = squared;
          best = center;
        }
      }
      return best;
    };
  }
  const order = Array.from(centers.keys()).sort((a, b) => (centers[a] as number) - (centers[b] as number) || a - b);
  const sorted = Float64Array.from(order, (index) => centers[index] as number);
  // Of equal centers only the first can be nearest; it stands for the others.
  const names = order.map((_, i) => order[sorted.indexOf(sorted[i] as number)] as number);
  return (patch) => {
    const value = patch[0] as number;
    let low = 0;
    let high = entries - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (value >= (sorted[middle] as number)) low = middle;
      else high = middle;
    }
    const [below, above] = [Math.abs(value - (sorted[low] as number)), Math.abs((sorted[high] as number) - value)];
    const [first, second] = [names[low] as number, names[high] as number];
    return above < below || (above === below && second < first) ? second : first;
  };
}
