/** Products that one float8 instruction of Hopper's tensor cores adds to the accumulator. */
const STEP = 32;
/** What such an instruction truncates: it aligns its terms to the largest and keeps 13 bits below that one's first. */
const UNIT = 2 ** -13;

/**
 * How far a sum of K products that a linear with `fastAccum` declares may be from the exact one (docs/numerics.md). Every instruction
 * truncates 33 terms, its products and the accumulator, by less than UNIT times the largest, which is at most the `reach` of
 * the partial sums. What truncation takes from the accumulator has one sign and adds up over K / 32 instructions; what it
 * takes from products has theirs: the excess of one sign adds up, the rest is a random walk.
 */
export function shortSumBound(product: (j: number) => number, k: number): number {
  let [sum, high, low, largest, excess] = [0, 0, 0, 0, 0];
  for (let j = 0; j < k; j++) {
    const term = product(j);
    sum += term;
    largest = Math.max(largest, Math.abs(term));
    excess += Math.sign(term);
    if ((j + 1) % STEP === 0 || j + 1 === k) [high, low] = [Math.max(high, sum), Math.min(low, sum)];
  }
  // The sum of any stretch of K, wherever a kernel starts, is at most this.
  const reach = Math.max(high - low, largest);
  const steps = Math.ceil(k / STEP);
  return UNIT * reach * (steps + Math.abs(excess) + 2 * Math.sqrt((STEP + 1) * steps));
}
