import { FewbitError, nearestNames } from "../core/errors.js";
import {
  codebookWeightOnly,
  float8DynamicActivationFloat8Weight,
  float8DynamicActivationInt4Weight,
  float8WeightOnly,
  fpxWeightOnly,
  int4WeightOnly,
  int8DynamicActivationInt8Weight,
  int8DynamicActivationIntxWeight,
  int8DynamicActivationUintxWeight,
  int8WeightOnly,
  intxWeightOnly,
  type MxType,
  mxDynamicActivationMxWeight,
  mxWeightOnly,
  nf4WeightOnly,
  nvfp4DynamicActivationNvfp4Weight,
  nvfp4WeightOnly,
  perAxis,
  perBlock,
  perGroup,
  perRow,
  perTensor,
  prototypeInt4WeightOnly,
  type QuantizeConfig,
  uintxWeightOnly,
} from "./configs.js";

type Bits = 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8;

/** A family of names: `{N}` stands for a number in the template, and the examples are what a list shows. */
interface NameRow {
  readonly template: string;
  readonly examples?: readonly (readonly number[])[];
  readonly make: (...numbers: number[]) => QuantizeConfig | null;
}

const GROUPS = [[32], [64], [128], [256]];
const intx = (b: number) => `int${b}` as `int${Bits}`;
const grid = (bits: readonly number[], groups: readonly number[]) => bits.flatMap((b) => groups.map((g) => [b, g]));
const ALL_BITS = [1, 2, 3, 4, 5, 6, 7, 8];

const mxRows = (template: string, type: MxType): NameRow[] => [
  { template, make: () => mxDynamicActivationMxWeight({ activationDtype: type, weightDtype: type }) },
  { template: `${template}wo`, make: () => mxWeightOnly({ weightDtype: type }) },
];

/** Every short name, in the order of torchao's table. */
const ROWS: readonly NameRow[] = [
  { template: "none", make: () => null },
  { template: "int8wo", make: () => int8WeightOnly() },
  { template: "int8wo-tensor", make: () => int8WeightOnly({ granularity: perTensor() }) },
  { template: "int8wo-{N}", examples: GROUPS, make: (g) => int8WeightOnly({ granularity: perGroup(g as number) }) },
  { template: "int8dq", make: () => int8DynamicActivationInt8Weight() },
  { template: "int8dq-asym", make: () => int8DynamicActivationInt8Weight({ actMappingType: "asymmetric" }) },
  { template: "int8dq-tensor", make: () => int8DynamicActivationInt8Weight({ granularity: perTensor() }) },
  { template: "int4wo-{N}", examples: GROUPS, make: (g) => prototypeInt4WeightOnly({ groupSize: g as number }) },
  {
    template: "int4wo-{N}-hqq",
    examples: GROUPS,
    make: (g) => prototypeInt4WeightOnly({ groupSize: g as number, int4ChooseQparamsAlgorithm: "hqq" }),
  },
  { template: "int4wo-{N}-plain", examples: GROUPS, make: (g) => int4WeightOnly({ groupSize: g as number }) },
  {
    template: "intx{N}wo-{N}",
    examples: grid(ALL_BITS, [32, 64, 128, 256]),
    make: (b, g) => intxWeightOnly({ weightDtype: intx(b as number), granularity: perGroup(g as number) }),
  },
  {
    template: "intx{N}wo-row",
    examples: ALL_BITS.map((b) => [b]),
    make: (b) => intxWeightOnly({ weightDtype: intx(b as number), granularity: perAxis(0) }),
  },
  ...(["asym", "nce", "hqq"] as const).flatMap((suffix): NameRow[] => {
    const variant = {
      asym: { mappingType: "asymmetric" },
      nce: { mappingType: "symmetric_no_clipping_err" },
      hqq: { intxChooseQparamsAlgorithm: "hqq_scale_only" },
    } as const;
    const bits = suffix === "hqq" ? ALL_BITS.slice(1) : ALL_BITS;
    return [
      {
        template: `intx{N}wo-{N}-${suffix}`,
        examples: grid(bits, [64]),
        make: (b, g) =>
          intxWeightOnly({ weightDtype: intx(b as number), granularity: perGroup(g as number), ...variant[suffix] }),
      },
      {
        template: `intx{N}wo-row-${suffix}`,
        examples: bits.map((b) => [b]),
        make: (b) => intxWeightOnly({ weightDtype: intx(b as number), granularity: perAxis(0), ...variant[suffix] }),
      },
    ];
  }),
  {
    template: "8da8w",
    make: () => int8DynamicActivationIntxWeight({ weightDtype: "int8", weightGranularity: perAxis(0) }),
  },
  {
    template: "8da{N}w-{N}",
    examples: grid(ALL_BITS, [32, 64, 128, 256]),
    make: (b, g) =>
      int8DynamicActivationIntxWeight({ weightDtype: intx(b as number), weightGranularity: perGroup(g as number) }),
  },
  { template: "float8wo", make: () => float8WeightOnly() },
  { template: "float8wo-tensor", make: () => float8WeightOnly({ granularity: perTensor() }) },
  { template: "float8wo-{N}", examples: GROUPS, make: (g) => float8WeightOnly({ granularity: perGroup(g as number) }) },
  { template: "float8dq-row", make: () => float8DynamicActivationFloat8Weight({ granularity: perRow() }) },
  { template: "float8dq-tensor", make: () => float8DynamicActivationFloat8Weight() },
  {
    template: "float8dq-block",
    make: () => float8DynamicActivationFloat8Weight({ granularity: [perBlock([1, 128]), perBlock([128, 128])] }),
  },
  { template: "float8-int4-128", make: () => float8DynamicActivationInt4Weight() },
  ...mxRows("mxfp8", "float8_e4m3fn"),
  ...mxRows("mxfp8-e5m2", "float8_e5m2"),
  ...mxRows("mxfp6-e3m2", "fp6_e3m2"),
  ...mxRows("mxfp6-e2m3", "fp6_e2m3"),
  ...mxRows("mxfp4", "float4_e2m1fn_x2"),
  { template: "nvfp4wo", make: () => nvfp4WeightOnly() },
  { template: "nvfp4dq", make: () => nvfp4DynamicActivationNvfp4Weight({ useTritonKernel: false }) },
  { template: "uint4wo-{N}", examples: GROUPS, make: (g) => uintxWeightOnly({ groupSize: g as number }) },
  { template: "uint8wo", make: () => uintxWeightOnly({ bitWidth: 8 }) },
  {
    template: "uint4dq-{N}",
    examples: GROUPS,
    make: (g) => int8DynamicActivationUintxWeight({ groupSize: g as number }),
  },
  { template: "uint8dq", make: () => int8DynamicActivationUintxWeight({ bitWidth: 8 }) },
  { template: "fp6wo", make: () => fpxWeightOnly(3, 2) },
  {
    template: "fpx-e{N}m{N}wo",
    examples: [
      [3, 2],
      [2, 3],
      [2, 2],
      [3, 1],
      [2, 1],
    ],
    make: (e, m) => fpxWeightOnly(e as number, m as number),
  },
  { template: "nf4-{N}", examples: [[32], [64]], make: (block) => nf4WeightOnly({ blockSize: block as number }) },
  {
    template: "codebook-{N}-{N}",
    examples: grid([2, 3, 4, 8], [64]),
    make: (b, block) => codebookWeightOnly({ dtype: `uint${b as number}`, scaleBlockSize: block as number }),
  },
];

