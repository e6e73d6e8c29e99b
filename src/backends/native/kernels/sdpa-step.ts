import { f32Bits } from "../../../core/dtype.js";
import { type Codec, codecName, type Format } from "../../../formats/format.js";
import { type AttentionShape, attentionShape } from "../../../ir/attention-shape.js";
import type { Dim, Node, TensorType, ValueId } from "../../../ir/graph.js";
import type { SdpaAttrs, SdpaExtra } from "../../../ir/ops.js";
import type { Requirement } from "../../../plan/select.js";
import type { BoundStep } from "../../../plan/step.js";

/** An sdpa step, taken apart. */
export interface SdpaStep {
  readonly attrs: SdpaAttrs;
  readonly shape: AttentionShape;
  readonly operands: readonly [q: ValueId, k: ValueId, v: ValueId];
  readonly types: readonly [q: TensorType, k: TensorType, v: TensorType];
  readonly out: ValueId;
  /** The format without scales to which `out` is rounded when it is stored; null: `out` is dense float32. */
  readonly rounds: Format | null;
  extra(name: SdpaExtra): ValueId | undefined;
}

export function sdpaStep(bound: BoundStep): SdpaStep {
  const node = bound.step.nodes[0] as Node<"sdpa">;
  const all = node.inputs.map((id) => bound.type(id));
  const shape = attentionShape(all, node.attrs, bound.describe());
  const [q, k, v] = node.inputs as readonly [ValueId, ValueId, ValueId];
  const types = [bound.type(q), bound.type(k), bound.type(v)] as const;
  const out = bound.step.outputs[0] as ValueId;
  const rounds = (bound.step.nodes[1] as Node<"quantize"> | undefined)?.attrs.format ?? null;
  return {
    attrs: node.attrs,
    shape,
    operands: [q, k, v],
    types,
    out,
    rounds,
    extra: (name) => node.inputs[shape.extra[name]],
  };
}

/** A requirement of a step that is an sdpa. */
export const sdpaNeeds = (unmet: (step: SdpaStep, bound: BoundStep) => string | null): Requirement => ({
  unmet: (bound) => unmet(sdpaStep(bound), bound),
});

/** The fusion of an sdpa with the rounding of its result. */
export const ROUNDED = "sdpa+quantize";
/** Results are stored as float32 or bf16. */
export const roundsResult: Requirement = sdpaNeeds(({ rounds, out }, bound) =>
  rounds === null || codecName(rounds.element) === "bf16"
    ? null
    : `it rounds to bf16 only: ${bound.name(out)} is another format`,
);

export const needsFeature = (feature: string, what: string): Requirement => ({
  unmet: (_, device) => (device.features.has(feature) ? null : what),
});

/** A block of a kernel takes so many bytes of shared memory. */
export const needsSharedMemory = (bytes: number): Requirement => ({
  unmet: (_, { workgroupMemory }) =>
    workgroupMemory >= bytes ? null : `a block needs ${bytes} bytes of shared memory: it has ${workgroupMemory}`,
});

/** What a dimension is under a step's symbols. */
export const extentOf = (dim: Dim, { symbols }: BoundStep): number =>
  typeof dim === "number" ? dim : (symbols[dim] ?? 0);

/** The codec of elements that have no scale; dense values are float32. Null for scaled ones. */
export function plainCodec(type: TensorType): string | null {
  if (type.kind === "dense") return type.dtype;
  const { element, scales, zero } = type.format;
  return scales.length === 0 && zero.domain === "none" ? codecName(element) : null;
}

/** The element codec of a format with one level of float32 scales and no zero points, by its name; null for others. */
export function scaledCodec({ element, scales, zero }: Format): string | null {
  const [level, ...more] = scales;
  if (level === undefined || more.length > 0 || zero.domain !== "none" || codecName(level.codec) !== "f32") return null;
  return codecName(element);
}

/** Whether probabilities are declared to be rounded to a codec after multiplication with a scale. */
export const roundsTo = ({ probabilities }: SdpaAttrs, codec: Codec, scale: number): boolean =>
  probabilities !== undefined && codecName(probabilities.codec) === codecName(codec) && probabilities.scale === scale;

/** A float32 number as an argument of a launch. */
export const real = (value: number): number => f32Bits(Math.fround(value));
