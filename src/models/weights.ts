import { BYTES, type FloatType, toFloat32, viewAs } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import { sizeOf } from "../core/shape.js";
import { Staging } from "../core/staging.js";
import type { Format } from "../formats/format.js";
import { type StoredMatrix, storedRows } from "../formats/stored-matrix.js";
import { FORMATS } from "../formats/table.js";
import type { TensorStore } from "../io/safetensors.js";
import { partOf } from "../io/scheme.js";
import { asRows, type HostTensor, isDense, joinRows, type TensorRows } from "../ir/tensor.js";
import { type ConfigSelection, configFor } from "../quantize/configs.js";
import { quantizeRows } from "../quantize/quantize.js";
import { foldOrders } from "./column-order.js";
import type { TensorRole, TensorSpec } from "./config.js";

const DTYPES: Readonly<Record<string, FloatType>> = { F32: "f32", F16: "f16", BF16: "bf16" };
/** Routers stay as they are: they are small, and which experts a token takes hangs on them. */
const LINEAR_ROLES: ReadonlySet<TensorRole> = new Set([
  ...(["q", "k", "v", "o", "gate", "up", "down"] as const),
  ...(["expertGate", "expertUp", "expertDown", "sharedGate", "sharedUp", "sharedDown"] as const),
]);

/** Whether a tensor is a linear's weight that a config may quantize. */
export const isLinearRole = (role: TensorRole): boolean => LINEAR_ROLES.has(role);

/** Which formats a model's weights and activations take under a quantization, layer by layer. */
export interface WeightPlan {
  weightFormat(spec: TensorSpec): Format;
  activationFormat(spec: TensorSpec): Format | null;
  /** Whether the weight's linear declares `fastAccum`. */
  fastAccum(spec: TensorSpec): boolean;
  /** Element i of a row that the weight takes is element order[i] of its linear's input; null where they are the same. */
  inputOrder(spec: TensorSpec): Uint32Array | null;
  /**
   * The weight of a spec, read and quantized a tile at a time. One is read at a time where `memory`, which its tiles lie in, is
   * given to several.
   */
  rows(spec: TensorSpec, options: ReadOptions): TensorRows;
  /** The weight of a spec, whole. */
  load(spec: TensorSpec, options: ReadOptions): Promise<HostTensor>;
}

/** A weight's format, and where its numbers come from. */
interface Planned {
  /** The tensor's name in the store. */
  readonly tensor: string;
  readonly weight: Format;
  readonly activation: Format | null;
  readonly fastAccum?: boolean;
  readonly numerics: "guarded" | "torchao";
  readonly dtype: FloatType;
  readonly stored?: StoredMatrix;
}

/**
 * Checks that the store holds every tensor of `specs` with its shape and a float dtype, and decides every format. What the store
 * holds quantized stays as it is stored, whatever `selection` says; nothing is quantized twice. Nothing is read yet. Throws
 * `model/missing-tensor`, `shape/mismatch`, `dtype/mismatch`, and `quantize/layer` for a layer that its config cannot take.
 */
export function planWeights(store: TensorStore, specs: readonly TensorSpec[], selection: ConfigSelection): WeightPlan {
  const plans = new Map(specs.map((spec) => [spec.name, planWeight(store, spec, selection)]));
  const of = (spec: TensorSpec) => plans.get(spec.name) as Planned;
  const folded = foldOrders(specs, (spec) => of(spec).stored);
  for (const [name, rows] of folded.rows) {
    const plan = plans.get(name) as Planned;
    plans.set(name, { ...plan, stored: { ...(plan.stored as StoredMatrix), rows } });
  }
  const rows: WeightPlan["rows"] = (spec, options) => weightRows(store, spec, of(spec), options);
  return {
    weightFormat: (spec) => of(spec).weight,
    activationFormat: (spec) => of(spec).activation,
    fastAccum: (spec) => of(spec).fastAccum === true,
    inputOrder: (spec) => (folded.spared.has(spec.name) ? null : (of(spec).stored?.columns ?? null)),
    rows,
    load: async (spec, options) => joinRows(rows(spec, options)),
  };
}

