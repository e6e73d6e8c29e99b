import { Tokenizer as Engine } from "@huggingface/tokenizers";
import { FewbitError } from "../core/errors.js";

/** Text to token ids and back. */
export interface Tokenizer {
  /** One past the largest id that has a token. A model's own vocabulary may be padded beyond it. */
  readonly vocabSize: number;
  readonly bosId: number | null;
  /** The tokenizer's end token; a model's config.json may name further ones. */
  readonly eosIds: readonly number[];
  /**
   * Token ids of a text. `addSpecialTokens` (default true) adds what the model expects around it, such as BOS. Special tokens
   * that are spelled out in the text become their ids either way. Lone surrogates count as U+FFFD.
   */
  encode(text: string, options?: { addSpecialTokens?: boolean }): number[];
  /**
   * The text of token ids, as they stand: spaces before punctuation are kept. Ids without a token (padding of the model's
   * vocabulary) are no text. Bytes that are not UTF-8 become U+FFFD.
   * @throws FewbitError `argument/invalid` when an id is not a nonnegative integer
   */
  decode(ids: readonly number[], options?: DecodeOptions): string;
  /** A decoder for ids that come one at a time. */
  stream(options?: DecodeOptions): TextStream;
}

export interface DecodeOptions {
  /** Leave out special tokens such as BOS and EOS; default true. */
  skipSpecialTokens?: boolean;
}

/**
 * Decodes incrementally. All pushes and the final flush, joined, are `decode` of all ids; no piece ends inside a character,
 * so U+FFFD is only emitted for bytes that can no longer become one.
 */
export interface TextStream {
  /** The text that this token completes; often empty. */
  push(id: number): string;
  /** The rest. The stream is then ready for a new text. */
  flush(): string;
}

/** What is used of the engine. Its published types do not resolve under NodeNext, so they are stated here. */
interface TokenizerEngine {
  readonly model: { readonly vocab: readonly (string | undefined)[] };
  encode(text: string, options: { add_special_tokens: boolean }): { ids: unknown[] };
  decode(ids: number[], options: { skip_special_tokens: boolean; clean_up_tokenization_spaces: boolean }): string;
  token_to_id(token: string): number | undefined;
}

/** Far above any vocabulary; a larger id is a damaged file, and would allocate a table of that size. */
const MAX_ID = 2 ** 24;
const MODELS: readonly string[] = ["BPE", "Unigram", "WordPiece"];
/** Tokens that a stream keeps as context once everything up to them has been emitted. */
const CONTEXT = 8;
const COMPACT_AT = 32;

/**
 * Builds a tokenizer from the parsed `tokenizer.json` and `tokenizer_config.json` of a model.
 * @throws FewbitError `io/malformed` when they do not describe one
 */
export function loadTokenizer(
  tokenizerJson: Readonly<Record<string, unknown>>,
  configJson: Readonly<Record<string, unknown>>,
): Tokenizer {
  const model = checkModel(tokenizerJson.model);
  const special = checkAddedTokens(tokenizerJson.added_tokens);
  const engine = build({ ...tokenizerJson, model }, configJson);
  const { vocab } = engine.model;

  function idOf(field: string): number | null {
    const token = configJson[field];
    if (token === undefined || token === null) return null;
    const content = typeof token === "string" ? token : (token as { content?: unknown }).content;
    const id = typeof content === "string" ? engine.token_to_id(content) : undefined;
    if (id === undefined)
      throw malformed("tokenizer_config.json", `${field} is ${JSON.stringify(token)}, which is no token`);
    return id;
  }

  function isText(id: number, skipSpecialTokens: boolean): boolean {
    if (!Number.isSafeInteger(id) || id < 0)
      throw new FewbitError("argument/invalid", {
        name: "id",
        value: id,
        expected: "a token id (integer of at least 0)",
      });
    return vocab[id] !== undefined && !(skipSpecialTokens && special.has(id));
  }

  function decodeText(ids: number[]): string {
    if (ids.length === 0) return "";
    return engine.decode(ids, { skip_special_tokens: false, clean_up_tokenization_spaces: false });
  }

  const eosId = idOf("eos_token");
  return {
    vocabSize: vocab.length,
    bosId: idOf("bos_token"),
    eosIds: eosId === null ? [] : [eosId],
    encode(text, { addSpecialTokens = true } = {}) {
      const { ids } = engine.encode(text, { add_special_tokens: addSpecialTokens });
      return ids.map((id) => {
        if (typeof id === "number") return id;
        throw malformed("tokenizer.json", "a piece of the text has no token, and there is no unknown token");
      });
    },
    decode: (ids, { skipSpecialTokens = true } = {}) => decodeText(ids.filter((id) => isText(id, skipSpecialTokens))),
    stream({ skipSpecialTokens = true } = {}) {
      return createStream((id) => isText(id, skipSpecialTokens), decodeText);
    },
  };
}

