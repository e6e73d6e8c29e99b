import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openWebGpu, type WebGpuDevice } from "../../src/backends/webgpu/device.js";
import { FORMATS } from "../../src/formats/table.js";
import { sdpaBound } from "../../src/ir/attention.js";
import type { Node, Value } from "../../src/ir/graph.js";
import {
  type AttentionCase,
  type AttentionSetup,
  KernelRunner,
  operandsOf,
  sdpaGraph,
  symbolsOf,
} from "../support/attention.js";

let device: WebGpuDevice;
let runner: KernelRunner;
beforeAll(async () => {
  device = await openWebGpu({ tier: "default" });
  runner = new KernelRunner(device);
});
afterAll(async () => device[Symbol.asyncDispose]());

const [PREFILL, DECODE, SPLIT] = ["webgpu/sdpa/prefill", "webgpu/sdpa/decode", "webgpu/sdpa/decode_split"] as const;

const full: AttentionSetup = {
  name: "everything",
  heads: 4,
  kvHeads: 2,
  size: 32,
  kv: FORMATS.int8,
  capacity: 1100,
  most: [9, 1100],
  mask: "full",
  sinks: true,
  attrs: { causal: true, window: 1050, softcap: 20 },
};
const plain: AttentionSetup = {
  name: "plain",
  heads: 4,
  kvHeads: 2,
  size: 32,
  capacity: 1100,
  kv: FORMATS.int8,
  most: [9, 1100],
  attrs: { causal: true },
};
const rounded: AttentionSetup = { ...plain, name: "without a rounding" };

/** The worst error in units of the bound, and the words damaged, of a spoiled kernel. */
async function worst(
  id: string,
  named: AttentionCase,
  spoil: (wgsl: string) => string,
): Promise<{ ratio: number; damaged: number }> {
  const graph = sdpaGraph(named.setup);
  const node = graph.nodes[0] as Node<"sdpa">;
  const symbols = symbolsOf(named);
  const operands = operandsOf(graph, named);
  const inputs = node.inputs.map((input) => graph.values[input] as Value);
  const { value, bound } = sdpaBound(
    inputs.map(({ name }) => operands.get(name) as never),
    inputs.map(({ type }) => type),
    node.attrs,
    symbols,
  );
  const largest = { ...graph.symbols, T: named.tokens };
  expect(runner.unmet(id, graph, largest)).toBeNull();
  let changed = false;
  const { out, damaged } = await runner.run(id, graph, operands, symbols, largest, (wgsl) => {
    const spoiled = spoil(wgsl);
    changed ||= spoiled !== wgsl;
    return spoiled;
  });
  if (spoil !== same) expect(changed, "the fault was put in").toBe(true);
  let ratio = 0;
  for (const [i, x] of out.entries())
    ratio = Math.max(ratio, Math.abs(x - (value[i] as number)) / (bound[i] as number) || 0);
  return { ratio, damaged };
}
const same = (wgsl: string) => wgsl;
const swap = (from: string | RegExp, to: string) => (wgsl: string) =>
  wgsl.replaceAll(from instanceof RegExp ? new RegExp(from, "g") : from, to);

const at = (
  setup: AttentionSetup,
  tokens: number,
  keys: number,
  content: AttentionCase["content"] = "normal",
): AttentionCase => ({ setup, tokens, keys, content });

