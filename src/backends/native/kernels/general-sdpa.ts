import { FORMATS } from "../../../formats/table.js";
import { attentionShape } from "../../../ir/attention-shape.js";
import type { Node, ValueId } from "../../../ir/graph.js";
import type { BoundStep } from "../../../plan/step.js";
import { storedLayout } from "../../stored-layout.js";
import { type BuildContext, type Entry, type NativeKernel, value } from "../kernel.js";
import { Arguments, inEights, operand, storedObstacle } from "./general-arguments.js";
import { ROUNDED, roundsResult, sdpaNeeds, sdpaStep } from "./sdpa-step.js";

const SDPA: Entry = { name: "general/sdpa", abi: 2 };
/** A warp keeps a row of the result in registers. */
const MOST = 256;

const nodeOf = (bound: BoundStep) => bound.step.nodes[0] as Node<"sdpa">;
const shapeOf = (bound: BoundStep) => {
  const { inputs, attrs } = nodeOf(bound);
  return attentionShape(
    inputs.map((id) => bound.type(id)),
    attrs,
    bound.describe(),
  );
};

export const SDPA_GENERAL_KERNELS: readonly NativeKernel[] = [
  {
    id: "cuda/sdpa/general",
    kind: "sdpa",
    entries: [SDPA],
    requires: [
      {
        unmet: (bound) => {
          const { size } = shapeOf(bound);
          return size <= MOST ? null : `the head dimension must be at most ${MOST}: it is ${size}`;
        },
      },
      {
        unmet: (bound) => {
          for (const id of nodeOf(bound).inputs.slice(0, 3)) {
            const type = bound.type(id);
            const obstacle = type.kind === "format" ? storedObstacle(type.format) : null;
            if (obstacle !== null) return `${bound.name(id)}: ${obstacle}`;
          }
          return null;
        },
      },
      roundsResult,
      sdpaNeeds(({ rounds, out }, bound) =>
        rounds === null || ((bound.type(out).shape.at(-1) as number) * 16) % 128 === 0
          ? null
          : "rows of a rounded result must be whole multiples of 16 bytes",
      ),
    ],
    fusions: [ROUNDED],
    rowTile: 16,
    efficiency: { bandwidth: 0.05, compute: 0.005 },
    build: (context) => {
      const { bindings, args } = sdpaArguments(context);
      return [{ label: context.bound.describe(), entry: SDPA, bindings, args }];
    },
  },
];

/** What `runSdpa` of `sdpa.cu` reads. */
function sdpaArguments(context: BuildContext): Arguments {
  const { inputs, attrs } = nodeOf(context.bound);
  const { out, rounds } = sdpaStep(context.bound);
  const { batch, kvHeads, size, tokens, keys, tokenMajor, page, extra, mask, ring } = shapeOf(context.bound);
  const [q, k, v] = inputs as readonly [ValueId, ValueId, ValueId];
  const { heads, causal, window, position, softcap, probabilities } = attrs;
  const optional = (at: number) => (at < 0 ? undefined : operand(context, inputs[at] as ValueId));
  const made = new Arguments()
    .int(...context.extent(tokens), ...context.extent(keys), batch, heads, kvHeads, size)
    .int(tokenMajor, context.type(q).kind === "format");
  if (context.type(q).kind === "format") made.stored(context.layout(q), operand(context, q));
  else {
    // Rows [T, heads * D] may be columns of wider ones; other shapes are values of their own.
    const flat = context.type(q).shape.length === 2;
    made.buffer(operand(context, q)).int(...(flat ? context.strided(q) : [heads * size, 0]));
  }
  rows(context, made, k, size);
  rows(context, made, v, size);
  made
    .buffer(value(out))
    .int(rounds !== null)
    .real(attrs.scale, softcap ?? 0)
    .int(causal, ring, window ?? 0, position === undefined ? -1 : context.symbol(position), page ?? 0)
    .buffer(optional(extra.pages))
    .buffer(optional(extra.mask))
    .int(mask.batch, mask.heads)
    .buffer(optional(extra.sinks))
    .int(probabilities !== undefined);
  if (probabilities !== undefined) made.codec(probabilities.codec).table(probabilities.codec).real(probabilities.scale);
  return made;
}

/** Rows of k or v; dense ones are stored rows of float32 without padding. */
function rows(context: BuildContext, made: Arguments, id: ValueId, size: number): void {
  const type = context.type(id);
  if (type.kind === "format") {
    made.stored(context.layout(id), operand(context, id)).int(inEights(type.format, size));
    return;
  }
  const layout = { ...storedLayout(FORMATS.f32, [1, size]), rowStride: size };
  made.stored(layout, operand(context, id)).int(size % 4 === 0);
}
