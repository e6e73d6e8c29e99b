import { describe, expect, test } from "vitest";
import type { Capabilities } from "../../src/backends/backend.js";
import { WEBGPU_KERNELS } from "../../src/backends/webgpu/kernels/table.js";
import { TIERS } from "../../src/codegen/support.js";
import { type Block, type Format, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, type Graph, GraphBuilder, stored, type ValueId } from "../../src/ir/graph.js";
import { packSettings } from "../../src/ir/sample.js";
import type { DenseTensor } from "../../src/ir/tensor.js";
import { parseConfig } from "../../src/models/config.js";
import { buildDecoder, type DecoderOptions, ROPE_TABLE, ropeTable } from "../../src/models/decoder.js";
import { FUSIONS, fuse } from "../../src/plan/fuse.js";
import { explainPlan, makePlan } from "../../src/plan/plan.js";
import { open } from "../../src/runtime/device.js";
import { scheduleFaults } from "../support/plans.js";
import { randomTensor } from "../support/random-graph.js";
import { TINY_CONFIG } from "../support/tiny-model.js";
import { device, kernel, small } from "../support/toy-plan.js";

const INT4 = withScale(FORMATS.int4_tinygemm, { block: [1, 32] });
const config = parseConfig(TINY_CONFIG);
const decoder = (options: Partial<DecoderOptions> = {}, fields: Record<string, unknown> = {}) =>
  buildDecoder(parseConfig({ ...TINY_CONFIG, ...fields }), {
    weightFormat: ({ role }) => (role === "embedding" || role === "head" ? FORMATS.bf16 : INT4),
    activationFormat: () => null,
    kvFormat: FORMATS.f32,
    maxTokens: 8,
    capacity: 32,
    logits: "last",
    ...options,
  });

describe("fusion of a decoder", () => {
  const variants: [what: string, graph: Graph, layerSteps: number][] = [
    ["with 4-bit weights", decoder(), 8],
    ["with biases", decoder({}, { architectures: ["Qwen2ForCausalLM"] }), 8],
    ["with all logits", decoder({ logits: "all" }), 8],
    // One quantize for q, k and v, one for o, one for gate and up, one for down.
    ["with quantized activations", decoder({ activationFormat: () => FORMATS.int8 }), 12],
    [
      "with tied embeddings and a quantized cache",
      decoder({ kvFormat: withScale(FORMATS.int8, { block: [1, 8] }) }, { tie_word_embeddings: true }),
      8,
    ],
  ];

  test.each(variants)("%s takes as many steps a layer as it should", (_, graph, layerSteps) => {
    const steps = fuse(graph);
    const outside =
      graph.outputs.sampled === undefined
        ? ["embedding", "rmsnorm", "linear"]
        : ["embedding", "last_row", "rmsnorm", "linear", "sample"];
    expect(steps).toHaveLength(config.layers * layerSteps + outside.length);
  });

  test.each(variants)(
    "%s: every node is in exactly one step, in an order that respects every dependency",
    (_, graph) => {
      expect(scheduleFaults(graph, fuse(graph))).toEqual([]);
      expect(scheduleFaults(graph, fuse(graph, false))).toEqual([]);
    },
  );

  test("groups each layer as norm, qkv, rope and cache, attention, output with residual, norm, gate and up, down with residual", () => {
    const steps = fuse(decoder()).map(({ kind, fusion }) => fusion ?? kind);
    const layer = [
      "rmsnorm",
      "qkv",
      "rope+kv_write",
      "sdpa",
      "linear+residual",
      "rmsnorm",
      "gate*up",
      "linear+residual",
    ];
    expect(steps).toEqual(["embedding", ...layer, ...layer, "last_row", "rmsnorm", "linear", "sample"]);
    expect(fuse(decoder(), false).every((step) => step.nodes.length === 1 && step.fusion === undefined)).toBe(true);
  });

  test("computes on the reference what single nodes compute, bit for bit: logits, tokens and caches, prompt and next token", async () => {
    await using reference = await open({ prefer: ["reference"] });
    const graph = decoder();
    const weights = (name: string) => {
      if (name === ROPE_TABLE) return { dtype: "f32", shape: [32, 8], data: ropeTable(config, 32) } as const;
      return randomTensor(graph.values.find((value) => value.name === name)?.type as never, name, graph.symbols);
    };
    const results: unknown[][] = [];
    for (const fused of [true, false]) {
      using program = await reference.compile(graph, { fuse: fused, weights });
      const { executable } = program;
      const all: unknown[] = [];
      executable.write("settings", {
        dtype: "u32",
        shape: [5],
        data: packSettings({ temperature: 1, topK: 0, topP: 1, seed: 1, step: 0 }),
      });
      executable.write("ids", { dtype: "i32", shape: [5], data: Int32Array.of(3, 1, 200, 7, 9) });
      for (const symbols of [
        { T: 5, past: 0 },
        { T: 1, past: 5 },
        { T: 1, past: 6 },
      ]) {
        executable.submit(symbols);
        for (const name of ["logits", "sampled", "layer0.k_cache", "layer1.v_cache"])
          all.push(await executable.read(name));
      }
      results.push(all);
    }
    expect(results[0]).toEqual(results[1]);
    const [logits] = results[0] as [DenseTensor];
    expect(new Set(logits.data).size).toBeGreaterThan(100);
  });
});

