import { f32FromBits } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { ModelFolder } from "../io/model-folder.js";
import {
  adjustLogits,
  checkLogitSettings,
  checkSettings,
  type LogitSettings,
  leavesLogits,
  logProbability,
  packSettings,
  type SampleSettings,
  sampleToken,
} from "../ir/sample.js";
import type { DenseTensor } from "../ir/tensor.js";
import type { Program } from "../runtime/device.js";
import { stopScanner } from "../text/stop.js";
import type { Tokenizer } from "../text/tokenizer.js";
import type { DecoderConfig } from "./config.js";
import { PAST, TOKENS } from "./decoder.js";
import { type LoadModelOptions, loadDecoder } from "./load.js";

export interface GenerateOptions extends Partial<Omit<SampleSettings, "step">>, Partial<LogitSettings> {
  /** Tokens to make at most (default 64). */
  readonly maxTokens?: number;
  readonly signal?: AbortSignal;
  /** Go on after an end-of-text token (default false). */
  readonly ignoreEos?: boolean;
  /** The text ends before the first of these strings. */
  readonly stop?: readonly string[];
  /**
   * Keep what the KV cache holds of the prompt from the generation before and run only the rest (default false). A prompt that is run in
   * other pieces may differ in its last bits, and per-tensor activation scales are those of a piece.
   */
  readonly reuseCache?: boolean;
}

/** Why a generation ended: `length` (maxTokens, or the context is full), `eos` (an end-of-text token), `stop` (a stop string). */
export type FinishReason = "length" | "eos" | "stop";

/** One generated token. `text` is what can be shown so far: characters split over tokens come with their last one. */
export interface GeneratedToken {
  readonly id: number;
  readonly text: string;
  /** Natural logarithm of the token's probability under the untempered softmax. */
  readonly logprob: number;
}

export interface GenerateStatistics {
  /** Null when it was aborted, or the caller left. */
  readonly finish: FinishReason | null;
  readonly promptTokens: number;
  /** Those of them that were in the KV cache already. */
  readonly cachedTokens: number;
  readonly promptSeconds: number;
  readonly tokens: number;
  readonly decodeSeconds: number;
  readonly decodeDispatches: number;
  readonly encodeSeconds: number;
}

/**
 * Loads a model folder (Hugging Face `config.json`, `tokenizer.json`, `tokenizer_config.json`, safetensors) onto a device,
 * quantizing layer by layer. Throws coded errors for anything missing, malformed or unsupported; nothing stays loaded then.
 */
export async function loadModel(folder: ModelFolder, options: LoadModelOptions): Promise<Model> {
  const { config, tokenizer, program, capacity, maxTokens } = await loadDecoder(folder, options, "last");
  return new Model(config, tokenizer, program, capacity, maxTokens);
}

/** A model on a device. One generation runs at a time. */
export class Model implements Disposable {
  readonly config: DecoderConfig;
  readonly tokenizer: Tokenizer;
  readonly program: Program;
  /** Tokens that prompt and answer may have together. */
  readonly capacity: number;
  readonly #chunk: number;
  #busy = false;
  /** Tokens whose keys and values are in the cache. */
  #cached: number[] = [];
  #statistics: GenerateStatistics | null = null;

  constructor(config: DecoderConfig, tokenizer: Tokenizer, program: Program, capacity: number, chunk: number) {
    this.config = config;
    this.tokenizer = tokenizer;
    this.program = program;
    this.capacity = capacity;
    this.#chunk = chunk;
  }

  /** Bytes of all weights as they are stored. */
  get weightBytes(): number {
    return this.program.plan.bytes.weights;
  }

  /** Times and counts of the last finished or stopped generation. */
  get statistics(): GenerateStatistics | null {
    return this.#statistics;
  }

