import { withScale } from "../formats/format.js";
import { writeCode } from "../formats/pack.js";
import type { StoredMatrix } from "../formats/stored-matrix.js";
import { CODECS, FORMATS } from "../formats/table.js";
import { type QuantizedTensor, tensorWords } from "../formats/tensor.js";
import type { TensorRole, TensorSpec } from "./config.js";

/*
 * Weights whose columns are stored in another order than their input's elements (GPTQ's act-order). Either what makes the input makes
 * it in that order already, or the input is multiplied by a permutation, a linear like any other.
 */

/** One bit an element, exactly 0 or 1. */
export const PERMUTATION = withScale(FORMATS.uint1, { block: [1, "all"], codec: CODECS.bf16 });
const ONE = 0x3f80;

const SUFFIX = "[order]";
/** The name of the permutation before the linear of a weight. */
export const permutationName = (weight: string): string => weight + SUFFIX;

/** The weight that a permutation stands before; null for other names. */
export const permutedWeight = (name: string): string | null =>
  name.endsWith(SUFFIX) ? name.slice(0, -SUFFIX.length) : null;

/** The matrix [k, k] that takes element order[i] of a row to place i. */
export function permutation(order: Uint32Array): QuantizedTensor {
  const shape = [order.length, order.length] as const;
  const words = tensorWords(PERMUTATION, shape);
  const qdata = new Uint32Array(words.qdata);
  const stride = words.qdata / order.length;
  for (const [row, column] of order.entries()) writeCode(qdata, row * stride, column, 1, 1);
  const scale = new Uint32Array(words.scales[0] as number);
  new Uint16Array(scale.buffer).fill(ONE, 0, order.length);
  return { format: PERMUTATION, shape, qdata, scales: [scale], zero: new Uint32Array(words.zero) };
}

/** Which weights make the input of another, row by column. */
const PRODUCERS: Partial<Readonly<Record<TensorRole, readonly TensorRole[]>>> = {
  down: ["gate", "up"],
  sharedDown: ["sharedGate", "sharedUp"],
};

/** The orders of rows, by name of a weight, that spare other weights (`spared`) their permutations. */
export interface FoldedOrders {
  readonly rows: ReadonlyMap<string, Uint32Array>;
  readonly spared: ReadonlySet<string>;
}

/** Finds the weights that can make the input of another in the order of its columns. */
export function foldOrders(
  specs: readonly TensorSpec[],
  storedOf: (spec: TensorSpec) => StoredMatrix | undefined,
): FoldedOrders {
  const rows = new Map<string, Uint32Array>();
  const spared = new Set<string>();
  for (const spec of specs) {
    const order = storedOf(spec)?.columns;
    const roles = PRODUCERS[spec.role];
    if (order === undefined || roles === undefined) continue;
    const of = (role: string) => specs.filter((other) => other.layer === spec.layer && other.role === role);
    const producers = roles.flatMap(of);
    const biased = roles.some((role) => of(`${role}Bias`).length > 0);
    if (biased || producers.length === 0 || !producers.every((producer) => movable(producer, storedOf(producer))))
      continue;
    for (const { name } of producers) rows.set(name, order);
    spared.add(spec.name);
  }
  return { rows, spared };
}

/** Whether a matrix can be loaded with its rows in another order. */
function movable({ source, shape }: TensorSpec, stored: StoredMatrix | undefined): boolean {
  if (stored?.blocks === undefined || source.shape[0] !== shape[0]) return false;
  return stored.format.scales.every(({ block }) => block[0] === 1);
}
