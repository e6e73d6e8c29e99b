import { decodeFunction, encodeFunction } from "../backends/webgpu/wgsl/codec.js";
import { type Codec, codecBits, codecName, codecVector, type Extent, type Format } from "../formats/format.js";

/**
 * The C++17 header of the native kernels: a struct for each codec, with `decode` and `encode`, and one for each format.
 * The functions are the WGSL functions of `wgsl/codec.ts`, whose bodies are C++ but for `let`: the same text is tested
 * against TypeScript in both languages.
 */
export function formatsHeader(formats: readonly Format[]): string {
  const codecs = codecStructs(formats);
  const names = (list: Iterable<string>) => [...list].map((name) => `  X(${name})`).join(" \\\n");
  const fixed = [...codecs.values()].filter(({ codec }) => hasFixedValues(codec)).map(({ name }) => name);
  return `// Made by "npm run generate" from src/formats/table.ts; do not edit.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FEWBIT_HD __host__ __device__
#else
#define FEWBIT_HD
#endif

namespace fewbit {

/// What the generated functions are written with.
namespace detail {
using u32 = std::uint32_t;
using f32 = float;

template <class To, class From>
FEWBIT_HD inline To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bitcast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
FEWBIT_HD constexpr T select(T no, T yes, bool condition) {
  return condition ? yes : no;
}
FEWBIT_HD constexpr u32 min(u32 a, u32 b) { return a < b ? a : b; }
FEWBIT_HD constexpr u32 max(u32 a, u32 b) { return a < b ? b : a; }
template <class T, unsigned N>
struct array {
  T at[N];
  template <class... Values>
  FEWBIT_HD constexpr array(Values... values) : at{static_cast<T>(values)...} {}
  FEWBIT_HD constexpr T operator[](u32 i) const { return at[i]; }
};
${[...codecs.values()].map(codecFunctions).join("")}}  // namespace detail

/// How a stored number is read and written. \`decode\` takes a code without bits above it; \`encode\` rounds to nearest, ties to
/// even; both agree bit for bit with fewbit's TypeScript. A codec without them has a learned table.
namespace codec {
${[...codecs.values()].map(codecStruct).join("")}}  // namespace codec

/// The extent of a block that is the whole dimension.
constexpr int whole = 0;

template <class Codec, int Rows, int K>
struct Scale {
  using codec = Codec;
  static constexpr int rows = Rows;
  static constexpr int k = K;
};

/// none: c * s. integer: (c - z) * s. floating: (c - mid) * s + z; c the code's value, s the scale, z the zero point.
enum class ZeroDomain { none, integer, floating };

/// One struct per row of the format table. \`scales\` lists the levels, innermost first; a scale is the product of its levels.
namespace format {
${formats.map((format) => formatStruct(format, codecs)).join("")}}  // namespace format

}  // namespace fewbit

/// Every codec with fixed values, and every format.
#define FEWBIT_CODECS(X) \\
${names(fixed)}
#define FEWBIT_FORMATS(X) \\
${names(formats.map((format) => format.name))}
`;
}

interface NamedCodec {
  readonly name: string;
  readonly codec: Codec;
}

const hasFixedValues = (codec: Codec): boolean => codec.kind !== "lut" || codec.entries !== "learned";

/** The codecs of all formats by their JSON, each with a C++ name of its own. */
function codecStructs(formats: readonly Format[]): Map<string, NamedCodec> {
  const found = new Map<string, NamedCodec>();
  const taken = new Set<string>();
  for (const format of formats) {
    const zero = format.zero.domain === "none" ? [] : [format.zero.codec];
    for (const codec of [format.element, ...format.scales.map((level) => level.codec), ...zero]) {
      const key = JSON.stringify(codec);
      if (found.has(key)) continue;
      const base = nameOf(codec, format);
      let name = base;
      for (let i = 2; taken.has(name); i++) name = `${base}_${i}`;
      taken.add(name);
      found.set(key, { name, codec });
    }
  }
  return found;
}

function nameOf(codec: Codec, format: Format): string {
  if (codec.kind !== "lut") return codecName(codec);
  return codec.entries === "learned" ? `learned${codec.bits}_${codec.vector.join("x")}` : format.name;
}

/** A WGSL function as C++. */
function toCxx(wgsl: string): string {
  return wgsl
    .replaceAll(/fn (\w+)\((\w+): (\w+)\) -> (\w+) \{/g, "FEWBIT_HD inline $4 $1($3 $2) {")
    .replaceAll(/\blet /g, "const auto ");
}

function codecFunctions({ name, codec }: NamedCodec): string {
  if (!hasFixedValues(codec) || codecVector(codec).some((extent) => extent > 1)) return "";
  return `\n${toCxx(decodeFunction(codec, `decode_${name}`))}${toCxx(encodeFunction(codec, `encode_${name}`))}`;
}

function codecStruct({ name, codec }: NamedCodec): string {
  const lines = [`static constexpr int bits = ${codecBits(codec)};`];
  const [rows, k] = codecVector(codec);
  lines.push(`static constexpr int vector_rows = ${rows};`, `static constexpr int vector_k = ${k};`);
  if (hasFixedValues(codec) && rows * k === 1) {
    lines.push(
      `FEWBIT_HD static float decode(std::uint32_t code) { return detail::decode_${name}(code); }`,
      `FEWBIT_HD static std::uint32_t encode(float value) { return detail::encode_${name}(value); }`,
      `FEWBIT_HD static std::uint32_t encode_bits(std::uint32_t bits) { return detail::encode_${name}_bits(bits); }`,
    );
  }
  return struct(name, lines);
}

function formatStruct({ name, element, scales, zero, rule }: Format, codecs: Map<string, NamedCodec>): string {
  const codecType = (codec: Codec) => `codec::${codecs.get(JSON.stringify(codec))?.name}`;
  const extent = (value: Extent) => (value === "all" ? "whole" : String(value));
  const levels = scales.map(({ codec, block }) => `Scale<${codecType(codec)}, ${block.map(extent).join(", ")}>`);
  const domain = { none: "none", int: "integer", float: "floating" }[zero.domain];
  return struct(name, [
    `static constexpr const char* name = "${name}";`,
    `using element = ${codecType(element)};`,
    `using scales = std::tuple<${levels.join(", ")}>;`,
    `static constexpr ZeroDomain zero = ZeroDomain::${domain};`,
    `using zero_point = ${zero.domain === "none" ? "void" : codecType(zero.codec)};`,
    ...struct(
      "rule",
      Object.entries(rule).map(([field, value]) => constant(field, value)),
    )
      .trimEnd()
      .split("\n"),
  ]);
}

/** A field of a rule; the rule's kind and other words are strings. */
function constant(field: string, value: unknown): string {
  if (typeof value === "string") return `static constexpr const char* ${field} = "${value}";`;
  if (typeof value === "boolean") return `static constexpr bool ${field} = ${value};`;
  return `static constexpr double ${field} = ${value};`;
}

function struct(name: string, lines: readonly string[]): string {
  return `struct ${name} {\n${lines.map((line) => `  ${line}\n`).join("")}};\n`;
}
