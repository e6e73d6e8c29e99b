import { roundUp } from "../../../core/shape.js";
import { type Codec, codecBits, codecName, extentOf, type Format, type ScaleLevel } from "../../../formats/format.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";
import type { Capabilities } from "../../backend.js";
import { linearStep } from "../../linear-step.js";
import { TRIALS } from "../capabilities.js";
import { type Entry, type NativeKernel, scratch } from "../kernel.js";
import {
  exactProduct,
  formatsOf,
  isInteger,
  isSeparable,
  isSigned8,
  LinearArguments,
  partsOf,
  scaleRun,
  significantBits,
  stepObstacle,
  unscaled,
} from "./linear-arguments.js";
import { needsFeature } from "./sdpa-step.js";

const GEMM: Entry = { name: "linear/gemm", abi: 3 };
const WGMMA: Entry = { name: "linear/wgmma", abi: 2 };
const BLOCKSCALED: Entry = { name: "linear/blockscaled", abi: 1 };

/** What the tensor cores multiply, in the order of `Carrier` in gemm.cu. */
const CARRIERS = ["stored", "bf16", "f16", "s8", "blocks"] as const;

/** How a step becomes products of carriers: how many of them make an element, and whether they hold its scales. */
interface Plan {
  readonly carrier: (typeof CARRIERS)[number];
  readonly xParts: number;
  readonly wParts: number;
  readonly scaledX: boolean;
  readonly scaledW: boolean;
}

const isFloat8 = (codec: Codec) => codec.kind === "float" && ["e4m3", "e5m2"].includes(codecName(codec));

/** Both operands as they lie in memory, scales applied to finished sums, or why not. */
function asStored(bound: BoundStep, device: Capabilities): Plan | string {
  const { weight, x, k } = formatsOf(bound);
  const plan = { carrier: "stored", xParts: 1, wParts: 1, scaledX: false, scaledW: false } as const;
  if (x === null) return "x is float32, which tensor cores round";
  if (unscaled(x, "bf16") && unscaled(weight, "bf16")) return plan;
  if (!isSeparable(x, k) || scaleRun(weight, k) < k)
    return "scales that change along K are not applied to finished sums";
  if (isSigned8(x) && isSigned8(weight)) return plan;
  if (!isFloat8(x.element) || !isFloat8(weight.element))
    return `tensor cores do not multiply ${x.name} by ${weight.name}`;
  if (!device.features.has("sm>=89")) return "the device has no float8 tensor cores";
  return linearStep(bound).fastAccum
    ? plan
    : "float8 tensor cores keep 14 bits of a sum, which the linear does not declare (fastAccum)";
}

/**
 * Of those, bytes with a scale a row that one wave of short tiles multiplies (64 x 128; wgmma.cuh): W is in shared memory before x is there, while
 * the library's kernels begin when x is complete, and take longer for a scale a row than for one.
 */
function asShort(bound: BoundStep, device: Capabilities): Plan | string {
  const plan = asStored(bound, device);
  if (typeof plan === "string") return plan;
  const { weight, x, n, k } = formatsOf(bound);
  if (codecBits(weight.element) !== 8 || k > 1024) return "a ring holds W for 1024 bytes of K";
  if (x?.scales[0]?.block[0] !== 1) return "x must have a scale a row";
  const rows = bound.outputRows;
  const tiles = Math.ceil(rows / 64) * Math.ceil((n * linearStep(bound).parts.length) / 128);
  return rows >= 64 && tiles <= 128 ? plan : `its outputs are not 1 to 128 tiles of 64 x 128: x has ${rows} rows`;
}

/** What the library takes of those. */
export function asLibrary(bound: BoundStep, device: Capabilities): Plan | string {
  const plan = asStored(bound, device);
  if (typeof plan === "string") return plan;
  const { weight, x, n, k } = formatsOf(bound);
  if (k % 8 !== 0) return `K must be a multiple of 8: K is ${k}`;
  if (unscaled(weight, "bf16")) return plan;
  if (k % 16 !== 0 || n % 16 !== 0) return `K and N must be multiples of 16: they are ${k} and ${n}`;
  return [x, weight].every((format) => format !== null && codecName(format.element) === "e5m2")
    ? "the library does not multiply e5m2 by e5m2"
    : plan;
}

