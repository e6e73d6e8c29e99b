import type { NativeKernel } from "../kernel.js";
import { SDPA_DECODE } from "./sdpa-decode.js";
import { SDPA_PREFILL } from "./sdpa-prefill.js";

/** Attention on the matrix units of GPUs; what these do not take is left to the general kernel. */
export const SDPA_KERNELS: readonly NativeKernel[] = [SDPA_DECODE, ...SDPA_PREFILL];
