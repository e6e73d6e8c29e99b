import type { ValueId } from "../../../ir/graph.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import { type LinearStep, linearStep } from "../../linear-step.js";
import type { WeightGroup } from "../../weights.js";
import { type Binding, type BuildContext, read, value, write } from "../kernel.js";
import { CHUNK, chunkObstacle, isIntegerFormat, type StoredReader, storedReader } from "../wgsl/stored.js";
import { UNARY_WGSL } from "./elementwise.js";

export { type LinearStep, linearStep } from "../../linear-step.js";

/** Both operands must be readable in chunks of 32, and rows of x in vec4s. */
export const chunked: Requirement = {
  unmet: (bound, device) => {
    const { x, parts, k, biases, epilogue } = linearStep(bound);
    // Stored operands are bound twice, as words and as vectors of four.
    const stored = parts.length + (bound.type(x).kind === "format" ? 1 : 0);
    const dense = biases.length + (bound.type(x).kind === "format" ? 0 : 1) + (epilogue.kind === "residual" ? 1 : 0);
    const needed = 2 * stored + dense + 1;
    if (needed > device.maxStorageBuffers) return `it binds ${needed} buffers: ${device.maxStorageBuffers} are allowed`;
    return chunkedUnmet(bound, [x, ...parts.flat()], k);
  },
};

/** Why operands [.., k] cannot be read in chunks of 32, or null. */
export function chunkedUnmet(bound: BoundStep, operands: readonly ValueId[], k: number): string | null {
  if (k % 4 !== 0) return `K must be a multiple of 4: K is ${k}`;
  for (const id of operands) {
    const type = bound.type(id);
    const obstacle = type.kind === "format" ? chunkObstacle(type.format, k) : null;
    if (obstacle !== null) return `${bound.name(id)}: ${obstacle}`;
  }
  return null;
}

/** One bound shader operand. */
interface Operand {
  readonly name: string;
  readonly type: string;
  readonly binding: Binding;
}

/** The operands, readers and text fragments that the linear kernels share; made for one row slice of the weights. */
export interface LinearParts {
  readonly operands: readonly Operand[];
  readonly functions: string;
  /** i32 sums, exact, when both operands are integers. */
  readonly integer: boolean;
  /** One reader per part: one, or [gate, up]. */
  readonly weights: readonly StoredReader[];
  readonly xStored: StoredReader | null;
  /** Whether no scale or zero point of either operand changes along K: they are applied once, after the sum. */
  readonly scaleAfter: boolean;
  readonly packedBytes: boolean;
  /** Elements that share all scales of both operands. */
  readonly segment: number;
  /** Statements that declare the vec4s `OUT0..7` of row m's chunk c (or words `OUTw0..7` when `packedBytes`). */
  loadX(out: string, m: string, c: string): string;
  /** Vec4 number `at` of row m of a dense x, zero beyond its end. */
  xVector(m: string, at: string): string;
  /** Statements that store the finished sums, one per part, of row m and output feature n of the slice. */
  store(m: string, n: string, sums: readonly string[]): string;
  /** x's scale at (m, k), "1.0" when dense. */
  xScale(m: string, k: string): string;
}

