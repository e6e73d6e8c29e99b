/** WebGPU's buffer usage bits; Node has no `GPUBufferUsage` global. */
export const USAGE = { mapRead: 1, copySrc: 4, copyDst: 8, uniform: 64, storage: 128 } as const;