/** Codes of both as exact integers of 8 bits, summed in int32. */
function asBytes(bound: BoundStep): Plan | string {
  const { weight, x, n, k } = formatsOf(bound);
  if (x === null || !isSigned8(x)) return "x must hold signed 8-bit integers without zero points";
  if (!isInteger(weight) || weight.zero.domain !== "none")
    return `${weight.name} does not hold integers without zero points`;
  if (isSigned8(weight)) return "its codes are signed bytes as they are stored";
  const { element } = weight;
  if (element.kind !== "int" || (!element.signed && element.bits > 7))
    return `codes of ${weight.name} are no signed bytes`;
  if (!isSeparable(x, k) || scaleRun(weight, k) < k)
    return "scales change along K, where integer sums would have to end";
  if (k % 16 !== 0 || n % 16 !== 0) return `K and N must be multiples of 16: they are ${k} and ${n}`;
  return { carrier: "s8", xParts: 1, wParts: 1, scaledX: false, scaledW: false };
}

/** Both operands as sums of bf16 numbers. */
function asBf16(bound: BoundStep): Plan | string {
  const { weight, x, k } = formatsOf(bound);
  if (x !== null && isInteger(x) && isInteger(weight))
    return "sums of integer products must be exact, and float32 sums are not";
  if (weight.zero.domain === "float") return `${weight.name} adds zero points`;
  const run = scaleRun(weight, k);
  if (run < k && run % 8 !== 0) return `its scale changes every ${run} elements: 8 are decoded at once`;
  const scaledW = run < k;
  const wParts = !scaledW || exactProduct(weight, 8) ? 1 : 3;
  const scaledX = x === null || !isSeparable(x, k);
  return { carrier: "bf16", xParts: partsOf(x, k), wParts, scaledX, scaledW };
}

/** Scaled 4-bit weights as f16 numbers of a row's power of two, and x as one or two of them. */
function asF16(bound: BoundStep): Plan | string {
  const { weight, x, k } = formatsOf(bound);
  if (x !== null && isInteger(x) && isInteger(weight))
    return "sums of integer products must be exact, and float32 sums are not";
  const run = scaleRun(weight, k);
  if (weight.element.kind !== "int" || !exactProduct(weight, 11))
    return `scaled values of ${weight.name} are not exact in f16`;
  if (weight.zero.domain === "int") return `zero points of ${weight.name} may take its codes past f16's range`;
  if (run >= k && weight.zero.domain !== "float") return "its scales do not change along K, and bf16 holds its codes";
  if (run % 8 !== 0) return `its scale changes every ${run} elements: 8 are decoded at once`;
  if (weight.zero.domain === "float" && significantBits(weight.zero.codec) > 11)
    return `zero points of ${weight.name} are not exact in f16`;
  const exact = x !== null && x.scales.length === 0 && significantBits(x.element) <= 11;
  return { carrier: "f16", xParts: exact ? 1 : 2, wParts: 1, scaledX: true, scaledW: true };
}

/** Blocks along K that cuBLASLt scales by itself: of 32 float8 codes by a power of two, of 16 e2m1 codes by an e4m3. */
function blockOf({ element, scales, zero }: Format, k: number): 16 | 32 | null {
  const [first, second, ...more] = scales;
  if (first === undefined || zero.domain !== "none" || more.length > 0 || first.block[0] !== 1) return null;
  const kind = `${codecName(element)} ${codecName(first.codec)} ${first.block[1]}`;
  if (["e4m3 e8m0 32", "e5m2 e8m0 32"].includes(kind)) return second === undefined ? 32 : null;
  const outer = second === undefined || extentOf(second.block[1], k) >= k;
  return kind === "e2m1 e4m3 16" && outer ? 16 : null;
}

/** Both operands as they lie, with scales that the units of compute capability 10 on apply block by block. */
function asBlocks(bound: BoundStep): Plan | string {
  const { weight, x, n, k } = formatsOf(bound);
  if (x === null) return "x is float32, which tensor cores round";
  const block = blockOf(weight, k);
  if (block === null || blockOf(x, k) !== block) return `block scaling does not multiply ${x.name} by ${weight.name}`;
  if (k % 32 !== 0 || n % 16 !== 0) return `K must be a multiple of 32 and N of 16: they are ${k} and ${n}`;
  return [x, weight].every(({ element }) => codecName(element) === "e5m2")
    ? "the library does not multiply e5m2 by e5m2"
    : { carrier: "blocks", xParts: 1, wParts: 1, scaledX: false, scaledW: false };
}

