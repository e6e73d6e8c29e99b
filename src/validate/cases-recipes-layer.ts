import { dense } from "../ir/graph.js";
import type { OpName } from "../ir/ops.js";
import type { HostTensor } from "../ir/tensor.js";
import { random } from "./cases-random.js";
import { at, floats, type Recipe, Sketch, tokens, x } from "./cases-sketch.js";

/** Experts of token t's slots, without repetition: what a route would choose. */
function expertIds(count: number, slots: number, experts: number, seed: number): HostTensor {
  const source = random(seed);
  const data = new Int32Array(count * slots);
  for (let t = 0; t < count; t++) {
    const free = Array.from({ length: experts }, (_, id) => id);
    for (let s = 0; s < slots; s++) data[t * slots + s] = free.splice(source.below(free.length), 1)[0] as number;
  }
  return { dtype: "i32", shape: [count, slots], data };
}

/** The recipes of norms, activations and experts. */
export const LAYER_RECIPES = {
  rmsnorm: {
    symbols: tokens,
    build: ({ shape }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const width = at(shape, "width");
      const { groups } = shape;
      const input = sketch.graph.input("x", dense("f32", ["T", width]));
      const gain = sketch.vector("gain", [width / (groups ?? 1)]);
      const attrs = { eps: 1e-5, ...(groups === undefined ? {} : { groups }) };
      return sketch.done({ y: sketch.graph.one("rmsnorm", [input, gain], attrs) });
    },
    inputs: (row, run, seed) => x(at(row.shape, "width"))(row, run, seed),
  },

  layernorm: {
    symbols: tokens,
    build: ({ shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const width = at(shape, "width");
      const input = sketch.graph.input("x", dense("f32", ["T", width]));
      const operands = [input, sketch.vector("gain", [width])];
      if (options?.bias) operands.push(sketch.vector("shift", [width]));
      return sketch.done({ y: sketch.graph.one("layernorm", operands, { eps: 1e-5 }) });
    },
    // Far off center, so that a variance by the mean of squares would lose its digits.
    inputs: ({ shape }, run, seed) => {
      const tensor = floats([run.T as number, at(shape, "width")], seed) as { data: Float32Array } & HostTensor;
      return { x: { ...tensor, data: tensor.data.map((value) => value + 4096) } };
    },
  },

  moe_route: {
    symbols: tokens,
    build: ({ shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const logits = sketch.graph.input("logits", dense("f32", ["T", at(shape, "experts")]));
      const attrs = { top: at(shape, "top"), normalize: options?.normalize === true };
      const [ids, gates] = sketch.graph.op("moe_route", [logits], attrs) as [number, number];
      return sketch.done({ ids, gates });
    },
    // The first token's logits are all alike: the lowest ids win.
    inputs: ({ shape }, run, seed) => {
      const experts = at(shape, "experts");
      const logits = floats([run.T as number, experts], seed, 3) as { data: Float32Array } & HostTensor;
      if ((run.T as number) > 1) logits.data.fill(0.5, 0, experts);
      return { logits };
    },
  },

  moe_linear: {
    symbols: tokens,
    build: ({ format, activation, shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const { graph } = sketch;
      const [n, k, top, experts] = [at(shape, "n"), at(shape, "k"), at(shape, "top"), at(shape, "experts")];
      const input = graph.input("x", dense("f32", options?.shared ? ["T", k] : ["T", top, k]));
      const source = activation === undefined ? input : graph.one("quantize", [input], { format: activation }, "codes");
      const ids = graph.input("ids", dense("i32", ["T", top]));
      const weights = Array.from({ length: experts }, (_, e) => sketch.matrix(`expert${e}.weight`, format, [n, k]));
      const y = graph.one("moe_linear", [source, ids, ...weights], {}, "y");
      return sketch.done({ y, ...(activation === undefined ? {} : { codes: source }) });
    },
    inputs: ({ shape, options }, run, seed) => {
      const [k, top, count] = [at(shape, "k"), at(shape, "top"), run.T as number];
      return {
        x: floats(options?.shared ? [count, k] : [count, top, k], seed),
        ids: expertIds(count, top, at(shape, "experts"), seed + 1),
      };
    },
  },

  moe_combine: {
    symbols: tokens,
    build: ({ shape }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const { graph } = sketch;
      const { top } = shape;
      const [width, slots] = [at(shape, "width"), top ?? 1];
      const input = graph.input("x", dense("f32", top === undefined ? ["T", width] : ["T", slots, width]));
      const gates = graph.input("gates", dense("f32", ["T", slots]));
      return sketch.done({ y: graph.one("moe_combine", [input, gates], {}) });
    },
    inputs: ({ shape }, run, seed) => {
      const [count, slots] = [run.T as number, shape.top ?? 1];
      return {
        x: floats([count, slots, at(shape, "width")], seed),
        gates: floats([count, slots], seed + 1),
      };
    },
  },

  unary: {
    symbols: tokens,
    build: ({ shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const input = sketch.graph.input("x", dense("f32", ["T", at(shape, "width")]));
      const { unary: fn = "relu", cap } = options ?? {};
      return sketch.done({ y: sketch.graph.one("unary", [input], { fn, ...(cap === undefined ? {} : { cap }) }) });
    },
    inputs: (row, run, seed) => x(at(row.shape, "width"), 4)(row, run, seed),
  },
} satisfies Partial<Record<OpName, Recipe>>;
