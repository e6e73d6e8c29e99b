import uPlot from "uplot";
import { h } from "./dom.js";

const css = (name: string): string => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Colours of a canvas do not follow the colour scheme by themselves. */
const redraws = new Set<WeakRef<() => void>>();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const entry of redraws) {
    const redraw = entry.deref();
    if (redraw === undefined) redraws.delete(entry);
    else redraw();
  }
});

interface Chart {
  readonly label: string;
  readonly x: readonly number[];
  readonly y: readonly number[];
  readonly xLabel: string;
  readonly yLabel: string;
  readonly height?: number;
}

/** Bars over a number line, as wide as their place. `label` says in words what they show. */
export function barChart({ label, x, y, xLabel, yLabel, height = 220 }: Chart): HTMLElement {
  const holder = h("div", { class: "chart", role: "img", "aria-label": label });
  let plot: uPlot | null = null;
  const draw = () => {
    plot?.destroy();
    const axis = {
      stroke: () => css("--muted"),
      grid: { stroke: () => css("--line"), width: 1 },
      ticks: { show: false },
      font: `12px ${css("--sans")}`,
      labelFont: `12px ${css("--sans")}`,
      labelSize: 20,
    };
    plot = new uPlot(
      {
        width: Math.max(holder.clientWidth, 200),
        height,
        cursor: { drag: { x: false, y: false }, points: { show: false } },
        legend: { show: false },
        scales: {
          x: { time: false, range: () => around(x) },
          y: { range: (_, __, high) => [0, high > 0 ? high * 1.08 : 1] },
        },
        axes: [
          { ...axis, label: xLabel, grid: { show: false }, size: 28 },
          { ...axis, label: yLabel, size: 60, values: (_, ticks) => ticks.map(showTick) },
        ],
        series: [
          {},
          {
            stroke: css("--accent"),
            fill: css("--accent"),
            width: 0,
            paths: (uPlot.paths.bars as uPlot.Series.BarsPathBuilderFactory)({ size: [0.9, 60] }),
            points: { show: false },
          },
        ],
      },
      [x as number[], y as number[]],
      holder,
    );
  };
  new ResizeObserver(([entry]) => {
    if (entry === undefined || entry.contentRect.width === 0) return;
    if (plot === null) draw();
    else plot.setSize({ width: Math.max(entry.contentRect.width, 200), height });
  }).observe(holder);
  keep(holder, draw);
  return holder;
}

function showTick(value: number): string {
  const plain = value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5);
  return plain ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

/** Half a bar's width on either side. */
function around(x: readonly number[]): [number, number] {
  const [low, high] = [x[0] ?? 0, x.at(-1) ?? 0];
  const half = x.length > 1 ? (high - low) / (x.length - 1) / 2 : 0.5;
  return [low - half, high + half];
}

/** The element keeps its redraw alive, and nothing else does. */
function keep(holder: HTMLElement, redraw: () => void): void {
  (holder as HTMLElement & { redraw?: () => void }).redraw = redraw;
  redraws.add(new WeakRef(redraw));
}

export interface Histogram {
  readonly x: number[];
  readonly y: number[];
  readonly summary: string;
}

/** The part of all errors that a histogram's range holds: one element next to zero may be off by thousands of its own ulp. */
const SHOWN = 0.98;

/** Signed errors in bins around zero, the outermost with all that is farther. What is no number is counted in the summary only. */
export function histogram(ulps: Float32Array, bins = 41): Histogram {
  const finite = ulps.filter(Number.isFinite);
  const sorted = finite.map(Math.abs).sort();
  const at = (part: number, from: Float32Array) => from[Math.min(from.length - 1, Math.floor(part * from.length))] ?? 0;
  const most = sorted.at(-1) ?? 0;
  const exact = finite.filter((value) => value === 0).length;
  const range = at(SHOWN, sorted.subarray(exact));
  const count = range === 0 ? 1 : bins;
  const width = range === 0 ? 1 : (2 * range) / bins;
  const y = new Array<number>(count).fill(0);
  for (const value of finite) {
    const bin = Math.floor((value + (width * count) / 2) / width);
    const within = Math.min(count - 1, Math.max(0, bin));
    y[within] = (y[within] as number) + 1;
  }
  const x = y.map((_, i) => (i - (count - 1) / 2) * width);
  const farther = finite.filter((value) => Math.abs(value) > range).length;
  const beyond = ulps.length - finite.length;
  const summary = [
    `${ulps.length.toLocaleString("en")} elements`,
    `${exact.toLocaleString("en")} exact`,
    `median ${show(at(0.5, sorted))} ulp`,
    `largest ${show(most)} ulp`,
    ...(farther > 0 ? [`${farther} beyond ${show(range)} ulp in the outermost bars`] : []),
    ...(beyond > 0 ? [`${beyond} no number`] : []),
  ].join(", ");
  return { x, y, summary };
}

