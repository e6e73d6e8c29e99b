import { type Block, type Codec, defineFormat, type Format, type Rule, withRule, withScale } from "./format.js";

const float = (
  exponent: number,
  mantissa: number,
  specials: "ieee" | "nan" | "none",
  bias = 2 ** (exponent - 1) - 1,
): Codec => ({ kind: "float", exponent, mantissa, bias, signed: true, specials }) as const;
const int = (bits: number): Codec => ({ kind: "int", bits, signed: true });
const uint = (bits: number): Codec => ({ kind: "int", bits, signed: false });

/** Codecs by name. Every number that fewbit stores is read by one of these or by a codec made the same way. */
export const CODECS = {
  f32: float(8, 23, "ieee"),
  f16: float(5, 10, "ieee"),
  bf16: float(8, 7, "ieee"),
  e4m3: float(4, 3, "nan"),
  e5m2: float(5, 2, "ieee"),
  e3m2: float(3, 2, "none"),
  e2m3: float(2, 3, "none"),
  e2m1: float(2, 1, "none"),
  e8m0: { kind: "exponent", bits: 8, bias: 127 },
  int8: int(8),
  uint8: uint(8),
} as const satisfies Record<string, Codec>;

const NF4 = [
  -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
  0.723, 1.0,
];

const ROW: Block = [1, "all"];
const TENSOR: Block = ["all", "all"];
const groups = (...sizes: number[]): Block[] => sizes.map((size) => [1, size] as const);
const GROUPS = groups(32, 64, 128, 256);
const EPS_F32 = 2 ** -23;

/** 3.2's integer range of `bits`-bit codes, as a rule. */
const affine = (
  codec: { bits: number; signed: boolean },
  mapping: Extract<Rule, { kind: "affine" }>["mapping"],
  eps: number | "normal" = "normal",
): Rule => {
  const min = codec.signed ? -(2 ** (codec.bits - 1)) : 0;
  return { kind: "affine", mapping, min, max: min + 2 ** codec.bits - 1, eps };
};

const unscaled = (codec: Codec, source: string, use: string) =>
  ({ element: codec, rule: { kind: "cast" }, source, use }) as const;
const float8 = (codec: Codec, use: string) => ({
  element: codec,
  scales: [{ codec: CODECS.f32, block: ROW }],
  rule: { kind: "amax", floor: 0, round: "before" } as const,
  blocks: [ROW, TENSOR, [1, 128] as const, [128, 128] as const, ...groups(32)],
  source: "OCP 8-bit floating point (OFP8); specification 5",
  use,
});
const mx = (codec: Codec, use: string) => ({
  element: codec,
  scales: [{ codec: CODECS.e8m0, block: [1, 32] as const }],
  rule: { kind: "mx", mode: "rceil" } as const,
  source: "OCP Microscaling Formats v1.0; specification 12",
  use,
});
const intx = (bits: number) => ({
  element: int(bits),
  scales: [{ codec: CODECS.bf16, block: ROW }],
  rule: affine({ bits, signed: true }, "symmetric"),
  blocks: [ROW, ...GROUPS],
  source: "specification 9",
  use: `Weights whose groups are centred on zero, at ${bits} bits; a row is quantized in groups when its channels differ.`,
});
// One signed bit has only the codes -1 and 0: symmetric rules cannot use them (specification 3.2), asymmetric can.
const intxAsymmetric = (bits: number) => ({
  ...intx(bits),
  zero: { domain: "int", codec: CODECS.int8 } as const,
  rule: affine({ bits, signed: true }, "asymmetric"),
  use: `Weights whose groups are not centred on zero, at ${bits} bit${bits === 1 ? "" : "s"}: every code lies inside the group's range.`,
});
const uintx = (bits: number) => ({
  element: uint(bits),
  scales: [{ codec: CODECS.bf16, block: [1, 64] as const }],
  zero: { domain: "int", codec: CODECS.uint8 } as const,
  rule: affine({ bits, signed: false }, "asymmetric"),
  blocks: [ROW, ...GROUPS],
  source: "specification 10",
  use: `Groupwise weights with unsigned ${bits}-bit codes, for kernels that unpack those.`,
});
const fpx = (codec: Codec, use: string) => ({
  element: codec,
  scales: [{ codec: CODECS.bf16, block: ROW }],
  rule: { kind: "amax", floor: 1e-12, round: "after" } as const,
  source: "Xia et al., FP6-LLM (2024); specification 11",
  use,
});
const codebook = (bits: number, vector: readonly [number, number], use: string) => ({
  element: { kind: "lut", bits, entries: "learned", vector } as const,
  scales: [{ codec: CODECS.f32, block: ROW }],
  rule: { kind: "codebook", iterations: 200 } as const,
  blocks: [ROW, ...groups(32, 64)],
  source: "specification 16",
  use,
});

/**
 * ONE ROW PER FORMAT. A row drives the TypeScript codec, the WGSL decode and encode functions, the C++ header, the test
 * matrix and the README's support table; nothing else is edited to add one.
 */
