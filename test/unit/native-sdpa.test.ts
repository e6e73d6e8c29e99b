import { describe, expect, test } from "vitest";
import { cudaCapabilities, H100 } from "../../src/backends/native/capabilities.js";
import { BuildContext, type NativeDispatch, type NativeKernel } from "../../src/backends/native/kernel.js";
import { SDPA_GENERAL_KERNELS } from "../../src/backends/native/kernels/general-sdpa.js";
import { SDPA_KERNELS } from "../../src/backends/native/kernels/sdpa-table.js";
import { NATIVE_KERNELS } from "../../src/backends/native/kernels/table.js";
import { type Format, withScale } from "../../src/formats/format.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import { type Dim, dense, GraphBuilder, stored, type TensorType } from "../../src/ir/graph.js";
import type { SdpaAttrs } from "../../src/ir/ops.js";
import { FLOAT8_PROBABILITIES } from "../../src/models/attention.js";
import { kvFormat } from "../../src/models/kvcache.js";
import { makePlan, type Plan } from "../../src/plan/plan.js";
import type { Choice } from "../../src/plan/select.js";
import { BoundStep } from "../../src/plan/step.js";

const hopper = cudaCapabilities(H100);
const ampere = cudaCapabilities({ ...H100, name: "NVIDIA A100", major: 8, minor: 0 });
const kernels = [...SDPA_KERNELS, ...SDPA_GENERAL_KERNELS];
const BF16 = { codec: CODECS.bf16, scale: 1 };

interface Case {
  readonly q?: TensorType;
  readonly kv?: Format;
  readonly keys?: number;
  readonly tokens?: Dim;
  readonly size?: number;
  readonly cached?: boolean;
  readonly attrs?: Partial<SdpaAttrs>;
}

const HEADS = 32;
const KV_HEADS = 8;

function plan(
  { q, kv = FORMATS.bf16, keys = 1000, tokens = "T", size = 128, cached = true, attrs = {} }: Case,
  on = hopper,
): Plan {
  const g = new GraphBuilder({ T: tokens === "T" ? 1 : (tokens as number), past: keys - 1 });
  const query = q ?? dense("f32", [tokens, HEADS * size]);
  const cache = stored(kv, query.shape.length === 4 ? [1, KV_HEADS, keys, size] : [KV_HEADS, keys, size]);
  const operands = [
    query.kind === "dense" ? g.input("q", query) : g.state("q", query),
    g.state("k", cache),
    g.state("v", cache),
  ];
  const more = (attrs.extras ?? []).map((name) =>
    g.input(name, dense("f32", name === "sinks" ? [HEADS] : [tokens, keys])),
  );
  const shape = { heads: HEADS, kvHeads: KV_HEADS, scale: 0.1, causal: true, ...(cached ? { position: "past" } : {}) };
  g.output("y", g.one("sdpa", [...operands, ...more], { ...shape, ...attrs }, "sdpa"));
  return makePlan(g.build(), { kernels, capabilities: on });
}

const chosen = (made: Plan) => made.buckets[0]?.choices[0];

function built(made: Plan, on = hopper): NativeDispatch {
  const { symbols } = made.graph;
  const bound = new BoundStep(made.graph, made.steps[0] as Plan["steps"][number], symbols);
  const { kernel } = chosen(made) as Choice<NativeKernel>;
  const [dispatch] = kernel.build(new BuildContext(bound, made.memory, on, symbols));
  return dispatch as NativeDispatch;
}

const whole = (rows: number) => withScale(FORMATS.float8_e4m3, { block: [rows, 128] });
const prompt16 = { tokens: 512, keys: 512, cached: false } as const;
const bf16Queries = stored(FORMATS.bf16, [512, HEADS, 128]);
const float8 = {
  ...prompt16,
  q: stored(whole(4 * 512), [1, HEADS, 512, 128]),
  kv: whole(512),
  attrs: { probabilities: FLOAT8_PROBABILITIES },
} as const;

