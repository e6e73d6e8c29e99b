import { codecName, type Format } from "../../../formats/format.js";
import type { BoundStep } from "../../../plan/step.js";
import { formatsOf, isInteger, isSeparable, partsOf, scaleRun, stepObstacle } from "./linear-arguments.js";

/** How scales are applied; in the order of `Promote` in skinny-params.cuh. */
const PROMOTE = ["end", "scaled", "integer"] as const;
/** Elements of a segment, the unit of the walk along K. */
export const SEGMENT = 32;

/** Blocks of 16 elements whose scales are exact in bf16 together with the codes, which they multiply. */
const folds = ({ element, scales }: Format): boolean =>
  codecName(element) === "e2m1" && scales[0]?.block.join() === "1,16" && codecName(scales[0].codec) === "e4m3";

/** Why stored codes cannot be decoded where they are multiplied, `chunk` segments at a time, or null. */
export function decodedObstacle(bound: BoundStep, chunk: number): string | null {
  const obstacle = stepObstacle(bound);
  if (obstacle !== null) return obstacle;
  const { weight, x, k } = formatsOf(bound);
  if (x !== null && isInteger(x) && isInteger(weight) && !isSeparable(x, k))
    return "scales of integer activations change along K: their exact sums end inside a segment";
  const run = scaleRun(weight, k);
  if (run >= k || folds(weight)) return null;
  const segments = run / SEGMENT;
  const divides = Number.isInteger(segments) && (chunk % segments === 0 || segments % chunk === 0);
  return divides ? null : `its scale changes every ${run} elements, which chunks of ${chunk * SEGMENT} do not fit`;
}

/** Where partial sums meet their scales, after how many segments (`chunk` at most), and as how many bf16 an element of x goes in. */
export function promotion(bound: BoundStep, chunk: number) {
  const { weight, x, k } = formatsOf(bound);
  const run = scaleRun(weight, k);
  const fold = folds(weight);
  const scaled = weight.zero.domain === "float" || (run < k && !fold);
  const integer = x !== null && isInteger(x) && isInteger(weight);
  const promote: (typeof PROMOTE)[number] = scaled ? "scaled" : integer ? "integer" : "end";
  const unit = scaled && run < k ? Math.min(chunk, run / SEGMENT) : chunk;
  const separable = x !== null && isSeparable(x, k);
  const parts = partsOf(x, k);
  return { unit, parts, args: [PROMOTE.indexOf(promote), unit, fold, separable, parts] as const };
}
