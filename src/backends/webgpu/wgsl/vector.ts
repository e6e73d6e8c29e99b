import { codecBits, codecVector, midCode } from "../../../formats/format.js";
import { scaleGranularity } from "../../../formats/tensor.js";
import type { StoredLayout } from "../../stored-layout.js";
import type { StoredReader } from "./stored.js";

/**
 * WGSL `fn PREFIX_vec(row: u32, k: u32) -> vec4<f32>`: the real values of elements k .. k + 3, k a multiple of 4, of a stored
 * tensor of any format; and `fn PREFIX_raw(row, k)` and `fn PREFIX_gain(row: u32) -> f32`, whose product they are: a scale
 * that does not change along k can wait until a sum is done. It calls the functions of `storedReader(prefix, ...)`.
 */
export function vectorFunction(
  prefix: string,
  layout: StoredLayout,
  reader: StoredReader,
  names: { readonly buffer: string; readonly buffer4?: string },
): string {
  const { format } = layout;
  const signature = (name: string) => `fn ${prefix}_${name}(row: u32, k: u32) -> vec4<f32>`;
  const gain = (text: string) => `fn ${prefix}_gain(row: u32) -> f32 { return ${text}; }`;
  const same = `${signature("raw")} { return ${prefix}_vec(row, k); }\n${gain("1.0")}`;
  const four = (text: (lane: number) => string) => `vec4<f32>(${[0, 1, 2, 3].map(text).join(", ")})`;
  const granularity = scaleGranularity(format, layout.shape[1]);
  const codes = fourCodes(prefix, layout, names);
  if (codes === null || (granularity < layout.shape[1] && granularity % 4 !== 0)) {
    return `${signature("vec")} { return ${four((lane) => reader.element("row", `(k + ${lane}u)`))}; }\n${same}`;
  }
  const scale = format.scales.length === 0 ? "" : ` * (${reader.scale("row", "k")})`;
  if (reader.constantAlongK && format.zero.domain === "none") {
    return `${signature("raw")} {
  ${codes.load}
  return ${codes.value};
}
${gain(format.scales.length === 0 ? "1.0" : reader.scale("row", "0u"))}
${signature("vec")} { return ${prefix}_raw(row, k)${scale}; }`;
  }
  const zero = reader.zero("row", "k");
  const less =
    format.zero.domain === "int" ? ` - ${prefix}_z(row, k)` : zero === null ? "" : ` - ${midCode(format.element)}.0`;
  return `${signature("vec")} {
  ${codes.load}
  return (${codes.value}${less})${scale}${zero === null ? "" : ` + ${zero}`};
}
${same}`;
}

/** Statements that load four neighbouring codes and their values, where they fill whole words or lie in one; else null. */
function fourCodes(
  prefix: string,
  layout: StoredLayout,
  { buffer, buffer4 }: { readonly buffer: string; readonly buffer4?: string },
): { load: string; value: string } | null {
  const codec = layout.format.element;
  const bits = codecBits(codec);
  const [vectorRows, vectorK] = codecVector(codec);
  if (32 % bits !== 0 || vectorRows * vectorK !== 1 || (codec.kind === "lut" && codec.entries === "learned"))
    return null;
  const at = `row * ${layout.rowStride}u + k * ${bits}u / 32u`;
  const value = (code: (lane: number) => string) =>
    `vec4<f32>(${[0, 1, 2, 3].map((lane) => `${prefix}_dec(${code(lane)})`).join(", ")})`;
  if (bits === 32) {
    if (buffer4 !== undefined)
      return {
        load: `let w = ${buffer4}[row * ${layout.rowStride / 4}u + k / 4u];`,
        value: value((lane) => `w.${"xyzw"[lane]}`),
      };
    return { load: `let at = ${at};`, value: value((lane) => `${buffer}[at + ${lane}u]`) };
  }
  if (bits === 16) {
    const load = `let at = ${at}; let lo = ${buffer}[at]; let hi = ${buffer}[at + 1u];`;
    return { load, value: value((lane) => `(${lane < 2 ? "lo" : "hi"} ${lane % 2 === 0 ? "& 0xffffu" : ">> 16u"})`) };
  }
  // Four codes of at most 8 bits never cross a word.
  const shift = bits === 8 ? "" : ` >> (k * ${bits}u % 32u)`;
  const load = `let w = ${buffer}[${at}]${shift};`;
  if (codec.kind === "int" && bits === 8)
    return { load, value: `vec4<f32>(${codec.signed ? "unpack4xI8" : "unpack4xU8"}(w))` };
  return { load, value: value((lane) => `extractBits(w, ${lane * bits}u, ${bits}u)`) };
}
