import { type DType, type FloatType, toFloat32, viewAs } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { Format } from "../formats/format.js";
import { FORMATS } from "../formats/table.js";
import type { TensorStore } from "../io/safetensors.js";
import type { HostTensor } from "../ir/tensor.js";
import { type ConfigSelection, configFor } from "../quantize/configs.js";
import { quantizeRows } from "../quantize/quantize.js";
import type { TensorRole, TensorSpec } from "./config.js";

const DTYPES: Readonly<Record<string, FloatType>> = { F32: "f32", F16: "f16", BF16: "bf16" };
const LINEAR_ROLES: ReadonlySet<TensorRole> = new Set(["q", "k", "v", "o", "gate", "up", "down"]);

/** Which formats a model's weights and activations take under a quantization, layer by layer. */
export interface WeightPlan {
  weightFormat(spec: TensorSpec): Format;
  activationFormat(spec: TensorSpec): Format | null;
  /** The weight of a spec, read and quantized; `onRows` is called as rows are done. */
  load(
    spec: TensorSpec,
    options: { signal?: AbortSignal; onRows?: (rows: number, total: number) => void },
  ): Promise<HostTensor>;
}

/**
 * Checks that the store holds every tensor of `specs` with its shape and a float dtype, and decides every format. Nothing is
 * read yet. Throws `model/missing-tensor`, `shape/mismatch`, `dtype/mismatch`, and `quantize/layer` for a layer that its config
 * cannot take.
 */
export function planWeights(store: TensorStore, specs: readonly TensorSpec[], selection: ConfigSelection): WeightPlan {
  const formats = new Map<
    string,
    { weight: Format; activation: Format | null; numerics: "guarded" | "torchao"; dtype: FloatType }
  >();
  for (const spec of specs) {
    const info = store.tensors.get(spec.name);
    if (info === undefined) throw new FewbitError("model/missing-tensor", { name: spec.name, path: store.name });
    if (info.shape.length !== spec.shape.length || info.shape.some((extent, i) => extent !== spec.shape[i])) {
      throw new FewbitError("shape/mismatch", {
        what: spec.name,
        got: info.shape,
        expected: `[${spec.shape.join(", ")}]`,
      });
    }
    const dtype = DTYPES[info.dtype];
    if (dtype === undefined)
      throw new FewbitError("dtype/mismatch", { what: spec.name, got: info.dtype, expected: "F32, F16 or BF16" });
    const layer = spec.name.replace(/\.weight$/, "");
    const config = LINEAR_ROLES.has(spec.role) ? configFor(layer, selection) : null;
    const plain = FORMATS[dtype];
    if (config === null) {
      formats.set(spec.name, { weight: plain, activation: null, numerics: "guarded", dtype });
      continue;
    }
    const weight = config.weight({ shape: spec.shape as [number, number], dtype });
    if ("refused" in weight)
      throw new FewbitError("quantize/layer", { layer, config: config.name, reason: weight.refused });
    formats.set(spec.name, { weight, activation: config.activation, numerics: config.numerics, dtype });
  }
  const of = (spec: TensorSpec) => formats.get(spec.name) as NonNullable<ReturnType<typeof formats.get>>;
  return {
    weightFormat: (spec) => of(spec).weight,
    activationFormat: (spec) => of(spec).activation,
    load: async (spec, { signal, onRows }) => {
      throwIfAborted(signal, "loading weights");
      const { weight, numerics, dtype } = of(spec);
      const rows = async (range?: readonly [number, number]) => {
        const bytes = await store.read(spec.name, { ...(range ? { rows: range } : {}), ...(signal ? { signal } : {}) });
        return toFloat32(dtype as DType, viewAs(dtype, bytes));
      };
      if (spec.shape.length === 1) return { dtype: "f32", shape: spec.shape, data: (await rows()).slice() };
      const source = {
        shape: spec.shape as [number, number],
        dtype,
        read: (begin: number, end: number) => rows([begin, end]),
      };
      return quantizeRows(source, weight, {
        numerics,
        ...(signal ? { signal } : {}),
        onProgress: (done, total) => onRows?.(done, total),
      });
    },
  };
}
