import { FewbitError } from "../core/errors.js";
import { roundUp } from "../core/shape.js";
import { Staging } from "../core/staging.js";
import { type Block, blockGrid, type Codec, type Format, type Rule, withRule, withScale } from "./format.js";
import { cropMatrix, fromBlocked, transpose, unpackTiles4d } from "./layouts.js";
import { type Codes, codesOf, type StoredMatrix, type StoredPart, scaleCodec } from "./stored-matrix.js";
import { CODECS, FORMATS, type FormatName, VARIANTS } from "./table.js";

/** The name under which a part of parameter `M.w` is stored: `M._w_part`. */
export function torchaoPartName(parameter: string, part: string): string {
  const dot = parameter.lastIndexOf(".");
  return `${parameter.slice(0, dot + 1)}_${parameter.slice(dot + 1)}_${part}`;
}

type Attributes = Readonly<Record<string, unknown>>;
type Shape = readonly [n: number, k: number];
type Blocks = NonNullable<StoredMatrix["blocks"]>;

/** A stored parameter at hand: its name (for messages), class, attributes and parts. */
class Stored {
  readonly name: string;
  readonly className: string;
  readonly attributes: Attributes;
  readonly parts: ReadonlyMap<string, StoredPart>;

  constructor(name: string, className: string, attributes: Attributes, parts: ReadonlyMap<string, StoredPart>) {
    this.name = name;
    this.className = className;
    this.attributes = attributes;
    this.parts = parts;
  }

  part(name: string): StoredPart {
    const part = this.parts.get(name);
    if (part === undefined) throw this.malformed(`its part ${torchaoPartName(this.name, name)} is missing`);
    return part;
  }

  async codes(name: string, signal?: AbortSignal, memory?: Staging): Promise<Codes> {
    const part = this.part(name);
    return codesOf(part.dtype, await part.read(undefined, signal, memory));
  }

  /** The codec of a scale part's dtype. */
  codec(name: string): Codec {
    const { dtype } = this.part(name);
    const codec = scaleCodec(dtype);
    if (codec === undefined) throw this.malformed(`its ${name} has dtype ${dtype}`);
    return codec;
  }

  attribute(name: string): unknown {
    const value = this.attributes[name];
    // Nested values are objects with the Python type and the value; enums and dtypes are names.
    return typeof value === "object" && value !== null && "_data" in value ? value._data : value;
  }

  /** A list of positive integers. */
  sizes(name: string, count: number): number[] {
    const value = this.attribute(name);
    const legal = Array.isArray(value) && value.length === count && value.every((n) => Number.isInteger(n) && n > 0);
    if (!legal) throw this.malformed(`its ${name} is ${JSON.stringify(value)}: only matrices are read`);
    return value as number[];
  }

  matrix(name: string): [number, number] {
    const { shape } = this.part(name);
    if (shape.length !== 2) throw this.malformed(`its ${name} has shape [${shape.join(", ")}]: only matrices are read`);
    return [shape[0] as number, shape[1] as number];
  }

  /** The scale block of a weight of `shape`. */
  block(shape: Shape): Block {
    const [rows, columns] = this.sizes("block_size", 2) as [number, number];
    return [rows === shape[0] && shape[0] > 1 ? "all" : rows, columns === shape[1] ? "all" : columns];
  }

  /** The matrix whose rows of element codes are those of `qdata`, as they are or to be packed. */
  rows(
    format: Format,
    shape: Shape,
    how: "packed" | "elements",
    activation: Format | null,
    blocks: Blocks,
  ): StoredMatrix {
    const qdata = this.part("qdata");
    if (qdata.shape[0] !== shape[0])
      throw this.malformed(`its qdata has ${qdata.shape[0]} rows, its shape ${shape[0]}`);
    return {
      format,
      shape,
      activation,
      kind: `torchao ${this.className}`,
      cut: "rows",
      step: 1,
      bytesPerLine: qdata.shape[1] ?? 1,
      read: async (begin, end, signal, memory) => {
        const bytes = await qdata.read([begin, end], signal, memory);
        return how === "packed" ? { packed: bytes } : { elements: codesOf(qdata.dtype, bytes) };
      },
      blocks,
    };
  }

  /** Scales and zero points that lie in row-major order of blocks. */
  plainBlocks(asymmetric = false): Blocks {
    return async (signal, memory) => ({
      scales: [await this.codes("scale", signal, memory)],
      ...(asymmetric ? { zero: await this.codes("zero_point", signal, memory) } : {}),
    });
  }

