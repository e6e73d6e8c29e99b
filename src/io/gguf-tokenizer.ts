import { FewbitError } from "../core/errors.js";
import type { GgufHeader } from "./gguf.js";
import { tokenId } from "./gguf-config.js";

type Metadata = GgufHeader["metadata"];

/** Hugging Face's `tokenizer.json` and `tokenizer_config.json`. */
export interface TokenizerFiles {
  readonly tokenizer: Record<string, unknown>;
  readonly config: Record<string, unknown>;
}

/** Token types of GGUF. */
const CONTROL = 3;
const USER_DEFINED = 4;

const GPT2 = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
const BYTES = { ...GPT2, use_regex: false };
const split = (pattern: string) => ({
  type: "Sequence",
  pretokenizers: [{ type: "Split", pattern: { Regex: pattern }, behavior: "Isolated", invert: false }, BYTES],
});
const words = (digits: string) =>
  `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;
const LLAMA3 = split(words("\\p{N}{1,3}"));
const QWEN2 = split(words("\\p{N}"));

/** How a text is cut into words, by `tokenizer.ggml.pre`. */
const PRE_TOKENIZERS: Readonly<Record<string, unknown>> = {
  "gpt-2": GPT2,
  "llama-bpe": LLAMA3,
  llama3: LLAMA3,
  "llama-v3": LLAMA3,
  qwen2: QWEN2,
  smollm: { type: "Sequence", pretokenizers: [{ type: "Digits", individual_digits: true }, GPT2] },
};

/**
 * The tokenizer of a GGUF file: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).
 * @throws FewbitError `model/unsupported` for another kind of tokenizer or way of cutting words, `io/malformed`
 */
export function ggufTokenizer(metadata: Metadata, path: string): TokenizerFiles {
  const kind = metadata.get("tokenizer.ggml.model");
  if (kind !== "gpt2" && kind !== "llama")
    throw new FewbitError("model/unsupported", {
      what: "GGUF tokenizer",
      value: String(kind),
      supported: ["gpt2", "llama"],
    });
  const tokens = strings(metadata, "tokenizer.ggml.tokens", path);
  const types = (metadata.get("tokenizer.ggml.token_type") ?? []) as readonly unknown[];
  const added = tokens.flatMap((content, id) => {
    const special = types[id] === CONTROL;
    return special || types[id] === USER_DEFINED ? [{ id, content, special, normalized: false }] : [];
  });
  const vocab = Object.fromEntries(tokens.map((token, id) => [token, id]));
  const bos = tokenId(metadata, "bos");
  const eos = tokenId(metadata, "eos");
  // Without the field a text starts as those of SentencePiece models and of Llama 3 do.
  const llama3 = PRE_TOKENIZERS[String(metadata.get("tokenizer.ggml.pre"))] === LLAMA3;
  const addBos = metadata.get("tokenizer.ggml.add_bos_token") ?? (kind === "llama" || llama3);
  const parts = kind === "gpt2" ? byteLevel(metadata, path) : sentencePiece(metadata, tokens, path);
  const template = metadata.get("tokenizer.chat_template");
  const name = (id: number | null) => (id === null ? undefined : tokens[id]);
  const named = Object.entries({ bos_token: name(bos), eos_token: name(eos) }).filter(
    ([, token]) => token !== undefined,
  );
  return {
    tokenizer: {
      version: "1.0",
      added_tokens: added,
      ...parts.around,
      post_processor: postProcessor(addBos === true && bos !== null ? [tokens[bos] as string, bos] : null, kind),
      model: { type: "BPE", vocab, ...parts.model },
    },
    config: {
      ...Object.fromEntries(named),
      ...(typeof template === "string" ? { chat_template: template } : {}),
      add_bos_token: addBos,
    },
  };
}

interface Parts {
  readonly around: Record<string, unknown>;
  readonly model: Record<string, unknown>;
}

function byteLevel(metadata: Metadata, path: string): Parts {
  const pre = String(metadata.get("tokenizer.ggml.pre") ?? "absent");
  if (!Object.hasOwn(PRE_TOKENIZERS, pre))
    throw new FewbitError("model/unsupported", {
      what: "tokenizer.ggml.pre",
      value: pre,
      supported: Object.keys(PRE_TOKENIZERS),
    });
  const merges = strings(metadata, "tokenizer.ggml.merges", path);
  return {
    around: {
      normalizer: PRE_TOKENIZERS[pre] === QWEN2 ? { type: "NFC" } : null,
      pre_tokenizer: PRE_TOKENIZERS[pre],
      decoder: BYTES,
    },
    model: { merges, ignore_merges: PRE_TOKENIZERS[pre] === LLAMA3 },
  };
}

/** SentencePiece's BPE merges the pair whose piece has the best score; as a list of merges, best first. */
function sentencePiece(metadata: Metadata, tokens: readonly string[], path: string): Parts {
  const scores = metadata.get("tokenizer.ggml.scores") as readonly unknown[] | undefined;
  if (!Array.isArray(scores) || scores.length !== tokens.length)
    throw new FewbitError("io/malformed", { path, reason: "it has not one score for each token" });
  const ids = new Map(tokens.map((token, id) => [token, id]));
  const merges: { pair: [string, string]; score: number; order: number }[] = [];
  for (const [id, token] of tokens.entries()) {
    const characters = [...token];
    if (characters.length > MAX_PIECE) continue;
    for (let cut = 1; cut < characters.length; cut++) {
      const pair: [string, string] = [characters.slice(0, cut).join(""), characters.slice(cut).join("")];
      if (ids.has(pair[0]) && ids.has(pair[1])) merges.push({ pair, score: Number(scores[id]), order: merges.length });
    }
  }
  merges.sort((a, b) => b.score - a.score || a.order - b.order);
  const prefix = metadata.get("tokenizer.ggml.add_space_prefix") !== false;
  const unknown = tokenId(metadata, "unknown");
  const replace = { type: "Replace", pattern: { String: " " }, content: "▁" };
  const strip = prefix ? [{ type: "Strip", content: " ", start: 1, stop: 0 }] : [];
  return {
    around: {
      normalizer: { type: "Sequence", normalizers: [...(prefix ? [{ type: "Prepend", prepend: "▁" }] : []), replace] },
      pre_tokenizer: null,
      decoder: {
        type: "Sequence",
        decoders: [
          { type: "Replace", pattern: { String: "▁" }, content: " " },
          { type: "ByteFallback" },
          { type: "Fuse" },
          ...strip,
        ],
      },
    },
    model: {
      merges: merges.map(({ pair }) => pair),
      byte_fallback: true,
      fuse_unk: true,
      unk_token: unknown === null ? null : tokens[unknown],
    },
  };
}

/** Longer pieces are no words; their cuts would take quadratic time. */
const MAX_PIECE = 256;

function postProcessor(bos: readonly [token: string, id: number] | null, kind: string): unknown {
  if (bos === null) return kind === "gpt2" ? BYTES : null;
  const [token, id] = bos;
  const template = {
    type: "TemplateProcessing",
    single: [{ SpecialToken: { id: token, type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
    pair: [
      { SpecialToken: { id: token, type_id: 0 } },
      { Sequence: { id: "A", type_id: 0 } },
      { SpecialToken: { id: token, type_id: 1 } },
      { Sequence: { id: "B", type_id: 1 } },
    ],
    special_tokens: { [token]: { id: token, ids: [id], tokens: [token] } },
  };
  return kind === "gpt2" ? { type: "Sequence", processors: [BYTES, template] } : template;
}

function strings(metadata: Metadata, key: string, path: string): readonly string[] {
  const value = metadata.get(key);
  if (Array.isArray(value) && value.every((item) => typeof item === "string")) return value as string[];
  throw new FewbitError("io/malformed", { path, reason: `${key} is no list of strings` });
}
