import { f32Bits, f32FromBits } from "../core/dtype.js";
import { Staging } from "../core/staging.js";
import { type Format, withScale } from "../formats/format.js";
import { transpose } from "../formats/layouts.js";
import { codesOf, type StoredMatrix, scaleCodec } from "../formats/stored-matrix.js";
import { CODECS, FORMATS, type FormatName } from "../formats/table.js";
import type { TensorStore } from "./safetensors.js";
import {
  groupOrder,
  groupSizeOf,
  groupsOf,
  type Json,
  malformedConfig,
  needPart,
  partOf,
  type Scheme,
  unsupported,
  withSuffix,
} from "./scheme.js";
import { byteMatrix } from "./scheme-float8.js";
import { flipSigns, unpackAlongN } from "./scheme-packed.js";

/*
 * compressed-tensors (llm-compressor, vLLM): `config_groups` say how the weights and activations of the modules that their
 * `targets` name are quantized, and how the weight is laid out.
 */

/** One config group, checked. */
interface Group {
  readonly targets: readonly string[];
  readonly layout: keyof typeof LAYOUTS;
  readonly weights: Json;
  readonly activation: Format | null;
  readonly kind: string;
}

type Describe = (
  store: TensorStore,
  layer: string,
  group: Group,
  signal: AbortSignal | undefined,
) => StoredMatrix | Promise<StoredMatrix>;

/** The tensor beside which a layer of each layout is recognised, and how it is read. */
const LAYOUTS = {
  "float-quantized": { suffix: ".weight_scale", describe: bytes },
  "int-quantized": { suffix: ".weight_scale", describe: bytes },
  "naive-quantized": { suffix: ".weight_scale", describe: bytes },
  "pack-quantized": { suffix: ".weight_packed", describe: packedIntegers },
  "nvfp4-pack-quantized": { suffix: ".weight_packed", describe: packedNvfp4 },
  "mxfp4-pack-quantized": { suffix: ".weight_packed", describe: packedMxfp4 },
} as const satisfies Record<string, { suffix: string; describe: Describe }>;

/** quantization_config of `quant_method: "compressed-tensors"`. */
export function compressedScheme(config: Json): Scheme {
  const status = config.quantization_status ?? "compressed";
  if (status !== "compressed" && status !== "frozen") throw unsupported("quantization_status", status, ["compressed"]);
  const sparsity = (config.sparsity_config as Json | null | undefined)?.format;
  if (sparsity !== undefined && sparsity !== "dense") throw unsupported("sparsity_config.format", sparsity, ["dense"]);
  const groups = config.config_groups;
  if (typeof groups !== "object" || groups === null) throw malformedConfig("config_groups", groups, "an object");
  const parsed = Object.values(groups).map((group) => parseGroup(group as Json, config.format));
  if (parsed.length === 0) throw malformedConfig("config_groups", "{}", "at least one group");
  return {
    name: [...new Set(parsed.map((group) => group.kind))].join(", "),
    async describe(store, signal) {
      const found = new Map<string, StoredMatrix>();
      const suffixes = new Set(parsed.map((group) => LAYOUTS[group.layout].suffix));
      for (const suffix of suffixes) {
        for (const layer of withSuffix(store, suffix)) {
          const group = parsed.find((candidate) => targets(candidate, layer));
          if (group === undefined)
            throw malformedConfig("config_groups", layer, "a group whose targets name this layer");
          if (LAYOUTS[group.layout].suffix === suffix)
            found.set(`${layer}.weight`, await LAYOUTS[group.layout].describe(store, layer, group, signal));
        }
      }
      return found;
    },
  };
}

/** A target is a class of modules (only linears are stored quantized), `re:` and a pattern, or a module's name. */
function targets(group: Group, layer: string): boolean {
  return group.targets.some((target) => {
    if (target === "Linear") return true;
    if (!target.startsWith("re:")) return target === layer;
    try {
      return new RegExp(`^(?:${target.slice(3)})`).test(layer);
    } catch {
      throw malformedConfig("targets", target, "re: and a regular expression");
    }
  });
}