  /** Scales and zero points that lie as [groups, n]. */
  transposedBlocks(groups: number, n: number): Blocks {
    return async (signal, memory = new Staging()) => {
      const plane = async (part: string) => {
        const codes = (await this.codes(part, signal, memory)) as Uint8Array;
        return transpose(codes, groups, n, memory.like(codes));
      };
      return { scales: [await plane("scale")], zero: await plane("zero_point") };
    };
  }

  /** Whether any zero point differs from zero: symmetric weights are stored with zeros. */
  async asymmetric(signal?: AbortSignal): Promise<boolean> {
    const part = this.parts.get("zero_point");
    if (part === undefined) return false;
    const rows = part.shape[0] ?? 1;
    const step = Math.max(1, Math.floor(2 ** 20 / Math.max(1, part.shape[1] ?? 1)));
    for (let begin = 0; begin < rows; begin += step) {
      const bytes = await part.read([begin, Math.min(begin + step, rows)], signal);
      if (bytes.some((byte) => byte !== 0)) return true;
    }
    return false;
  }

  malformed(reason: string): FewbitError {
    return new FewbitError("io/malformed", { path: this.name, reason: `${this.className}: ${reason}` });
  }
}

type Reader = (stored: Stored, signal?: AbortSignal) => StoredMatrix | Promise<StoredMatrix>;

const MX_ROWS: Readonly<Record<string, Format>> = {
  float8_e4m3fn: FORMATS.mxfp8_e4m3,
  float8_e5m2: FORMATS.mxfp8_e5m2,
  fp6_e2m3: FORMATS.mxfp6_e2m3,
  fp6_e3m2: FORMATS.mxfp6_e3m2,
  float4_e2m1fn_x2: FORMATS.mxfp4,
};

