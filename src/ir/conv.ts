import { FewbitError } from "../core/errors.js";
import type { QuantizedTensor } from "../formats/tensor.js";
import type { Dim, TensorType } from "./graph.js";
import { requireBlocks, requireDense, requireFormat, requireShape } from "./require.js";
import type { DenseTensor } from "./tensor.js";

/** A 2-D convolution's geometry, as PyTorch's Conv2d names it; every pair is [vertical, horizontal]. */
export interface ConvAttrs {
  readonly kernel: readonly [number, number];
  readonly stride: readonly [number, number];
  readonly padding: readonly [number, number];
  readonly dilation: readonly [number, number];
  readonly groups: number;
}

/** Extents of the output image. */
export function convSize(attrs: ConvAttrs, height: number, width: number): [height: number, width: number] {
  const extent = (size: number, axis: 0 | 1) =>
    Math.floor(
      (size + 2 * attrs.padding[axis] - attrs.dilation[axis] * (attrs.kernel[axis] - 1) - 1) / attrs.stride[axis],
    ) + 1;
  return [extent(height, 0), extent(width, 1)];
}

/**
 * x f32 [B, C, H, W], weight format [O, kh * kw * C / groups], bias f32 [O] -> f32 [B, O, H', W'].
 * A weight row runs over ky, kx and then the input channels of its group, so that torchao's blocks of input channels
 * (specification 9.1: (1, g, 1, 1)) are blocks along k.
 */
export function inferConv(types: readonly TensorType[], attrs: ConvAttrs, where: string): TensorType[] {
  const x = requireDense(types[0] as TensorType, "f32", `${where}.x`);
  requireShape(x, [undefined, undefined, undefined, undefined], `${where}.x`);
  const [batch, channels, height, width] = x as [Dim, number, number, number];
  const weight = requireFormat(types[1] as TensorType, `${where}.weight`);
  const positive = [...attrs.kernel, ...attrs.stride, ...attrs.dilation, attrs.groups].every(
    (n) => Number.isInteger(n) && n > 0,
  );
  if (!positive || attrs.padding.some((n) => !Number.isInteger(n) || n < 0)) {
    throw new FewbitError("graph/invalid", {
      where,
      reason: "kernel, stride, dilation and groups are positive integers, padding is not negative",
    });
  }
  const out = weight.shape[0] as number;
  if (channels % attrs.groups !== 0 || out % attrs.groups !== 0) {
    throw new FewbitError("graph/invalid", {
      where,
      reason: `${attrs.groups} groups do not divide ${channels} input and ${out} output channels`,
    });
  }
  const k = attrs.kernel[0] * attrs.kernel[1] * (channels / attrs.groups);
  requireShape(weight.shape, [undefined, k], `${where}.weight`);
  requireBlocks(weight.format, k, `${where}.weight`);
  const bias = types[2];
  if (bias !== undefined) requireShape(requireDense(bias, "f32", `${where}.bias`), [out], `${where}.bias`);
  const [h, w] = convSize(attrs, height, width);
  if (h < 1 || w < 1)
    throw new FewbitError("shape/mismatch", {
      what: `${where}.x`,
      got: x,
      expected: "an image at least as large as the kernel",
    });
  return [{ kind: "dense", dtype: "f32", shape: [batch, out, h, w] }];
}

/** The convolution in float64 over the weight's exact values, rounded once. */
export function evaluateConv(
  x: DenseTensor,
  weight: QuantizedTensor,
  values: Float64Array,
  bias: Float32Array | undefined,
  attrs: ConvAttrs,
): DenseTensor {
  const [batch, channels, height, width] = x.shape as [number, number, number, number];
  const out = weight.shape[0];
  const [h, w] = convSize(attrs, height, width);
  const inner = channels / attrs.groups;
  const [kh, kw] = attrs.kernel;
  const data = new Float32Array(batch * out * h * w);
  for (let i = 0; i < data.length; i++) {
    const [column, row, o, b] = [
      i % w,
      Math.floor(i / w) % h,
      Math.floor(i / (w * h)) % out,
      Math.floor(i / (w * h * out)),
    ];
    const first = Math.floor(o / (out / attrs.groups)) * inner;
    let sum = bias?.[o] ?? 0;
    for (let tap = 0; tap < kh * kw; tap++) {
      const y = row * attrs.stride[0] - attrs.padding[0] + Math.floor(tap / kw) * attrs.dilation[0];
      const z = column * attrs.stride[1] - attrs.padding[1] + (tap % kw) * attrs.dilation[1];
      if (y < 0 || y >= height || z < 0 || z >= width) continue;
      for (let c = 0; c < inner; c++) {
        const pixel = x.data[((b * channels + first + c) * height + y) * width + z] as number;
        sum += pixel * (values[o * kh * kw * inner + tap * inner + c] as number);
      }
    }
    data[i] = sum;
  }
  return { dtype: "f32", shape: [batch, out, h, w], data };
}

/** Reorders a convolution weight [O, C / groups, kh, kw] to the rows [O, kh * kw * C / groups] that the op takes. */
export function convRows(
  weight: Float32Array,
  shape: readonly [out: number, inner: number, kh: number, kw: number],
): Float32Array {
  const [out, inner, kh, kw] = shape;
  const taps = kh * kw;
  const rows = new Float32Array(weight.length);
  for (let o = 0; o < out; o++) {
    for (let c = 0; c < inner; c++) {
      for (let tap = 0; tap < taps; tap++)
        rows[(o * taps + tap) * inner + c] = weight[(o * inner + c) * taps + tap] as number;
    }
  }
  return rows;
}
