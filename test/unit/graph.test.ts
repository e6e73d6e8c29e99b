import { describe, expect, test } from "vitest";
import { FORMATS } from "../../src/formats/table.js";
import { concreteShape, dense, GraphBuilder, showType, stored, type ValueId } from "../../src/ir/graph.js";
import { thrown } from "../support/failure.js";

const { f32, int4_tinygemm: int4, mxfp4 } = FORMATS;

/** A builder with a value of every kind an op may be given. */
function bench() {
  const g = new GraphBuilder({ T: 4, past: 8 });
  return {
    g,
    x: g.input("x", dense("f32", ["T", 64])),
    ids: g.state("ids", dense("i32", ["T"])),
    gain: g.weight("gain", dense("f32", [64])),
    w: g.weight("w", stored(int4, [32, 64])),
    table: g.weight("table", dense("f32", [8, 16])),
    cache: g.state("cache", stored(f32, [2, 8, 16])),
    constant: g.weight("constant", stored(f32, [2, 8, 16])),
    k: g.input("k", dense("f32", ["T", 32])),
    logits: g.input("logits", dense("f32", [1, 64])),
    settings: g.input("settings", dense("u32", [5])),
  };
}
type Bench = ReturnType<typeof bench>;

const rope = { heads: 4, position: "past" };
const sdpa = { heads: 4, kvHeads: 2, scale: 1, causal: true, position: "past" };

describe("a shape rule gives the type of every op's result", () => {
  const cases: [op: string, build: (b: Bench) => ValueId, type: string][] = [
    ["embedding", (b) => b.g.one("embedding", [b.ids, b.w], {}), "f32 [T, 64]"],
    ["rmsnorm", (b) => b.g.one("rmsnorm", [b.x, b.gain], { eps: 1e-5 }), "f32 [T, 64]"],
    ["linear", (b) => b.g.one("linear", [b.x, b.w], {}), "f32 [T, 32]"],
    ["linear of a stored activation", (b) => b.g.one("linear", [quantized(b), b.w], {}), "f32 [T, 32]"],
    ["rope", (b) => b.g.one("rope", [b.x, b.table], rope), "f32 [T, 64]"],
    ["kv_write", (b) => b.g.one("kv_write", [b.cache, b.k], { position: "past" }), "f32 [2, 8, 16]"],
    ["sdpa", (b) => b.g.one("sdpa", [b.x, b.cache, b.cache], sdpa), "f32 [T, 64]"],
    ["unary", (b) => b.g.one("unary", [b.x], { fn: "silu" }), "f32 [T, 64]"],
    ["binary", (b) => b.g.one("binary", [b.x, b.x], { fn: "mul" }), "f32 [T, 64]"],
    ["quantize", quantized, "mxfp4[1x32:e8m0] [T, 64]"],
    ["dequantize", (b) => b.g.one("dequantize", [b.w], {}), "f32 [32, 64]"],
    ["last_row", (b) => b.g.one("last_row", [b.x], {}), "f32 [1, 64]"],
    ["sample", (b) => b.g.one("sample", [b.logits, b.settings, b.ids], {}), "u32 [2]"],
  ];
  test.each(cases)("%s", (_, build, type) => {
    const b = bench();
    const id = build(b);
    b.g.output("out", id);
    const graph = b.g.build();
    expect(showType(graph.values[id]?.type as Parameters<typeof showType>[0])).toBe(type);
  });
});

const quantized = (b: Bench) => b.g.one("quantize", [b.x], { format: mxfp4 });

