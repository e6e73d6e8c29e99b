import { FORMATS } from "../formats/table.js";
import { dense, stored, type ValueId } from "../ir/graph.js";
import type { HostTensor } from "../ir/tensor.js";
import type { Row } from "./cases.js";
import { randomTensor } from "./cases-random.js";
import { angles, at, type Sketch } from "./cases-sketch.js";

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

/** Positions of the caches that `heads` writes. */
const CAPACITY = 24;

/**
 * What stands in front of a layer's attention: the linears of queries [n features], keys and values [n / 2 each] in heads of `size`; queries and
 * keys turned, queries rounded to bf16 where the row rounds, keys in a cache of bf16, values in one of f16.
 */
export function heads(sketch: Sketch, { format, activation, shape, options = {} }: Row): ReturnType<Sketch["done"]> {
  const { graph } = sketch;
  const [n, k, size] = [at(shape, "n"), at(shape, "k"), at(shape, "size")];
  const [input, table] = [graph.input("x", dense("f32", ["T", k])), angles(sketch, size, CAPACITY)];
  const source = activation === undefined ? input : graph.one("quantize", [input], { format: activation }, "codes");
  const linear = (name: string, rows: number) => {
    const operands = [source, sketch.matrix(`${name}.weight`, format, [rows, k])];
    if (options.bias) operands.push(sketch.vector(`${name}.bias`, [rows]));
    return graph.one("linear", operands, options.fastAccum ? { fastAccum: true } : {}, name);
  };
  const [q, key, value] = [linear("q", n), linear("k", n / 2), linear("v", n / 2)];
  const turned = (x: ValueId, count: number, name: string) =>
    graph.one("rope", [x, table], { heads: count, position: "P" }, name);
  const queries = turned(q, n / size, "rope.q");
  const kvHeads = n / 2 / size;
  const [keys, values] = ([FORMATS.bf16, FORMATS.f16] as const).map((of, i) =>
    graph.state(["k_cache", "v_cache"][i] as string, stored(of, [kvHeads, CAPACITY, size])),
  ) as [ValueId, ValueId];
  return sketch.done({
    q: options.rounds ? sketch.rounded(queries, n / size) : queries,
    keys: graph.one("kv_write", [keys, turned(key, kvHeads, "rope.k")], { position: "P" }, "k_write"),
    values: graph.one("kv_write", [values, value], { position: "P" }, "v_write"),
    ...(activation === undefined ? {} : { codes: source }),
  });
}

/** The caches of `heads` before a run. */
export function headCaches(shape: Row["shape"], seed: number): Readonly<Record<string, HostTensor>> {
  const [rows, size] = [(at(shape, "n") / 2 / at(shape, "size")) * CAPACITY, at(shape, "size")];
  return {
    k_cache: randomTensor(FORMATS.bf16, [rows, size], seed + 2),
    v_cache: randomTensor(FORMATS.f16, [rows, size], seed + 3),
  };
}
