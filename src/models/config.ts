import { parseScheme } from "../io/quantized.js";
import {
  ACTIVATIONS,
  ARCHITECTURES,
  type Architecture,
  type ArchitectureName,
  NEUTRAL,
} from "./config-architectures.js";
import { Fields, invalid, type Json, unsupported } from "./config-fields.js";
import { type RopeConfig, ropesOf, scaledContext } from "./config-rope.js";

export type { ArchitectureName } from "./config-architectures.js";
export type { RopeConfig, RopeScaling } from "./config-rope.js";
export { type TensorRole, type TensorSource, type TensorSpec, tensorSpecs } from "./config-tensors.js";

/** The function between the MLP's projections. `gelu` is exact (erf), `gelu_tanh` its tanh approximation. */
export type Activation = "silu" | "gelu" | "gelu_tanh" | "relu";

/** What layers differ in. */
export interface LayerConfig {
  /** A token sees this many tokens, itself among them; null when it sees all. */
  readonly window: number | null;
  /** The one of `ropes` that turns queries and keys; null where nothing does. */
  readonly rope: number | null;
  /** Whether its MLP is a mixture of experts. */
  readonly sparse: boolean;
}

/** A mixture of experts in the place of an MLP. */
export interface ExpertConfig {
  readonly count: number;
  /** Experts that a token passes through. */
  readonly active: number;
  readonly intermediateSize: number;
  /** Of an expert that every token passes through, times the sigmoid of a gate of its own; null without one. */
  readonly sharedIntermediateSize: number | null;
  /** Gates add up to 1. */
  readonly normalize: boolean;
}

/** Everything the decoder's graph builder needs to know about a model: data, independent of any weight. */
export interface DecoderConfig {
  /** The architecture's name in Hugging Face `config.json`. */
  readonly architecture: ArchitectureName;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  /** Of the MLPs that are no experts. */
  readonly intermediateSize: number;
  readonly layers: number;
  /** One entry a layer. */
  readonly layerConfigs: readonly LayerConfig[];
  /** Query heads; `kvHeads` divides it. */
  readonly heads: number;
  readonly kvHeads: number;
  /** Elements of one head; even with a rotary embedding. */
  readonly headDim: number;
  /** The most positions the model was made for. */
  readonly contextLength: number;
  /** `offset` is added to the weights as they are stored. */
  readonly norm: { readonly kind: "rmsnorm" | "layernorm"; readonly eps: number; readonly offset: 0 | 1 };
  /** The rotary embeddings that layers choose from; none where positions are learned. */
  readonly ropes: readonly RopeConfig[];
  /** Scores are this times q k; with a soft-cap c they become c tanh(score / c). */
  readonly attention: { readonly scale: number; readonly softcap: number | null };
  /** Embeddings are multiplied by this. */
  readonly embeddingScale: number;
  /** Logits become c tanh(logit / c); null leaves them. */
  readonly logitSoftcap: number | null;
  readonly activation: Activation;
  readonly experts: ExpertConfig | null;
  /** The head is the embedding table, and the checkpoint need not hold `lm_head`. */
  readonly tieEmbeddings: boolean;
  readonly qkvBias: boolean;
  readonly oBias: boolean;
  readonly mlpBias: boolean;
  /** As config.json states it; the tokenizer's files may say more. */
  readonly bosId: number | null;
  /** Any of these ends a text; as config.json states them. */
  readonly eosIds: readonly number[];
}

const MAX_LAYERS = 4096;

/**
 * Reads a parsed Hugging Face `config.json`. Whatever would change the numbers and is not supported is refused by name,
 * before any weight is read.
 * @throws FewbitError `model/unsupported` (architecture, activation, rope scaling, layer type, a field of another model, a way of
 *   quantizing), `model/config` (a field that is missing, of the wrong type, or contradicts another)
 */
export function parseConfig(json: Json): DecoderConfig {
  const architecture = architectureOf(json);
  const row: Architecture = ARCHITECTURES[architecture];
  const fields = new Fields(json, row.names);
  const { absent } = row;
  const vocabSize = fields.integer("vocab_size");
  const hiddenSize = fields.integer("hidden_size");
  const layers = fields.integer("num_hidden_layers", MAX_LAYERS);
  const heads = fields.integer("num_attention_heads");
  const kvHeads = fields.optionalInteger("num_key_value_heads", absent.num_key_value_heads) ?? heads;
  if (heads % kvHeads !== 0)
    throw invalid("num_key_value_heads", kvHeads, `a divisor of num_attention_heads = ${heads}`);
  const headDim = fields.optionalInteger("head_dim", absent.head_dim) ?? hiddenSize / heads;
  if (!Number.isInteger(headDim))
    throw invalid(
      fields.name("hidden_size"),
      hiddenSize,
      `a multiple of num_attention_heads = ${heads} when head_dim is absent`,
    );
  if (row.rope !== null && headDim % 2 !== 0) throw invalid("head_dim", headDim, "an even number, for rotary pairs");
  const trained = fields.integer("max_position_embeddings");
  const ropes = row.rope === null ? [] : ropesOf(fields, { headDim, contextLength: trained, rules: row.rope });
  const contextLength = ropes[0] === undefined ? trained : scaledContext(trained, ropes[0]);
  checkNeutral(fields, row);
  parseScheme(json.quantization_config);
  const scalar = row.queryScalar === undefined ? headDim : fields.positive("query_pre_attn_scalar", row.queryScalar);
  const softcap = (field: string, counts: boolean | undefined) =>
    counts ? fields.optionalPositive(field, null) : null;
  return {
    architecture,
    vocabSize,
    hiddenSize,
    intermediateSize: intermediateSize(fields, row, hiddenSize),
    layers,
    layerConfigs: layerConfigs(fields, row, { layers, contextLength, ropes: ropes.length }),
    heads,
    kvHeads,
    headDim,
    contextLength,
    norm: { ...row.norm, eps: fields.positive("rms_norm_eps") },
    ropes,
    attention: {
      scale: 1 / Math.sqrt(scalar),
      softcap: softcap("attn_logit_softcapping", row.softcaps?.attention),
    },
    embeddingScale: row.scaledEmbedding ? Math.sqrt(hiddenSize) : 1,
    logitSoftcap: softcap("final_logit_softcapping", row.softcaps?.logits),
    activation: activationOf(fields, absent.hidden_act),
    experts: expertsOf(fields, row),
    tieEmbeddings: fields.boolean("tie_word_embeddings", absent.tie_word_embeddings),
    qkvBias: flag(fields, row.qkvBias),
    oBias: flag(fields, row.oBias),
    mlpBias: flag(fields, row.mlpBias),
    bosId: fields.tokenIds("bos_token_id", vocabSize)[0] ?? null,
    eosIds: fields.tokenIds("eos_token_id", vocabSize),
  };
}

