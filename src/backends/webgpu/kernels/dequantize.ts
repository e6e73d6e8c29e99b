import { type FloatType, f32Bits } from "../../../core/dtype.js";
import type { Codec } from "../../../formats/format.js";
import { codecBits, codecVector, extentOf, type Format, midCode, type ScaleLevel } from "../../../formats/format.js";
import { type StoredLayout, storedLayout } from "../../stored-layout.js";
import { FLAT_WORKGROUP, flatGrid } from "../kernel.js";
import { decodeFunction, u } from "../wgsl/codec.js";
import { EXACT } from "../wgsl/exact.js";
import type { KernelText } from "./quantize.js";

const THREADS = 256;

/**
 * A kernel that writes the values of a stored tensor (binding `x`, words in `storedLayout(format, [capacityRows, k])`) as float32
 * [rows, k] (binding `out`). Every operation of `formats/tensor.ts` is rounded to float32 where that has float64: a value that
 * is a product of a code and scales is `Math.fround` of it bit for bit, subnormals kept; with a zero point two roundings
 * happen instead of one, unless the first is exact (as with 16-bit scales). `rowsExpression` as for `quantizeKernel`.
 */
export function dequantizeKernel(
  format: Format,
  k: number,
  capacityRows: number,
  options: { readonly rowsExpression?: string; readonly dtype?: FloatType } = {},
): KernelText {
  const layout = storedLayout(format, [capacityRows, k]);
  const rows = `(${options.rowsExpression ?? "params.v[0].x"})`;
  const wgsl = `struct Params { v: array<vec4<u32>, 4> }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;
${EXACT}
// Code number index of a run of codes that starts at word base.
fn code_at(base: u32, index: u32, bits: u32) -> u32 {
  let bit = index * bits;
  let offset = bit % 32u;
  let word = base + bit / 32u;
  var code = x[word] >> offset;
  if (offset + bits > 32u) { code |= x[word + 1u] << (32u - offset); }
  return code & (0xffffffffu >> (32u - bits));
}
${elementFunction(format.element, layout)}
${format.scales.map((level, i) => blockFunction(`scale_${i}`, level, level.codec, layout.scales[i] as number, layout)).join("")}${zeroFunction(format, layout)}
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let at = ${FLAT_WORKGROUP} * ${THREADS}u + thread;
  if (at >= ${rows} * ${k}u) { return; }
  let row = at / ${k}u;
  let column = at % ${k}u;
  out[at] = ${valueText(format, options.dtype ?? "f32")};
}
`;
  const workgroups = (count: number) => flatGrid(Math.ceil((count * k) / THREADS));
  return { passes: [{ wgsl, entryPoint: "main", workgroups, bindings: ["params", "x", "out"] }], scratchWords: 0 };
}

/** Every operation is rounded to `dtype`, as torchao's dequantize does (`quantize/dequantize.ts`). */
function valueText({ element, scales, zero }: Format, dtype: FloatType): string {
  const round = (bits: string) => (dtype === "f32" ? bits : `exact_${dtype}(${bits})`);
  const scale = scales
    .map((_, i) => `scale_${i}(row, column)`)
    .reduceRight((a, b) => (a === "" ? b : `exact_mul(${a}, ${b})`), "");
  const middle = zero.domain === "float" ? midCode(element) : 0;
  let value = round("element(row, column)");
  if (middle !== 0) value = round(`exact_sub(${value}, ${u(f32Bits(middle))})`);
  if (zero.domain === "int") value = round(`exact_sub(${value}, ${round("zero_point(row, column)")})`);
  if (scale !== "") value = round(`exact_mul(${value}, ${scale})`);
  return zero.domain === "float" ? round(`exact_add(${value}, zero_point(row, column))`) : value;
}

function zeroFunction({ scales, zero }: Format, layout: StoredLayout): string {
  const first = scales[0];
  if (zero.domain === "none" || first === undefined) return "";
  return blockFunction("zero_point", first, zero.codec, layout.zero, layout);
}

/** `name(row, column)`: the bits of the value of the block's code. */
function blockFunction(name: string, level: ScaleLevel, codec: Codec, offset: number, layout: StoredLayout): string {
  const width = extentOf(level.block[1], layout.shape[1]);
  const columns = Math.ceil(layout.shape[1] / Math.max(width, 1));
  const band = level.block[0] === "all" ? "" : `row / ${level.block[0]}u * ${columns}u + `;
  return `${decodeFunction(codec, `${name}_value`)}
fn ${name}(row: u32, column: u32) -> u32 {
  return bitcast<u32>(${name}_value(code_at(${offset}u, ${band}column / ${width}u, ${codecBits(codec)}u)));
}
`;
}

/** `element(row, column)`: the bits of the value of an element's code. */
function elementFunction(codec: Codec, layout: StoredLayout): string {
  const [patchRows, patchK] = codecVector(codec);
  const code = `code_at(row / ${patchRows}u * ${layout.rowStride}u, column / ${patchK}u, ${codecBits(codec)}u)`;
  const size = patchRows * patchK;
  const signature = "fn element(row: u32, column: u32) -> u32";
  if (codec.kind !== "lut" || (codec.entries !== "learned" && size === 1)) {
    return `${decodeFunction(codec, "element_value")}${signature} { return bitcast<u32>(element_value(${code})); }`;
  }
  const entry = `${code} * ${size}u + row % ${patchRows}u * ${patchK}u + column % ${patchK}u`;
  if (codec.entries === "learned") return `${signature} { return x[${layout.table}u + ${entry}]; }`;
  const table = codec.entries.map((value) => u(f32Bits(value)));
  return `const table = array<u32, ${table.length}>(${table.join(", ")});
${signature} { return table[${entry}]; }`;
}
