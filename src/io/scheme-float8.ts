import { FewbitError } from "../core/errors.js";
import { type Block, type Format, withScale } from "../formats/format.js";
import { type Codes, codesOf, type StoredMatrix, type StoredPart, scaleCodec } from "../formats/stored-matrix.js";
import { CODECS, FORMATS } from "../formats/table.js";
import type { TensorStore } from "./safetensors.js";
import { type Json, malformedConfig, needPart, partOf, type Scheme, unsupported, withSuffix } from "./scheme.js";

const SCALE_TYPES = ["F32", "BF16", "F16"] as const;

/**
 * quantization_config of `quant_method: "fp8"`: e4m3 weights with `weight_scale_inv` [N / 128, K / 128] (DeepSeek, Qwen; the
 * weight is code * scale, whatever the name says), or `weight_scale` of one number a tensor or a row.
 */
export function fp8Scheme(config: Json): Scheme {
  if (config.fmt !== undefined && config.fmt !== "e4m3") throw unsupported("fp8 fmt", config.fmt, ["e4m3"]);
  const activations = config.activation_scheme ?? "dynamic";
  if (activations !== "dynamic") throw unsupported("fp8 activation_scheme", activations, ["dynamic"]);
  const block = blockSize(config.weight_block_size);
  const activation = withScale(FORMATS.float8_e4m3, { block: block === undefined ? [1, "all"] : [1, block[1]] });
  const suffix = block === undefined ? ".weight_scale" : ".weight_scale_inv";
  const name = `fp8 e4m3${block === undefined ? "" : ` ${block.join("x")}`}`;
  return {
    name,
    async describe(store) {
      const found = new Map<string, StoredMatrix>();
      for (const layer of withSuffix(store, suffix))
        found.set(`${layer}.weight`, float8Matrix(store, layer, suffix, block, activation, name));
      return found;
    },
  };
}

function blockSize(value: unknown): readonly [number, number] | undefined {
  if (value === undefined || value === null) return undefined;
  const legal = Array.isArray(value) && value.length === 2 && value.every((n) => Number.isInteger(n) && n > 0);
  if (!legal) throw malformedConfig("weight_block_size", JSON.stringify(value), "two positive integers");
  return value as [number, number];
}

/** A float8 weight [N, K] with the scales of `layer + suffix`. Blocks are one number, one a row, or `block` sized. */
export function float8Matrix(
  store: TensorStore,
  layer: string,
  suffix: string,
  block: readonly [number, number] | undefined,
  activation: Format | null,
  kind: string,
): StoredMatrix {
  const weight = needPart(store, `${layer}.weight`, ["F8_E4M3", "F8_E5M2"], [null, null]);
  const row = weight.dtype === "F8_E5M2" ? FORMATS.float8_e5m2 : FORMATS.float8_e4m3;
  return byteMatrix(store, layer, weight, row, `${layer}${suffix}`, block, activation, kind);
}

/** A weight of one byte an element with scales of any of three grids. */
export function byteMatrix(
  store: TensorStore,
  layer: string,
  weight: StoredPart,
  row: Format,
  scaleName: string,
  block: readonly [number, number] | undefined,
  activation: Format | null,
  kind: string,
): StoredMatrix {
  if (partOf(store, `${layer}.input_scale`) !== undefined)
    throw unsupported(`activation of ${layer}`, "static (input_scale)", ["dynamic", "none"]);
  const [n, k] = weight.shape as [number, number];
  const scale = partOf(store, scaleName) as StoredPart;
  const codec = scaleCodec(scale.dtype);
  if (codec === undefined || !(SCALE_TYPES as readonly string[]).includes(scale.dtype))
    throw new FewbitError("dtype/mismatch", { what: scaleName, got: scale.dtype, expected: SCALE_TYPES.join(" or ") });
  const { extents, repeat } = gridOf(scaleName, scale.shape, [n, k], block);
  return {
    format: withScale(row, { block: extents, codec }),
    shape: [n, k],
    activation,
    kind,
    cut: "rows",
    step: 1,
    bytesPerLine: k,
    read: async (begin, end, signal, memory) => ({ packed: await weight.read([begin, end], signal, memory) }),
    blocks: async (signal, memory) => {
      const codes = codesOf(scale.dtype, await scale.read(undefined, signal, memory));
      return { scales: [repeat === null ? codes : repeatRows(codes, repeat.columns, n, repeat.rows)] };
    },
  };
}

/**
 * The block that a grid of scales means. A last block of rows that is short becomes one scale a row (the same values), because
 * tensors laid one after another must start on a block.
 */
function gridOf(
  name: string,
  shape: readonly number[],
  [n, k]: readonly [number, number],
  block: readonly [number, number] | undefined,
): { extents: Block; repeat: { columns: number; rows: number } | null } {
  const count = shape.reduce((a, b) => a * b, 1);
  if (block === undefined) {
    if (count === 1) return { extents: ["all", "all"], repeat: null };
    if (count === n) return { extents: [1, "all"], repeat: null };
    throw new FewbitError("shape/mismatch", { what: name, got: shape, expected: `[1] or [${n}, 1]` });
  }
  const [rows, columns] = block;
  if (k % columns !== 0) throw unsupported(`K of ${name}`, k, [`a multiple of ${columns}`]);
  const grid = [Math.ceil(n / rows), k / columns] as const;
  if (shape.length !== 2 || shape[0] !== grid[0] || shape[1] !== grid[1])
    throw new FewbitError("shape/mismatch", { what: name, got: shape, expected: `[${grid.join(", ")}]` });
  const width = columns === k ? "all" : columns;
  if (n % rows === 0) return { extents: [rows, width], repeat: null };
  return { extents: [1, width], repeat: { columns: grid[1], rows } };
}

function repeatRows(codes: Codes, columns: number, n: number, rows: number): Codes {
  const out = new (codes.constructor as new (length: number) => Codes)(n * columns);
  for (let row = 0; row < n; row++) {
    const from = Math.floor(row / rows) * columns;
    out.set(codes.subarray(from, from + columns), row * columns);
  }
  return out;
}

/** What an fp8 tensor without scales means: bf16 holds every e4m3 and e5m2 value exactly. */
export const PLAIN_FLOAT8 = { F8_E4M3: CODECS.e4m3, F8_E5M2: CODECS.e5m2 } as const;
