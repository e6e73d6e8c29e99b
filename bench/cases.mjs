// THE CASES of every bench: what is measured, at which sizes. `small` sizes run on a software GPU in seconds.

/** Short names of recipes (`src/quantize/names.ts`) in the order of the tables; `none` is bf16 throughout. */
export const RECIPES = [
  "none",
  "int8wo",
  "int8dq",
  "int4wo-64",
  "float8wo",
  "float8dq-row",
  "float8dq-tensor",
  "nvfp4wo",
  "mxfp8",
];

/** Weights [N, K] of Llama-3.1-8B: q, k and v together; o; gate and up together; down. */
const LLAMA_LINEARS = [
  [6144, 4096],
  [4096, 4096],
  [28672, 4096],
  [4096, 14336],
];

export const CASES = {
  linear: {
    full: { shapes: LLAMA_LINEARS, rows: [1, 16, 128, 4096], recipes: RECIPES },
    small: { shapes: [[128, 256]], rows: [1, 33], recipes: RECIPES },
  },
  /** ReLU -> Linear with M = K = N. */
  roofline: {
    full: { sizes: [1024, 2048, 4096, 8192, 16384], recipes: RECIPES },
    small: { sizes: [64, 128], recipes: RECIPES },
  },
  /** Decoding takes one token after a full cache; a prompt is the whole context (`operands` of sdpa.mjs says of what). */
  sdpa: {
    full: {
      heads: 32,
      kvHeads: 8,
      size: 128,
      contexts: [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072],
      kv: ["bf16", "int8", "float8", "int4"],
      prompts: ["bf16", "float8", "f32", "kv-int8", "kv-float8"],
    },
    small: {
      heads: 4,
      kvHeads: 2,
      size: 64,
      contexts: [64, 200],
      kv: ["bf16", "int8", "float8", "int4"],
      prompts: ["bf16", "float8", "f32", "kv-int8", "kv-float8"],
    },
  },
  model: {
    full: { config: "llama-3.1-8b", decode: { prompt: 128, tokens: 128 }, prefill: 4096, recipes: RECIPES },
    small: { config: "small", decode: { prompt: 8, tokens: 4 }, prefill: 32, recipes: RECIPES },
  },
};

/** What `config.json` of a model says; weights are random. */
export const CONFIGS = {
  "llama-3.1-8b": {
    architectures: ["LlamaForCausalLM"],
    vocab_size: 128256,
    hidden_size: 4096,
    intermediate_size: 14336,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 8,
    hidden_act: "silu",
    max_position_embeddings: 131072,
    rms_norm_eps: 1e-5,
    rope_theta: 500000,
    rope_scaling: {
      factor: 8,
      high_freq_factor: 4,
      low_freq_factor: 1,
      original_max_position_embeddings: 8192,
      rope_type: "llama3",
    },
    tie_word_embeddings: false,
    bos_token_id: 128000,
    eos_token_id: 128001,
  },
  small: {
    architectures: ["LlamaForCausalLM"],
    vocab_size: 256,
    hidden_size: 256,
    intermediate_size: 512,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    hidden_act: "silu",
    max_position_embeddings: 64,
    rms_norm_eps: 1e-5,
    tie_word_embeddings: false,
    bos_token_id: 0,
    eos_token_id: 1,
  },
};

/** What `config.json` of a bench's model says, with fewer layers where those are wanted. */
export const configOf = ({ config, layers }) => ({
  ...CONFIGS[config],
  ...(layers === undefined ? {} : { num_hidden_layers: layers }),
});

/** The cases of a bench as one run wants them: `wanted` lists replace those of the table. */
export function casesOf(bench, { small = false, ...wanted }) {
  const given = Object.fromEntries(Object.entries(wanted).filter(([, value]) => value !== undefined));
  return { ...CASES[bench][small ? "small" : "full"], ...given };
}
