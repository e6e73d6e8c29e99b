import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { type Format, formatKey } from "../../src/formats/format.js";
import * as configs from "../../src/quantize/configs.js";
import { configFor, type LayerWeight, type QuantizeConfig } from "../../src/quantize/configs.js";
import { listQuantizeNames, parseQuantizeName } from "../../src/quantize/names.js";

const layer: LayerWeight = { shape: [256, 512], dtype: "bf16" };
const formatOf = (config: QuantizeConfig | null, of: LayerWeight = layer): Format => {
  const made = config?.weight(of);
  if (made === undefined || "refused" in made) throw new Error(made?.refused ?? "no config");
  return made;
};
const refusal = (config: QuantizeConfig, of: LayerWeight): string => {
  const made = config.weight(of);
  return "refused" in made ? made.refused : `taken as ${formatKey(made)}`;
};

describe("names", () => {
  test("every listed name is a config that takes an ordinary layer", () => {
    const names = listQuantizeNames();
    expect(new Set(names).size).toBe(names.length);
    for (const name of names) {
      const config = parseQuantizeName(name);
      if (name === "none") expect(config).toBeNull();
      else expect(formatKey(formatOf(config)), name).toBeTruthy();
    }
  });

  test("the names of the evaluation page are all there", () => {
    const evaluated =
      "none int8wo int8wo-tensor int8wo-32 int8dq int8dq-asym int8dq-tensor int4wo-32 int4wo-256 int4wo-64-hqq int4wo-64-plain intx3wo-64 " +
      "intx4wo-row intx4wo-64-asym intx4wo-64-nce intx4wo-64-hqq 8da4w-32 8da8w float8wo float8wo-tensor float8dq-row float8dq-tensor " +
      "float8-int4-128 mxfp8 mxfp4 mxfp6-e3m2 mxfp6-e2m3 mxfp8wo mxfp6-e3m2wo nvfp4wo nvfp4dq uint4wo-64 uint8wo uint4dq-64 fp6wo " +
      "fpx-e2m3wo nf4-64 codebook-4-64";
    const names = listQuantizeNames();
    expect(evaluated.split(" ").filter((name) => !names.includes(name))).toEqual([]);
  });

  test.each([
    ["int8wo", "int8[1xall:f32]", null],
    ["int8wo-tensor", "int8[allxall:f32]", null],
    ["int4wo-64", "int4_tinygemm~eps[1x64:bf16;zfloat:bf16]", null],
    ["int4wo-64-hqq", "int4_tinygemm~hqq[1x64:bf16;zfloat:bf16]", null],
    ["int4wo-128-plain", "int4_plain[1x128:bf16;zfloat:bf16]", null],
    ["intx4wo-64-asym", "int4_asymmetric[1x64:bf16;zint:int8]", null],
    ["8da4w-32", "int4[1x32:bf16]", "int8_asymmetric~intx[1xall:f32;zint:int8]"],
    ["int8dq-asym", "int8[1xall:f32]", "int8_asymmetric[1xall:f32;zint:int8]"],
    ["float8dq-block", "float8_e4m3[128x128:f32]", "float8_e4m3[1x128:f32]"],
    ["float8-int4-128", "int4_preshuffled[1x128:e4m3;1xall:f32]", "float8_e4m3~mslk[1xall:f32]"],
    ["mxfp4", "mxfp4[1x32:e8m0]", "mxfp4[1x32:e8m0]"],
    ["nvfp4dq", "nvfp4[1x16:e4m3;allxall:f32]", "nvfp4[1x16:e4m3;allxall:f32]"],
    ["uint4wo-64", "int4_hqq[1x64:f16;zint:f16]", null],
    ["codebook-4-64", "codebook4[1x64:bf16]", null],
  ])("%s is %s with activation %s", (name, weight, activation) => {
    const config = parseQuantizeName(name);
    expect(formatKey(formatOf(config))).toBe(weight);
    expect(config?.activation ? formatKey(config.activation) : null).toBe(activation);
  });

  test("parameters beyond the list", () => {
    expect(formatKey(formatOf(parseQuantizeName("int8wo-16")))).toBe("int8[1x16:f32]");
    expect(formatKey(formatOf(parseQuantizeName("fpx-e4m2wo")))).toBe("fp7_e4m2[1xall:bf16]");
  });

  test("an unknown name lists the nearest, a number that is not legal the nearest legal", () => {
    expect(() => parseQuantizeName("int4w0-64")).toThrow(/unknown quantization "int4w0-64": did you mean .*int4wo-64/);
    expect(() => parseQuantizeName("int4wo-48")).toThrow(
      /groupSize is 48: expected one of 32, 64, 128, 256 \(nearest: (32|64)\)/,
    );
    expect(() => parseQuantizeName("intx9wo-64")).toThrow(/nearest: int\d/);
    expect(() => parseQuantizeName("int8wo-0")).toThrow(/groupSize is 0: expected a positive integer/);
  });
});

