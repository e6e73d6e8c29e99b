import { type DType, type FloatType, toFloat32, viewAs } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { Format } from "../formats/format.js";
import { loadStored, type StoredMatrix } from "../formats/stored-matrix.js";
import { FORMATS } from "../formats/table.js";
import { sliceRows } from "../formats/tensor.js";
import type { TensorStore } from "../io/safetensors.js";
import { type HostTensor, isDense } from "../ir/tensor.js";
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
  /** The weight of a spec, read and quantized; `onRows` is called as rows are done. */
  load(
    spec: TensorSpec,
    options: { signal?: AbortSignal; onRows?: (rows: number, total: number) => void },
  ): Promise<HostTensor>;
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
  return {
    weightFormat: (spec) => of(spec).weight,
    activationFormat: (spec) => of(spec).activation,
    fastAccum: (spec) => of(spec).fastAccum === true,
    inputOrder: (spec) => (folded.spared.has(spec.name) ? null : (of(spec).stored?.columns ?? null)),
    load: (spec, options) => loadWeight(store, spec, of(spec), options),
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

async function loadWeight(
  store: TensorStore,
  { role, shape, source, offset }: TensorSpec,
  { tensor, weight, numerics, dtype, stored }: Planned,
  { signal, onRows }: Parameters<WeightPlan["load"]>[1],
): Promise<HostTensor> {
  throwIfAborted(signal, "loading weights");
  const abort = signal ? { signal } : {};
  const { first } = source;
  const end = first + (shape[0] as number);
  if (stored !== undefined) {
    const whole = await loadStored(stored, { ...abort, ...(onRows ? { onRows } : {}) });
    return end - first === whole.shape[0] ? whole : sliceRows(whole, first, end);
  }
  // Every tile is in the same memory: waiting for the garbage collector, they would be many.
  let tile: Float32Array | undefined;
  let into: Uint8Array | undefined;
  const rows = async (range?: readonly [number, number]) => {
    const bytes = await store.read(tensor, { ...(range ? { rows: range } : {}), ...(into ? { into } : {}), ...abort });
    if (range !== undefined) into ??= new Uint8Array(bytes.byteLength);
    const wide = toFloat32(dtype as DType, viewAs(dtype, bytes), tile);
    if (range !== undefined && dtype !== "f32") tile ??= wide;
    return wide;
  };
  if (shape.length === 1) {
    const data = (await rows()).slice(first, end);
    return { dtype: "f32", shape, data: offset === 0 ? data : data.map((value) => value + offset) };
  }
  if (role === "positions") return { dtype: "f32", shape, data: (await rows()).slice() };
  const matrix = shape as [number, number];
  const whole = source.transposed ? transpose(await rows(), source.shape[1] as number, [first, end]) : null;
  const read = async (begin: number, stop: number) =>
    whole?.subarray(begin * matrix[1], stop * matrix[1]) ?? rows([first + begin, first + stop]);
  return quantizeRows({ shape: matrix, dtype, read }, weight, {
    numerics,
    tileBytes: TILE,
    ...abort,
    onProgress: (done, total) => onRows?.(done, total),
  });
}

/** Bytes of the float32 rows that are quantized at once. */
const TILE = 4 * 2 ** 20;

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
  return {
    weightFormat: (spec) => {
      const tensor = replacement.get(spec.name);
      return tensor === undefined || isDense(tensor) ? plan.weightFormat(spec) : tensor.format;
    },
    activationFormat: (spec) => plan.activationFormat(spec),
    fastAccum: (spec) => plan.fastAccum(spec),
    inputOrder: (spec) => plan.inputOrder(spec),
    load: async (spec, options) => {
      const tensor = replacement.get(spec.name);
      if (tensor === undefined) return plan.load(spec, options);
      const expected = `[${spec.shape.join(", ")}]`;
      if (`[${tensor.shape.join(", ")}]` !== expected)
        throw new FewbitError("shape/mismatch", { what: spec.name, got: tensor.shape, expected });
      return tensor;
    },
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