const library: Requirement = {
  unmet: (_, device) => (device.features.has("cublaslt") ? null : "no cuBLASLt was found"),
};
const described: Requirement = { unmet: stepObstacle };
const manyRows: Requirement = {
  unmet: (bound) => (bound.outputRows >= 8 ? null : `x must have at least 8 rows: it has ${bound.outputRows}`),
};
const within: Requirement = {
  unmet: (bound) => (bound.outputRows <= 65535 ? null : `x has ${bound.outputRows} rows: 65535 are a grid's`),
};

const planned = (make: Make): Requirement => ({
  unmet: (bound, device) => {
    const plan = make(bound, device);
    return typeof plan === "string" ? plan : null;
  },
});

/** K of the carriers: padded, and in f16 two columns for each float zero point of a row. */
function columnsOf({ carrier }: Plan, { weight, k }: { weight: Format; k: number }): number {
  const zeros = carrier === "f16" && weight.zero.domain === "float" ? Math.ceil(k / scaleRun(weight, k)) * 2 : 0;
  return roundUp(k, 16) + roundUp(zeros, 8);
}

/** Who multiplies: an entry, what it needs, and whether it leaves products in scratch to be finished. */
interface Multiplier {
  readonly entry: Entry;
  readonly requires: readonly Requirement[];
  readonly leavesProducts: boolean;
}
const LIBRARY: Multiplier = { entry: GEMM, requires: [library, within], leavesProducts: true };
const HOPPER: Multiplier = {
  entry: WGMMA,
  requires: [needsFeature("sm_90", "it is written for the matrix units of compute capability 9.0")],
  leavesProducts: false,
};

const BLOCK_SCALING: Multiplier = {
  entry: BLOCKSCALED,
  requires: [
    library,
    within,
    needsFeature("sm>=100", "block scaling begins with compute capability 10.0"),
    needsFeature(TRIALS.blocks, "it was never run on such a device: FEWBIT_CUDA_TRIAL=blocks tries it"),
  ],
  leavesProducts: true,
};

/** Bytes of swizzled scales, as swizzle.hpp counts them. */
const swizzledBytes = (rows: number, blocks: number): number => Math.ceil(rows / 128) * Math.ceil(blocks / 4) * 512;

/** As gemm.cu and blockscaled.cu take it apart: every array starts on 256 bytes. */
function scratchBytes(bound: BoundStep, plan: Plan, { leavesProducts }: Multiplier): number {
  const { n, k, weight } = formatsOf(bound);
  const rows = bound.outputRows;
  const matrices = linearStep(bound).parts.length;
  const columns = columnsOf(plan, { weight, k });
  const converts = plan.carrier === "bf16" || plan.carrier === "f16";
  const arrays = [
    converts ? 2 * plan.xParts * rows * columns : 0,
    converts ? 2 * matrices * plan.wParts * n * columns : 0,
    plan.carrier === "s8" ? matrices * n * columns : 0,
    ...(plan.carrier === "blocks"
      ? [rows, ...Array<number>(matrices).fill(n)].map((count) => swizzledBytes(count, k / scaleRun(weight, k)))
      : []),
    4 * rows,
    4 * matrices * n,
    leavesProducts ? 4 * matrices * rows * n : 0,
  ];
  return arrays.reduce((sum, bytes) => sum + roundUp(bytes, 256), 0);
}

type Make = (bound: BoundStep, device: Capabilities) => Plan | string;

function row(id: string, by: Multiplier, make: Make, rank: Pick<NativeKernel, "efficiency" | "rowTile">): NativeKernel {
  const planOf = (bound: BoundStep, device: Capabilities): Plan => {
    const plan = make(bound, device);
    if (typeof plan === "string") throw new TypeError(`${id} was built for a step it refuses: ${plan}`);
    return plan;
  };
  return {
    id,
    kind: "linear",
    entries: [by.entry],
    fusions: ["gate*up+quantize", "linear+activation+quantize"],
    requires: [...by.requires, described, manyRows, planned(make)],
    ...rank,
    scratch: (bound, device) => scratchBytes(bound, planOf(bound, device), by),
    build: (context) => {
      const { bound, device } = context;
      const plan = planOf(bound, device);
      const { weight, k } = formatsOf(bound);
      const { bindings, args } = new LinearArguments()
        .weightGroup(context)
        .activations(context)
        .epilogue(context)
        .int(CARRIERS.indexOf(plan.carrier), plan.xParts, plan.wParts, plan.scaledX, plan.scaledW)
        .int(columnsOf(plan, { weight, k }))
        .buffer(scratch);
      return [{ label: bound.describe(), entry: by.entry, bindings, args }];
    },
  };
}

