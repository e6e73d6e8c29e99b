import { describe, expect, test } from "vitest";
import { FewbitError } from "../../src/core/errors.js";
import { FORMATS } from "../../src/formats/table.js";
import { torchaoPartName } from "../../src/formats/torchao.js";
import { torchaoClass } from "../../src/formats/torchao-write.js";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { ggufDirectory } from "../../src/io/gguf-model.js";
import { withStored } from "../../src/io/quantized.js";
import {
  openSafetensors,
  type SafetensorsDtype,
  type TensorEntry,
  writeSafetensors,
} from "../../src/io/safetensors.js";
import { createSource, readJson, type SourceDirectory } from "../../src/io/source.js";
import { randomWords } from "../support/codecs.js";
import { writeGguf } from "../support/gguf.js";

const MiB = 2 ** 20;
/** No read may ask for more, whatever a header claims. */
const LIMIT = 64 * MiB;
const SEED = 20_260_101;

/** A file that claims `size` bytes: zeros follow those that are there. */
function claimed(bytes: Uint8Array, size: number) {
  return createSource({
    name: "fuzz",
    size,
    async read(offset, length) {
      expect(length).toBeLessThanOrEqual(LIMIT);
      if (offset + length <= bytes.length) return bytes.subarray(offset, offset + length);
      const out = new Uint8Array(length);
      out.set(bytes.subarray(offset, offset + length));
      return out;
    },
  });
}

/** Bytes that mean something in a header: JSON's, and small and extreme numbers. */
const TELLING = [...new TextEncoder().encode('"{}[]:,0189-.eE\\ ntf'), 0, 1, 2, 4, 8, 0x20, 0x7f, 0x80, 0xff];

/** One to four edits of the first `header` bytes: bytes set, runs copied, inserted, deleted or cut off. */
function mutate(bytes: Uint8Array, header: number, next: () => number): Uint8Array {
  let out = bytes.slice();
  const below = (n: number) => next() % Math.max(1, n);
  for (let edits = 1 + below(4); edits > 0; edits--) {
    const at = below(Math.min(header, out.length));
    const kind = below(10);
    if (kind < 4) out[at] = TELLING[below(TELLING.length)] as number;
    else if (kind < 6) out[at] = below(256);
    else if (kind === 6) out.fill(TELLING[below(TELLING.length)] as number, at, at + 1 + below(8));
    else if (kind === 7) out.copyWithin(at, below(header), below(header) + below(24));
    else if (kind === 8) out = Uint8Array.from([...out.subarray(0, at), ...out.subarray(at + 1 + below(8))]);
    else out = out.slice(0, below(20) === 0 ? at : out.length);
  }
  return out;
}