describe("a fusion leaves alone", () => {
  const build = (use: (g: GraphBuilder, x: ValueId, w: (n: number) => ValueId) => void, formats: Format[] = []) => {
    const g = new GraphBuilder({ T: 4, past: 8 });
    let count = 0;
    use(g, g.input("x", dense("f32", ["T", 32])), (n) =>
      g.weight(`w${count}`, stored(formats[count++] ?? INT4, [n, 32])),
    );
    return fuse(g.build()).map(({ fusion, kind }) => fusion ?? kind);
  };

  test("a product that something else reads, or that is an output", () => {
    const graph = (extra: "output" | "reader" | "none") =>
      build((g, x, w) => {
        const product = g.one("linear", [x, w(32)], {});
        g.output("sum", g.one("binary", [product, x], { fn: "add" }));
        if (extra === "output") g.output("product", product);
        if (extra === "reader") g.output("other", g.one("unary", [product], { fn: "relu" }));
      });
    expect(graph("none")).toEqual(["linear+residual"]);
    expect(graph("output")).toEqual(["linear", "elementwise"]);
    expect(graph("reader")).toEqual(["linear", "elementwise", "elementwise"]);
  });

  test("linears of one input in different formats", () => {
    const gated = (formats: Format[]) =>
      build((g, x, w) => {
        const [gate, up] = [g.one("linear", [x, w(16)], {}), g.one("linear", [x, w(16)], {})];
        g.output("out", g.one("binary", [g.one("unary", [gate], { fn: "silu" }), up], { fn: "mul" }));
      }, formats);
    expect(gated([INT4, INT4])).toEqual(["gate*up"]);
    expect(gated([INT4, FORMATS.bf16])).toEqual(["linear", "linear+activation", "elementwise"]);
  });

  test("weights whose blocks of rows cannot be laid one after another", () => {
    const blocks = withScale(FORMATS.float8_e4m3, { block: [24, 32] });
    const gated = build(
      (g, x, w) => {
        const [gate, up] = [g.one("linear", [x, w(16)], {}), g.one("linear", [x, w(16)], {})];
        g.output("out", g.one("binary", [g.one("unary", [gate], { fn: "silu" }), up], { fn: "mul" }));
      },
      [blocks, blocks],
    );
    expect(gated).toEqual(["linear", "linear+activation", "elementwise"]);
  });

  test("a value's old content, when a group that waits for others still reads it: the update comes after", () => {
    const g = new GraphBuilder({ T: 4, past: 8 });
    const [x, table] = [g.input("x", dense("f32", ["T", 32])), g.weight("table", dense("f32", [8, 8]))];
    const [cache, keys] = [g.state("cache", stored(FORMATS.f32, [2, 8, 8])), g.input("keys", dense("f32", ["T", 16]))];
    const linear = (name: string) => g.one("linear", [x, g.weight(name, stored(INT4, [32, 32]))], {}, `${name}.out`);
    const rope = (id: ValueId) => g.one("rope", [id, table], { heads: 4, position: "past" });
    const attrs = { heads: 4, kvHeads: 2, scale: 1, causal: true, position: "past" };
    // The first linear waits for the second one, which it is grouped with; the cache is read in between and then written.
    g.output("attended", g.one("sdpa", [rope(linear("a")), cache, cache], attrs));
    g.output("cache", g.one("kv_write", [cache, keys], { position: "past" }));
    g.output("later", rope(linear("b")));
    const graph = g.build();
    const steps = fuse(graph);
    expect(steps.map((step) => step.fusion)).toContain("qkv");
    expect(scheduleFaults(graph, steps)).toEqual([]);
  });

  test("nothing else: every fusion of the table is met above", () => {
    const met = new Set(
      [
        ...[decoder(), small()].flatMap((graph) => fuse(graph)),
        ...[...optionalGraphs(), ...roundedGraphs()].flatMap((graph) => fuse(graph, true, OPTIONAL)),
      ].map((step) => step.fusion),
    );
    for (const { name } of FUSIONS) expect(met).toContain(name);
  });
});

