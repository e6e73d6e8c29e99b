import { call, WorkerFailure } from "./client.js";
import { Detail } from "./detail.js";
import { announce, button, errorBox, fill, h, showSeconds } from "./dom.js";
import { Matrix } from "./matrix.js";
import type { LightResult, ValidateArguments, ValidateNotice } from "./protocol.js";

const TIERS = ["default", "portable", "subgroups", "f16"] as const;

/** The page that runs the case table and shows it as a matrix. */
export function validatePage(): HTMLElement {
  return new ValidatePage().element;
}

class ValidatePage {
  readonly element: HTMLElement;
  readonly #matrix: Matrix;
  readonly #detail = new Detail();
  readonly #table = select("table", "Table", [
    ["quick", "quick"],
    ["full", "full (every block and shape)"],
  ]);
  readonly #tier = select("tier", "Tiers", [["all", "all"], ...TIERS.map((tier) => [tier, `${tier} only`] as const)]);
  readonly #start = button("Start", () => void this.#run(false), { class: "primary", id: "start" });
  readonly #cancel = button("Cancel", () => this.#stop(), { id: "cancel", disabled: true });
  readonly #export = button("Export JSON", () => void this.#save(), { id: "export", disabled: true });
  readonly #progress = h("progress", { max: 1, value: 0, "aria-label": "Cases done" });
  readonly #line = h("p", { class: "status", id: "status" }, "Nothing has run yet.");
  readonly #notices = h("div", { class: "notices", id: "notices" });
  readonly #failures = h("div", { id: "failures" });
  #abort: AbortController | null = null;
  #results: LightResult[] = [];
  #seconds = 0;

  constructor() {
    this.#matrix = new Matrix((cell) => this.#detail.open(cell));
    this.element = h(
      "section",
      { class: "card", "aria-labelledby": "validate-title", id: "validation" },
      h("h1", { id: "validate-title" }, "Validate this GPU"),
      h(
        "p",
        { class: "lead" },
        "Runs every kernel and judges each element against a float64 evaluation with a derived error bound. A cell is the worst error of a format and op as a fraction of its bound: at most 1 passes.",
      ),
      h(
        "div",
        { class: "controls" },
        this.#table.field,
        this.#tier.field,
        h("div", { class: "buttons" }, this.#start, this.#cancel, this.#export),
      ),
      h("div", { class: "run" }, this.#progress, this.#line),
      this.#notices,
      legend(),
      this.#matrix.element,
      h(
        "p",
        { class: "muted keys" },
        "Arrow keys move, ",
        h("kbd", {}, "Enter"),
        " opens a cell with its errors, kernel and shader.",
      ),
      this.#failures,
      h(
        "details",
        { class: "tools" },
        h("summary", {}, "Test the recovery"),
        h(
          "p",
          {},
          "Destroys the GPU device under a running validation, as a driver that crashes would. Results so far are kept and the run can go on.",
        ),
        button("Destroy the device", () => void this.#lose(), { id: "lose" }),
      ),
      this.#detail.element,
    );
    this.#table.control.addEventListener("change", () => void this.#layOut());
    void this.#layOut();
  }

  get #quick(): boolean {
    return this.#table.control.value === "quick";
  }

  async #layOut(): Promise<void> {
    this.#results = [];
    this.#matrix.reset(await call("cases", { quick: this.#quick }));
  }

  async #run(resume: boolean): Promise<void> {
    const abort = new AbortController();
    this.#abort = abort;
    this.#busy(true);
    fill(this.#notices);
    const tier = TIERS.find((name) => name === this.#tier.control.value);
    const args: ValidateArguments = { quick: this.#quick, tiers: tier === undefined ? null : [tier], resume };
    const before = resume ? this.#seconds : 0;
    const start = performance.now();
    let [done, total, device] = [0, 0, ""];
    const notice = (event: ValidateNotice) => {
      if (event.kind === "device") {
        [done, total, device] = [0, event.cases, event.device.tier ?? event.device.backend];
        announce(`Tier ${device}: ${total} cases`);
      } else if (event.kind === "result") {
        this.#results.push(event.result);
        this.#matrix.add(event.result);
        done++;
        this.#progress.max = Math.max(total, 1);
        this.#progress.value = done;
        if (!abort.signal.aborted)
          this.#line.textContent = `Tier ${device}: ${done} of ${total}. ${counts(this.#results)}.`;
        if (event.result.status === "failed") this.#showFailures();
      } else if (event.kind === "absent") this.#say(`Tier ${event.tier} is not run: ${event.reason}.`);
      else this.#say(event.text);
    };
    let outcome = "Finished";
    try {
      if (!resume) await this.#layOut();
      this.#line.textContent = "Opening the device …";
      await call("validate", args, { signal: abort.signal, notice });
    } catch (error) {
      outcome = this.#stopped(error);
    }
    this.#seconds = before + (performance.now() - start) / 1000;
    this.#abort = null;
    this.#busy(false);
    this.#line.textContent = `${outcome}: ${counts(this.#results)}, ${showSeconds(this.#seconds)}.`;
    announce(this.#line.textContent);
    this.#showFailures();
  }

  /** Kernels that are being built are waited for. */
  #stop(): void {
    this.#abort?.abort();
    this.#cancel.disabled = true;
    this.#line.textContent = "Cancelling …";
  }

  /** What a run that ended early is called, with what can be done about it. */
  #stopped(error: unknown): string {
    const code = error instanceof WorkerFailure ? error.code : "";
    const go = button(this.#results.length > 0 ? "Continue on a new device" : "Try again", () => void this.#run(true), {
      class: "primary",
      id: "continue",
    });
    if (code === "operation/aborted") {
      this.#notices.append(h("div", { class: "notice" }, h("p", {}, "Cancelled. The results so far are kept."), go));
      return "Cancelled";
    }
    const lost = code === "device/lost";
    this.#notices.append(
      errorBox(
        lost ? "The GPU device was lost" : "The run stopped",
        error,
        this.#results.length > 0 && h("p", {}, `${this.#results.length} results are kept.`),
        go,
      ),
    );
    go.focus();
    return lost ? "Device lost" : "Stopped";
  }

  #say(text: string): void {
    this.#notices.append(h("p", { class: "notice" }, text));
  }

  #busy(busy: boolean): void {
    this.#start.disabled = busy;
    this.#cancel.disabled = !busy;
    this.#table.control.disabled = busy;
    this.#tier.control.disabled = busy;
    this.#export.disabled = busy || this.#results.length === 0;
    this.element.setAttribute("aria-busy", String(busy));
  }

  #showFailures(): void {
    const of = (status: LightResult["status"]) => this.#results.filter((result) => result.status === status);
    const list = (results: readonly LightResult[]) =>
      h(
        "ul",
        { class: "cases" },
        ...results.map(({ id, tier, reason, rerun }) =>
          h(
            "li",
            {},
            h("code", {}, `${tier ?? ""} ${id}`.trim()),
            h("p", {}, shortReason(reason)),
            h("code", { class: "rerun" }, rerun),
          ),
        ),
      );
    const [failed, unsupported] = [of("failed"), of("unsupported")];
    fill(
      this.#failures,
      failed.length > 0 && h("div", {}, h("h2", {}, `${failed.length} failed`), list(failed)),
      unsupported.length > 0 &&
        h(
          "details",
          {},
          h("summary", {}, `${unsupported.length} without a kernel, with the reason`),
          list(unsupported),
        ),
    );
  }

  async #save(): Promise<void> {
    const blob = await call("report", null);
    const url = URL.createObjectURL(blob);
    const link = h("a", {
      href: url,
      download: `fewbit-report-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.json`,
    });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    announce("The report was exported");
  }

  async #lose(): Promise<void> {
    const count = await call("lose", null);
    if (count === 0) this.#say("No device is open: start a run first.");
  }
}

