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

function cells({ quantize, result, refused }: AccuracyRow): string[] {
  if (result === undefined) return [quantize, "-", "", "", refused ?? ""];
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

/** The table as text: columns of equal width, numbers to the right. */
export function accuracyText(rows: readonly AccuracyRow[]): string {
  const lines = [[...COLUMNS], ...rows.map(cells)];
  const widths = COLUMNS.map((_, i) => Math.max(...lines.map((line) => (line[i] as string).length)));
  return lines
    .map((line) =>
      line.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] as number) : cell.padStart(widths[i] as number))),
    )
    .map((line) => `${line.join("  ").trimEnd()}\n`)
    .join("");
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

const PLOT = { width: 900, height: 640, label: 9 } as const;

/**
 * Size against perplexity as an SVG document: one labelled point a row. Perplexity is on a logarithmic axis, since formats differ
 * by decades.
 */
export async function accuracySvg(rows: readonly AccuracyRow[], title: string): Promise<string> {
  const points = rows.flatMap(({ quantize, result }) =>
    result === undefined ? [] : [{ format: quantize, size: result.weightBytes / 1e6, perplexity: result.perplexity }],
  );
  const shifts = labelShifts(points);
  const vega = await import("vega");
  const axis = (scale: string, orient: "bottom" | "left", text: string) => ({ scale, orient, title: text, grid: true });
  const x = { scale: "size", field: "size" };
  const view = new vega.View(
    vega.parse({
      $schema: "https://vega.github.io/schema/vega/v6.json",
      width: PLOT.width,
      height: PLOT.height,
      padding: 10,
      background: "white",
      title,
      data: [{ name: "rows", values: points.map((point, i) => ({ ...point, shift: shifts[i] })) }],
      scales: [
        { name: "size", type: "linear", domain: extent(points, "size"), range: "width" },
        { name: "perplexity", type: "log", domain: extent(points, "perplexity"), range: "height" },
      ],
      axes: [axis("size", "bottom", "weights, MB"), axis("perplexity", "left", "perplexity")],
      marks: [
        {
          type: "symbol",
          from: { data: "rows" },
          encode: {
            enter: {
              x,
              y: { scale: "perplexity", field: "perplexity" },
              size: { value: 30 },
              fill: { value: "#2a6db0" },
            },
          },
        },
        {
          type: "text",
          from: { data: "rows" },
          encode: {
            enter: {
              x: { ...x, offset: 6 },
              y: { scale: "perplexity", field: "perplexity", offset: { field: "shift" } },
              text: { field: "format" },
              fontSize: { value: PLOT.label },
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

interface Point {
  readonly format: string;
  readonly size: number;
  readonly perplexity: number;
}

/** The range of a field with room for a label at its end. */
function extent(points: readonly Point[], field: "size" | "perplexity"): [number, number] {
  const values = points.map((point) => point[field]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return [low * 0.98, high * (high === low ? 1.1 : 1.02)];
}

/** Pixels by which labels are moved up or down so that none lies on another: from the least perplexity on, each to the nearest free place. */
function labelShifts(points: readonly Point[]): number[] {
  const [left, right] = extent(points, "size");
  const [low, high] = extent(points, "perplexity");
  const x = ({ size }: Point) => ((size - left) / (right - left)) * PLOT.width;
  const y = ({ perplexity }: Point) => (Math.log(high / perplexity) / Math.log(high / low)) * PLOT.height;
  const width = ({ format }: Point) => format.length * PLOT.label * 0.6 + 8;
  const placed: { left: number; right: number; y: number }[] = [];
  const shifts = new Map<Point, number>();
  for (const point of [...points].sort((a, b) => a.perplexity - b.perplexity)) {
    const [from, to] = [x(point), x(point) + width(point)];
    const free = (at: number) =>
      placed.every((other) => other.left > to || other.right < from || Math.abs(other.y - at) >= PLOT.label);
    let shift = 0;
    for (let step = 1; !free(y(point) + shift); step++) shift = (step % 2 === 1 ? -1 : 1) * Math.ceil(step / 2) * 3;
    placed.push({ left: from, right: to, y: y(point) + shift });
    shifts.set(point, shift);
  }
  return points.map((point) => shifts.get(point) as number);
}
