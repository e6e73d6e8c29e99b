import { createHash } from "node:crypto";
import { expect } from "vitest";
import { Staging } from "../../src/core/staging.js";
import { loadStored, readsByRows, type StoredMatrix, storedRows } from "../../src/formats/stored-matrix.js";
import { type QuantizedTensor, sliceRows } from "../../src/formats/tensor.js";
import { blockRows } from "../../src/formats/window.js";

/** Everything a tensor holds, for comparison (vitest's own of large arrays is slow). */
function contents({ shape, qdata, scales, zero, table }: QuantizedTensor): string {
  const buffers = [qdata, ...scales, ...(zero ? [zero] : []), ...(table ? [table] : [])];
  const hash = createHash("sha256");
  for (const { buffer, byteOffset, byteLength } of buffers) hash.update(new Uint8Array(buffer, byteOffset, byteLength));
  return [shape, buffers.map(({ length }) => length), hash.digest("hex")].join(" ");
}

/** A stored matrix, after it was held that it is the same whole and in tiles of any height, and from any row on. */
export async function loadEveryWay(matrix: StoredMatrix): Promise<QuantizedTensor> {
  const whole = await loadStored(matrix, { tileBytes: 1 });
  expect(contents(await loadStored(matrix))).toBe(contents(whole));
  const [rows] = matrix.shape;
  const memory = new Staging();
  const later = blockRows(matrix.format) * matrix.step;
  for (const height of [3, rows])
    for (const begin of later < rows ? [0, later] : [0]) {
      let [row, count] = [begin, 0];
      for await (const tile of storedRows(matrix, [begin, rows], { tileBytes: height * matrix.bytesPerLine, memory })) {
        expect(contents(tile)).toBe(contents(sliceRows(whole, row, row + tile.shape[0])));
        row += tile.shape[0];
        count++;
      }
      expect(row).toBe(rows);
      if (!readsByRows(matrix)) expect(count).toBe(1);
      else if (height < rows && later < rows - begin) expect(count).toBeGreaterThan(1);
    }
  expect(memory.mark).toBe(0);
  return whole;
}
