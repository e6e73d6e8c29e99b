/**
 * x [rows, k] times w [n, k] transposed, in float64, each result rounded once to float32. A row of x meets a row of w in order of
 * k, starting from the bias: what the plain loop gives, bit for bit, whichever of the two below computes it.
 */
export function matmul(x: ArrayLike<number>, w: Float64Array, extents: Extents, bias?: Float32Array): Float32Array {
  return into(new Float32Array(extents[0] * extents[1]), x, w, extents, bias);
}

/** `matmul` without a rounding. */
export function products(x: Float64Array, w: Float64Array, extents: Extents): Float64Array {
  return into(new Float64Array(extents[0] * extents[1]), x, w, extents);
}

type Extents = readonly [rows: number, n: number, k: number];
type Floats = Float32Array | Float64Array;

function into<T extends Floats>(out: T, x: ArrayLike<number>, w: Float64Array, extents: Extents, bias?: Floats): T {
  const input = x instanceof Float64Array ? x : new Float64Array(x);
  const kernel = extents[0] >= SIDE && extents[2] > 0 ? loadKernel() : null;
  if (kernel === null) plain(input, w, extents, bias, out);
  else tiled(kernel, input, w, extents, bias, out);
  return out;
}

function plain(x: Float64Array, w: Float64Array, [rows, n, k]: Extents, bias: Floats | undefined, out: Floats): void {
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < n; column++) {
      let sum = bias?.[column] ?? 0;
      for (let i = 0; i < k; i++) sum += (x[row * k + i] as number) * (w[column * k + i] as number);
      out[row * n + column] = sum;
    }
  }
}

/** Rows and columns of a tile: sixteen sums that do not wait for each other. */
const SIDE = 4;
const TILE_BYTES = SIDE * SIDE * 8;

/** Columns of w that lie packed in memory at a time. */
const PANEL = 64;

/**
 * Tiles of 4 x 4 results in WebAssembly vectors of two columns each; x and w are packed so that the four rows (columns) of a tile lie
 * side by side for each k, and padded with zeros.
 */
function tiled(
  { memory, tile }: Kernel,
  x: Float64Array,
  w: Float64Array,
  [rows, n, k]: Extents,
  bias: Floats | undefined,
  out: Floats,
): void {
  const side = k * SIDE;
  const xBytes = Math.ceil(rows / SIDE) * side * 8;
  const wBytes = (PANEL / SIDE) * side * 8;
  const missing = TILE_BYTES + xBytes + wBytes - memory.buffer.byteLength;
  if (missing > 0) memory.grow(Math.ceil(missing / PAGE));
  const result = new Float64Array(memory.buffer, 0, SIDE * SIDE);
  const left = new Float64Array(memory.buffer, TILE_BYTES, xBytes / 8);
  const right = new Float64Array(memory.buffer, TILE_BYTES + xBytes, wBytes / 8);
  packSides(x, 0, rows, k, left);
  for (let first = 0; first < n; first += PANEL) {
    const last = Math.min(first + PANEL, n);
    packSides(w, first, last, k, right);
    for (let row = 0; row < rows; row += SIDE) {
      const xAt = TILE_BYTES + (row / SIDE) * side * 8;
      const height = Math.min(SIDE, rows - row);
      for (let column = first; column < last; column += SIDE) {
        const width = Math.min(SIDE, last - column);
        for (let c = 0; c < SIDE; c++) {
          const start = bias?.[column + c] ?? 0;
          for (let r = 0; r < SIDE; r++) result[r * SIDE + c] = start;
        }
        tile(xAt, TILE_BYTES + xBytes + ((column - first) / SIDE) * side * 8, xAt + side * 8);
        for (let r = 0; r < height; r++) {
          for (let c = 0; c < width; c++) out[(row + r) * n + column + c] = result[r * SIDE + c] as number;
        }
      }
    }
  }
}

/** Rows [begin, end) of a matrix [.., k], four by four: [rows / 4, k, 4]. */
function packSides(matrix: Float64Array, begin: number, end: number, k: number, into: Float64Array): void {
  for (let row = begin; row < end; row += SIDE) {
    const base = (row - begin) * k;
    for (let r = 0; r < SIDE; r++) {
      if (row + r >= end) for (let i = 0; i < k; i++) into[base + i * SIDE + r] = 0;
      else for (let i = 0; i < k; i++) into[base + i * SIDE + r] = matrix[(row + r) * k + i] as number;
    }
  }
}

