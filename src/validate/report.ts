import type { DeviceInfo } from "../backends/backend.js";
import type { Device } from "../runtime/device.js";
import type { CaseResult } from "./run.js";

/** What ran the cases. */
export interface ReportedDevice {
  readonly backend: string;
  readonly tier: string | null;
  readonly info: DeviceInfo;
  readonly features: readonly string[];
  readonly limits: Readonly<Record<string, number>>;
}

/** A feature whose absence makes failing cases pass. */
export interface Culprit {
  readonly backend: string;
  readonly tier: string;
  /** What was switched off; null when cases failed whatever was switched off. */
  readonly feature: string | null;
  readonly cases: readonly string[];
}

/** A validation that can be sent, compared and acted on; JSON as it stands. */
export interface Report {
  readonly format: 1;
  readonly fewbit: string;
  readonly created: string;
  readonly seed: number;
  /** Where it ran, e.g. the platform and the version of Node or the browser. */
  readonly host: string;
  readonly devices: readonly ReportedDevice[];
  /** Tiers that were asked for and could not be opened, with the reason: a named absence. */
  readonly absent: readonly { readonly backend: string; readonly tier: string; readonly reason: string }[];
  readonly culprits: readonly Culprit[];
  readonly results: readonly CaseResult[];
  readonly seconds: number;
}

export function describeDevice(device: Device, tier: string | null): ReportedDevice {
  const { features, subgroupSize, ...rest } = device.capabilities;
  const limits = Object.fromEntries(
    Object.entries(rest).filter((entry): entry is [string, number] => typeof entry[1] === "number"),
  );
  return {
    backend: device.info.backend,
    tier,
    info: device.info,
    features: [...features].sort(),
    limits: { ...limits, minSubgroupSize: subgroupSize[0], maxSubgroupSize: subgroupSize[1] },
  };
}

/** The report's text: JSON has no word for infinity, which a failed exact comparison gives. */
export function reportJson(report: Report): string {
  return JSON.stringify(
    report,
    (_, value: unknown) => (typeof value === "number" && !Number.isFinite(value) ? String(value) : value),
    1,
  );
}

const NUMBERS: Readonly<Record<string, number>> = {
  Infinity: Number.POSITIVE_INFINITY,
  "-Infinity": Number.NEGATIVE_INFINITY,
  NaN: Number.NaN,
};

/** Reads a report back. Throws a SyntaxError for text that is no JSON; `isReport` says whether it is a report. */
export function parseReport(text: string): unknown {
  return JSON.parse(text, (_, value: unknown) =>
    typeof value === "string" && Object.hasOwn(NUMBERS, value) ? NUMBERS[value] : value,
  );
}

export function isReport(value: unknown): value is Report {
  const report = value as Partial<Report> | null;
  return (
    typeof report === "object" &&
    report !== null &&
    report.format === 1 &&
    Array.isArray(report.results) &&
    Array.isArray(report.devices)
  );
}

export interface Cell {
  readonly cases: number;
  readonly failed: number;
  readonly unsupported: number;
  /** The worst error as a fraction of its bound. */
  readonly worst: number;
}

/** Results folded by `row` and by device (backend and tier). */
export function summarize(
  results: readonly CaseResult[],
  row: (result: CaseResult) => string = (result) => result.format,
): { rows: string[]; columns: string[]; cell(row: string, column: string): Cell | undefined } {
  const cells = new Map<string, Cell>();
  const [rows, columns] = [new Set<string>(), new Set<string>()];
  for (const result of results) {
    const [r, c] = [row(result), columnOf(result)];
    rows.add(r);
    columns.add(c);
    const cell = cells.get(`${r}\n${c}`) ?? { cases: 0, failed: 0, unsupported: 0, worst: 0 };
    cells.set(`${r}\n${c}`, {
      cases: cell.cases + 1,
      failed: cell.failed + Number(result.status === "failed"),
      unsupported: cell.unsupported + Number(result.status === "unsupported"),
      worst: Math.max(cell.worst, result.worst),
    });
  }
  return { rows: [...rows], columns: [...columns], cell: (r, c) => cells.get(`${r}\n${c}`) };
}

/** The name of a device in tables: `webgpu/default`. */
export function columnOf({ backend, tier }: { readonly backend: string; readonly tier: string | null }): string {
  return tier === null ? backend : `${backend}/${tier}`;
}

/** A cell as text: the worst error as a fraction of its bound; what failed or has no kernel is said beside it. */
export function showCell(cell: Cell | undefined): string {
  if (cell === undefined) return "";
  if (cell.unsupported === cell.cases) return "no kernel";
  const worst = Number.isFinite(cell.worst) ? cell.worst.toFixed(2) : "wrong";
  const notes = [
    cell.failed > 0 ? `${cell.failed} failed` : "",
    cell.unsupported > 0 ? `${cell.unsupported} no kernel` : "",
  ].filter(Boolean);
  return notes.length === 0 ? worst : `${worst} (${notes.join(", ")})`;
}

export function countResults(results: readonly CaseResult[]): { passed: number; failed: number; unsupported: number } {
  const count = (status: CaseResult["status"]) => results.filter((result) => result.status === status).length;
  return { passed: count("passed"), failed: count("failed"), unsupported: count("unsupported") };
}
