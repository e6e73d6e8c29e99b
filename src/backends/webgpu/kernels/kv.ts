import { codecBits, extentOf, type Format } from "../../../formats/format.js";
import type { KeyRows } from "../../../ir/attention-shape.js";
import type { StoredLayout } from "../../stored-layout.js";
import { ruleObstacle, ruleText } from "../wgsl/rules.js";

/**
 * WGSL `fn key_row(b: u32, h: u32, j: u32) -> u32`: the stored row of the key at position j, as `keyRowOf` of `ir/attention.ts`.
 * A paged cache needs the binding `pages: array<u32>`. `keys` is the extent of the keys in WGSL.
 */
export function keyRowFunction({ page, kvHeads, ring }: KeyRows, keys: string): string {
  const slot = ring ? `j % ${keys}` : "j";
  const row =
    page === null
      ? `(b * ${kvHeads}u + h) * ${keys} + slot`
      : `(pages[slot / ${page}u] * ${kvHeads}u + h) * ${page}u + slot % ${page}u`;
  return `fn key_row(b: u32, h: u32, j: u32) -> u32 { let slot = ${slot}; return ${row}; }`;
}

/** Why a workgroup cannot quantize a row of `size` elements to the format by itself, or null. */
export function rowObstacle(format: Format, size: number): string | null {
  const obstacle = ruleObstacle(format);
  if (obstacle !== null) return obstacle;
  const [first, second] = format.scales;
  if (second !== undefined) return `${format.name} has a second scale level, which other tokens share`;
  if (first === undefined) return format.rule.kind === "cast" ? null : `rule ${format.rule.kind} needs a scale`;
  if (first.block[0] !== 1) return `a block of ${format.name} spans ${first.block[0]} rows, which other tokens share`;
  return size % extentOf(first.block[1], size) === 0 ? null : `its block of ${first.block[1]} does not divide ${size}`;
}

/** Module-scope text of `storeRow`, once a shader: it needs `EXACT`. */
export function rowFunctions(format: Format, size: number, threads: number): string {
  return `${ruleText(format, {}).functions}
var<workgroup> codes: array<u32, ${size}>;
var<workgroup> lows: array<u32, ${threads}>;
var<workgroup> highs: array<u32, ${threads}>;
var<workgroup> chosen: array<Chosen, ${blocksOf(format, size)}>;`;
}

const blocksOf = (format: Format, size: number) => size / extentOf(format.scales[0]?.block[1] ?? "all", size);

/**
 * Statements by which a whole workgroup of at least `size` threads quantizes a row and stores it in `buffer`, an
 * `array<atomic<u32>>` in the layout: thread lid holds element lid, as float32 bits in `bits`; `row` is the stored row. Codes,
 * scales and zero points are those of `quantizeTensor` bit for bit. Words of scales that rows share are changed bit by bit.
 */
export function storeRow(layout: StoredLayout, buffer: string, threads: number): string {
  const { format, rowStride } = layout;
  const size = layout.shape[1];
  const bits = codecBits(format.element);
  const blocks = blocksOf(format, size);
  const width = size / blocks;
  const put = (field: "scale" | "zero", codeBits: number, offset: number) => {
    const index = `row * ${blocks}u + lid`;
    if (codeBits === 32) return `atomicStore(&${buffer}[${offset}u + ${index}], mine.${field});`;
    const per = 32 / codeBits;
    return `{ let at = ${offset}u + (${index}) / ${per}u; let shift = ((${index}) % ${per}u) * ${codeBits}u;
      atomicAnd(&${buffer}[at], ~(${2 ** codeBits - 1}u << shift)); atomicOr(&${buffer}[at], mine.${field} << shift); }`;
  };
  const [level] = format.scales;
  const choose =
    level === undefined
      ? ""
      : `let ok = lid < ${size}u;
    let nan = exact_is_nan(bits);
    lows[lid] = select(0xffffffffu, select(exact_key(bits), 0u, nan), ok);
    highs[lid] = select(0u, select(exact_key(bits), 0xffffffffu, nan), ok);
    workgroupBarrier();
    for (var half = ${2 ** Math.ceil(Math.log2(width)) / 2}u; half > 0u; half /= 2u) {
      let at = lid % ${width}u;
      if (ok && at < half && at + half < ${width}u) {
        lows[lid] = min(lows[lid], lows[lid + half]);
        highs[lid] = max(highs[lid], highs[lid + half]);
      }
      workgroupBarrier();
    }
    if (lid < ${blocks}u) {
      let mine = choose(exact_from_key(lows[lid * ${width}u]), exact_from_key(highs[lid * ${width}u]), 0u);
      chosen[lid] = mine;
      ${put("scale", codecBits(level.codec), layout.scales[0] as number)}
      ${format.zero.domain === "none" ? "" : put("zero", codecBits(format.zero.codec), layout.zero)}
    }
    workgroupBarrier();`;
  const code =
    level === undefined
      ? "code_of(bits, 0u, 0u)"
      : `code_of(bits, chosen[lid / ${width}u].a, chosen[lid / ${width}u].b)`;
  return `{
    ${choose}
    if (lid < ${size}u) { codes[lid] = ${code}; }
    workgroupBarrier();
    for (var word = lid; word < ${rowStride}u; word += ${threads}u) {
      var packed = 0u;
      for (var i = word * 32u / ${bits}u; i < ${size}u && i * ${bits}u < word * 32u + 32u; i++) {
        let bit = i32(i * ${bits}u) - i32(word * 32u);
        packed |= select(codes[i] << u32(bit), codes[i] >> u32(-bit), bit < 0);
      }
      atomicStore(&${buffer}[row * ${rowStride}u + word], packed);
    }
  }`;
}