const show = (value: number): string =>
  value === 0 ? "0" : value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(2);

/** Errors over a matrix, one square an element, as fractions of their bounds. The last extent runs to the right. */
export function heatmap(shape: readonly number[], fractions: Float32Array, label: string): HTMLElement {
  const columns = shape.at(-1) ?? 1;
  const rows = Math.max(1, Math.ceil(fractions.length / columns));
  // Long rows are folded, so that a vector is a picture too.
  const width = Math.min(columns, 256);
  const folds = Math.ceil(columns / width);
  const lines = rows * folds;
  const canvas = h("canvas", { width, height: lines, role: "img", "aria-label": label, class: "heatmap" });
  const readout = h("p", { class: "muted readout" }, "Point at the picture to read an element.");
  // Most errors are far below their bounds: the ramp ends at the worst that is within.
  const most = fractions.reduce((worst, value) => (value <= 1 ? Math.max(worst, value) : worst), 0);
  const draw = () => {
    const context = canvas.getContext("2d") as CanvasRenderingContext2D;
    const image = context.createImageData(width, lines);
    const stops = ["--heat-0", "--heat-1", "--heat-bad"].map((name) => channels(css(name)));
    for (let i = 0; i < fractions.length; i++) {
      const [row, column] = [Math.floor(i / columns), i % columns];
      const at = 4 * ((row * folds + Math.floor(column / width)) * width + (column % width));
      image.data.set(colour((fractions[i] as number) > 1 ? 2 : (fractions[i] as number) / (most || 1), stops), at);
    }
    context.putImageData(image, 0, 0);
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.min(width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * width)));
    const y = Math.min(lines - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * lines)));
    const [row, column] = [Math.floor(y / folds), (y % folds) * width + x];
    const value = fractions[row * columns + column];
    if (value !== undefined && column < columns)
      readout.textContent = `Row ${row}, column ${column}: ${showFraction(value)} of the bound`;
  });
  draw();
  const exact = fractions.every((value) => value === 0);
  const scale = exact
    ? h("p", { class: "heat-scale" }, "Every element is exact.")
    : h(
        "p",
        { class: "heat-scale" },
        h("span", {}, "0"),
        h("span", { class: "heat-ramp", "aria-hidden": true }),
        h("span", {}, `${showFraction(most)} of the bound`),
        h("span", { class: "heat-over", "aria-hidden": true }),
        h("span", {}, "beyond it"),
      );
  const figure = h("div", { class: "heat" }, canvas, scale, readout);
  keep(figure, draw);
  return figure;
}

export const showFraction = (value: number): string => (Number.isFinite(value) ? value.toFixed(3) : "wrong");

type Channels = readonly [number, number, number];

/** From 0 to 1 along the ramp; anything else, NaN too, is beyond. */
function colour(fraction: number, [low, high, bad]: readonly Channels[]): number[] {
  if (!(fraction <= 1)) return [...(bad as Channels), 255];
  return [...(low as Channels).map((value, i) => value + fraction * (((high as Channels)[i] as number) - value)), 255];
}

/** The channels of a colour in any notation, as the browser computes them. */
function channels(text: string): Channels {
  const context = new OffscreenCanvas(1, 1).getContext("2d") as OffscreenCanvasRenderingContext2D;
  context.fillStyle = text;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
  return [r as number, g as number, b as number];
}
