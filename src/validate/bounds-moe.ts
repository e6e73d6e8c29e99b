import { sliceRows } from "../formats/tensor.js";
import { chooseExperts, expertGates, type MoeRouteAttrs } from "../ir/moe.js";
import { type DenseTensor, isDense } from "../ir/tensor.js";
import { ACCURACY, type Allowed, type Equal, halfUlp, type Near, result, TINY, U } from "./bounds-near.js";

/**
 * Gates are quotients of exponentials and a sum of them. Which experts are chosen has one answer, except where logits that are
 * themselves uncertain overlap: then nothing is known of the token, and its gates may be anything.
 */
export function moeRouteBound(logits: Near, attrs: MoeRouteAttrs): [Equal, Near] {
  const [tokens, experts] = logits.shape as [number, number];
  const { top, normalize } = attrs;
  const ids = new Int32Array(tokens * top);
  const gates: (readonly [value: number, error: number])[] = [];
  for (let t = 0; t < tokens; t++) {
    const row = logits.values.subarray(t * experts, (t + 1) * experts);
    const slack = logits.error.subarray(t * experts, (t + 1) * experts);
    const chosen = chooseExperts(row, experts);
    const used = chosen.slice(0, top);
    ids.set(used, t * top);
    const value = (id: number) => row[id] as number;
    const off = (id: number) => slack[id] as number;
    const certain = chosen.slice(0, Math.min(top, experts - 1)).every((id, i) => {
      const next = chosen[i + 1] as number;
      return off(id) + off(next) === 0 || value(id) - value(next) > off(id) + off(next);
    });
    const most = used[0] as number;
    const distance = (id: number) => value(most) - value(id);
    const own = (id: number) => Math.expm1(off(id) + off(most) + U * distance(id) + ACCURACY.exp(distance(id)));
    const among = normalize ? used : chosen;
    const mass = among.reduce((sum, id) => sum + Math.exp(-distance(id)), 0);
    const drift = among.reduce((sum, id) => sum + Math.exp(-distance(id)) * own(id), 0) / mass;
    const sum = drift + 2 * Math.sqrt(among.length) * U;
    for (const [s, gate] of expertGates(row, used, attrs).entries()) {
      const relative = Math.expm1(own(used[s] as number) + sum + ACCURACY.divide);
      gates.push([gate, certain ? gate * relative + halfUlp(gate) + TINY : Number.POSITIVE_INFINITY]);
    }
  }
  const shape = [tokens, top];
  const [gate] = result(shape, (i) => gates[i] as readonly [number, number]) as [Near];
  return [{ kind: "equal", tensor: { dtype: "i32", shape, data: ids } }, gate];
}

/** Every slot has the bound of a linear with its expert's weights. `shared`: all slots of a token read its one row of x. */
export function moeLinearBound(
  x: Allowed,
  ids: DenseTensor,
  experts: number,
  shared: boolean,
  linear: (row: Allowed, expert: number) => Near,
): Near[] {
  const [tokens, slots] = ids.shape as [number, number];
  const rows = Array.from({ length: tokens * slots }, (_, slot) =>
    linear(
      rowOf(x, shared ? Math.floor(slot / slots) : slot),
      Math.min(Math.max(ids.data[slot] as number, 0), experts - 1),
    ),
  );
  const n = rows[0]?.values.length ?? 0;
  return result([tokens, slots, n], (i) => {
    const row = rows[Math.floor(i / n)] as Near;
    return [row.values[i % n] as number, row.error[i % n] as number];
  });
}

/** One row of a linear's operand, as an operand. */
function rowOf(x: Allowed, row: number): Allowed {
  if (x.kind === "near") {
    const k = x.shape.at(-1) as number;
    const part = (list: Float64Array) => list.subarray(row * k, (row + 1) * k);
    return { kind: "near", shape: [1, k], values: part(x.values), error: part(x.error) };
  }
  if (x.kind === "equal" && !isDense(x.tensor)) return { kind: "equal", tensor: sliceRows(x.tensor, row, row + 1) };
  throw new Error("a float32 or an exact stored operand is expected");
}

/** S products and their sum. */
export function moeCombineBound(x: Near, gates: Near): Near[] {
  const [tokens, slots] = gates.shape as [number, number];
  const width = x.shape.at(-1) as number;
  return result([tokens, width], (i) => {
    const [t, k] = [Math.floor(i / width), i % width];
    let [value, size, passed] = [0, 0, 0];
    for (let s = 0; s < slots; s++) {
      const [at, gate] = [(t * slots + s) * width + k, t * slots + s];
      const [a, b] = [x.values[at] as number, gates.values[gate] as number];
      const [da, db] = [x.error[at] as number, gates.error[gate] as number];
      value += a * b;
      size += Math.abs(a * b);
      passed += Math.abs(b) * da + Math.abs(a) * db + da * db;
    }
    return [value, 2 * Math.sqrt(slots) * U * size + passed + slots * TINY + halfUlp(value, passed)];
  });
}
