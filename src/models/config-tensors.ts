import type { DecoderConfig, LayerConfig } from "./config.js";
import { ARCHITECTURES } from "./config-architectures.js";

/** What a weight does in the decoder. The bias of a role is a role of its own. */
type Matrix =
  | "embedding"
  | "positions"
  | "q"
  | "k"
  | "v"
  | "o"
  | "gate"
  | "up"
  | "down"
  | "router"
  | "expertGate"
  | "expertUp"
  | "expertDown"
  | "sharedGate"
  | "sharedUp"
  | "sharedDown"
  | "sharedRouter"
  | "head";
type Norm = "attentionNorm" | "qNorm" | "kNorm" | "attentionPostNorm" | "mlpNorm" | "mlpPostNorm" | "finalNorm";
export type TensorRole = Matrix | Norm | `${Matrix | Norm}Bias`;

/** Where a weight lies in a checkpoint. */
export interface TensorSource {
  readonly name: string;
  /** Other names that checkpoints give it. */
  readonly alternatives: readonly string[];
  readonly shape: readonly number[];
  /** Stored as [in features, out features] (GPT-2's Conv1D). */
  readonly transposed: boolean;
  /** The first output feature of the weight, where a tensor holds several weights one after another. */
  readonly first: number;
}

/**
 * A weight that the decoder needs; matrices are [out features, in features]. `layer` is null outside the layers, `expert` outside
 * experts. `name` is that of its tensor, with the role in brackets where a tensor holds several weights.
 */
export interface TensorSpec {
  readonly role: TensorRole;
  readonly layer: number | null;
  readonly expert: number | null;
  readonly name: string;
  readonly shape: readonly number[];
  readonly source: TensorSource;
  /** Added to every element as it is loaded: 1 for norms that are stored as the difference from 1. */
  readonly offset: number;
}

type Shape = (config: DecoderConfig) => readonly number[];
interface TensorRow {
  /** One weight, or several that one tensor holds, in their order. */
  readonly role: TensorRole | readonly TensorRole[];
  /** `{layer}` and `{expert}` stand for their numbers. */
  readonly name: string;
  /** The shape of each weight. */
  readonly shape: Shape | readonly Shape[];
  readonly transposed?: true;
  /** Whether the model has this tensor; always, when left out. */
  readonly when?: (config: DecoderConfig, layer: LayerConfig) => boolean;
}

/** The tensors of a family in the order of the forward pass. */
export interface TensorTable {
  readonly before: readonly TensorRow[];
  readonly layer: readonly TensorRow[];
  readonly after: readonly TensorRow[];
  /** A prefix that some checkpoints leave out. */
  readonly optionalPrefix?: string;
}

type Width = (config: DecoderConfig) => number;
const hidden: Width = (c) => c.hiddenSize;
const inner: Width = (c) => c.intermediateSize;
const queries: Width = (c) => c.heads * c.headDim;
const keys: Width = (c) => c.kvHeads * c.headDim;
const head: Width = (c) => c.headDim;
const vocabulary: Width = (c) => c.vocabSize;
const expertInner: Width = (c) => c.experts?.intermediateSize ?? 0;
const sharedInner: Width = (c) => c.experts?.sharedIntermediateSize ?? 0;
const shape =
  (...widths: readonly Width[]): Shape =>
  (config) =>
    widths.map((width) => width(config));

const LAYER = "model.layers.{layer}";
const dense = (_: DecoderConfig, layer: LayerConfig) => !layer.sparse;
const sparse = (_: DecoderConfig, layer: LayerConfig) => layer.sparse;
const shared = (config: DecoderConfig, layer: LayerConfig) =>
  layer.sparse && config.experts?.sharedIntermediateSize != null;

/** A matrix and its bias. */
const linear = (role: Matrix, name: string, out: Width, input: Width, bias?: TensorRow["when"]): TensorRow[] => [
  { role, name: `${name}.weight`, shape: shape(out, input) },
  { role: `${role}Bias`, name: `${name}.bias`, shape: shape(out), when: bias ?? (() => false) },
];

const ATTENTION: readonly TensorRow[] = [
  ...linear("q", `${LAYER}.self_attn.q_proj`, queries, hidden, (c) => c.qkvBias),
  ...linear("k", `${LAYER}.self_attn.k_proj`, keys, hidden, (c) => c.qkvBias),
  ...linear("v", `${LAYER}.self_attn.v_proj`, keys, hidden, (c) => c.qkvBias),
];
const OUTPUT = linear("o", `${LAYER}.self_attn.o_proj`, hidden, queries, (c) => c.oBias);
const MLP: readonly TensorRow[] = [
  ...linear("gate", `${LAYER}.mlp.gate_proj`, inner, hidden, (c) => c.mlpBias),
  ...linear("up", `${LAYER}.mlp.up_proj`, inner, hidden, (c) => c.mlpBias),
  ...linear("down", `${LAYER}.mlp.down_proj`, hidden, inner, (c) => c.mlpBias),
];

