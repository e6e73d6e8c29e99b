import { sizeOf } from "../core/shape.js";
import type { Format } from "../formats/format.js";
import { FORMATS } from "../formats/table.js";
import type { Symbols } from "../ir/evaluate.js";
import { dense, type Graph, GraphBuilder, stored, type ValueId } from "../ir/graph.js";
import type { BinaryFn, UnaryFn } from "../ir/ops.js";
import type { DenseTensor, HostTensor } from "../ir/tensor.js";
import type { Row } from "./cases.js";
import { normals, random, randomTensor, seedOf } from "./cases-random.js";

export interface Settings {
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
}

/** What a row may say beside shapes. */
export interface Options {
  readonly bias?: boolean;
  readonly residual?: boolean;
  /** An rmsnorm before what the row is about. */
  readonly norm?: boolean;
  readonly unary?: UnaryFn;
  /** Of the unary softcap. */
  readonly cap?: number;
  /** silu(gate) * up, with this activation. */
  readonly gated?: UnaryFn;
  /** Three linears of one input, then rope and the cache. */
  readonly qkv?: boolean;
  /** The result is rounded to bf16, by whatever makes it. */
  readonly rounds?: boolean;
  /** Linears and norms one after another, as from one attention of a model to the next. */
  readonly chain?: boolean;
  /** Three linears whose heads are turned, rounded and stored in caches, as attention reads them. */
  readonly heads?: boolean;
  /** Elements of x span 80 powers of two. */
  readonly wide?: boolean;
  /** The linears declare short sums. */
  readonly fastAccum?: boolean;
  /** Queries and probabilities are bf16. */
  readonly bf16?: boolean;
  readonly binary?: BinaryFn;
  /** Both operands are the same value. */
  readonly same?: boolean;
  readonly scale?: number;
  readonly causal?: boolean;
  /** A value of a key that some queries of a run do not see yet is NaN. */
  readonly odd?: boolean;
  /** Gates add up to 1. */
  readonly normalize?: boolean;
  /** All slots of a token read one row of x. */
  readonly shared?: boolean;
  readonly settings?: Settings;
}

/** How rows of one op become graphs and inputs. */
export interface Recipe {
  /** The graph's symbols out of a run's. */
  symbols(run: Symbols): Symbols;
  build(row: Row, max: Symbols, seed: number): { graph: Graph; weights: ReadonlyMap<string, HostTensor> };
  inputs(row: Row, run: Symbols, seed: number): Readonly<Record<string, HostTensor>>;
}

/** A graph under construction together with its seeded weights. */
export class Sketch {
  readonly graph: GraphBuilder;
  readonly weights = new Map<string, HostTensor>();
  readonly #seed: number;

  constructor(symbols: Symbols, seed: number) {
    this.graph = new GraphBuilder({ ...symbols });
    this.#seed = seed;
  }

  matrix(name: string, format: Format, shape: readonly [rows: number, k: number]): ValueId {
    this.weights.set(name, randomTensor(format, shape, seedOf(this.#seed, name)));
    return this.graph.weight(name, stored(format, shape));
  }

  /** The value rounded to bf16, split into heads or not. */
  rounded(value: ValueId, heads?: number): ValueId {
    const attrs = { format: FORMATS.bf16, ...(heads === undefined ? {} : { heads }) };
    return this.graph.one("quantize", [value], attrs, `rounded${value}`);
  }

  vector(name: string, shape: readonly number[], values?: (index: number) => number): ValueId {
    const count = sizeOf(shape);
    const data =
      values === undefined
        ? normals(random(seedOf(this.#seed, name)), count)
        : Float32Array.from({ length: count }, (_, i) => values(i));
    this.weights.set(name, { dtype: "f32", shape, data });
    return this.graph.weight(name, dense("f32", shape));
  }

  done(outputs: Readonly<Record<string, ValueId>>): { graph: Graph; weights: ReadonlyMap<string, HostTensor> } {
    for (const [name, id] of Object.entries(outputs)) this.graph.output(name, id);
    return { graph: this.graph.build(), weights: this.weights };
  }
}

export const at = (shape: Row["shape"], name: string): number => shape[name] as number;
export const floats = (shape: readonly number[], seed: number, spread = 1): DenseTensor => ({
  dtype: "f32",
  shape,
  data: normals(random(seed), sizeOf(shape), spread),
});

/** The same numbers, each times a power of two between 2^-40 and 2^40. */
export function spreadOut(tensor: DenseTensor): DenseTensor {
  const data = Float32Array.from(tensor.data as Float32Array, (x, i) => x * 2 ** (((i * 37) % 81) - 40));
  return { dtype: "f32", shape: tensor.shape, data };
}

export const tokens = ({ T }: Symbols): Symbols => ({ T: T as number });
export const positions = ({ T, P }: Symbols): Symbols => ({ T: T as number, P: P as number });

/** Cosines and sines of 64 positions, as models make them. */
export function angles(sketch: Sketch, size: number, count: number): ValueId {
  return sketch.vector("angles", [count, size], (i) => {
    const [position, column] = [Math.floor(i / size), i % size];
    const angle = position * 10000 ** ((-2 * (column % (size / 2))) / size);
    return column < size / 2 ? Math.cos(angle) : Math.sin(angle);
  });
}

/** x [T, width] with the value the op needs; everything random. */
export const x =
  (width: number, spread = 1) =>
  (_: Row, run: Symbols, seed: number) => ({ x: floats([run.T as number, width], seed, spread) });
