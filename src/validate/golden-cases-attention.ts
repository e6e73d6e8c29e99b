import type { GoldenHandler } from "./golden-case.js";

export const ATTENTION_AND_TRAINING: Readonly<Record<string, GoldenHandler>> = {};
