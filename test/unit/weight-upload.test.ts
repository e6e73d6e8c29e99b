import { describe, expect, test } from "vitest";
import { layoutWords, tensorFromWords } from "../../src/backends/stored-layout.js";
import { loadWeights, type Source, sourceKey, weightGroup } from "../../src/backends/weights.js";
import { allocate } from "../../src/core/dtype.js";
import { sizeOf } from "../../src/core/shape.js";
import { Staging } from "../../src/core/staging.js";
import { type Format, formatKey, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor, sliceRows } from "../../src/formats/tensor.js";
import { blockRows, RowWindow } from "../../src/formats/window.js";
import { dense, GraphBuilder, stored, type ValueId } from "../../src/ir/graph.js";
import { type DenseTensor, type HostTensor, joinRows, type TensorRows } from "../../src/ir/tensor.js";
import type { Plan } from "../../src/plan/plan.js";
import { randomTensor } from "../../src/validate/cases-random.js";

const K = 256;

/** A tensor in tiles of so many rows (of blocks), all in the same memory, which is spoilt when the next is asked for. */
function inTiles(tensor: QuantizedTensor, height: number): TensorRows {
  const { format, shape } = tensor;
  const step = height * blockRows(format);
  return {
    storage: format,
    shape,
    async *tiles() {
      const memory = new Staging();
      for (let begin = 0; begin < shape[0]; begin += step) {
        const end = Math.min(begin + step, shape[0]);
        const window = new RowWindow(format, shape, end - begin, memory);
        window.move(begin, end);
        window.put(begin, sliceRows(tensor, begin, end));
        const tile = window.rows();
        yield tile;
        for (const words of [tile.qdata, ...tile.scales, tile.zero]) words?.fill(0xa5a5a5a5);
        memory.release();
      }
    },
  };
}

type Given = (name: string) => HostTensor | TensorRows;

/** What the buffers of a program hold after its weights, one after another in one linear, are loaded. */
async function uploaded(format: Format, rows: readonly number[], source: Given, maxBinding = 2 ** 28) {
  const g = new GraphBuilder({ T: 1 });
  const x = g.input("x", dense("f32", ["T", K]));
  const ids = rows.map((count, i) => g.weight(`w${i}`, stored(format, [count, K])));
  for (const [i, id] of ids.entries()) g.output(`y${i}`, g.one("linear", [x, id], {}));
  const graph = g.build();
  const types = ids.map((id, i) => [id, stored(format, [rows[i] as number, K])] as const);
  const { slices } = weightGroup(types, maxBinding);
  const sources: Source[] = slices.map((_, slice) => ({ kind: "weights", ids: ids as ValueId[], slice }));
  const plan = { graph, bytes: { weights: 1 }, memory: { placement: new Map() } } as unknown as Plan;
  const { buffers, events, upload } = fakeDevice(plan);
  const given: Given = (name) => {
    events.push(name);
    return source(name);
  };
  await loadWeights(plan, maxBinding, sources, given, {}, upload);
  const words = slices.map((_, slice) => {
    const bytes = buffers.get(sourceKey({ kind: "weights", ids, slice }, plan)) as Uint8Array<ArrayBuffer>;
    return new Uint32Array(bytes.buffer);
  });
  return { slices, words, events };
}

/** Buffers that are written in whole words, as those of WebGPU. */
function fakeDevice(plan: Plan) {
  const buffers = new Map<string, Uint8Array<ArrayBuffer>>();
  const events: string[] = [];
  const upload: Parameters<typeof loadWeights>[5] = async ({ source, bytes, parts }) => {
    const key = sourceKey(source, plan);
    const buffer = buffers.get(key) ?? new Uint8Array(bytes);
    buffers.set(key, buffer);
    for (const [at, data] of parts) {
      expect([at % 4, data.byteLength % 4]).toEqual([0, 0]);
      buffer.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    }
    events.push("upload");
    await null;
  };
  return { buffers, events, upload };
}

const HEIGHTS = [1, 3, 4, 1000];
const variants = Object.values(FORMATS).flatMap((format) => [
  format,
  ...format.blocks.map((block) => withScale(format, { block })),
]);
const formats = new Map(variants.map((format) => [formatKey(format), format]));

test.each([...formats])("tiles of rows make the buffer that the whole tensor does: %s", async (_, format) => {
  const rows = 2 * blockRows(format) + 5;
  const tensor = randomTensor(format, [rows, K], 7);
  const expected = layoutWords(tensor).words;
  for (const height of HEIGHTS) {
    const { words } = await uploaded(format, [rows], () => inTiles(tensor, height));
    expect(words).toEqual([expected]);
    expect(await joinRows(inTiles(tensor, height))).toEqual(tensor);
  }
  expect((await uploaded(format, [rows], () => tensor)).words).toEqual([expected]);
});