describe("attention kernels of the native backend", () => {
  test.each(["f32", "f16", "bf16", "int8", "float8", "int4"])(
    "a token over a cache of %s takes the decode kernel",
    (kv) => {
      for (const size of [64, 128])
        for (const on of [hopper, ampere])
          expect(chosen(plan({ kv: kvFormat(kv), size }, on))?.kernel.id).toBe("cuda/sdpa/decode");
    },
  );

  test("what the decode kernel does not read is left to the general one, with the reason", () => {
    for (const [given, reason] of [
      [{ size: 96 }, "64 or 128: it is 96"],
      [{ kv: FORMATS.mxfp8_e4m3 }, "k and v are not alike"],
      [{ kv: withScale(FORMATS.uint4, { block: [1, 64] }) }, "k and v are not alike"],
      [{ attrs: { probabilities: { codec: CODECS.f16, scale: 1 } } }, "e4m3 or not at all"],
    ] as const) {
      const choice = chosen(plan(given));
      expect(choice?.kernel.id).toBe("cuda/sdpa/general");
      expect(choice?.explanation.rejected.find(({ id }) => id === "cuda/sdpa/decode")?.reason).toContain(reason);
    }
  });

  test("prompts take Hopper's matrix units, in the number of parts that their rounding declares", () => {
    // Args after the thirteen that all entries share: parts of queries, parts of probabilities.
    for (const [given, parts] of [
      [{ ...prompt16, q: bf16Queries, attrs: { probabilities: BF16 } }, [1, 1]],
      [{ ...prompt16, q: bf16Queries }, [1, 3]],
      [prompt16, [3, 3]],
      [{ ...prompt16, attrs: { probabilities: BF16, extras: ["sinks"] } }, [3, 1]],
    ] as const) {
      const made = plan(given);
      expect(chosen(made)?.kernel.id).toBe("cuda/sdpa/prefill_bf16");
      const { args, bindings } = built(made);
      expect(args.slice(13, 15)).toEqual(parts);
      expect(bindings.some(({ kind }) => kind === "scratch")).toBe(false);
    }
    expect(chosen(plan(float8))?.kernel.id).toBe("cuda/sdpa/prefill_float8");
  });

  test("prompts over caches of 8-bit codes take them too, with room for the codes and scales that they make bf16 and float32", () => {
    const eight = stored(kvFormat("float8"), [512, HEADS, 128]);
    // Args after the thirteen: bits of query elements, parts of probabilities, stride and column, whether codes are e4m3.
    for (const [given, expected] of [
      [{ ...prompt16, kv: kvFormat("int8") }, [32, 3, HEADS * 128, 0, 0]],
      [{ ...prompt16, kv: kvFormat("float8") }, [32, 3, HEADS * 128, 0, 1]],
      [
        { ...prompt16, q: bf16Queries, kv: kvFormat("int8"), attrs: { probabilities: BF16 } },
        [16, 1, HEADS * 128, 0, 0],
      ],
      [
        { ...prompt16, q: eight, kv: kvFormat("float8"), attrs: { probabilities: FLOAT8_PROBABILITIES } },
        [8, 1, HEADS * 128, 0, 1],
      ],
    ] as const) {
      const made = plan(given);
      expect(chosen(made)?.kernel.id).toBe("cuda/sdpa/prefill_scaled");
      expect(built(made).args.slice(13, 18)).toEqual(expected);
      expect(made.bytes.scratch).toBeGreaterThanOrEqual(2 * KV_HEADS * 512 * (128 * 2 + 4));
    }
    const int4 = chosen(plan({ ...prompt16, kv: kvFormat("int4") }))?.explanation.rejected;
    expect(int4?.find(({ id }) => id === "cuda/sdpa/prefill_scaled")?.reason).toContain("int8 or e4m3");
  });

  test("keys before the position are read early only where no step of the run writes them", () => {
    const early = (change: "nothing" | "write" | "other position" | "dense") => {
      const g = new GraphBuilder({ T: 1, past: 100, other: 3 });
      const cache = stored(FORMATS.bf16, [KV_HEADS, 200, 128]);
      const x = g.input("x", dense("f32", ["T", KV_HEADS * 128]));
      const written = (name: string) => {
        if (change === "dense") return g.input(name, dense("f32", [KV_HEADS, 200, 128]));
        const state = g.state(name, cache);
        if (change === "nothing") return state;
        return g.one("kv_write", [state, x], { position: change === "write" ? "past" : "other" }, `${name}.write`);
      };
      const q = g.input("q", dense("f32", ["T", HEADS * 128]));
      const attrs = { heads: HEADS, kvHeads: KV_HEADS, scale: 0.1, causal: true, position: "past" };
      const y = g.one("sdpa", [q, written("k"), written("v")], attrs, "sdpa");
      g.output("y", y);
      const graph = g.build();
      const node = graph.nodes.find(({ op }) => op === "sdpa") as (typeof graph.nodes)[number];
      const bound = new BoundStep(
        graph,
        { id: 0, kind: "sdpa", nodes: [node], inputs: [...node.inputs], outputs: [y] },
        graph.symbols,
      );
      const memory = { slots: [], slotOf: new Map(), live: new Map(), placement: new Map() };
      const row = SDPA_KERNELS.find(({ id }) => id === "cuda/sdpa/decode") as NativeKernel;
      return row.build(new BuildContext(bound, memory, hopper, graph.symbols))[0]?.args.at(-1);
    };
    expect([early("nothing"), early("write")]).toEqual([1, 1]);
    expect([early("other position"), early("dense")]).toEqual([0, 0]);
  });

  test("a result that is rounded to bf16 is stored so by the kernel of every bucket, other formats by a step of their own", () => {
    const rounded = (format: Format, on = hopper) => {
      const g = new GraphBuilder({ T: 512, past: 1000 });
      const cache = stored(FORMATS.bf16, [KV_HEADS, 1512, 128]);
      const q = g.input("q", dense("f32", ["T", HEADS * 128]));
      const attrs = { heads: HEADS, kvHeads: KV_HEADS, scale: 0.1, causal: true, position: "past" };
      const y = g.one("sdpa", [q, g.state("k", cache), g.state("v", cache)], attrs, "sdpa");
      g.output("y", g.one("quantize", [y], { format }, "rounded"));
      return makePlan(g.build(), { kernels: NATIVE_KERNELS, capabilities: on }, { buckets: [{ T: 1, past: 1000 }] });
    };
    const made = rounded(FORMATS.bf16);
    expect(made.steps.map(({ fusion }) => fusion)).toEqual(["sdpa+quantize"]);
    expect(made.buckets.map(({ choices }) => choices[0]?.kernel.id)).toEqual([
      "cuda/sdpa/decode",
      "cuda/sdpa/prefill_bf16",
    ]);
    expect(rounded(FORMATS.f16).steps).toHaveLength(2);
  });

  test("prompts that they do not do name why", () => {
    for (const [given, on, reason] of [
      [prompt16, ampere, "compute capability 9.0"],
      [{ ...prompt16, attrs: { softcap: 30 } }, hopper, "it does not do a soft-cap"],
      [{ ...prompt16, attrs: { scale: -1, extras: ["mask"] } }, hopper, "a mask, a scale that is not positive"],
      [{ ...prompt16, kv: kvFormat("int8") }, hopper, "stored as bf16"],
      [{ ...prompt16, attrs: { probabilities: { codec: CODECS.bf16, scale: 2 } } }, hopper, "bf16 or not at all"],
    ] as const) {
      const rejected = chosen(plan(given, on))?.explanation.rejected;
      expect(rejected?.find(({ id }) => id === "cuda/sdpa/prefill_bf16")?.reason).toContain(reason);
    }
    for (const [given, reason] of [
      [{ ...float8, kv: whole(256) }, "one scale a KV head"],
      [{ ...float8, attrs: {} }, "declared e4m3"],
    ] as const) {
      const rejected = chosen(plan(given))?.explanation.rejected;
      expect(rejected?.find(({ id }) => id === "cuda/sdpa/prefill_float8")?.reason).toContain(reason);
    }
  });

  test("few keys join in a cluster without scratch; otherwise there is room for every split of every row", () => {
    const splitsOf = (made: Plan, on = hopper) => built(made, on).args[29] as number;
    const short = plan({ keys: 4096 });
    expect([splitsOf(short), short.bytes.scratch]).toEqual([0, 0]);
    for (const [made, on, rows] of [
      [plan({ keys: 4097 }), hopper, 4],
      [plan({ keys: 100 }, ampere), ampere, 4],
      [plan({ keys: 100_000, tokens: 7 }), hopper, 28],
    ] as const) {
      const splits = splitsOf(made, on);
      expect(splits).toBeGreaterThan(0);
      const blocks = Math.ceil(rows / 8);
      expect(made.bytes.scratch).toBeGreaterThanOrEqual(KV_HEADS * blocks * 8 * splits * (128 + 2) * 4);
      // No multiprocessor of the device stays without a block.
      expect(KV_HEADS * blocks * splits).toBeGreaterThanOrEqual(H100.multiprocessors);
    }
  });
});
