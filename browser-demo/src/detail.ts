import type { CaseResult, OutputErrors } from "../../src/validate/run.js";
import { barChart, heatmap, histogram, showFraction } from "./charts.js";
import { call } from "./client.js";
import { button, errorBox, fill, h, showSeconds, term } from "./dom.js";
import type { Cell } from "./matrix.js";
import type { LightResult } from "./protocol.js";

const nameOf = ({ id, tier }: LightResult): string => (tier === null ? id : `${tier}: ${id}`);

/** The dialog of a cell: its cases, and everything about one of them. */
export class Detail {
  readonly element: HTMLDialogElement;
  readonly #title = h("h2", { id: "detail-title" });
  readonly #cases = h("select", { id: "detail-case" });
  readonly #body = h("div", { class: "detail-body" });
  #abort: AbortController | null = null;
  #results: readonly LightResult[] = [];

  constructor() {
    this.element = h(
      "dialog",
      { "aria-labelledby": "detail-title", class: "detail" },
      h(
        "header",
        {},
        this.#title,
        button("Close", () => this.element.close(), { class: "close" }),
      ),
      h("div", { class: "field" }, h("label", { for: "detail-case" }, "Case"), this.#cases),
      this.#body,
    );
    this.#cases.addEventListener("change", () => void this.#show());
    this.element.addEventListener("close", () => this.#abort?.abort());
    // A click beside the dialog closes it.
    this.element.addEventListener("click", (event) => {
      if (event.target === this.element) this.element.close();
    });
  }

  open({ op, format, planned, results }: Cell): void {
    this.#title.textContent = `${op} in ${format}`;
    // The worst first; what has not run yet can be run from here.
    const ran = [...results].sort((a, b) => b.worst - a.worst);
    const rest = planned
      .filter((id) => !ran.some((result) => result.id === id))
      .map((id) => ({ id, tier: "default", worst: 0 }) as LightResult);
    this.#results = [...ran, ...rest];
    fill(this.#cases, ...this.#results.map((result, i) => h("option", { value: i }, nameOf(result))));
    this.element.showModal();
    void this.#show();
  }

  async #show(): Promise<void> {
    this.#abort?.abort();
    const abort = new AbortController();
    this.#abort = abort;
    const chosen = this.#results[Number(this.#cases.value)] as LightResult;
    fill(this.#body, h("p", { class: "muted", role: "status" }, "Running the case again …"));
    this.#body.setAttribute("aria-busy", "true");
    try {
      const { id, tier } = chosen;
      const result = await call("detail", { id, tier }, { signal: abort.signal });
      if (!abort.signal.aborted) fill(this.#body, ...describe(result));
    } catch (error) {
      if (!abort.signal.aborted)
        fill(
          this.#body,
          errorBox(
            "The case did not run",
            error,
            button("Try again", () => void this.#show()),
          ),
        );
    }
    if (!abort.signal.aborted) this.#body.removeAttribute("aria-busy");
  }
}

function describe(result: CaseResult): HTMLElement[] {
  const { element, reason, seconds, status, worst, kernels, explanation, wgsl, rerun, outputs = [], digest } = result;
  const verdict = { passed: "passed", failed: "failed", unsupported: "no kernel" }[status];
  return [
    h(
      "dl",
      { class: "facts" },
      term("Result", h("span", { class: `tag ${status}` }, verdict)),
      term("Worst error", status === "unsupported" ? "–" : `${showFraction(worst)} of its bound`),
      term("Time", status === "unsupported" ? "–" : showSeconds(seconds)),
      term("Kernels", counted(kernels)),
      ...(digest === null ? [] : [term("Stored bits", h("code", { title: digest }, digest.slice(0, 16)))]),
    ),
    ...(element === null || worst === 0
      ? []
      : [
          h(
            "p",
            {},
            "Worst element: ",
            h("code", {}, `${element.output}[${element.index}]`),
            ` is ${element.got}, expected ${element.expected} within ${element.bound.toExponential(2)}.`,
          ),
        ]),
    ...(reason === null
      ? []
      : [h("div", { class: `notice ${status === "failed" ? "bad" : ""}` }, h("p", { class: "pre" }, reason))]),
    ...outputs.filter(({ fractions }) => fractions.length > 0).flatMap(pictures),
    h("section", {}, h("h3", {}, "Why this kernel"), code("Why this kernel", explanation || "No kernel was chosen.")),
    ...wgsl.map((source, i) => {
      const title = wgsl.length === 1 ? "Generated WGSL" : `Generated WGSL, dispatch ${i + 1}`;
      return h("section", {}, h("h3", {}, title), code(title, source));
    }),
    h("section", {}, h("h3", {}, "Run it again in Node"), code("Command", rerun)),
  ];
}

/** Names once, with how often. */
function counted(names: readonly string[]): string {
  const unique = [...new Set(names)];
  const times = (name: string) => names.filter((other) => other === name).length;
  return unique.map((name) => (times(name) > 1 ? `${name} × ${times(name)}` : name)).join(", ") || "none";
}

function pictures({ name, shape, fractions, ulps }: OutputErrors): HTMLElement[] {
  const { x, y, summary } = histogram(ulps);
  const size = shape.join(" × ");
  return [
    h(
      "section",
      { class: "pictures" },
      h(
        "div",
        {},
        h("h3", {}, `Errors of ${name} in ulp`),
        barChart({
          label: `Histogram of the errors of ${name}: ${summary}`,
          x,
          y,
          xLabel: "error in ulp of float32",
          yLabel: "elements",
        }),
        h("p", { class: "muted" }, `${summary}.`),
      ),
      h(
        "div",
        {},
        h("h3", {}, `Error over ${name}, ${size}`),
        heatmap(
          shape,
          fractions,
          `Error of each element of ${name} (${size}) as a fraction of its bound; the worst is ${showFraction(fractions.reduce((a, b) => Math.max(a, b), 0))}`,
        ),
      ),
    ),
  ];
}

/** Long text that scrolls by itself, by keyboard too. */
function code(label: string, text: string): HTMLElement {
  return h("pre", { tabindex: 0, role: "region", "aria-label": label }, h("code", {}, text));
}
