import { type HostTensor, isDense } from "../ir/tensor.js";
import type { Step } from "../plan/step.js";
import type { TapFaults } from "./trace.js";

/** A deliberate mistake somewhere in a model, and the step that `trace` must name. */
export interface ModelFault {
  readonly id: string;
  /** The step at fault: the one of this kind whose nodes or operands have a name that contains `of`. */
  readonly kind: Step["kind"];
  readonly of: string;
  /** Replaces text of that step's shaders alone. */
  readonly rewrite?: readonly [RegExp, string];
  /** Changes the weight whose name contains `of` before it is uploaded: word `index` of its codes or numbers. */
  readonly tamper?: (tensor: HostTensor) => HostTensor;
}

/** The tensor with one 32-bit word of its numbers, codes or first scales changed. */
function changed(
  tensor: HostTensor,
  part: "codes" | "scales",
  index: number,
  change: (word: number) => number,
): HostTensor {
  const words = (source: ArrayBufferView & { slice(): ArrayBufferView }) => {
    const copy = source.slice();
    const view = new Uint32Array(copy.buffer as ArrayBuffer);
    view[index] = change(view[index] as number);
    return copy;
  };
  if (isDense(tensor)) return { ...tensor, data: words(tensor.data) as typeof tensor.data };
  if (part === "codes") return { ...tensor, qdata: words(tensor.qdata) as Uint32Array };
  return { ...tensor, scales: [words(tensor.scales[0] as Uint32Array) as Uint32Array, ...tensor.scales.slice(1)] };
}

const flip = (bits: number) => (word: number) => (word ^ bits) >>> 0;

/** SEEDED MODEL FAULTS, for a decoder of at least two layers with int4_tinygemm weights. */
export const MODEL_FAULTS: readonly ModelFault[] = [
  {
    id: "layer 0: a code of the q projection",
    kind: "linear",
    of: "layers.0.self_attn.q_proj",
    tamper: (t) => changed(t, "codes", 3, flip(0x8000)),
  },
  {
    id: "layer 1: a scale of the k projection",
    kind: "linear",
    of: "layers.1.self_attn.k_proj",
    tamper: (t) => changed(t, "scales", 2, flip(0x80)),
  },
  {
    id: "layer 0: a code of the v projection",
    kind: "linear",
    of: "layers.0.self_attn.v_proj",
    tamper: (t) => changed(t, "codes", 8, flip(0x70000)),
  },
  {
    id: "layer 1: a code of the o projection",
    kind: "linear",
    of: "layers.1.self_attn.o_proj",
    tamper: (t) => changed(t, "codes", 0, flip(0x8)),
  },
  {
    id: "layer 0: a scale of the gate projection",
    kind: "linear",
    of: "layers.0.mlp.gate_proj",
    tamper: (t) => changed(t, "scales", 1, flip(0x100)),
  },
  {
    id: "layer 1: a code of the up projection",
    kind: "linear",
    of: "layers.1.mlp.up_proj",
    tamper: (t) => changed(t, "codes", 5, flip(0x800)),
  },
  {
    id: "layer 1: a code of the down projection",
    kind: "linear",
    of: "layers.1.mlp.down_proj",
    tamper: (t) => changed(t, "codes", 7, flip(0x80000000)),
  },
  {
    id: "layer 0: a weight of the norm before attention",
    kind: "rmsnorm",
    of: "layers.0.input_layernorm",
    tamper: (t) => changed(t, "codes", 4, flip(0x400000)),
  },
  {
    id: "layer 1: a weight of the norm before the MLP",
    kind: "rmsnorm",
    of: "layers.1.post_attention_layernorm",
    tamper: (t) => changed(t, "codes", 1, flip(0x400000)),
  },
  {
    id: "the final norm's weight",
    kind: "rmsnorm",
    of: "model.norm",
    tamper: (t) => changed(t, "codes", 9, flip(0x400000)),
  },
  {
    id: "layer 1: the residual after attention is missing",
    kind: "linear",
    of: "layers.1.self_attn.o_proj",
    rewrite: [/y0 \+= residual\[[^\]]*\];/g, ""],
  },
  {
    id: "layer 0: the residual after the MLP is missing",
    kind: "linear",
    of: "layers.0.mlp.down_proj",
    rewrite: [/y0 \+= residual\[[^\]]*\];/g, ""],
  },
  {
    id: "layer 1: no activation of the gate",
    kind: "linear",
    of: "layers.1.mlp.gate_proj",
    rewrite: [/silu\(y0\)/g, "(y0)"],
  },
  {
    id: "layer 0: half of the zero points",
    kind: "linear",
    of: "layers.0.mlp.gate_proj",
    rewrite: [/- 8\.0;/g, "- 7.0;"],
  },
  {
    id: "layer 1: a stale rotation",
    kind: "rope_kv",
    of: "layer1.",
    rewrite: [/let angle = \(position \+ t\)/g, "let angle = (position + t + 1u)"],
  },
  {
    id: "layer 0: a stale cache position",
    kind: "rope_kv",
    of: "layer0.",
    rewrite: [/key_row\(0u, head, position \+ t\)/g, "key_row(0u, head, position + t + 1u)"],
  },
  {
    id: "layer 1: one key too few",
    kind: "sdpa",
    of: "layer1.",
    rewrite: [/min\(p \+ 1u, seen_keys\(\)\)/g, "min(max(p, 1u), seen_keys())"],
  },
  {
    id: "layer 0: another head's keys",
    kind: "sdpa",
    of: "layer0.",
    rewrite: [/\(b \* 2u \+ h\)/g, "(b * 2u + (h ^ 1u))"],
  },
  {
    id: "layer 1: the mean of the norm",
    kind: "rmsnorm",
    of: "layers.1.input_layernorm",
    rewrite: [/ \/ (\d+)\.0 \+ /g, " / ($1.0 - 1.0) + "],
  },
  {
    id: "the embedding of the token before",
    kind: "embedding",
    of: "embed_tokens",
    rewrite: [/let row = id - 0u;/g, "let row = max(id, 1u) - 1u;"],
  },
  {
    id: "the last row but one",
    kind: "last_row",
    of: "last",
    rewrite: [/ - 1u\)/g, " - 1u - min(1u, params.v[0].x - 1u))"],
  },
  {
    id: "a token that is not the likeliest",
    kind: "sample",
    of: "sampled",
    rewrite: [/sampled\[0\] = chosen;/g, "sampled[0] = chosen ^ 1u;"],
  },
];

/** The index of the step that a fault sits in; -1 when the plan has none. */
export function faultyStep(fault: ModelFault, steps: readonly Step[], name: (id: number) => string): number {
  return steps.findIndex(
    (step) =>
      step.kind === fault.kind &&
      [...step.inputs, ...step.nodes.flatMap((node) => node.outputs)].some((id) => name(id).includes(fault.of)),
  );
}

/** The changes that put a fault in, and a count of what they changed. */
export function tapFaults(fault: ModelFault, step: number): TapFaults & { changes(): number } {
  let count = 0;
  const { rewrite, tamper } = fault;
  return {
    changes: () => count,
    ...(rewrite && {
      rewrite: (source: string, _: string, at: number) => {
        if (at !== step) return source;
        const text = source.replace(...rewrite);
        if (text !== source) count++;
        return text;
      },
    }),
    ...(tamper && {
      tamper: (name: string, tensor: HostTensor) => {
        if (!name.includes(fault.of)) return tensor;
        count++;
        return tamper(tensor);
      },
    }),
  };
}
