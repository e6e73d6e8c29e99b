import type { NativeKernel } from "../kernel.js";
import { CONV_KERNELS } from "./general-conv.js";
import { ELEMENTWISE_KERNELS } from "./general-elementwise.js";
import { LINEAR_KERNELS } from "./general-linear.js";
import { QUANTIZE_KERNELS } from "./general-quantize.js";
import { ROPE_KERNELS } from "./general-rope.js";
import { ROW_KERNELS } from "./general-rows.js";
import { SDPA_GENERAL_KERNELS } from "./general-sdpa.js";

/** Kernels that take every format through run-time descriptors: one for each op. */
export const GENERAL_KERNELS: readonly NativeKernel[] = [
  ...LINEAR_KERNELS,
  ...SDPA_GENERAL_KERNELS,
  ...ROPE_KERNELS,
  ...ROW_KERNELS,
  ...QUANTIZE_KERNELS,
  ...ELEMENTWISE_KERNELS,
  ...CONV_KERNELS,
];
