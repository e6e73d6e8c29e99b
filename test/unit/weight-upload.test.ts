import { describe, expect, test } from "vitest";
import { tensorFromWords } from "../../src/backends/stored-layout.js";
import { loadWeights, type Source, sourceKey, weightGroup } from "../../src/backends/weights.js";
import { type Format, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { dequantize, type QuantizedTensor } from "../../src/formats/tensor.js";
import { dense, GraphBuilder, stored, type ValueId } from "../../src/ir/graph.js";
import type { Plan } from "../../src/plan/plan.js";
import { randomTensor } from "../../src/validate/cases-random.js";

const K = 64;
const ROWS = [5, 13, 24];

/** Three weights that lie one after another, as the upload of a program leaves them on a device with bindings of `maxBinding` bytes. */
async function uploaded(format: Format, maxBinding: number) {
  const g = new GraphBuilder({ T: 1 });
  const x = g.input("x", dense("f32", ["T", K]));
  const ids = ROWS.map((rows, i) => g.weight(`w${i}`, stored(format, [rows, K])));
  for (const [i, id] of ids.entries()) g.output(`y${i}`, g.one("linear", [x, id], {}));
  const graph = g.build();
  const tensors = ROWS.map((rows, i) => randomTensor(format, [rows, K], 7 + i));
  const group = weightGroup(
    ids.map((id) => [id, (graph.values[id] as { type: ReturnType<typeof stored> }).type]),
    maxBinding,
  );
  const sources: Source[] = group.slices.map((_, slice) => ({ kind: "weights", ids: ids as ValueId[], slice }));
  const plan = { graph, bytes: { weights: 1 }, memory: { placement: new Map() } } as unknown as Plan;
  const buffers = new Map<string, Uint8Array<ArrayBuffer>>();
  const events: string[] = [];
  const source = (name: string) => {
    events.push(name);
    return tensors[Number(name.slice(1))] as QuantizedTensor;
  };
  await loadWeights(plan, maxBinding, sources, source, {}, ({ source, bytes, parts }) => {
    const key = sourceKey(source, plan);
    const buffer = buffers.get(key) ?? new Uint8Array(bytes);
    buffers.set(key, buffer);
    for (const [at, data] of parts) {
      buffer.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
      if (at === 0 || data === tensors[0]?.qdata) events.push("codes");
    }
  });
  const values = group.slices.flatMap(({ layout, begin, end }, slice) => {
    const buffer = buffers.get(sourceKey({ kind: "weights", ids, slice }, plan)) as Uint8Array<ArrayBuffer>;
    return [...dequantize(tensorFromWords(layout, new Uint32Array(buffer.buffer), end - begin))];
  });
  return {
    values,
    expected: tensors.flatMap((tensor) => [...dequantize(tensor)]),
    events,
    slices: group.slices.length,
  };
}

describe("weights that lie one after another", () => {
  const formats = {
    "scales of groups and zero points": withScale(FORMATS.int4_tinygemm, { block: [1, 32] }),
    "bf16 scales of rows, an odd number of them": withScale(FORMATS.int8, { block: [1, "all"] }),
    "one scale a tensor, repeated for its rows": withScale(FORMATS.int8, { block: ["all", "all"] }),
    "no scale": FORMATS.bf16,
  };

  test.each(Object.entries(formats))("hold what each of them holds: %s", async (_, format) => {
    for (const maxBinding of [2 ** 20, 1536]) {
      const { values, expected, slices } = await uploaded(format, maxBinding);
      expect(slices > 1).toBe(maxBinding < 2 ** 20);
      expect(values).toEqual(expected);
    }
  });

  test("are sent one by one: the codes of one are on the device before the next is asked for", async () => {
    const { events } = await uploaded(FORMATS.bf16, 2 ** 20);
    expect(events.slice(0, 3)).toEqual(["w0", "codes", "w1"]);
  });
});
