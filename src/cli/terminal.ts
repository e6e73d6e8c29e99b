import pc from "picocolors";
import { FewbitError } from "../core/errors.js";

/** How a command ended. Documented in docs/cli.md. */
export const EXIT = { ok: 0, failure: 1, usage: 2, interrupted: 130 } as const;

type Colors = ReturnType<typeof pc.createColors>;

/** stdout or stderr. Colours are plain text where the stream does not show them. */
export interface Screen {
  readonly tty: boolean;
  readonly color: Colors;
  write(text: string): void;
}

/** What every command works with. */
export interface Cli {
  /** The answer: generated text, or one JSON object. */
  readonly out: Screen;
  /** Everything said about it: progress, summaries, errors. */
  readonly err: Screen;
  readonly json: boolean;
  /** Fires on Ctrl-C, and when nobody reads the output any more; `stopped` then says which. */
  readonly signal: AbortSignal;
  stopped(): "interrupted" | "closed" | null;
  /** While a handler is set, Ctrl-C calls it and stops nothing. */
  onInterrupt(handler: (() => void) | null): void;
}

/** A command line attached to this process. `restore` gives the process its signals back. */
export function attach(json: boolean): Cli & { restore(): void } {
  const controller = new AbortController();
  let stopped: "interrupted" | "closed" | null = null;
  let instead: (() => void) | null = null;
  const interrupt = () => {
    if (instead !== null) return instead();
    // The second Ctrl-C does not wait for anything.
    if (stopped === "interrupted") process.exit(EXIT.interrupted);
    stopped ??= "interrupted";
    controller.abort();
  };
  const closed = (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") throw error;
    stopped ??= "closed";
    controller.abort();
  };
  process.on("SIGINT", interrupt);
  process.stdout.on("error", closed);
  process.stderr.on("error", closed);
  return {
    out: screen(process.stdout),
    err: screen(process.stderr),
    json,
    signal: controller.signal,
    stopped: () => stopped,
    onInterrupt: (handler) => {
      instead = handler;
    },
    restore: () => void process.off("SIGINT", interrupt),
  };
}

function screen(stream: NodeJS.WriteStream): Screen {
  const { NO_COLOR, FORCE_COLOR, TERM } = process.env;
  const tty = stream.isTTY === true;
  const color = !NO_COLOR && (Boolean(FORCE_COLOR) || (tty && TERM !== "dumb"));
  return { tty, color: pc.createColors(color), write: (text) => void stream.write(text) };
}

/** Prints the one JSON object of a `--json` run. Numbers JSON has no word for become null. */
export function printJson(screen: Screen, value: unknown): void {
  screen.write(`${JSON.stringify(value)}\n`);
}

/** An error as people, or with `--json` programs, read it. */
export function printError(cli: Cli, error: unknown): void {
  const { code, message, hint, context } = described(error);
  if (cli.json) {
    printJson(cli.out, { error: { code, message, hint: hint ?? null, context } });
    return;
  }
  const { red, dim, bold } = cli.err.color;
  cli.err.write(`${red(bold("error"))} ${message} ${dim(`(${code})`)}\n`);
  if (hint !== undefined) cli.err.write(`${bold("hint")}  ${hint}\n`);
  if (!(error instanceof FewbitError) && error instanceof Error) cli.err.write(`${dim(error.stack ?? "")}\n`);
}

function described(error: unknown) {
  if (error instanceof FewbitError) return error;
  const message = error instanceof Error ? error.message : String(error);
  return { code: "internal", message, hint: "this is a bug in fewbit: please report it with this text", context: {} };
}

/** A line that rewrites itself, at most every 50 ms unless it must show; nothing unless stderr is a terminal. */
export function progressLine(cli: Cli): { show(text: string, must?: boolean): void; clear(): void } {
  const { err } = cli;
  if (!err.tty) return { show: () => {}, clear: () => {} };
  let last = Number.NEGATIVE_INFINITY;
  return {
    show(text, must = false) {
      const now = performance.now();
      if (now - last < 50 && !must) return;
      last = now;
      err.write(`\r\x1b[2K${err.color.dim(text.slice(0, (process.stderr.columns || 80) - 1))}`);
    },
    clear() {
      if (last > Number.NEGATIVE_INFINITY) err.write("\r\x1b[2K");
      last = Number.NEGATIVE_INFINITY;
    },
  };
}

/** Rows of a heading and a text; the lines of a text after its first are indented under it. */
export function table(rows: readonly (readonly [heading: string, text: string])[], { bold }: Colors): string {
  const width = Math.max(...rows.map(([heading]) => heading.length)) + 2;
  return rows
    .map(([heading, text]) => `${bold(heading.padEnd(width))}${text.replaceAll("\n", `\n${" ".repeat(width)}`)}\n`)
    .join("");
}

const DECIMAL = ["B", "kB", "MB", "GB", "TB"] as const;

/** e.g. `4.2 MB` (decimal: 1 MB is 1,000,000 bytes). */
export function showBytes(bytes: number): string {
  const power = Math.min(DECIMAL.length - 1, Math.floor(Math.log10(Math.max(bytes, 1)) / 3));
  return `${(bytes / 1000 ** power).toFixed(power === 0 ? 0 : 1)} ${DECIMAL[power]}`;
}

/** e.g. `812 us`, `36.1 ms`, `1.20 s`. */
export function showSeconds(seconds: number): string {
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(0)} us`;
  return seconds < 1 ? `${(seconds * 1e3).toFixed(1)} ms` : `${seconds.toFixed(2)} s`;
}

/** How long something still takes, e.g. `45 s`, `12 min`, `1 h 40 min`. */
export function showDuration(seconds: number): string {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** e.g. `1,024 tokens`, `1 token`. */
export function count(value: number, unit: string): string {
  return `${value.toLocaleString("en-US")} ${unit}${value === 1 ? "" : "s"}`;
}
