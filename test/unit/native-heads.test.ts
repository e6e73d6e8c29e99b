import { describe, expect, test } from "vitest";
import { buildBucket } from "../../src/backends/native/bucket.js";
import { cudaCapabilities, H100 } from "../../src/backends/native/capabilities.js";
import { BuildContext, type NativeDispatch, type NativeKernel } from "../../src/backends/native/kernel.js";
import { GENERAL_KERNELS } from "../../src/backends/native/kernels/general-table.js";
import { LINEAR_KERNELS } from "../../src/backends/native/kernels/linear-table.js";
import { ROWS_KERNELS } from "../../src/backends/native/kernels/rows-table.js";
import { type Format, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dense, GraphBuilder, stored, type ValueId } from "../../src/ir/graph.js";
import { makePlan } from "../../src/plan/plan.js";
import type { Choice } from "../../src/plan/select.js";
import { BoundStep } from "../../src/plan/step.js";
import { linearArguments } from "../support/native-linear.js";

const hopper = cudaCapabilities(H100, ["cublaslt"]);
const kernels = [...LINEAR_KERNELS, ...GENERAL_KERNELS, ...ROWS_KERNELS];

describe("heads that one row's linear on CUDA stores itself", () => {
  const { join } = LINEAR_KERNELS.find(({ id }) => id === "cuda/linear/skinny") as NativeKernel;
  interface Layer {
    readonly rows?: number;
    readonly cache?: Format;
    readonly queries?: Format | null;
    readonly interleaved?: boolean;
    readonly rotary?: number;
    readonly ring?: boolean;
    readonly size?: number;
    readonly k?: number;
    readonly x?: Format;
    /** A later step reads the queries as the linear makes them. */
    readonly shown?: boolean;
  }
  const [HEADS, KV_HEADS, KEYS] = [4, 2, 40];
  /** x -> q, k, v -> rope, caches: the plan, and the dispatches that the linear makes of its step and the one behind it. */
  function joined(layer: Layer) {
    const {
      rows = 1,
      cache = FORMATS.bf16,
      queries = FORMATS.bf16,
      size = 64,
      k = 256,
      x: inputs = FORMATS.bf16,
    } = layer;
    const { interleaved = false, rotary = size, ring = false } = layer;
    const g = new GraphBuilder({ P: 30 });
    const x = g.one("quantize", [g.input("x", dense("f32", [rows, k]))], { format: inputs }, "codes");
    const table = g.weight("angles", dense("f32", [KEYS, rotary]));
    const linear = (name: string, heads: number) =>
      g.one("linear", [x, g.weight(`${name}.weight`, stored(FORMATS.int8, [heads * size, k]))], {}, name);
    const [q, key, value] = [linear("q", HEADS), linear("k", KV_HEADS), linear("v", KV_HEADS)];
    const turned = (source: ValueId, heads: number, name: string) =>
      g.one("rope", [source, table], { heads, position: "P", ...(interleaved ? { interleaved } : {}), rotary }, name);
    const written = (name: string, source: ValueId) => {
      const state = g.state(name, stored(cache, [KV_HEADS, KEYS, size]));
      return g.one("kv_write", [state, source], { position: "P", ...(ring ? { ring } : {}) }, `${name}.written`);
    };
    const angles = turned(q, HEADS, "rope.q");
    g.output(
      "q",
      queries === null ? angles : g.one("quantize", [angles], { format: queries, heads: HEADS }, "q.codes"),
    );
    g.output("keys", written("keys", turned(key, KV_HEADS, "rope.k")));
    g.output("values", written("values", value));
    if (layer.shown) {
      const norm = g.weight("norm", dense("f32", [HEADS * size]));
      g.output("shown", g.one("rmsnorm", [q, norm], { eps: 1e-5 }, "shown"));
    }
    const made = makePlan(g.build(), { kernels, capabilities: hopper });
    const contexts = made.steps.map(
      (step) => new BuildContext(new BoundStep(made.graph, step, { P: 30 }), made.memory, hopper, { P: 30 }),
    );
    const at = made.steps.findIndex(({ kind }) => kind === "linear");
    expect(made.steps[at + 1]?.kind).toBe("rope_kv");
    const { choices, symbols } = made.buckets[0] as (typeof made.buckets)[number];
    const built = buildBucket(made, symbols, choices as Choice<NativeKernel>[], hopper);
    const dispatches = join?.(contexts[at] as BuildContext, contexts[at + 1] as BuildContext) ?? null;
    return { made, dispatches, entries: built.map(({ dispatch }) => dispatch.entry.name) };
  }

  test("go where attention reads them: turned queries, then keys and values in their caches", () => {
    const { made, dispatches } = joined({});
    expect(dispatches?.length).toBe(1);
    const { half, heads } = linearArguments(dispatches?.[0] as NativeDispatch);
    const named = (name: string) => expect.objectContaining({ id: made.graph.values.find((v) => v.name === name)?.id });
    expect(half).toBe(32);
    const [angles, position] = [expect.objectContaining({ kind: "dense" }), 0];
    const bf16 = { rounding: 1, offset: 0 };
    expect(heads).toEqual([
      { heads: HEADS, angles, position, ...bf16, out: named("q.codes"), cache: -1, keys: 0 },
      { heads: KV_HEADS, angles, position, ...bf16, out: named("keys"), cache: 0, keys: KEYS },
      { heads: KV_HEADS, angles: undefined, position: -1, ...bf16, out: named("values"), cache: 0, keys: KEYS },
    ]);
  });

  test("take one launch, and their own where something else reads what the linear makes", () => {
    expect(joined({}).entries).toEqual(["rows/quantize", "linear/skinny"]);
    expect(joined({ shown: true }).entries.slice(1, 3)).toEqual(["linear/skinny", "rows/rope_kv"]);
    expect(joined({ ring: true }).entries).toEqual(["rows/quantize", "linear/skinny", "rows/rope_kv"]);
  });

  test("may be float32 queries and caches of f16", () => {
    const { dispatches } = joined({ queries: null, cache: FORMATS.f16 });
    expect(linearArguments(dispatches?.[0] as NativeDispatch).heads.map(({ rounding }) => rounding)).toEqual([0, 2, 2]);
  });

  test("are not stored over what it still reads", () => {
    const { made } = joined({});
    const id = (name: string) => made.graph.values.find((value) => value.name === name)?.id as ValueId;
    expect(made.memory.slotOf.get(id("codes"))).not.toBe(made.memory.slotOf.get(id("q.codes")));
    expect(made.memory.live.get(id("codes"))?.[1]).toBe(made.memory.live.get(id("q.codes"))?.[0]);
  });

  test.each<[string, Layer]>([
    ["several rows", { rows: 2 }],
    ["a cache with scales", { cache: withScale(FORMATS.int8, { block: [1, "all"] }) }],
    ["queries with scales", { queries: withScale(FORMATS.float8_e4m3, { block: [1, "all"] }) }],
    ["neighbours that are turned together", { interleaved: true }],
    ["heads that are turned in part", { rotary: 32 }],
    ["a ring of keys", { ring: true }],
    ["heads whose halves are no power of two", { size: 96 }],
    ["rows that several blocks share", { k: 20480 }],
  ])("take a step of their own: %s", (_, layer) => {
    expect(joined(layer).dispatches).toBeNull();
  });
});
