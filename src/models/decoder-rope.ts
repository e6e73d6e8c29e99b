import type { TensorRows } from "../ir/tensor.js";
import type { DecoderConfig } from "./config.js";
import type { RopeConfig } from "./config-rope.js";

/** The weight that holds the angles of a rotary embedding; it is in no checkpoint. */
export const ROPE_TABLE = "rope.table";
export const ropeTableName = (rope: number): string => (rope === 0 ? ROPE_TABLE : `${ROPE_TABLE}.${rope}`);

/** Positions whose angles are computed at once. */
const POSITIONS = 4096;

/** The tables of a model by name. */
export function ropeTables(config: DecoderConfig, capacity: number): Map<string, TensorRows> {
  return new Map(
    config.ropes.map(({ rotary }, i) => {
      const tiles = function* () {
        const memory = new Float32Array(Math.min(POSITIONS, capacity) * rotary);
        for (let begin = 0; begin < capacity; begin += POSITIONS) {
          const rows = Math.min(POSITIONS, capacity - begin);
          const data = fillTable(config, capacity, i, begin, memory.subarray(0, rows * rotary));
          yield { dtype: "f32", shape: [rows, rotary], data } as const;
        }
      };
      return [ropeTableName(i), { storage: "f32", shape: [capacity, rotary], tiles }];
    }),
  );
}

/**
 * Cosines and sines of every position, [capacity, rotary]: cosines in the first half of a row, sines in the second.
 * Angles are computed in float64, so that far positions lose nothing (Su et al., RoFormer 2021).
 *
 * What token stands where decides how it is turned, nothing else: with dynamic scaling a position beyond the original context
 * has the base of a text that ends there, as in decoding token by token; LongRoPE's long factors serve the whole of a cache that
 * is longer than the original context.
 */
export function ropeTable(config: DecoderConfig, capacity: number, index = 0): Float32Array {
  const { rotary } = config.ropes[index] as RopeConfig;
  return fillTable(config, capacity, index, 0, new Float32Array(capacity * rotary));
}

/** Fills `table` with rows of the table from that of position `first` on. */
function fillTable(
  config: DecoderConfig,
  capacity: number,
  index: number,
  first: number,
  table: Float32Array,
): Float32Array {
  const rope = config.ropes[index] as RopeConfig;
  const half = rope.rotary / 2;
  const { scaling } = rope;
  const magnitude = scaling?.kind === "yarn" || scaling?.kind === "longrope" ? scaling.magnitude : 1;
  const fixed = scaling?.kind === "dynamic" ? null : frequencies(rope, capacity);
  for (let row = 0; row * rope.rotary < table.length; row++) {
    const position = first + row;
    const turns = fixed ?? frequencies(rope, position + 1);
    for (let i = 0; i < half; i++) {
      const angle = position * (turns[i] as number);
      table[row * rope.rotary + i] = Math.cos(angle) * magnitude;
      table[row * rope.rotary + half + i] = Math.sin(angle) * magnitude;
    }
  }
  return table;
}

/** Radians a position of each pair, for texts of at most `length` tokens. */
function frequencies({ theta, rotary, scaling }: RopeConfig, length: number): number[] {
  const plain = (base: number) => Array.from({ length: rotary / 2 }, (_, i) => base ** ((-2 * i) / rotary));
  const own = plain(theta);
  switch (scaling?.kind) {
    case "linear":
      return own.map((frequency) => frequency / scaling.factor);
    case "dynamic": {
      const { factor, originalContext } = scaling;
      const stretch = (factor * Math.max(length, originalContext)) / originalContext - (factor - 1);
      return plain(theta * stretch ** (rotary / (rotary - 2)));
    }
    case "llama3": {
      const { factor, lowFrequency, highFrequency, originalContext } = scaling;
      return own.map((frequency) => {
        const turns = (originalContext * frequency) / (2 * Math.PI);
        return mean(frequency, (turns - lowFrequency) / (highFrequency - lowFrequency), factor);
      });
    }
    case "yarn": {
      // The pair that turns so many times over the original context.
      const pairOf = (turns: number) =>
        (rotary * Math.log(scaling.originalContext / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
      const [fast, slow] = [pairOf(scaling.betaFast), pairOf(scaling.betaSlow)];
      const low = Math.max(scaling.truncate ? Math.floor(fast) : fast, 0);
      const high = Math.min(scaling.truncate ? Math.ceil(slow) : slow, rotary - 1);
      const span = low === high ? 0.001 : high - low;
      return own.map((frequency, i) => mean(frequency, 1 - (i - low) / span, scaling.factor));
    }
    case "longrope": {
      const divisors = length > scaling.originalContext ? scaling.long : scaling.short;
      return own.map((frequency, i) => frequency / (divisors[i] as number));
    }
    default:
      return own;
  }
}

/** A mean of a frequency and of what `factor` makes of it; `kept` is clamped to [0, 1]. */
function mean(frequency: number, kept: number, factor: number): number {
  const part = Math.min(Math.max(kept, 0), 1);
  return frequency * (part + (1 - part) / factor);
}
