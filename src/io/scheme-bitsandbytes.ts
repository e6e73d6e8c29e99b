import { viewAs } from "../core/dtype.js";
import { FewbitError } from "../core/errors.js";
import { Staging } from "../core/staging.js";
import { defineFormat, type Format, withScale } from "../formats/format.js";
import { unpackNibbles } from "../formats/layouts.js";
import type { StoredMatrix } from "../formats/stored-matrix.js";
import { CODECS } from "../formats/table.js";
import type { TensorStore } from "./safetensors.js";
import { groupsOf, type Json, needPart, type Scheme, unsupported, withSuffix } from "./scheme.js";

/*
 * bitsandbytes' 4-bit weights: codes of a table of 16, with a float32 scale for every block of the flattened weight. The scales may be
 * quantized themselves ("double quantization"): codes of a table of 256, with a float32 scale a block of theirs, and what was
 * subtracted from all of them.
 */

/** bitsandbytes has more digits than the table of the NF4 row. */
const TABLES = {
  nf4: [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
  ],
  fp4: [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3].map((value) => Math.fround(value / 12)),
} as const;
type Table = keyof typeof TABLES;

const formatOf = (table: Table): Format =>
  defineFormat(`bitsandbytes_${table}`, {
    element: { kind: "lut", bits: 4, entries: TABLES[table], vector: [1, 1] },
    scales: [{ codec: CODECS.f32, block: [1, 64] }],
    rule: { kind: "cast" },
    source: "bitsandbytes, functional.py",
  });
const FORMATS: Readonly<Record<Table, Format>> = { nf4: formatOf("nf4"), fp4: formatOf("fp4") };

/** quantization_config of `quant_method: "bitsandbytes"` in 4 bits. What is quantized is said by the tensors. */
export function bitsandbytesScheme(config: Json): Scheme {
  if (config.load_in_8bit === true || config._load_in_8bit === true)
    throw unsupported("bitsandbytes", "8 bits (LLM.int8)", ["4 bits (nf4, fp4)"]);
  const name = `bitsandbytes ${String(config.bnb_4bit_quant_type ?? "fp4")}`;
  return {
    name,
    async describe(store, signal) {
      const found = new Map<string, StoredMatrix>();
      for (const table of Object.keys(TABLES) as Table[])
        for (const weight of withSuffix(store, `.quant_state.bitsandbytes__${table}`))
          found.set(weight, await describe(store, weight, table, signal));
      return found;
    },
  };
}

async function describe(
  store: TensorStore,
  weight: string,
  table: Table,
  signal: AbortSignal | undefined,
): Promise<StoredMatrix> {
  const malformed = (reason: string) => new FewbitError("io/malformed", { path: `${store.name}: ${weight}`, reason });
  const bytesOf = (name: string, dtype: string, count: number | null) =>
    needPart(store, `${weight}.${name}`, [dtype], [count]);
  const text = await bytesOf(`quant_state.bitsandbytes__${table}`, "U8", null).read(undefined, signal);
  const state = parseState(text, malformed);
  const [n, k] = state.shape;
  const packed = needPart(store, weight, ["U8"], [(n * k) / 2, 1]);
  const blocks = n * groupsOf(weight, k, state.blocksize);
  const map = viewAs("f32", (await bytesOf("quant_map", "F32", 16).read(undefined, signal)).slice());
  if (map.some((value, i) => !Object.is(value, TABLES[table][i])))
    throw unsupported(`quant_map of ${weight}`, "a table of its own", Object.keys(TABLES));
  const { nested } = state;
  const absmax = bytesOf("absmax", nested === null ? "F32" : "U8", blocks);
  const outer = nested === null ? null : bytesOf("nested_absmax", "F32", Math.ceil(blocks / nested.blocksize));
  const outerMap = nested === null ? null : bytesOf("nested_quant_map", "F32", 256);
  const floats = async (part: typeof absmax, stop?: AbortSignal, memory?: Staging) =>
    viewAs("f32", await part.read(undefined, stop, memory));
  return {
    format: withScale(FORMATS[table], { block: [1, state.blocksize] }),
    shape: [n, k],
    activation: null,
    kind: `bitsandbytes ${table}${nested === null ? "" : ", double quantization"}`,
    cut: "rows",
    step: 1,
    bytesPerLine: k / 2,
    read: async (begin, end, stop, memory = new Staging()) => {
      const bytes = await packed.read([(begin * k) / 2, (end * k) / 2], stop, memory);
      return { elements: unpackNibbles(bytes, "second", memory.take((end - begin) * k)) };
    },
    blocks: async (stop, memory = new Staging()) => {
      if (nested === null || outer === null || outerMap === null)
        return { scales: [viewAs("u32", await absmax.read(undefined, stop, memory))] };
      const [codes, scales, values] = [
        await absmax.read(undefined, stop, memory),
        await floats(outer, stop, memory),
        await floats(outerMap, stop, memory),
      ];
      const words = memory.words(codes.length);
      const made = new Float32Array(words.buffer, 0, words.length);
      // float32 arithmetic, an operation at a time, as bitsandbytes does it.
      for (let i = 0; i < codes.length; i++) {
        const outerScale = scales[Math.floor(i / nested.blocksize)] as number;
        made[i] = Math.fround((values[codes[i] as number] as number) * outerScale) + nested.offset;
      }
      return { scales: [words] };
    },
  };
}

interface State {
  readonly shape: readonly [number, number];
  readonly blocksize: number;
  readonly nested: { readonly blocksize: number; readonly offset: number } | null;
}

/** The JSON in `quant_state`. */
function parseState(bytes: Uint8Array, malformed: (reason: string) => FewbitError): State {
  let json: Json | null;
  try {
    json = JSON.parse(new TextDecoder().decode(bytes)) as Json | null;
  } catch {
    throw malformed("its quant_state is not JSON");
  }
  if (typeof json !== "object" || json === null) throw malformed("its quant_state is no object");
  const count = (value: unknown): value is number => Number.isSafeInteger(value) && Number(value) > 0;
  const { shape, blocksize, nested_blocksize: outer, nested_offset: offset } = json;
  const legal = Array.isArray(shape) && shape.length === 2 && shape.every(count) && count(blocksize);
  const nested = outer !== undefined;
  if (!legal || (nested && (!count(outer) || !Number.isFinite(offset))))
    throw malformed("its quant_state has no shape, block size or offset");
  return {
    shape: shape as unknown as [number, number],
    blocksize: blocksize as number,
    nested: nested ? { blocksize: outer as number, offset: Math.fround(offset as number) } : null,
  };
}