const ROWS = {
  f32: unscaled(
    CODECS.f32,
    "IEEE 754 binary32",
    "The exact values: references, small tensors, and what everything else is compared with.",
  ),
  f16: unscaled(
    CODECS.f16,
    "IEEE 754 binary16",
    "Weights and caches at half the size, where no magnitude exceeds 65504.",
  ),
  bf16: unscaled(
    CODECS.bf16,
    "bfloat16",
    "Checkpoints as they are published: float32's range at half the size, 8 significant bits.",
  ),

  float8_e4m3: float8(
    CODECS.e4m3,
    "Weights and activations at 8 bits on hardware with float8 matrix units; little loss, no calibration.",
  ),
  float8_e5m2: float8(CODECS.e5m2, "Gradients and caches whose range matters more than their precision."),

  int8: {
    element: CODECS.int8,
    scales: [{ codec: CODECS.f32, block: ROW }],
    rule: affine({ bits: 8, signed: true }, "symmetric", EPS_F32),
    blocks: [ROW, TENSOR, ...GROUPS],
    source: "specification 6",
    use: "Weights and activations for exact integer matrix products; the safest integer format.",
  },
  int8_asymmetric: {
    element: CODECS.int8,
    scales: [{ codec: CODECS.f32, block: ROW }],
    zero: { domain: "int", codec: CODECS.int8 },
    rule: affine({ bits: 8, signed: true }, "asymmetric", EPS_F32),
    blocks: [ROW, TENSOR],
    source: "specification 6.3",
    use: "Activations that lie mostly on one side of zero, one scale and zero point per token.",
  },

  int4_tinygemm: {
    element: uint(4),
    scales: [{ codec: CODECS.bf16, block: [1, 64] }],
    zero: { domain: "float", codec: CODECS.bf16 },
    rule: affine({ bits: 4, signed: false }, "asymmetric"),
    blocks: GROUPS,
    source: "specification 3.5 and 7.2",
    use: "4-bit weights of tinygemm checkpoints (tile-packed), the zero point in the units of the weights.",
  },
  int4_plain: {
    element: int(4),
    scales: [{ codec: CODECS.bf16, block: [1, 128] }],
    zero: { domain: "float", codec: CODECS.bf16 },
    rule: { kind: "mslk_int4", symmetric: false },
    blocks: GROUPS,
    source: "specification 7.1",
    use: "4-bit weights of torchao's default int4 configuration; the place to start for language models.",
  },
  int4_symmetric: {
    element: int(4),
    scales: [{ codec: CODECS.bf16, block: [1, 128] }],
    rule: { kind: "mslk_int4", symmetric: true },
    blocks: GROUPS,
    source: "specification 7.5",
    use: "4-bit weights beside float8 activations, no zero point to subtract.",
  },
  int4_preshuffled: {
    element: int(4),
    scales: [
      { codec: CODECS.e4m3, block: [1, 128] },
      { codec: CODECS.f32, block: ROW },
    ],
    rule: { kind: "mslk_int4", symmetric: true },
    blocks: GROUPS,
    source: "specification 7.5, preshuffled",
    use: "4-bit weights beside float8 activations with one-byte group scales: float8 kernels need no other type.",
  },
  int4_int_zero: {
    element: uint(4),
    scales: [{ codec: CODECS.bf16, block: [1, 64] }],
    zero: { domain: "int", codec: CODECS.uint8 },
    rule: affine({ bits: 4, signed: false }, "asymmetric", 1e-6),
    blocks: GROUPS,
    source: "specification 7.4",
    use: "4-bit weights with an integer zero point: exact integer products, and zero is exactly a code.",
  },
  int4_hqq: {
    element: uint(4),
    scales: [{ codec: CODECS.f16, block: [1, 64] }],
    zero: { domain: "int", codec: CODECS.f16 },
    rule: { kind: "hqq" },
    blocks: GROUPS,
    source: "Badri and Shaji, Half-Quadratic Quantization (2023); specification 8 and 10.1",
    use: "4-bit weights where a search over the zero point is worth the time: better than rounding, without data.",
  },

  int4_sinq: {
    element: int(4),
    scales: [
      { codec: CODECS.f32, block: [1, 64] },
      { codec: CODECS.f32, block: ["all", 1] },
    ],
    rule: { kind: "sinq", min: -8, max: 7, iterations: 20 },
    blocks: GROUPS,
    source: "specification 8, SINQ",
    use: "4-bit weights with outliers in few columns: scales per column take them out of the groups.",
  },

  int1: intxAsymmetric(1),
  int2: intx(2),
  int3: intx(3),
  int4: intx(4),
  int5: intx(5),
  int6: intx(6),
  int7: intx(7),
  intx8: intx(8),
  int2_asymmetric: intxAsymmetric(2),
  int3_asymmetric: intxAsymmetric(3),
  int4_asymmetric: intxAsymmetric(4),
  int5_asymmetric: intxAsymmetric(5),
  int6_asymmetric: intxAsymmetric(6),
  int7_asymmetric: intxAsymmetric(7),
  intx8_asymmetric: intxAsymmetric(8),

  uint1: uintx(1),
  uint2: uintx(2),
  uint3: uintx(3),
  uint4: uintx(4),
  uint5: uintx(5),
  uint6: uintx(6),
  uint7: uintx(7),
  uint8: uintx(8),

  fp6_e3m2: fpx(CODECS.e3m2, "Weights at 6 bits, nearly the quality of 8; the wider range of the two 6-bit floats."),
  fp6_e2m3: fpx(CODECS.e2m3, "Weights at 6 bits with few outliers; the finer of the two 6-bit floats."),
  fp5_e2m2: fpx(float(2, 2, "none"), "Weights at 5 bits, between fp6 and int4; the finer one."),
  fp5_e3m1: fpx(float(3, 1, "none"), "Weights at 5 bits, between fp6 and int4; the wider one."),
  fp4_e2m1: fpx(CODECS.e2m1, "Weights at 4 bits with one scale per row: a baseline for the block formats."),

  mxfp8_e4m3: mx(
    CODECS.e4m3,
    "Weights and activations at 8 bits with a power-of-two scale per 32; outliers cost only their block.",
  ),
  mxfp8_e5m2: mx(CODECS.e5m2, "As mxfp8_e4m3 for values with a very wide range, such as gradients."),
  mxfp6_e3m2: mx(CODECS.e3m2, "Weights at 6.25 bits per element, the wider 6-bit float."),
  mxfp6_e2m3: mx(CODECS.e2m3, "Weights at 6.25 bits per element, the finer 6-bit float."),
  mxfp4: mx(CODECS.e2m1, "Weights and activations at 4.25 bits, the format of models that are published in MXFP4."),

  nvfp4: {
    element: CODECS.e2m1,
    scales: [
      { codec: CODECS.e4m3, block: [1, 16] },
      { codec: CODECS.f32, block: TENSOR },
    ],
    rule: { kind: "nvfp4", variant: "divide" },
    source: "NVIDIA NVFP4; specification 13",
    use: "Weights and activations at 4.5 bits: finer blocks and scales than mxfp4, and so the better 4-bit float.",
  },
  nvfp4_single: {
    element: CODECS.e2m1,
    scales: [{ codec: CODECS.e4m3, block: [1, 16] }],
    rule: { kind: "nvfp4", variant: "divide" },
    source: "specification 13.1, single level",
    use: "As nvfp4 without a scale for the tensor: when it is not known before the first block is written.",
  },

  nf4: {
    element: { kind: "lut", bits: 4, entries: NF4, vector: [1, 1] },
    scales: [{ codec: CODECS.f32, block: [1, 64] }],
    rule: { kind: "nf4", scalers: 256 },
    blocks: groups(32, 64),
    source: "Dettmers et al., QLoRA (2023); specification 15",
    use: "4-bit weights with normally distributed values: the codes are quantiles; used under LoRA adapters.",
  },
  codebook4: codebook(4, [1, 1], "4-bit weights of any distribution: the table is learned, decoding is one lookup."),
  codebook8: codebook(8, [1, 1], "8-bit weights of any distribution, from a learned table."),
  codebook4_1x2: codebook(4, [1, 2], "2-bit weights: one code for two neighbours, from a learned table of pairs."),
  codebook8_1x4: codebook(8, [1, 4], "2-bit weights: one code for four neighbours, from a learned table of vectors."),
} as const satisfies Record<string, Parameters<typeof defineFormat>[1] & { use: string }>;

