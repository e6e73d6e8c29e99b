import { FewbitError } from "../../src/core/errors.js";
import { createSource } from "../../src/io/source.js";

/** A file with this header text and this many data bytes (or these). */
export function headerFile(header: string | Uint8Array, data: number | Uint8Array = 0, claimed?: bigint): Uint8Array {
  const text = typeof header === "string" ? new TextEncoder().encode(header) : header;
  const body = typeof data === "number" ? new Uint8Array(data) : data;
  const bytes = new Uint8Array(8 + text.byteLength + body.byteLength);
  new DataView(bytes.buffer).setBigUint64(0, claimed ?? BigInt(text.byteLength), true);
  bytes.set(text, 8);
  bytes.set(body, 8 + text.byteLength);
  return bytes;
}

/** A source that remembers what was read of it and whether it was closed. */
export function spySource(bytes: Uint8Array, size = bytes.byteLength) {
  const reads: [offset: number, length: number][] = [];
  const state = { closed: false };
  const source = createSource({
    name: "spy",
    size,
    async read(offset, length) {
      reads.push([offset, length]);
      if (offset + length > bytes.byteLength) throw new FewbitError("io/failed", { path: "spy", reason: "cut" });
      return bytes.subarray(offset, offset + length);
    },
    async close() {
      state.closed = true;
    },
  });
  return { source, reads, state };
}
