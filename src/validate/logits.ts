import { throwIfAborted } from "../core/errors.js";
import type { DenseTensor } from "../ir/tensor.js";
import { TOKENS } from "../models/decoder.js";
import type { Model } from "../models/model.js";
import type { TraceRun } from "./trace.js";
import { decoderRuns } from "./trace-model.js";

/** How the logits of two models differ after the same tokens. */
export interface LogitDifference {
  /** The number of tokens that these logits follow. */
  readonly position: number;
  /** The largest difference of two logits; NaN where only one of them is a number. */
  readonly worst: number;
  /** The largest magnitude of B's logits, to compare `worst` with. */
  readonly range: number;
  /** The most likely token of each. */
  readonly best: readonly [a: number, b: number];
}

/**
 * Runs two models over the same tokens, the prompt and then token by token, and compares their logits after the prompt and after
 * each token. Throws `operation/aborted`, `device/lost`.
 */
export async function* logitDifferences(
  a: Model,
  b: Model,
  prompt: readonly number[],
  tokens: readonly number[],
  signal?: AbortSignal,
): AsyncGenerator<LogitDifference> {
  const chunk = Math.min(...[a, b].map(({ program }) => program.plan.graph.symbols[TOKENS] as number));
  let position = 0;
  for (const run of decoderRuns(prompt, tokens, chunk)) {
    throwIfAborted(signal, "comparing logits");
    const both = [await logitsOf(a, run), await logitsOf(b, run)] as const;
    position += run.symbols[TOKENS] as number;
    if (position >= prompt.length) yield { position, ...compareLogits(...both) };
  }
}

async function logitsOf({ program: { executable } }: Model, { symbols, inputs }: TraceRun): Promise<Float32Array> {
  for (const [name, tensor] of Object.entries(inputs)) executable.write(name, tensor);
  executable.submit(symbols);
  return ((await executable.read("logits")) as DenseTensor).data as Float32Array;
}

function compareLogits(a: Float32Array, b: Float32Array): Omit<LogitDifference, "position"> {
  let [worst, range] = [0, 0];
  for (const [i, value] of b.entries()) {
    // Math.max keeps a NaN.
    worst = Math.max(worst, Object.is(a[i], value) ? 0 : Math.abs((a[i] as number) - value));
    range = Math.max(range, Math.abs(value));
  }
  return { worst, range, best: [argmax(a), argmax(b)] };
}

const argmax = (values: Float32Array): number =>
  values.reduce((best, value, i) => (value > (values[best] as number) ? i : best), 0);
