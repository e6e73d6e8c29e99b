import type { CallName, Calls, Failure, Reply } from "./protocol.js";

/** An error that came out of the worker. */
export class WorkerFailure extends Error {
  readonly code: string;
  readonly hint: string | undefined;

  constructor({ code, message, hint }: Failure) {
    super(message);
    this.name = "WorkerFailure";
    this.code = code;
    this.hint = hint;
  }
}

interface Pending {
  readonly notice: (value: never) => void;
  readonly resolve: (value: never) => void;
  readonly reject: (error: Error) => void;
}

const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: "fewbit" });
const pending = new Map<number, Pending>();
let last = 0;

worker.addEventListener("message", ({ data }: MessageEvent<Reply>) => {
  const entry = pending.get(data.id);
  if (entry === undefined) return;
  if ("notice" in data) return entry.notice(data.notice as never);
  pending.delete(data.id);
  if ("error" in data) entry.reject(new WorkerFailure(data.error));
  else entry.resolve(data.result as never);
});

// A script that does not load leaves no message behind.
worker.addEventListener("error", (event) => {
  const failure = new WorkerFailure({
    code: "unexpected",
    message: event.message || "the worker's script cannot be loaded",
    hint: "reload the page",
  });
  for (const { reject } of pending.values()) reject(failure);
  pending.clear();
});

/** Calls the worker. Firing `signal` ends the call there; it then rejects with `operation/aborted`. */
export function call<Name extends CallName>(
  name: Name,
  args: Calls[Name]["args"],
  options: { readonly signal?: AbortSignal; readonly notice?: (value: Calls[Name]["notice"]) => void } = {},
): Promise<Calls[Name]["result"]> {
  const id = ++last;
  const { signal, notice = () => {} } = options;
  const done = new Promise<Calls[Name]["result"]>((resolve, reject) => {
    pending.set(id, { notice, resolve, reject });
    worker.postMessage({ id, call: name, args });
  });
  const cancel = () => worker.postMessage({ id, cancel: true });
  if (signal?.aborted) cancel();
  signal?.addEventListener("abort", cancel);
  return done.finally(() => signal?.removeEventListener("abort", cancel));
}
