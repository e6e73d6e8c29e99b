import type { Capabilities } from "../backends/backend.js";
import { FewbitError } from "../core/errors.js";
import type { Symbols } from "../ir/evaluate.js";
import type { Graph } from "../ir/graph.js";
import { typeBytes } from "../ir/tensor.js";
import { fuse } from "./fuse.js";
import { type MemoryPlan, planMemory } from "./memory.js";
import { type Choice, type KernelRow, type NotConsidered, select, showExplanation } from "./select.js";
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
  /** Bytes by kind with every symbol at its largest. */
  readonly bytes: { readonly weights: number; readonly state: number; readonly activations: number };
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
  const steps = fuse(graph, options.fuse ?? true);
  const limits = [...(options.buckets ?? []).map((symbols) => ({ ...graph.symbols, ...symbols })), graph.symbols];
  const buckets = limits.map((symbols) => ({
    symbols,
    choices: steps.map((step) =>
      select(new BoundStep(graph, step, symbols), device.kernels, device.capabilities, options.notConsidered),
    ),
  }));
  const memory = planMemory(graph, steps, graph.symbols);
  const sum = (role: string) =>
    graph.values.reduce((total, value) => total + (value.role === role ? typeBytes(value.type, graph.symbols) : 0), 0);
  const activations = memory.slots.reduce((total, bytes) => total + bytes, 0);
  for (const bytes of memory.slots) {
    if (bytes > device.capabilities.maxBuffer) {
      throw new FewbitError("plan/memory", {
        what: "one activation",
        needed: bytes,
        limit: device.capabilities.maxBuffer,
      });
    }
  }
  return { graph, steps, buckets, memory, bytes: { weights: sum("weight"), state: sum("state"), activations } };
}

/** The index of the first bucket that holds `symbols`. Throws `argument/invalid` when the largest does not. */
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