describe("what does not fit is refused by name, and nothing is added", () => {
  type Case = [what: string, build: (b: Bench) => unknown, code: string, text: RegExp];
  const cases: Case[] = [
    [
      "an op that does not exist",
      ({ g, x }) => g.op("conv" as "unary", [x], { fn: "relu" }),
      "argument/unknown-name",
      /op "conv"/,
    ],
    [
      "a value that does not exist",
      ({ g }) => g.one("unary", [99], { fn: "relu" }, "act"),
      "graph/invalid",
      /act.*value 99/,
    ],
    ["too few operands", ({ g, x }) => g.one("linear", [x], {}), "graph/invalid", /takes x, weight, bias; got 1/],
    ["too many operands", ({ g, x }) => g.one("unary", [x, x], { fn: "relu" }), "graph/invalid", /got 2/],
    [
      "a dense weight",
      ({ g, x, gain }) => g.one("linear", [x, gain], {}),
      "dtype/mismatch",
      /weight has dtype f32.*a format/,
    ],
    ["a stored bias", ({ g, x, w }) => g.one("linear", [x, w, w], {}), "dtype/mismatch", /bias/],
    [
      "another K",
      ({ g, k, w }) => g.one("linear", [k, w], {}),
      "shape/mismatch",
      /weight has shape \[32, 64\]: expected \[any, 32\]/,
    ],
    [
      "integers in arithmetic",
      ({ g, ids }) => g.one("unary", [ids], { fn: "relu" }),
      "dtype/mismatch",
      /i32: expected f32/,
    ],
    ["unlike terms", ({ g, x, k }) => g.one("binary", [x, k], { fn: "add" }), "shape/mismatch", /expected \[T, 64\]/],
    [
      "a norm of another width",
      ({ g, k, gain }) => g.one("rmsnorm", [k, gain], { eps: 1 }),
      "shape/mismatch",
      /weight/,
    ],
    [
      "heads that do not divide",
      ({ g, x, table }) => g.one("rope", [x, table], { ...rope, heads: 3 }),
      "shape/mismatch",
      /3 heads/,
    ],
    [
      "heads of an odd size",
      ({ g, x, table }) => g.one("rope", [x, table], { ...rope, heads: 64 }),
      "shape/mismatch",
      /even/,
    ],
    [
      "groups that do not divide",
      ({ g, x, cache }) => g.one("sdpa", [x, cache, cache], { ...sdpa, heads: 4, kvHeads: 3 }),
      "graph/invalid",
      /4 .*3/,
    ],
    [
      "a cache of other heads",
      ({ g, x, cache }) => g.one("sdpa", [x, cache, cache], { ...sdpa, kvHeads: 4 }),
      "shape/mismatch",
      /\.k/,
    ],
    [
      "a position that is no symbol",
      ({ g, x, table }) => g.one("rope", [x, table], { heads: 4, position: "now" }),
      "graph/invalid",
      /position now/,
    ],
    [
      "a write into a weight",
      ({ g, constant, k }) => g.one("kv_write", [constant, k], { position: "past" }),
      "graph/invalid",
      /constant in place, which is a weight/,
    ],
    [
      "a block that does not divide K",
      ({ g }) => g.one("quantize", [g.input("odd", dense("f32", ["T", 48]))], { format: mxfp4 }, "q"),
      "format/block",
      /48 is not a multiple of its block 32/,
    ],
    [
      "settings of another dtype",
      ({ g, logits, ids, gain }) => g.op("sample", [logits, gain, ids], {}),
      "dtype/mismatch",
      /settings/,
    ],
    ["a name twice", ({ g }) => g.input("x", dense("f32", [1])), "graph/invalid", /x: the name is used twice/],
    ["an extent that is no symbol", ({ g }) => g.input("y", dense("f32", ["S"])), "graph/invalid", /extent S/],
    ["a negative extent", ({ g }) => g.input("y", dense("f32", [-1])), "graph/invalid", /extent -1/],
    ["an output that does not exist", ({ g }) => g.output("y", 99), "graph/invalid", /output y/],
    ["an output twice", ({ g, x }) => [g.output("y", x), g.output("y", x)], "graph/invalid", /output y/],
    ["a graph without outputs", ({ g }) => g.build(), "graph/invalid", /outputs/],
  ];
  test.each(cases)("%s", (_, build, code, text) => {
    const b = bench();
    const error = thrown(() => build(b));
    expect(error.code).toBe(code);
    expect(error.message).toMatch(text);
    b.g.output("still works", b.g.one("unary", [b.x], { fn: "relu" }));
    expect(b.g.build().nodes).toHaveLength(1);
  });

  test("a symbol whose largest value is no count", () => {
    for (const max of [-1, 1.5, Number.NaN]) {
      expect(thrown(() => new GraphBuilder({ T: max }))).toMatchObject({ code: "argument/invalid" });
    }
  });
});

test("what an in-place op has updated is read through its result only", () => {
  const { g, cache, k, x } = bench();
  const written = g.one("kv_write", [cache, k], { position: "past" }, "written");
  const error = thrown(() => g.one("sdpa", [x, cache, written], sdpa));
  expect(error).toMatchObject({ code: "graph/invalid" });
  expect(error.message).toMatch(/reads cache, which written has updated in place: read written instead/);
  expect(() => g.one("sdpa", [x, written, written], sdpa)).not.toThrow();
});

test("a built graph keeps what it had: later building does not change it", () => {
  const { g, x } = bench();
  g.output("a", g.one("unary", [x], { fn: "relu" }));
  const graph = g.build();
  const before = structuredClone({ ...graph, values: graph.values.length });
  g.output("b", g.one("unary", [x], { fn: "silu" }));
  expect({ ...graph, values: graph.values.length }).toEqual(before);
});

test("a shape with bound symbols is concrete; an unbound symbol is an error", () => {
  expect(concreteShape(["T", 3], { T: 2 })).toEqual([2, 3]);
  expect(thrown(() => concreteShape(["T"], {}))).toMatchObject({ code: "graph/invalid" });
});
