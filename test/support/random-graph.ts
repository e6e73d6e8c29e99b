import fc from "fast-check";
import { withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, type Graph, GraphBuilder, stored, type TensorType, type ValueId } from "../../src/ir/graph.js";
import { shapeRows } from "../../src/ir/ops.js";
import type { HostTensor } from "../../src/ir/tensor.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { randomUniform } from "./tiny-model.js";

const INT4 = withScale(FORMATS.int4_tinygemm, { block: [1, 16] });
const INT8 = withScale(FORMATS.int8, { block: [1, 16] });
const POSITION = "past";
const WIDTHS = [16, 32, 64] as const;
type Width = (typeof WIDTHS)[number];

/** The symbols that every random graph can run with. */
export const RUN = { T: 3, past: 2 } as const;

/** One op of a random graph: what it is and which of the values there are it reads. */
type Choice = readonly [kind: number, a: number, b: number, c: number];

/**
 * Graphs of every op that a decoder uses, wired at random: values read by none or many, in-place updates, any outputs; among them
 * the patterns that fusions look for, whole or with something else reading their inside.
 */
export const randomGraph: fc.Arbitrary<Graph> = fc
  .record({
    ops: fc.array(fc.tuple(fc.nat(), fc.nat(), fc.nat(), fc.nat()), { minLength: 1, maxLength: 20, size: "max" }),
    outputs: fc.array(fc.nat(), { minLength: 1, maxLength: 4 }),
  })
  .map(({ ops, outputs }) => build(ops, outputs));

