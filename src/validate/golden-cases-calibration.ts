import type { GoldenHandler } from "./golden-case.js";

export const CALIBRATION: Readonly<Record<string, GoldenHandler>> = {};