export function linearParts(
  context: BuildContext,
  step: LinearStep,
  groups: readonly WeightGroup[],
  slice: number,
): LinearParts {
  const operands: Operand[] = [];
  const bind = (name: string, type: string, binding: Binding) => void operands.push({ name, type, binding });
  const xType = context.type(step.x);
  const formats = groups.map((group) => group.format);
  const integer = xType.kind === "format" && isIntegerFormat(xType.format) && formats.every(isIntegerFormat);
  let xStored: StoredReader | null = null;
  if (xType.kind === "format") {
    bind("x", "u32", read(value(step.x)));
    bind("x4", "vec4<u32>", read(value(step.x)));
    xStored = storedReader("xr", context.layout(step.x), { buffer: "x", buffer4: "x4" }, integer);
  } else bind("x4", "vec4<f32>", read(value(step.x)));
  const weights = groups.map((group, part) => {
    const source = { kind: "weights", ids: group.ids, slice } as const;
    bind(`w${part}`, "u32", read(source));
    bind(`w${part}q`, "vec4<u32>", read(source));
    const layout = (group.slices[slice] as WeightGroup["slices"][number]).layout;
    return storedReader(`wr${part}`, layout, { buffer: `w${part}`, buffer4: `w${part}q` }, integer);
  });
  for (const [part, ids] of step.biases.entries()) bind(`bias${part}`, "f32", read({ kind: "dense", ids }));
  if (step.epilogue.kind === "residual") bind("residual", "f32", read(value(step.epilogue.other)));
  bind("out", "f32", write(value(step.out)));

  const first = weights[0] as StoredReader;
  const begin = (groups[0] as WeightGroup).slices[slice]?.begin ?? 0;
  const stride = context.placement(step.x).stride;
  const column = context.placement(step.x).column;
  const outPlace = context.placement(step.out);
  const k4 = step.k / 4;
  const ragged = step.k % CHUNK !== 0;
  const packedBytes = first.packedBytes && xStored?.packedBytes === true && !ragged;
  const scaleAfter = first.constantAlongK && (xStored?.constantAlongK ?? true);
  const vector = integer ? "vec4<i32>" : "vec4<f32>";
  const kAt = (at: string) => (ragged ? `min(${at}, ${step.k - 1}u)` : at);
  return {
    operands,
    functions: [xStored?.functions ?? "", ...weights.map((reader) => reader.functions), UNARY_WGSL].join("\n"),
    integer,
    weights: weights.map((reader) => ({
      ...reader,
      scale: (row, at) => reader.scale(row, kAt(at)),
      zero: (row, at) => reader.zero(row, kAt(at)),
      // What lies after the last element of a row may be anything, and anything times zero may be NaN.
      chunk: (out, row, c) => {
        if (!ragged) return reader.chunk(out, row, c);
        const lines = [reader.chunk(`${out}r`, row, c)];
        for (let i = 0; i < 8; i++) {
          lines.push(`let ${out}${i} = select(${vector}(), ${out}r${i}, ${c} * 8u + ${i}u < ${k4}u);`);
        }
        return lines.join("\n");
      },
    })),
    xStored,
    scaleAfter,
    packedBytes,
    segment: Math.min(first.segment, xStored?.segment ?? CHUNK),
    loadX: (out, m, c) => {
      if (packedBytes && xStored !== null) return xStored.chunkWords(out, m, c);
      const guard = (i: number, text: string, type: string) =>
        ragged ? `select(${type}(), ${text}, ${c} * 8u + ${i}u < ${k4}u)` : text;
      if (xStored !== null) {
        const type = integer ? "vec4<i32>" : "vec4<f32>";
        const lines = [xStored.chunk(`${out}_`, m, c)];
        for (let i = 0; i < 8; i++) lines.push(`let ${out}${i} = ${guard(i, `${out}_${i}`, type)};`);
        return lines.join("\n");
      }
      const lines = [`let ${out}_at = (${m} * ${stride}u + ${column}u) / 4u + ${c} * 8u;`];
      for (let i = 0; i < 8; i++) {
        lines.push(
          `let ${out}${i} = ${guard(i, `x4[${ragged ? `min(${out}_at + ${i}u, arrayLength(&x4) - 1u)` : `${out}_at + ${i}u`}]`, "vec4<f32>")};`,
        );
      }
      return lines.join("\n");
    },
    xVector: (m, at) => {
      const source = `(${m} * ${stride}u + ${column}u) / 4u + ${at}`;
      return `select(vec4<f32>(), x4[min(${source}, arrayLength(&x4) - 1u)], ${at} < ${k4}u)`;
    },
    store: (m, n, sums) => {
      const lines: string[] = [];
      for (const [part, sum] of sums.entries()) {
        const bias = step.biases[part] === undefined ? "" : ` + bias${part}[${begin}u + ${n}]`;
        lines.push(`var y${part} = ${sum}${bias};`);
      }
      const { epilogue } = step;
      if (epilogue.kind === "residual") {
        const place = context.placement(epilogue.other);
        lines.push(`y0 += residual[${m} * ${place.stride}u + ${place.column + begin}u + ${n}];`);
      } else if (epilogue.kind === "unary") lines.push(`y0 = ${epilogue.fn}(y0);`);
      else if (epilogue.kind === "gated") lines.push(`y0 = ${epilogue.fn}(y0) * y1;`);
      lines.push(`out[${m} * ${outPlace.stride}u + ${outPlace.column + begin}u + ${n}] = y0;`);
      return lines.join("\n");
    },
    xScale: (m, at) => xStored?.scale(m, kAt(at)) ?? "1.0",
  };
}

