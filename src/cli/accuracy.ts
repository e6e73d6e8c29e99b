import type { WindowLoss } from "../models/evaluate.js";
import { showBytes } from "./terminal.js";

/** One line of an accuracy table. */
export interface AccuracyRow {
  readonly quantize: string;
  /** Absent where the model's layers cannot take the config. */
  readonly result?: {
    readonly perplexity: number;
    readonly nll: number;
    /** Perplexity above that of `none`; null without such a row. */
    readonly delta: number | null;
    readonly weightBytes: number;
    readonly tokensPerSecond: number | null;
    readonly windows: readonly WindowLoss[];
  };
  /** Why there is no result. */
  readonly refused?: string;
}

const COLUMNS = ["format", "perplexity", "delta", "size", "tokens/s"] as const;

function cells(quantize: string, result: NonNullable<AccuracyRow["result"]>): string[] {
  const { perplexity, delta, weightBytes, tokensPerSecond } = result;
  const sign = delta !== null && delta >= 0 ? "+" : "";
  return [
    quantize,
    perplexity.toFixed(4),
    delta === null ? "" : `${sign}${delta.toFixed(4)}`,
    showBytes(weightBytes),
    tokensPerSecond === null ? "" : tokensPerSecond.toFixed(0),
  ];
}

/** Columns right of the name are as wide as any number in them. */
const WIDTHS = [12, 12, 9, 9] as const;

/** The table as text, line by line so that rows can be shown as they come: columns of equal width, numbers to the right. */
export function accuracyLines(names: readonly string[]): { readonly head: string; line(row: AccuracyRow): string } {
  const first = Math.max(COLUMNS[0].length, ...names.map((name) => name.length));
  const join = ([name = "", ...rest]: readonly string[]) =>
    `${(name.padEnd(first) + rest.map((cell, i) => cell.padStart(WIDTHS[i] as number)).join("")).trimEnd()}\n`;
  return {
    head: join(COLUMNS),
    line: (row) =>
      row.result === undefined
        ? join([row.quantize, "-", `  ${row.refused ?? ""}`])
        : join(cells(row.quantize, row.result)),
  };
}

/** The table with unrounded numbers, one line a row (RFC 4180). */
export function accuracyCsv(rows: readonly AccuracyRow[]): string {
  const quote = (text: string) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const line = (values: readonly (string | number | null | undefined)[]) =>
    `${values.map((value) => quote(String(value ?? ""))).join(",")}\r\n`;
  const body = rows.map(({ quantize, result, refused }) =>
    line([
      quantize,
      result?.perplexity,
      result?.delta,
      result?.nll,
      result?.weightBytes,
      result?.tokensPerSecond,
      refused,
    ]),
  );
  return line(["format", "perplexity", "delta", "nll", "bytes", "tokens_per_second", "refused"]) + body.join("");
}

const PLOT = { width: 1000, height: 720, font: 9 } as const;

/**
 * Size against perplexity as an SVG document: a labelled point a row, and a line through those than which none is both smaller and better. Both axes
 * are logarithmic; perplexity counts from the least, since formats differ from it by anything from thousandths to hundreds.
 */