const norm = (role: Norm, name: string, width: Width = hidden): TensorRow => ({
  role,
  name: `${LAYER}.${name}.weight`,
  shape: shape(width),
});
const HEAD_NORMS = [norm("qNorm", "self_attn.q_norm", head), norm("kNorm", "self_attn.k_norm", head)];

const OUTSIDE: Pick<TensorTable, "before" | "after"> = {
  before: [{ role: "embedding", name: "model.embed_tokens.weight", shape: shape(vocabulary, hidden) }],
  after: [
    { role: "finalNorm", name: "model.norm.weight", shape: shape(hidden) },
    { role: "head", name: "lm_head.weight", shape: shape(vocabulary, hidden), when: (c) => !c.tieEmbeddings },
  ],
};

/** Llama's order, which most of its descendants kept. */
const llama = (qkNorms: readonly TensorRow[], mlp: readonly TensorRow[], attention = ATTENTION): TensorTable => ({
  ...OUTSIDE,
  layer: [
    norm("attentionNorm", "input_layernorm"),
    ...attention,
    ...qkNorms,
    ...OUTPUT,
    norm("mlpNorm", "post_attention_layernorm"),
    ...mlp,
  ],
});

/** Norms before and after attention and MLP. */
const gemma = (qkNorms: readonly TensorRow[]): TensorTable => ({
  ...OUTSIDE,
  layer: [
    norm("attentionNorm", "input_layernorm"),
    ...ATTENTION,
    ...qkNorms,
    ...OUTPUT,
    norm("attentionPostNorm", "post_attention_layernorm"),
    norm("mlpNorm", "pre_feedforward_layernorm"),
    ...MLP,
    norm("mlpPostNorm", "post_feedforward_layernorm"),
  ],
});

/** The experts of a layer, by the names that gate, up and down have. */
const experts = (base: string, names: readonly [gate: string, up: string, down: string]): TensorRow[] =>
  (["expertGate", "expertUp", "expertDown"] as const).map((role, i) => ({
    role,
    name: `${base}.{expert}.${names[i]}.weight`,
    shape: role === "expertDown" ? shape(hidden, expertInner) : shape(expertInner, hidden),
    when: sparse,
  }));
const router = (name: string): TensorRow => ({
  role: "router",
  name: `${LAYER}.${name}.weight`,
  shape: (c) => [c.experts?.count ?? 0, c.hiddenSize],
  when: sparse,
});
const QWEN_EXPERTS: readonly TensorRow[] = [
  ...MLP.map((row): TensorRow => ({ ...row, when: (c, l) => dense(c, l) && (row.when?.(c, l) ?? true) })),
  router("mlp.gate"),
  ...experts(`${LAYER}.mlp.experts`, ["gate_proj", "up_proj", "down_proj"]),
];
const SHARED_EXPERT: readonly TensorRow[] = [
  ...(["sharedGate", "sharedUp", "sharedDown"] as const).map(
    (role): TensorRow => ({
      role,
      name: `${LAYER}.mlp.shared_expert.${role.slice(6).toLowerCase()}_proj.weight`,
      shape: role === "sharedDown" ? shape(hidden, sharedInner) : shape(sharedInner, hidden),
      when: shared,
    }),
  ),
  {
    role: "sharedRouter",
    name: `${LAYER}.mlp.shared_expert_gate.weight`,
    shape: (c) => [1, c.hiddenSize],
    when: shared,
  },
];

const BLOCK = "transformer.h.{layer}";
/** A matrix stored as [in, out], with its bias; q, k and v are one. */
const conv1d = (roles: readonly Matrix[], name: string, outs: readonly Width[], input: Width): TensorRow[] => [
  { role: roles, name: `${BLOCK}.${name}.weight`, shape: outs.map((out) => shape(out, input)), transposed: true },
  {
    role: roles.map((role): TensorRole => `${role}Bias`),
    name: `${BLOCK}.${name}.bias`,
    shape: outs.map((out) => shape(out)),
  },
];
const layernorm = (role: Norm, name: string): TensorRow[] => [
  { role, name: `${name}.weight`, shape: shape(hidden) },
  { role: `${role}Bias`, name: `${name}.bias`, shape: shape(hidden) },
];

