/** Text that is watched for stop strings as it comes. */
export interface StopScanner {
  /** What can be shown now: a piece that may become a stop string is held back, and nothing from a stop string on is shown. */
  push(text: string): string;
  /** The rest, when no more text comes. */
  flush(): string;
  /** Whether a stop string was met. */
  readonly stopped: boolean;
}

/** Watches for the first of `stops` in a text that comes piece by piece. Empty strings never stop. */
export function stopScanner(stops: readonly string[]): StopScanner {
  const wanted = stops.filter((stop) => stop !== "");
  let held = "";
  let stopped = false;
  return {
    push(text) {
      if (stopped) return "";
      held += text;
      const found = wanted.map((stop) => held.indexOf(stop)).filter((at) => at >= 0);
      stopped = found.length > 0;
      const shown = stopped ? Math.min(...found) : held.length - openEnd(held, wanted);
      const piece = held.slice(0, shown);
      held = stopped ? "" : held.slice(shown);
      return piece;
    },
    flush() {
      const rest = held;
      held = "";
      return rest;
    },
    get stopped() {
      return stopped;
    },
  };
}

/** The length of the longest end of `text` that a stop string begins with. */
function openEnd(text: string, stops: readonly string[]): number {
  const longest = Math.min(text.length, Math.max(0, ...stops.map((stop) => stop.length - 1)));
  for (let length = longest; length > 0; length--) {
    if (stops.some((stop) => stop.startsWith(text.slice(-length)))) return length;
  }
  return 0;
}