const OPTIONAL = () => true;

/** What makes a value that is quantized row by row: an activation, a gated one, a norm. */
function optionalGraphs(format: Format = FORMATS.int8): Graph[] {
  return (["relu", "gated", "norm"] as const).map((what) => {
    const g = new GraphBuilder({ T: 4 });
    const [x, up] = [g.input("x", dense("f32", ["T", 64])), g.input("up", dense("f32", ["T", 64]))];
    let made = what === "norm" ? g.one("rmsnorm", [x, g.weight("w", dense("f32", [64]))], { eps: 1e-5 }) : x;
    if (what !== "norm") made = g.one("unary", [x], { fn: "relu" });
    if (what === "gated") made = g.one("binary", [up, made], { fn: "mul" });
    g.output("y", g.one("quantize", [made], { format }));
    return g.build();
  });
}

/** What makes a value that is rounded to a format without scales: a linear with an activation, a gated one, attention. */
function roundedGraphs(format: Format = FORMATS.bf16): Graph[] {
  return (["relu", "gated", "sdpa"] as const).map((what) => {
    const g = new GraphBuilder({ T: 4 });
    const x = g.input("x", dense("f32", ["T", 64]));
    const linear = (name: string) => g.one("linear", [x, g.weight(name, stored(FORMATS.bf16, [64, 64]))], {});
    const attend = () => {
      const [k, v] = ["k", "v"].map((name) => g.state(name, stored(FORMATS.bf16, [2, 8, 32]))) as [ValueId, ValueId];
      return g.one("sdpa", [x, k, v], { heads: 2, kvHeads: 2, scale: 1, causal: false });
    };
    let made = what === "sdpa" ? attend() : g.one("unary", [linear("w")], { fn: "silu" });
    if (what === "gated") made = g.one("binary", [made, linear("up")], { fn: "mul" });
    g.output("y", g.one("quantize", [made], { format }));
    return g.build();
  });
}

