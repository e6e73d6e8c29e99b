import type { Capabilities } from "../backends/backend.js";
import { FewbitError } from "../core/errors.js";
import { roundUp } from "../core/shape.js";
import { isOptional } from "./fuse.js";
import type { BoundStep, StepKind } from "./step.js";

/** Something a kernel needs. `unmet` answers with null, or with the reason in words. */
export interface Requirement {
  unmet(step: BoundStep, device: Capabilities): string | null;
}

/** One way to compute a step. Backends extend the row with what they need to build it. */
export interface KernelRow {
  /** e.g. `webgpu/linear/gemv`. */
  readonly id: string;
  readonly kind: StepKind;
  readonly requires: readonly Requirement[];
  /** The optional fusions (`plan/fuse.ts`) whose steps the kernel takes; steps are fused so where such a row admits them. */
  readonly fusions?: readonly string[];
  /** The fractions of the device's bandwidth and arithmetic that the kernel reaches on large inputs; they only rank. */
  readonly efficiency: { readonly bandwidth: number; readonly compute: number };
  /** The kernel computes whole tiles of this many rows of its first output, so few rows cost as much as a tile. */
  readonly rowTile?: number;
  /** Extra bytes of scratch memory the kernel needs while it runs. */
  scratch?(step: BoundStep, device: Capabilities): number;
}

export interface Rejection {
  readonly id: string;
  readonly reason: string;
}

/** Why a step runs the way it does. Part of every plan. */
export interface Explanation {
  readonly step: string;
  readonly kernel: string;
  readonly microseconds: number;
  readonly bound: "bandwidth" | "compute" | "dispatch";
  readonly rejected: readonly Rejection[];
}

export interface Choice<K extends KernelRow = KernelRow> {
  readonly kernel: K;
  readonly explanation: Explanation;
}

/** Names a backend that was not asked, with the reason, for explanations. */
export type NotConsidered = readonly Rejection[];

/**
 * Drops kernels with unmet requirements, then ranks the rest by a roofline estimate; ranking reorders, it never admits.
 * Throws `plan/no-kernel` with the whole explanation when none is left.
 */
export function select(
  bound: BoundStep,
  kernels: readonly KernelRow[],
  device: Capabilities,
  notConsidered: NotConsidered = [],
): Choice {
  const rejected: Rejection[] = [];
  const admitted: { kernel: KernelRow; cost: Cost }[] = [];
  for (const kernel of kernels) {
    if (kernel.kind !== bound.step.kind) continue;
    const reason = firstUnmet(kernel, bound, device);
    if (reason === null) admitted.push({ kernel, cost: estimate(kernel, bound, device) });
    else rejected.push({ id: kernel.id, reason });
  }
  admitted.sort((a, b) => a.cost.seconds - b.cost.seconds);
  const [best, ...others] = admitted;
  if (best === undefined) {
    const explanation = [...rejected, ...notConsidered].map(showRejection).join("\n");
    throw new FewbitError("plan/no-kernel", { step: bound.describe(), explanation });
  }
  for (const { kernel, cost } of others) {
    rejected.push({
      id: kernel.id,
      reason: `slower: estimated ${show(cost.seconds)} against ${show(best.cost.seconds)}`,
    });
  }
  return {
    kernel: best.kernel,
    explanation: {
      step: bound.describe(),
      kernel: best.kernel.id,
      microseconds: best.cost.seconds * 1e6,
      bound: best.cost.bound,
      rejected: [...rejected, ...notConsidered],
    },
  };
}

/** Whether a kernel takes the step of an optional fusion. */
export function admitsFusion(bound: BoundStep, kernels: readonly KernelRow[], device: Capabilities): boolean {
  return kernels.some((kernel) => kernel.kind === bound.step.kind && firstUnmet(kernel, bound, device) === null);
}

interface Cost {
  readonly seconds: number;
  readonly bound: Explanation["bound"];
}

function estimate(kernel: KernelRow, bound: BoundStep, device: Capabilities): Cost {
  const memory = bound.bytes / (device.bandwidth * kernel.efficiency.bandwidth);
  const rows = bound.outputRows;
  const wasted = kernel.rowTile === undefined || rows === 0 ? 1 : roundUp(rows, kernel.rowTile) / rows;
  const compute = (bound.flops * wasted) / (device.flops * kernel.efficiency.compute);
  const busy = Math.max(memory, compute);
  if (device.dispatchSeconds > busy) return { seconds: device.dispatchSeconds + busy, bound: "dispatch" };
  return { seconds: device.dispatchSeconds + busy, bound: memory >= compute ? "bandwidth" : "compute" };
}

function firstUnmet(kernel: KernelRow, bound: BoundStep, device: Capabilities): string | null {
  const { fusion } = bound.step;
  if (fusion !== undefined && isOptional(fusion) && !kernel.fusions?.includes(fusion))
    return `it does not take steps of ${fusion}`;
  for (const requirement of kernel.requires) {
    const reason = requirement.unmet(bound, device);
    if (reason !== null) return reason;
  }
  return null;
}

const show = (seconds: number): string => `${(seconds * 1e6).toPrecision(3)} us`;

export function showRejection(rejection: Rejection): string {
  return `  ${rejection.id.padEnd(32)} no   ${rejection.reason}`;
}

/** An explanation as the lines that `explain()` prints. */
export function showExplanation(explanation: Explanation): string {
  const head = `${explanation.step}\n  -> ${explanation.kernel.padEnd(29)} est. ${show(explanation.microseconds * 1e-6)}, ${explanation.bound}-bound`;
  return [head, ...explanation.rejected.map(showRejection)].join("\n");
}