export async function accuracySvg(rows: readonly AccuracyRow[], title: string): Promise<string> {
  const measured = rows.flatMap(({ quantize, result }) => (result === undefined ? [] : [{ quantize, ...result }]));
  const least = Math.min(...measured.map(({ perplexity }) => perplexity));
  const size = { domain: sizeRange(measured.map(({ weightBytes }) => weightBytes / 1e6)) };
  const [low, high] = size.domain;
  // Below this, distances are drawn as they are.
  const linear = least / 1000;
  const most = Math.max(...measured.map(({ perplexity }) => perplexity - least), linear) * 1.2;
  const points = measured.map(({ quantize, perplexity, weightBytes }) => ({
    format: quantize,
    size: weightBytes / 1e6,
    above: perplexity - least,
    x: (Math.log(weightBytes / 1e6 / low) / Math.log(high / low)) * PLOT.width,
    y: (1 - Math.log1p((perplexity - least) / linear) / Math.log1p(most / linear)) * PLOT.height,
    best: !measured.some(
      (other) =>
        other.weightBytes <= weightBytes &&
        other.perplexity <= perplexity &&
        (other.weightBytes < weightBytes || other.perplexity < perplexity),
    ),
  }));
  const labels = placeLabels(points);
  const places = points.map((point, i) => ({ ...point, ...(labels[i] as Label) }));
  const ticks = [
    0,
    ...Array.from({ length: 9 }, (_, i) => 10 ** (i - 2)).filter((tick) => tick > linear / 2 && tick < most),
  ];
  const at = (x: string, y: string) => ({ x: { field: x }, y: { field: y } });
  const ink = { signal: "datum.best ? '#1f5fa8' : '#8a8a8a'" };
  const vega = await import("vega");
  const view = new vega.View(
    vega.parse({
      $schema: "https://vega.github.io/schema/vega/v6.json",
      width: PLOT.width,
      height: PLOT.height,
      padding: 10,
      background: "white",
      title,
      data: [
        { name: "rows", values: places },
        { name: "best", values: places.filter(({ best }) => best).sort((a, b) => a.size - b.size) },
      ],
      scales: [
        { name: "size", type: "log", domain: size.domain, range: "width", nice: false },
        { name: "above", type: "symlog", constant: linear, domain: [0, most], range: "height", nice: false },
      ],
      axes: [
        { scale: "size", orient: "bottom", title: "weights, MB", grid: true, gridOpacity: 0.5, format: "~r" },
        {
          scale: "above",
          orient: "left",
          title: `perplexity above ${least.toFixed(4)}`,
          grid: true,
          gridOpacity: 0.5,
          values: ticks,
          format: "~r",
        },
      ],
      marks: [
        {
          type: "line",
          from: { data: "best" },
          encode: { enter: { ...at("x", "y"), stroke: { value: "#1f5fa8" }, strokeOpacity: { value: 0.35 } } },
        },
        {
          type: "rule",
          from: { data: "rows" },
          encode: {
            enter: {
              ...at("x", "y"),
              x2: { field: "labelX" },
              y2: { field: "labelY" },
              stroke: { value: "#8a8a8a" },
              strokeWidth: { value: 0.4 },
            },
          },
        },
        {
          type: "symbol",
          from: { data: "rows" },
          encode: { enter: { ...at("x", "y"), size: { value: 30 }, fill: ink } },
        },
        {
          type: "text",
          from: { data: "rows" },
          encode: {
            enter: {
              ...at("labelX", "labelY"),
              text: { field: "format" },
              align: { field: "align" },
              fill: { signal: "datum.best ? '#1f5fa8' : '#333'" },
              fontSize: { value: PLOT.font },
              baseline: { value: "middle" },
            },
          },
        },
      ],
    }),
    { renderer: "none" },
  );
  try {
    return await view.toSVG();
  } finally {
    view.finalize();
  }
}

/** Sizes with room for a label at either end. */
function sizeRange(sizes: readonly number[]): [number, number] {
  return [Math.min(...sizes) * 0.9, Math.max(...sizes) * 1.12];
}

interface Label {
  readonly labelX: number;
  readonly labelY: number;
  readonly align: "left" | "right";
}

/**
 * Where labels go: each beside its point, on the right or on the left, at the nearest height where it lies on no point and no
 * other label. Those with the fewest neighbours come last: they find room anywhere.
 */
function placeLabels(points: readonly { readonly format: string; readonly x: number; readonly y: number }[]): Label[] {
  const half = PLOT.font / 2 + 0.5;
  const taken = points.map(({ x, y }) => ({ left: x - 3, right: x + 3, top: y - 3, bottom: y + 3 }));
  const near = (a: { x: number; y: number }) => points.filter((b) => Math.hypot(a.x - b.x, a.y - b.y) < 60).length;
  const order = points.map((point, i) => ({ point, i, near: near(point) })).sort((a, b) => b.near - a.near);
  const labels: Label[] = [];
  for (const { point, i } of order) {
    const width = point.format.length * PLOT.font * 0.6;
    const places = Array.from({ length: PLOT.height }, (_, step) => {
      const shift = (step % 2 === 1 ? -1 : 1) * Math.ceil(step / 2) * 2;
      // Labels far up or down stand further out, so that the lines to them are told apart.
      const out = 7 + Math.abs(shift) / 4;
      return (["left", "right"] as const).map((align) => {
        const [labelX, labelY] = [point.x + (align === "left" ? out : -out), point.y + shift];
        const left = align === "left" ? labelX : labelX - width;
        return { labelX, labelY, align, box: { left, right: left + width, top: labelY - half, bottom: labelY + half } };
      });
    }).flat();
    const free = places.find(
      ({ box }) =>
        box.left >= 0 &&
        box.top >= 0 &&
        box.bottom <= PLOT.height &&
        taken.every(
          (other) =>
            other.left > box.right || other.right < box.left || other.top > box.bottom || other.bottom < box.top,
        ),
    );
    const { box, ...label } = free ?? (places[0] as (typeof places)[number]);
    taken.push(box);
    labels[i] = label;
  }
  return labels;
}
