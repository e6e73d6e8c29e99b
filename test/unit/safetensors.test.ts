import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  openSafetensors,
  type SafetensorsDtype,
  saveSafetensors,
  type TensorEntry,
  writeSafetensors,
} from "../../src/io/safetensors.js";
import { memorySource } from "../../src/io/source.js";
import { headerFile as file, spySource as spy } from "../setup/safetensors.js";
import { failure } from "../support/failure.js";

const MODEL = "models/fewbit-tiny/model.safetensors";

const tensor = (dtype: string, shape: string, begin: number | string, end: number | string) =>
  `{"dtype":"${dtype}","shape":[${shape}],"data_offsets":[${begin},${end}]}`;

describe("the writer", () => {
  test("gives the bytes of the reference implementation for the bundled model", async () => {
    const original = new Uint8Array(await readFile(MODEL));
    await using model = await openSafetensors(memorySource(original));
    const entries: TensorEntry[] = [];
    for (const info of model.tensors.values()) entries.unshift({ ...info, data: await model.read(info.name) });
    const written = writeSafetensors(entries, model.metadata);
    expect(Buffer.compare(written, original)).toBe(0);
  });

  test("orders by dtype, widest first, then by name in code point order", async () => {
    const entry = (name: string, dtype: SafetensorsDtype, bytes: number) => ({
      name,
      dtype,
      shape: [1],
      data: new Uint8Array(bytes),
    });
    const written = writeSafetensors([
      entry("b", "U8", 1),
      entry("\u{1f600}", "F32", 4),
      entry("\uffee", "F32", 4),
      entry("a", "I64", 8),
      entry("a8", "F8_E8M0", 1),
    ]);
    await using opened = await openSafetensors(memorySource(written));
    expect([...opened.tensors.keys()]).toEqual(["a", "\uffee", "\u{1f600}", "a8", "b"]);
    expect(written.byteLength % 8).toBe((8 + 4 + 4 + 1 + 1) % 8);
  });

  test("what is written is read back: names, shapes, metadata, bytes and rows", async () => {
    const text = fc.string({ unit: "binary", maxLength: 8 });
    const dtype = fc.constantFrom<SafetensorsDtype>("BOOL", "I8", "F8_E5M2", "F16", "BF16", "U32", "F64", "U64");
    const size = { BOOL: 1, I8: 1, F8_E5M2: 1, F16: 2, BF16: 2, U32: 4, F64: 8, U64: 8 } as Record<string, number>;
    const described = fc.record({
      name: text.filter((name) => name !== "__metadata__"),
      dtype,
      shape: fc.array(fc.nat(4), { maxLength: 3 }),
      fill: fc.nat(255),
    });
    await fc.assert(
      fc.asyncProperty(
        fc.uniqueArray(described, { selector: (t) => t.name, maxLength: 6 }),
        fc.array(fc.tuple(text, text), { maxLength: 3 }),
        async (tensors, pairs) => {
          const entries = tensors.map(({ fill, ...t }) => {
            const bytes = t.shape.reduce((n, extent) => n * extent, size[t.dtype] as number);
            return { ...t, data: Uint8Array.from({ length: bytes }, (_, i) => (fill + i) & 255) };
          });
          const metadata = new Map(pairs);
          await using opened = await openSafetensors(memorySource(writeSafetensors(entries, metadata)));
          expect(new Map(opened.metadata)).toEqual(metadata);
          expect(opened.tensors.size).toBe(entries.length);
          for (const entry of entries) {
            expect(opened.tensors.get(entry.name)).toMatchObject({ dtype: entry.dtype, shape: entry.shape });
            expect(await opened.read(entry.name)).toEqual(entry.data);
            const [rows] = entry.shape;
            if (!rows) continue;
            const row = entry.data.byteLength / rows;
            expect(await opened.read(entry.name, { rows: [1, rows] })).toEqual(entry.data.subarray(row));
          }
        },
      ),
      { numRuns: 300 },
    );
  });

  test("refuses what the format cannot hold", async () => {
    const good = { name: "a", dtype: "U8", shape: [2], data: new Uint8Array(2) } as const;
    const bad: TensorEntry[][] = [
      [good, good],
      [{ ...good, name: "__metadata__" }],
      [{ ...good, name: "\ud800" }],
      [{ ...good, shape: [-2] }],
      [{ ...good, shape: [0.5, 4] }],
      [{ ...good, shape: [2 ** 40, 2 ** 40] }],
      [{ ...good, data: new Uint8Array(3) }],
    ];
    for (const tensors of bad)
      expect(await failure((async () => writeSafetensors(tensors))())).toMatchObject({ code: "argument/invalid" });
  });

  test("to a disk file: the same bytes, and nothing at all when it fails", async () => {
    const folder = await mkdtemp(join(tmpdir(), "fewbit-"));
    try {
      const data = Uint8Array.from({ length: 12 }, (_, i) => i);
      const entry = { name: "a", dtype: "F32", shape: [3], data } as const;
      async function* pieces() {
        yield data.subarray(0, 5);
        yield data.subarray(5);
      }
      const path = join(folder, "out.safetensors");
      await saveSafetensors(path, [{ ...entry, data: pieces }], { format: "pt" });
      expect(new Uint8Array(await readFile(path))).toEqual(writeSafetensors([entry], { format: "pt" }));

      const aborted = new AbortController();
      aborted.abort();
      const broken = [
        saveSafetensors(join(folder, "x"), [{ ...entry, data: async () => data.subarray(1) }]),
        saveSafetensors(join(folder, "x"), [{ ...entry, data: async () => new Uint8Array(13) }]),
        saveSafetensors(join(folder, "x"), [{ ...entry, data: async () => data }], {}, { signal: aborted.signal }),
      ];
      const codes = await Promise.all(broken.map(async (promise) => (await failure(promise)).code));
      expect(codes).toEqual(["argument/invalid", "argument/invalid", "operation/aborted"]);
      expect(await readdir(folder)).toEqual(["out.safetensors"]);
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});

describe("the reader", () => {
  test("reads the header and nothing else, then only the rows that are asked for", async () => {
    const bytes = file(`{"m":${tensor("BF16", "4,3", 0, 24)}}`, 24);
    const { source, reads } = spy(bytes);
    await using opened = await openSafetensors(source);
    const dataStart = bytes.byteLength - 24;
    expect(reads).toEqual([
      [0, 8],
      [8, dataStart - 8],
    ]);
    await opened.read("m", { rows: [1, 3] });
    expect(reads.at(-1)).toEqual([dataStart + 6, 12]);
    for (const rows of [
      [-1, 2],
      [2, 1],
      [0, 5],
      [0.5, 1],
    ] as const)
      expect(await failure(opened.read("m", { rows }))).toMatchObject({ code: "argument/invalid" });
    expect(await failure(opened.read("n"))).toMatchObject({ code: "model/missing-tensor" });
  });

  test("closing the file closes the source, and a refused header closes it at once", async () => {
    const good = spy(file("{}"));
    await (await openSafetensors(good.source)).close();
    const bad = spy(file("{"));
    await failure(openSafetensors(bad.source));
    expect([good.state.closed, bad.state.closed]).toEqual([true, true]);
  });

  const u8 = (shape: string, begin: number | string, end: number | string) => tensor("U8", shape, begin, end);
  const malformed: [law: string, bytes: Uint8Array, reason: string][] = [
    ["a file too short for a header length", new Uint8Array(7), "it has 7 bytes, a header length needs 8"],
    ["an empty header", file(""), 'the header does not start with "{"'],
    ["a header longer than the file", file("{}", 0, 3n), "the header claims 3 bytes, 2 follow"],
    ["a header of 2^64 - 1 bytes", file("{}", 0, 2n ** 64n - 1n), "the header claims 18446744073709551615 bytes"],
    ["a header above the limit", file("{}", 0, 30_000_001n), "the limit is 30000000"],
    ["white space before the header", file(" {}"), 'the header does not start with "{"'],
    ["bytes that are not UTF-8", file(new Uint8Array([0x7b, 0xff, 0x7d])), "the text is not valid UTF-8"],
    ["text after the header", file("{}{"), "at character 2 where the end of the JSON text is expected"],
    ["a truncated header", file('{"a":{'), "the end at character 6"],
    ["a trailing comma", file(`{"a":${u8("", 0, 1)},}`, 1), "a key of the header (a string) is expected"],
    ["a tensor twice", file(`{"a":${u8("1", 0, 1)},"a":${u8("1", 1, 2)}}`, 2), 'the header has the key "a" twice'],
    ["a tensor twice, once escaped", file(`{"a":${u8("1", 0, 1)},"\\u0061":${u8("1", 1, 2)}}`, 2), '"a" twice'],
    ["a field twice", file(`{"a":{"dtype":"U8","dtype":"U8"}}`), 'tensor "a" has the key "dtype" twice'],
    ["a missing field", file(`{"a":{"dtype":"U8","shape":[]}}`), 'tensor "a" has no data_offsets'],
    ["an unknown field", file(`{"a":{"dtype":"U8","x":1}}`), 'tensor "a" has the unknown field "x"'],
    ["an unknown dtype", file(`{"a":${tensor("F12", "", 0, 1)}}`, 1), 'has dtype "F12", which is unknown'],
    ["an inherited property as dtype", file(`{"a":${tensor("toString", "", 0, 1)}}`, 1), "which is unknown"],
    ["a dtype below a byte", file(`{"a":${tensor("F4", "2", 0, 1)}}`, 1), "elements smaller than a byte"],
    ["a negative extent", file(`{"a":${u8("-1", 0, 1)}}`, 1), 'the JSON has "-" at character'],
    ["a fractional extent", file(`{"a":${u8("1.5", 0, 1)}}`, 1), "(a nonnegative integer) is expected"],
    ["an exponent as extent", file(`{"a":${u8("1e0", 0, 1)}}`, 1), "(a nonnegative integer) is expected"],
    ["a leading zero", file(`{"a":${u8("01", 0, 1)}}`, 1), "(a nonnegative integer) is expected"],
    ["an extent of 2^53", file(`{"a":${u8("9007199254740992", 0, 1)}}`, 1), "above 2^53 - 1"],
    ["an extent of 300 digits", file(`{"a":${u8("9".repeat(300), 0, 1)}}`, 1), "(a nonnegative integer) is expected"],
    ["a product above 2^53", file(`{"a":${u8("94906267,94906267", 0, 1)}}`, 1), "overflows 2^53 bytes"],
    ["a product above 2^53 times zero", file(`{"a":${u8("94906267,94906267,0", 0, 0)}}`), "overflows 2^53 bytes"],
    ["65 dimensions", file(`{"a":${u8(Array(65).fill(1).join(), 0, 1)}}`, 1), "has more than 64 numbers"],
    ["a size that is not the shape's", file(`{"a":${u8("3", 0, 2)}}`, 2), 'tensor "a" has 2 bytes, U8 [3] needs 3'],
    ["offsets in the wrong order", file(`{"a":${u8("1", 2, 1)}}`, 2), "expected [begin, end] with begin <= end"],
    ["one offset", file(`{"a":{"dtype":"U8","shape":[],"data_offsets":[0]}}`), "data_offsets [0]"],
    ["three offsets", file(`{"a":${u8("1", 0, "1,1")}}`, 1), "has more than 2 numbers"],
    ["data out of range", file(`{"a":${u8("9", 0, 9)}}`, 8), 'tensor "a" ends at byte 9 of the data, which has 8'],
    ["data far out of range", file(`{"a":${u8("1", 2 ** 53 - 2, `${2 ** 53 - 1}`)}}`, 8), "of the data, which has 8"],
    ["overlapping data", file(`{"a":${u8("4", 0, 4)},"b":${u8("4", 3, 7)}}`, 7), 'tensor "b" overlaps tensor "a"'],
    ["the same data twice", file(`{"a":${u8("4", 0, 4)},"b":${u8("4", 0, 4)}}`, 4), 'tensor "b" overlaps tensor "a"'],
    ["an empty tensor inside another", file(`{"a":${u8("4", 0, 4)},"b":${u8("0", 2, 2)}}`, 4), "overlaps"],
    ["a hole before the data", file(`{"a":${u8("4", 1, 5)}}`, 5), "1 bytes between the header and tensor"],
    ["a hole in the data", file(`{"a":${u8("1", 0, 1)},"b":${u8("1", 2, 3)}}`, 3), "1 bytes between tensor"],
    ["data that no tensor has", file(`{"a":${u8("1", 0, 1)}}`, 3), '2 bytes after tensor "a" are not indexed'],
    ["metadata that is no string", file(`{"__metadata__":{"a":1}}`), '__metadata__ "a" (a string) is expected'],
    ["metadata twice", file(`{"__metadata__":{},"__metadata__":{}}`), 'the key "__metadata__" twice'],
    ["a lone surrogate as a name", file(`{"\\ud800":${u8("", 0, 1)}}`, 1), "not well-formed Unicode"],
    ["a line break in a name", file(`{"a\nb":${u8("", 0, 1)}}`, 1), "not a complete JSON string"],
    ["an illegal escape", file(`{"\\x":${u8("", 0, 1)}}`, 1), "has an illegal escape"],
  ];
  for (const [law, bytes, reason] of malformed)
    test(`refuses ${law}`, async () => {
      const error = await failure(openSafetensors(memorySource(bytes)));
      expect(error).toMatchObject({ code: "io/malformed", context: { path: "memory" } });
      expect(error.message).toContain(reason);
    });

  test("accepts what the format allows: scalars, empty tensors, any order, escapes, trailing space", async () => {
    const header = `{"b":${u8("0,7", 3, 3)}, "\\u00e9":${u8("3", 0, 3)},"c":${u8("", 3, 4)},"__proto__":${u8("1", 4, 5)}} \n`;
    await using opened = await openSafetensors(memorySource(file(header, 5)));
    expect([...opened.tensors.keys()]).toEqual(["b", "é", "c", "__proto__"]);
    expect((await opened.read("b")).byteLength).toBe(0);
    expect((await opened.read("c")).byteLength).toBe(1);
  });

  test("a header made to blow up on the heap costs little memory", async () => {
    const hostile = ["[".repeat(2 ** 23), '{"a":'.repeat(2 ** 21), `[${"{},".repeat(2 ** 21)}`];
    for (const value of hostile) {
      const bytes = file(`{"a":{"shape":${value}`);
      const before = process.memoryUsage().heapUsed;
      expect(await failure(openSafetensors(memorySource(bytes)))).toMatchObject({ code: "io/malformed" });
      expect(process.memoryUsage().heapUsed - before).toBeLessThan(64 * 2 ** 20);
    }
  });

  test("a header that claims more than the file is refused before anything of that size is read", async () => {
    const { source, reads } = spy(file("{}", 0, 29_999_999n), 2 ** 50);
    expect(await failure(openSafetensors(source))).toMatchObject({ code: "io/failed" });
    const lying = spy(file("{}", 0, 2n ** 40n), 2 ** 50);
    expect(await failure(openSafetensors(lying.source))).toMatchObject({ code: "io/malformed" });
    expect(lying.reads).toEqual([[0, 8]]);
    expect(reads).toEqual([
      [0, 8],
      [8, 29_999_999],
    ]);
  });
});
