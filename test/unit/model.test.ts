import { describe, expect, test } from "vitest";
import { withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import type { LoadModelOptions } from "../../src/models/load.js";
import type { GeneratedToken, Model } from "../../src/models/model.js";
import { int8WeightOnly, perGroup } from "../../src/quantize/configs.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
import { failure } from "../support/failure.js";
import { collect, load, PROMPT, reference } from "../support/generate.js";
import { TINY_CONFIG, tinyModel } from "../support/tiny-model.js";

const ids = (tokens: readonly GeneratedToken[]) => tokens.map((token) => token.id);

describe("generation", () => {
  test("is a function of model, prompt and settings: greedy, and drawn with a seed", async () => {
    await using device = await reference();
    using first = await load(device);
    using second = await load(device);
    for (const settings of [{}, { temperature: 1, seed: 5 }, { temperature: 0.7, topK: 20, topP: 0.9, seed: 9 }]) {
      const tokens = await collect(first, PROMPT, settings);
      expect(tokens).toHaveLength(12);
      expect(await collect(first, PROMPT, settings)).toEqual(tokens);
      expect(await collect(second, PROMPT, settings)).toEqual(tokens);
    }
    const draws = await Promise.all(
      [1, 2].map(async (seed) => ids(await collect(seed === 1 ? first : second, PROMPT, { temperature: 1, seed }))),
    );
    expect(draws[0]).not.toEqual(draws[1]);
  });

  test.each([1, 3, 7, 16])(
    "of a prompt run in chunks of %s tokens is that of the prompt run whole",
    async (prefillChunk) => {
      await using device = await reference();
      using whole = await load(device, { quantize: "int4wo-32" });
      using chunked = await load(device, { quantize: "int4wo-32", prefillChunk });
      const prompt = whole.tokenizer.encode(PROMPT);
      expect(prompt).toHaveLength(17);
      expect(await chunked.logits(prompt)).toEqual(await whole.logits(prompt));
      expect(await collect(chunked, PROMPT)).toEqual(await collect(whole, PROMPT));
    },
  );

  test("gives each token the log-softmax of the logits it was taken from, and greedily the largest", async () => {
    await using device = await reference();
    using model = await load(device, { quantize: "int8wo" });
    const prompt = model.tokenizer.encode(PROMPT);
    const tokens = await collect(model, PROMPT, { maxTokens: 6 });
    for (const [i, { id, logprob }] of tokens.entries()) {
      const logits = [...(await model.logits([...prompt, ...ids(tokens.slice(0, i))]))];
      expect(id).toBe(logits.indexOf(Math.max(...logits)));
      const mass = logits.reduce((sum, logit) => sum + Math.exp(logit - (logits[id] as number)), 0);
      expect(Math.abs(logprob + Math.log(mass))).toBeLessThan(1e-6);
    }
  });

  test("streams the text: its pieces, joined, are the decoded tokens", async () => {
    await using device = await reference();
    using model = await load(device);
    const tokens = await collect(model, PROMPT, { maxTokens: 30, temperature: 1.5, seed: 3 });
    expect(tokens.map((token) => token.text).join("")).toBe(model.tokenizer.decode(ids(tokens)));
  });

  test("takes token ids for a prompt, and a text as the tokenizer's ids", async () => {
    await using device = await reference();
    using model = await load(device);
    expect(await collect(model, model.tokenizer.encode(PROMPT))).toEqual(await collect(model, PROMPT));
  });

  test("ends with an end token of the config or the tokenizer, which shows no text", async () => {
    await using device = await reference();
    using free = await load(device);
    const all = await collect(free, PROMPT);
    const stop = all[4] as GeneratedToken;
    const first = all.findIndex((token) => token.id === stop.id);
    using model = await load(device, {}, tinyModel({ config: { eos_token_id: stop.id } }));
    const ended = await collect(model, PROMPT, { ignoreEos: false });
    expect(ids(ended)).toEqual(ids(all.slice(0, first + 1)));
    expect(ended.at(-1)?.text).toBe("");
  });

  test("ends when the context is full, to the last slot", async () => {
    await using device = await reference();
    using model = await load(device, { context: 20 });
    const prompt = model.tokenizer.encode(PROMPT);
    expect(await collect(model, prompt, { maxTokens: 100 })).toHaveLength(20 - prompt.length + 1);
    expect(
      await collect(
        model,
        Array.from({ length: 20 }, () => 5),
        { maxTokens: 100 },
      ),
    ).toHaveLength(1);
    expect(await collect(model, PROMPT, { maxTokens: 0 })).toEqual([]);
  });

  test("counts what it did", async () => {
    await using device = await reference();
    using model = await load(device);
    expect(model.statistics).toBeNull();
    await collect(model, PROMPT);
    const steps = model.program.plan.steps.length;
    expect(model.statistics).toMatchObject({ promptTokens: 17, tokens: 12, decodeDispatches: 11 * steps });
    const { promptSeconds, decodeSeconds, encodeSeconds } = model.statistics as NonNullable<Model["statistics"]>;
    for (const seconds of [promptSeconds, decodeSeconds, encodeSeconds]) expect(seconds).toBeGreaterThan(0);
  });

  const cache = { int8: withScale(FORMATS.int8, { block: [1, 8] }), f16: FORMATS.f16 };
  test.each(["int8", "f16"] as const)("works with a KV cache in %s, close to the one in float32", async (name) => {
    await using device = await reference();
    using exact = await load(device);
    using rounded = await load(device, { kv: cache[name] });
    expect(rounded.program.plan.bytes.state).toBeLessThan(exact.program.plan.bytes.state);
    const prompt = exact.tokenizer.encode(PROMPT);
    const [a, b] = [await exact.logits(prompt), await rounded.logits(prompt)];
    expect(a).not.toEqual(b);
    const spread = Math.max(...a) - Math.min(...a);
    for (const [i, logit] of a.entries()) expect(Math.abs(logit - (b[i] as number))).toBeLessThan(0.02 * spread);
  });
});

describe("quantization", () => {
  test("by name, by config, and by a map of layers give one model; `none`, null and nothing another", async () => {
    await using device = await reference();
    const logits = async (quantize?: LoadModelOptions["quantize"]) => {
      using model = await load(device, quantize === undefined ? {} : { quantize });
      return model.logits([0, 50, 60]);
    };
    const config = int8WeightOnly({ granularity: perGroup(32) });
    const named = await logits("int8wo-32");
    expect(await logits(config)).toEqual(named);
    expect(await logits(new Map([["_default", config]]))).toEqual(named);
    const plain = await logits();
    expect(plain).not.toEqual(named);
    expect([await logits("none"), await logits(null)]).toEqual([plain, plain]);
    const some = await logits(new Map([["re:.*mlp.*", config]]));
    expect([plain, named]).not.toContainEqual(some);
  });

  test("touches the linears of the layers only, and says how they are stored", async () => {
    await using device = await reference();
    using model = await load(device, { quantize: "int4wo-32" });
    const formats = model.program.plan.graph.values.flatMap(({ name, type, role }) =>
      role === "weight" && type.kind === "format" ? [[name, type.format.name] as const] : [],
    );
    expect(formats).toHaveLength(2 + 2 * 7);
    for (const [name, format] of formats) expect(format).toBe(name.includes("_proj") ? "int4_tinygemm" : "bf16");
  });

  test("of activations is done once for all linears of one input that want one format", async () => {
    await using device = await reference();
    const nodes = async (quantize: NonNullable<LoadModelOptions["quantize"]>) => {
      using model = await load(device, { quantize });
      return (
        model.program.plan.graph.nodes.filter((node) => node.op === "quantize").length / TINY_CONFIG.num_hidden_layers
      );
    };
    // The inputs of q, k and v; of o; of gate and up; of down.
    expect(await nodes("8da4w-32")).toBe(4);
    const [row, tensor] = [parseQuantizeName("int8dq"), parseQuantizeName("int8dq-tensor")];
    expect(
      await nodes(
        new Map([
          ["re:.*q_proj", row],
          ["re:.*[kv]_proj", tensor],
        ]),
      ),
    ).toBe(2);
  });
});

describe("an abort", () => {
  test("stops within one token; the model then gives what it gave before", async () => {
    await using device = await reference();
    using model = await load(device);
    const expected = await collect(model, PROMPT);
    for (const after of [0, 1, 5]) {
      const controller = new AbortController();
      const got: GeneratedToken[] = [];
      const error = await failure(
        (async () => {
          if (after === 0) controller.abort();
          for await (const token of model.generate(PROMPT, { signal: controller.signal, ignoreEos: true })) {
            got.push(token);
            if (got.length === after) controller.abort(new Error("enough"));
          }
        })(),
      );
      expect(error.code).toBe("operation/aborted");
      expect(got).toEqual(expected.slice(0, after));
      expect(await collect(model, PROMPT)).toEqual(expected);
    }
  });

  test("that a timer fires is seen, though the reference computes without pause", async () => {
    await using device = await reference();
    using model = await load(device);
    const signal = AbortSignal.timeout(5);
    const endless = async () => {
      for (let i = 0; i < 10_000; i++) await collect(model, PROMPT, { signal, maxTokens: 40 });
    };
    expect(await failure(endless())).toMatchObject({ code: "operation/aborted" });
  });

  test("while loading leaves nothing on the device, at whatever weight it comes", async () => {
    await using device = await reference();
    const events: number[] = [];
    using whole = await load(device, { onProgress: () => void events.push(1) });
    const bytes = device.bytes;
    expect(bytes).toBeGreaterThan(whole.weightBytes);
    for (const at of [0, 1, Math.floor(events.length / 2), events.length - 2]) {
      const controller = new AbortController();
      let seen = 0;
      const onProgress = () => {
        if (seen++ >= at) controller.abort();
      };
      if (at === 0) controller.abort();
      const error = await failure(load(device, { signal: controller.signal, onProgress }));
      expect(error.code).toBe("operation/aborted");
      expect(device.bytes).toBe(bytes);
    }
  });
});

describe("one generation at a time", () => {
  test("a second one, and logits in between, are model/busy; leaving the loop frees the model", async () => {
    await using device = await reference();
    using model = await load(device);
    for await (const _ of model.generate(PROMPT)) {
      expect((await failure(collect(model, PROMPT))).code).toBe("model/busy");
      expect((await failure(model.logits([0]))).code).toBe("model/busy");
      break;
    }
    expect(await collect(model, PROMPT)).toHaveLength(12);
  });

  test("a refused argument leaves the model free", async () => {
    await using device = await reference();
    using model = await load(device);
    await failure(collect(model, PROMPT, { maxTokens: -1 }));
    expect(await collect(model, PROMPT, { maxTokens: 2 })).toHaveLength(2);
  });
});

describe("lifetime", () => {
  test("100 sessions disposed give every byte back", async () => {
    await using device = await reference();
    const folder = tinyModel();
    const sizes = new Set<number>();
    for (let i = 0; i < 100; i++) {
      using model = await load(device, { quantize: "int4wo-32" }, folder);
      for await (const _ of model.generate("a", { maxTokens: 3 })) break;
      sizes.add(device.bytes);
    }
    expect(device.bytes).toBe(0);
    expect(sizes.size).toBe(1);
  });

  test("a disposed device takes its models with it, and no more", async () => {
    const device = await reference();
    const model = await load(device);
    await device[Symbol.asyncDispose]();
    expect(device.bytes).toBe(0);
    expect((await failure(collect(model, PROMPT))).code).toBe("object/disposed");
    expect((await failure(load(device))).code).toBe("object/disposed");
    model[Symbol.dispose]();
    await device[Symbol.asyncDispose]();
  });

  test("the bytes counted are those of weights, caches and inputs", async () => {
    await using device = await reference();
    using model = await load(device, { quantize: "int8wo", context: 32 });
    const { weights, state } = model.program.plan.bytes;
    const inputs = 5 * 4;
    expect(device.bytes).toBe(weights + state + inputs);
  });
});