/** Opens `count` damaged files; everything must end in a coded error of these kinds, or well. */
async function fuzz(
  count: number,
  bases: readonly { bytes: Uint8Array; header: number }[],
  open: (bytes: Uint8Array, size: number) => Promise<void>,
) {
  const next = randomWords(SEED);
  const tally = { accepted: 0, refused: 0 };
  const begun = performance.now();
  for (let i = 0; i < count; i++) {
    const { bytes, header } = bases[i % bases.length] as (typeof bases)[number];
    const damaged = mutate(bytes, header, next);
    try {
      // Every eighth file claims to be huge, so that only the reader's own limits hold it back.
      await open(damaged, i % 8 === 0 ? 2 ** 40 : damaged.length);
      tally.accepted++;
    } catch (error) {
      if (!(error instanceof FewbitError) || !/^(io|model|format|shape|dtype|argument)\//.test(error.code)) throw error;
      expect(error.message.length).toBeLessThan(4000);
      tally.refused++;
    }
  }
  return { ...tally, seconds: (performance.now() - begun) / 1000 };
}

const say = (what: string, { accepted, refused, seconds }: Awaited<ReturnType<typeof fuzz>>) =>
  console.log(`${what}: seed ${SEED}, ${accepted} sound, ${refused} refused, ${seconds.toFixed(1)} s`);

describe("100,000 damaged headers give coded errors or sound files, and no large allocation", () => {
  const headerOf = (bytes: Uint8Array) =>
    8 + Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const entry = (name: string, dtype: SafetensorsDtype, shape: number[], size: number): TensorEntry => ({
    name,
    dtype,
    shape,
    data: new Uint8Array(size),
  });

  test("40,000 of safetensors", { timeout: 300_000 }, async () => {
    const files = [
      writeSafetensors([entry("w", "BF16", [2, 3], 12), entry("s", "F32", [], 4), entry("é", "F8_E4M3", [3], 3)], {
        format: "pt",
      }),
      writeSafetensors([entry("a", "I64", [1, 0, 2], 0), entry("b", "F16", [4], 8)]),
    ];
    const bases = files.map((bytes) => ({ bytes, header: headerOf(bytes) }));
    const tally = await fuzz(40_000, bases, async (bytes, size) => {
      await using file = await openSafetensors(claimed(bytes, size));
      for (const name of file.tensors.keys()) await file.read(name);
    });
    say("safetensors", tally);
    expect(Math.min(tally.accepted, tally.refused)).toBeGreaterThan(1000);
  });

  test("20,000 of torchao's metadata", { timeout: 300_000 }, async () => {
    const files = (["int8", "int4_plain", "mxfp4", "nvfp4", "int4"] as const).map((name) => {
      const request = { format: FORMATS[name], shape: [16, 128], dtype: "bf16", activation: null } as const;
      const made = torchaoClass(request) as NonNullable<ReturnType<typeof torchaoClass>>;
      const sizes: Record<string, number> = { I8: 1, U8: 1, F8_E4M3: 1, F8_E8M0: 1, BF16: 2, F32: 4 };
      const tensors = made.parts.map((part) => {
        const count = part.shape.reduce((a, b) => a * b, 1);
        const size = count * (sizes[part.dtype] as number);
        return entry(torchaoPartName("a.w", part.name), part.dtype as SafetensorsDtype, [...part.shape], size);
      });
      const parts = made.parts.map((part) => part.name);
      const described = { _type: made.type, _data: made.attributes, _tensor_data_names: parts };
      return writeSafetensors(tensors, { tensor_names: '["a.w"]', "a.w": JSON.stringify(described) });
    });
    const bases = files.map((bytes) => ({ bytes, header: headerOf(bytes) }));
    const tally = await fuzz(20_000, bases, async (bytes, size) => {
      const directory: SourceDirectory = { name: "fuzz", open: async () => claimed(bytes, size) };
      await using checkpoint = await openCheckpoint(directory);
      await using store = await withStored(checkpoint, null);
      for (const matrix of store.stored?.values() ?? []) await matrix.blocks?.();
    });
    say("torchao metadata", tally);
    expect(Math.min(tally.accepted, tally.refused)).toBeGreaterThan(1000);
  });

  test("40,000 of GGUF", { timeout: 300_000 }, async () => {
    const data = (size: number) => new Uint8Array(size);
    const file = writeGguf(
      {
        "general.architecture": [8, "llama"],
        "llama.block_count": [4, 1],
        "llama.context_length": [4, 64],
        "llama.embedding_length": [4, 64],
        "llama.feed_forward_length": [4, 64],
        "llama.attention.head_count": [4, 2],
        "llama.attention.layer_norm_rms_epsilon": [6, 1e-5],
        "tokenizer.ggml.model": [8, "llama"],
        "tokenizer.ggml.tokens": [9, [8, "<unk>", "<s>", "a", "b", "ab"]],
        "tokenizer.ggml.scores": [9, [6, 0, 0, -2, -3, -1]],
        "tokenizer.ggml.token_type": [9, [5, 2, 3, 1, 1, 1]],
        "tokenizer.ggml.bos_token_id": [4, 1],
      },
      [
        { name: "token_embd.weight", type: 8, shape: [5, 64], data: data(5 * 68) },
        { name: "blk.0.attn_q.weight", type: 2, shape: [64, 64], data: data(64 * 36) },
        { name: "output_norm.weight", type: 0, shape: [64], data: data(256) },
      ],
    );
    const header = file.length - 3000;
    const tally = await fuzz(40_000, [{ bytes: file, header }], async (bytes, size) => {
      const directory = await ggufDirectory("m.gguf", async () => claimed(bytes, size));
      for (const name of ["config.json", "tokenizer.json", "tokenizer_config.json"]) await readJson(directory, name);
      await using store = await (directory.weights as NonNullable<SourceDirectory["weights"]>)({});
      for (const matrix of store.stored?.values() ?? [])
        if (matrix.bytesPerLine <= 1000) await matrix.read(0, matrix.step);
    });
    say("GGUF", tally);
    expect(Math.min(tally.accepted, tally.refused)).toBeGreaterThan(1000);
  });
});
