import { type Codec, codecBits, extentOf, type Rule, type ScaleLevel } from "../formats/format.js";
import { packRow } from "../formats/pack.js";
import { learnCenters, nearestCenter } from "./kmeans.js";
import { type Procedure, type RuleContext, scaleWriter, type Tile } from "./rules.js";

/**
 * Learned codebooks (specification 16): k-means over the patches of the scaled tensor, in two passes. Clustering looks
 * at all patches at once, so this rule alone keeps the tensor in float32 while it learns (torchao leaves weights above
 * 2^27 elements alone).
 */
export function codebook(context: RuleContext, rule: Extract<Rule, { kind: "codebook" }>): Procedure {
  const { format, out, options } = context;
  const element = format.element as Extract<Codec, { kind: "lut" }>;
  const [patchRows, patchK] = element.vector;
  const size = patchRows * patchK;
  const entries = 2 ** element.bits;
  const [n, k] = out.shape;
  const perRow = k / patchK;
  const centers = out.buffers.table as Float32Array;
  const bits = codecBits(element);
  const scaleTile = tileScaler(context);
  const storeScale = scaleWriter(context, 0);
  const { stride } = out;
  let points: Float32Array | undefined;
  if (options.table === undefined) points = new Float32Array(n * k);
  else centers.set(options.table);

  /** Gathers the patch at (row, column) of a scaled tile into `out`. */
  const gather = (data: Float32Array, row: number, column: number, out: Float32Array, at: number) => {
    for (let r = 0; r < patchRows; r++) {
      const from = (row + r) * k + column * patchK;
      for (let c = 0; c < patchK; c++) out[at + r * patchK + c] = data[from + c] as number;
    }
  };

  return {
    get writes() {
      return points === undefined;
    },
    pass: (tile) => {
      const data = scaleTile(tile, points === undefined ? storeScale : undefined);
      const rows = tile.end - tile.begin;
      if (points !== undefined) {
        for (let row = 0; row < rows; row += patchRows) {
          const base = ((tile.begin + row) / patchRows) * perRow;
          for (let column = 0; column < perRow; column++) gather(data, row, column, points, (base + column) * size);
        }
        return;
      }
      const nearest = nearestCenter(centers, entries, size);
      const codes = new Int32Array(perRow);
      const patch = new Float32Array(size);
      for (let row = 0; row < rows; row += patchRows) {
        for (let column = 0; column < perRow; column++) {
          gather(data, row, column, patch, 0);
          codes[column] = nearest(patch, 0);
        }
        packRow(out.buffers.qdata, ((tile.begin + row - out.begin) / patchRows) * stride, codes, perRow, bits);
      }
    },
    finish: () => {
      if (points === undefined) return;
      learnCenters(points, size, entries, rule.iterations, centers);
      points = undefined;
    },
  };
}

/** Divides a tile by its scales, which it chooses (and hands to `store`) or takes as given. */
function tileScaler({ format, out: { shape }, guarded, options }: RuleContext) {
  const level = format.scales[0] as ScaleLevel;
  const k = shape[1];
  let scaled = new Float32Array(0);
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
    if (scaled.length < tile.data.length) scaled = new Float32Array(tile.data.length);
    for (let row = tile.begin; row < tile.end; row++) {
      for (let column = 0; column < columns; column++) {
        const begin = (row - tile.begin) * k + column * width;
        const index = row * columns + column;
        const scale = options.given?.scale[index] ?? choose(tile.data, begin);
        store?.(index, scale);
        for (let i = begin; i < begin + width; i++) scaled[i] = (tile.data[i] as number) / scale;
      }
    }
    return scaled.subarray(0, tile.data.length);
  };
}