const PATTERNS = ROWS.map((row) => ({ row, pattern: new RegExp(`^${row.template.replaceAll("{N}", "(\\d+)")}$`) }));

/** Every short name; of a parametrised family its usual members. */
export function listQuantizeNames(): string[] {
  return ROWS.flatMap(({ template, examples = [[]] }) =>
    examples.map((numbers) => numbers.reduce<string>((name, n) => name.replace("{N}", String(n)), template)),
  );
}

/** The names of an accuracy table: `none`, then every family with the sizes that people use, widest first. */
export const ACCURACY_NAMES: readonly string[] = [
  "none",
  ...["int8wo", "int8wo-tensor", "int8wo-32", "int8wo-64", "int8wo-128", "int8dq", "int8dq-asym", "int8dq-tensor"],
  ...["uint8wo", "uint8dq", "8da8w", "intx8wo-row", "intx8wo-64", "intx7wo-64", "intx6wo-64", "intx5wo-64"],
  ...["float8wo", "float8wo-tensor", "float8dq-row", "float8dq-tensor", "mxfp8wo", "mxfp8"],
  ...["mxfp6-e2m3wo", "mxfp6-e2m3", "mxfp6-e3m2wo", "mxfp6-e3m2", "fp6wo", "fpx-e2m3wo"],
  ...["int4wo-32", "int4wo-64", "int4wo-128", "int4wo-256", "int4wo-64-plain"],
  ...["int4wo-32-hqq", "int4wo-64-hqq", "int4wo-128-hqq", "int4wo-256-hqq", "uint4wo-64", "uint4dq-64"],
  ...["intx4wo-32", "intx4wo-64", "intx4wo-128", "intx4wo-256", "intx4wo-row"],
  ...["intx4wo-64-asym", "intx4wo-64-nce", "intx4wo-64-hqq", "8da4w-32", "8da4w-64", "8da4w-128", "8da4w-256"],
  ...["float8-int4-128", "nvfp4wo", "nvfp4dq", "mxfp4wo", "mxfp4", "nf4-64", "codebook-4-64"],
  ...["intx3wo-64", "intx3wo-row", "intx2wo-64"],
];

/**
 * The config of a short name such as `int4wo-64` (the names of the CLI's `--quantize`); null for `none`. Throws
 * `argument/unknown-name` with the nearest names, and `argument/invalid` for a number that the family cannot take.
 */
export function parseQuantizeName(name: string): QuantizeConfig | null {
  for (const { row, pattern } of PATTERNS) {
    const match = pattern.exec(name);
    if (match !== null) return row.make(...match.slice(1).map(Number));
  }
  throw new FewbitError("argument/unknown-name", {
    kind: "quantization",
    name,
    nearest: nearestNames(name, listQuantizeNames()),
  });
}
