import { FewbitError, nearestNames } from "../core/errors.js";
import { CODECS, FORMATS } from "../formats/table.js";
import type { Graph, Node, Value, ValueId } from "../ir/graph.js";
import type { SdpaAttrs } from "../ir/ops.js";

/** How attention computes: as the operands are stored (`auto`), or in e4m3 throughout. */
export type AttentionMode = "auto" | "float8";
const MODES: readonly AttentionMode[] = ["auto", "float8"];

/** The mode of that name. Throws `argument/unknown-name`. */
export function attentionMode(name: string): AttentionMode {
  const mode = MODES.find((candidate) => candidate === name);
  if (mode !== undefined) return mode;
  throw new FewbitError("argument/unknown-name", { kind: "attention mode", name, nearest: nearestNames(name, MODES) });
}

/** Specification 20.2: probabilities meet v in e4m3 after multiplication by 2^8; row sums use the unrounded ones. */
export const FLOAT8_PROBABILITIES: NonNullable<SdpaAttrs["probabilities"]> = { codec: CODECS.e4m3, scale: 2 ** 8 };

/** A model's graph with its attention in the mode. */
export function withAttention(model: Graph, mode: AttentionMode): Graph {
  return mode === "auto" ? model : applyLowPrecisionAttention(model);
}

/**
 * Switches every sdpa over a cache to float8: queries, keys and values in e4m3, and probabilities as specification 20.2 has
 * them. That section quantizes whole sequences, with a scale a KV head; a cache grows token by token, so scales are per token and
 * head here. The rest of the graph is unchanged. Throws `graph/invalid` for an sdpa with a mask, without a cache, or with
 * operands that are stored already.
 */
export function applyLowPrecisionAttention(model: Graph): Graph {
  const format = FORMATS.float8_e4m3;
  const values: Value[] = [...model.values];
  const nodes: Node[] = [];
  const caches = new Set<ValueId>();
  const producer = new Map(model.nodes.flatMap((node) => node.outputs.map((id) => [id, node] as const)));
  for (const node of model.nodes) {
    if (node.op !== "sdpa") {
      nodes.push(node);
      continue;
    }
    const [q, k, v, ...rest] = node.inputs as readonly [ValueId, ValueId, ValueId, ...ValueId[]];
    const { attrs } = node;
    const where = values[node.outputs[0] as ValueId]?.name ?? "sdpa";
    const refuse = (reason: string) =>
      new FewbitError("graph/invalid", { where, reason: `float8 attention: ${reason}` });
    if (attrs.extras?.includes("mask")) throw refuse("it takes no mask");
    for (const id of [k, v]) {
      const write = producer.get(id);
      if (attrs.position === undefined || write?.op !== "kv_write")
        throw refuse("keys and values must come from a cache");
      // The state, and what the write makes of it.
      for (const cache of [write.inputs[0] as ValueId, id]) caches.add(cache);
    }
    const type = values[q]?.type;
    if (type?.kind !== "dense" || type.shape.length !== 2) throw refuse("queries must be float32 [T, heads * D]");
    const shape = [type.shape[0] as string | number, attrs.heads, (type.shape[1] as number) / attrs.heads];
    const quantized =
      values.push({ id: values.length, name: `${where}.q`, role: "value", type: { kind: "format", format, shape } }) -
      1;
    const quantize: Node = { op: "quantize", inputs: [q], outputs: [quantized], attrs: { format, heads: attrs.heads } };
    // Right after the rotation that makes the query, so that both fuse.
    const made = nodes.findIndex((candidate) => candidate.outputs.includes(q));
    nodes.splice(made + 1, 0, quantize);
    const out = node.outputs[0] as ValueId;
    nodes.push({
      ...node,
      inputs: [quantized, k, v, ...rest],
      outputs: [out],
      attrs: { ...attrs, probabilities: FLOAT8_PROBABILITIES },
    });
  }
  const stored = values.map((value) =>
    caches.has(value.id) && value.type.kind === "format" ? { ...value, type: { ...value.type, format } } : value,
  );
  return { ...model, values: stored, nodes };
}