  /**
   * Generates text after `prompt`, token by token. Leaving the loop or firing `signal` stops within one token; the model can be
   * used again. Throws `argument/invalid`, `model/context-length` (a prompt that leaves no room), `model/busy`,
   * `operation/aborted`, `device/lost`.
   */
  async *generate(prompt: string | readonly number[], options: GenerateOptions = {}): AsyncGenerator<GeneratedToken> {
    const ids = typeof prompt === "string" ? this.tokenizer.encode(prompt) : [...prompt];
    const maxTokens = options.maxTokens ?? 64;
    if (!Number.isInteger(maxTokens) || maxTokens < 0) {
      throw new FewbitError("argument/invalid", {
        name: "maxTokens",
        value: maxTokens,
        expected: "a non-negative integer",
      });
    }
    const { temperature = 0, topK = 0, topP = 1, seed = 0, repetitionPenalty = 1, minP = 0 } = options;
    const settings = { temperature, topK, topP, seed, step: 0 };
    checkSettings(settings);
    checkLogitSettings({ repetitionPenalty, minP });
    this.#checkPrompt(ids);
    if (this.#busy) throw new FewbitError("model/busy", {});
    this.#busy = true;
    try {
      yield* this.#run(ids, maxTokens, settings, options);
    } finally {
      this.#busy = false;
    }
  }

  /** The logits f32 [V] after `ids`, computed afresh. Throws `argument/invalid`, `model/context-length`, `model/busy`. */
  async logits(ids: readonly number[]): Promise<Float32Array> {
    this.#checkPrompt(ids);
    if (this.#busy) throw new FewbitError("model/busy", {});
    this.#prefill(ids, 0, { temperature: 0, topK: 0, topP: 1, seed: 0, step: 0 });
    return ((await this.program.executable.read("logits")) as DenseTensor).data as Float32Array;
  }

  explain(): string {
    return this.program.explain();
  }

  [Symbol.dispose](): void {
    this.program[Symbol.dispose]();
  }

  async *#run(
    prompt: readonly number[],
    maxTokens: number,
    settings: SampleSettings,
    options: GenerateOptions,
  ): AsyncGenerator<GeneratedToken> {
    const { signal, ignoreEos = false, stop = [], reuseCache = false, repetitionPenalty = 1, minP = 0 } = options;
    throwIfAborted(signal, "generation");
    const { executable } = this.program;
    const ends = new Set(ignoreEos ? [] : [...this.config.eosIds, ...this.tokenizer.eosIds]);
    const stream = this.tokenizer.stream();
    const scanner = stopScanner(stop);
    const logitSettings = { repetitionPenalty, minP };
    const seen = new Set(repetitionPenalty === 1 ? [] : prompt);
    const start = performance.now();
    const limit = Math.min(maxTokens, this.capacity - prompt.length + 1);
    const cachedTokens = reuseCache ? this.#cachedPrefix(prompt) : 0;
    let finish: FinishReason | null = limit > 0 ? null : "length";
    let promptSeconds = 0;
    let tokens = 0;
    let previous = 0;
    // The device draws the token and reads it itself: the next run can be on its way before the host has seen it.
    const draws = leavesLogits(logitSettings);
    const overlaps = draws && executable.overlaps === true;
    // Counted up to the last token given: a run that an abort overtakes is left out.
    let before = executable.statistics;
    let after = before;
    try {
      if (limit > 0) this.#prefill(prompt, cachedTokens, settings);
      for (let step = 0; step < limit; step++) {
        if (step > 0 && !overlaps) this.#next(prompt.length, { ...settings, step });
        const counted = executable.statistics;
        const ahead = overlaps && step + 1 < limit;
        const [{ id, logprob }] = await Promise.all([
          draws ? this.#drawn() : this.#draw(seen, logitSettings, { ...settings, step }),
          ahead ? this.#ahead(prompt.length, { ...settings, step: step + 1 }) : null,
        ]);
        if (step > 0) this.#cached.push(previous);
        if (step === 0) {
          promptSeconds = (performance.now() - start) / 1000;
          before = counted;
        }
        throwIfAborted(signal, "generation");
        tokens++;
        after = counted;
        const piece = scanner.push(ends.has(id) ? stream.flush() : stream.push(id));
        if (scanner.stopped) finish = "stop";
        else if (ends.has(id)) finish = "eos";
        else if (step + 1 === limit) finish = "length";
        const rest = finish === null || scanner.stopped ? "" : scanner.push(stream.flush()) + scanner.flush();
        yield { id, text: piece + rest, logprob };
        if (finish !== null) return;
        previous = id;
        if (repetitionPenalty !== 1) seen.add(id);
        throwIfAborted(signal, "generation");
      }
    } finally {
      this.#statistics = {
        finish,
        promptTokens: prompt.length,
        cachedTokens,
        promptSeconds,
        tokens,
        decodeSeconds: (performance.now() - start) / 1000 - promptSeconds,
        decodeDispatches: after.dispatches - before.dispatches,
        encodeSeconds: after.encodeSeconds - before.encodeSeconds,
      };
    }
  }