describe("scales follow the weight's dtype where torchao keeps them in it", () => {
  test.each([
    ["int4wo-64", "int4_tinygemm~eps[1x64:f32;zfloat:f32]"],
    ["intx4wo-row", "int4[1xall:f32]"],
    ["int8wo", "int8[1xall:f32]"],
    ["nf4-64", "nf4[1x64:f32]"],
  ])("%s", (name, key) => {
    expect(formatKey(formatOf(parseQuantizeName(name), { shape: [256, 512], dtype: "f32" }))).toBe(key);
  });

  test("nf4's table is rounded to it", () => {
    const entries = (dtype: LayerWeight["dtype"]) => {
      const { element } = formatOf(parseQuantizeName("nf4-64"), { shape: [256, 512], dtype });
      return element.kind === "lut" && element.entries !== "learned" ? element.entries[1] : undefined;
    };
    expect(entries("bf16")).toBe(-0.6953125);
    expect(entries("f32")).toBe(-0.6962);
  });
});

describe("layers that a config cannot take", () => {
  const odd: LayerWeight = { shape: [250, 500], dtype: "bf16" };
  const single: LayerWeight = { shape: [256, 512], dtype: "f32" };
  const name = (text: string) => parseQuantizeName(text) as QuantizeConfig;

  test.each([
    ["float8dq-tensor", odd, "N = 250 is not a multiple of 16 (nearest legal N: 256)"],
    ["float8dq-row", single, "its weight is f32: only bf16 can be taken (nearest legal: bf16)"],
    ["int4wo-64", odd, "K = 500 is not a multiple of 64 (nearest legal K: 512)"],
    ["int8wo-32", odd, "K = 500 is not a multiple of 32 (nearest legal K: 512)"],
    ["mxfp8", odd, "K = 500 is not a multiple of 32 (nearest legal K: 512)"],
    ["mxfp8", single, "its weight is f32: only bf16 can be taken (nearest legal: bf16)"],
    ["nvfp4wo", odd, "N = 250 is not a multiple of 16 (nearest legal N: 256)"],
    ["uint4wo-64", single, "its weight is f32: only f16 and bf16 can be taken (nearest legal: f16)"],
    ["fp6wo", odd, "N = 250 is not a multiple of 64 (nearest legal N: 256)"],
    [
      "nf4-64",
      { shape: [3, 64], dtype: "bf16" },
      "its 3 blocks are not a multiple of scalerBlockSize = 256 (nearest legal scalerBlockSize: 3)",
    ],
    [
      "codebook-4-64",
      { shape: [2 ** 14, 2 ** 14], dtype: "bf16" },
      "it has 268435456 elements (at most 134217728 are clustered)",
    ],
  ] as const)("%s: %o", (text, of, reason) => {
    expect(refusal(name(text), of)).toBe(reason);
  });
});

