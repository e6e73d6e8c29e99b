import type { Capabilities } from "../backends/backend.js";
import { FewbitError } from "../core/errors.js";
import { checkCapacity } from "../ir/attention.js";
import { attentionShape, cacheRows, type KeyRows } from "../ir/attention-shape.js";
import type { Symbols } from "../ir/evaluate.js";
import type { Dim, Graph, Value } from "../ir/graph.js";
import { typeBytes } from "../ir/tensor.js";
import { fuse } from "./fuse.js";
import { type MemoryPlan, planMemory } from "./memory.js";
import { admitsFusion, type Choice, type KernelRow, type NotConsidered, select, showExplanation } from "./select.js";
import { BoundStep, type Step } from "./step.js";

/** The kernels chosen for runs whose symbols do not exceed `symbols`. */
export interface Bucket {
  readonly symbols: Symbols;
  readonly choices: readonly Choice[];
}

/** A decided, printable schedule: data only. */
export interface Plan {
  readonly graph: Graph;
  readonly steps: readonly Step[];
  /** Smallest first; a run takes the first bucket that holds its symbols. */
  readonly buckets: readonly Bucket[];
  readonly memory: MemoryPlan;
  /** What every run must find room for, before anything of it is written. */
  readonly caches: readonly CacheLimit[];
  /** Bytes by kind with every symbol at its largest. */
  readonly bytes: {
    readonly weights: number;
    readonly state: number;
    readonly activations: number;
    /** The largest of the kernels' scratch, which all steps share. */
    readonly scratch: number;
  };
}

/** A cache that a run of `tokens` after `position` writes and reads. */
interface CacheLimit {
  readonly position: string;
  readonly tokens: Dim;
  readonly rows: KeyRows;
  /** Tokens that must still be there, the newest one counted. */
  readonly window: number;
}

export interface PlanOptions {
  /**
   * Symbol values to specialise kernels for, e.g. [{ T: 1 }] for single-token decoding; a bucket with every symbol at its
   * largest is always added.
   */
  readonly buckets?: readonly Symbols[];
  /** Group nodes into fused steps (default true). */
  readonly fuse?: boolean;
  readonly notConsidered?: NotConsidered;
}

/** validate -> fuse -> select -> memory. Throws `plan/no-kernel` or `plan/memory` with the explanation. */
export function makePlan(
  graph: Graph,
  device: { readonly kernels: readonly KernelRow[]; readonly capabilities: Capabilities },
  options: PlanOptions = {},
): Plan {
  const limits = [...(options.buckets ?? []).map((symbols) => ({ ...graph.symbols, ...symbols })), graph.symbols];
  const steps = fuse(graph, options.fuse ?? true, (step) =>
    limits.every((symbols) => admitsFusion(new BoundStep(graph, step, symbols), device.kernels, device.capabilities)),
  );
  const buckets = limits.map((symbols) => ({
    symbols,
    choices: steps.map((step) =>
      select(new BoundStep(graph, step, symbols), device.kernels, device.capabilities, options.notConsidered),
    ),
  }));
  const memory = planMemory(graph, steps, graph.symbols);
  const { maxBuffer, maxBinding, memory: total = Number.POSITIVE_INFINITY } = device.capabilities;
  const limit = (what: string, needed: number, most: number) => {
    if (needed > most) throw new FewbitError("plan/memory", { what, needed, limit: most });
  };
  const sum = (role: string) =>
    graph.values.reduce((all, value) => all + (value.role === role ? typeBytes(value.type, graph.symbols) : 0), 0);
  // Weights are cut into slices that fit a binding; activations and states are buffers that are bound whole.
  for (const bytes of memory.slots) limit("one activation", bytes, Math.min(maxBuffer, maxBinding));
  for (const { role, name, type } of graph.values) {
    if (role === "state" || role === "input")
      limit(name, typeBytes(type, graph.symbols), Math.min(maxBuffer, maxBinding));
  }
  const scratch = buckets.flatMap(({ symbols, choices }) =>
    choices.map(
      ({ kernel }, i) => kernel.scratch?.(new BoundStep(graph, steps[i] as Step, symbols), device.capabilities) ?? 0,
    ),
  );
  const bytes = {
    weights: sum("weight"),
    state: sum("state"),
    activations: memory.slots.reduce((all, slot) => all + slot, 0),
    scratch: scratch.reduce((most, needed) => Math.max(most, needed), 0),
  };
  limit("the program", bytes.weights + bytes.state + bytes.activations + bytes.scratch, total);
  return {
    graph,
    steps,
    buckets,
    memory,
    caches: cacheLimits(graph),
    bytes,
  };
}

/** Every cache of a graph, once. */
function cacheLimits(graph: Graph): CacheLimit[] {
  const found = new Map<string, CacheLimit>();
  for (const node of graph.nodes) {
    const types = node.inputs.map((id) => (graph.values[id] as Value).type);
    const add = (limit: CacheLimit) => found.set(JSON.stringify(limit), limit);
    if (node.op === "kv_write") {
      const { position } = node.attrs;
      const { keys, page, kvHeads, ring } = cacheRows(types, node.attrs, node.op);
      add({ position, tokens: types[1]?.shape[0] as Dim, rows: { keys, page, kvHeads, ring }, window: 0 });
    } else if (node.op === "sdpa" && node.attrs.position !== undefined) {
      const { keys, page, kvHeads, ring, tokens } = attentionShape(types, node.attrs, node.op);
      add({
        position: node.attrs.position,
        tokens,
        rows: { keys, page, kvHeads, ring },
        window: node.attrs.window ?? 0,
      });
    }
  }
  return [...found.values()];
}

/**
 * The index of the first bucket that holds `symbols`. Throws `argument/invalid` when the largest does not, and `cache/overflow`
 * for a run that its caches cannot take.
 */
export function bucketFor(plan: Plan, symbols: Symbols): number {
  for (const [name, max] of Object.entries(plan.graph.symbols)) {
    const value = symbols[name];
    if (value === undefined || !Number.isInteger(value) || value < 0 || value > max) {
      throw new FewbitError("argument/invalid", {
        name: `symbol ${name}`,
        value,
        expected: `an integer from 0 to ${max}`,
      });
    }
  }
  for (const { position, tokens, rows, window } of plan.caches) {
    const count = typeof tokens === "number" ? tokens : (symbols[tokens] as number);
    checkCapacity(rows, symbols[position] as number, count, window);
  }
  return plan.buckets.findIndex((bucket) =>
    Object.entries(bucket.symbols).every(([name, max]) => (symbols[name] as number) <= max),
  );
}

/** The whole plan as text: every step of every bucket with its kernel, the reasons against the others, and the memory. */
export function explainPlan(plan: Plan): string {
  const parts: string[] = [];
  for (const { symbols, choices } of plan.buckets) {
    const text = Object.entries(symbols).map(([name, value]) => `${name} <= ${value}`);
    parts.push(`bucket ${text.join(", ") || "(no symbols)"}: ${choices.length} steps`);
    parts.push(...choices.map((choice) => showExplanation(choice.explanation)));
  }
  const { weights, state, activations } = plan.bytes;
  parts.push(
    `memory: weights ${weights} B, state ${state} B, activations ${activations} B in ${plan.memory.slots.length} slots`,
  );
  return parts.join("\n");
}
