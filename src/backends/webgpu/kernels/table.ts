import type { WebGpuKernel } from "../kernel.js";
import { CONV_KERNELS } from "./conv.js";
import { CONVERT_KERNELS } from "./convert.js";
import { ELEMENTWISE_KERNELS } from "./elementwise.js";
import { GEMV_KERNELS } from "./gemv.js";
import { MATRIX_KERNELS } from "./matrix.js";
import { MOE_KERNELS } from "./moe.js";
import { NORM_QUANTIZE_KERNELS } from "./norm-quantize.js";
import { PLAIN_KERNELS } from "./plain.js";
import { ROPE_KERNELS } from "./rope.js";
import { ROW_KERNELS } from "./rows.js";
import { SAMPLE_KERNELS } from "./sample.js";
import { SDPA_KERNELS } from "./sdpa.js";
import { TILE_KERNELS } from "./tile.js";

/** THE WEBGPU KERNEL TABLE. A hand-tuned kernel for a format is one more row. */
export const WEBGPU_KERNELS: readonly WebGpuKernel[] = [
  ...GEMV_KERNELS,
  ...MATRIX_KERNELS,
  ...TILE_KERNELS,
  ...PLAIN_KERNELS,
  ...ROW_KERNELS,
  ...ROPE_KERNELS,
  ...SDPA_KERNELS,
  ...MOE_KERNELS,
  ...ELEMENTWISE_KERNELS,
  ...CONVERT_KERNELS,
  ...NORM_QUANTIZE_KERNELS,
  ...CONV_KERNELS,
  ...SAMPLE_KERNELS,
];
