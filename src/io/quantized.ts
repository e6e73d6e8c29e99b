import { fromFloat32, viewAs } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { Staging } from "../core/staging.js";
import { decodeTable } from "../formats/codec.js";
import type { StoredMatrix, StoredPart } from "../formats/stored-matrix.js";
import { describeTorchao, torchaoPartName } from "../formats/torchao.js";
import { type Checkpoint, openCheckpoint } from "./checkpoint.js";
import { describeFewbit, isFewbit } from "./fewbit-metadata.js";
import type { TensorInfo, TensorStore } from "./safetensors.js";
import { type Json, malformedConfig, partOf, type Scheme, unsupported } from "./scheme.js";
import { bitsandbytesScheme } from "./scheme-bitsandbytes.js";
import { compressedScheme } from "./scheme-compressed.js";
import { fp8Scheme, PLAIN_FLOAT8 } from "./scheme-float8.js";
import { awqScheme, gptqScheme } from "./scheme-packed.js";
import type { SourceDirectory } from "./source.js";

/** What a quantized checkpoint's config.json may name as its `quant_method`. */
const METHODS: Readonly<Record<string, (config: Json) => Scheme | null>> = {
  awq: awqScheme,
  bitsandbytes: bitsandbytesScheme,
  "compressed-tensors": compressedScheme,
  fp8: fp8Scheme,
  gptq: gptqScheme,
  // The metadata of the files says it all, tensor by tensor.
  torchao: () => null,
  fewbit: () => null,
};

/**
 * Reads `quantization_config` of a config.json; null when the files themselves say what is quantized, or nothing is.
 * @throws FewbitError `model/unsupported` (a method, or something in its arguments), `model/config`
 */
export function parseScheme(config: unknown): Scheme | null {
  if (config === undefined || config === null) return null;
  if (typeof config !== "object") throw malformedConfig("", config, "an object");
  const json = config as Json;
  const method = String(json.quant_method);
  const parse = Object.hasOwn(METHODS, method) ? METHODS[method] : undefined;
  if (parse === undefined) throw unsupported("quantization_config", method, Object.keys(METHODS));
  return parse(json);
}

/**
 * The weights of a model folder, whatever they lie in: safetensors files (with `quantization_config` of its config.json), or a
 * GGUF file.
 * @throws FewbitError as `openCheckpoint` and `withStored`
 */
export async function openWeights(
  directory: SourceDirectory,
  quantizationConfig: unknown,
  options: { signal?: AbortSignal } = {},
): Promise<TensorStore> {
  if (directory.weights !== undefined) return directory.weights(options);
  const checkpoint = await openCheckpoint(directory, options);
  try {
    return await withStored(checkpoint, quantizationConfig, options);
  } catch (error) {
    await checkpoint.close();
    throw error;
  }
}

/**
 * A checkpoint as a model's loader wants it: parameters that are stored quantized by the name of the weight (`stored`), and
 * float tensors as they are. Zero points of torchao tensors are read to tell symmetric weights from asymmetric ones.
 * @throws FewbitError as `parseScheme`; `io/malformed`, `model/missing-tensor`, `shape/mismatch`, `dtype/mismatch` for parts that
 *   do not fit
 */
export async function withStored(
  checkpoint: Checkpoint,
  quantizationConfig: unknown,
  options: { signal?: AbortSignal } = {},
): Promise<TensorStore> {
  const scheme = parseScheme(quantizationConfig);
  const stored = await describeMetadata(checkpoint, options.signal);
  if (scheme !== null)
    for (const [name, matrix] of await scheme.describe(checkpoint, options.signal)) stored.set(name, matrix);
  return presented(checkpoint, stored);
}

/** Parameters that the files' own metadata describes: torchao's, and what fewbit adds to it. */
async function describeMetadata(
  checkpoint: Checkpoint,
  signal: AbortSignal | undefined,
): Promise<Map<string, StoredMatrix>> {
  const found = new Map<string, StoredMatrix>();
  for (const file of checkpoint.files) {
    const listed = file.metadata.get("tensor_names");
    if (listed === undefined) continue;
    for (const name of parseJson(listed, file.name, "tensor_names") as string[]) {
      const text = file.metadata.get(name);
      if (text === undefined || found.has(name)) continue;
      const entry = parseJson(text, file.name, name) as Json;
      if (entry._type === "Tensor") continue;
      const parts = new Map<string, StoredPart>();
      // A shard may hold some parts of a tensor only: the checkpoint has them all.
      for (const part of asList(entry._tensor_data_names)) {
        const stored = partOf(checkpoint, torchaoPartName(name, part));
        if (stored !== undefined) parts.set(part, stored);
      }
      const attributes = (entry._data ?? {}) as Json;
      const type = String(entry._type);
      found.set(
        name,
        isFewbit(type)
          ? describeFewbit(name, attributes, parts)
          : await describeTorchao(name, type, attributes, parts, signal),
      );
    }
  }
  return found;
}

function parseJson(text: string, path: string, what: string): unknown {
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === "object" && value !== null) return value;
  } catch (cause) {
    throw new FewbitError("io/malformed", { path, reason: `__metadata__ ${what} is not JSON` }, { cause });
  }
  throw new FewbitError("io/malformed", { path, reason: `__metadata__ ${what} is no object or list` });
}

function asList(value: unknown): string[] {
  return Array.isArray(value) ? value.map(String) : [];
}

/** Float8 tensors without scales are shown as bf16, which holds their values exactly. */
function presented(checkpoint: Checkpoint, stored: ReadonlyMap<string, StoredMatrix>): TensorStore {
  const tensors = new Map<string, TensorInfo>();
  for (const info of checkpoint.tensors.values()) {
    if (stored.has(info.name)) continue;
    const widened = Object.hasOwn(PLAIN_FLOAT8, info.dtype);
    tensors.set(info.name, widened ? { ...info, dtype: "BF16", byteLength: info.byteLength * 2 } : info);
  }
  return {
    name: checkpoint.name,
    tensors,
    stored,
    close: () => checkpoint.close(),
    [Symbol.asyncDispose]: () => checkpoint.close(),
    async read(name, options = {}) {
      const bytes = await checkpoint.read(name, options);
      const dtype = checkpoint.tensors.get(name)?.dtype ?? "";
      if (!Object.hasOwn(PLAIN_FLOAT8, dtype)) return bytes;
      const codec = PLAIN_FLOAT8[dtype as keyof typeof PLAIN_FLOAT8];
      const table = fromFloat32("bf16", Float32Array.from(decodeTable(codec)));
      const widened = (options.memory ?? new Staging()).take(bytes.length * 2);
      const values = viewAs("bf16", widened);
      for (let i = 0; i < bytes.length; i++) values[i] = table[bytes[i] as number] as number;
      return widened;
    },
  };
}