function parseGroup(group: Json, fallback: unknown): Group {
  const layout = group.format ?? fallback ?? "naive-quantized";
  if (typeof layout !== "string" || !Object.hasOwn(LAYOUTS, layout))
    throw unsupported("compressed-tensors format", layout, Object.keys(LAYOUTS));
  const weights = group.weights;
  if (typeof weights !== "object" || weights === null) throw malformedConfig("weights", weights, "an object");
  const list = group.targets;
  if (!Array.isArray(list) || !list.every((target) => typeof target === "string"))
    throw malformedConfig("targets", JSON.stringify(list), "a list of names");
  if (group.output_activations) throw unsupported("output_activations", "quantized", ["null"]);
  const { num_bits: bits, type } = weights as Json;
  return {
    targets: list,
    layout: layout as Group["layout"],
    weights: weights as Json,
    activation: activationOf(group.input_activations as Json | null | undefined),
    kind: `compressed-tensors ${layout} ${String(type)}${String(bits)}`,
  };
}

/** The format of activations that are quantized on the fly. */
function activationOf(activations: Json | null | undefined): Format | null {
  if (activations === null || activations === undefined) return null;
  const { dynamic, type, strategy, symmetric, num_bits: bits } = activations;
  if (dynamic !== true) throw unsupported("input_activations.dynamic", dynamic, ["true"]);
  if (bits !== 8) throw unsupported("input_activations.num_bits", bits, ["8"]);
  const size = strategy === "group" ? groupSizeOf(activations) : undefined;
  const legal = strategy === "token" || strategy === "tensor" || size !== undefined;
  if (!legal) throw unsupported("input_activations.strategy", strategy, ["token", "tensor", "group"]);
  const block = strategy === "tensor" ? (["all", "all"] as const) : ([1, size ?? "all"] as const);
  if (type === "float") return withScale(FORMATS.float8_e4m3, { block });
  if (type === "int") return withScale(symmetric === false ? FORMATS.int8_asymmetric : FORMATS.int8, { block });
  throw unsupported("input_activations.type", type, ["float", "int"]);
}

/** One byte an element: e4m3 or int8, a scale a tensor, row, group of a row, or block. */
function bytes(store: TensorStore, layer: string, { weights, activation, kind }: Group): StoredMatrix {
  if (weights.num_bits !== 8) throw unsupported("weights.num_bits", weights.num_bits, ["8"]);
  if (weights.symmetric === false) throw unsupported("weights.symmetric", "false", ["true"]);
  const integer = weights.type === "int";
  const weight = needPart(store, `${layer}.weight`, [integer ? "I8" : "F8_E4M3"], [null, null]);
  const block = blockOf(weights);
  const row = integer ? FORMATS.int8 : FORMATS.float8_e4m3;
  return byteMatrix(store, layer, weight, row, `${layer}.weight_scale`, block, activation, kind);
}

/** [rows, k] of a block of weights that is neither the tensor nor a row. */
function blockOf(weights: Json): readonly [number, number] | undefined {
  const { strategy, block_structure: structure } = weights;
  if (strategy === "group")
    return [1, groupSizeOf(weights) ?? fail("group_size", weights.group_size, "a positive integer")];
  if (strategy !== "block") return undefined;
  const sizes = typeof structure === "string" ? structure.split("x").map(Number) : structure;
  if (!Array.isArray(sizes) || sizes.length !== 2 || !sizes.every((n) => Number.isInteger(n) && n > 0))
    throw malformedConfig("block_structure", JSON.stringify(structure), "two positive integers");
  return sizes as [number, number];
}

function fail(field: string, value: unknown, expected: string): never {
  throw malformedConfig(field, value, expected);
}

/** -1 as an unsigned code. */
const UNSET = 0xffffffff;

