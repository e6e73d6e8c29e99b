import { FewbitError } from "../core/errors.js";
import { Staging } from "../core/staging.js";
import { type Format, withScale } from "../formats/format.js";
import { transpose } from "../formats/layouts.js";
import { unpackRow } from "../formats/pack.js";
import { codesOf, type StoredMatrix, scaleCodec } from "../formats/stored-matrix.js";
import { CODECS, FORMATS, type FormatName } from "../formats/table.js";
import type { TensorStore } from "./safetensors.js";
import {
  choose,
  groupOrder,
  groupSizeOf,
  groupsOf,
  type Json,
  needPart,
  partOf,
  type Scheme,
  unsupported,
  withSuffix,
} from "./scheme.js";

/*
 * Integer weights packed into 32-bit words: GPTQ (AutoGPTQ, GPTQModel) and AWQ (AutoAWQ's "gemm"). Both store the transpose
 * [K, N] of a linear's weight, so that a file is cut along K and a slab holds some columns of every row.
 */

/** Columns of one step: 32 codes of b bits are b words. */
const STEP = 32;
const SCALE_TYPES = ["F16", "BF16", "F32"] as const;

/** Signed codes where zero is the middle code, unsigned ones with a zero point otherwise. */
function integerFormat(bits: number, symmetric: boolean, block: number | "all", scale: string): Format {
  const name = symmetric ? (bits === 8 ? "int8" : `int${bits}`) : `uint${bits}`;
  const codec = scaleCodec(scale) ?? CODECS.f16;
  return withScale(FORMATS[name as FormatName], { block: [1, block], codec });
}

/** quantization_config of `quant_method: "gptq"`. Values are `(code - zero) * scale`. */
export function gptqScheme(config: Json): Scheme {
  const bits = choose(config, "bits", [2, 3, 4, 8] as const);
  const group = groupSizeOf(config);
  const version = config.checkpoint_format ?? "gptq";
  if (version !== "gptq" && version !== "gptq_v2")
    throw unsupported("GPTQ checkpoint_format", version, ["gptq", "gptq_v2"]);
  const symmetric = config.sym === true;
  // The first version of the layout stores every zero point less one.
  const offset = version === "gptq" ? 1 : 0;
  const middle = 2 ** (bits - 1);
  const name = `GPTQ int${bits}${group === undefined ? "" : ` g${group}`}`;

  async function describe(store: TensorStore, layer: string, signal?: AbortSignal): Promise<StoredMatrix> {
    const qweight = needPart(store, `${layer}.qweight`, ["I32"], [null, null]);
    const [wordRows, n] = qweight.shape as [number, number];
    const k = (wordRows * 32) / bits;
    if (k % STEP !== 0) throw unsupported(`K of ${layer}`, k, ["a multiple of 32"]);
    const size = group ?? k;
    const groups = groupsOf(layer, k, size);
    const scales = needPart(store, `${layer}.scales`, SCALE_TYPES, [groups, n]);
    const qzeros = needPart(store, `${layer}.qzeros`, ["I32"], [groups, Math.ceil((n * bits) / 32)]);
    const path = `${store.name}: ${layer}`;
    const malformed = (reason: string) => new FewbitError("io/malformed", { path, reason });
    let columns: Uint32Array | undefined;
    if (partOf(store, `${layer}.g_idx`) !== undefined) {
      const index = needPart(store, `${layer}.g_idx`, ["I32"], [k]);
      columns = groupOrder(`${path}.g_idx`, codesOf("I32", await index.read(undefined, signal)), size);
    }
    return {
      format: integerFormat(bits, symmetric, group ?? "all", scales.dtype),
      shape: [n, k],
      activation: null,
      kind: name,
      cut: "columns",
      step: STEP,
      // Reordered codes are unpacked, into 32 bits each.
      bytesPerLine: columns === undefined ? (n * bits) / 8 : n * 4,
      ...(columns === undefined ? {} : { columns }),
      read: async (begin, end, part, memory = new Staging()) => {
        const [first, last] = [(begin * bits) / 32, (end * bits) / 32];
        const rows = codesOf("I32", await qweight.read([first, last], part, memory)) as Uint32Array;
        const words = transpose(rows, last - first, n, memory.words((last - first) * n));
        if (symmetric) flipSigns(words, bits);
        if (columns !== undefined)
          return { elements: unpackAlongN(words, n, end - begin, bits, memory.words(n * (end - begin))) };
        return { packed: new Uint8Array(words.buffer, words.byteOffset, words.byteLength) };
      },
      blocks: async (part, memory = new Staging()) => {
        const packed = codesOf("I32", await qzeros.read(undefined, part, memory)) as Uint32Array;
        const zero = unpackAlongN(packed, groups, n, bits, memory.words(groups * n));
        for (let i = 0; i < zero.length; i++) zero[i] = (zero[i] as number) + offset;
        if (symmetric && zero.some((value) => value !== middle))
          throw malformed(`it is declared symmetric and has zero points other than ${middle}`);
        if (zero.some((value) => value > 255)) throw malformed("it has a zero point above 255");
        const codes = codesOf(scales.dtype, await scales.read(undefined, part, memory)) as Uint16Array;
        const flipped = transpose(codes, groups, n, memory.like(codes));
        return { scales: [flipped], ...(symmetric ? {} : { zero: transpose(zero, groups, n, memory.like(zero)) }) };
      },
    };
  }
  return { name, describe: (store, signal) => describeAll(store, ".qweight", describe, signal) };
}

