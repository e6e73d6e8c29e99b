import type { NativeKernel } from "../kernel.js";
import { GEMM_KERNELS } from "./linear-gemm.js";
import { MIXED_KERNELS } from "./linear-mixed.js";
import { SKINNY_KERNELS } from "./linear-skinny.js";

/** Linear kernels that are made for speed. */
export const LINEAR_KERNELS: readonly NativeKernel[] = [...SKINNY_KERNELS, ...MIXED_KERNELS, ...GEMM_KERNELS];
