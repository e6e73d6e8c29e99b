import type { Symbols } from "../../ir/evaluate.js";
import type { Plan } from "../../plan/plan.js";
import { BoundStep } from "../../plan/step.js";
import type { Capabilities } from "../backend.js";
import { BuildContext, type NativeDispatch, type NativeKernel } from "./kernel.js";

/** A dispatch, with the step that it belongs to: the first, where it is of two. */
export interface Built {
  readonly step: number;
  readonly dispatch: NativeDispatch;
}

/** What a bucket of a plan runs, in order. A kernel may take over the step behind its own (`NativeKernel.join`). */
export function buildBucket(
  plan: Plan,
  symbols: Symbols,
  choices: Plan["buckets"][number]["choices"],
  capabilities: Capabilities,
): Built[] {
  const contexts = plan.steps.map(
    (step) => new BuildContext(new BoundStep(plan.graph, step, symbols), plan.memory, capabilities, plan.graph.symbols),
  );
  const built: Built[] = [];
  let taken = -1; // the last step whose dispatches are those of the step before it
  for (const [step, context] of contexts.entries()) {
    if (step === taken) continue;
    const kernel = choices[step]?.kernel as NativeKernel;
    const after = contexts[step + 1];
    const joined = (after && kernel.join && goesOnAlone(plan, step) && kernel.join(context, after)) || null;
    if (joined !== null) taken = step + 1;
    built.push(...(joined ?? kernel.build(context)).map((dispatch) => ({ step, dispatch })));
  }
  return built;
}

/** Whether nothing but the step behind it reads what a step makes. */
function goesOnAlone({ graph, steps }: Plan, step: number): boolean {
  const read = new Set(Object.values(graph.outputs));
  for (const [i, { inputs }] of steps.entries()) if (i !== step + 1) for (const id of inputs) read.add(id);
  return steps[step]?.outputs.every((id) => !read.has(id)) === true;
}