const READERS: Readonly<Record<string, Reader>> = {
  Float8Tensor: (stored) => {
    const shape = stored.matrix("qdata");
    const row = stored.part("qdata").dtype === "F8_E5M2" ? FORMATS.float8_e5m2 : FORMATS.float8_e4m3;
    const format = withScale(row, { block: stored.block(shape), codec: stored.codec("scale") });
    const activation = activationOf(stored);
    const mm = stored.attribute("mm_config") as { use_fast_accum?: unknown } | null | undefined;
    const separable = [format, activation].every((operand) => operand?.scales[0]?.block[1] === "all");
    const fastAccum = separable && mm?.use_fast_accum === true;
    return { ...stored.rows(format, shape, "packed", activation, stored.plainBlocks()), fastAccum };
  },
  Int8Tensor: async (stored, signal) => {
    const shape = stored.matrix("qdata");
    const asymmetric = await stored.asymmetric(signal);
    const format = withScale(asymmetric ? FORMATS.int8_asymmetric : FORMATS.int8, {
      block: stored.block(shape),
      codec: stored.codec("scale"),
    });
    return stored.rows(format, shape, "packed", activationOf(stored), stored.plainBlocks(asymmetric));
  },
  IntxUnpackedToInt8Tensor: async (stored, signal) => {
    const shape = stored.matrix("qdata");
    const bits = Number(/^int([1-8])$/.exec(String(stored.attribute("target_dtype")))?.[1]);
    if (Number.isNaN(bits)) throw stored.malformed(`its target_dtype is ${String(stored.attribute("target_dtype"))}`);
    const asymmetric = bits === 1 || (await stored.asymmetric(signal));
    const name = `int${bits === 8 ? "x8" : bits}${asymmetric && bits > 1 ? "_asymmetric" : ""}` as FormatName;
    const format = withScale(FORMATS[name], { block: stored.block(shape), codec: stored.codec("scale") });
    const dynamic = stored.attribute("activation_quantization") === "int8_asym_per_token";
    const activation = dynamic ? VARIANTS.int8_intx : null;
    return stored.rows(format, shape, "elements", activation, stored.plainBlocks(asymmetric));
  },
  Int4Tensor: (stored) => {
    const [n, k] = stored.sizes("shape", 2) as [number, number];
    const codec = stored.codec("scale");
    const format = withScale(FORMATS.int4_plain, { block: stored.block([n, k]), codec, zero: codec });
    if (stored.matrix("qdata")[1] * 2 !== k) throw stored.malformed(`its qdata does not hold ${k} columns`);
    const [groups] = stored.matrix("scale");
    const float8 = String(stored.attribute("activation_dtype")).startsWith("float8");
    const activation = float8 ? VARIANTS.float8_mslk : null;
    return stored.rows(format, [n, k], "packed", activation, stored.transposedBlocks(groups, n));
  },
  Int4TilePackedTo4dTensor: (stored) => {
    const [n, k] = stored.sizes("shape", 2) as [number, number];
    const qdata = stored.part("qdata");
    const [paddedN, paddedK] = [(qdata.shape[0] ?? 0) * 8, (qdata.shape[1] ?? 0) * 128];
    if (qdata.shape.length !== 4 || paddedN < n || paddedK < k || qdata.shape[2] !== 32 || qdata.shape[3] !== 4)
      throw stored.malformed(`its qdata has shape [${qdata.shape.join(", ")}]: expected [N / 8, K / 128, 32, 4]`);
    const groupSize = stored.sizes("block_size", 2)[1] as number;
    const codec = stored.codec("scale_and_zero");
    const [groups, columns] = stored.part("scale_and_zero").shape;
    if (columns !== paddedN || groups !== Math.ceil(paddedK / groupSize))
      throw stored.malformed("its scale_and_zero does not fit its qdata");
    return {
      format: withScale(FORMATS.int4_tinygemm, { block: [1, groupSize], codec, zero: codec }),
      shape: [n, k],
      activation: null,
      kind: `torchao ${stored.className}`,
      cut: "rows",
      step: 8,
      bytesPerLine: paddedK / 2,
      read: async (begin, end, signal, memory = new Staging()) => {
        const bytes = await qdata.read([begin / 8, Math.ceil(end / 8)], signal, memory);
        const rows = roundUp(end - begin, 8);
        const codes = unpackTiles4d(codesOf("I32", bytes), rows, paddedK, memory.take(rows * paddedK));
        return { elements: cropMatrix(codes, [end - begin, k], paddedK) };
      },
      blocks: async (signal, memory = new Staging()) => {
        const pairs = (await stored.codes("scale_and_zero", signal, memory)) as Uint16Array;
        const plane = (offset: number) => {
          const values = memory.like(pairs, pairs.length / 2);
          for (let i = 0; i < values.length; i++) values[i] = pairs[2 * i + offset] as number;
          const flipped = transpose(values, groups, paddedN, memory.like(values));
          return cropMatrix(flipped, [n, Math.ceil(k / groupSize)], groups);
        };
        return { scales: [plane(0)], zero: plane(1) };
      },
    };
  },
  Int4PlainInt32Tensor: (stored) => {
    const [n, k] = stored.sizes("shape", 2) as [number, number];
    const [groups] = stored.matrix("scale");
    const { dtype } = stored.part("zero_point");
    // XPU packs codes as fewbit does; NPU interleaves them, and has zero points in the weight's dtype.
    if (dtype !== "I8")
      throw new FewbitError("model/unsupported", {
        what: `zero points of ${stored.name} (Int4PlainInt32Tensor)`,
        value: `${dtype}: packed by an NPU`,
        supported: ["I8: packed by an XPU"],
      });
    if (stored.matrix("qdata")[1] * 8 !== k) throw stored.malformed(`its qdata does not hold ${k} columns`);
    const block = stored.block([n, k]);
    const format = withScale(FORMATS.int4_int_zero, { block, codec: stored.codec("scale"), zero: CODECS.int8 });
    return stored.rows(format, [n, k], "packed", null, stored.transposedBlocks(groups, n));
  },
  MXTensor: (stored) => {
    const type = String(stored.attribute("elem_dtype"));
    const format = Object.hasOwn(MX_ROWS, type) ? MX_ROWS[type] : undefined;
    if (format === undefined) throw stored.malformed(`its elem_dtype is ${type}`);
    if (stored.attribute("block_size") !== 32) throw stored.malformed("its block_size is not 32");
    const [n, bytes] = stored.matrix("qdata");
    const shape = [n, type === "float4_e2m1fn_x2" ? bytes * 2 : bytes] as const;
    const activation = mxActivation(stored, format);
    // fp6 is stored one code a byte; the others lie as fewbit packs them.
    const how = type.startsWith("fp6") ? "elements" : "packed";
    return stored.rows(format, shape, how, activation, microBlocks(stored, format, shape));
  },
  NVFP4Tensor: (stored) => {
    const [n, bytes] = stored.matrix("qdata");
    const shape = [n, bytes * 2] as const;
    const format = stored.parts.has("per_tensor_scale") ? FORMATS.nvfp4 : FORMATS.nvfp4_single;
    const activation = nvfp4Activation(stored);
    return stored.rows(format, shape, "packed", activation, microBlocks(stored, format, shape));
  },
};

/** Block scales in row-major order, whatever way they are stored (14), and the scale of the tensor where there is one. */
function microBlocks(stored: Stored, format: Format, shape: Shape): Blocks {
  const [rows, columns] = blockGrid((format.scales[0] as Format["scales"][number]).block, shape);
  const swizzled = stored.attribute("is_swizzled_scales") === true;
  const expected = swizzled ? roundUp(rows, 128) * roundUp(columns, 4) : rows * columns;
  const count = stored.part("scale").shape.reduce((a, b) => a * b, 1);
  if (count !== expected) throw stored.malformed(`it has ${count} scales, its shape needs ${expected}`);
  return async (signal, memory) => {
    const codes = await stored.codes("scale", signal, memory);
    const blocks = swizzled ? fromBlocked(codes, rows, columns, memory?.take(rows * columns)) : codes;
    return { scales: format.scales.length > 1 ? [blocks, await stored.codes("per_tensor_scale", signal)] : [blocks] };
  };
}

