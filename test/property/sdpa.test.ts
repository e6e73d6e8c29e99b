import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { FORMATS } from "../../src/formats/table.js";
import { evaluateSdpa, keyRowOf, sdpaBound, visibleKeys } from "../../src/ir/attention.js";
import { dense, stored, type TensorType } from "../../src/ir/graph.js";
import type { SdpaAttrs } from "../../src/ir/ops.js";
import type { DenseTensor, HostTensor } from "../../src/ir/tensor.js";
import { KvPool } from "../../src/models/kvcache.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { randomWords } from "../support/codecs.js";
import { SEED } from "../support/seed.js";

const SIZE = 8;
const lengths = fc.record({
  tokens: fc.integer({ min: 1, max: 6 }),
  keys: fc.integer({ min: 1, max: 12 }),
  group: fc.integer({ min: 1, max: 3 }),
  seed: fc.nat(),
});
type Lengths = { tokens: number; keys: number; group: number; seed: number };
const check = (property: (lengths: Lengths) => void) =>
  fc.assert(fc.property(lengths, property), { seed: SEED, numRuns: 60 });

function operands({ tokens, keys, group, seed }: Lengths) {
  const next = randomWords(seed);
  const make = (shape: readonly number[]): DenseTensor => ({
    dtype: "f32",
    shape,
    data: Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => (next() / 2 ** 31 - 1) * 3),
  });
  const [q, k, v] = [make([1, 2 * group, tokens, SIZE]), make([1, 2, keys, SIZE]), make([1, 2, keys, SIZE])] as const;
  const attrs: SdpaAttrs = { heads: 2 * group, kvHeads: 2, scale: 0.4, causal: false };
  return { q, k, v, attrs };
}

const types = (tensors: readonly HostTensor[]): TensorType[] => tensors.map((tensor) => dense("f32", tensor.shape));
const run = (tensors: readonly HostTensor[], attrs: SdpaAttrs) =>
  evaluateSdpa(tensors, types(tensors), attrs, {}).data as Float32Array;
const scaled = (tensor: DenseTensor, by: number): DenseTensor => ({
  ...tensor,
  data: (tensor.data as Float32Array).map((x) => x * by),
});

describe("laws of attention", () => {
  test("values scaled by a power of two scale the result", () => {
    check((at) => {
      const { q, k, v, attrs } = operands(at);
      expect(run([q, k, scaled(v, 8)], attrs)).toEqual(run([q, k, v], attrs).map((x) => x * 8));
    });
  });

  test("queries and keys trade powers of two, and with the scale", () => {
    check((at) => {
      const { q, k, v, attrs } = operands(at);
      const plain = run([q, k, v], attrs);
      expect(run([scaled(q, 4), scaled(k, 0.25), v], attrs)).toEqual(plain);
      expect(run([scaled(q, 4), k, v], { ...attrs, scale: 0.1 })).toEqual(plain);
    });
  });

  test("results are means: between the least and the greatest value", () => {
    check((at) => {
      const { q, k, v, attrs } = operands(at);
      const out = run([q, k, v], attrs);
      const values = v.data as Float32Array;
      const [least, most] = [Math.min(...values), Math.max(...values)];
      for (const x of out) expect(x >= least && x <= most).toBe(true);
    });
  });

  test("a mask of zeros, sinks at minus infinity and a wide window change nothing", () => {
    check((at) => {
      const { q, k, v, attrs } = operands(at);
      const plain = run([q, k, v], attrs);
      const mask: DenseTensor = {
        dtype: "f32",
        shape: [at.tokens, at.keys],
        data: new Float32Array(at.tokens * at.keys),
      };
      const sinks: DenseTensor = {
        dtype: "f32",
        shape: [attrs.heads],
        data: new Float32Array(attrs.heads).fill(Number.NEGATIVE_INFINITY),
      };
      expect(run([q, k, v, mask, sinks], { ...attrs, extras: ["mask", "sinks"] })).toEqual(plain);
      expect(run([q, k, v, sinks, mask], { ...attrs, extras: ["sinks", "mask"], window: 100 })).toEqual(plain);
    });
  });

  test("a sink is one more key, of that score and of value zero", () => {
    check((at) => {
      const { q, k, v, attrs } = operands(at);
      const sinks: DenseTensor = {
        dtype: "f32",
        shape: [attrs.heads],
        data: Float32Array.from({ length: attrs.heads }, (_, h) => h - 1),
      };
      const grown = (tensor: DenseTensor): DenseTensor => {
        const data = new Float32Array(2 * (at.keys + 1) * SIZE);
        for (const head of [0, 1])
          data.set(
            tensor.data.subarray(head * at.keys * SIZE, (head + 1) * at.keys * SIZE) as Float32Array,
            head * (at.keys + 1) * SIZE,
          );
        return { dtype: "f32", shape: [1, 2, at.keys + 1, SIZE], data };
      };
      const shape = [1, attrs.heads, at.tokens, at.keys + 1];
      const data = Float32Array.from({ length: attrs.heads * at.tokens * (at.keys + 1) }, (_, i) =>
        i % (at.keys + 1) === at.keys ? Math.floor(i / (at.keys + 1) / at.tokens) - 1 : 0,
      );
      const expected = run([q, grown(k), grown(v), { dtype: "f32", shape, data }], { ...attrs, extras: ["mask"] });
      for (const [i, x] of run([q, k, v, sinks], { ...attrs, extras: ["sinks"] }).entries())
        expect(x).toBeCloseTo(expected[i] as number, 6);
    });
  });

  test("causal is a mask of minus infinities", () => {
    check((at) => {
      const { q, k, v, attrs } = operands(at);
      const data = Float32Array.from({ length: at.tokens * at.keys }, (_, i) =>
        i % at.keys > Math.floor(i / at.keys) ? Number.NEGATIVE_INFINITY : 0,
      );
      const mask: DenseTensor = { dtype: "f32", shape: [at.tokens, at.keys], data };
      expect(run([q, k, v], { ...attrs, causal: true })).toEqual(run([q, k, v, mask], { ...attrs, extras: ["mask"] }));
    });
  });

  test("the last token of a causal run sees what a single token after a cache sees", () => {
    check(({ tokens, group, seed }) => {
      const { q, k, v, attrs } = operands({ tokens, keys: tokens, group, seed });
      const whole = run([q, k, v], { ...attrs, causal: true });
      const heads = attrs.heads;
      const last = Float32Array.from(
        { length: heads * SIZE },
        (_, i) => (q.data as Float32Array)[(Math.floor(i / SIZE) * tokens + tokens - 1) * SIZE + (i % SIZE)] as number,
      );
      const cache = [k, v].map((tensor) =>
        quantizeTensor(tensor.data as Float32Array, [2 * tokens, SIZE], "f32", FORMATS.f32),
      );
      const one = evaluateSdpa(
        [{ dtype: "f32", shape: [1, heads * SIZE], data: last }, ...cache],
        [dense("f32", ["T", heads * SIZE]), ...cache.map(() => stored(FORMATS.f32, [2, tokens, SIZE]))],
        { ...attrs, causal: true, position: "past" },
        { T: 1, past: tokens - 1 },
      ).data as Float32Array;
      for (let h = 0; h < heads; h++)
        expect(one.slice(h * SIZE, (h + 1) * SIZE)).toEqual(
          whole.slice((h * tokens + tokens - 1) * SIZE, (h + 1) * tokens * SIZE),
        );
    });
  });

  test("the definition keeps its own bound", () => {
    check((at) => {
      const { q, k, v, attrs } = operands(at);
      const tensors = [q, k, v];
      const { value, bound } = sdpaBound(tensors, types(tensors), attrs, {});
      for (const [i, x] of run(tensors, attrs).entries())
        expect(Math.abs(x - (value[i] as number))).toBeLessThanOrEqual(bound[i] as number);
    });
  });
});