  /** Runs the token that was drawn last; `settings.step` counts from the prompt. */
  #next(promptLength: number, settings: SampleSettings): void {
    const { executable } = this.program;
    executable.write("settings", settingsTensor(settings));
    executable.submit({ [TOKENS]: 1, [PAST]: promptLength + settings.step - 1 });
  }

  /** `#next` as a promise, so that what it throws is awaited with the token that is being read. */
  async #ahead(promptLength: number, settings: SampleSettings): Promise<void> {
    this.#next(promptLength, settings);
  }

  /** The token that the device drew: eight bytes. */
  async #drawn(): Promise<{ id: number; logprob: number }> {
    const sampled = ((await this.program.executable.read("sampled")) as DenseTensor).data;
    return { id: sampled[0] as number, logprob: f32FromBits(sampled[1] as number) };
  }

  /** Draws on the host from logits that the device's sampler does not know how to adjust: a readback of all logits a token. */
  async #draw(seen: ReadonlySet<number>, logitSettings: LogitSettings, settings: SampleSettings) {
    const { executable } = this.program;
    const logits = ((await executable.read("logits")) as DenseTensor).data as Float32Array;
    const { id } = sampleToken(adjustLogits(logits, seen, logitSettings, settings.temperature), settings);
    executable.write("ids", { dtype: "i32", shape: [1], data: Int32Array.of(id) });
    return { id, logprob: logProbability(logits, id) };
  }

  /** How many of the first `ids` the cache holds; not the last, whose run gives the logits. */
  #cachedPrefix(ids: readonly number[]): number {
    const cached = this.#cached;
    let length = 0;
    while (length < ids.length - 1 && length < cached.length && ids[length] === cached[length]) length++;
    // A ring may have given the slots of earlier tokens to later ones.
    const ring = this.program.plan.graph.nodes.some((node) => node.op === "kv_write" && node.attrs.ring);
    return ring && length < cached.length ? 0 : length;
  }

  /** Runs ids from position `from` on through the cache; the last run draws from its last token. */
  #prefill(ids: readonly number[], from: number, settings: SampleSettings): void {
    const { executable } = this.program;
    executable.write("settings", settingsTensor(settings));
    this.#cached = ids.slice(0, from);
    for (let begin = from; begin < ids.length; begin += this.#chunk) {
      const part = Int32Array.from(ids.slice(begin, begin + this.#chunk));
      executable.write("ids", { dtype: "i32", shape: [part.length], data: part });
      executable.submit({ [TOKENS]: part.length, [PAST]: begin });
    }
    this.#cached = [...ids];
  }

  #checkPrompt(ids: readonly number[]): void {
    if (ids.length === 0)
      throw new FewbitError("argument/invalid", { name: "prompt", value: "", expected: "at least one token" });
    if (ids.length > this.capacity)
      throw new FewbitError("model/context-length", { tokens: ids.length, limit: this.capacity });
    for (const id of ids) {
      if (!Number.isInteger(id) || id < 0 || id >= this.config.vocabSize) {
        throw new FewbitError("argument/invalid", {
          name: "token id",
          value: id,
          expected: `an integer from 0 to ${this.config.vocabSize - 1}`,
        });
      }
    }
  }
}

function settingsTensor(settings: SampleSettings): DenseTensor {
  return { dtype: "u32", shape: [5], data: packSettings(settings) };
}