describe("weights that lie one after another", () => {
  const ROWS = [5, 13, 24];
  const cases = {
    "scales of groups and zero points": withScale(FORMATS.int4_tinygemm, { block: [1, 32] }),
    "one-byte scales of an odd number of groups": withScale(FORMATS.nvfp4_single, { block: [1, K] }),
    "bf16 scales of rows, an odd number of them": FORMATS.int4,
    "one scale a tensor, repeated for its rows": withScale(FORMATS.int8, { block: ["all", "all"] }),
    "a scale a group and one a column": FORMATS.int4_sinq,
    "no scale": FORMATS.bf16,
  };

  test.each(Object.entries(cases))("hold what each of them holds: %s", async (_, format) => {
    const tensors = ROWS.map((rows, i) => randomTensor(format, [rows, K], 7 + i));
    const expected = tensors.flatMap((tensor) => [...dequantize(tensor)]);
    for (const height of HEIGHTS)
      for (const maxBinding of [2 ** 20, 5000]) {
        const source = (name: string) => inTiles(tensors[Number(name.slice(1))] as QuantizedTensor, height);
        const { slices, words } = await uploaded(format, ROWS, source, maxBinding);
        expect(slices.length > 1).toBe(maxBinding < 2 ** 20);
        const values = slices.flatMap(({ layout, begin, end }, i) => [
          ...dequantize(tensorFromWords(layout, words[i] as Uint32Array, end - begin)),
        ]);
        expect(values).toEqual(expected);
      }
  });

  test("are sent one by one: the rows of one are on the device before the next is asked for", async () => {
    const tensors = ROWS.map((rows) => randomTensor(FORMATS.bf16, [rows, K], 1));
    const source = (name: string) => inTiles(tensors[Number(name.slice(1))] as QuantizedTensor, 5);
    const { events } = await uploaded(FORMATS.bf16, ROWS, source);
    const tiles = (count: number) => Array.from({ length: count }, () => "upload");
    expect(events).toEqual(["w0", ...tiles(1), "w1", ...tiles(3), "w2", ...tiles(5)]);
  });
});

test("dense weights lie one after another, each from a word on, whatever their tiles are", async () => {
  const shapes: readonly (readonly number[])[] = [[7], [5, 3], [6]];
  const ids = [0, 1, 2] as ValueId[];
  const data = shapes.map((shape, i) => allocate("bf16", sizeOf(shape)).map((_, j) => 100 * i + j + 1));
  const tiled = (name: string): TensorRows => {
    const i = Number(name.slice(1));
    const shape = shapes[i] as readonly number[];
    const [rows = 0, width = 1] = shape;
    const tile = (row: number): DenseTensor => ({
      dtype: "bf16",
      shape: [1, ...shape.slice(1)],
      data: (data[i] as Uint16Array).slice(row * width, (row + 1) * width),
    });
    return { storage: "bf16", shape, tiles: () => Array.from({ length: rows }, (_, row) => tile(row)) };
  };
  const values = shapes.map((shape, id) => ({ id, name: `w${id}`, role: "weight", type: dense("bf16", [...shape]) }));
  const plan = { graph: { values }, bytes: { weights: 1 }, memory: { placement: new Map() } } as unknown as Plan;
  const { buffers, upload } = fakeDevice(plan);
  await loadWeights(plan, 1024, [{ kind: "dense", ids }], tiled, {}, upload);
  const [made] = [...buffers.values()].map((bytes) => [...new Uint16Array(bytes.buffer)]);
  expect(made).toEqual([...(data[0] as Uint16Array), 0, ...(data[1] as Uint16Array), 0, ...(data[2] as Uint16Array)]);
});

test("a weight of another format, or with other rows, is refused by name", async () => {
  const tensor = randomTensor(FORMATS.int8, [8, K], 1);
  const rows = inTiles(tensor, 3);
  const wrong: readonly (readonly [TensorRows, string])[] = [
    [{ ...rows, shape: [9, K] }, "shape/mismatch"],
    [{ ...rows, tiles: () => [sliceRows(tensor, 0, 7)] }, "shape/mismatch"],
    [{ ...rows, tiles: () => [tensor, sliceRows(tensor, 0, 1)] }, "shape/mismatch"],
    [{ ...rows, tiles: () => [{ ...tensor, format: FORMATS.float8_e4m3 }] }, "dtype/mismatch"],
    [{ ...rows, storage: FORMATS.bf16 }, "dtype/mismatch"],
  ];
  for (const [weight, code] of wrong)
    await expect(uploaded(FORMATS.int8, [8], () => weight)).rejects.toMatchObject({ code, context: { what: "w0" } });
});
