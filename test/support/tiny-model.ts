import { fromFloat32 } from "../../src/core/dtype.js";
import { type TensorEntry, writeSafetensors } from "../../src/io/safetensors.js";
import { parseConfig, tensorSpecs } from "../../src/models/config.js";
import { randomWords } from "./codecs.js";

/** A Llama config of two layers, small enough for the reference to run in a millisecond. */
export const TINY_CONFIG = {
  architectures: ["LlamaForCausalLM"],
  vocab_size: 258,
  hidden_size: 32,
  intermediate_size: 64,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  hidden_act: "silu",
  max_position_embeddings: 64,
  rms_norm_eps: 1e-5,
  tie_word_embeddings: false,
  bos_token_id: 0,
  eos_token_id: 1,
} as const;

const DTYPES = { f32: "F32", f16: "F16", bf16: "BF16" } as const;

export interface TinyModelOptions {
  readonly config?: Readonly<Record<string, unknown>>;
  readonly dtype?: keyof typeof DTYPES;
  readonly seed?: number;
  /** Changes the tensors before they are written. */
  readonly tensors?: (entries: TensorEntry[]) => TensorEntry[];
}

/** A model folder in memory: random weights, always the same for one seed, and a tokenizer with a token for every byte. */
export function tinyModel(options: TinyModelOptions = {}): Map<string, Uint8Array> {
  const json = { ...TINY_CONFIG, ...options.config };
  const dtype = options.dtype ?? "bf16";
  const uniform = randomUniform(options.seed ?? 1);
  const entries = tensorSpecs(parseConfig(json)).map(({ name, shape, role }): TensorEntry => {
    const size = shape.reduce((a, b) => a * b, 1);
    const norm = role.endsWith("Norm");
    const data = Float32Array.from({ length: size }, () => (norm ? 1 + 0.1 * uniform() : uniform() / 3));
    const bits = fromFloat32(dtype, data);
    return { name, dtype: DTYPES[dtype], shape: [...shape], data: new Uint8Array(bits.buffer) };
  });
  const text = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));
  return new Map([
    ["config.json", text(json)],
    ["tokenizer.json", text(byteTokenizer())],
    ["tokenizer_config.json", text({ bos_token: "<bos>", eos_token: "<eos>" })],
    ["model.safetensors", writeSafetensors(options.tensors?.(entries) ?? entries)],
  ]);
}

/** Numbers in [-1, 1). */
export function randomUniform(seed: number): () => number {
  const next = randomWords(seed);
  return () => next() / 2 ** 31 - 1;
}

/** A byte-level BPE tokenizer without merges: `<bos>`, `<eos>`, then the 256 bytes; every text starts with `<bos>`. */
function byteTokenizer() {
  const special = ["<bos>", "<eos>"].map((content, id) => ({ id, content, special: true }));
  const vocab: Record<string, number> = { "<bos>": 0, "<eos>": 1 };
  for (let byte = 0, next = 256; byte < 256; byte++) {
    // The byte-level alphabet: printable Latin-1 stands for itself, the others for characters from U+0100 on.
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    vocab[String.fromCharCode(printable ? byte : next++)] = byte + 2;
  }
  const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false };
  return {
    added_tokens: special,
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: {
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id: "<bos>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
      pair: [],
      special_tokens: { "<bos>": { id: "<bos>", ids: [0], tokens: ["<bos>"] } },
    },
    decoder: byteLevel,
    model: { type: "BPE", vocab, merges: [] },
  };
}