/**
 * Decodes a window of the last ids again for each token and emits what is new and final. A decoder can still change only its
 * last character: an unfinished UTF-8 sequence at the end is exactly one U+FFFD (WHATWG Encoding, "maximal subpart").
 * Everything before depends only on ids already seen, so a window with some final text before its first new token decodes
 * its continuation as the whole would.
 */
function createStream(isText: (id: number) => boolean, decode: (ids: number[]) => string): TextStream {
  let window: number[] = [];
  let emitted = 0;
  return {
    push(id) {
      if (!isText(id)) return "";
      window.push(id);
      const text = decode(window);
      const final = text.endsWith("\ufffd") ? text.length - 1 : text.length;
      const piece = text.slice(emitted, final);
      emitted = Math.max(emitted, final);
      if (final === text.length && window.length >= COMPACT_AT) {
        const context = window.slice(-CONTEXT);
        const length = decode(context).length;
        if (length > 0) {
          window = context;
          emitted = length;
        }
      }
      return piece;
    },
    flush() {
      const piece = decode(window).slice(emitted);
      window = [];
      emitted = 0;
      return piece;
    },
  };
}

function build(tokenizerJson: Readonly<Record<string, unknown>>, config: Readonly<Record<string, unknown>>) {
  try {
    return new (Engine as unknown as new (json: object, config: object) => TokenizerEngine)(tokenizerJson, config);
  } catch (cause) {
    throw malformed("tokenizer.json", (cause as Error).message, cause);
  }
}

/** The engine takes any model it does not know for one of its oldest, so the type is checked here. */
function checkModel(json: unknown): object {
  const model = (json ?? {}) as { type?: unknown; vocab?: unknown; merges?: unknown };
  // Files from before the field existed hold BPE.
  const type = model.type ?? (Array.isArray(model.merges) ? "BPE" : undefined);
  if (typeof type !== "string" || !MODELS.includes(type))
    throw malformed("tokenizer.json", `its model type is ${JSON.stringify(type)}, known are ${MODELS.join(", ")}`);
  const { vocab } = model;
  if (typeof vocab !== "object" || vocab === null) throw malformed("tokenizer.json", "it has no model.vocab");
  // A Unigram vocabulary is a list, whose places are the ids.
  if (!Array.isArray(vocab)) for (const [token, id] of Object.entries(vocab)) checkId(token, id);
  return { ...model, type };
}

/** The ids of special tokens. */
function checkAddedTokens(json: unknown): ReadonlySet<number> {
  if (!Array.isArray(json)) throw malformed("tokenizer.json", "it has no list added_tokens");
  const special = new Set<number>();
  for (const token of json as ({ id?: unknown; content?: unknown; special?: unknown } | null)[]) {
    if (typeof token?.content !== "string") throw malformed("tokenizer.json", "an added token has no content");
    const id = checkId(token.content, token.id);
    if (token.special === true) special.add(id);
  }
  return special;
}

/** The engine makes a table as long as the largest id. */
function checkId(token: string, id: unknown): number {
  if (!Number.isInteger(id) || Number(id) < 0 || Number(id) >= MAX_ID)
    throw malformed("tokenizer.json", `token ${JSON.stringify(token)} has the id ${JSON.stringify(id)}`);
  return id as number;
}

function malformed(path: string, reason: string, cause?: unknown): FewbitError {
  return new FewbitError("io/malformed", { path, reason }, { cause });
}
