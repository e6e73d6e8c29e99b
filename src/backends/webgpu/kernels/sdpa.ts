import type { Requirement } from "../../../plan/select.js";
import type { WebGpuKernel } from "../kernel.js";
import { buildDecode, decodeMemory, splitScratch } from "./sdpa-decode.js";
import { buildMatrixPrefill, MATRIX_ROWS, sdpaMatrixRequirements } from "./sdpa-matrix.js";
import { buildPrefill, PREFILL_MEMORY, PREFILL_TILE } from "./sdpa-prefill.js";
import { keyExtent, memoryUnmet, queryRows, sdpaRequirements, sdpaStep } from "./sdpa-step.js";

/** Query rows of a KV head that decode kernels take; with more, keys would be read again for every 8. */
const FEW_ROWS = 32;
/** Keys from which on a second dispatch costs less than keys that wait for each other. */
const LONG = 1024;

const fewRows: Requirement = {
  unmet: (bound) => {
    const rows = queryRows(bound);
    return rows <= FEW_ROWS
      ? null
      : `a KV head has ${rows} query rows (tokens x ${sdpaStep(bound).group} heads): at most ${FEW_ROWS}`;
  },
};
const decodeFits: Requirement = { unmet: (bound, device) => memoryUnmet(decodeMemory(bound), device) };

export const SDPA_KERNELS: readonly WebGpuKernel[] = [
  {
    id: "webgpu/sdpa/prefill",
    kind: "sdpa",
    requires: [...sdpaRequirements, { unmet: (_, device) => memoryUnmet(PREFILL_MEMORY, device) }],
    rowTile: PREFILL_TILE,
    efficiency: { bandwidth: 0.2, compute: 0.2 },
    build: buildPrefill,
  },
  {
    id: "webgpu/sdpa/prefill_matrix",
    kind: "sdpa",
    requires: [...sdpaRequirements, ...sdpaMatrixRequirements],
    rowTile: MATRIX_ROWS,
    efficiency: { bandwidth: 0.2, compute: 1 },
    build: buildMatrixPrefill,
  },
  {
    id: "webgpu/sdpa/decode",
    kind: "sdpa",
    requires: [...sdpaRequirements, fewRows, decodeFits],
    efficiency: { bandwidth: 0.25, compute: 0.05 },
    build: (context) => buildDecode(context, false),
  },
  {
    id: "webgpu/sdpa/decode_split",
    kind: "sdpa",
    requires: [
      ...sdpaRequirements,
      fewRows,
      decodeFits,
      {
        unmet: (bound) => {
          const keys = keyExtent(bound);
          return keys >= LONG ? null : `its second dispatch pays from ${LONG} keys on: a query sees ${keys} at most`;
        },
      },
    ],
    efficiency: { bandwidth: 0.6, compute: 0.1 },
    scratch: splitScratch,
    build: (context) => buildDecode(context, true),
  },
];
