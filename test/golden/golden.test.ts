import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { type GoldenBackend, type GoldenResult, parseManifest, runGolden } from "../../src/validate/golden.js";
import { REFERENCE_GOLDEN } from "../../src/validate/golden-reference.js";

const read = async (name: string) => new Uint8Array(await readFile(new URL(`data/${name}`, import.meta.url)));
const manifest = parseManifest(JSON.parse(new TextDecoder().decode(await read("manifest.json"))));
const configs = [...new Set(manifest.cases.map((golden) => golden.config))];

async function run(backend: GoldenBackend, filter: (name: string, config: string) => boolean): Promise<GoldenResult[]> {
  const results: GoldenResult[] = [];
  const options = {
    manifest,
    readFile: read,
    backend,
    filter: (golden: { name: string; config: string }) => filter(golden.name, golden.config),
  };
  for await (const result of runGolden(options)) results.push(result);
  return results;
}

describe("golden cases of torchao on the reference", () => {
  test("the manifest has all 319 cases", () => {
    expect(manifest.cases).toHaveLength(319);
  });

  test.each(configs)("%s", async (config) => {
    const results = await run(REFERENCE_GOLDEN, (_name, of) => of === config);
    const wrong = results.filter(({ status }) => status !== "passed");
    expect(wrong.map((result) => `${result.case} ${result.status}: ${result.reason}`)).toEqual([]);
    expect(results).toHaveLength(manifest.cases.filter((golden) => golden.config === config).length);
  });

  test("every tensor with a tolerance was compared", async () => {
    const results = await run(REFERENCE_GOLDEN, () => true);
    for (const golden of manifest.cases) {
      const wanted = golden.tensors.filter(({ tolerance }) => tolerance.kind !== "info").map(({ name }) => name);
      const compared = results.find((result) => result.case === golden.name)?.checks.map(({ tensor }) => tensor);
      expect(new Set(compared), golden.name).toEqual(new Set(wanted));
    }
  });
});

describe("the harness", () => {
  const { primitives } = REFERENCE_GOLDEN;

  test("a wrong backend fails, by tensor name", async () => {
    const quantize: NonNullable<typeof primitives.quantize> = async (...args) => {
      const tensor = await (primitives.quantize as NonNullable<typeof primitives.quantize>)(...args);
      tensor.qdata[0] = (tensor.qdata[0] as number) ^ 1;
      return tensor;
    };
    const [result] = await run(
      { name: "wrong", primitives: { ...primitives, quantize } },
      (name) => name === "int8_wo_odd",
    );
    expect(result?.status).toBe("failed");
    expect(result?.reason).toContain("w.codes: 1 of 1632 differ");
  });

  test("what a backend lacks is unsupported, with the reason", async () => {
    const { linear: _linear, store: _store, ...rest } = primitives;
    const backend: GoldenBackend = { name: "partial", primitives: rest, lacks: { linear: "no kernel yet" } };
    const results = await run(backend, () => true);
    expect(results).toHaveLength(319);
    expect(results.filter(({ status }) => status === "failed")).toEqual([]);
    const reasons = new Map(results.map((result) => [result.case, result.reason]));
    expect(reasons.get("int8_wo_odd")).toBe("no kernel yet");
    expect(reasons.get("gptq_int8")).toBe("partial has no store");
    expect(reasons.get("formats_decode")).toBeNull();
  });

  test("a config that nobody knows is unsupported, with the nearest name", async () => {
    const golden = { ...manifest.cases[0], config: "number format" } as (typeof manifest.cases)[number];
    for await (const result of runGolden({
      manifest: { format: 1, cases: [golden] },
      readFile: read,
      backend: REFERENCE_GOLDEN,
    })) {
      expect(result).toMatchObject({ status: "unsupported", reason: expect.stringContaining("number formats") });
    }
  });

  test("a tensor that nobody computes fails the case", async () => {
    const [first] = manifest.cases.filter(({ name }) => name === "uintx_pack_3");
    const extra = { name: "shard9", dtype: "U8", shape: [5, 8], meaning: "", tolerance: { kind: "exact" } } as const;
    const golden = { ...first, tensors: [...(first?.tensors ?? []), extra] } as (typeof manifest.cases)[number];
    for await (const result of runGolden({
      manifest: { format: 1, cases: [golden] },
      readFile: read,
      backend: REFERENCE_GOLDEN,
    })) {
      expect(result).toMatchObject({ status: "failed", reason: "shard9: no result was given" });
    }
  });

  test("a manifest of another format is refused", () => {
    expect(() => parseManifest({ format: 2, cases: [] })).toThrow("its format is 2");
    expect(() => parseManifest({})).toThrow("no list of cases");
  });
});
