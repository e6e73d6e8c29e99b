import { describe, expect, test } from "vitest";
import { type Candidate, type Choice, candidate, type Mixture, search } from "../../src/models/autoquant-search.js";

/** Numbers in [0, 1), the same for a seed. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

const NAMES = ["none", "a", "b", "c", "d"];
const LAYERS = 12;

/** A model whose loss is the sum of its layers' errors, each seen through noise: what the search knows is not quite what it measures. */
function world(seed: number, noise: number) {
  const next = random(seed);
  const layers = new Map<string, Choice[]>();
  const truth = new Map<Choice, number>();
  for (let i = 0; i < LAYERS; i++) {
    const choices = NAMES.map((name, rank) => {
      const error = rank === 0 ? 0 : next() * 10 ** -(4 - rank);
      const bytes = Math.round(1000 / (rank + 1)) + Math.floor(next() * 50);
      const choice: Choice = { name, error, bytes, seconds: (0.5 + next()) * bytes };
      truth.set(choice, error * (1 + noise * (next() - 0.5)));
      return choice;
    });
    layers.set(`layer${i}`, choices);
  }
  const measured: Mixture[] = [];
  const loss = async (mixture: Mixture) => {
    measured.push(mixture);
    return 3 + [...mixture.values()].reduce((sum, choice) => sum + (truth.get(choice) as number), 0);
  };
  const alone = (name: string) =>
    new Map([...layers].map(([layer, all]) => [layer, all.find((one) => one.name === name) as Choice]));
  const singles = () => Promise.all(NAMES.map((name) => candidate(alone(name), loss, name)));
  return { layers, loss, singles, measured };
}

const costOf = (objective: "speed" | "size", { seconds, bytes }: Candidate) =>
  objective === "speed" ? seconds : bytes;

describe.each(["speed", "size"] as const)("a search for %s", (objective) => {
  test.each([0, 0.5, 2])("gives what is within the limit and no single of that size beats; noise %d", async (noise) => {
    let better = 0;
    for (let seed = 1; seed <= 40; seed++) {
      const { layers, loss, singles: measure } = world(seed, noise);
      const singles = await measure();
      for (const limit of [0, 0.001, 0.05, 0.5, 100]) {
        const unquantized = (singles[0] as Candidate).loss;
        const allowed = unquantized + limit;
        const found = await search(layers, { objective, unquantized, limit, singles, loss });
        expect(found.loss).toBeLessThanOrEqual(allowed);
        expect(found.loss).toBe(await loss(found.mixture));
        const sound = (one: Candidate) =>
          one.loss <= allowed && !singles.some((other) => other.bytes <= one.bytes && other.loss < one.loss);
        expect(sound(found)).toBe(true);
        const costs = singles.filter(sound).map((one) => costOf(objective, one));
        expect(costOf(objective, found)).toBeLessThanOrEqual(Math.min(...costs));
        if (costOf(objective, found) < Math.min(...costs)) better++;
      }
    }
    // Mixtures are worth the search.
    expect(better).toBeGreaterThan(100);
  });

  test("measures little where errors are right", async () => {
    const { layers, loss, singles: measure, measured } = world(7, 0);
    const singles = await measure();
    measured.length = 0;
    const unquantized = (singles[0] as Candidate).loss;
    await search(layers, { objective, unquantized, limit: 0.05, singles, loss });
    // Errors are right here: on each of two ways the first guess is the answer, and its neighbour shows it.
    expect(measured.length).toBeLessThanOrEqual(6);
  });
});

test("errors that are right find the smallest mixture but for one exchange", async () => {
  for (let seed = 1; seed <= 10; seed++) {
    const { layers, loss, singles: measure } = world(seed, 0);
    const singles = await measure();
    for (const limit of [0.003, 0.03, 0.3]) {
      const unquantized = (singles[0] as Candidate).loss;
      const found = await search(layers, { objective: "size", unquantized, limit, singles, loss });
      // No mixture is smaller than the least of bytes + w (error - limit), for any w >= 0 (weak duality).
      let bound = 0;
      for (let w = 1; w < 1e9; w *= 1.1) {
        const least = [...layers.values()].reduce(
          (sum, all) => sum + Math.min(...all.map(({ bytes, error }) => bytes + w * error)),
          0,
        );
        bound = Math.max(bound, least - w * limit);
      }
      const exchange = Math.max(...[...layers.values()].map((all) => (all[0] as Choice).bytes));
      expect(found.bytes).toBeGreaterThanOrEqual(bound);
      expect(found.bytes).toBeLessThanOrEqual(bound + exchange);
    }
  }
});
