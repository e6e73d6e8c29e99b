import { codecBits, extentOf, type Format, rowsObstacle } from "../../../formats/format.js";
import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { streams } from "../../rope-step.js";
import { type Entry, type NativeKernel, scratch } from "../kernel.js";
import { ruleObstacle } from "./general-arguments.js";
import { CHOOSE, quantizeJob, quantizeScratch, quantizeStep } from "./general-quantize.js";
import { headObstacle, ropeOf, sizeOfHead } from "./general-rope.js";
import { earlyObstacle, normOf, sampleOf } from "./general-rows.js";

const NORM: Entry = { name: "rows/norm", abi: 1 };
const QUANTIZE: Entry = { name: "rows/quantize", abi: 2 };
const EXTREMES: Entry = { name: "rows/quantize_extremes", abi: 1 };
const ROPE: Entry = { name: "rows/rope_kv", abi: 1 };
const SAMPLE: Entry = { name: "rows/sample", abi: 1 };

/** Elements of a row that a block of threads keeps in registers. */
const MOST = 32768;
/** Logits that a cluster of blocks keeps in registers. */
const MOST_LOGITS = 262144;
/** Elements of a block that the lanes of a warp, four to a lane, have in common. */
const BLOCKS = [16, 32, 64, 128];

/** Why four codes of a format do not fill whole bytes, or its blocks not whole lanes of a row of `k`, or null. */
function fourObstacle({ name, element, scales }: Format, k: number): string | null {
  const bits = codecBits(element);
  if (k % 4 !== 0) return `rows must be a multiple of 4 elements long: ${k}`;
  if (bits % 2 !== 0 || bits > 16) return `four codes of ${bits} bits are not stored at once`;
  const block = scales[0]?.block[1];
  const width = block === undefined ? k : extentOf(block, k);
  if (width === k || (k % width === 0 && BLOCKS.includes(width))) return null;
  return `a block of ${name} spans ${width} elements of a row: ${BLOCKS.join(", ")} or all are taken`;
}

/** What holds for quantize steps of any number of rows; `whole`: a row must be known before it is coded. */
function valuesObstacle(bound: BoundStep, whole: boolean): string | null {
  const { node, norm } = quantizeStep(bound);
  const early = norm === undefined ? null : earlyObstacle(bound, norm);
  if (early !== null) return early;
  const { format } = node.attrs;
  const k = bound.shape(node.outputs[0] as ValueId).at(-1) as number;
  const obstacle = ruleObstacle(format) ?? fourObstacle(format, k) ?? rowsObstacle(format);
  if (obstacle !== null) return obstacle;
  return (whole || norm !== undefined) && k > MOST
    ? `a row of ${k} elements does not fit the registers of a block: ${MOST} do`
    : null;
}

function quantizeObstacle(bound: BoundStep): string | null {
  const { node } = quantizeStep(bound);
  const { format, perTensorScale } = node.attrs;
  const { rule, scales, name } = format;
  if (scales[1] !== undefined && (rule.kind !== "nvfp4" || perTensorScale === undefined))
    return `${name} has a second scale level, which depends on other blocks`;
  const [height, width] = scales[0]?.block ?? [1, 1];
  const given = node.inputs[1] !== undefined;
  if (height !== 1 && !given && bound.outputRows > 1) return `a block of ${name} spans ${height} rows`;
  const k = bound.shape(node.outputs[0] as ValueId).at(-1) as number;
  return valuesObstacle(bound, scales.length > 0 && extentOf(width, k) === k && !given);
}

/** Why the extremes of rows do not make the one scale of a tensor, or null. */
function tensorObstacle(bound: BoundStep): string | null {
  const { node } = quantizeStep(bound);
  const { scales, name } = node.attrs.format;
  const k = bound.shape(node.outputs[0] as ValueId).at(-1) as number;
  const [level] = scales;
  if (scales.length !== 1 || level?.block[0] !== "all" || extentOf(level.block[1], k) !== k)
    return `the scale of a tensor is not the only one of ${name}`;
  if (node.inputs[1] !== undefined) return "its scale is given";
  return valuesObstacle(bound, true);
}

