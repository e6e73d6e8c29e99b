import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { quantizeObstacle } from "../../src/backends/webgpu/kernels/quantize.js";
import { codecVector, type Format, formatKey, withScale } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { quantizeTensor } from "../../src/quantize/quantize.js";
import { adversarialRows, stack } from "../support/adversarial.js";
import { openTestGpu, type TestGpu } from "../support/gpu.js";
import { differences, quantizeOnGpu } from "../support/quantized.js";

let gpu: TestGpu;
beforeAll(async () => {
  gpu = await openTestGpu();
});
afterAll(() => gpu?.destroy());

const K = 256;
const formats = Object.values(FORMATS).flatMap((format): Format[] =>
  format.scales.length === 0 ? [format] : [format, ...format.blocks.map((block) => withScale(format, { block }))],
);
const unique = [...new Map(formats.map((format) => [formatKey(format), format])).entries()];
const onDevice = unique.filter(([, format]) => quantizeObstacle(format) === null);

describe.each(onDevice)("quantize to %s", (_, format) => {
  test("every row alone, and all rows as one matrix", async () => {
    const rows = adversarialRows(format.element, K, "f32", 1);
    const byRow = format.scales.every((level) => level.block[0] === 1);
    const cases = byRow ? {} : rows;
    for (const [name, row] of Object.entries(cases)) {
      expect(await compare(format, row, [1, K]), name).toEqual([]);
    }
    const finite = byRow
      ? Object.values(rows)
      : Object.entries(rows)
          .filter(([name]) => !/inf|NaN|large|huge|magni/.test(name))
          .map(([, row]) => row);
    expect(await compare(format, stack(finite), [finite.length, K])).toEqual([]);
  });
});

async function compare(format: Format, data: Float32Array, shape: readonly [number, number]): Promise<string[]> {
  const expected = quantizeTensor(data, shape, "f32", format);
  return differences(await quantizeOnGpu(gpu, format, data, shape), expected);
}
