import { type OpenOptions, open } from "../../src/runtime/device.js";
import { type CaseProgram, caseTable, selectCases } from "../../src/validate/cases.js";
import { type CaseResult, makeOracle, type RunCasesOptions, runCases } from "../../src/validate/run.js";

/** The quick table, and an oracle that a test file's devices share. */
export const QUICK: readonly CaseProgram[] = selectCases(caseTable(), { quick: true });
const oracle = makeOracle();

/** Runs cases on a device of its own. */
export async function runOn(
  device: OpenOptions,
  programs: readonly CaseProgram[],
  options: RunCasesOptions = {},
): Promise<CaseResult[]> {
  await using opened = await open(device);
  const results: CaseResult[] = [];
  for await (const result of runCases(opened, programs, { oracle, ...options })) results.push(result);
  return results;
}

/** What a failing test should say. */
export function failures(results: readonly CaseResult[]): string[] {
  return results
    .filter(({ status }) => status === "failed")
    .map(
      ({ id, kernels, worst, element, reason }) =>
        `${id} (${kernels.join(", ")}): ${reason}; ${worst} of its bound, ${JSON.stringify(element)}`,
    );
}

/** Ops and formats that a backend has no kernel for. */
export function missing(results: readonly CaseResult[]): string[] {
  return [
    ...new Set(results.filter(({ status }) => status === "unsupported").map(({ op, format }) => `${op} ${format}`)),
  ].sort();
}