/** The tensors of every family. */
export const TENSORS = {
  llama: llama([], MLP),
  qwen3: llama(HEAD_NORMS, MLP),
  phi3: llama(
    [],
    [
      {
        role: ["gate", "up"],
        name: `${LAYER}.mlp.gate_up_proj.weight`,
        shape: [shape(inner, hidden), shape(inner, hidden)],
      },
      ...linear("down", `${LAYER}.mlp.down_proj`, hidden, inner),
    ],
    [
      {
        role: ["q", "k", "v"],
        name: `${LAYER}.self_attn.qkv_proj.weight`,
        shape: [shape(queries, hidden), shape(keys, hidden), shape(keys, hidden)],
      },
    ],
  ),
  olmo2: {
    ...OUTSIDE,
    layer: [
      ...ATTENTION,
      norm("qNorm", "self_attn.q_norm", queries),
      norm("kNorm", "self_attn.k_norm", keys),
      ...OUTPUT,
      norm("attentionPostNorm", "post_attention_layernorm"),
      ...MLP,
      norm("mlpPostNorm", "post_feedforward_layernorm"),
    ],
  },
  gemma2: gemma([]),
  gemma3: gemma(HEAD_NORMS),
  mixtral: llama(
    [],
    [router("block_sparse_moe.gate"), ...experts(`${LAYER}.block_sparse_moe.experts`, ["w1", "w3", "w2"])],
  ),
  qwen2Moe: llama([], [...QWEN_EXPERTS, ...SHARED_EXPERT]),
  qwen3Moe: llama(HEAD_NORMS, QWEN_EXPERTS),
  gpt2: {
    optionalPrefix: "transformer.",
    before: [
      { role: "embedding", name: "transformer.wte.weight", shape: shape(vocabulary, hidden) },
      { role: "positions", name: "transformer.wpe.weight", shape: (c) => [c.contextLength, c.hiddenSize] },
    ],
    layer: [
      ...layernorm("attentionNorm", `${BLOCK}.ln_1`),
      ...conv1d(["q", "k", "v"], "attn.c_attn", [hidden, hidden, hidden], hidden),
      ...conv1d(["o"], "attn.c_proj", [hidden], hidden),
      ...layernorm("mlpNorm", `${BLOCK}.ln_2`),
      ...conv1d(["up"], "mlp.c_fc", [inner], hidden),
      ...conv1d(["down"], "mlp.c_proj", [hidden], inner),
    ],
    after: [
      ...layernorm("finalNorm", "transformer.ln_f"),
      { role: "head", name: "lm_head.weight", shape: shape(vocabulary, hidden), when: (c) => !c.tieEmbeddings },
    ],
  },
} as const satisfies Record<string, TensorTable>;

/** Every weight that a checkpoint of this model must hold, in the order of the forward pass. */
export function tensorSpecs(config: DecoderConfig): TensorSpec[] {
  const table: TensorTable = TENSORS[ARCHITECTURES[config.architecture].tensors];
  const outside: LayerConfig = { window: null, rope: null, sparse: false };
  const specs = (rows: readonly TensorRow[], layer: number | null): TensorSpec[] => {
    const kind = layer === null ? outside : (config.layerConfigs[layer] as LayerConfig);
    return rows
      .filter((row) => row.when?.(config, kind) ?? true)
      .flatMap((row) => {
        const name = row.name.replace("{layer}", String(layer));
        if (!name.includes("{expert}")) return weightsOf(row, name, layer, null, config, table.optionalPrefix);
        return Array.from({ length: config.experts?.count ?? 0 }, (_, expert) =>
          weightsOf(row, name.replace("{expert}", String(expert)), layer, expert, config, table.optionalPrefix),
        ).flat();
      });
  };
  const layers = config.layerConfigs.map((_, number) => specs(table.layer, number));
  return [...specs(table.before, null), ...layers.flat(), ...specs(table.after, null)];
}

/** The weights that a tensor holds. */
function weightsOf(
  row: TensorRow,
  name: string,
  layer: number | null,
  expert: number | null,
  config: DecoderConfig,
  prefix: string | undefined,
): TensorSpec[] {
  const roles = typeof row.role === "string" ? [row.role] : row.role;
  const shapes = (typeof row.shape === "function" ? [row.shape] : row.shape).map((of) => of(config));
  const rows = shapes.reduce((sum, of) => sum + (of[0] as number), 0);
  const whole = [rows, ...(shapes[0] as readonly number[]).slice(1)];
  const alternatives = prefix !== undefined && name.startsWith(prefix) ? [name.slice(prefix.length)] : [];
  const { transposed = false } = row;
  let first = 0;
  return roles.map((role, i) => {
    const of = shapes[i] as readonly number[];
    const source = { name, alternatives, shape: transposed ? whole.toReversed() : whole, transposed, first };
    first += of[0] as number;
    const offset = role.endsWith("Norm") ? config.norm.offset : 0;
    return { role, layer, expert, name: roles.length === 1 ? name : `${name}[${role}]`, shape: of, source, offset };
  });
}