const only =
  (make: Make, keep: (plan: Plan) => boolean, reason: string): Make =>
  (bound, device) => {
    const plan = make(bound, device);
    return typeof plan === "string" || keep(plan) ? plan : reason;
  };
const whole = (plan: Plan) => plan.xParts * plan.wParts === 1;

/** Whether the library scales and stores results itself, as gemm.cu asks it to: then nothing is left to finish. */
function storesItself(bound: BoundStep): boolean {
  const { epilogue, biases, rounds } = linearStep(bound);
  const { weight, x } = formatsOf(bound);
  if (x === null || rounds !== null || biases.length > 0 || "fn" in epilogue || isInteger(x)) return false;
  const [scaleX, scaleW] = [x.scales, weight.scales];
  if (scaleX.length === 0 && scaleW.length === 0) return true;
  const single = [scaleX, scaleW].every(
    (levels) => levels.length === 1 && codecName((levels[0] as ScaleLevel).codec) === "f32",
  );
  return single && scaleX[0]?.block[0] === scaleW[0]?.block[0];
}
const finished: Requirement = {
  unmet: (bound) => (storesItself(bound) ? null : "the library does not finish its results"),
};
const LIBRARY_ALONE: Multiplier = { ...LIBRARY, requires: [...LIBRARY.requires, finished] };

/** Rows of x of a tile of Hopper's products. */
const rowTile = 128;
const wholeBytes = "an element takes several bf16 numbers";
const wholeHalves = "an element takes several f16 numbers";

/**
 * Products by tensor cores, through cuBLASLt or Hopper's own, which finish their sums before they store them. Efficiencies are those
 * of an H100 (bench/NOTES.md).
 */
export const GEMM_KERNELS: readonly NativeKernel[] = [
  row("cuda/linear/wgmma", HOPPER, asStored, { efficiency: { bandwidth: 0.4, compute: 0.62 }, rowTile }),
  row("cuda/linear/wgmma_short", HOPPER, asShort, { efficiency: { bandwidth: 0.9, compute: 0.7 } }),
  row("cuda/linear/wgmma_s8", HOPPER, asBytes, { efficiency: { bandwidth: 0.3, compute: 0.85 }, rowTile }),
  row("cuda/linear/wgmma_bf16", HOPPER, only(asBf16, whole, wholeBytes), {
    efficiency: { bandwidth: 0.12, compute: 0.55 },
    rowTile,
  }),
  row("cuda/linear/wgmma_f16", HOPPER, only(asF16, whole, wholeHalves), {
    efficiency: { bandwidth: 0.12, compute: 0.5 },
    rowTile,
  }),
  row("cuda/linear/cublaslt_blocks", BLOCK_SCALING, asBlocks, { efficiency: { bandwidth: 0.35, compute: 0.9 } }),
  row("cuda/linear/cublaslt", LIBRARY_ALONE, asLibrary, { efficiency: { bandwidth: 0.8, compute: 0.67 } }),
  row("cuda/linear/cublaslt_finish", LIBRARY, asLibrary, { efficiency: { bandwidth: 0.35, compute: 0.55 } }),
  row("cuda/linear/cublaslt_s8", LIBRARY, asBytes, { efficiency: { bandwidth: 0.3, compute: 0.8 } }),
  row("cuda/linear/cublaslt_bf16", LIBRARY, only(asBf16, whole, wholeBytes), {
    efficiency: { bandwidth: 0.12, compute: 0.5 },
  }),
  row("cuda/linear/cublaslt_f16", LIBRARY, only(asF16, whole, wholeHalves), {
    efficiency: { bandwidth: 0.12, compute: 0.45 },
  }),
  row(
    "cuda/linear/cublaslt_f16_split",
    LIBRARY,
    only(asF16, (plan) => !whole(plan), "an element is one f16 number"),
    { efficiency: { bandwidth: 0.08, compute: 0.25 } },
  ),
  row(
    "cuda/linear/cublaslt_bf16_split",
    LIBRARY,
    only(asBf16, (plan) => !whole(plan), "an element is one bf16 number"),
    { efficiency: { bandwidth: 0.06, compute: 0.12 } },
  ),
];
