import { type Format, withScale } from "../formats/format.js";
import { FORMATS } from "../formats/table.js";
import type { OpName } from "../ir/ops.js";
import type { Row } from "./cases.js";

const { f32 } = FORMATS;

/** Mixtures of experts: routing, the chosen experts' weights, their sum. */
export function expertRows(): Row[] {
  const rows: Row[] = [];
  const add = (op: OpName, variant: string, format: Format, shape: Row["shape"], more: Partial<Row> = {}) =>
    void rows.push({ op, variant, format, shape, runs: [{ T: 1 }, { T: 5 }], quick: true, ...more });
  for (const normalize of [false, true])
    add("moe_route", normalize ? "normalized" : "all", f32, { experts: 60, top: 4 }, { options: { normalize } });
  add("moe_route", "one_of_three", f32, { experts: 3, top: 1 }, { quick: false });
  const shape = { n: 37, k: 96, experts: 6, top: 3 };
  const { bf16, int8, int4_tinygemm, mxfp4, float8_e4m3 } = FORMATS;
  for (const [i, format] of [
    f32,
    int8,
    withScale(int4_tinygemm, { block: [1, 32] }),
    mxfp4,
    bf16,
    float8_e4m3,
  ].entries()) {
    add("moe_linear", "shared", format, shape, { options: { shared: true }, quick: i < 4 });
    add("moe_linear", "slots", format, shape, { quick: i < 4 });
  }
  add("moe_linear", "slots", int8, shape, { activation: int8 });
  add(
    "moe_linear",
    "shared",
    int8,
    { ...shape, top: 1 },
    { activation: FORMATS.int8_asymmetric, options: { shared: true } },
  );
  add("moe_linear", "k37_odd", int8, { ...shape, k: 37 }, { quick: false });
  add("moe_linear", "tall", bf16, { n: 300, k: 128, experts: 5, top: 2 }, { quick: false });
  add("moe_combine", "slots", f32, { width: 333, top: 4 });
  add("moe_combine", "one", f32, { width: 37 });
  return rows;
}
