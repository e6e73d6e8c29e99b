import { layoutWords, storedLayout, tensorFromWords } from "../../src/backends/stored-layout.js";
import { dequantizeKernel } from "../../src/backends/webgpu/kernels/dequantize.js";
import {
  type KernelText,
  type QuantizeKernelOptions,
  quantizeKernel,
} from "../../src/backends/webgpu/kernels/quantize.js";
import { decode } from "../../src/formats/codec.js";
import { blockGrid, type Codec, codecBits, codecVector, extentOf, type Format } from "../../src/formats/format.js";
import { readCode, rowWords } from "../../src/formats/pack.js";
import type { QuantizedTensor } from "../../src/formats/tensor.js";
import { sameCode } from "./codecs.js";
import type { TestGpu } from "./gpu.js";

type Shape = readonly [rows: number, k: number];

function runKernel(
  gpu: TestGpu,
  kernel: KernelText,
  rows: number,
  x: Uint32Array,
  outWords: number,
  given: Readonly<Record<string, Uint32Array>> = {},
): Promise<Uint32Array> {
  const dispatches = kernel.passes.map((pass) => ({
    wgsl: pass.wgsl,
    buffers: pass.bindings.filter((name) => name !== "params"),
    workgroups: pass.workgroups(rows),
  }));
  // Memory that was used before: nothing may rely on zeros.
  const dirty = (words: number) => new Uint32Array(words).fill(0xdeadbeef);
  return gpu.run(dispatches, { x, ...given, out: dirty(outWords), scratch: dirty(kernel.scratchWords) }, "out", [rows]);
}

/** Quantizes on the device, in storage for `capacity` rows. */
export async function quantizeOnGpu(
  gpu: TestGpu,
  format: Format,
  data: Float32Array,
  [rows, k]: Shape,
  options: QuantizeKernelOptions = {},
  capacity = rows,
  parameters: { readonly scale?: Float32Array; readonly zero?: Float32Array } = {},
): Promise<QuantizedTensor> {
  const given = Object.fromEntries(
    Object.entries(parameters).map(([name, values]) => [`given_${name}`, new Uint32Array(values.slice().buffer)]),
  );
  const kernel = quantizeKernel(format, k, capacity, {
    ...options,
    given: Object.keys(given) as NonNullable<QuantizeKernelOptions["given"]>,
  });
  const layout = storedLayout(format, [capacity, k]);
  const words = await runKernel(
    gpu,
    kernel,
    rows,
    new Uint32Array(data.buffer, data.byteOffset, data.length),
    layout.words,
    given,
  );
  return tensorFromWords(layout, words, rows);
}

export async function dequantizeOnGpu(gpu: TestGpu, tensor: QuantizedTensor): Promise<Float32Array> {
  const [rows, k] = tensor.shape;
  const kernel = dequantizeKernel(tensor.format, k, rows);
  const words = await runKernel(gpu, kernel, rows, layoutWords(tensor).words, rows * k);
  return new Float32Array(words.buffer, words.byteOffset, words.length);
}

/**
 * Where two tensors of one format and shape differ, in words; empty when codes, scales and zero points are equal. NaN scales
 * equal each other, and in a block whose scale is not finite neither codes nor zero points mean anything (specification 1).
 */
export function differences(got: QuantizedTensor, expected: QuantizedTensor, limit = 5): string[] {
  const { format, shape } = expected;
  const [rows, k] = shape;
  const [first] = format.scales;
  const found: string[] = [];
  const compare = (
    what: () => string,
    codec: Codec,
    words: (tensor: QuantizedTensor) => Uint32Array | undefined,
    base: number,
    index: number,
  ) => {
    const read = (tensor: QuantizedTensor) => readCode(words(tensor) as Uint32Array, base, index, codecBits(codec));
    const [a, b] = [read(got), read(expected)];
    if (found.length < limit && !sameCode(codec, a, b)) found.push(`${what()}: code ${a}, expected ${b}`);
    return b;
  };

  const finite: boolean[] = [];
  for (const [level, { codec, block }] of format.scales.entries()) {
    const [bands, columns] = blockGrid(block, shape);
    for (let i = 0; i < bands * columns; i++) {
      const code = compare(
        () => `scale ${level} of block ${i}`,
        codec,
        (tensor) => tensor.scales[level],
        0,
        i,
      );
      if (level === 0) finite[i] = Number.isFinite(decode(codec, code));
    }
  }
  if (format.zero.domain !== "none") {
    const { codec } = format.zero;
    for (const [i, meaningful] of finite.entries()) {
      if (meaningful)
        compare(
          () => `zero point of block ${i}`,
          codec,
          (tensor) => tensor.zero,
          0,
          i,
        );
    }
  }
  const [patchRows, patchK] = codecVector(format.element);
  const bits = codecBits(format.element);
  const stride = rowWords(k / patchK, bits);
  const blockOf = (row: number, column: number): number => {
    if (first === undefined) return -1;
    const [height, width] = [extentOf(first.block[0], rows), extentOf(first.block[1], k)];
    return Math.floor(row / height) * blockGrid(first.block, shape)[1] + Math.floor(column / width);
  };
  for (let row = 0; row < rows; row += patchRows) {
    const base = (row / patchRows) * stride;
    for (let column = 0; column < k; column += patchK) {
      if (finite[blockOf(row, column)] === false) continue;
      compare(
        () => `element [${row}, ${column}]`,
        format.element,
        (tensor) => tensor.qdata,
        base,
        column / patchK,
      );
    }
    for (let word = Math.ceil(((k / patchK) * bits) / 32); word < stride; word++) {
      if (got.qdata[base + word] !== 0) found.push(`padding of row ${row} is not zero`);
    }
  }
  return found;
}
