import { FewbitError } from "../core/errors.js";
import type { StoredMatrix, StoredPart } from "../formats/stored-matrix.js";
import type { TensorStore } from "./safetensors.js";

/** One way in which a checkpoint holds quantized parameters, as its config.json declares it. */
export interface Scheme {
  /** For people: "GPTQ int4 g128". */
  readonly name: string;
  /**
   * Every parameter that the store holds quantized, by the name of the weight that it stands for.
   * @throws FewbitError `io/malformed` (parts that do not fit), `model/unsupported` (what fewbit cannot compute)
   */
  describe(store: TensorStore, signal?: AbortSignal): Promise<Map<string, StoredMatrix>>;
}

/** An object of config.json. */
export type Json = Readonly<Record<string, unknown>>;

/** A tensor of a store as a part of a parameter; undefined when it is absent. */
export function partOf(store: TensorStore, name: string): StoredPart | undefined {
  const info = store.tensors.get(name);
  if (info === undefined) return undefined;
  return {
    dtype: info.dtype,
    shape: info.shape,
    read: (rows, signal, memory) =>
      store.read(name, { ...(rows && { rows }), ...(signal && { signal }), ...(memory && { memory }) }),
  };
}

/** A part that must be there with this dtype and shape (null: any extent). */
export function needPart(
  store: TensorStore,
  name: string,
  dtypes: readonly string[],
  shape: readonly (number | null)[],
): StoredPart {
  const part = partOf(store, name);
  if (part === undefined) throw new FewbitError("model/missing-tensor", { name, path: store.name });
  if (!dtypes.includes(part.dtype))
    throw new FewbitError("dtype/mismatch", { what: name, got: part.dtype, expected: dtypes.join(" or ") });
  if (part.shape.length !== shape.length || shape.some((extent, i) => extent !== null && extent !== part.shape[i])) {
    const expected = `[${shape.map((extent) => extent ?? "any").join(", ")}]`;
    throw new FewbitError("shape/mismatch", { what: name, got: part.shape, expected });
  }
  return part;
}

/** The tensors whose name ends in `suffix`, without it. */
export function withSuffix(store: TensorStore, suffix: string): string[] {
  return [...store.tensors.keys()].filter((name) => name.endsWith(suffix)).map((name) => name.slice(0, -suffix.length));
}

export function unsupported(what: string, value: unknown, supported: readonly string[]): FewbitError {
  return new FewbitError("model/unsupported", { what, value: String(value), supported });
}

export function malformedConfig(field: string, value: unknown, expected: string): FewbitError {
  return new FewbitError("model/config", { field: `quantization_config.${field}`, value, expected });
}

/** An integer of the config that is one of the legal ones. */
export function choose<T extends number>(config: Json, field: string, legal: readonly T[]): T {
  const value = config[field];
  if (!legal.includes(value as T)) throw unsupported(`quantization_config.${field}`, value, legal.map(String));
  return value as T;
}

/** `group_size`: a positive integer, or -1 (one group a row) as undefined. */
export function groupSizeOf(config: Json): number | undefined {
  const size = config.group_size ?? -1;
  if (size === -1) return undefined;
  if (!Number.isInteger(size) || Number(size) < 1)
    throw malformedConfig("group_size", size, "a positive integer or -1");
  return Number(size);
}

/** Groups of a row of k. Throws when the last one would be short: kernels read whole groups. */
export function groupsOf(name: string, k: number, size: number): number {
  if (k % size === 0 && k > 0) return k / size;
  throw unsupported(`group_size of ${name}`, size, [`a divisor of ${k}`]);
}

/**
 * The order of columns that makes groups of neighbours out of any: `index` has the group of every column (GPTQ's act-order).
 * Undefined when they are neighbours already.
 * @throws FewbitError `io/malformed` unless every group has `size` columns
 */
export function groupOrder(path: string, index: ArrayLike<number>, size: number): Uint32Array | undefined {
  const filled = new Uint32Array(index.length / size);
  const order = new Uint32Array(index.length);
  let ordered = true;
  for (let column = 0; column < index.length; column++) {
    const group = index[column] as number;
    const at = filled[group];
    if (at === undefined || at === size)
      throw new FewbitError("io/malformed", { path, reason: `its groups have not ${size} columns each` });
    order[group * size + at] = column;
    filled[group] = at + 1;
    ordered &&= group * size + at === column;
  }
  return ordered ? undefined : order;
}
