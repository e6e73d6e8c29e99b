import { throwIfAborted } from "../core/errors.js";
import type { DenseTensor } from "../ir/tensor.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import type { Choice, Mixture } from "./autoquant-search.js";
import { PAST, TOKENS } from "./decoder.js";
import { textWindows } from "./evaluate.js";
import { loadDecoder, type ModelFolder } from "./load.js";
import type { PieceOptions } from "./pieces.js";
import type { Replacement } from "./weights.js";

/** Windows that a probe runs. A divergence needs far fewer tokens than a difference of losses: no token of it is below zero on average. */
const WINDOWS = 2;

/** Layers of one kind (all q, all down, ...) are probed in so many groups of neighbours at most: each probe loads the model once. */
const GROUPS = 8;

/** The most that a probed layer's outputs are off by, where there is a choice: what a layer costs grows with its error up to about there. */
const PROBE_ERROR = 0.1;

export interface InfluenceOptions extends PieceOptions {
  readonly context: number;
  /** What loads the model with some layers quantized. */
  readonly load: (mixture: Mixture) => {
    readonly quantize: ReadonlyMap<string, QuantizeConfig | null>;
    readonly replace: Replacement;
  };
  readonly onProgress?: (what: string) => void;
}

/**
 * The same choices with errors as they reach the model's predictions: in nats a token, by the Kullback-Leibler divergence of the whole
 * model with the layer (and neighbours of its kind) quantized from the model without, in proportion to the error of the layer's outputs.
 * An equal error costs ten times more in one layer than in another.
 */
export async function weighErrors(
  folder: ModelFolder,
  ids: readonly number[],
  layers: ReadonlyMap<string, readonly Choice[]>,
  { device, context, load, signal, onProgress }: InfluenceOptions,
): Promise<ReadonlyMap<string, readonly Choice[]>> {
  const plain = new Map([...layers].map(([layer, choices]) => [layer, accurate(choices)]));
  const logits = async (mixture: Mixture): Promise<readonly Float32Array[]> => {
    throwIfAborted(signal, "autoquant");
    const abort = signal === undefined ? {} : { signal };
    const settings = { device, context, prefillChunk: context, ...load(mixture), ...abort };
    const { program, tokenizer, capacity } = await loadDecoder(folder, settings, "all");
    try {
      const windows = textWindows(ids, { context: capacity, bos: tokenizer.bosId }).slice(0, WINDOWS);
      const all: Float32Array[] = [];
      for (const window of windows) {
        const tokens = window.ids.length;
        program.executable.write("ids", { dtype: "i32", shape: [tokens], data: Int32Array.from(window.ids) });
        program.executable.submit({ [TOKENS]: tokens, [PAST]: 0 });
        all.push(((await program.executable.read("logits")) as DenseTensor).data as Float32Array);
      }
      return all;
    } finally {
      program[Symbol.dispose]();
    }
  };
  const expected = await logits(plain);
  const weighed = new Map(layers);
  const groups = groupsOf([...layers.keys()]);
  for (const [i, group] of groups.entries()) {
    onProgress?.(`measuring the influence of layers: ${i + 1} of ${groups.length}`);
    const probe = new Map(group.map((layer) => [layer, coarse(layers.get(layer) as readonly Choice[])]));
    const error = [...probe.values()].reduce((sum, choice) => sum + choice.error, 0);
    if (error === 0) continue;
    const got = await logits(new Map([...plain, ...probe]));
    const tokens = got.length * context;
    const nats = got.reduce(
      (sum, part, window) => sum + divergence(expected[window] as Float32Array, part, context),
      0,
    );
    const influence = nats / tokens / error;
    for (const layer of group)
      weighed.set(
        layer,
        (layers.get(layer) as readonly Choice[]).map((choice) => ({ ...choice, error: choice.error * influence })),
      );
  }
  return weighed;
}

const accurate = (choices: readonly Choice[]) => choices.reduce((a, b) => (b.error < a.error ? b : a));

/** The choice with the greatest error that is not too great. */
function coarse(choices: readonly Choice[]): Choice {
  const fine = choices.filter(({ error }) => error <= PROBE_ERROR);
  return fine.reduce((a, b) => (b.error > a.error ? b : a), accurate(choices));
}

/** Layers of one kind in groups of neighbours: the kind is the name without its numbers. */
function groupsOf(layers: readonly string[]): string[][] {
  const kinds = new Map<string, string[]>();
  for (const layer of layers) {
    const kind = layer.replace(/\d+/g, "");
    kinds.set(kind, [...(kinds.get(kind) ?? []), layer]);
  }
  return [...kinds.values()].flatMap((all) => {
    const size = Math.ceil(all.length / GROUPS);
    return Array.from({ length: Math.ceil(all.length / size) }, (_, i) => all.slice(i * size, (i + 1) * size));
  });
}

/** The Kullback-Leibler divergence, in nats, of what logits [tokens, V] say from what they should say, summed over tokens. */
function divergence(expected: Float32Array, got: Float32Array, tokens: number): number {
  const vocabulary = expected.length / tokens;
  const logMass = (logits: Float32Array, begin: number) => {
    let top = Number.NEGATIVE_INFINITY;
    for (let i = 0; i < vocabulary; i++) top = Math.max(top, logits[begin + i] as number);
    let mass = 0;
    for (let i = 0; i < vocabulary; i++) mass += Math.exp((logits[begin + i] as number) - top);
    return top + Math.log(mass);
  };
  let nats = 0;
  for (let begin = 0; begin < expected.length; begin += vocabulary) {
    const [p, q] = [logMass(expected, begin), logMass(got, begin)];
    for (let i = begin; i < begin + vocabulary; i++) {
      const log = (expected[i] as number) - p;
      nats += Math.exp(log) * (log - (got[i] as number) + q);
    }
  }
  return nats;
}
