import type { NativeKernel } from "../kernel.js";
import { GENERAL_KERNELS } from "./general-table.js";
import { LINEAR_KERNELS } from "./linear-table.js";
import { ROWS_KERNELS } from "./rows-table.js";
import { SDPA_KERNELS } from "./sdpa-table.js";

/** THE NATIVE KERNEL TABLE. A hand-tuned kernel is one more row. */
export const NATIVE_KERNELS: readonly NativeKernel[] = [
  ...LINEAR_KERNELS,
  ...SDPA_KERNELS,
  ...ROWS_KERNELS,
  ...GENERAL_KERNELS,
];
