import { throwIfAborted } from "../core/errors.js";

/** Of the linears of a model: seconds for one token, bytes of their weights. */
export interface Cost {
  readonly seconds: number;
  readonly bytes: number;
}

/** What is made small: the time of one token, or the bytes of the weights. */
export type Objective = "speed" | "size";

/** One way to do one linear. */
export interface Choice extends Cost {
  /** The name of its config. */
  readonly name: string;
  /** What it is expected to add to the model's loss, in nats a token. */
  readonly error: number;
}

/** A choice for every linear, by layer. */
export type Mixture = ReadonlyMap<string, Choice>;

/** A mixture whose loss was measured with the whole model, in nats a token. */
export interface Candidate extends Cost {
  readonly mixture: Mixture;
  readonly loss: number;
}

/** The loss of a model with a mixture, in nats a token. */
export type Loss = (mixture: Mixture, what: string) => Promise<number>;

export interface SearchOptions {
  readonly objective: Objective;
  /** The loss without quantization, and what may be added to it, in nats a token. */
  readonly unquantized: number;
  readonly limit: number;
  /** Every config alone, one of them within the limit. */
  readonly singles: readonly Candidate[];
  readonly loss: Loss;
  readonly signal?: AbortSignal;
}

/** A share of the cost that is not worth measuring another mixture for. */
const PRECISION = 0.003;

export async function candidate(mixture: Mixture, loss: Loss, what: string): Promise<Candidate> {
  const [seconds, bytes] = [sum(mixture, (choice) => choice.seconds), sum(mixture, (choice) => choice.bytes)];
  return { mixture, loss: await loss(mixture, what), seconds, bytes };
}

/**
 * The cheapest sound candidate that is found. Sound is one whose loss is within the limit and that no single of no more bytes beats.
 * The most accurate single is sound, so there always is one. The search starts from the singles: the cheapest sound one is what a
 * mixture has to undercut. It goes two ways of mixtures from cheap to accurate: one up to that single, and one that owes nothing to it.
 */
export async function search(
  layers: ReadonlyMap<string, readonly Choice[]>,
  { objective, unquantized, limit, singles, loss, signal }: SearchOptions,
): Promise<Candidate> {
  const costOf = (cost: Cost) => (objective === "speed" ? cost.seconds : cost.bytes);
  const within = (one: Candidate) => one.loss <= unquantized + limit;
  const sound = (one: Candidate) => within(one) && !singles.some((single) => beats(single, one));
  const cheaper = (a: Candidate, b: Candidate) =>
    costOf(a) - costOf(b) || a.loss - b.loss || a.bytes - b.bytes || a.seconds - b.seconds;
  const start = singles.filter(sound).sort(cheaper)[0] as Candidate;
  const found = [start];
  const ways = { "below the best single": wayDown(start.mixture, layers, costOf), free: wayUp(layers, costOf) };
  for (const [name, way] of Object.entries(ways)) {
    const measured = new Map<number, Candidate>();
    const measure = async (index: number): Promise<Candidate> => {
      throwIfAborted(signal, "autoquant");
      const what = `mixture ${index + 1} of ${way.length}, ${name}`;
      const one = measured.get(index) ?? (await candidate(way[index] as Mixture, loss, what));
      measured.set(index, one);
      return one;
    };
    const expected = way.map((mixture) => sum(mixture, ({ error }) => error));
    const costs = way.map((mixture) => sum(mixture, costOf));
    /** The first mixture of the way that is accepted, if those after it all are. */
    const first = async (accept: (one: Candidate) => boolean): Promise<Candidate | undefined> => {
      let best: Candidate | undefined;
      let [low, high] = [0, way.length - 1];
      let scale = 1;
      for (let i = 1; low <= high; i++) {
        // What is expected tells where to look; every sixth time the range is halved, for it may be wrong.
        const guess = expected.findIndex((nats, index) => index >= low && nats * scale <= limit);
        const at = i % 6 === 0 || guess < 0 ? (low + high) >> 1 : Math.min(guess, high);
        const one = await measure(at);
        if (one.loss > unquantized)
          scale = (one.loss - unquantized) / Math.max(expected[at] as number, Number.MIN_VALUE);
        // Neighbours that cost the same but for PRECISION are not worth measuring.
        if (accept(one)) {
          best = one;
          for (high = at - 1; high >= low && (costs[high] as number) > (1 - PRECISION) * costOf(one); high--);
        } else for (low = at + 1; low <= high && (costs[low] as number) < (1 + PRECISION) * costOf(one); low++);
      }
      return best;
    };
    const cheapest = await first(within);
    // A single that is smaller may be more accurate than the cheapest mixture: then a more accurate one is looked for.
    if (cheapest !== undefined && !sound(cheapest)) await first(sound);
    found.push(...[...measured.values()].filter(sound));
  }
  return found.sort(cheaper)[0] as Candidate;
}

const sum = (mixture: Mixture, of: (choice: Choice) => number) =>
  [...mixture.values()].reduce((total, choice) => total + of(choice), 0);

/** Whether `a` has less loss with no more bytes. */
const beats = (a: Candidate, b: Candidate) => a.bytes <= b.bytes && a.loss < b.loss;

/**
 * Mixtures from the cheapest to the most accurate: those that minimize cost + weight * error for some weight of the error. From each,
 * the next is the one exchange of a layer's choice that lowers the error most for its cost.
 */
function wayUp(layers: ReadonlyMap<string, readonly Choice[]>, costOf: (choice: Choice) => number): readonly Mixture[] {
  const start = new Map(
    [...layers].map(([layer, choices]) => {
      const cheapest = choices.reduce((a, b) =>
        costOf(b) < costOf(a) || (costOf(b) === costOf(a) && b.error < a.error) ? b : a,
      );
      return [layer, cheapest] as const;
    }),
  );
  return exchanges(start, layers, (now, next) => {
    if (next.error >= now.error) return null;
    return (now.error - next.error) / Math.max(costOf(next) - costOf(now), Number.MIN_VALUE);
  });
}

/** Mixtures from the cheapest up to a given one, which is not among them: from it down, each exchange costs the least error for what it spares. */
function wayDown(
  start: Mixture,
  layers: ReadonlyMap<string, readonly Choice[]>,
  costOf: (choice: Choice) => number,
): readonly Mixture[] {
  const way = exchanges(start, layers, (now, next) => {
    if (costOf(next) >= costOf(now)) return null;
    return (costOf(now) - costOf(next)) / Math.max(next.error - now.error, Number.MIN_VALUE);
  });
  return way.slice(1).reverse();
}

/** A mixture and those after it, each by the one exchange that is worth most; null is one that is not to be made. */
function exchanges(
  start: Mixture,
  layers: ReadonlyMap<string, readonly Choice[]>,
  worth: (now: Choice, next: Choice) => number | null,
): Mixture[] {
  const current = new Map(start);
  const way: Mixture[] = [new Map(current)];
  for (;;) {
    let best: { layer: string; choice: Choice; worth: number } | undefined;
    for (const [layer, choices] of layers) {
      for (const choice of choices) {
        const value = worth(current.get(layer) as Choice, choice);
        if (value !== null && (best === undefined || value > best.worth)) best = { layer, choice, worth: value };
      }
    }
    if (best === undefined) return way;
    current.set(best.layer, best.choice);
    way.push(new Map(current));
  }
}
