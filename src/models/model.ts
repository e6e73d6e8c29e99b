import { f32FromBits } from "../core/dtype.js";
import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { Format } from "../formats/format.js";
import { openCheckpoint } from "../io/checkpoint.js";
import { type MemoryInput, openDirectory, readJson } from "../io/source.js";
import { checkSettings, packSettings, type SampleSettings } from "../ir/sample.js";
import type { DenseTensor } from "../ir/tensor.js";
import type { QuantizeConfig } from "../quantize/configs.js";
import { parseQuantizeName } from "../quantize/names.js";
import type { Device, Program } from "../runtime/device.js";
import { loadTokenizer, type Tokenizer } from "../text/tokenizer.js";
import { type AttentionMode, withAttention } from "./attention.js";
import { type DecoderConfig, parseConfig, tensorSpecs } from "./config.js";
import { buildDecoder, decoderBuckets, PAST, ROPE_TABLE, ropeTable, TOKENS } from "./decoder.js";
import { kvFormat } from "./kvcache.js";
import { checkContext } from "./outline.js";
import { planWeights } from "./weights.js";

export interface LoadModelOptions {
  readonly device: Device;
  /** A short name such as `int4wo-64`, a config, a map of layer patterns to configs, or `none` (default). */
  readonly quantize?: string | QuantizeConfig | ReadonlyMap<string, QuantizeConfig | null> | null;
  /** Tokens that the KV cache holds; default: the model's context length. */
  readonly context?: number;
  /** Prompt tokens of one run at most (default 128): longer prompts run in several. */
  readonly prefillChunk?: number;
  /** How cached keys and values are stored: a format, or a name of `KV_FORMATS` (default none: f32). */
  readonly kv?: Format | string;
  /** `float8` computes attention in e4m3, with a cache of its own format (default auto: as the cache is stored). */
  readonly attention?: AttentionMode;
  readonly signal?: AbortSignal;
  readonly onProgress?: (progress: LoadProgress) => void;
}

export interface LoadProgress {
  readonly stage: "read" | "quantize" | "upload";
  readonly done: number;
  readonly total: number;
  readonly what: string;
}

export interface GenerateOptions extends Partial<Omit<SampleSettings, "step">> {
  /** Tokens to make at most (default 64). */
  readonly maxTokens?: number;
  readonly signal?: AbortSignal;
  /** Go on after an end-of-text token (default false). */
  readonly ignoreEos?: boolean;
}

/** One generated token. `text` is what can be shown so far: characters split over tokens come with their last one. */
export interface GeneratedToken {
  readonly id: number;
  readonly text: string;
  /** Natural logarithm of the token's probability under the untempered softmax. */
  readonly logprob: number;
}