/** The names of the table's rows. */
export type FormatName = keyof typeof ROWS;

/** Every format, by name, completed and proved consistent. */
export const FORMATS = Object.fromEntries(
  Object.entries(ROWS).map(([name, row]) => [name, defineFormat(name, row)]),
) as unknown as Readonly<Record<FormatName, Format>>;

/** Rows with another rule that several places name: what they mean is the row, how they are made differs. */
export const VARIANTS = {
  /** 5.2: MSLK's activations, amax floored at 1/512 and a float32 scale. */
  float8_mslk: withRule(FORMATS.float8_e4m3, "mslk", { rule: { kind: "amax", floor: 1 / 512, round: "after" } }),
  /** 9.2: activations of 8daNw, eps the dtype's smallest normal number. */
  int8_intx: withRule(FORMATS.int8_asymmetric, "intx", { rule: affine({ bits: 8, signed: true }, "asymmetric") }),
  /** 19: a KV cache's int8, one scale a token and head, codes in [-127, 127]. */
  int8_kv: withRule(FORMATS.int8, "kv", {
    rule: { kind: "affine", mapping: "symmetric", min: -127, max: 127, eps: 1e-5 },
  }),
  /** A KV cache's int4: 3.2 asymmetric in groups of 32 along the head, a bf16 scale and a byte of zero point each. */
  int4_kv: withScale(FORMATS.uint4, { block: [1, 32] }),
} as const;
