/** SHA-256 piece by piece (FIPS 180-4): WebCrypto only hashes what is in memory whole. */
export interface Sha256 {
  update(bytes: Uint8Array): void;
  /** The digest in lowercase hexadecimal; nothing may be added after it. */
  hex(): string;
}

/** The first 32 bits of the fractional parts of the roots of the first primes. */
const primeRoots = (count: number, root: (n: number) => number): Uint32Array => {
  const primes: number[] = [];
  for (let n = 2; primes.length < count; n++) if (primes.every((p) => n % p !== 0)) primes.push(n);
  return Uint32Array.from(primes, (p) => Math.floor((root(p) % 1) * 2 ** 32));
};
const ROUNDS = primeRoots(64, Math.cbrt);
const START = primeRoots(8, Math.sqrt);

export function sha256(): Sha256 {
  const state = START.slice();
  const block = new Uint8Array(64);
  const view = new DataView(block.buffer);
  const words = new Uint32Array(64);
  let filled = 0;
  let total = 0;

  function compress(): void {
    for (let i = 0; i < 16; i++) words[i] = view.getUint32(4 * i);
    for (let i = 16; i < 64; i++) {
      const [x, y] = [words[i - 15] as number, words[i - 2] as number];
      const s0 = rotate(x, 7) ^ rotate(x, 18) ^ (x >>> 3);
      const s1 = rotate(y, 17) ^ rotate(y, 19) ^ (y >>> 10);
      words[i] = (words[i - 16] as number) + s0 + (words[i - 7] as number) + s1;
    }
    let [a, b, c, d, e, f, g, h] = state as unknown as [number, number, number, number, number, number, number, number];
    for (let i = 0; i < 64; i++) {
      const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + (ROUNDS[i] as number) + (words[i] as number)) | 0;
      const t2 = ((rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    for (const [i, value] of [a, b, c, d, e, f, g, h].entries()) state[i] = (state[i] as number) + value;
  }

  function update(bytes: Uint8Array): void {
    total += bytes.byteLength;
    for (let at = 0; at < bytes.byteLength; ) {
      const take = Math.min(64 - filled, bytes.byteLength - at);
      block.set(bytes.subarray(at, at + take), filled);
      filled += take;
      at += take;
      if (filled < 64) return;
      compress();
      filled = 0;
    }
  }

  return {
    update,
    hex() {
      const bits = BigInt(total) * 8n;
      update(Uint8Array.of(0x80));
      while (filled !== 56) update(Uint8Array.of(0));
      view.setBigUint64(56, bits);
      compress();
      return [...state].map((word) => word.toString(16).padStart(8, "0")).join("");
    },
  };
}

const rotate = (x: number, n: number): number => (x >>> n) | (x << (32 - n));
