/** A value of GGUF metadata: its type's number, and what it is. */
export type GgufEntry = readonly [type: number, value: unknown];

/** A GGUF file (version 3), written from the format's description and not from the reader. */
export function writeGguf(
  metadata: Readonly<Record<string, GgufEntry>>,
  tensors: readonly { name: string; type: number; shape: readonly number[]; data: Uint8Array }[],
): Uint8Array {
  const bytes: number[] = [...new TextEncoder().encode("GGUF")];
  const number = (size: number, write: (view: DataView) => void) => {
    const view = new DataView(new ArrayBuffer(size));
    write(view);
    bytes.push(...new Uint8Array(view.buffer));
  };
  const u32 = (value: number) => number(4, (view) => view.setUint32(0, value, true));
  const u64 = (value: number) => number(8, (view) => view.setBigUint64(0, BigInt(value), true));
  const text = (value: string) => {
    const encoded = new TextEncoder().encode(value);
    u64(encoded.length);
    bytes.push(...encoded);
  };
  const put = ([type, value]: GgufEntry): void => {
    if (type === 2) number(2, (view) => view.setUint16(0, Number(value), true));
    else if (type === 4) u32(Number(value));
    else if (type === 5) number(4, (view) => view.setInt32(0, Number(value), true));
    else if (type === 6) number(4, (view) => view.setFloat32(0, Number(value), true));
    else if (type === 7) bytes.push(value ? 1 : 0);
    else if (type === 8) text(String(value));
    else {
      const [inner, ...items] = value as [number, ...unknown[]];
      u32(inner);
      u64(items.length);
      for (const item of items) put([inner, item]);
    }
  };
  u32(3);
  u64(tensors.length);
  u64(Object.keys(metadata).length);
  for (const [key, entry] of Object.entries(metadata)) {
    text(key);
    u32(entry[0]);
    put(entry);
  }
  const aligned = (size: number) => Math.ceil(size / 32) * 32;
  let offset = 0;
  for (const { name, type, shape, data } of tensors) {
    text(name);
    u32(shape.length);
    for (const extent of [...shape].reverse()) u64(extent);
    u32(type);
    u64(offset);
    offset += aligned(data.length);
  }
  const start = aligned(bytes.length);
  const file = new Uint8Array(start + offset);
  file.set(bytes);
  let at = start;
  for (const { data } of tensors) {
    file.set(data, at);
    at += aligned(data.length);
  }
  return file;
}