export interface GenerateStatistics {
  readonly promptTokens: number;
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
export async function loadModel(
  folder: string | URL | ReadonlyMap<string, MemoryInput>,
  options: LoadModelOptions,
): Promise<Model> {
  const { signal, device } = options;
  const open = signal === undefined ? {} : { signal };
  const directory = await openDirectory(folder, open);
  const config = parseConfig(await readJson(directory, "config.json", open));
  const tokenizer = loadTokenizer(
    await readJson(directory, "tokenizer.json", open),
    await readJson(directory, "tokenizer_config.json", open),
  );
  const capacity = checkContext(config, options.context);
  const chunk = options.prefillChunk ?? 128;
  checkCount("prefillChunk", chunk);
  const selection =
    typeof options.quantize === "string" ? parseQuantizeName(options.quantize) : (options.quantize ?? null);
  await using checkpoint = await openCheckpoint(directory, open);
  const specs = tensorSpecs(config);
  const weights = planWeights(checkpoint, specs, selection);
  const maxTokens = Math.min(chunk, capacity);
  const { kv = "none", attention = "auto" } = options;
  const decoder = buildDecoder(config, {
    weightFormat: weights.weightFormat,
    activationFormat: weights.activationFormat,
    kvFormat: typeof kv === "string" ? kvFormat(kv) : kv,
    maxTokens,
    capacity,
    logits: "last",
  });
  const graph = withAttention(decoder, attention);
  const byName = new Map(specs.map((spec) => [spec.name, spec]));
  let loaded = 0;
  const program = await device.compile(graph, {
    buckets: decoderBuckets(capacity),
    ...open,
    weights: async (name) => {
      if (name === ROPE_TABLE)
        return { dtype: "f32", shape: [capacity, config.headDim], data: ropeTable(config, capacity) };
      const spec = byName.get(name);
      if (spec === undefined) throw new FewbitError("model/missing-tensor", { name, path: checkpoint.name });
      options.onProgress?.({ stage: "quantize", done: loaded++, total: specs.length, what: name });
      return weights.load(spec, open);
    },
    onProgress: (done, total) => options.onProgress?.({ stage: "upload", done, total, what: "weights" }),
  });
  return new Model(config, tokenizer, program, capacity, maxTokens);
}

function checkCount(name: string, value: number): void {
  if (Number.isInteger(value) && value >= 1) return;
  throw new FewbitError("argument/invalid", { name, value, expected: "a positive integer" });
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
    const { temperature = 0, topK = 0, topP = 1, seed = 0 } = options;
    const settings = { temperature, topK, topP, seed, step: 0 };
    checkSettings(settings);
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
    this.#prefill(ids, { temperature: 0, topK: 0, topP: 1, seed: 0, step: 0 });
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
    { signal, ignoreEos = false }: GenerateOptions,
  ): AsyncGenerator<GeneratedToken> {
    throwIfAborted(signal, "generation");
    const { executable } = this.program;
    const stops = new Set(ignoreEos ? [] : [...this.config.eosIds, ...this.tokenizer.eosIds]);
    const stream = this.tokenizer.stream();
    const start = performance.now();
    const limit = Math.min(maxTokens, this.capacity - prompt.length + 1);
    let promptSeconds = 0;
    let tokens = 0;
    // Counted up to the last token given: a run that an abort overtakes is left out.
    let before = executable.statistics;
    let after = before;
    const finish = () => {
      this.#statistics = {
        promptTokens: prompt.length,
        promptSeconds,
        tokens,
        decodeSeconds: (performance.now() - start) / 1000 - promptSeconds,
        decodeDispatches: after.dispatches - before.dispatches,
        encodeSeconds: after.encodeSeconds - before.encodeSeconds,
      };
    };
    try {
      if (limit > 0) this.#prefill(prompt, settings);
      for (let step = 0; step < limit; step++) {
        if (step > 0) {
          executable.write("settings", settingsTensor({ ...settings, step }));
          executable.submit({ [TOKENS]: 1, [PAST]: prompt.length + step - 1 });
        }
        const sampled = ((await executable.read("sampled")) as DenseTensor).data;
        if (step === 0) {
          promptSeconds = (performance.now() - start) / 1000;
          before = executable.statistics;
        }
        throwIfAborted(signal, "generation");
        const id = sampled[0] as number;
        tokens++;
        after = executable.statistics;
        const last = stops.has(id) || step + 1 === limit;
        const text = stops.has(id) ? stream.flush() : stream.push(id) + (last ? stream.flush() : "");
        yield { id, text, logprob: f32FromBits(sampled[1] as number) };
        if (last) return;
        throwIfAborted(signal, "generation");
      }
    } finally {
      finish();
    }
  }

  /** Runs the prompt through the cache; the last run draws from its last token. */
  #prefill(ids: readonly number[], settings: SampleSettings): void {
    const { executable } = this.program;
    executable.write("settings", settingsTensor(settings));
    for (let begin = 0; begin < ids.length; begin += this.#chunk) {
      const part = Int32Array.from(ids.slice(begin, begin + this.#chunk));
      executable.write("ids", { dtype: "i32", shape: [part.length], data: part });
      executable.submit({ [TOKENS]: part.length, [PAST]: begin });
    }
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