function architectureOf(json: Json): ArchitectureName {
  const names = json.architectures;
  const name = Array.isArray(names) && names.length === 1 ? names[0] : undefined;
  if (typeof name !== "string") throw invalid("architectures", names, "a list of one architecture name");
  if (!Object.hasOwn(ARCHITECTURES, name)) throw unsupported("architecture", name, Object.keys(ARCHITECTURES));
  return name as ArchitectureName;
}

/** Refuses fields whose value changes the numbers in a way that nothing here computes. */
function checkNeutral(fields: Fields, row: Architecture): void {
  const used = [
    ...(row.softcaps?.attention ? ["attn_logit_softcapping"] : []),
    ...(row.softcaps?.logits ? ["final_logit_softcapping"] : []),
  ];
  for (const [field, neutral] of Object.entries({ ...NEUTRAL, ...row.only })) {
    const value = fields.raw(field) ?? neutral;
    if (used.includes(field) || value === neutral || value === null) continue;
    throw unsupported(field, String(value), [neutral === undefined || neutral === null ? "none" : String(neutral)]);
  }
}

/** GPT-2 leaves it null, for four times the width. */
function intermediateSize(fields: Fields, row: Architecture, hiddenSize: number): number {
  if (row.tensors === "gpt2") return fields.optionalInteger("intermediate_size", null) ?? 4 * hiddenSize;
  return fields.integer("intermediate_size");
}

const LAYER_TYPES = ["full_attention", "sliding_attention"];

function layerConfigs(
  fields: Fields,
  row: Architecture,
  { layers, contextLength, ropes }: { layers: number; contextLength: number; ropes: number },
): LayerConfig[] {
  const types = fields.list("layer_types");
  const known = row.windows?.typed ? LAYER_TYPES : LAYER_TYPES.slice(0, 1);
  const other = types?.find((type) => !known.includes(String(type)));
  if (other !== undefined) throw unsupported("layer_types entry", String(other), known);
  if (types !== null && types.length < layers)
    throw invalid("layer_types", types, `an entry for each of ${layers} layers`);
  const window = windowOf(fields, row, contextLength);
  return Array.from({ length: layers }, (_, layer) => {
    const slides = types !== null && row.windows?.typed ? types[layer] === "sliding_attention" : null;
    const sliding = slides ?? row.windows?.slides(fields, layer) ?? false;
    const turned = ropes > 0 && (row.rotates?.(fields, layer) ?? true);
    return {
      window: sliding ? window : null,
      rope: turned ? (sliding && ropes > 1 ? 1 : 0) : null,
      sparse: row.experts?.sparse(fields, layer) ?? false,
    };
  });
}

/** The window of the layers that have one. One that reaches over the whole context changes nothing: null. */
function windowOf(fields: Fields, row: Architecture, contextLength: number): number | null {
  if (row.windows === null) return null;
  if (row.windows.switch !== null && !fields.boolean(row.windows.switch, false)) return null;
  const raw = fields.raw("sliding_window");
  const window = raw === undefined ? row.absent.sliding_window : raw;
  if (window === null) return null;
  if (typeof window !== "number" || !Number.isInteger(window) || window < 1)
    throw invalid("sliding_window", window, "a positive integer or null");
  return window >= contextLength ? null : window;
}

function expertsOf(fields: Fields, { experts: rules }: Architecture): ExpertConfig | null {
  if (rules === undefined) return null;
  const count = fields.integer(
    rules.count.find((field) => fields.raw(field) !== undefined) ?? (rules.count[0] as string),
  );
  const active = fields.integer("num_experts_per_tok");
  if (active > count) throw invalid("num_experts_per_tok", active, `at most ${count}, the number of experts`);
  return {
    count,
    active,
    intermediateSize: fields.integer(rules.intermediate),
    sharedIntermediateSize: rules.shared === null ? null : fields.integer(rules.shared),
    normalize: flag(fields, rules.normalize),
  };
}

function activationOf(fields: Fields, absent: string | undefined): Activation {
  const field = fields.name("hidden_act");
  const name = fields.raw("hidden_act") ?? absent;
  if (typeof name !== "string") throw invalid(field, name, "the name of an activation");
  const activation = Object.hasOwn(ACTIVATIONS, name) ? ACTIVATIONS[name] : undefined;
  if (!activation) throw unsupported(field, name, Object.keys(ACTIVATIONS));
  return activation;
}

function flag(fields: Fields, from: Architecture["qkvBias"]): boolean {
  return typeof from === "boolean" ? from : fields.boolean(from.field, from.absent);
}
