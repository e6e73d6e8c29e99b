import { FewbitError } from "../core/errors.js";
import type { GgufValue } from "./gguf.js";
import { ggufArchitecture, type Metadata } from "./gguf-architectures.js";

/** What the tensors say that the metadata does not. */
export interface GgufFacts {
  readonly path: string;
  readonly hasHead: boolean;
  readonly vocabSize: number;
  /** `rope_freqs.weight`: what each frequency is divided by. */
  readonly ropeFactors: Float32Array | null;
  /** Rows of a tensor by Hugging Face's name. */
  rowsOf(tensor: string): number | undefined;
}

/** A Hugging Face `config.json` of the file's metadata. Throws `io/malformed`, `model/unsupported`. */
export function ggufConfig(metadata: Metadata, facts: GgufFacts): Record<string, unknown> {
  const { name, huggingFace, fields } = ggufArchitecture(metadata);
  const value = (key: string): GgufValue | undefined => metadata.get(`${name}.${key}`);
  const number = (key: string): number => {
    const found = value(key);
    if (typeof found === "number" && Number.isFinite(found)) return decimal(found);
    const reason = `${name}.${key} is ${found === undefined ? "missing" : "no number"}`;
    throw new FewbitError("io/malformed", { path: facts.path, reason });
  };
  const optional = (key: string): number | undefined => (value(key) === undefined ? undefined : number(key));
  const boolean = (key: string): boolean | undefined => {
    const found = value(key);
    if (found === undefined || typeof found === "boolean") return found;
    throw new FewbitError("io/malformed", { path: facts.path, reason: `${name}.${key} is no boolean` });
  };
  // Gates are a softmax's (1), and not scaled (0 or 1).
  for (const [key, legal] of NEUTRAL) {
    const found = optional(key);
    if (found !== undefined && !legal.includes(found)) throw unsupported(`${name}.${key}`, found, legal.map(String));
  }
  const heads = number("attention.head_count");
  const hidden = number("embedding_length");
  const headDim = optional("attention.key_length") ?? hidden / heads;
  const rotated = optional("rope.dimension_count") ?? headDim;
  if (rotated !== headDim) throw unsupported(`${name}.rope.dimension_count`, rotated, [String(headDim)]);
  if ((optional("attention.value_length") ?? headDim) !== headDim)
    throw unsupported(`${name}.attention.value_length`, number("attention.value_length"), [String(headDim)]);
  const theta = optional("rope.freq_base") ?? 10000;
  const eos = tokenId(metadata, "eos");
  const endings = [eos, tokenId(metadata, "eot")].filter((id) => id !== null);
  const window = optional("attention.sliding_window");
  return {
    architectures: [huggingFace],
    vocab_size: facts.vocabSize,
    hidden_size: hidden,
    intermediate_size: number("feed_forward_length"),
    num_hidden_layers: number("block_count"),
    num_attention_heads: heads,
    num_key_value_heads: optional("attention.head_count_kv") ?? heads,
    head_dim: headDim,
    max_position_embeddings: number("context_length"),
    rms_norm_eps: number("attention.layer_norm_rms_epsilon"),
    rope_theta: theta,
    ...ropeScaling(name, value, optional, facts.ropeFactors, { theta, headDim }),
    ...(window === undefined ? {} : { sliding_window: window, use_sliding_window: true }),
    ...fields({ number, optional, boolean, rowsOf: facts.rowsOf }),
    tie_word_embeddings: !facts.hasHead,
    bos_token_id: tokenId(metadata, "bos"),
    eos_token_id: endings.length > 1 ? [...new Set(endings)] : (endings[0] ?? null),
  };
}

/** The shortest decimal that float32 rounds to this number: what the model's own config.json says (1e-6, not 9.99999997e-7). */
function decimal(value: number): number {
  if (Number.isInteger(value) || Math.fround(value) !== value) return value;
  for (let digits = 1; digits < 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === value) return short;
  }
  return value;
}

/** Keys of experts with the only values that change nothing. */
const NEUTRAL: readonly (readonly [key: string, legal: readonly number[]])[] = [
  ["expert_gating_func", [0, 1]],
  ["expert_weights_scale", [0, 1]],
  ["expert_group_count", [0, 1]],
];

/** The id of a special token; null when the file names none. */
export function tokenId(metadata: Metadata, token: string): number | null {
  const id = metadata.get(`tokenizer.ggml.${token}_token_id`);
  return typeof id === "number" ? id : null;
}

function ropeScaling(
  name: string,
  value: (key: string) => GgufValue | undefined,
  optional: (key: string) => number | undefined,
  factors: Float32Array | null,
  rope: { theta: number; headDim: number },
): Record<string, unknown> {
  const type = value("rope.scaling.type") ?? "none";
  if (factors !== null) return { rope_scaling: llama3Of(factors, rope) };
  if (type === "none") return {};
  const factor = optional("rope.scaling.factor");
  const original = optional("rope.scaling.original_context_length");
  if (type !== "linear" && type !== "yarn")
    throw unsupported(`${name}.rope.scaling.type`, type, ["none", "linear", "yarn"]);
  const context = original === undefined ? {} : { original_max_position_embeddings: original };
  return { rope_scaling: { rope_type: type, factor, ...context } };
}

/** The parameters of Llama 3.1's scaling with the published constants, of which a file keeps only the resulting divisors. */
function llama3Of(
  factors: Float32Array,
  { theta, headDim }: { theta: number; headDim: number },
): Record<string, unknown> {
  const scaling = {
    rope_type: "llama3",
    factor: Math.max(...factors),
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 8192,
  };
  const matches = factors.every((got, i) => {
    const turns = (scaling.original_max_position_embeddings * theta ** ((-2 * i) / headDim)) / (2 * Math.PI);
    const kept = Math.min(Math.max((turns - scaling.low_freq_factor) / 3, 0), 1);
    const expected = 1 / (kept + (1 - kept) / scaling.factor);
    return Math.abs(got - expected) <= 1e-4 * expected;
  });
  if (matches && factors.length === headDim / 2) return scaling;
  throw unsupported("rope_freqs.weight", "divisors of its own", [
    "those of Llama 3.1 (low 1, high 4, original context 8192)",
  ]);
}

function unsupported(what: string, value: unknown, supported: readonly string[]): FewbitError {
  return new FewbitError("model/unsupported", { what, value: String(value), supported });
}
