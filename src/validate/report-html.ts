import { type Cell, columnOf, countResults, type Report, showCell, summarize } from "./report.js";
import type { CaseResult } from "./run.js";

/** A report as one HTML page that loads nothing. */
export function reportHtml(report: Report): string {
  const { passed, failed, unsupported } = countResults(report.results);
  const devices = report.devices.map((device) => {
    const limits = Object.entries(device.limits).map(([name, value]) => `${name} ${value}`);
    return row([
      columnOf(device),
      device.info.name,
      device.info.reason,
      device.features.join(", ") || "none",
      limits.join(", "),
    ]);
  });
  const notable = report.results.filter((result) => result.status !== "passed");
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fewbit validation: ${passed} passed, ${failed} failed</title>
<style>${STYLE}</style></head><body>
<h1>fewbit validation</h1>
<p class="${failed > 0 ? "bad" : "good"}"><strong>${passed} passed, ${failed} failed</strong>${unsupported > 0 ? `; ${unsupported} have no kernel` : ""}</p>
<p>fewbit ${text(report.fewbit)}, ${text(report.created)}, seed ${report.seed}, ${report.seconds.toFixed(1)} s, ${text(report.host)}</p>
${report.absent.map(({ backend, tier, reason }) => `<p>Not run: ${text(backend)}/${text(tier)}: ${text(reason)}</p>`).join("\n")}
${report.culprits.map(culprit).join("\n")}
<h2>Devices</h2>
<div class="wide"><table><thead>${head(["device", "adapter", "why", "features", "limits"])}</thead><tbody>${devices.join("")}</tbody></table></div>
<h2>Formats</h2>
${matrix(report.results, (result) => result.format)}
<h2>Ops</h2>
${matrix(report.results, (result) => result.op)}
${notable.length === 0 ? "" : `<h2>Failed, or without a kernel</h2>${notable.map(detail).join("\n")}`}
<h2>Every case</h2>
<div class="wide"><table><thead>${head(["case", "device", "status", "worst / bound", "kernels", "ms"])}</thead><tbody>
${report.results.map((r) => row([r.id, columnOf(r), r.status, showWorst(r.worst), r.kernels.join(", "), (r.seconds * 1e3).toFixed(1)])).join("\n")}
</tbody></table></div>
</body></html>
`;
}

const STYLE = `
:root{color-scheme:light dark;--line:color-mix(in srgb,currentColor 20%,transparent)}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th,td{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:left;vertical-align:top}
td.cell{font-variant-numeric:tabular-nums}.good{color:light-dark(#116329,#56d364)}.bad{color:light-dark(#b3261e,#ff7b72)}
.none{opacity:.6}pre{white-space:pre-wrap;font-size:12px;overflow-wrap:anywhere}details{margin:.4rem 0}`;

const text = (value: unknown): string =>
  String(value).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c] as string);
const row = (cells: readonly unknown[]): string => `<tr>${cells.map((cell) => `<td>${text(cell)}</td>`).join("")}</tr>`;
const head = (cells: readonly string[]): string =>
  `<tr>${cells.map((cell) => `<th scope="col">${text(cell)}</th>`).join("")}</tr>`;
const showWorst = (worst: number): string => (Number.isFinite(worst) ? worst.toFixed(3) : "wrong");

function matrix(results: readonly CaseResult[], by: (result: CaseResult) => string): string {
  const { rows, columns, cell } = summarize(results, by);
  const style = (found: Cell | undefined) =>
    found === undefined || found.unsupported === found.cases ? "none" : found.failed > 0 ? "bad" : "good";
  const body = rows.map((name) => {
    const cells = columns.map(
      (column) => `<td class="cell ${style(cell(name, column))}">${text(showCell(cell(name, column)))}</td>`,
    );
    return `<tr><th scope="row">${text(name)}</th>${cells.join("")}</tr>`;
  });
  return `<p>Worst error as a fraction of its bound: at most 1 passes.</p><div class="wide"><table><thead>${head(["", ...columns])}</thead><tbody>${body.join("\n")}</tbody></table></div>`;
}

function culprit({ backend, tier, feature, cases }: Report["culprits"][number]): string {
  const what =
    feature === null ? "whatever is switched off, cases still fail" : `the failures go away without ${feature}`;
  return `<p class="bad">${text(`${backend}/${tier}`)}: ${text(what)} (${cases.length} cases)</p>`;
}

function detail(result: CaseResult): string {
  const { element } = result;
  const worst =
    element === null
      ? ""
      : `${element.output}[${element.index}] is ${element.got}, expected ${element.expected} within ${element.bound}\n`;
  return `<details><summary>${text(result.id)} on ${text(columnOf(result))}: ${text(result.status)}</summary>
<pre>${text(result.reason ?? "")}\n${text(worst)}\n${text(result.rerun)}\n\n${text(result.explanation)}\n\n${text(result.wgsl.join("\n\n"))}</pre></details>`;
}
