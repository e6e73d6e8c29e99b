import { h } from "./dom.js";
import type { LightResult, PlannedCase } from "./protocol.js";

/** One format under one op. */
export interface Cell {
  readonly op: string;
  readonly format: string;
  /** Ids of its cases on one device. */
  readonly planned: readonly string[];
  readonly results: LightResult[];
}

const keyOf = (format: string, op: string): string => `${format}\n${op}`;

/** The matrix of formats and ops. Arrow keys move between cells, Enter opens one. */
export class Matrix {
  readonly element: HTMLElement;
  readonly #cells = new Map<string, Cell>();
  readonly #buttons = new Map<string, HTMLTableCellElement>();
  readonly #open: (cell: Cell) => void;
  #grid: HTMLTableCellElement[][] = [];

  constructor(open: (cell: Cell) => void) {
    this.#open = open;
    this.element = h("div", { class: "scroll matrix-box" });
  }

  get cells(): Iterable<Cell> {
    return this.#cells.values();
  }

  /** Lays out a table; earlier results are forgotten. */
  reset(cases: readonly PlannedCase[]): void {
    this.#cells.clear();
    this.#buttons.clear();
    const [formats, ops] = [new Set<string>(), new Map<string, Set<string>>()];
    const planned = new Map<string, string[]>();
    for (const { id, op, format } of cases) {
      formats.add(format);
      ops.set(op, (ops.get(op) ?? new Set()).add(format));
      planned.set(keyOf(format, op), [...(planned.get(keyOf(format, op)) ?? []), id]);
    }
    // Ops that most formats have come first, so that a narrow window shows the fullest columns.
    const columns = [...ops].sort(([, a], [, b]) => b.size - a.size).map(([op]) => op);
    this.#grid = [];
    const body = [...formats].map((format) => {
      const row: HTMLTableCellElement[] = [];
      const cells = columns.map((op) => {
        const ids = planned.get(keyOf(format, op));
        if (ids === undefined) return h("td", { class: "none", role: "gridcell" });
        const cell: Cell = { op, format, planned: ids, results: [] };
        const td = h("td", { class: "cell", role: "gridcell", tabindex: -1 });
        td.addEventListener("click", () => this.#activate(td, cell));
        td.addEventListener("keydown", (event) => this.#key(event, td, cell));
        this.#cells.set(keyOf(format, op), cell);
        this.#buttons.set(keyOf(format, op), td);
        row.push(td);
        paint(td, cell);
        return td;
      });
      this.#grid.push(row);
      return h("tr", { role: "row" }, h("th", { scope: "row", role: "rowheader" }, format), ...cells);
    });
    const head = columns.map((op) => h("th", { scope: "col", role: "columnheader" }, op));
    this.element.replaceChildren(
      h(
        "table",
        {
          class: "matrix",
          role: "grid",
          "aria-label": "Worst error of each format and op, as a fraction of its bound",
          "aria-readonly": true,
        },
        h("thead", {}, h("tr", { role: "row" }, h("th", { scope: "col", role: "columnheader" }, "format"), ...head)),
        h("tbody", {}, ...body),
      ),
    );
    this.#grid[0]?.[0]?.setAttribute("tabindex", "0");
  }

  add(result: LightResult): void {
    const key = keyOf(result.format, result.op);
    const cell = this.#cells.get(key);
    const td = this.#buttons.get(key);
    if (cell === undefined || td === undefined) return;
    cell.results.push(result);
    paint(td, cell);
  }

  #activate(td: HTMLTableCellElement, cell: Cell): void {
    this.#focus(td);
    this.#open(cell);
  }

  #focus(td: HTMLTableCellElement): void {
    for (const other of this.#buttons.values()) if (other.tabIndex === 0) other.tabIndex = -1;
    td.tabIndex = 0;
    td.focus();
  }

  #key(event: KeyboardEvent, td: HTMLTableCellElement, cell: Cell): void {
    const row = this.#grid.findIndex((cells) => cells.includes(td));
    const column = this.#grid[row]?.indexOf(td) ?? 0;
    const vertical = (step: number) => {
      // Rows have cells for different ops: the nearest one below or above.
      for (let next = row + step; this.#grid[next] !== undefined; next += step) {
        const same = this.#grid[next]?.find((other) => other.cellIndex === td.cellIndex);
        if (same !== undefined) return same;
      }
      return undefined;
    };
    const target = {
      ArrowLeft: () => this.#grid[row]?.[column - 1],
      ArrowRight: () => this.#grid[row]?.[column + 1],
      ArrowUp: () => vertical(-1),
      ArrowDown: () => vertical(1),
      Home: () => this.#grid[row]?.[0],
      End: () => this.#grid[row]?.at(-1),
    }[event.key];
    if (target !== undefined) {
      event.preventDefault();
      const next = target();
      if (next !== undefined) this.#focus(next);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#activate(td, cell);
    }
  }
}

/** What a cell says and how it looks. Colour is never the only sign. */
function paint(td: HTMLTableCellElement, { op, format, planned, results }: Cell): void {
  const count = (status: LightResult["status"]) => results.filter((result) => result.status === status).length;
  const [failed, unsupported] = [count("failed"), count("unsupported")];
  const worst = results.reduce((most, result) => Math.max(most, result.worst), 0);
  const waiting = new Set(planned).size - new Set(results.map(({ id }) => id)).size;
  const [state, text, words] =
    failed > 0
      ? ["failed", Number.isFinite(worst) ? worst.toFixed(2) : "wrong", `${failed} failed, worst ${showWorst(worst)}`]
      : results.length === 0
        ? ["waiting", String(planned.length), `${planned.length} cases, not run`]
        : unsupported === results.length && waiting === 0
          ? ["unsupported", "no kernel", "no kernel"]
          : [
              "passed",
              worst === 0 ? "exact" : worst.toFixed(2),
              worst === 0 ? "exact" : `worst error ${showWorst(worst)} of its bound`,
            ];
  const partial = waiting > 0 && results.length > 0;
  td.className = `cell ${state}${partial ? " partial" : ""}${worst === 0 ? " zero" : ""}`;
  td.style.setProperty("--fraction", String(Math.min(1, worst)));
  td.textContent = text;
  td.setAttribute("aria-label", `${format}, ${op}: ${words}${partial ? `, ${waiting} to go` : ""}`);
}

const showWorst = (worst: number): string => (Number.isFinite(worst) ? worst.toFixed(2) : "infinite");
