import type { Fault } from "./faults.js";

const ROUTE = "moe_route/f32/normalized";
const EXPERTS = "moe_linear/int4_tinygemm[1x32:bf16;zfloat:bf16]/shared";
const SLOTS = "moe_linear/int8[1xall:f32]*int8[1xall:f32]/slots";
const ODD_EXPERTS = "moe_linear/int8[1xall:f32]/k37_odd";

/** Faults of norms, positions, activations and experts. */
export const LAYER_FAULTS: readonly Fault[] = [
  {
    id: "rmsnorm: every head has the first one's mean square",
    programs: ["rmsnorm/f32/heads"],
    rewrite: [/\+ \(row % 4u\) \* 12u;/, ";"],
  },
  {
    id: "layernorm: the variance by the mean of squares",
    programs: ["layernorm/f32/h256"],
    rewrite: [
      /let d = x\[start \+ k\] - mean; square \+= d \* d;/,
      "let d = x[start + k]; square += d * d - mean * mean;",
    ],
  },
  {
    id: "layernorm: the mean stays",
    programs: ["layernorm/f32/h256"],
    rewrite: [/\(x\[start \+ k\] - mean\)/, "x[start + k]"],
  },
  { id: "layernorm: no bias", programs: ["layernorm/f32/h256"], rewrite: [/ \+ bias\[k\]/, ""] },
  {
    id: "embedding: the learned position of a text's start",
    programs: ["embedding/f32/learned_positions"],
    rewrite: [/positions\[\(params\.v\[0\]\.y \+ t\)/, "positions[(t)"],
  },
  {
    id: "rope: what is not rotated is",
    programs: ["rope/f32/partial"],
    rewrite: [/bits = select\(bits, x0\[start \+ e\], e >= 12u\);/, ""],
  },
  {
    id: "softcap: no cap",
    programs: ["unary/f32/softcap"],
    rewrite: [/sign\(x\) \* cap \* \(1\.0 - 2\.0 \/ \(e \+ 1\.0\)\)/, "x"],
  },
  { id: "sigmoid: of the other sign", programs: ["unary/f32/sigmoid"], rewrite: [/sigmoid\(a\[/, "sigmoid(-a["] },
  { id: "route: equal experts in falling order", programs: [ROUTE], rewrite: [/e > last_id/, "e < last_id"] },
  {
    id: "route: gates over all experts",
    programs: [ROUTE],
    rewrite: [/s < 4u; s\+\+\) \{ sum \+=/, "s < 3u; s++) { sum +="],
  },
  {
    id: "route: the largest logit is not subtracted",
    programs: ["moe_route/f32/all"],
    rewrite: [/- most\) \/ sum/, "- last) / sum"],
  },
  {
    id: "experts: the next one's rows",
    programs: [EXPERTS],
    kernel: "gemv",
    rewrite: [/let row = expert \* 37u/, "let row = (expert + 1u) * 37u"],
  },
  { id: "experts: another slot's expert", programs: [SLOTS], rewrite: [/ids\[slot\]/, "ids[slot / 3u * 3u]"] },
  {
    id: "experts: every slot reads the first one's input",
    programs: [SLOTS],
    rewrite: [/let m = slot;/, "let m = slot / 3u * 3u;"],
  },
  { id: "experts, plain: the tail of K", programs: [ODD_EXPERTS], rewrite: [/k < 37u/, "k < 36u"] },
  {
    id: "combine: gates of another token",
    programs: ["moe_combine/f32/slots"],
    rewrite: [/gates\[t \*/, "gates[(t ^ 1u) *"],
  },
  { id: "combine: the last slot is left out", programs: ["moe_combine/f32/slots"], rewrite: [/s < 4u/, "s < 3u"] },
];
