import type { Capabilities } from "../backends/backend.js";
import { decode, maxValue } from "../formats/codec.js";
import {
  type Block,
  bitsPerElement,
  type Codec,
  codecBits,
  codecName,
  codecVector,
  type Format,
} from "../formats/format.js";
import { linearKernels, quantizedOn, TIERS } from "./support.js";

/** The matrix that sizes are given for. */
const SHAPE = [4096, 4096] as const;

/** README's support table: what each format stores, and the kernels that run it in each tier. */
export function formatsTable(formats: readonly Format[]): string {
  const head = ["format", "bits", "quantized on", "reference", ...Object.keys(TIERS).map((tier) => `WebGPU ${tier}`)];
  const rows = formats.map((format) => [
    `\`${format.name}\``,
    bitsText(format),
    quantizedOn(format, Object.values(TIERS)[0] as Capabilities),
    "float64",
    ...Object.values(TIERS).map((device) => linearKernels(format, device)),
  ]);
  return `${table(head, rows)}

Bits per weight count scales and zero points of a ${SHAPE.join(" x ")} matrix. Kernels are those of a linear with one row and with 128
rows; every format also feeds embedding, dequantize and conv2d. The native backend takes every
row of it on CUDA (docs/native.md); there is none for ROCm yet.`;
}

/** docs/formats.md. */
export function formatsPage(formats: readonly Format[]): string {
  const sections = formats.map(
    (format) => `## ${format.name}

${format.use ?? ""}

${table(
  ["", ""],
  [
    ["element", `${elementText(format.element)}, ${codecBits(format.element)} bits`],
    ["range of an element", rangeText(format.element)],
    ["block", blockText(format)],
    ...(format.blocks.length > 1 ? [["other blocks", otherBlocks(format)]] : []),
    ["scale", scaleText(format)],
    ["zero point", zeroText(format)],
    ["bytes per weight", `${round(bitsPerElement(format, SHAPE) / 8, 5)} (${bitsText(format)} bits)`],
    ["source", sourceText(format)],
  ],
)}`,
  );
  return `<!-- Made by "npm run generate" from src/formats/table.ts; do not edit. -->

# Formats

A format says what stored bits mean: a weight is its element code's value times the scale of its block (the product of the
levels, where there are two), after or before a zero point. Blocks are rows x columns of the matrix; "row" is one whole row,
"tensor" the whole matrix. Sizes are those of a ${SHAPE.join(" x ")} matrix, scales and zero points included.

${sections.join("\n\n")}
`;
}

/** \`page\` with the text between its format markers replaced. Throws when it has none. */
export function withFormats(page: string, text: string): string {
  const [begin, end] = ["<!-- formats:begin -->", "<!-- formats:end -->"];
  const [from, to] = [page.indexOf(begin), page.indexOf(end)];
  if (from < 0 || to < from) throw new Error(`the page has no ${begin} ... ${end}`);
  return `${page.slice(0, from + begin.length)}\n\n${text}\n\n${page.slice(to)}`;
}

function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
  return [line(head), line(head.map(() => "---")), ...rows.map(line)].join("\n");
}

function elementText(codec: Codec): string {
  if (codec.kind !== "lut") return codecName(codec);
  const [rows, k] = codecVector(codec);
  const entries = `${codec.entries === "learned" ? "learned " : ""}table of ${2 ** codec.bits}`;
  return rows * k === 1 ? entries : `${entries} ${rows}x${k} patches`;
}

function extents(block: Block): string {
  const name = block.join("x");
  return name === "1xall" ? "row" : name === "allxall" ? "tensor" : name === "allx1" ? "column" : name;
}

function blockText(format: Format): string {
  return format.scales.length === 0 ? "none" : format.scales.map((level) => extents(level.block)).join(", then ");
}

function otherBlocks(format: Format): string {
  const own = format.scales[0]?.block.join("x");
  return format.blocks
    .filter((block) => block.join("x") !== own)
    .map(extents)
    .join(", ");
}

function scaleText(format: Format): string {
  return format.scales.length === 0 ? "none" : format.scales.map((level) => codecName(level.codec)).join(", then ");
}

function zeroText({ zero }: Format): string {
  if (zero.domain === "none") return "none";
  return `${codecName(zero.codec)}, in ${zero.domain === "int" ? "codes" : "values"}`;
}

function bitsText(format: Format): string {
  return String(round(bitsPerElement(format, SHAPE), 4));
}

function rangeText(codec: Codec): string {
  if (codec.kind === "lut" && codec.entries === "learned") return "learned";
  const top = maxValue(codec);
  if (codec.kind === "int") return `${decode(codec, codec.signed ? 2 ** (codec.bits - 1) : 0)} to ${top}`;
  return `±${top >= 1e6 ? top.toExponential(2).replace("e+", "e") : top}`;
}

/** A source that says "specification" means the numerics specification's section. */
function sourceText(format: Format): string {
  return format.source.replaceAll("|", "\\|");
}

function round(value: number, digits: number): number {
  return Number(value.toFixed(digits));
}