function build(ops: readonly Choice[], outputs: readonly number[]): Graph {
  const g = new GraphBuilder({ T: 4, past: 8 });
  const pools = new Map<Width, ValueId[]>(
    WIDTHS.map((width) => [width, [g.input(`x${width}`, dense("f32", ["T", width]))]]),
  );
  const made: ValueId[] = [];
  const caches = [
    g.state("cache", stored(FORMATS.f32, [2, 8, 8])),
    g.one("quantize", [g.input("old", dense("f32", [2, 8, 8]))], { format: FORMATS.f32 }, "copied"),
  ];
  const table = g.weight("table", dense("f32", [16, 8]));
  let count = 0;
  const fresh = (kind: string) => `${kind}${count++}`;
  const pool = (width: Width) => pools.get(width) as ValueId[];
  const pick = (width: Width, n: number): ValueId => pool(width)[n % pool(width).length] as ValueId;
  const add = (width: Width, id: ValueId) => {
    pool(width).push(id);
    made.push(id);
  };
  const weight = (n: Width, k: Width, which: number) =>
    g.weight(fresh("w"), stored([FORMATS.f32, INT4, INT8][which % 3] as typeof INT4, [n, k]));
  const width = (n: number) => WIDTHS[n % 3] as Width;
  const kinds: ((a: number, b: number, c: number) => void)[] = [
    (a, b, c) => add(width(a), g.one("unary", [pick(width(a), b)], { fn: c % 2 === 0 ? "silu" : "relu" })),
    (a, b, c) =>
      add(width(a), g.one("binary", [pick(width(a), b), pick(width(a), c)], { fn: b % 2 === 0 ? "add" : "mul" })),
    (a, b) => {
      const gain = g.weight(fresh("g"), dense("f32", [width(a)]));
      add(width(a), g.one("rmsnorm", [pick(width(a), b), gain], { eps: 1e-5 }));
    },
    // Several linears of one input are what fusions look for: `b` rarely differs.
    (a, b, c) => add(width(c), g.one("linear", [pick(width(a), b % 2), weight(width(c), width(a), b)], {})),
    (a, b, c) => {
      const bias = g.weight(fresh("b"), dense("f32", [width(c)]));
      add(width(c), g.one("linear", [pick(width(a), b), weight(width(c), width(a), c), bias], {}));
    },
    (a, b, c) => {
      const x = g.one("quantize", [pick(width(a), b)], { format: INT8 });
      add(width(c), g.one("linear", [x, weight(width(c), width(a), c)], {}));
      if (c % 2 === 0) add(width(a), g.one("dequantize", [x], {}));
    },
    (_, b) => add(32, g.one("rope", [pick(32, b), table], { heads: 4, position: POSITION })),
    (a, b) => {
      caches[a % 2] = g.one("kv_write", [caches[a % 2] as ValueId, pick(16, b)], { position: POSITION });
    },
    (a, b) => {
      const [k, v] = [caches[a % 2], caches[b % 2]] as [ValueId, ValueId];
      add(
        32,
        g.one("sdpa", [pick(32, b), k, v], { heads: 4, kvHeads: 2, scale: 0.3, causal: true, position: POSITION }),
      );
    },
  ];
  const linear = (x: ValueId, k: Width, n: Width, which: number) => g.one("linear", [x, weight(n, k, which)], {});
  kinds.push(
    // q and k norms stand between the linears and the rotation.
    (a, b, c) => {
      const x = pick(width(a), b);
      const [q, k] = ([32, 16] as const).map((n) => linear(x, width(a), n, b)) as [ValueId, ValueId];
      const gain = g.weight(fresh("g"), dense("f32", [c % 2 === 0 ? 8 : 32]));
      add(32, g.one("rmsnorm", [q, gain], { eps: 1e-5, ...(c % 2 === 0 ? { groups: 4 } : {}) }));
      if (c % 3 === 0) add(16, k);
    },
    (a, b) => {
      const [gain, shift] = [0, 1].map(() => g.weight(fresh("g"), dense("f32", [width(a)]))) as [ValueId, ValueId];
      add(width(a), g.one("layernorm", [pick(width(a), b), gain, shift], { eps: 1e-5 }));
    },
    (a, b) =>
      add(width(a), g.one("unary", [linear(pick(width(a), b), width(a), width(a), b)], { fn: "softcap", cap: 3 })),
    // A mixture of three experts, two a token.
    (a, b, c) => {
      const [x, k, n] = [pick(width(a), b), width(a), width(c)];
      const logits = g.one("linear", [x, g.weight(fresh("w"), stored(FORMATS.f32, [3, k]))], {});
      const [ids, gates] = g.op("moe_route", [logits], { top: 2, normalize: b % 2 === 0 }) as [ValueId, ValueId];
      const experts = (rows: Width, of: Width) => Array.from({ length: 3 }, () => weight(rows, of, b));
      const inner = g.one("moe_linear", [x, ids, ...experts(n, k)], {});
      const active = g.one("unary", [inner], { fn: "silu" });
      add(k, g.one("moe_combine", [g.one("moe_linear", [active, ids, ...experts(k, n)], {}), gates], {}));
    },
  );
  kinds.push(
    (a, b, c) => {
      const [x, n] = [pick(width(a), b), width(c)];
      const [gate, up] = [linear(x, width(a), n, b), linear(x, width(a), n, b)];
      if (a % 7 === 0) add(n, up);
      const active = g.one("unary", [gate], { fn: "silu" });
      if (a % 7 === 1) add(n, active);
      add(n, g.one("binary", b % 2 === 0 ? [active, up] : [up, active], { fn: c % 5 === 0 ? "add" : "mul" }));
    },
    (a, b, c) => {
      const x = pick(width(a), b);
      const [q, k, v] = ([32, 16, 16] as const).map((n) => linear(x, width(a), n, b)) as [ValueId, ValueId, ValueId];
      if (c % 7 === 0) add(16, k);
      const turned = g.one("rope", [q, table], { heads: 4, position: POSITION });
      const key = g.one("rope", [k, table], { heads: 2, position: POSITION });
      for (const [i, written] of [key, v].entries()) {
        caches[i] = g.one("kv_write", [caches[i] as ValueId, written], { position: POSITION });
      }
      add(32, turned);
      if (c % 7 === 1) add(16, v);
    },
    (a, b, c) => {
      const product = linear(pick(width(a), b), width(a), width(c), b);
      if (c % 7 === 0) add(width(c), product);
      add(width(c), g.one("binary", [pick(width(c), b), product], { fn: "add" }));
    },
  );
  for (const [kind, a, b, c] of ops) kinds[kind % kinds.length]?.(a, b, c);
  if (made.length === 0) add(16, g.one("unary", [pick(16, 0)], { fn: "relu" }));
  for (const id of new Set(outputs.map((n) => made[n % made.length] as ValueId))) g.output(`out${id}`, id);
  return g.build();
}

/** A random tensor of a type, its symbols at the given values; the same for the same name. */
export function randomTensor(type: TensorType, name: string, symbols: Readonly<Record<string, number>>): HostTensor {
  const shape = type.shape.map((dim) => (typeof dim === "number" ? dim : (symbols[dim] as number)));
  const uniform = randomUniform([...name].reduce((hash, c) => (hash * 31 + c.charCodeAt(0)) | 0, 7));
  const data = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, uniform);
  if (type.kind === "format") return quantizeTensor(data, shapeRows(shape), "f32", type.format);
  return { dtype: "f32", shape, data };
}
