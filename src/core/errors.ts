/**
 * One error class, a closed set of codes. Every code has a message here, so a code without a message does not compile;
 * the message's parameter is the code's context, so a context with a missing field does not compile either.
 */
const MESSAGES = {
  "argument/invalid": (c: { name: string; value: unknown; expected: string }) =>
    `${c.name} is ${show(c.value)}: expected ${c.expected}`,
  "argument/unknown-name": (c: { kind: string; name: string; nearest: readonly string[] }) =>
    `unknown ${c.kind} "${c.name}"${c.nearest.length > 0 ? `: did you mean ${c.nearest.join(", ")}?` : ""}`,
  "operation/aborted": (c: { operation: string }) => `${c.operation} was aborted`,
  "object/disposed": (c: { object: string }) => `${c.object} was disposed`,
  "shape/mismatch": (c: { what: string; got: readonly unknown[]; expected: string }) =>
    `${c.what} has shape [${c.got.join(", ")}]: expected ${c.expected}`,
  "dtype/mismatch": (c: { what: string; got: string; expected: string }) =>
    `${c.what} has dtype ${c.got}: expected ${c.expected}`,
  "format/invalid-row": (c: { format: string; reason: string }) =>
    `format row ${c.format} is inconsistent: ${c.reason}`,
  "format/block": (c: { format: string; size: number; block: number; axis: string; nearest: number }) =>
    `${c.format}: ${c.axis} = ${c.size} is not a multiple of its block ${c.block}; nearest legal ${c.axis} is ${c.nearest}`,
  "quantize/unsupported": (c: { config: string; reason: string }) => `${c.config}: ${c.reason}`,
  "quantize/layer": (c: { layer: string; config: string; reason: string }) =>
    `layer ${c.layer} cannot be quantized with ${c.config}: ${c.reason}`,
  "graph/invalid": (c: { where: string; reason: string }) => `graph is invalid at ${c.where}: ${c.reason}`,
  "plan/no-kernel": (c: { step: string; explanation: string }) => `no kernel can run ${c.step}\n${c.explanation}`,
  "plan/memory": (c: { needed: number; limit: number; what: string }) =>
    `${c.what} needs ${c.needed} bytes, the device allows ${c.limit}`,
  "device/unavailable": (c: { backend: string; reason: string }) => `no ${c.backend} device: ${c.reason}`,
  "device/lost": (c: { reason: string }) => `the device was lost: ${c.reason}`,
  "device/error": (c: { operation: string; reason: string }) =>
    `the device reported an error in ${c.operation}: ${c.reason}`,
  "build/addon-mismatch": (c: { entries: readonly string[] }) =>
    `the native addon does not fit this version: ${c.entries.join(", ")}`,
  "shader/compile": (c: { kernel: string; messages: string }) => `WGSL of ${c.kernel} does not compile:\n${c.messages}`,
  "io/not-found": (c: { path: string; reason: string }) => `cannot read ${c.path}: ${c.reason}`,
  "io/failed": (c: { path: string; reason: string }) => `${c.path}: ${c.reason}`,
  "io/malformed": (c: { path: string; reason: string }) => `${c.path} is malformed: ${c.reason}`,
  "model/unsupported": (c: { what: string; value: string; supported: readonly string[] }) =>
    `${c.what} "${c.value}" is not supported (supported: ${c.supported.join(", ")})`,
  "model/config": (c: { field: string; value: unknown; expected: string }) =>
    `config.json: ${c.field} is ${show(c.value)}: expected ${c.expected}`,
  "model/missing-tensor": (c: { name: string; path: string }) => `${c.path} has no tensor "${c.name}"`,
  "model/context-length": (c: { tokens: number; limit: number }) =>
    `${c.tokens} tokens do not fit the context of ${c.limit}`,
  "model/busy": (_: Record<string, never>) => "the model is generating already: one generation runs at a time",
  "cache/overflow": (c: { needed: number; capacity: number }) =>
    `the KV cache holds ${c.capacity} tokens, ${c.needed} are needed`,
  "validate/failed": (c: { failed: number; total: number }) => `${c.failed} of ${c.total} cases failed`,
} as const satisfies Record<string, (context: never) => string>;

/** Every code a FewbitError can carry. */
export type ErrorCode = keyof typeof MESSAGES;
/** The structured facts that come with an error of code `C`. */
export type ErrorContext<C extends ErrorCode> = Parameters<(typeof MESSAGES)[C]>[0];

/** The only error fewbit throws on purpose. `code` is stable; `hint`, when present, says what to do next. */
export class FewbitError<C extends ErrorCode = ErrorCode> extends Error {
  readonly code: C;
  readonly context: ErrorContext<C>;
  readonly hint: string | undefined;

  constructor(code: C, context: ErrorContext<C>, options: { hint?: string; cause?: unknown } = {}) {
    const message = (MESSAGES[code] as (c: ErrorContext<C>) => string)(context);
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = "FewbitError";
    this.code = code;
    this.context = context;
    this.hint = options.hint;
  }
}

/** Throws `operation/aborted` (with the signal's reason as cause) once `signal` has fired. */
export function throwIfAborted(signal: AbortSignal | undefined, operation: string): void {
  if (signal?.aborted) throw new FewbitError("operation/aborted", { operation }, { cause: signal.reason });
}

/** The up to `count` legal names nearest to `name` by edit distance, for messages. */
export function nearestNames(name: string, legal: readonly string[], count = 5): string[] {
  return legal
    .map((candidate) => ({ candidate, distance: editDistance(name.toLowerCase(), candidate.toLowerCase()) }))
    .sort((a, b) => a.distance - b.distance || a.candidate.localeCompare(b.candidate))
    .slice(0, count)
    .map((entry) => entry.candidate);
}

function editDistance(a: string, b: string): number {
  let previous = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const current = [i];
    for (let j = 1; j <= b.length; j++) {
      const substitute = (previous[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1);
      current.push(Math.min(substitute, (previous[j] as number) + 1, (current[j - 1] as number) + 1));
    }
    previous = current;
  }
  return previous[b.length] as number;
}

function show(value: unknown): string {
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}
