import { readFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { FewbitError } from "../../src/core/errors.js";
import { loadTokenizer, type Tokenizer } from "../../src/text/tokenizer.js";

type Json = Record<string, unknown>;
const read = (file: string) => JSON.parse(readFileSync(`models/fewbit-tiny/${file}`, "utf8")) as Json;
const tokenizerJson = read("tokenizer.json");
const configJson = read("tokenizer_config.json");
const tokenizer = loadTokenizer(tokenizerJson, configJson);

/** A Llama-2-style tokenizer in small: "▁" for spaces, bytes as fallback, one leading space stripped. */
const pieces = ["<unk>", "<s>", "</s>", ..."▁abcé".split(""), "▁a", "▁b", "ab", ""];
const bytes = Array.from({ length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, "0")}>`);
const fallback = loadTokenizer(
  {
    version: "1.0",
    added_tokens: ["<unk>", "<s>", "</s>"].map((content, id) => ({ id, content, special: true, normalized: false })),
    normalizer: {
      type: "Sequence",
      normalizers: [
        { type: "Prepend", prepend: "▁" },
        { type: "Replace", pattern: { String: " " }, content: "▁" },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: "▁" }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    },
    model: {
      type: "BPE",
      byte_fallback: true,
      unk_token: "<unk>",
      vocab: Object.fromEntries([...pieces, ...bytes].map((token, id) => [token, id])),
      merges: ["▁ a", "▁ b", "a b"],
    },
  },
  { bos_token: { content: "<s>" }, eos_token: "</s>" },
);

function streamed(t: Tokenizer, ids: readonly number[], skipSpecialTokens = true) {
  const stream = t.stream({ skipSpecialTokens });
  const parts = ids.map((id) => stream.push(id));
  return { parts, text: parts.join("") + stream.flush() };
}

const text = fc.oneof(
  fc.string({ unit: "binary", maxLength: 40 }),
  fc.string({ unit: "grapheme", maxLength: 40 }),
  fc.string({
    unit: fc.constantFrom("👩‍👩‍👧", "🏳️‍🌈", "é", "e\u0301", "中", "\u0000", "\ufeff", "\ufffd", " ", "\n", "a", "'s"),
    maxLength: 60,
  }),
);

describe("encode and decode", () => {
  test("know the bundled tokenizer: sizes, special ids, the reference's token count of the test text", () => {
    expect([tokenizer.vocabSize, tokenizer.bosId, tokenizer.eosIds]).toEqual([2048, 0, [1]]);
    const ids = tokenizer.encode(readFileSync("models/test.txt", "utf8"), { addSpecialTokens: false });
    // models' EVAL.md: 97 windows of 511 tokens, the tail dropped.
    expect(Math.floor(ids.length / 511)).toBe(97);
  });

  test("BOS comes first exactly when special tokens are asked for", () => {
    expect(tokenizer.encode("Hello")[0]).toBe(0);
    expect(tokenizer.encode("Hello").slice(1)).toEqual(tokenizer.encode("Hello", { addSpecialTokens: false }));
    expect(tokenizer.encode("")).toEqual([0]);
    expect(tokenizer.encode("", { addSpecialTokens: false })).toEqual([]);
    expect(tokenizer.decode([])).toBe("");
  });

  test("every well-formed text survives the round trip", () => {
    fc.assert(
      fc.property(text, fc.boolean(), (value, addSpecialTokens) => {
        const ids = tokenizer.encode(value, { addSpecialTokens });
        expect(tokenizer.decode(ids)).toBe(value);
        for (const id of ids) expect(id).toBeLessThan(2048);
      }),
      { numRuns: 1000 },
    );
  });

  test("spaces before punctuation are kept even when the model's config asks to clean them up", () => {
    const cleaning = loadTokenizer(tokenizerJson, { ...configJson, clean_up_tokenization_spaces: true });
    expect(cleaning.decode(cleaning.encode("do n't stop , please ."))).toBe("do n't stop , please .");
  });

  test("special tokens are left out unless they are asked for", () => {
    const ids = tokenizer.encode("a<|end_of_text|>b");
    expect(ids).toContain(1);
    expect(tokenizer.decode(ids)).toBe("ab");
    expect(tokenizer.decode(ids, { skipSpecialTokens: false })).toBe("<|begin_of_text|>a<|end_of_text|>b");
  });

  test("ids past the vocabulary are no text, and ids that are no ids are refused", () => {
    expect(tokenizer.decode([2048, ...tokenizer.encode("a"), 99999])).toBe("a");
    for (const id of [-1, 0.5, Number.NaN])
      for (const decode of [() => tokenizer.decode([5, id]), () => tokenizer.stream().push(id)])
        expect(decode).toThrowError(expect.objectContaining({ code: "argument/invalid" }));
  });

  test("a byte-fallback tokenizer: prepended space, bytes for unknown characters, stripped again", () => {
    expect(fallback.encode("ab 😀")).toHaveLength("▁a b ▁ 4bytes".split(" ").length + 3);
    expect(fallback.decode(fallback.encode("ab 😀é"))).toBe("ab 😀é");
    expect([fallback.bosId, fallback.eosIds]).toEqual([1, [2]]);
  });
});

describe("the stream decoder", () => {
  const anyIds = (t: Tokenizer) => fc.array(fc.nat(t.vocabSize + 1), { maxLength: 120 });
  /** Single bytes: the hardest case, with broken and overlong UTF-8 in every position. */
  const byteIds = (from: number) => fc.array(fc.integer({ min: from, max: from + 255 }), { maxLength: 120 });
  const firstByte = pieces.length;

  const cases: [name: string, tokenizer: Tokenizer, ids: fc.Arbitrary<number[]>][] = [
    ["any tokens", tokenizer, anyIds(tokenizer)],
    ["single bytes", tokenizer, byteIds(2)],
    ["real text", tokenizer, text.map((value) => tokenizer.encode(value))],
    ["any tokens with byte fallback", fallback, anyIds(fallback)],
    ["single bytes with byte fallback", fallback, byteIds(firstByte)],
    [
      "words and bytes with byte fallback",
      fallback,
      fc.array(fc.oneof(fc.nat(11), fc.constantFrom(...[...Buffer.from("😀é ")].map((b) => firstByte + b))), {
        maxLength: 120,
      }),
    ],
  ];
  for (const [name, t, ids] of cases)
    test(`${name}: pushes and flush joined are decode of all`, () => {
      fc.assert(
        fc.property(ids, fc.boolean(), (value, skipSpecialTokens) => {
          expect(streamed(t, value, skipSpecialTokens).text).toBe(t.decode(value, { skipSpecialTokens }));
        }),
        { numRuns: 1500 },
      );
    });

  test("a long run of tokens without text does not make the next word look like the first", () => {
    const ids = [3, ...Array<number>(40).fill(pieces.indexOf("")), pieces.indexOf("▁a")];
    expect(streamed(fallback, [4, ...ids]).text).toBe("a  a");
  });

  test("no piece of well-formed text contains a replacement character or half a surrogate pair", () => {
    const clean = text.map((value) => value.replaceAll("\ufffd", ""));
    fc.assert(
      fc.property(clean, (value) => {
        for (const part of streamed(tokenizer, tokenizer.encode(value)).parts) {
          expect(part).not.toContain("\ufffd");
          expect(part).not.toMatch(/\p{Surrogate}/u);
        }
      }),
      { numRuns: 500 },
    );
  });

  test("text comes as soon as its last byte has come", () => {
    const ids = tokenizer.encode("😀", { addSpecialTokens: false });
    expect(ids.length).toBeGreaterThan(1);
    expect(streamed(tokenizer, ids).parts).toEqual([...ids.slice(1).map(() => ""), "😀"]);
  });

  test("an unfinished character appears at the flush, and the stream can be used again", () => {
    const stream = tokenizer.stream();
    const [first] = tokenizer.encode("😀", { addSpecialTokens: false }) as [number];
    expect([stream.push(first), stream.flush(), stream.flush()]).toEqual(["", "\ufffd", ""]);
    const ids = tokenizer.encode("Hi", { addSpecialTokens: false });
    expect(ids.map((id) => stream.push(id)).join("") + stream.flush()).toBe("Hi");
  });
});

describe("a damaged tokenizer is refused", () => {
  const model = tokenizerJson.model as Json;
  const cases: [law: string, json: Json, config: Json][] = [
    ["no model", { ...tokenizerJson, model: undefined }, configJson],
    ["no vocabulary", { ...tokenizerJson, model: { ...model, vocab: null } }, configJson],
    ["no added tokens", { ...tokenizerJson, added_tokens: undefined }, configJson],
    ["an added token without content", { ...tokenizerJson, added_tokens: [{ id: 0 }] }, configJson],
    ["an added token without id", { ...tokenizerJson, added_tokens: [{ content: "x" }] }, configJson],
    [
      "an id that would need a huge table",
      { ...tokenizerJson, model: { ...model, vocab: { a: 2 ** 31 } } },
      configJson,
    ],
    ["a negative id", { ...tokenizerJson, model: { ...model, vocab: { a: -1 } } }, configJson],
    ["an unknown model type", { ...tokenizerJson, model: { type: "Nope", vocab: {} } }, configJson],
    ["an unknown decoder", { ...tokenizerJson, decoder: { type: "Nope" } }, configJson],
    [
      "a missing section",
      Object.fromEntries(Object.entries(tokenizerJson).filter(([k]) => k !== "decoder")),
      configJson,
    ],
    ["an end token that is no token", tokenizerJson, { ...configJson, eos_token: "<nope>" }],
    ["an end token that is no text", tokenizerJson, { ...configJson, eos_token: { content: 3 } }],
  ];
  for (const [law, json, config] of cases)
    test(law, () => {
      let error: unknown;
      try {
        loadTokenizer(json, config);
      } catch (thrown) {
        error = thrown;
      }
      expect(error).toBeInstanceOf(FewbitError);
      expect(error).toMatchObject({ code: "io/malformed" });
    });

  test("a text with a piece that has no token is an error, not an undefined id", () => {
    const gap = loadTokenizer(
      {
        ...tokenizerJson,
        pre_tokenizer: null,
        post_processor: null,
        model: { type: "WordPiece", vocab: { a: 0 } },
        added_tokens: [],
      },
      {},
    );
    expect(() => gap.encode("b")).toThrowError(expect.objectContaining({ code: "io/malformed" }));
  });
});
