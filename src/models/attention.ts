import { FewbitError, nearestNames } from "../core/errors.js";
import { CODECS, FORMATS } from "../formats/table.js";
import type { Dim, Graph, Node, TensorType, Value, ValueId } from "../ir/graph.js";
import { OPS, type SdpaAttrs } from "../ir/ops.js";
import type { Hadamard } from "../quantize/attention.js";

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
 * head here. `hadamard` transforms queries, keys and values, or values alone, before they are quantized, which spreads outliers
 * over a head; what is attended is transformed back. The rest of the graph is unchanged. Throws `graph/invalid` for an sdpa
 * with a mask, without a cache, or with stored queries, and for a cache that several sdpa or other nodes share, `shape/mismatch`
 * for a transform of heads that are no power of two.
 */
export function applyLowPrecisionAttention(model: Graph, options: { readonly hadamard?: Hadamard } = {}): Graph {
  const { hadamard = "NONE" } = options;
  const format = FORMATS.float8_e4m3;
  const values: Value[] = [...model.values];
  const nodes: Node[] = [...model.nodes];
  const nameOf = (id: ValueId) => values[id]?.name ?? `value ${id}`;
  const add = (name: string, type: TensorType): ValueId =>
    values.push({ id: values.length, name, role: "value", type }) - 1;
  const change = (id: ValueId, type: TensorType) => {
    values[id] = { ...(values[id] as Value), type };
  };
  /** The index behind the node that makes a value; 0 for what no node makes. */
  const behind = (id: ValueId) => nodes.findIndex(({ outputs }) => outputs.includes(id)) + 1;
  const transformed = (x: ValueId, heads: number, at: number): ValueId => {
    const type = (values[x] as Value).type;
    OPS.hadamard.infer([type], { heads }, nameOf(x));
    const id = add(`${nameOf(x)}.hadamard`, type);
    nodes.splice(at, 0, { op: "hadamard", inputs: [x], outputs: [id], attrs: { heads } });
    return id;
  };

  for (const node of model.nodes) {
    if (node.op !== "sdpa") continue;
    const { attrs } = node;
    const out = node.outputs[0] as ValueId;
    const [q, k, v, ...rest] = node.inputs as readonly [ValueId, ValueId, ValueId, ...ValueId[]];
    const refuse = (reason: string) =>
      new FewbitError("graph/invalid", { where: nameOf(out), reason: `float8 attention: ${reason}` });
    if (attrs.extras?.includes("mask")) throw refuse("it takes no mask");
    const type = values[q]?.type;
    if (type?.kind !== "dense" || type.shape.length !== 2) throw refuse("queries must be float32 [T, heads * D]");
    for (const [cache, turn] of [
      [k, hadamard === "QKV"],
      [v, hadamard !== "NONE"],
    ] as const) {
      const at = nodes.findIndex((candidate) => candidate.outputs.includes(cache));
      const write = nodes[at];
      if (attrs.position === undefined || write?.op !== "kv_write")
        throw refuse("keys and values must come from a cache");
      const [state, x, ...pages] = write.inputs as readonly [ValueId, ValueId, ...ValueId[]];
      const readers = model.nodes.filter(({ inputs }) => inputs.includes(cache) || inputs.includes(state));
      if (readers.length > 2) throw refuse("its cache has other readers");
      // The state, and what the write makes of it.
      for (const id of [state, cache]) change(id, { kind: "format", format, shape: (values[id] as Value).type.shape });
      if (turn) {
        const turned = transformed(x, attrs.kvHeads, nodes.indexOf(write));
        const moved = nodes.indexOf(write);
        nodes[moved] = { ...write, inputs: [state, turned, ...pages] };
      }
    }
    const { heads } = attrs;
    const [tokens, width] = type.shape as readonly [Dim, number];
    const query = hadamard === "QKV" ? transformed(q, heads, behind(q)) : q;
    const quantized = add(`${nameOf(out)}.q`, { kind: "format", format, shape: [tokens, heads, width / heads] });
    nodes.splice(behind(query), 0, { op: "quantize", inputs: [query], outputs: [quantized], attrs: { format, heads } });
    // What was attended with transformed values keeps the name that its readers know once it is transformed back.
    const attended = hadamard === "NONE" ? out : add(`${nameOf(out)}.attended`, type);
    const at = nodes.findIndex((candidate) => candidate.outputs.includes(out));
    const switched: Node = {
      ...node,
      inputs: [quantized, k, v, ...rest],
      outputs: [attended],
      attrs: { ...attrs, probabilities: FLOAT8_PROBABILITIES },
    };
    const back: Node = { op: "hadamard", inputs: [attended], outputs: [out], attrs: { heads } };
    nodes.splice(at, 1, switched, ...(attended === out ? [] : [back]));
  }
  return { ...model, values, nodes };
}
