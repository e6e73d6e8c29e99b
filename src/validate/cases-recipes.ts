import { CODECS, FORMATS } from "../formats/table.js";
import { dense, stored, type ValueId } from "../ir/graph.js";
import type { OpName } from "../ir/ops.js";
import { packSettings } from "../ir/sample.js";
import type { HostTensor } from "../ir/tensor.js";
import { random, randomTensor, seedOf } from "./cases-random.js";
import { chain, headCaches, heads } from "./cases-recipes-chain.js";
import { LAYER_RECIPES } from "./cases-recipes-layer.js";
import { angles, at, floats, positions, type Recipe, Sketch, spreadOut, tokens, x } from "./cases-sketch.js";

export type { Options, Settings } from "./cases-sketch.js";

/** Logits without outliers, so that many tokens have a share worth drawing. */
function logits(vocabulary: number, seed: number): HostTensor {
  const source = random(seed);
  return {
    dtype: "f32",
    shape: [1, vocabulary],
    data: Float32Array.from({ length: vocabulary }, () => 2 * source.normal()),
  };
}

export const RECIPES: Readonly<Record<OpName, Recipe>> = {
  ...LAYER_RECIPES,

  linear: {
    symbols: (run) => (run.P === undefined ? tokens(run) : positions(run)),
    build: (row, max, seed) => {
      const { format, activation, shape, options = {} } = row;
      const [n, k] = [at(shape, "n"), at(shape, "k")];
      const sketch = new Sketch(max, seed);
      if (options.chain) return chain(sketch, row);
      if (options.heads) return heads(sketch, row);
      const { graph } = sketch;
      const input = graph.input("x", dense("f32", ["T", k]));
      const source = activation === undefined ? input : graph.one("quantize", [input], { format: activation }, "codes");
      const linear = (name: string): ValueId => {
        const operands = [source, sketch.matrix(`${name}.weight`, format, [n, k])];
        if (options.bias) operands.push(sketch.vector(`${name}.bias`, [n]));
        return graph.one("linear", operands, options.fastAccum ? { fastAccum: true } : {}, name);
      };
      const rounded = (y: ValueId) => (options.rounds ? sketch.rounded(y) : y);
      const quantized = activation === undefined ? {} : { codes: source };
      if (options.qkv) {
        const table = angles(sketch, 16, 64);
        const [q, key, value] = [linear("q"), linear("k"), linear("v")];
        const heads = n / 16;
        const turned = graph.one("rope", [q, table], { heads, position: "P" }, "rope.q");
        const cache = graph.state("cache", stored(FORMATS.f32, [heads, 64, 16]));
        const written = graph.one("kv_write", [cache, value], { position: "P" }, "v_write");
        const other = graph.one("rope", [key, table], { heads, position: "P" }, "rope.k");
        return sketch.done({ q: turned, k: other, v: written, ...quantized });
      }
      if (options.gated !== undefined) {
        const active = graph.one("unary", [linear("gate")], { fn: options.gated }, "active");
        const product = graph.one("binary", [active, linear("up")], { fn: "mul" }, "gated");
        return sketch.done({ y: rounded(product), ...quantized });
      }
      let y = linear("y");
      if (options.unary !== undefined) y = graph.one("unary", [y], { fn: options.unary }, "active");
      if (options.residual)
        y = graph.one("binary", [graph.input("residual", dense("f32", ["T", n])), y], { fn: "add" }, "sum");
      return sketch.done({ y: rounded(y), ...quantized });
    },
    inputs: ({ shape, options }, run, seed) => {
      const drawn = floats([run.T as number, at(shape, "k")], seed);
      return {
        x: options?.wide ? spreadOut(drawn) : drawn,
        ...(options?.heads ? headCaches(shape, seed) : {}),
        ...(options?.qkv ? { cache: randomTensor(FORMATS.f32, [(at(shape, "n") / 16) * 64, 16], seed + 2) } : {}),
        ...(options?.residual ? { residual: floats([run.T as number, at(shape, "n")], seed + 1, 4) } : {}),
        ...(options?.chain ? { residual: floats([run.T as number, at(shape, "k")], seed + 1, 4) } : {}),
      };
    },
  },

  conv2d: {
    symbols: () => ({}),
    build: ({ format, shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const [channels, out, size, groups] = ["channels", "out", "size", "groups"].map((name) => at(shape, name)) as [
        number,
        number,
        number,
        number,
      ];
      const input = sketch.graph.input("x", dense("f32", [2, channels, size, size]));
      const weight = sketch.matrix("weight", format, [out, (9 * channels) / groups]);
      const operands = [input, weight, ...(options?.bias ? [sketch.vector("bias", [out])] : [])];
      const stride = at(shape, "stride");
      const attrs = { kernel: [3, 3], stride: [stride, stride], padding: [1, 1], dilation: [1, 1], groups } as const;
      return sketch.done({ y: sketch.graph.one("conv2d", operands, attrs) });
    },
    inputs: ({ shape }, _, seed) => ({
      x: floats([2, at(shape, "channels"), at(shape, "size"), at(shape, "size")], seed),
    }),
  },

  embedding: {
    symbols: (run) => (run.P === undefined ? tokens(run) : positions(run)),
    build: ({ format, shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const ids = sketch.graph.input("ids", dense("i32", ["T"]));
      const table = sketch.matrix("table", format, [at(shape, "rows"), at(shape, "k")]);
      const attrs = options?.scale === undefined ? {} : { scale: options.scale };
      if (max.P === undefined) return sketch.done({ y: sketch.graph.one("embedding", [ids, table], attrs) });
      const learned = sketch.vector("positions", [24, at(shape, "k")]);
      return sketch.done({ y: sketch.graph.one("embedding", [ids, table, learned], { ...attrs, position: "P" }) });
    },
    // The first and the last row, one out of range on either side (they clamp), one drawn.
    inputs: ({ shape }, run, seed) => {
      const rows = at(shape, "rows");
      const all = [random(seed).below(rows), 0, rows - 1, -3, rows + 5];
      return {
        ids: {
          dtype: "i32",
          shape: [run.T as number],
          data: Int32Array.from({ length: run.T as number }, (_, i) => all[i % 5] as number),
        },
      };
    },
  },

  hadamard: {
    symbols: positions,
    build: ({ shape }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const { graph } = sketch;
      const [heads, size] = [at(shape, "heads"), at(shape, "size")];
      return sketch.done({
        y: graph.one("hadamard", [graph.input("x", dense("f32", ["T", heads * size]))], { heads }),
      });
    },
    inputs: ({ shape }, run, seed) => ({ x: floats([run.T as number, at(shape, "heads") * at(shape, "size")], seed) }),
  },
  rope: {
    symbols: positions,
    build: ({ format, shape }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const { graph } = sketch;
      const [heads, size] = [at(shape, "heads"), at(shape, "size")];
      const { rotary } = shape;
      const table = angles(sketch, rotary ?? size, 24);
      const attrs = { position: "P", ...(rotary === undefined ? {} : { rotary }) };
      const q = graph.one(
        "rope",
        [graph.input("x", dense("f32", ["T", heads * size])), table],
        { heads, ...attrs },
        "rope.q",
      );
      const { kvHeads, capacity } = shape;
      if (kvHeads === undefined || capacity === undefined) return sketch.done({ y: q });
      // A layer's whole group: two ropes and two cache writes.
      const k = graph.input("k", dense("f32", ["T", kvHeads * size]));
      const v = graph.input("v", dense("f32", ["T", kvHeads * size]));
      const turned = graph.one("rope", [k, table], { heads: kvHeads, ...attrs }, "rope.k");
      const caches = ["k_cache", "v_cache"].map((name) => graph.state(name, stored(format, [kvHeads, capacity, size])));
      const keys = graph.one("kv_write", [caches[0] as ValueId, turned], { position: "P" }, "k_write");
      const values = graph.one("kv_write", [caches[1] as ValueId, v], { position: "P" }, "v_write");
      return sketch.done({ y: q, keys, values });
    },
    inputs: ({ format, shape }, run, seed) => {
      const [heads, size] = [at(shape, "heads"), at(shape, "size")];
      const q = { x: floats([run.T as number, heads * size], seed) };
      const { kvHeads, capacity } = shape;
      if (kvHeads === undefined || capacity === undefined) return q;
      const cache = (offset: number) => randomTensor(format, [kvHeads * capacity, size], seed + offset);
      const stream = (offset: number) => floats([run.T as number, kvHeads * size], seed + offset);
      return { ...q, k: stream(1), v: stream(2), k_cache: cache(3), v_cache: cache(4) };
    },
  },

  kv_write: {
    symbols: positions,
    build: ({ format, shape }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const [heads, size, capacity] = [at(shape, "heads"), at(shape, "size"), at(shape, "capacity")];
      const cache = sketch.graph.state("cache", stored(format, [heads, capacity, size]));
      const input = sketch.graph.input("x", dense("f32", ["T", heads * size]));
      return sketch.done({ cache: sketch.graph.one("kv_write", [cache, input], { position: "P" }) });
    },
    inputs: ({ format, shape }, run, seed) => {
      const [heads, size, capacity] = [at(shape, "heads"), at(shape, "size"), at(shape, "capacity")];
      return {
        x: floats([run.T as number, heads * size], seed),
        cache: randomTensor(format, [heads * capacity, size], seed + 1),
      };
    },
  },

  sdpa: {
    symbols: positions,
    build: ({ format, shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const [heads, kvHeads, size, capacity] = [
        at(shape, "heads"),
        at(shape, "kvHeads"),
        at(shape, "size"),
        at(shape, "capacity"),
      ];
      const q = sketch.graph.input("q", dense("f32", ["T", heads * size]));
      const [k, v] = ["k", "v"].map((name) => sketch.graph.state(name, stored(format, [kvHeads, capacity, size]))) as [
        ValueId,
        ValueId,
      ];
      const causal = options?.causal ?? true;
      const probabilities = { codec: CODECS.bf16, scale: 1 };
      const attrs = { heads, kvHeads, scale: 1 / Math.sqrt(size), causal, position: "P" } as const;
      const y = options?.bf16
        ? sketch.graph.one("sdpa", [sketch.rounded(q, heads), k, v], { ...attrs, probabilities })
        : sketch.graph.one("sdpa", [q, k, v], attrs);
      return sketch.done({ y: options?.rounds ? sketch.rounded(y) : y });
    },
    inputs: ({ format, shape, options }, run, seed) => {
      const [heads, kvHeads, size, capacity] = [
        at(shape, "heads"),
        at(shape, "kvHeads"),
        at(shape, "size"),
        at(shape, "capacity"),
      ];
      const [tokens, position] = [run.T as number, run.P as number];
      const cache = (offset: number) => randomTensor(format, [kvHeads * capacity, size], seed + offset);
      const odd = Array.from({ length: kvHeads }, (_, head) => {
        const key = position + Math.ceil(tokens / 2);
        return (head * capacity + key) * size + ((key + 7 * head) % size);
      });
      const v = options?.odd ? randomTensor(format, [kvHeads * capacity, size], seed + 2, odd) : cache(2);
      return { q: floats([tokens, heads * size], seed), k: cache(1), v };
    },
  },

  binary: {
    symbols: tokens,
    build: ({ shape, options }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const type = dense("f32", ["T", at(shape, "width")]);
      const a = sketch.graph.input("a", type);
      const b = options?.same ? a : sketch.graph.input("b", type);
      return sketch.done({ y: sketch.graph.one("binary", [a, b], { fn: options?.binary ?? "add" }) });
    },
    inputs: ({ shape, options }, run, seed) => {
      const a = floats([run.T as number, at(shape, "width")], seed);
      return options?.same ? { a } : { a, b: floats([run.T as number, at(shape, "width")], seed + 1) };
    },
  },

  quantize: {
    symbols: tokens,
    build: ({ format, shape, options = {} }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const { graph } = sketch;
      const k = at(shape, "k");
      const type = dense("f32", ["T", k]);
      let input = graph.input("x", type);
      // What may be fused with it.
      if (options.norm) input = graph.one("rmsnorm", [input, sketch.vector("norm", [k])], { eps: 1e-5 }, "normed");
      const fn = options.unary ?? options.gated;
      if (fn !== undefined) input = graph.one("unary", [input], { fn }, "active");
      if (options.gated !== undefined)
        input = graph.one("binary", [input, graph.input("up", type)], { fn: "mul" }, "gated");
      return sketch.done({ y: graph.one("quantize", [input], { format }) });
    },
    // One row of zeros, one with a huge number, one of tiny numbers.
    inputs: ({ shape, options }, run, seed) => {
      const [rows, k] = [run.T as number, at(shape, "k")];
      const tensor = floats([rows, k], seed) as { dtype: "f32"; shape: number[]; data: Float32Array };
      if (rows > 3) {
        tensor.data.fill(0, k, 2 * k);
        tensor.data[2 * k + 5] = 3e4;
        for (let i = 3 * k; i < 4 * k; i++) tensor.data[i] = (tensor.data[i] as number) * 2 ** -20;
      }
      return { x: tensor, ...(options?.gated === undefined ? {} : { up: floats([rows, k], seed + 1) }) };
    },
  },

  dequantize: {
    symbols: () => ({}),
    build: ({ format, shape }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const input = sketch.graph.state("x", stored(format, [at(shape, "rows"), at(shape, "k")]));
      return sketch.done({ y: sketch.graph.one("dequantize", [input], {}) });
    },
    inputs: ({ format, shape }, _, seed) => ({ x: randomTensor(format, [at(shape, "rows"), at(shape, "k")], seed) }),
  },

  last_row: {
    symbols: tokens,
    build: ({ shape }, max, seed) => {
      const sketch = new Sketch(max, seed);
      const input = sketch.graph.input("x", dense("f32", ["T", at(shape, "width")]));
      return sketch.done({ y: sketch.graph.one("last_row", [input], {}) });
    },
    inputs: (row, run, seed) => x(at(row.shape, "width"))(row, run, seed),
  },

  sample: {
    symbols: () => ({}),
    build: ({ shape }, _, seed) => {
      const sketch = new Sketch({}, seed);
      const { graph } = sketch;
      const logits = graph.input("logits", dense("f32", [1, at(shape, "vocabulary")]));
      const settings = graph.input("settings", dense("u32", [5]));
      const ids = graph.state("ids", dense("i32", [4]));
      const [sampled, next] = graph.op("sample", [logits, settings, ids], {}) as [ValueId, ValueId];
      return sketch.done({ sampled, next });
    },
    inputs: ({ shape, options }, run, seed) => {
      const { temperature, topK, topP } = options?.settings ?? { temperature: 0, topK: 0, topP: 1 };
      const settings = packSettings({ temperature, topK, topP, seed: seedOf(seed, "draw"), step: run.seed as number });
      return {
        logits: logits(at(shape, "vocabulary"), seed),
        settings: { dtype: "u32", shape: [5], data: settings },
        ids: { dtype: "i32", shape: [4], data: Int32Array.of(9, 8, 7, 6) },
      };
    },
  },
};
