import { FewbitError, throwIfAborted } from "../core/errors.js";
import type { DenseTensor } from "../ir/tensor.js";
import { typeBytes } from "../ir/tensor.js";
import { PAST, ROPE_TABLE, TOKENS } from "./decoder.js";
import { type LoadedDecoder, type LoadModelOptions, loadDecoder, type ModelFolder } from "./load.js";

/** Tokens of a window that are run at once, and those of them whose prediction counts. */
export interface Window {
  readonly ids: readonly number[];
  /** The first position of `ids` that is scored: it is predicted from those before it. At least 1. */
  readonly scoredFrom: number;
}

/**
 * Cuts a text into windows of `context` tokens. With `bos` every window starts with it and holds context - 1 tokens of the text, all of
 * them scored; without, the first token of a window is only context. Windows start `stride` tokens apart (default: they do not
 * overlap), and a token is scored once, in the first window that holds it. A tail that does not fill a window is dropped. Throws
 * `argument/invalid` for a stride beyond that, or a text shorter than one window.
 */
export function textWindows(
  ids: readonly number[],
  {
    context,
    stride,
    bos,
  }: { readonly context: number; readonly stride?: number | undefined; readonly bos: number | null },
): Window[] {
  const prefix = bos === null ? [] : [bos];
  const own = context - prefix.length;
  const step = stride ?? own;
  if (!(Number.isInteger(step) && step >= 1 && step <= own)) {
    throw new FewbitError("argument/invalid", { name: "stride", value: step, expected: `an integer from 1 to ${own}` });
  }
  if (context < 2 || ids.length < own) {
    const expected = context < 2 ? "at least 2" : `at most the ${ids.length + prefix.length} tokens of the text`;
    throw new FewbitError("argument/invalid", { name: "context", value: context, expected });
  }
  const windows: Window[] = [];
  for (let begin = 0; begin + own <= ids.length; begin += step) {
    const seen = begin === 0 ? 0 : own - step;
    windows.push({
      ids: [...prefix, ...ids.slice(begin, begin + own)],
      scoredFrom: Math.max(1, prefix.length + seen),
    });
  }
  return windows;
}

/** The summed negative log-likelihood (nats) of a window's scored tokens, and how many they are. */
export interface WindowLoss {
  readonly nll: number;
  readonly tokens: number;
}

/**
 * The loss of a window from the logits f32 [tokens, V] of its run: log-softmax and sum in float64. NaN where a logit is.
 */
export function windowLoss(logits: Float32Array, { ids, scoredFrom }: Window): WindowLoss {
  const vocabulary = logits.length / ids.length;
  let nll = 0;
  for (let t = scoredFrom; t < ids.length; t++) {
    const row = logits.subarray((t - 1) * vocabulary, t * vocabulary);
    let top = Number.NEGATIVE_INFINITY;
    // Math.max keeps a NaN.
    for (let i = 0; i < vocabulary; i++) top = Math.max(top, row[i] as number);
    let mass = 0;
    for (let i = 0; i < vocabulary; i++) mass += Math.exp((row[i] as number) - top);
    nll += top + Math.log(mass) - (row[ids[t] as number] as number);
  }
  return { nll, tokens: ids.length - scoredFrom };
}

export interface EvaluateOptions extends Omit<LoadModelOptions, "prefillChunk"> {
  /** Tokens of a window, BOS included (default: the model's context length). */
  readonly context?: number;
  /** Tokens between the starts of windows; see `textWindows`. */
  readonly stride?: number;
  /** Windows to evaluate at most (default: all). */
  readonly limit?: number;
  /** Losses of the first windows from an earlier run of the same evaluation, which goes on after them. */
  readonly done?: readonly WindowLoss[];
  /** Called after every window with its loss. */
  readonly onWindow?: (loss: WindowLoss, index: number, windows: number) => void;
}

export interface Perplexity {
  /** exp(nll / tokens). */
  readonly perplexity: number;
  /** Summed over all scored tokens, in nats. */
  readonly nll: number;
  /** Scored tokens. */
  readonly tokens: number;
  readonly windows: readonly WindowLoss[];
  /** Bytes of the weights as they are stored, scales and zero points included. */
  readonly weightBytes: number;
  /** Tokens run per second over the windows of this call, without loading; null when there was none. */
  readonly tokensPerSecond: number | null;
}

/**
 * The perplexity of a model over a text, by the protocol of docs/accuracy.md: each window is one run of batch 1 from an empty KV
 * cache, and a per-tensor activation scale is that of the window. Throws as `loadModel`, `argument/invalid`, and `operation/aborted`
 * within one window of the signal: with `onWindow` and `done` a stopped evaluation goes on where it was.
 */
export async function evaluatePerplexity(
  folder: ModelFolder,
  text: string | readonly number[],
  options: EvaluateOptions,
): Promise<Perplexity> {
  const { context, stride, limit, done = [], onWindow, signal, ...load } = options;
  const chunk = context ?? Number.MAX_SAFE_INTEGER;
  const decoder = await loadDecoder(
    folder,
    { ...load, ...(context && { context }), ...(signal && { signal }), prefillChunk: chunk },
    "all",
  );
  try {
    const { capacity, tokenizer } = decoder;
    const ids = typeof text === "string" ? tokenizer.encode(text, { addSpecialTokens: false }) : text;
    const all = textWindows(ids, { context: capacity, stride, bos: tokenizer.bosId });
    const windows = all.slice(0, limit);
    const losses = done.slice(0, windows.length);
    const first = losses.length;
    const start = performance.now();
    for (const [i, window] of windows.entries()) {
      if (i < first) continue;
      throwIfAborted(signal, "evaluating");
      const loss = windowLoss(await windowLogits(decoder, window), window);
      losses.push(loss);
      onWindow?.(loss, i, windows.length);
    }
    throwIfAborted(signal, "evaluating");
    const seconds = (performance.now() - start) / 1000;
    const [nll, tokens] = losses.reduce(([a, b], loss) => [a + loss.nll, b + loss.tokens], [0, 0]);
    const ran = (windows.length - first) * capacity;
    return {
      perplexity: Math.exp(nll / tokens),
      nll,
      tokens,
      windows: losses,
      weightBytes: checkpointBytes(decoder),
      tokensPerSecond: ran > 0 ? ran / seconds : null,
    };
  } finally {
    decoder.program[Symbol.dispose]();
  }
}

/** Logits f32 [tokens, V] of one run from an empty cache. */
async function windowLogits({ program: { executable } }: LoadedDecoder, { ids }: Window): Promise<Float32Array> {
  executable.write("ids", { dtype: "i32", shape: [ids.length], data: Int32Array.from(ids) });
  executable.submit({ [TOKENS]: ids.length, [PAST]: 0 });
  return ((await executable.read("logits")) as DenseTensor).data as Float32Array;
}

/** What a checkpoint of these weights takes: all but the table of angles, which is computed. */
function checkpointBytes({ program: { plan } }: LoadedDecoder): number {
  return plan.graph.values
    .filter(({ role, name }) => role === "weight" && !name.startsWith(ROPE_TABLE))
    .reduce((sum, { type }) => sum + typeBytes(type, plan.graph.symbols), 0);
}