/** Each line of a kernel that matters, changed. */
const FAULTS: readonly (readonly [what: string, id: string, named: AttentionCase, spoil: (wgsl: string) => string])[] =
  [
    ["sees one key too many", PREFILL, at(plain, 9, 70), swap("j <= p)", "j <= p + 1u)")],
    ["sees one key too few", DECODE, at(plain, 2, 70), swap("min(p + 1u, seen_keys())", "min(p, seen_keys())")],
    ["a window one short", PREFILL, at(full, 9, 1095), swap("j + 1050u > p", "j + 1049u > p")],
    [
      "another head's keys",
      PREFILL,
      at(plain, 9, 70),
      swap("fn key_row(b: u32, h: u32, j: u32) -> u32 {", "fn key_row(b: u32, g: u32, j: u32) -> u32 { let h = 0u;"),
    ],
    [
      "query heads of a group mixed up",
      DECODE,
      at(plain, 2, 70),
      swap("query_vec(b, head_of(r, h)", "query_vec(b, head_of(r + 1u, h)"),
    ],
    ["old sums are not rescaled", PREFILL, at(plain, 9, 400, "dominating"), swap(/acc0_(\d) \*= factor;/, "")],
    [
      "the running sum is not rescaled",
      DECODE,
      at(plain, 2, 400, "dominating"),
      swap(/total(\d) = total\d \* factor \+ p/, "total$1 = total$1 + p"),
    ],
    [
      "splits are joined without their maxima",
      SPLIT,
      at(plain, 1, 1090),
      swap("let share = exp(parts[at].x - top)", "let share = 1.0"),
    ],
    ["the last split is lost", SPLIT, at(plain, 1, 1090), swap("s < splits", "s + 1u < splits")],
    ["sinks forgotten", PREFILL, at(full, 9, 90), swap(/if \(r0 \+ lid \/ 2u < rows\) \{ top = .*? \}/, "")],
    [
      "a sink counted in every thread",
      DECODE,
      at(full, 1, 90),
      swap("if (lid == 0u) { total0", "if (lid < 2u) { total0"),
    ],
    ["the mask forgotten", PREFILL, at(full, 9, 90), swap("s += bitcast<f32>(added);", "")],
    [
      "masked keys kept",
      DECODE,
      at(full, 1, 90),
      swap(/if \(added >= 0xf1800000u\) \{ return .*?; \}/, "if (added >= 0xf1800000u) { return s; }"),
    ],
    ["the soft-cap forgotten", PREFILL, at(full, 9, 90, "large"), swap(/s = 20\.0 \* sign.*?;/, "")],
    ["scales of keys forgotten", DECODE, at(plain, 1, 90), swap(/score(\d) \*= gain;/, "")],
    [
      "a tail of the head left out",
      PREFILL,
      at(plain, 9, 70),
      swap("for (var v = 0u; v < 8u; v++)", "for (var v = 0u; v < 7u; v++)"),
    ],
    [
      "the last key of a tile left out",
      PREFILL,
      at(plain, 9, 70),
      swap("for (var j = 0u; j < 32u; j++)", "for (var j = 0u; j < 31u; j++)"),
    ],
    [
      "probabilities in 12 bits",
      PREFILL,
      at(rounded, 9, 70),
      swap(
        "fn rounded(p: f32) -> f32 { return p; }",
        "fn rounded(p: f32) -> f32 { return round(p * 4096.0) / 4096.0; }",
      ),
    ],
    [
      "sums in float16",
      DECODE,
      at(rounded, 2, 200),
      swap(
        /(acc\d) \+= (weight[^;]*);/,
        "$1 = vec4<f32>(unpack2x16float(pack2x16float(($1 + $2).xy)), unpack2x16float(pack2x16float(($1 + $2).zw)));",
      ),
    ],
  ];

describe("a spoiled kernel fails", () => {
  test.each([PREFILL, DECODE, SPLIT])("%s as it is passes", async (id) => {
    for (const setup of [plain, full]) expect((await worst(id, at(setup, 1, 1090), same)).ratio).toBeLessThanOrEqual(1);
  });

  test.each(FAULTS)("%s (%s)", async (_, id, named, spoil) => {
    const { ratio } = await worst(id, named, spoil);
    expect(ratio).toBeGreaterThan(1);
  });

  test("a row written past the output changes a guard", async () => {
    const spoil = swap("if (r0 + tm * 4u + 3u < rows)", "if (r0 + tm * 4u + 3u < rows + 6u)");
    expect((await worst(PREFILL, at(plain, 9, 70), spoil)).damaged).toBeGreaterThan(0);
  });
});