/** How the activation is quantized; undefined for weight-only tensors. */
function activationArguments(stored: Stored): Attributes | undefined {
  return (stored.attribute("act_quant_kwargs") as Attributes | null | undefined) ?? undefined;
}

function refuseActivation(stored: Stored, what: string, value: unknown, supported: readonly string[]): FewbitError {
  return new FewbitError("model/unsupported", {
    what: `${what} of the activation of ${stored.name}`,
    value: String(value),
    supported,
  });
}

function mxActivation(stored: Stored, format: Format): Format | null {
  const kwargs = activationArguments(stored);
  if (kwargs === undefined) return null;
  const mode = String((kwargs.scaling_mode as { _data?: unknown } | undefined)?._data ?? "RCEIL").toLowerCase();
  if (mode === "rceil") return format;
  const modes = ["floor", "ceil", "even"] as const;
  const known = modes.find((candidate) => candidate === mode);
  if (known === undefined) throw refuseActivation(stored, "scaling_mode", mode, [...modes, "rceil"]);
  return withRule(format, known, { rule: { kind: "mx", mode: known } satisfies Rule });
}

function nvfp4Activation(stored: Stored): Format | null {
  const kwargs = activationArguments(stored);
  if (kwargs === undefined) return null;
  const row = kwargs.use_dynamic_per_tensor_scale === true ? FORMATS.nvfp4 : FORMATS.nvfp4_single;
  // The two kernels that torchao quantizes activations with round differently (13.1 and 13.2).
  if (kwargs.use_triton_kernel !== true) return row;
  return withRule(row, "mslk", { rule: { kind: "nvfp4", variant: "multiply" } satisfies Rule });
}

/** The activation format of float8 and int8 tensors. */
function activationOf(stored: Stored): Format | null {
  const kwargs = activationArguments(stored);
  if (kwargs === undefined) return null;
  const granularity = (kwargs.granularity as { _type?: string } | undefined)?._type;
  if (granularity !== "PerTensor" && granularity !== "PerRow")
    throw refuseActivation(stored, "granularity", granularity, ["PerTensor", "PerRow"]);
  for (const bound of ["hp_value_lb", "hp_value_ub", "reduce_range"]) {
    const value = kwargs[bound] ?? false;
    if (value !== false) throw refuseActivation(stored, bound, value, ["none"]);
  }
  const block: Block = granularity === "PerTensor" ? ["all", "all"] : [1, "all"];
  if (stored.className === "Float8Tensor") {
    const dtype = (kwargs.float8_dtype as { _data?: string } | undefined)?._data;
    return withScale(dtype === "float8_e5m2" ? FORMATS.float8_e5m2 : FORMATS.float8_e4m3, { block });
  }
  const mapping = (kwargs.mapping_type as { _data?: string } | undefined)?._data;
  return withScale(mapping === "ASYMMETRIC" ? FORMATS.int8_asymmetric : FORMATS.int8, { block });
}

/** Parts that change what a linear computes in ways that a stored matrix cannot say. */
const FOREIGN_PARTS = ["act_pre_scale", "act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale"] as const;

/**
 * What the parts of one checkpoint parameter mean (specification 25). `className` and `attributes` are the metadata's
 * `_type` and `_data`. Only zero points are read, to tell symmetric from asymmetric weights. Throws `model/unsupported` for
 * another class and for activations that are scaled or statically quantized, `io/malformed` for missing or impossible parts.
 */
export async function describeTorchao(
  parameter: string,
  className: string,
  attributes: Attributes,
  parts: ReadonlyMap<string, StoredPart>,
  signal?: AbortSignal,
): Promise<StoredMatrix> {
  const reader = Object.hasOwn(READERS, className) ? READERS[className] : undefined;
  if (reader === undefined) {
    throw new FewbitError("model/unsupported", {
      what: "torchao tensor class",
      value: className,
      supported: Object.keys(READERS),
    });
  }
  const foreign = FOREIGN_PARTS.find((part) => parts.has(part));
  if (foreign !== undefined) {
    throw new FewbitError("model/unsupported", {
      what: `part of ${parameter}`,
      value: foreign,
      supported: ["weights alone", "dynamically quantized activations"],
    });
  }
  return reader(new Stored(parameter, className, attributes, parts), signal);
}
