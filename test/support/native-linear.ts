import { expect } from "vitest";
import type { NativeDispatch } from "../../src/backends/native/kernel.js";

/** Reads args in the order of native/kernels/linear/arguments.hpp; answers with what tests look at. */
export function linearArguments({ args, bindings, entry }: NativeDispatch) {
  let at = 0;
  const take = () => {
    expect(at).toBeLessThan(args.length);
    return args[at++] as number;
  };
  const skip = (count: number) => void Array.from({ length: count }, take);
  const buffer = () => {
    const index = take();
    expect(index).toBeLessThan(bindings.length);
    return index;
  };
  const blocks = () => {
    const codec = take();
    return codec === 0 ? null : { codec, offset: take(), rows: take(), k: take(), columns: take() };
  };
  const strided = () => (buffer() < 0 ? null : { stride: take(), column: take() });
  const [kind, parts, n, k, rowBytes] = [take(), take(), take(), take(), take()];
  skip(6); // flip, offset, integer zeros, mantissa, multiplier, float zeros
  const weights = Array.from({ length: parts }, () => ({
    buffer: buffer(),
    scale: blocks(),
    outer: blocks(),
    zero: blocks(),
  }));
  buffer();
  skip(4); // bits, half, stride, offset
  const table = buffer();
  const x = { table, scale: blocks(), outer: blocks(), zero: blocks(), rows: [take(), take()] };
  const [fn, rounding] = [take(), take()];
  const [out, residual, biases] = [strided(), strided(), [buffer(), buffer()]];
  const rest = args.slice(at, at + (["linear/skinny", "linear/mixed"].includes(entry.name) ? 5 : 6));
  skip(rest.length);
  const scratch = buffer();
  const skinny = entry.name === "linear/skinny";
  const alike = skinny && take() === 1;
  const count = skinny ? take() : 0;
  const half = count > 0 ? 2 ** take() : 0;
  const heads = Array.from({ length: count }, () => ({
    heads: take(),
    angles: bindings[buffer()],
    position: take(),
    rounding: take(),
    out: bindings[buffer()],
    offset: take(),
    cache: take(),
    keys: take(),
  }));
  expect(at).toBe(args.length);
  return {
    kind,
    parts,
    n,
    k,
    rowBytes,
    weights,
    x,
    fn,
    rounding,
    out,
    residual,
    biases,
    rest,
    scratch,
    alike,
    half,
    heads,
  };
}