/** Codes offset by the middle one, least significant first in 32-bit words along K: fewbit's own order but for the offset. */
async function packedIntegers(
  store: TensorStore,
  layer: string,
  { weights, activation, kind }: Group,
  signal: AbortSignal | undefined,
): Promise<StoredMatrix> {
  const bits = weights.num_bits;
  if (weights.type !== "int" || (bits !== 4 && bits !== 8))
    throw unsupported("weights", `${String(weights.type)}${String(bits)}`, ["int4", "int8"]);
  const packed = needPart(store, `${layer}.weight_packed`, ["I32"], [null, null]);
  const [n, words] = packed.shape as [number, number];
  const k = (words * 32) / bits;
  const size = weights.strategy === "channel" ? undefined : groupSizeOf(weights);
  const groups = groupsOf(layer, k, size ?? k);
  let columns: Uint32Array | undefined;
  const indexName = `${layer}.weight_g_idx`;
  if (partOf(store, indexName) !== undefined) {
    const index = codesOf("I32", await needPart(store, indexName, ["I32"], [k]).read(undefined, signal));
    // An index that was never filled holds -1.
    if (!index.includes(UNSET)) columns = groupOrder(`${store.name}: ${indexName}`, index, size ?? k);
    if (columns !== undefined && activation !== null && activation.scales[0]?.block[1] !== "all")
      throw unsupported(`activation of ${layer}`, "in groups of reordered columns (actorder)", ["token", "tensor"]);
  }
  const scale = needPart(store, `${layer}.weight_scale`, ["F16", "BF16", "F32"], [n, groups]);
  const symmetric = weights.symmetric !== false;
  const zeros = symmetric
    ? undefined
    : needPart(store, `${layer}.weight_zero_point`, ["I32"], [Math.ceil((n * bits) / 32), groups]);
  const name = symmetric ? (bits === 8 ? "int8" : "int4") : `uint${bits}`;
  return {
    format: withScale(FORMATS[name as FormatName], {
      block: [1, size ?? "all"],
      codec: scaleCodec(scale.dtype) ?? CODECS.f32,
    }),
    shape: [n, k],
    activation,
    kind,
    cut: "rows",
    step: 1,
    // Reordered codes are unpacked, into 32 bits each.
    bytesPerLine: columns === undefined ? words * 4 : k * 4,
    ...(columns === undefined ? {} : { columns }),
    read: async (begin, end, part, memory = new Staging()) => {
      const codes = memory.words((end - begin) * words);
      codes.set(codesOf("I32", await packed.read([begin, end], part, memory)));
      // Rows are whole words; a pattern of b words would drift where they are not a multiple of b.
      if (symmetric)
        for (let row = 0; row < end - begin; row++) flipSigns(codes.subarray(row * words, (row + 1) * words), bits);
      if (columns !== undefined)
        return { elements: unpackAlongN(codes, end - begin, k, bits, memory.words((end - begin) * k)) };
      return { packed: new Uint8Array(codes.buffer, codes.byteOffset, codes.byteLength) };
    },
    blocks: async (part, memory = new Staging()) => {
      const scales = [codesOf(scale.dtype, await scale.read(undefined, part, memory))];
      if (zeros === undefined) return { scales };
      // Zero points are packed along N: their transpose [groups, N] has whole words.
      const words = codesOf("I32", await zeros.read(undefined, part, memory)) as Uint32Array;
      const flipped = transpose(words, zeros.shape[0] as number, groups, memory.like(words));
      const codes = unpackAlongN(flipped, groups, n, bits, memory.words(groups * n));
      return { scales, zero: transpose(codes, groups, n, memory.like(codes)) };
    },
  };
}

/** e2m1 codes, e4m3 scales of 16, and the reciprocal of NVFP4's scale of the tensor. */
function packedNvfp4(store: TensorStore, layer: string, { activation, kind }: Group): StoredMatrix {
  const packed = needPart(store, `${layer}.weight_packed`, ["U8"], [null, null]);
  const [n, half] = packed.shape as [number, number];
  const k = half * 2;
  const scale = needPart(store, `${layer}.weight_scale`, ["F8_E4M3"], [n, groupsOf(layer, k, 16)]);
  const global = partOf(store, `${layer}.weight_global_scale`);
  if (global?.dtype !== "F32" || global.shape.reduce((a, b) => a * b, 1) !== 1)
    throw unsupported(`weight_global_scale of ${layer}`, global?.dtype ?? "absent", ["one F32 number"]);
  return {
    format: FORMATS.nvfp4,
    shape: [n, k],
    activation,
    kind,
    cut: "rows",
    step: 1,
    bytesPerLine: half,
    read: async (begin, end, signal, memory) => ({ packed: await packed.read([begin, end], signal, memory) }),
    blocks: async (signal, memory) => {
      const [bits] = codesOf("F32", await global.read(undefined, signal));
      const reciprocal = f32Bits(1 / f32FromBits(bits as number));
      return { scales: [await scale.read(undefined, signal, memory), Uint32Array.of(reciprocal)] };
    },
  };
}

function packedMxfp4(store: TensorStore, layer: string, { activation, kind }: Group): StoredMatrix {
  const packed = needPart(store, `${layer}.weight_packed`, ["U8"], [null, null]);
  const [n, half] = packed.shape as [number, number];
  const k = half * 2;
  const scale = needPart(store, `${layer}.weight_scale`, ["U8", "F8_E8M0"], [n, groupsOf(layer, k, 32)]);
  return {
    format: FORMATS.mxfp4,
    shape: [n, k],
    activation,
    kind,
    cut: "rows",
    step: 1,
    bytesPerLine: half,
    read: async (begin, end, signal, memory) => ({ packed: await packed.read([begin, end], signal, memory) }),
    blocks: async (signal, memory) => ({ scales: [await scale.read(undefined, signal, memory)] }),
  };
}