function planWeight(store: TensorStore, spec: TensorSpec, selection: ConfigSelection): Planned {
  const { source } = spec;
  const names = [source.name, ...source.alternatives];
  const tensor = names.find((name) => store.stored?.has(name) || store.tensors.has(name));
  if (tensor === undefined) throw new FewbitError("model/missing-tensor", { name: source.name, path: store.name });
  const stored = store.stored?.get(tensor);
  if (stored !== undefined) {
    checkStored(stored, spec);
    const { format, activation, fastAccum = false } = stored;
    return { tensor, weight: format, activation, fastAccum, numerics: "guarded", dtype: "f32", stored };
  }
  const info = store.tensors.get(tensor) as NonNullable<ReturnType<TensorStore["tensors"]["get"]>>;
  if (info.shape.length !== source.shape.length || info.shape.some((extent, i) => extent !== source.shape[i])) {
    const expected = `[${source.shape.join(", ")}]`;
    throw new FewbitError("shape/mismatch", { what: tensor, got: info.shape, expected });
  }
  const dtype = DTYPES[info.dtype];
  if (dtype === undefined)
    throw new FewbitError("dtype/mismatch", { what: tensor, got: info.dtype, expected: "F32, F16 or BF16" });
  const layer = source.name.replace(/\.weight$/, "");
  const config = LINEAR_ROLES.has(spec.role) ? configFor(layer, selection) : null;
  if (config === null) return { tensor, weight: FORMATS[dtype], activation: null, numerics: "guarded", dtype };
  const weight = config.weight({ shape: spec.shape as [number, number], dtype });
  if ("refused" in weight)
    throw new FewbitError("quantize/layer", { layer, config: config.name, reason: weight.refused });
  const { activation, fastAccum = false, numerics } = config;
  return { tensor, weight, activation, fastAccum, numerics, dtype };
}

/** Bytes of the file (of what is quantized: of its float32 rows) that are in memory at once. */
const TILE = 4 * 2 ** 20;

function weightRows(
  store: TensorStore,
  { role, shape, source, offset }: TensorSpec,
  { tensor, weight, numerics, dtype, stored }: Planned,
  { signal, memory = new Staging() }: ReadOptions,
): TensorRows {
  throwIfAborted(signal, "loading weights");
  const options = { memory, tileBytes: TILE, ...(signal && { signal }) };
  const { first } = source;
  const count = shape[0] as number;
  const range = [first, first + count] as const;
  if (shape.length === 1 || role === "positions")
    return { storage: "f32", shape, tiles: () => denseRows(store, tensor, dtype, { shape, range, offset }, options) };
  const matrix = stored ?? keptMatrix(store, { tensor, dtype, shape: source.shape }, weight, source.transposed);
  if (matrix !== null) return { storage: matrix.format, shape, tiles: () => storedRows(matrix, range, options) };
  const tiles = async function* () {
    const reader = source.transposed
      ? await transposedReader(store, tensor, dtype, source.shape[1] as number, range, options)
      : floatReader(store, tensor, dtype, options);
    const read = (begin: number, end: number) => reader(first + begin, first + end);
    yield* quantizeRows({ shape: shape as [number, number], dtype, read }, weight, { numerics, ...options });
  };
  return { storage: weight, shape, tiles };
}

interface ReadOptions {
  readonly signal?: AbortSignal;
  readonly memory?: Staging;
}

/** A float matrix that stays in its dtype as a stored one: its rows are codes already. */
function keptMatrix(
  store: TensorStore,
  { tensor, dtype, shape }: { tensor: string; dtype: FloatType; shape: readonly number[] },
  weight: Format,
  transposed: boolean,
): StoredMatrix | null {
  const part = partOf(store, tensor);
  if (transposed || part === undefined || weight !== FORMATS[dtype]) return null;
  const [n, k] = shape as [number, number];
  return {
    format: weight,
    shape: [n, k],
    activation: null,
    kind: dtype,
    cut: "rows",
    step: 1,
    bytesPerLine: k * BYTES[dtype],
    read: async (begin, end, signal, memory) => ({ packed: await part.read([begin, end], signal, memory) }),
  };
}

type FloatRows = (begin: number, end: number) => Promise<Float32Array>;

/** Reads rows of a float tensor, each time into the memory of the rows before, which is the last that is taken. */
function floatReader(
  store: TensorStore,
  tensor: string,
  dtype: FloatType,
  { signal, memory }: { signal?: AbortSignal; memory: Staging },
): FloatRows {
  let mark: number | undefined;
  return async (begin, end) => {
    mark ??= memory.mark;
    memory.release(mark);
    const bytes = await store.read(tensor, { rows: [begin, end], memory, ...(signal && { signal }) });
    const values = viewAs(dtype, bytes);
    if (dtype === "f32") return values as Float32Array;
    return toFloat32(dtype, values, new Float32Array(memory.take(values.length * 4).buffer, 0, values.length));
  };
}