const normObstacle = (bound: BoundStep): string | null => {
  const node = bound.step.nodes[0] as Node<"rmsnorm" | "layernorm">;
  const early = earlyObstacle(bound, node);
  if (early !== null) return early;
  const groups = node.op === "rmsnorm" ? (node.attrs.groups ?? 1) : 1;
  const width = (bound.shape(node.outputs[0] as ValueId).at(-1) as number) / groups;
  return width % 4 === 0 && width <= MOST
    ? null
    : `${width} elements are normalised together: a multiple of 4 up to ${MOST} is taken`;
};

function ropeObstacle(bound: BoundStep): string | null {
  const obstacle = headObstacle(bound);
  if (obstacle !== null) return obstacle;
  for (const stream of streams(bound)) {
    const size = sizeOfHead(bound, stream);
    const rotary = stream.rope === undefined ? 0 : (stream.rope.attrs.rotary ?? size);
    if (stream.hadamard) return "it transforms heads";
    if (rotary % 8 !== 0) return `pairs of ${rotary} rotated elements are not halves of whole fours`;
    const four =
      stream.format === null
        ? size % 4 === 0
          ? null
          : `a head has ${size} elements`
        : fourObstacle(stream.format, size);
    if (four !== null) return four;
  }
  return null;
}

const sampleObstacle = (bound: BoundStep): string | null => {
  const logits = bound.shape(bound.step.inputs[0] as ValueId).at(-1) as number;
  return logits <= MOST_LOGITS ? null : `${logits} logits do not fit the registers of a cluster: ${MOST_LOGITS} do`;
};

/**
 * Kernels that load a row once and keep it in registers, four neighbouring elements a thread. They take the arguments of the
 * general kernels, which take what these refuse.
 */
export const ROWS_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/quantize/rows",
    kind: "quantize",
    fusions: ["rmsnorm+quantize", "activation*mul+quantize", "activation+quantize"],
    entries: [QUANTIZE],
    requires: [{ unmet: quantizeObstacle }],
    efficiency: { bandwidth: 0.8, compute: 0.05 },
    build: (context) => {
      const { bindings, args } = quantizeJob(context);
      return [{ label: context.bound.describe(), entry: QUANTIZE, bindings, args }];
    },
  },
  {
    // A pass over the input for the extremes of each row, a small one for the scale, and one that codes.
    id: "cuda/quantize/tensor",
    kind: "quantize",
    fusions: ["rmsnorm+quantize", "activation*mul+quantize", "activation+quantize"],
    entries: [EXTREMES, CHOOSE, QUANTIZE],
    requires: [{ unmet: tensorObstacle }],
    efficiency: { bandwidth: 0.55, compute: 0.05 },
    scratch: quantizeScratch,
    build: (context) => {
      const { bindings, args } = quantizeJob(context, scratch);
      const label = context.bound.describe();
      return [EXTREMES, CHOOSE, QUANTIZE].map((entry) => ({ label, entry, bindings, args }));
    },
  },
  ...(["rmsnorm", "layernorm"] as const).map(
    (kind): NativeKernel => ({
      id: `cuda/${kind}/rows`,
      kind,
      entries: [NORM],
      requires: [{ unmet: normObstacle }],
      efficiency: { bandwidth: 0.8, compute: 0.05 },
      build: (context) => normOf(context, NORM),
    }),
  ),
  {
    id: "cuda/rope_kv/rows",
    kind: "rope_kv",
    entries: [ROPE],
    requires: [{ unmet: ropeObstacle }],
    efficiency: { bandwidth: 0.7, compute: 0.05 },
    build: (context) => ropeOf(context, ROPE),
  },
  {
    id: "cuda/sample/cluster",
    kind: "sample",
    entries: [SAMPLE],
    requires: [
      {
        unmet: (_, device) =>
          device.features.has("sm>=90") ? null : "clusters of blocks need code of compute capability 9.0",
      },
      { unmet: sampleObstacle },
    ],
    efficiency: { bandwidth: 0.05, compute: 0.02 },
    build: (context) => sampleOf(context, SAMPLE),
  },
];
