import { decodeTable, encoder, maxValue } from "../formats/codec.js";
import { CODECS } from "../formats/table.js";

/** How an optimizer keeps a state (specification 23): a map of values, or e4m3. */
export type StateKind = "8bit_signed" | "8bit_unsigned" | "4bit_signed" | "4bit_unsigned" | "fp8";

/** The sorted values of a state map, float32. */
export function stateMap(kind: Exclude<StateKind, "fp8">): Float32Array {
  if (kind === "4bit_unsigned") return Float32Array.from({ length: 16 }, (_, i) => (i + 1) / 16);
  return kind === "4bit_signed" ? dynamicMap(true, 3, 4) : dynamicMap(kind === "8bit_signed", 7, 8);
}

/** bitsandbytes' dynamic map: decades of linearly spaced fractions, with 0 and 1 (23). */
function dynamicMap(signed: boolean, exponents: number, bits: number): Float32Array {
  const tenth = Math.fround(0.1);
  const values = [0, 1];
  for (let i = 0; i < exponents; i++) {
    const count = 2 ** (i + bits - 1 - exponents + (signed ? 0 : 1)) + 1;
    const step = Math.fround(Math.fround(1 - tenth) / (count - 1));
    // float64 holds the product and sum, so that rounding once makes the fused multiply-add of the original.
    const line = Array.from({ length: count }, (_, k) =>
      Math.fround(k < Math.floor(count / 2) ? tenth + step * k : 1 - step * (count - 1 - k)),
    );
    const decade = Math.fround(10 ** (i - exponents + 1));
    for (let k = 0; k + 1 < count; k++) {
      const middle = Math.fround(Math.fround((line[k] as number) + (line[k + 1] as number)) / 2);
      const value = Math.fround(decade * middle);
      values.push(value);
      if (signed) values.push(-value);
    }
  }
  return Float32Array.from(values).sort();
}

/** A state as it is kept: one code per element (unpacked) and one scale per block. */
export interface OptimState {
  readonly codes: Uint8Array;
  readonly scale: Float32Array;
}

/** Quantizes a state block by block; its length is a multiple of `blockSize` (23). */
export function quantizeState(values: Float32Array, kind: StateKind, blockSize: number): OptimState {
  const codes = new Uint8Array(values.length);
  const scale = new Float32Array(values.length / blockSize);
  const encode = kind === "fp8" ? encoder(CODECS.e4m3) : mapEncoder(stateMap(kind));
  const divisor = kind === "fp8" ? maxValue(CODECS.e4m3) : 1;
  for (let block = 0; block < scale.length; block++) {
    let amax = Math.fround(1e-12);
    for (let i = block * blockSize; i < (block + 1) * blockSize; i++)
      amax = Math.max(amax, Math.abs(values[i] as number));
    const s = Math.fround(amax / divisor);
    scale[block] = s;
    for (let i = block * blockSize; i < (block + 1) * blockSize; i++)
      codes[i] = encode(Math.fround((values[i] as number) / s));
  }
  return { codes, scale };
}

/** The nearest entry of a sorted map, ties up. */
function mapEncoder(map: Float32Array): (value: number) => number {
  return (value) => {
    let low = 0;
    let high = map.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (value >= (map[middle] as number)) low = middle;
      else high = middle;
    }
    if (low + 1 === map.length) return low;
    const [below, above] = [map[low] as number, map[low + 1] as number];
    return Math.fround(value - below) >= Math.fround(Math.fround(above - below) * 0.5) ? low + 1 : low;
  };
}

export function dequantizeState(state: OptimState, kind: StateKind): Float32Array {
  const map = kind === "fp8" ? decodeTable(CODECS.e4m3) : stateMap(kind);
  const blockSize = state.codes.length / state.scale.length;
  return Float32Array.from(
    state.codes,
    (code, i) => (map[code] as number) * (state.scale[Math.floor(i / blockSize)] as number),
  );
}

export interface AdamOptions {
  readonly lr?: number;
  readonly betas?: readonly [number, number];
  readonly eps?: number;
  readonly weightDecay?: number;
  /** AdamW's decoupled decay; otherwise the decay joins the gradient. */
  readonly decoupled?: boolean;
  readonly bits: 8 | 4 | "fp8";
  /** Default 256, 128 for 4 bits. */
  readonly blockSize?: number;
}

/**
 * Adam with low-bit states (23). States shorter than 4,096 elements, or not a multiple of the block, stay in float32.
 * Parameters are updated in place with the moments before they are stored.
 */
export class LowBitAdam {
  readonly #options: Required<AdamOptions>;
  readonly #moments: { kind: StateKind; state: OptimState | Float32Array }[];
  #step = 0;

  constructor(size: number, options: AdamOptions) {
    const blockSize = options.blockSize ?? (options.bits === 4 ? 128 : 256);
    const decoupled = options.decoupled ?? true;
    this.#options = {
      lr: 1e-3,
      betas: [0.9, 0.999],
      eps: 1e-8,
      weightDecay: decoupled ? 1e-2 : 0,
      ...options,
      decoupled,
      blockSize,
    };
    const quantized = size >= 4096 && size % blockSize === 0;
    const kinds: StateKind[] =
      options.bits === "fp8" ? ["fp8", "fp8"] : [`${options.bits}bit_signed`, `${options.bits}bit_unsigned`];
    this.#moments = kinds.map((kind) => ({
      kind,
      state: quantized
        ? { codes: new Uint8Array(size), scale: new Float32Array(size / blockSize) }
        : new Float32Array(size),
    }));
  }

  /** The stored first and second moment. */
  get moments(): readonly (OptimState | Float32Array)[] {
    return this.#moments.map((moment) => moment.state);
  }

  step(parameters: Float32Array, gradient: Float32Array): void {
    const { lr, betas, eps, weightDecay, decoupled } = this.#options;
    this.#step++;
    const [m, v] = this.#moments.map(({ state, kind }) =>
      state instanceof Float32Array ? state : dequantizeState(state, kind),
    ) as [Float32Array, Float32Array];
    const first = 1 - betas[0] ** this.#step;
    const second = Math.sqrt(1 - betas[1] ** this.#step);
    for (let i = 0; i < parameters.length; i++) {
      let p = parameters[i] as number;
      let g = gradient[i] as number;
      if (decoupled) p = Math.fround(p - lr * weightDecay * p);
      else g = Math.fround(g + weightDecay * p);
      m[i] = (m[i] as number) + (g - (m[i] as number)) * (1 - betas[0]);
      v[i] = (v[i] as number) + (g * g - (v[i] as number)) * (1 - betas[1]);
      parameters[i] = p - (lr * ((m[i] as number) / first)) / (Math.sqrt(v[i] as number) / second + eps);
    }
    for (const [i, values] of [m, v].entries()) {
      const moment = this.#moments[i];
      if (moment === undefined || moment.state instanceof Float32Array) continue;
      moment.state = quantizeState(values, moment.kind, this.#options.blockSize);
    }
  }
}