describe("where keys lie", () => {
  test("visible keys are those that the definition's conditions let through", () => {
    const attrs = fc.record({
      causal: fc.boolean(),
      window: fc.option(fc.integer({ min: 1, max: 9 }), { nil: undefined }),
    });
    fc.assert(
      fc.property(attrs, fc.nat(12), fc.nat(12), ({ causal, window }, p, seen) => {
        const [from, to] = visibleKeys(
          { heads: 1, kvHeads: 1, scale: 1, causal, ...(window === undefined ? {} : { window }) },
          p,
          seen,
        );
        const expected = Array.from({ length: seen }, (_, j) => j).filter(
          (j) => (!causal || j <= p) && (window === undefined || (j > p - window && (causal || j < p + window))),
        );
        expect(Array.from({ length: to - from }, (_, i) => from + i)).toEqual(expected);
      }),
      { seed: SEED },
    );
  });

  test("rows of a ring, of pages and of a plain cache are different for the keys that are alive together", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 6 }),
        fc.integer({ min: 1, max: 5 }),
        fc.boolean(),
        fc.nat(100),
        (page, count, ring, start) => {
          const keys = page * count;
          const pages = Uint32Array.from({ length: count }, (_, i) => (i * 3 + 1) % (3 * count + 2));
          fc.pre(new Set(pages).size === count);
          for (const rows of [
            { keys, page, kvHeads: 2, ring },
            { keys, page: null, kvHeads: 2, ring },
          ]) {
            const rowOf = keyRowOf(rows, pages);
            const first = ring ? start : 0;
            const alive = [0, 1].flatMap((head) => Array.from({ length: keys }, (_, j) => rowOf(0, head, first + j)));
            expect(new Set(alive).size).toBe(2 * keys);
          }
        },
      ),
      { seed: SEED },
    );
  });

  test("whatever sequences do, a pool's blocks are held as often as they are listed", () => {
    const action = fc.record({
      what: fc.constantFrom("open", "append", "fork", "truncate", "close"),
      at: fc.nat(7),
      n: fc.nat(9),
    });
    fc.assert(
      fc.property(fc.array(action, { maxLength: 40 }), (actions) => {
        const pool = new KvPool(9, 4);
        const live: ReturnType<KvPool["open"]>[] = [];
        for (const { what, at, n } of actions) {
          const sequence = live[at % Math.max(live.length, 1)];
          if (what === "open") live.push(pool.open());
          if (sequence === undefined) continue;
          const before = [sequence.length, pool.free, ...sequence.pages(9)];
          if (what === "append") {
            try {
              sequence.append(n);
            } catch (error) {
              expect(error).toMatchObject({ code: "cache/overflow" });
              expect([sequence.length, pool.free, ...sequence.pages(9)]).toEqual(before);
            }
          }
          if (what === "fork") live.push(sequence.fork());
          if (what === "truncate") sequence.truncate(Math.min(n, sequence.length));
          if (what === "close") live.splice(live.indexOf(sequence), 1)[0]?.[Symbol.dispose]();
          const listed = new Uint32Array(9);
          for (const one of live)
            for (const block of one.pages(9).slice(0, Math.ceil(one.length / 4)))
              listed[block] = (listed[block] as number) + 1;
          expect(Array.from(listed, (_, block) => pool.holders(block))).toEqual([...listed]);
          expect(pool.free).toBe(listed.filter((count) => count === 0).length);
        }
      }),
      { seed: SEED, numRuns: 150 },
    );
  });
});
