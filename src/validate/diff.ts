import { columnOf, type Report } from "./report.js";
import type { CaseResult } from "./run.js";

/** One case in two reports that differ about it. */
export interface CaseDifference {
  readonly id: string;
  readonly device: string;
  readonly a: CaseResult | null;
  readonly b: CaseResult | null;
  /** What is different, in words. */
  readonly changes: readonly string[];
}

export interface ReportDifference {
  /** Cases that pass in one report and not in the other, or are in only one of them. */
  readonly status: readonly CaseDifference[];
  /** Cases with the same status whose kernels or stored bits differ, or whose worst errors differ by more than `ratio`. */
  readonly details: readonly CaseDifference[];
  readonly same: number;
}

/**
 * Compares two reports case by case. Devices are matched by backend and tier; where the two reports share no such device and
 * each has one, these are compared (two backends, two machines).
 */
export function diffReports(a: Report, b: Report, ratio = 1.5): ReportDifference {
  const [left, right] = matched(a, b);
  const status: CaseDifference[] = [];
  const details: CaseDifference[] = [];
  let same = 0;
  for (const key of new Set([...left.keys(), ...right.keys()])) {
    const [x, y] = [left.get(key) ?? null, right.get(key) ?? null];
    const changes = changesOf(x, y, ratio);
    if (changes.length === 0) {
      same++;
      continue;
    }
    const either = (x ?? y) as CaseResult;
    const device =
      x !== null && y !== null && columnOf(x) !== columnOf(y) ? `${columnOf(x)} | ${columnOf(y)}` : columnOf(either);
    const difference = { id: either.id, device, a: x, b: y, changes };
    (x?.status === y?.status ? details : status).push(difference);
  }
  return { status, details, same };
}

function matched(a: Report, b: Report): [Map<string, CaseResult>, Map<string, CaseResult>] {
  const devices = (report: Report) => new Set(report.results.map(columnOf));
  const [x, y] = [devices(a), devices(b)];
  const alone = x.size === 1 && y.size === 1 && ![...x].some((name) => y.has(name));
  const index = (report: Report) =>
    new Map(report.results.map((result) => [alone ? result.id : `${columnOf(result)} ${result.id}`, result]));
  return [index(a), index(b)];
}

function changesOf(a: CaseResult | null, b: CaseResult | null, ratio: number): string[] {
  if (a === null || b === null) return [`only in ${a === null ? "B" : "A"}: ${(a ?? b)?.status}`];
  const changes: string[] = [];
  if (a.status !== b.status) changes.push(`${a.status} in A, ${b.status} in B`);
  const [before, after] = [a.kernels.join(", "), b.kernels.join(", ")];
  if (before !== after && a.backend === b.backend)
    changes.push(`kernels ${before || "none"} in A, ${after || "none"} in B`);
  const [small, large] = [Math.min(a.worst, b.worst), Math.max(a.worst, b.worst)];
  if (large > 0.05 && large > ratio * small)
    changes.push(`worst error ${a.worst.toFixed(3)} in A, ${b.worst.toFixed(3)} in B, of its bound`);
  // A report of a version without digests has none.
  const [bits, others] = [a.digest ?? null, b.digest ?? null];
  if (bits !== null && others !== null && bits !== others) changes.push("stored bits differ");
  return changes;
}
