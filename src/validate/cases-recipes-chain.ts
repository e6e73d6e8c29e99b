import { FORMATS } from "../formats/table.js";
import { dense, type ValueId } from "../ir/graph.js";
import type { Row } from "./cases.js";
import { at, type Sketch } from "./cases-sketch.js";

/**
 * The linears of a decoder from one attention to the next: out + residual, norm, gate and up, down + residual, norm, the next layer's
 * projection. [T, k] all along, but for `n` gated features. Inputs of linears are quantized, to bf16 without an activation.
 */
export function chain(sketch: Sketch, { format, activation, shape, options = {} }: Row): ReturnType<Sketch["done"]> {
  const { graph } = sketch;
  const [n, k] = [at(shape, "n"), at(shape, "k")];
  const inputs = activation ?? FORMATS.bf16;
  const quantized = (value: ValueId) => graph.one("quantize", [value], { format: inputs }, `codes${value}`);
  const normed = (value: ValueId, name: string) =>
    quantized(graph.one("rmsnorm", [value, sketch.vector(name, [k])], { eps: 1e-5 }, name));
  const attrs = options.fastAccum ? { fastAccum: true } : {};
  const linear = (name: string, source: ValueId, rows: number, columns: number) =>
    graph.one("linear", [source, sketch.matrix(`${name}.weight`, format, [rows, columns])], attrs, name);
  const plus = (a: ValueId, b: ValueId, name: string) => graph.one("binary", [a, b], { fn: "add" }, name);

  const residual = graph.input("residual", dense("f32", ["T", k]));
  const out = plus(residual, linear("out", quantized(graph.input("x", dense("f32", ["T", k]))), k, k), "attended");
  const source = normed(out, "norm");
  const active = graph.one("unary", [linear("gate", source, n, k)], { fn: "silu" }, "active");
  const gated = graph.one("binary", [active, linear("up", source, n, k)], { fn: "mul" }, "gated");
  const down = plus(out, linear("down", quantized(gated), k, n), "layer");
  return sketch.done({ attended: out, layer: down, next: linear("next", normed(down, "next_norm"), k, k) });
}
