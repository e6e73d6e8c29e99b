/** The seed of this run's random inputs: `FEWBIT_SEED=... npx vitest run` repeats a run. Test names carry it. */
export const SEED = Number(process.env.FEWBIT_SEED ?? Date.now() % 2 ** 31);