describe("optional fusions", () => {
  const names = (graphs: readonly Graph[], admits?: () => boolean) =>
    graphs.map((graph) => fuse(graph, true, admits).map(({ fusion, kind }) => fusion ?? kind));

  test("what makes a value is fused with quantizing it where a kernel takes that, and only there", () => {
    expect(names(optionalGraphs(), OPTIONAL)).toEqual([
      ["activation+quantize"],
      ["activation*mul+quantize"],
      ["rmsnorm+quantize"],
    ]);
    expect(names(optionalGraphs())).toEqual([
      ["elementwise", "quantize"],
      ["elementwise", "elementwise", "quantize"],
      ["rmsnorm", "quantize"],
    ]);
    const tensor = withScale(FORMATS.float8_e4m3, { block: ["all", "all"] });
    expect(names(optionalGraphs(tensor), OPTIONAL)).toEqual(names(optionalGraphs(), OPTIONAL));
    const graph = decoder({ activationFormat: () => FORMATS.int8 });
    expect(fuse(graph).length - fuse(graph, true, OPTIONAL).length).toBe(2 * config.layers);
    expect(scheduleFaults(graph, fuse(graph, true, OPTIONAL))).toEqual([]);
  });

  test("rounding without scales is done by what makes the value; with scales it is a step", () => {
    expect(names(roundedGraphs(), OPTIONAL)).toEqual([
      ["linear+activation+quantize"],
      ["gate*up+quantize"],
      ["sdpa+quantize"],
    ]);
    expect(names(roundedGraphs(FORMATS.int8), OPTIONAL)).toEqual([
      ["linear+activation", "quantize"],
      ["gate*up", "quantize"],
      ["sdpa", "quantize"],
    ]);
    for (const graph of roundedGraphs()) expect(scheduleFaults(graph, fuse(graph, true, OPTIONAL))).toEqual([]);
  });

  test("linears that declare other sums are not one step", () => {
    const g = new GraphBuilder({ T: 4 });
    const format = withScale(FORMATS.float8_e4m3, { block: [1, "all"] });
    const x = g.input("x", stored(format, ["T", 64]));
    const [gate, up] = ([{ fastAccum: true }, {}] as const).map((attrs, i) =>
      g.one("linear", [x, g.weight(`w${i}`, stored(format, [64, 64]))], attrs),
    ) as [ValueId, ValueId];
    g.output("y", g.one("binary", [g.one("unary", [gate], { fn: "silu" }), up], { fn: "mul" }));
    expect(fuse(g.build()).map(({ fusion }) => fusion)).not.toContain("gate*up");
  });

  test("never where rows depend on each other, but for the one scale of a tensor", () => {
    const bands = withScale(FORMATS.int8, { block: [2, "all"] });
    for (const format of [bands, FORMATS.nvfp4, FORMATS.nf4])
      expect(names(optionalGraphs(format), OPTIONAL).flat()).not.toContain("activation+quantize");
  });

  test("never where scales are given, or made by the norm: no fused kernel reads those operands", () => {
    for (const swapped of [false, true]) {
      const g = new GraphBuilder();
      const x = g.input("x", dense("f32", [4, 64]));
      const scale = g.input("scale", dense("f32", [4, 1]));
      const normed = g.one("rmsnorm", [swapped ? scale : x, g.weight("w", dense("f32", [swapped ? 1 : 64]))], {
        eps: 1e-5,
      });
      g.output("y", g.one("quantize", swapped ? [x, normed] : [normed, scale], { format: FORMATS.int8 }));
      expect(names([g.build()], OPTIONAL)).toEqual([["rmsnorm", "quantize"]]);
    }
  });

  test("the one scale of a tensor is not made by a workgroup that has a row of it", () => {
    const widest = { kernels: WEBGPU_KERNELS, capabilities: Object.values(TIERS).at(-1) as Capabilities };
    const kinds = (...block: Block) => {
      const graph = optionalGraphs(withScale(FORMATS.float8_e4m3, { block })).at(-1) as Graph;
      return makePlan(graph, widest).steps.map(({ kind }) => kind);
    };
    expect(kinds(1, "all")).toEqual(["quantize"]);
    expect(kinds("all", "all")).toEqual(["rmsnorm", "quantize"]);
  });

  test("a kernel that does not name the fusion is refused, with the reason", () => {
    const [graph] = optionalGraphs() as [Graph];
    const plain = kernel("toy/quantize/plain", "quantize", 1);
    const fused = { ...kernel("toy/quantize/fused", "quantize", 0.1), fusions: ["activation+quantize"] };
    const text = explainPlan(makePlan(graph, device([plain, fused])));
    expect(text).toContain("(activation+quantize: unary+quantize)");
    expect(text).toContain("-> toy/quantize/fused");
    expect(text).toMatch(/toy\/quantize\/plain +no +it does not take steps of activation\+quantize/);
    // Where no kernel that names it admits the step, the nodes stay apart.
    const refused = { ...fused, requires: [{ unmet: () => "no" }] };
    const kernels = [plain, refused, kernel("toy/elementwise", "elementwise")];
    expect(makePlan(graph, device(kernels)).steps.map(({ kind }) => kind)).toEqual(["elementwise", "quantize"]);
  });
});