/** quantization_config of `quant_method: "awq"`, AutoAWQ's layout "gemm". Values are `(code - zero) * scale`. */
export function awqScheme(config: Json): Scheme {
  choose(config, "bits", [4] as const);
  const version = String(config.version ?? "gemm").toLowerCase();
  if (version !== "gemm") throw unsupported("AWQ version", version, ["gemm"]);
  if (config.zero_point === false) throw unsupported("AWQ zero_point", "false", ["true"]);
  const group = groupSizeOf(config);
  const name = `AWQ int4${group === undefined ? "" : ` g${group}`}`;

  async function describe(store: TensorStore, layer: string): Promise<StoredMatrix> {
    const qweight = needPart(store, `${layer}.qweight`, ["I32"], [null, null]);
    const [k, words] = qweight.shape as [number, number];
    const n = words * 8;
    if (k % STEP !== 0) throw unsupported(`K of ${layer}`, k, ["a multiple of 32"]);
    const groups = groupsOf(layer, k, group ?? k);
    const scales = needPart(store, `${layer}.scales`, SCALE_TYPES, [groups, n]);
    const qzeros = needPart(store, `${layer}.qzeros`, ["I32"], [groups, words]);
    return {
      format: integerFormat(4, false, group ?? "all", scales.dtype),
      shape: [n, k],
      activation: null,
      kind: name,
      cut: "columns",
      step: STEP,
      bytesPerLine: n / 2,
      read: async (begin, end, part, memory = new Staging()) => {
        const packed = codesOf("I32", await qweight.read([begin, end], part, memory)) as Uint32Array;
        const count = (end - begin) * n;
        return { elements: transpose(awqCodes(packed, memory.take(count)), end - begin, n, memory.take(count)) };
      },
      blocks: async (part, memory = new Staging()) => {
        const packed = codesOf("I32", await qzeros.read(undefined, part, memory)) as Uint32Array;
        const zero = awqCodes(packed, memory.take(groups * n));
        const codes = codesOf(scales.dtype, await scales.read(undefined, part, memory)) as Uint16Array;
        const flipped = transpose(codes, groups, n, memory.like(codes));
        return { scales: [flipped], zero: transpose(zero, groups, n, memory.like(zero)) };
      },
    };
  }
  return { name, describe: (store, signal) => describeAll(store, ".qweight", describe, signal) };
}

async function describeAll(
  store: TensorStore,
  suffix: string,
  describe: (store: TensorStore, layer: string, signal?: AbortSignal) => Promise<StoredMatrix>,
  signal: AbortSignal | undefined,
): Promise<Map<string, StoredMatrix>> {
  const found = new Map<string, StoredMatrix>();
  for (const layer of withSuffix(store, suffix)) found.set(`${layer}.weight`, await describe(store, layer, signal));
  return found;
}

/** Nibble p of a word of AWQ holds the column ORDER[p] of its eight. */
const ORDER = [0, 2, 4, 6, 1, 3, 5, 7];

function awqCodes(words: Uint32Array, codes = new Uint8Array(words.length * 8)): Uint8Array {
  for (let i = 0; i < words.length; i++) {
    const word = words[i] as number;
    for (let p = 0; p < 8; p++) codes[i * 8 + (ORDER[p] as number)] = (word >>> (4 * p)) & 15;
  }
  return codes;
}

/** Codes [rows, n] of `bits` bits that lie side by side along n, each row starting on a word; in `codes` where that is given. */
export function unpackAlongN(
  words: Uint32Array,
  rows: number,
  n: number,
  bits: number,
  codes = new Uint32Array(rows * n),
): Uint32Array {
  const stride = words.length / Math.max(1, rows);
  for (let row = 0; row < rows; row++) unpackRow(words, row * stride, codes.subarray(row * n, (row + 1) * n), n, bits);
  return codes;
}

/** Turns offset codes into two's complement ones: the top bit of each changes. Every b words hold 32 whole codes. */
export function flipSigns(words: Uint32Array, bits: number): void {
  const masks = new Uint32Array(bits);
  for (let code = 0; code < 32; code++) {
    const bit = code * bits + bits - 1;
    masks[bit >>> 5] = (masks[bit >>> 5] as number) | (1 << (bit & 31));
  }
  for (let i = 0; i < words.length; i++) words[i] = (words[i] as number) ^ (masks[i % bits] as number);
}