/** Rows of a matrix that the file holds as [k, n]: it is read whole. */
async function transposedReader(
  store: TensorStore,
  tensor: string,
  dtype: FloatType,
  n: number,
  range: readonly [number, number],
  { signal }: ReadOptions,
): Promise<FloatRows> {
  const bytes = await store.read(tensor, signal ? { signal } : {});
  const values = toFloat32(dtype, viewAs(dtype, bytes));
  const k = values.length / n;
  const rows = transpose(values, n, range);
  return async (begin, end) => rows.subarray((begin - range[0]) * k, (end - range[0]) * k);
}

/** Rows of a vector or matrix of floats as float32, `offset` added. */
async function* denseRows(
  store: TensorStore,
  tensor: string,
  dtype: FloatType,
  { shape, range, offset }: { shape: readonly number[]; range: readonly [number, number]; offset: number },
  options: { signal?: AbortSignal; memory: Staging; tileBytes: number },
): AsyncGenerator<HostTensor, void> {
  const { signal, memory, tileBytes } = options;
  const [begin, end] = range;
  const width = sizeOf(shape.slice(1));
  const height = Math.max(1, Math.floor(tileBytes / (4 * Math.max(1, width))));
  const mark = memory.mark;
  try {
    const read = floatReader(store, tensor, dtype, options);
    for (let row = begin; row < end; row += height) {
      throwIfAborted(signal, "loading weights");
      const last = Math.min(row + height, end);
      const values = await read(row, last);
      const data = offset === 0 ? values : values.map((value) => value + offset);
      yield { dtype: "f32", shape: [last - row, ...shape.slice(1)], data };
    }
  } finally {
    memory.release(mark);
  }
}

/** Columns [begin, end) of a matrix [k, n] as rows [end - begin, k]. */
function transpose(values: Float32Array, n: number, [begin, end]: readonly [number, number]): Float32Array {
  const k = values.length / n;
  const out = new Float32Array((end - begin) * k);
  for (let i = 0; i < k; i++)
    for (let column = begin; column < end; column++) out[(column - begin) * k + i] = values[i * n + column] as number;
  return out;
}

/** Tensors that take the place of a checkpoint's, by parameter name: what calibration makes. */
export type Replacement = ReadonlyMap<string, HostTensor>;

/** A plan in which some tensors are given: they are neither read nor quantized. Throws `shape/mismatch`. */
export function replaceWeights(plan: WeightPlan, replacement: Replacement): WeightPlan {
  const given = (spec: TensorSpec): HostTensor | undefined => {
    const tensor = replacement.get(spec.name);
    const expected = `[${spec.shape.join(", ")}]`;
    if (tensor !== undefined && `[${tensor.shape.join(", ")}]` !== expected)
      throw new FewbitError("shape/mismatch", { what: spec.name, got: tensor.shape, expected });
    return tensor;
  };
  return {
    weightFormat: (spec) => {
      const tensor = replacement.get(spec.name);
      return tensor === undefined || isDense(tensor) ? plan.weightFormat(spec) : tensor.format;
    },
    activationFormat: (spec) => plan.activationFormat(spec),
    fastAccum: (spec) => plan.fastAccum(spec),
    inputOrder: (spec) => plan.inputOrder(spec),
    rows: (spec, options) => asRows(given(spec) ?? plan.rows(spec, options)),
    load: async (spec, options) => given(spec) ?? plan.load(spec, options),
  };
}

function checkStored(
  { shape, activation, kind, columns }: StoredMatrix,
  { role, source, shape: own }: TensorSpec,
): void {
  const what = `${source.name} (${kind})`;
  if (own.length !== 2 || source.transposed || shape.some((extent, i) => extent !== source.shape[i])) {
    const expected = source.transposed ? "a float tensor: it is transposed" : `[${source.shape.join(", ")}]`;
    throw new FewbitError("shape/mismatch", { what, got: shape, expected });
  }
  if (activation !== null && !LINEAR_ROLES.has(role)) {
    const reason = "activations are quantized on the fly only before the linears of the layers";
    throw new FewbitError("quantize/layer", { layer: source.name.replace(/\.weight$/, ""), config: kind, reason });
  }
  // Each expert would want the input that all of them read in an order of its own.
  if (columns !== undefined && (!LINEAR_ROLES.has(role) || role.startsWith("expert")))
    throw new FewbitError("model/unsupported", {
      what: `columns of ${source.name}`,
      value: "in order of activation (desc_act)",
      supported: ["in order of the input", "another order in the linears of attention and of dense MLPs"],
    });
}
