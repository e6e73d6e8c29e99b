import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { Graph, ValueId } from "../../src/ir/graph.js";
import { typeBytes } from "../../src/ir/tensor.js";
import { fuse } from "../../src/plan/fuse.js";
import { type MemoryPlan, planMemory } from "../../src/plan/memory.js";
import type { Step } from "../../src/plan/step.js";
import { open } from "../../src/runtime/device.js";
import { scheduleFaults } from "../support/plans.js";
import { RUN, randomGraph, randomTensor } from "../support/random-graph.js";
import { SEED } from "../support/seed.js";

const OPTIONS = { seed: SEED, numRuns: 300 };
const planned = fc.tuple(randomGraph, fc.boolean()).map(([graph, fused]) => {
  const steps = fuse(graph, fused);
  return { graph, steps, memory: planMemory(graph, steps, graph.symbols) };
});

/** Entries of a map by a key of theirs. */
function grouped<K, V, G>(map: ReadonlyMap<K, V>, by: (value: V) => G): [K, V][][] {
  const groups = new Map<G, [K, V][]>();
  for (const entry of map) groups.set(by(entry[1]), [...(groups.get(by(entry[1])) ?? []), entry]);
  return [...groups.values()];
}

const rootOf = (memory: MemoryPlan, id: ValueId): ValueId => memory.placement.get(id)?.root ?? id;
const roleOf = (graph: Graph, id: ValueId) => graph.values[id]?.role;

/** Plays the steps over the slots: who lies where. Says every read of a slot that holds something else by then. */
function overwrittenReads(graph: Graph, steps: readonly Step[], memory: MemoryPlan): string[] {
  const faults: string[] = [];
  const holds = new Map<number, ValueId>();
  const read = (id: ValueId, by: string) => {
    const root = rootOf(memory, id);
    if (roleOf(graph, root) !== "value") return;
    const slot = memory.slotOf.get(root);
    if (slot === undefined || holds.get(slot) !== root) faults.push(`${by} reads ${id}, but its slot was reused`);
  };
  for (const step of steps) {
    for (const id of step.inputs) read(id, `step ${step.id}`);
    for (const id of step.outputs) {
      const root = rootOf(memory, id);
      const slot = memory.slotOf.get(root);
      if (roleOf(graph, root) === "value" && slot !== undefined) holds.set(slot, root);
    }
    // A kernel writes while it reads: nothing it reads may have made room for what it writes.
    for (const id of step.inputs) read(id, `step ${step.id}, while writing,`);
  }
  for (const [name, id] of Object.entries(graph.outputs)) read(id, `output ${name}`);
  return faults;
}

describe(`over random graphs (seed ${SEED})`, () => {
  test("every node runs exactly once, after what it reads and before what overwrites that", () => {
    fc.assert(
      fc.property(planned, ({ graph, steps }) => {
        expect(scheduleFaults(graph, steps)).toEqual([]);
      }),
      OPTIONS,
    );
  });

  test("live ranges that share a slot never overlap", () => {
    fc.assert(
      fc.property(planned, ({ memory }) => {
        for (const values of grouped(memory.slotOf, (slot) => slot)) {
          const ranges = values
            .map(([id]) => memory.live.get(id) as readonly [number, number])
            .sort(([a], [b]) => a - b);
          for (const [i, [first]] of ranges.entries())
            if (i > 0) expect(first).toBeGreaterThan(ranges[i - 1]?.[1] as number);
        }
      }),
      OPTIONS,
    );
  });

  test("whatever a step or the caller reads is still in its slot", () => {
    fc.assert(
      fc.property(planned, ({ graph, steps, memory }) => {
        expect(overwrittenReads(graph, steps, memory)).toEqual([]);
      }),
      OPTIONS,
    );
  });

  test("every value that leaves a step has a slot of its own or a place in a root, large enough and apart from its neighbours", () => {
    fc.assert(
      fc.property(planned, ({ graph, steps, memory }) => {
        for (const id of steps.flatMap((step) => step.outputs)) {
          const root = rootOf(memory, id);
          if (roleOf(graph, root) !== "value") continue;
          const slot = memory.slotOf.get(root);
          expect(slot).toBeDefined();
          const type = graph.values[id]?.type as Parameters<typeof typeBytes>[0];
          expect(memory.slots[slot as number]).toBeGreaterThanOrEqual(typeBytes(type, graph.symbols));
        }
        const width = (id: ValueId) => graph.values[id]?.type.shape.at(-1) as number;
        for (const places of grouped(memory.placement, ({ root }) => root)) {
          const grouping = places
            .filter(([id, { stride }]) => stride > width(id))
            .sort(([, a], [, b]) => a.column - b.column);
          let end = 0;
          for (const [id, { column, stride }] of grouping) {
            expect(column).toBeGreaterThanOrEqual(end);
            end = column + width(id);
            expect(end).toBeLessThanOrEqual(stride);
          }
        }
      }),
      OPTIONS,
    );
  });

  test("fused steps compute what single nodes compute, bit for bit, on the reference", async () => {
    await using device = await open({ prefer: ["reference"] });
    await fc.assert(
      fc.asyncProperty(randomGraph, async (graph) => {
        const inputs = graph.values.filter((value) => value.role === "input");
        const given = Object.fromEntries(inputs.map(({ name, type }) => [name, randomTensor(type, name, RUN)]));
        const weights = (name: string) => {
          const type = graph.values.find((value) => value.name === name)?.type;
          return randomTensor(type as Parameters<typeof randomTensor>[0], name, graph.symbols);
        };
        const results = [];
        for (const fused of [true, false]) {
          using program = await device.compile(graph, { fuse: fused, weights });
          results.push(await program.run({ inputs: given, symbols: RUN }));
          results.push({ cache: await program.executable.read("cache") });
        }
        expect(results[0]).toEqual(results[2]);
        expect(results[1]).toEqual(results[3]);
      }),
      { ...OPTIONS, numRuns: 100 },
    );
    expect(device.bytes).toBe(0);
  });
});
