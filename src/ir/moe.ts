import { FewbitError } from "../core/errors.js";
import { formatKey } from "../formats/format.js";
import { type Dim, dense, type TensorType } from "./graph.js";
import { requireBlocks, requireDense, requireFormat, requireReal, requireShape } from "./require.js";
import type { DenseTensor } from "./tensor.js";

/**
 * A mixture of experts is three ops: `moe_route` picks S of E experts for each token, `moe_linear` multiplies each of a token's S
 * slots by its expert's weights, and `moe_combine` adds the slots up, each times its gate (Shazeer et al. 2017; Mixtral, 2024).
 */
export interface MoeRouteAttrs {
  /** S: experts a token. */
  readonly top: number;
  /** Gates are the softmax over the S experts chosen, and add up to 1; else over all E. */
  readonly normalize: boolean;
}

/** logits f32 [T, E] -> ids i32 [T, S], likeliest first, and gates f32 [T, S]. */
export function inferMoeRoute(types: readonly TensorType[], { top }: MoeRouteAttrs, where: string): TensorType[] {
  const logits = requireDense(types[0] as TensorType, "f32", `${where}.logits`);
  requireShape(logits, [undefined, undefined], `${where}.logits`);
  const [tokens, experts] = logits as readonly [Dim, number];
  if (!(Number.isInteger(top) && top >= 1 && top <= experts))
    throw new FewbitError("graph/invalid", { where, reason: `it cannot take ${top} of ${experts} experts` });
  return [dense("i32", [tokens, top]), dense("f32", [tokens, top])];
}

/**
 * x f32 or format [T, K], which all slots of a token share, or [T, S, K]; ids i32 [T, S]; E weights [N, K] of one format
 * -> f32 [T, S, N]: slot (t, s) is x W^T with the weights of expert ids[t, s].
 */
export function inferMoeLinear(types: readonly TensorType[], _attrs: unknown, where: string): TensorType[] {
  const [x, ids, ...weights] = types as readonly [TensorType, TensorType, ...TensorType[]];
  const shape = requireReal(x, `${where}.x`);
  const chosen = requireDense(ids, "i32", `${where}.ids`);
  requireShape(chosen, [undefined, undefined], `${where}.ids`);
  const [tokens, slots] = chosen as readonly [Dim, number];
  const k = shape.at(-1) as number;
  requireShape(shape, shape.length === 3 ? [tokens, slots, k] : [tokens, k], `${where}.x`);
  if (x.kind === "format") requireBlocks(x.format, k, `${where}.x`);
  const first = requireFormat(weights[0] as TensorType, `${where}.weights`);
  requireBlocks(first.format, k, `${where}.weights`);
  for (const weight of weights) {
    const { format, shape: own } = requireFormat(weight, `${where}.weights`);
    requireShape(own, [first.shape[0], k], `${where}.weights`);
    if (formatKey(format) !== formatKey(first.format))
      throw new FewbitError("dtype/mismatch", {
        what: `${where}.weights`,
        got: formatKey(format),
        expected: formatKey(first.format),
      });
  }
  return [dense("f32", [tokens, slots, first.shape[0] as Dim])];
}

/** x f32 [T, S, H], or [T, H] with S = 1; gates f32 [T, S] -> f32 [T, H]: the sum over s of gates[t, s] x[t, s]. */
export function inferMoeCombine(types: readonly TensorType[], _attrs: unknown, where: string): TensorType[] {
  const x = requireDense(types[0] as TensorType, "f32", `${where}.x`);
  const gates = requireDense(types[1] as TensorType, "f32", `${where}.gates`);
  const [tokens, width] = [x[0] as Dim, x.at(-1) as Dim];
  const slots = x.length === 3 ? x[1] : 1;
  requireShape(x, x.length === 3 ? [tokens, slots, width] : [tokens, width], `${where}.x`);
  requireShape(gates, [tokens, slots], `${where}.gates`);
  return [dense("f32", [tokens, width])];
}

/** The chosen experts of one token: the `top` largest logits in falling order, the lower id first among equals. */
export function chooseExperts(logits: ArrayLike<number>, top: number): number[] {
  const order = Array.from(logits, (_, id) => id);
  return order.sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b).slice(0, top);
}

/** The gates of one token's chosen experts: their share of the softmax over all experts, or over the chosen ones. */
export function expertGates(
  logits: ArrayLike<number>,
  chosen: readonly number[],
  { normalize }: MoeRouteAttrs,
): number[] {
  const most = logits[chosen[0] as number] as number;
  const weight = (id: number) => Math.exp((logits[id] as number) - most);
  const among = normalize ? chosen : Array.from(logits, (_, id) => id);
  const sum = among.reduce((total, id) => total + weight(id), 0);
  return chosen.map((id) => weight(id) / sum);
}

export function evaluateMoeRoute(logits: DenseTensor, attrs: MoeRouteAttrs): [ids: DenseTensor, gates: DenseTensor] {
  const [tokens, experts] = logits.shape as [number, number];
  const shape = [tokens, attrs.top];
  const ids = new Int32Array(tokens * attrs.top);
  const gates = new Float32Array(tokens * attrs.top);
  for (let t = 0; t < tokens; t++) {
    const row = logits.data.subarray(t * experts, (t + 1) * experts) as Float32Array;
    const chosen = chooseExperts(row, attrs.top);
    ids.set(chosen, t * attrs.top);
    gates.set(expertGates(row, chosen, attrs), t * attrs.top);
  }
  return [
    { dtype: "i32", shape, data: ids },
    { dtype: "f32", shape, data: gates },
  ];
}

/**
 * Slot by slot: `linear` computes the N outputs of one expert for row `row` of x. Ids clamp to the experts there are.
 * @param shared whether all slots of a token read its one row of x
 */
export function evaluateMoeLinear(
  ids: DenseTensor,
  experts: number,
  n: number,
  shared: boolean,
  linear: (row: number, expert: number) => Float32Array,
): DenseTensor {
  const [tokens, slots] = ids.shape as [number, number];
  const out = new Float32Array(tokens * slots * n);
  for (let slot = 0; slot < tokens * slots; slot++) {
    const expert = Math.min(Math.max(ids.data[slot] as number, 0), experts - 1);
    out.set(linear(shared ? Math.floor(slot / slots) : slot, expert), slot * n);
  }
  return { dtype: "f32", shape: [tokens, slots, n], data: out };
}

export function evaluateMoeCombine(x: DenseTensor, gates: DenseTensor): DenseTensor {
  const [tokens, slots] = gates.shape as [number, number];
  const width = x.shape.at(-1) as number;
  const out = new Float32Array(tokens * width);
  for (let t = 0; t < tokens; t++) {
    for (let k = 0; k < width; k++) {
      let sum = 0;
      for (let s = 0; s < slots; s++)
        sum += (gates.data[t * slots + s] as number) * (x.data[(t * slots + s) * width + k] as number);
      out[t * width + k] = sum;
    }
  }
  return { dtype: "f32", shape: [tokens, width], data: out };
}