/** The names of a running sum and, for formats with a float zero point, of the sum of its zero points' share. */
export interface Sums {
  readonly sum: string;
  readonly zero: string;
}

/**
 * Statements that add one chunk's products to a sum: x chunk `X`, weight chunk `W` (names of declared vec4s), row m, output
 * row n, chunk c. With `scaleAfter` the sum holds bare code products (i32 when both are integers).
 */
export function accumulate(
  parts: LinearParts,
  part: number,
  { sum, zero: zeroSum }: Sums,
  x: string,
  w: string,
  m: string,
  n: string,
  c: string,
): string {
  const weights = parts.weights[part] as StoredReader;
  const vectors = parts.segment / 4;
  const lines: string[] = [];
  for (let s = 0; s < CHUNK / parts.segment; s++) {
    const range = Array.from({ length: vectors }, (_, i) => s * vectors + i);
    const product = parts.packedBytes
      ? range.map((i) => `dot4I8Packed(${x}w${i}, ${w}w${i})`).join(" + ")
      : range.map((i) => `dot(${x}${i}, ${w}${i})`).join(" + ");
    const at = `${c} * ${CHUNK}u + ${s * parts.segment}u`;
    const zero = weights.zero(n, at);
    if (parts.scaleAfter) lines.push(`${sum} += ${product};`);
    else {
      const xScale = parts.xScale(m, at);
      const scale = `${weights.scale(n, at)}${xScale === "1.0" ? "" : ` * (${xScale})`}`;
      lines.push(`${sum} += f32(${product}) * (${scale});`);
    }
    if (zero !== null) {
      const total = range.map((i) => `dot(${x}${i}, ${parts.integer ? "vec4<i32>(1)" : "vec4<f32>(1.0)"})`).join(" + ");
      const xScale = parts.xScale(m, at);
      // With the scales applied afterwards, the zero point's own sum is divided out of them: keep it apart instead.
      lines.push(`${zeroSum} += (${total}) * ${zero}${xScale === "1.0" || parts.scaleAfter ? "" : ` * (${xScale})`};`);
    }
  }
  return lines.join("\n");
}

/** The finished value of a sum, scales that were left for the end applied. */
export function finish(parts: LinearParts, part: number, { sum, zero }: Sums, m: string, n: string): string {
  const weights = parts.weights[part] as StoredReader;
  const hasZero = weights.zero("0u", "0u") !== null;
  if (!parts.scaleAfter) return hasZero ? `(${sum} + ${zero})` : sum;
  const xScale = parts.xScale(m, "0u");
  const scaled = `f32(${sum}) * (${weights.scale(n, "0u")})${hasZero ? ` + ${zero}` : ""}`;
  return xScale === "1.0" ? `(${scaled})` : `((${scaled}) * (${xScale}))`;
}

export function hasFloatZero(parts: LinearParts): boolean {
  return (parts.weights[0] as StoredReader).zero("0u", "0u") !== null;
}
