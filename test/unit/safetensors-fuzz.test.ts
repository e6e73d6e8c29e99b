import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { FewbitError } from "../../src/core/errors.js";
import { openSafetensors, writeSafetensors } from "../../src/io/safetensors.js";
import { headerFile as file, spySource as spy } from "../setup/safetensors.js";

describe("fuzzing the reader", () => {
  const valid = [
    writeSafetensors(
      [
        { name: "w", dtype: "BF16", shape: [2, 3], data: new Uint8Array(12) },
        { name: "s", dtype: "F32", shape: [], data: new Uint8Array(4) },
        { name: "é", dtype: "F8_E4M3", shape: [3], data: new Uint8Array(3) },
      ],
      { format: "pt" },
    ),
    writeSafetensors([{ name: "a", dtype: "I64", shape: [1, 0, 2], data: new Uint8Array(0) }]),
    writeSafetensors([], {}),
  ];

  /** Either a coded error, or a file whose tensors are disjoint, complete and readable; no read ever leaves the file. */
  async function isSafe(bytes: Uint8Array): Promise<boolean> {
    const { source, reads, state } = spy(bytes);
    try {
      await using opened = await openSafetensors(source);
      let total = 0;
      for (const info of opened.tensors.values()) {
        expect((await opened.read(info.name)).byteLength).toBe(info.byteLength);
        total += info.byteLength;
      }
      const headerLength = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
      expect(total).toBe(bytes.byteLength - 8 - headerLength);
      return true;
    } catch (error) {
      if (!(error instanceof FewbitError) || !error.code.startsWith("io/")) throw error;
      expect(error.message.length).toBeLessThan(2000);
      return false;
    } finally {
      expect(state.closed).toBe(true);
      for (const [, length] of reads) expect(length).toBeLessThanOrEqual(bytes.byteLength);
    }
  }

  /** Both outcomes must be common, or the generator tests nothing. */
  function tally() {
    const count = { accepted: 0, refused: 0 };
    return {
      count,
      judge: async (bytes: Uint8Array) => void ((await isSafe(bytes)) ? count.accepted++ : count.refused++),
    };
  }

  test("10,000 files with flipped, inserted, deleted and cut bytes give a coded error or a sound file", async () => {
    const { count, judge } = tally();
    const edit = fc.record({
      kind: fc.constantFrom("set", "insert", "delete", "cut", "copy"),
      at: fc.nat(),
      byte: fc.oneof(fc.nat(255), fc.constantFrom(...Buffer.from('"{}[]:,0189-.eE\\ '))),
      length: fc.integer({ min: 1, max: 40 }),
    });
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(...valid),
        fc.array(edit, { minLength: 1, maxLength: 4 }),
        async (seed, edits) => {
          let bytes = [...seed];
          for (const { kind, at, byte, length } of edits) {
            const i = at % (bytes.length + 1);
            if (kind === "set" && i < bytes.length) bytes[i] = byte;
            else if (kind === "insert") bytes.splice(i, 0, byte);
            else if (kind === "delete") bytes.splice(i, length);
            else if (kind === "copy") bytes.splice(i, 0, ...bytes.slice(i, i + length));
            else bytes = bytes.slice(0, i);
          }
          await judge(Uint8Array.from(bytes));
        },
      ),
      { numRuns: 10_000 },
    );
    expect(count.accepted).toBeGreaterThan(20);
    expect(count.refused).toBeGreaterThan(5000);
  });

  test("12,000 headers with lying numbers, names and fields give a coded error or a sound file", async () => {
    const { count, judge } = tally();
    const lie = fc.constantFrom(
      ...["0", "1", "2", "3", "8", "-1", "1e3", "0.5", "4294967296", "9007199254740991", "9007199254740993", "null"],
      ...[
        "18446744073709551615",
        `1${"0".repeat(400)}`,
        '"1"',
        "[]",
        "{}",
        "true",
        "00",
        "NaN",
        "-0",
        '"__metadata__":{}',
      ],
    );
    const name = fc.oneof(
      fc.constantFrom("a", "b", "c", "__proto__", "dtype", "__metadata__"),
      fc.string({ maxLength: 3 }),
    );
    const sizes = { U8: 1, F8_E8M0: 1, BF16: 2, F32: 4, I64: 8 };
    const dtype = fc.constantFrom(...(Object.keys(sizes) as (keyof typeof sizes)[]));
    const entries = fc.array(fc.tuple(name, dtype, fc.array(fc.nat(3), { maxLength: 3 })), { maxLength: 4 });
    const wrongDtype = fc.constantFrom("F4", "F6_E2M3", "u8", "", "constructor", "F64", "\u{1f600}");
    const edit = fc.oneof(
      fc.record({ pattern: fc.constant(/\d+/g), which: fc.nat(40), by: lie }),
      fc.record({
        pattern: fc.constant(/\[[\d,]*\]/g),
        which: fc.nat(10),
        by: fc.oneof(lie, fc.json({ maxDepth: 3 })),
      }),
      fc.record({
        pattern: fc.constant(/"[^"]*"/g),
        which: fc.nat(20),
        by: wrongDtype.map((text) => JSON.stringify(text)),
      }),
      fc.record({
        pattern: fc.constant(/[{}:,]/g),
        which: fc.nat(30),
        by: fc.constantFrom("", "{", "}", ",", ":", ",,"),
      }),
    );
    const claim = fc.option(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }), { freq: 20, nil: undefined });
    const build = (tensors: [string, keyof typeof sizes, number[]][]) => {
      let end = 0;
      const members = tensors.map(([key, type, shape]) => {
        const begin = end;
        end += shape.reduce((product, extent) => product * extent, sizes[type]);
        return `${JSON.stringify(key)}:{"dtype":"${type}","shape":[${shape}],"data_offsets":[${begin},${end}]}`;
      });
      return { text: `{${members.join(",")}}`, bytes: end };
    };
    await fc.assert(
      fc.asyncProperty(entries, fc.array(edit, { maxLength: 2 }), claim, async (tensors, edits, claimed) => {
        let { text, bytes } = build(tensors);
        for (const { pattern, which, by } of edits) {
          let seen = 0;
          text = text.replace(pattern, (match) => (seen++ === which ? by : match));
        }
        await judge(file(text, bytes, claimed));
      }),
      { numRuns: 12_000 },
    );
    expect(count.accepted).toBeGreaterThan(100);
    expect(count.refused).toBeGreaterThan(5000);
  });
});