const PAGE = 65536;

interface Kernel {
  readonly memory: { readonly buffer: ArrayBuffer; grow(pages: number): number };
  /** Adds to the tile at address 0 the product of the packed sides at `x` (up to `end`) and `w`; addresses in bytes. */
  readonly tile: (x: number, w: number, end: number) => void;
}

/** The part of the WebAssembly API that is used: its types are otherwise only in TypeScript's library for web pages. */
declare const WebAssembly: {
  readonly Module: new (bytes: Uint8Array<ArrayBuffer>) => object;
  readonly Instance: new (module: object) => { readonly exports: unknown };
};

let loaded: Kernel | null | undefined;
/** The kernel, or null where a page's content security policy forbids WebAssembly. */
function loadKernel(): Kernel | null {
  if (loaded !== undefined) return loaded;
  try {
    loaded = new WebAssembly.Instance(new WebAssembly.Module(moduleBytes())).exports as Kernel;
  } catch {
    loaded = null;
  }
  return loaded;
}

/** The WebAssembly module: one memory and `tile`, assembled here. Opcodes: WebAssembly core specification 2.0, section 5.4. */
function moduleBytes(): Uint8Array<ArrayBuffer> {
  const [i32, v128, empty] = [0x7f, 0x7b, 0x40];
  const section = (id: number, ...content: number[]) => [id, ...leb(content.length), ...content];
  const name = (text: string) => [text.length, ...new TextEncoder().encode(text)];
  const get = (local: number) => [0x20, local];
  const set = (local: number) => [0x21, local];
  const simd = (opcode: number, ...immediates: number[]) => [0xfd, ...leb(opcode), ...immediates];
  const memarg = (offset: number) => [3, ...leb(offset)];
  const load = (offset: number) => simd(0x00, ...memarg(offset));
  const splat = (offset: number) => simd(0x0a, ...memarg(offset));
  const store = (offset: number) => simd(0x0b, ...memarg(offset));
  const [add, mul] = [simd(0xf0), simd(0xf2)];
  const constant = (value: number) => [0x41, ...leb(value)];

  const [x, w, end] = [0, 1, 2];
  const sums = Array.from({ length: SIDE * 2 }, (_, i) => 3 + i);
  const [broadcast, columns] = [3 + sums.length, [4 + sums.length, 5 + sums.length]] as const;
  const advance = (local: number) => [...get(local), ...constant(SIDE * 8), 0x6a, ...set(local)];
  const body = [
    ...sums.flatMap((sum, i) => [...constant(0), ...load(i * 16), ...set(sum)]),
    ...[0x03, empty],
    ...columns.flatMap((column, i) => [...get(w), ...load(i * 16), ...set(column)]),
    ...sums.flatMap((sum, i) => [
      ...(i % 2 === 0 ? [...get(x), ...splat((i / 2) * 8), ...set(broadcast)] : []),
      ...[...get(sum), ...get(broadcast), ...get(columns[i % 2] as number), ...mul, ...add, ...set(sum)],
    ]),
    ...[...advance(w), ...advance(x), ...get(x), ...get(end)],
    // Branch back while x < end (unsigned).
    ...[0x49, 0x0d, 0, 0x0b],
    ...sums.flatMap((sum, i) => [...constant(0), ...get(sum), ...store(i * 16)]),
    0x0b,
  ];
  const code = [1, sums.length + 3, v128, ...body];
  return Uint8Array.from([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(1, 1, 0x60, 3, i32, i32, i32, 0),
    ...section(3, 1, 0),
    ...section(5, 1, 0, 1),
    ...section(7, 2, ...name("memory"), 2, 0, ...name("tile"), 0, 0),
    ...section(10, 1, ...leb(code.length), ...code),
  ]);
}

/** An unsigned LEB128 number. As a constant's immediate it is signed, so bit 6 of the last byte must stay clear. */
function leb(value: number): number[] {
  const bytes: number[] = [];
  let rest = value;
  while (rest >= 64) {
    bytes.push((rest & 0x7f) | 0x80);
    rest >>>= 7;
  }
  return [...bytes, rest];
}
