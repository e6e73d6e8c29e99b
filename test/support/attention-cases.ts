import type { Format } from "../../src/formats/format.js";
import { withScale } from "../../src/formats/format.js";
import { CODECS, FORMATS } from "../../src/formats/table.js";
import type { AttentionCase, AttentionSetup, Content } from "./attention.js";

export interface NamedCase extends AttentionCase {
  readonly name: string;
}

const base = { most: [70, 160] } as const;
const heads = (heads: number, kvHeads: number, size: number) => ({ ...base, heads, kvHeads, size });
const F = FORMATS;
const grouped = (format: Format, k: number) => withScale(format, { block: [1, k] });

/** Setups and their runs [tokens, keys, content]: lengths of 1, lengths that no tile divides, long, and telling contents. */
const TABLE: readonly (readonly [AttentionSetup, ...(readonly [tokens: number, keys: number, content?: Content])[]])[] =
  [
    // Heads and head sizes, whole keys.
    [
      { name: "one head of 16", ...heads(1, 1, 16) },
      [1, 1],
      [1, 2],
      [3, 7],
      [33, 65],
      [70, 160],
      [5, 40, "large"],
      [9, 90, "dominating"],
    ],
    [
      { name: "MHA of 64", ...heads(4, 4, 64), batch: 2 },
      [1, 1],
      [1, 63],
      [17, 17],
      [31, 33, "large"],
      [32, 64],
      [13, 129, "dominating"],
    ],
    [{ name: "GQA of 80", ...heads(6, 2, 80) }, [1, 1], [2, 19], [11, 67], [20, 64, "large"], [7, 75, "dominating"]],
    [{ name: "MQA of 128", ...heads(8, 1, 128), batch: 3 }, [1, 5], [3, 31], [4, 64, "large"], [9, 70, "dominating"]],
    [{ name: "MQA of 12 heads, 20 elements", ...heads(12, 1, 20) }, [1, 9], [2, 65], [3, 130, "large"], [4, 64]],
    [{ name: "GQA of 256", ...heads(4, 2, 256) }, [1, 3], [5, 33], [2, 70, "large"], [18, 35, "dominating"]],
    [{ name: "head of 96", ...heads(2, 2, 96) }, [1, 1], [6, 45], [33, 33]],
    [{ name: "head of 200", ...heads(2, 1, 200) }, [1, 8], [7, 66]],
    // Masks.
    [
      { name: "causal", ...heads(4, 2, 64), attrs: { causal: true } },
      [1, 1],
      [2, 1],
      [17, 17],
      [33, 20],
      [20, 33],
      [70, 70],
      [65, 65, "large"],
      [40, 40, "dominating"],
    ],
    [
      { name: "causal window of 7", ...heads(4, 2, 64), attrs: { causal: true, window: 7 } },
      [1, 1],
      [7, 7],
      [8, 8],
      [33, 33],
      [70, 50],
      [70, 70, "large"],
    ],
    [
      { name: "window of 5 to both sides", ...heads(2, 1, 32), attrs: { window: 5 } },
      [1, 1],
      [9, 20],
      [40, 33],
      [66, 70, "dominating"],
    ],
    [{ name: "window of 1", ...heads(2, 1, 32), attrs: { causal: true, window: 1 } }, [1, 1], [35, 35]],
    [{ name: "window that covers all", ...heads(2, 2, 32), attrs: { causal: true, window: 500 } }, [35, 35], [3, 3]],
    [
      { name: "shared mask", ...heads(4, 2, 64), mask: "shared" },
      [1, 1],
      [3, 33],
      [35, 70],
      [9, 40, "masked rows"],
      [1, 65, "masked rows"],
      [33, 33, "large"],
    ],
    [
      { name: "mask per batch and head", ...heads(4, 1, 32), batch: 2, mask: "full" },
      [1, 7],
      [5, 65],
      [7, 31, "masked rows"],
      [40, 33, "large"],
    ],
    [
      { name: "mask and causal", ...heads(2, 2, 64), mask: "shared", attrs: { causal: true } },
      [17, 17],
      [33, 40, "masked rows"],
      [1, 1, "masked rows"],
    ],
    // Soft-cap, sinks, scale.
    [
      { name: "soft-cap of 30", ...heads(4, 2, 64), attrs: { softcap: 30, causal: true } },
      [1, 1],
      [17, 33],
      [33, 33, "large"],
      [5, 70, "dominating"],
    ],
    [
      { name: "sinks", ...heads(4, 2, 64), sinks: true, attrs: { causal: true } },
      [1, 1],
      [17, 33],
      [33, 33, "large"],
      [9, 65, "dominating"],
    ],
    [
      {
        name: "everything",
        ...heads(4, 2, 64),
        sinks: true,
        mask: "full",
        attrs: { causal: true, window: 20, softcap: 20 },
      },
      [1, 1],
      [33, 33],
      [40, 70, "masked rows"],
      [22, 22, "large"],
    ],
    [{ name: "scale of 1, negative", ...heads(2, 2, 32), attrs: { scale: -1 } }, [3, 40], [35, 36, "large"]],
    // Caches in every kind of format.
    ...(
      [
        ["f32", F.f32],
        ["bf16", F.bf16],
        ["f16", F.f16],
        ["int8", F.int8],
        ["float8 e4m3", F.float8_e4m3],
        ["float8 e5m2", F.float8_e5m2],
        ["int4 groups", grouped(F.uint4, 32)],
        ["int4 symmetric groups", grouped(F.int4_symmetric, 32)],
        ["int4 float zeros", grouped(F.int4_tinygemm, 32)],
        ["mxfp4", F.mxfp4],
        ["nvfp4", F.nvfp4_single],
        ["nf4", grouped(F.nf4, 64)],
        ["int3", F.int3],
        ["fp6", F.mxfp6_e3m2],
      ] as const
    ).map(
      ([name, kv]) =>
        [
          { name: `${name} cache`, ...heads(4, 2, 64), kv, capacity: 150, attrs: { causal: true } },
          [1, 1],
          [1, 64],
          [3, 150],
          [33, 70],
          [9, 100, "dominating"],
        ] as const,
    ),
    [
      { name: "int8 cache of 128", ...heads(8, 2, 128), kv: F.int8, capacity: 200, attrs: { causal: true } },
      [1, 129],
      [35, 99],
    ],
    [
      {
        name: "int4 cache of 256, window",
        ...heads(4, 1, 256),
        kv: grouped(F.uint4, 32),
        capacity: 200,
        attrs: { causal: true, window: 33 },
      },
      [1, 129],
      [20, 99],
    ],
    // Rings and pages.
    [
      {
        name: "ring of 100, window of 31",
        ...heads(4, 2, 64),
        kv: F.int8,
        capacity: 100,
        attrs: { causal: true, window: 31, ring: true },
      },
      [1, 1],
      [70, 70],
      [1, 99],
      [33, 133],
      [1, 101],
      [70, 150],
    ],
    [
      { name: "pages of 16", ...heads(4, 2, 64), kv: F.int8, capacity: 160, page: 16, attrs: { causal: true } },
      [1, 1],
      [1, 16],
      [1, 17],
      [33, 150],
      [70, 160],
    ],
    [
      {
        name: "pages of 8, bf16, ring, sinks",
        ...heads(4, 2, 64),
        kv: F.bf16,
        capacity: 96,
        page: 8,
        sinks: true,
        attrs: { causal: true, window: 20, ring: true },
      },
      [1, 60],
      [35, 150],
      [7, 96],
    ],
    // Stored keys with every option: what kernels that take no float32 keys are held to.
    ...(
      [
        ["window of 7", { attrs: { causal: true, window: 7 } }],
        ["window of 20, soft-cap of 30", { attrs: { causal: true, window: 20, softcap: 30 } }],
        ["sinks", { sinks: true, attrs: { causal: true } }],
        ["shared mask", { mask: "shared" }],
        ["mask per head, sinks, soft-cap", { mask: "full", sinks: true, attrs: { softcap: 20 } }],
        ["scale of -1", { attrs: { scale: -1 } }],
      ] as const
    ).flatMap(([name, options], i) =>
      ([F.bf16, F.int8, grouped(F.uint4, 32)] as const).map(
        (kv) =>
          [
            {
              name: `${kv.name} cache, ${name}`,
              ...heads(4, 2, i % 2 === 0 ? 64 : 128),
              kv,
              capacity: 150,
              ...options,
            },
            [33, 90],
            [70, 150, "large"],
            [17, 65, "masked rows"],
            [20, 149, "dominating"],
          ] as const,
      ),
    ),
    // Long: splits, and 4096 keys.
    [
      { name: "4096 keys", heads: 4, kvHeads: 2, size: 64, most: [4, 4096] },
      [1, 4096],
      [1, 2049],
      [4, 1025],
      [2, 4095, "large"],
      [1, 4096, "dominating"],
    ],
    [
      {
        name: "4096 causal keys in int8",
        heads: 4,
        kvHeads: 1,
        size: 64,
        most: [3, 4096],
        kv: F.int8,
        capacity: 4096,
        attrs: { causal: true },
      },
      [1, 4096],
      [3, 3000],
      [1, 1, "dominating"],
    ],
    [
      {
        name: "long, sinks and soft-cap",
        heads: 4,
        kvHeads: 2,
        size: 32,
        most: [2, 2100],
        sinks: true,
        attrs: { softcap: 15 },
      },
      [1, 2100],
      [2, 1500, "large"],
    ],
    // Stored queries, and probabilities in e4m3.
    [
      {
        name: "float8 queries, cached",
        ...heads(4, 2, 64),
        q: F.float8_e4m3,
        kv: F.float8_e4m3,
        capacity: 150,
        attrs: { causal: true },
      },
      [1, 64],
      [33, 99],
      [70, 150, "large"],
    ],
    [
      { name: "bf16 operands", ...heads(4, 2, 64), most: [33, 47], batch: 2, q: F.bf16, kv: F.bf16 },
      [33, 47],
      [33, 47, "dominating"],
    ],
    [{ name: "f16 operands", ...heads(2, 1, 128), most: [1, 47], q: F.f16, kv: F.f16 }, [1, 47], [1, 47, "large"]],
    [
      {
        name: "e4m3 probabilities",
        ...heads(4, 2, 64),
        kv: F.float8_e4m3,
        capacity: 150,
        attrs: { causal: true, probabilities: { codec: CODECS.e4m3, scale: 256 } },
      },
      [1, 64],
      [33, 99],
      [70, 150, "dominating"],
      [1, 150, "large"],
    ],
  ];

export const ATTENTION_CASES: readonly NamedCase[] = TABLE.flatMap(([setup, ...runs]) =>
  runs.map(([tokens, keys, content = "normal"]) => ({
    name: `${setup.name}: ${tokens} x ${keys}, ${content}`,
    setup,
    tokens,
    keys,
    content,
  })),
);
