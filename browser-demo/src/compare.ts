import { call } from "./client.js";
import { announce, button, errorBox, fill, h } from "./dom.js";
import type { Comparison, LightDifference, ReportSummary } from "./protocol.js";

/** The page that compares two reports, or one with the run of this page. */
export function comparePage(): HTMLElement {
  const a = file("report-a", "A: a report");
  const b = file("report-b", "B: another report");
  const own = h("input", { type: "checkbox", id: "own", checked: true });
  const result = h("div", { id: "comparison" }, h("p", { class: "muted" }, "Choose a report."));
  const show = async () => {
    a.control.disabled = own.checked;
    const [left, right] = [own.checked ? null : a.control.files?.[0], b.control.files?.[0]];
    if (left === undefined || right === undefined) return fill(result, h("p", { class: "muted" }, "Choose a report."));
    try {
      const comparison = await call("compare", { a: left, b: right });
      fill(result, ...describe(comparison));
      announce(`Compared: ${tally(comparison)}`);
    } catch (error) {
      fill(result, errorBox("The reports cannot be compared", error));
    }
  };
  for (const control of [own, a.control, b.control]) control.addEventListener("change", () => void show());
  a.control.disabled = true;
  return h(
    "section",
    { class: "card", "aria-labelledby": "compare-title", id: "compare" },
    h("h1", { id: "compare-title" }, "Compare reports"),
    h(
      "p",
      { class: "lead" },
      "Two machines, two browsers, two versions: what passes here and fails there, other kernels, other bits, errors that grew. Reports come from ",
      h("strong", {}, "Export JSON"),
      " or from ",
      h("code", {}, "fewbit validate --report out.json"),
      "; nothing is uploaded.",
    ),
    h(
      "div",
      { class: "controls" },
      h("div", { class: "field check" }, own, h("label", { for: "own" }, "A is the run of this page")),
      a.field,
      b.field,
      h(
        "div",
        { class: "buttons" },
        button("Compare", () => void show(), { class: "primary" }),
      ),
    ),
    result,
  );
}

const tally = ({ same, status, details }: Comparison): string =>
  `${same} the same, ${status.length} with another outcome, ${details.length} with another kernel, bits or error`;

function describe(comparison: Comparison): HTMLElement[] {
  const { a, b, status, details } = comparison;
  return [
    h(
      "p",
      { class: `notice ${status.length > 0 ? "bad" : "good"}`, id: "tally" },
      h("strong", {}, tally(comparison)),
      ".",
    ),
    h(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "The two reports" },
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, ...["", "A", "B"].map((text) => h("th", { scope: "col" }, text)))),
        h(
          "tbody",
          {},
          ...rows(a, b).map(([name, left, right]) =>
            h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, left), h("td", {}, right)),
          ),
        ),
      ),
    ),
    ...list("Another outcome", status),
    ...list("Same outcome, another kernel, other bits or another error", details),
  ];
}

function rows(a: ReportSummary, b: ReportSummary): (readonly [string, string, string])[] {
  const row = (name: string, value: (report: ReportSummary) => string) => [name, value(a), value(b)] as const;
  return [
    row("report", ({ name }) => name),
    row(
      "result",
      ({ passed, failed, unsupported }) => `${passed} passed, ${failed} failed, ${unsupported} without a kernel`,
    ),
    row("devices", ({ devices }) => devices.join("; ")),
    row("fewbit", ({ fewbit }) => fewbit),
    row("made on", ({ host }) => host),
    row("made at", ({ created }) => created),
  ];
}

function list(title: string, entries: readonly LightDifference[]): HTMLElement[] {
  if (entries.length === 0) return [];
  return [
    h("h2", {}, `${title} (${entries.length})`),
    h(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          {},
          h("tr", {}, ...["Device", "Case", "What differs"].map((text) => h("th", { scope: "col" }, text))),
        ),
        h(
          "tbody",
          {},
          ...entries.map(({ device, id, changes }) =>
            h("tr", {}, h("td", {}, device), h("td", {}, h("code", {}, id)), h("td", {}, changes.join("; "))),
          ),
        ),
      ),
    ),
  ];
}

function file(id: string, label: string) {
  const control = h("input", { type: "file", id, accept: ".json,application/json" });
  return { control, field: h("div", { class: "field" }, h("label", { for: id }, label), control) };
}
