import { products } from "../core/matmul.js";

/** What calibration keeps of the inputs of a linear: enough for every algorithm, and of one size however long the text is. */
export class InputStatistics {
  readonly k: number;
  /** sum of x x^T over all tokens, [k, k]. */
  readonly gram: Float64Array;
  /** sum of |x|, [k]. */
  readonly magnitudes: Float64Array;
  /** The largest |x|, [k]. */
  readonly maxima: Float32Array;
  tokens = 0;

  constructor(k: number) {
    this.k = k;
    this.gram = new Float64Array(k * k);
    this.magnitudes = new Float64Array(k);
    this.maxima = new Float32Array(k);
  }

  /** Adds inputs [tokens, k]. */
  observe(data: Float32Array): void {
    const { k, gram, magnitudes, maxima } = this;
    const tokens = data.length / k;
    const columns = new Float64Array(data.length);
    for (let t = 0; t < tokens; t++) {
      for (let i = 0; i < k; i++) {
        const value = data[t * k + i] as number;
        columns[i * tokens + t] = value;
        magnitudes[i] = (magnitudes[i] as number) + Math.abs(value);
        maxima[i] = Math.max(maxima[i] as number, Math.abs(value));
      }
    }
    const added = products(columns, columns, [k, k, tokens]);
    for (let i = 0; i < gram.length; i++) gram[i] = (gram[i] as number) + (added[i] as number);
    this.tokens += tokens;
  }
}

/** sum over the observed tokens of |D x|^2: the squared error of a linear's outputs when its weight is off by D [n, k]. */
export function outputError(difference: Float64Array, { gram, k }: Pick<InputStatistics, "gram" | "k">): number {
  const n = difference.length / k;
  const turned = products(difference, gram, [n, k, k]);
  let sum = 0;
  for (let i = 0; i < difference.length; i++) sum += (turned[i] as number) * (difference[i] as number);
  return sum;
}