function counts(results: readonly LightResult[]): string {
  const count = (status: LightResult["status"]) => results.filter((result) => result.status === status).length;
  const unsupported = count("unsupported");
  return `${count("passed")} passed, ${count("failed")} failed${unsupported > 0 ? `, ${unsupported} without a kernel` : ""}`;
}

/** The last line of an explanation names what is missing. */
const shortReason = (reason: string | null): string =>
  (reason ?? "").split("\n").at(-1)?.trim().replace(/\s+/g, " ") ?? "";

function legend(): HTMLElement {
  const key = (state: string, text: string, fraction = 0) => {
    const swatch = h("span", { class: `swatch cell ${state}`, "aria-hidden": true });
    swatch.style.setProperty("--fraction", String(fraction));
    return h("li", {}, swatch, text);
  };
  return h(
    "ul",
    { class: "legend", "aria-label": "Legend" },
    key("passed zero", "exact"),
    key("passed", "small error", 0.1),
    key("passed", "close to its bound", 1),
    key("failed", "failed"),
    key("unsupported", "no kernel"),
    key("waiting", "how many cases are to run"),
  );
}

function select(id: string, label: string, options: readonly (readonly [value: string, text: string])[]) {
  const control = h("select", { id }, ...options.map(([value, text]) => h("option", { value }, text)));
  return { control, field: h("div", { class: "field" }, h("label", { for: id }, label), control) };
}
