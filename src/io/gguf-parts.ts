import { FewbitError } from "../core/errors.js";
import { type GgufHeader, type GgufTensor, readGguf } from "./gguf.js";
import { type ByteSource, createSource } from "./source.js";

/** Opens a file by its plain name, from where the given one lies. */
export type OpenFile = (file: string, signal?: AbortSignal) => Promise<ByteSource>;

/** A GGUF model in one file or several, as one file. */
export interface GgufParts {
  /** Metadata of the first file; tensors of all, at places of `open`'s source. */
  readonly header: GgufHeader;
  /** All files one after another. */
  open(signal?: AbortSignal): Promise<ByteSource>;
}

const MAX_PARTS = 4096;
const FIRST = /^(.*)-00001-of-(\d{5})\.gguf$/i;

/**
 * Reads the headers of a GGUF file and of those that it is split into (`NAME-00001-of-00003.gguf`, of which the first is given).
 * @throws FewbitError as `readGguf`; `io/malformed` when a part is another one than its name says
 */
export async function ggufParts(file: string, open: OpenFile, signal: AbortSignal | undefined): Promise<GgufParts> {
  await using first = await open(file, signal);
  const header = await readGguf(first, signal);
  const count = Number(header.metadata.get("split.count") ?? 1);
  if (count <= 1) return { header, open: (stop) => open(file, stop) };
  const malformed = (path: string, reason: string) => new FewbitError("io/malformed", { path, reason });
  const name = FIRST.exec(file);
  if (name === null || Number(name[2]) !== count || count > MAX_PARTS)
    throw malformed(file, `it is one of ${count} parts: the first is needed, by its name NAME-00001-of-NNNNN.gguf`);
  const digits = (value: number) => String(value).padStart(5, "0");
  const files = Array.from({ length: count }, (_, i) => `${name[1]}-${digits(i + 1)}-of-${digits(count)}.gguf`);
  files[0] = file;
  const tensors = new Map<string, GgufTensor>();
  let start = 0;
  for (const [i, part] of files.entries()) {
    await using source = await open(part, signal);
    const { metadata, tensors: own } = await readGguf(source, signal);
    if (metadata.get("split.no") !== i || metadata.get("split.count") !== count)
      throw malformed(part, `it says that it is part ${String(metadata.get("split.no"))}, not ${i} of ${count}`);
    for (const tensor of own.values()) {
      if (tensors.has(tensor.name)) throw malformed(part, `it has the tensor ${tensor.name} once more`);
      tensors.set(tensor.name, { ...tensor, byteOffset: start + tensor.byteOffset });
    }
    start += source.size;
  }
  return { header: { metadata: header.metadata, tensors }, open: (stop) => joined(files, open, stop) };
}

/** Files one after another as one source; no read goes over the end of one. */
async function joined(files: readonly string[], open: OpenFile, signal: AbortSignal | undefined): Promise<ByteSource> {
  const sources: ByteSource[] = [];
  const close = async () => void (await Promise.all(sources.map((source) => source.close())));
  try {
    for (const file of files) sources.push(await open(file, signal));
  } catch (error) {
    await close();
    throw error;
  }
  const size = sources.reduce((sum, source) => sum + source.size, 0);
  return createSource({
    name: (sources[0] as ByteSource).name,
    size,
    close,
    async read(offset, length, stop, memory) {
      let at = offset;
      for (const source of sources) {
        if (at < source.size) return source.read(at, length, stop, memory);
        at -= source.size;
      }
      throw new Error("createSource checks ranges");
    },
  });
}
