import { expect, test } from "vitest";
import { open } from "../../src/runtime/device.js";
import { diffReports } from "../../src/validate/diff.js";
import {
  countResults,
  isReport,
  parseReport,
  type Report,
  reportJson,
  showCell,
  summarize,
} from "../../src/validate/report.js";
import { reportHtml } from "../../src/validate/report-html.js";
import type { CaseResult } from "../../src/validate/run.js";
import { makeReport } from "../../src/validate/run-tiers.js";

const about = { fewbit: "0.0.0", host: "test", created: "2026-01-01T00:00:00Z" };
const report = await makeReport(
  { backends: ["reference"], selection: { quick: true, ops: ["rmsnorm", "last_row"] } },
  about,
);
const change = (id: string, fields: Partial<CaseResult>, from: Report = report): Report => ({
  ...from,
  results: from.results.map((result) => (result.id === id ? { ...result, ...fields } : result)),
});
const FIRST = "rmsnorm/f32/h37/T1";

test("a report names the device, the seed and how to run every case again", async () => {
  expect(report.devices).toHaveLength(1);
  expect(report.devices[0]).toMatchObject({ backend: "reference", tier: null, info: { kind: "reference" } });
  expect(report.results.length).toBeGreaterThan(6);
  for (const result of report.results) {
    expect(result).toMatchObject({ status: "passed", kernels: [expect.stringMatching(/^reference\//)] });
    expect(result.rerun).toBe(`fewbit validate --backend reference --case "${result.id}" --seed ${report.seed}`);
    expect(result.worst).toBeLessThanOrEqual(1);
  }
  await using device = await open({ prefer: ["reference"] });
  expect(report.devices[0]?.info).toEqual(device.info);
});

test("JSON keeps infinities and comes back as it was", () => {
  const failed = change(FIRST, {
    status: "failed",
    worst: Number.POSITIVE_INFINITY,
    element: { output: "y", index: 0, got: Number.NaN, expected: 1, bound: 0 },
  });
  const back = parseReport(reportJson(failed));
  expect(isReport(back)).toBe(true);
  expect(back).toEqual(failed);
  expect(isReport({ format: 2 })).toBe(false);
  expect(isReport(null)).toBe(false);
});

test("tables fold results and say what failed or has no kernel", () => {
  const mixed = change(
    FIRST,
    { status: "failed", worst: 3, reason: "wrong" },
    change("rmsnorm/f32/h37/T5", { status: "unsupported", worst: 0 }),
  );
  const { rows, columns, cell } = summarize(mixed.results, ({ op }) => op);
  expect([rows, columns]).toEqual([["rmsnorm", "last_row"], ["reference"]]);
  expect(showCell(cell("rmsnorm", "reference"))).toBe("3.00 (1 failed, 1 no kernel)");
  expect(showCell(cell("last_row", "reference"))).toBe("0.00");
  expect(countResults(mixed.results)).toMatchObject({ failed: 1, unsupported: 1 });
});

test("HTML is one page that loads nothing and escapes what it shows", () => {
  const html = reportHtml(change(FIRST, { status: "failed", worst: 2, reason: "<script>alert(1)</script>" }));
  expect(html).toContain("1 failed");
  expect(html).toContain("&lt;script&gt;");
  expect(html).not.toMatch(/<script|<link|<img|src=|https?:/);
});

test("a difference lists other outcomes first, then other kernels and errors", () => {
  expect(diffReports(report, report)).toEqual({ status: [], details: [], same: report.results.length });
  const broken = change(FIRST, { status: "failed", worst: 4 });
  expect(diffReports(report, broken).status).toMatchObject([
    {
      id: FIRST,
      device: "reference",
      changes: [expect.stringContaining("passed in A, failed in B"), expect.anything()],
    },
  ]);
  const slower = change(FIRST, { kernels: ["reference/other"] });
  expect(diffReports(report, slower).details).toMatchObject([
    { id: FIRST, changes: ["kernels reference/rmsnorm in A, reference/other in B"] },
  ]);
  const shorter = { ...report, results: report.results.slice(1) };
  expect(diffReports(report, shorter).status).toMatchObject([{ changes: ["only in A: passed"] }]);
});

test("two backends, alone in their reports, are compared with each other", () => {
  const other: Report = {
    ...report,
    results: report.results.map((result) => ({ ...result, backend: "webgpu", tier: "default" })),
  };
  expect(diffReports(report, other)).toMatchObject({ status: [], same: report.results.length });
});
