import { dequantizeKernel } from "../../src/backends/webgpu/kernels/dequantize.js";
import {
  type KernelText,
  type QuantizeKernelOptions,
  quantizeKernel,
} from "../../src/backends/webgpu/kernels/quantize.js";
import { layoutWords, storedLayout, tensorFromWords } from "../../src/backends/webgpu/layout.js";
import { decode } from "../../src/formats/codec.js";
import { blockGrid, codecBits, codecVector, extentOf, type Format } from "../../src/formats/format.js";
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
): Promise<Uint32Array> {
  const dispatches = kernel.passes.map((pass) => ({
    wgsl: pass.wgsl,
    buffers: pass.bindings.filter((name) => name !== "params"),
    workgroups: pass.workgroups(rows),
  }));
  // Memory that was used before: nothing may rely on zeros.
  const dirty = (words: number) => new Uint32Array(words).fill(0xdeadbeef);
  return gpu.run(dispatches, { x, out: dirty(outWords), scratch: dirty(kernel.scratchWords) }, "out", [rows]);
}

/** Quantizes on the device, in storage for `capacity` rows. */
export async function quantizeOnGpu(
  gpu: TestGpu,
  format: Format,
  data: Float32Array,
  [rows, k]: Shape,
  options: QuantizeKernelOptions = {},
  capacity = rows,
): Promise<QuantizedTensor> {
  const kernel = quantizeKernel(format, k, capacity, options);
  const layout = storedLayout(format, [capacity, k]);
  const words = await runKernel(
    gpu,
    kernel,
    rows,
    new Uint32Array(data.buffer, data.byteOffset, data.length),
    layout.words,
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
 * equal each other, and in a block whose scale is not finite, nor its extremes, codes and zero points mean nothing
 * (specification 1).
 */
export function differences(got: QuantizedTensor, expected: QuantizedTensor, limit = 5): string[] {
  const { format, shape } = expected;
  const [rows, k] = shape;
  const found: string[] = [];
  const note = (text: string) => {
    if (found.length < limit) found.push(text);
  };
  const finite: boolean[] = [];
  for (const [i, level] of format.scales.entries()) {
    const [bandCount, columns] = blockGrid(level.block, shape);
    const bits = codecBits(level.codec);
    for (let block = 0; block < bandCount * columns; block++) {
      const [a, b] = [got, expected].map((tensor) => readCode(tensor.scales[i] as Uint32Array, 0, block, bits)) as [
        number,
        number,
      ];
      if (!sameCode(level.codec, a, b))
        note(`scale ${i} of block ${block}: ${decode(level.codec, a)}, expected ${decode(level.codec, b)}`);
      if (i === 0) finite[block] = Number.isFinite(decode(level.codec, b));
    }
  }
  const first = format.scales[0];
  if (format.zero.domain !== "none" && first !== undefined) {
    const [bandCount, columns] = blockGrid(first.block, shape);
    const { codec } = format.zero;
    for (let block = 0; block < bandCount * columns; block++) {
      if (!finite[block]) continue;
      const [a, b] = [got, expected].map((tensor) =>
        readCode(tensor.zero as Uint32Array, 0, block, codecBits(codec)),
      ) as [number, number];
      if (!sameCode(codec, a, b))
        note(`zero point of block ${block}: ${decode(codec, a)}, expected ${decode(codec, b)}`);
    }
  }
  const [patchRows, patchK] = codecVector(format.element);
  const bits = codecBits(format.element);
  const stride = rowWords(k / patchK, bits);
  for (let row = 0; row < rows; row += patchRows) {
    for (let column = 0; column < k; column += patchK) {
      if (first !== undefined) {
        const columns = blockGrid(first.block, shape)[1];
        const band = Math.floor(row / extentOf(first.block[0], rows));
        if (!finite[band * columns + Math.floor(column / extentOf(first.block[1], k))]) continue;
      }
      const [a, b] = [got, expected].map((t) =>
        readCode(t.qdata, (row / patchRows) * stride, column / patchK, bits),
      ) as [number, number];
      if (a !== b) note(`code at [${row}, ${column}]: ${a}, expected ${b}`);
    }
    for (let bit = k * bits; bit < stride * 32; bit += bits) {
      const word = Math.ceil(bit / 32);
      if (word < stride && got.qdata[row * stride + word] !== 0) note(`padding of row ${row} is not zero`);
    }
  }
  return found;
}