describe("arguments", () => {
  test("illegal ones name the nearest legal value", () => {
    expect(() => configs.int4WeightOnly({ groupSize: 100 })).toThrow(
      /Int4WeightOnlyConfig.groupSize is 100.*nearest: (64|128)/,
    );
    expect(() => configs.int8WeightOnly({ granularity: configs.perBlock([128, 128]) })).toThrow(
      /granularity is "block": expected one of row, tensor, group/,
    );
    expect(() =>
      configs.float8DynamicActivationFloat8Weight({ granularity: [configs.perRow(), configs.perTensor()] }),
    ).toThrow(/1xall with allxall/);
    expect(() => configs.int4WeightOnly({ int4ChooseQparamsAlgorithm: "hqq" })).toThrow(
      expect.objectContaining({ code: "quantize/unsupported" }),
    );
    expect(() => configs.mxDynamicActivationMxWeight({ activationDtype: "float8_e5m2" })).toThrow(
      /expected one of float8_e4m3fn/,
    );
    expect(() => configs.uintxWeightOnly({ bitWidth: 5 })).toThrow(
      /bitWidth is 5: expected one of 4, 8 \(nearest: 4\)/,
    );
    expect(() => configs.uintxWeightOnly({ bitWidth: 8, groupSize: 64 })).toThrow(
      /groupSize is 64: expected one of null/,
    );
    expect(() => configs.fpxWeightOnly(6, 1)).toThrow(/ebits is 6/);
    expect(() => configs.codebookWeightOnly({ blockSize: [0, 1] })).toThrow(/two positive integers/);
    expect(() => configs.intxWeightOnly({ weightDtype: "int1", intxChooseQparamsAlgorithm: "hqq_scale_only" })).toThrow(
      /nearest legal: int2/,
    );
  });

  test("one symmetric bit is asymmetric unless torchao's literal numerics are asked for", () => {
    const guarded = configs.intxWeightOnly({ weightDtype: "int1" });
    expect(formatOf(guarded)).toMatchObject({ rule: { mapping: "asymmetric" }, zero: { domain: "int" } });
    const literal = configs.intxWeightOnly({ weightDtype: "int1", numerics: "torchao" });
    expect(formatOf(literal)).toMatchObject({ rule: { mapping: "symmetric" }, zero: { domain: "none" } });
  });

  test("defaults are torchao's", async () => {
    type Stored = { configs: { _type: string; _data: Record<string, unknown> }[] };
    const url = new URL("../golden/data/configs.json", import.meta.url);
    const stored = JSON.parse(await readFile(url, "utf8")) as Stored;
    const makers: Record<string, () => QuantizeConfig> = {
      Int4WeightOnlyConfig: configs.int4WeightOnly,
      Int8WeightOnlyConfig: configs.int8WeightOnly,
      Int8DynamicActivationInt8WeightConfig: configs.int8DynamicActivationInt8Weight,
      Int8DynamicActivationIntxWeightConfig: configs.int8DynamicActivationIntxWeight,
      IntxWeightOnlyConfig: configs.intxWeightOnly,
      Float8WeightOnlyConfig: configs.float8WeightOnly,
      Float8DynamicActivationFloat8WeightConfig: configs.float8DynamicActivationFloat8Weight,
      Float8DynamicActivationInt4WeightConfig: configs.float8DynamicActivationInt4Weight,
      MXDynamicActivationMXWeightConfig: configs.mxDynamicActivationMxWeight,
      NVFP4DynamicActivationNVFP4WeightConfig: configs.nvfp4DynamicActivationNvfp4Weight,
      NVFP4WeightOnlyConfig: configs.nvfp4WeightOnly,
      UIntxWeightOnlyConfig: configs.uintxWeightOnly,
      Int8DynamicActivationUIntxWeightConfig: configs.int8DynamicActivationUintxWeight,
      Int8DynamicActivationInt4WeightConfig: configs.int8DynamicActivationInt4Weight,
      PrototypeInt4WeightOnlyConfig: configs.prototypeInt4WeightOnly,
    };
    const seen = new Set<string>();
    for (const { _type, _data } of stored.configs) {
      const maker = makers[_type];
      // The file holds some classes twice: their defaults come first.
      if (maker === undefined || seen.has(_type)) continue;
      seen.add(_type);
      const { name, args } = maker();
      expect(name).toBe(_type);
      for (const [key, value] of Object.entries(_data)) {
        const camel = key.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase());
        if (camel in args) expect(plain(args[camel]), `${_type}.${camel}`).toBe(plain(value));
      }
    }
    expect(seen.size).toBe(Object.keys(makers).length);
  });
});

/** Arguments as short lower-case text: enums and dtypes by name, granularities by class. */
function plain(value: unknown): string {
  if (Array.isArray(value)) return plain(value[0]);
  if (typeof value === "object" && value !== null) {
    if ("kind" in value)
      return configs
        .granularityName(value as configs.Granularity)
        .toLowerCase()
        .replace(/\(.*/, "");
    const stored = value as { _type: string; _data: unknown };
    return stored._type.startsWith("Per") ? stored._type.toLowerCase() : plain(stored._data);
  }
  return String(value).toLowerCase();
}

describe("configFor", () => {
  const [a, b, c, d] = ["int8wo", "int4wo-64", "float8wo", "mxfp8"].map((name) => parseQuantizeName(name)) as [
    QuantizeConfig,
    QuantizeConfig,
    QuantizeConfig,
    QuantizeConfig,
  ];
  const q = "model.layers.0.self_attn.q_proj";

  test("one config, with and without a filter", () => {
    expect(configFor(q, a)).toBe(a);
    expect(configFor(q, null)).toBeNull();
    expect(configFor(q, a, (name) => name.endsWith("k_proj"))).toBeNull();
  });

  test("parameter name, module name, patterns in order, default", () => {
    const map = new Map<string, QuantizeConfig | null>([
      ["re:.*q_proj", c],
      ["re:.*self_attn.*", d],
      [q, b],
      [`${q}.weight`, a],
      ["lm_head", null],
      ["_default", d],
    ]);
    expect(configFor(q, map)).toBe(a);
    map.delete(`${q}.weight`);
    expect(configFor(q, map)).toBe(b);
    map.delete(q);
    // "re:.*q_proj" does not match the whole parameter name, "re:.*self_attn.*" does.
    expect(configFor(q, map)).toBe(d);
    map.delete("re:.*self_attn.*");
    expect(configFor(q, map)).toBe(c);
    expect(configFor("lm_head", map)).toBeNull();
    expect(configFor("other", map)).toBe(d);
    map.delete("_default");
    expect(configFor("other", map)).toBeNull();
  });

  test("a filter beside a map, and a pattern that is none, are refused", () => {
    expect(() => configFor(q, new Map(), () => true)).toThrow(expect.objectContaining({ code: "argument/invalid" }));
    expect(() => configFor(q, new Map([["re:(", a]]))).toThrow(/pattern is "re:\("/);
  });
});
