import { expect, test } from "vitest";
import { measureLinears } from "../../src/models/autoquant-choices.js";
import { weighErrors } from "../../src/models/autoquant-influence.js";
import type { Choice, Mixture } from "../../src/models/autoquant-search.js";
import { textWindows } from "../../src/models/evaluate.js";
import { parseQuantizeName } from "../../src/quantize/names.js";
import { load, reference } from "../support/generate.js";
import { tinyModel } from "../support/tiny-model.js";

const CONTEXT = 16;
const ids = Array.from({ length: 40 }, (_, i) => 2 + ((i * 37) % 250));
const LAYERS = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"];

/** Log-probabilities of every token after each of a window's, from runs of one prefix at a time. */
async function predictions(quantize: ReadonlyMap<string, ReturnType<typeof parseQuantizeName>>): Promise<number[][]> {
  await using device = await reference();
  using model = await load(device, { quantize });
  const all: number[][] = [];
  for (const window of textWindows(ids, { context: CONTEXT, bos: model.tokenizer.bosId })) {
    for (let length = 1; length <= CONTEXT; length++) {
      const logits = [...(await model.logits(window.ids.slice(0, length)))];
      const mass = Math.log(logits.reduce((sum, x) => sum + Math.exp(x), 0));
      all.push(logits.map((x) => x - mass));
    }
  }
  return all;
}

test("an error is weighed by the divergence from the unquantized model that it makes", async () => {
  await using device = await reference();
  const names = ["none", "int8wo", "intx4wo-32"];
  const configs = new Map(names.map((name) => [name, parseQuantizeName(name)]));
  const { layers, replacement } = await measureLinears(tinyModel(), ids, configs, { device, context: CONTEXT });
  const calls: Mixture[] = [];
  const weighed = await weighErrors(tinyModel(), ids, layers, {
    device,
    context: CONTEXT,
    load: (mixture) => {
      calls.push(mixture);
      const quantize = new Map([...mixture].map(([layer, { name }]) => [layer, configs.get(name) ?? null]));
      return { quantize, replace: replacement(mixture) };
    },
  });
  // The model as it is, and each of its fourteen linears: two layers have no neighbours to share a probe with.
  expect(calls.length).toBe(1 + layers.size);
  const plain = await predictions(new Map());
  for (const layer of LAYERS) {
    const changed = await predictions(new Map([[layer, parseQuantizeName("intx4wo-32")]]));
    const nats = plain.map((row, i) =>
      row.reduce((sum, log, j) => sum + Math.exp(log) * (log - ((changed[i] as number[])[j] as number)), 0),
    );
    const divergence = nats.reduce((a, b) => a + b, 0) / nats.length;
    const [before, after] = [layers, weighed].map((all) => all.get(layer) as readonly Choice[]);
    const of = (choices: readonly Choice[] | undefined, name: string) =>
      choices?.find((choice) => choice.name === name)?.error as number;
    // The reference gives the same logits for a prefix and within a window; what is left are float64 sums over the vocabulary.
    const rounding = 258 * 8 * 2 ** -53;
    expect(divergence).toBeGreaterThan(1000 * rounding);
    expect(Math.abs(of(after, "intx4wo-32") - divergence)).toBeLessThan(4 * rounding);
    // All choices of a layer are weighed alike, and nothing but the error is.
    const ratio = of(after, "intx4wo-32") / of(before, "intx4wo-32");
    expect(of(after, "int8wo")).toBeCloseTo(of(before, "int8wo") * ratio, 12);
    expect(of(after, "none")).toBe(0);
    expect(after?.map(({ name, bytes, seconds }) => [name, bytes, seconds])).toEqual(
      before?.map(({ name, bytes, seconds }) => [name, bytes, seconds]),
    );
  }
}, 60_000);
